"""The output file: one writer, whole lines, torn ends, foreign files, full disks."""

import errno
import json
import os
import signal
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from apex_jax.batch.id_index import IdIndex, id_key, line_key
from apex_jax.batch.journal import Journal, OutputError
from apex_jax.batch.lines import BadLine
from apex_jax.batch.reorder import ReorderBuffer
from apex_jax.batch.results import decode_line, encode_bad_line
from apex_jax.batch.resume import JobRefusedError, keep_successes, put_in_order, read_finished

JOB = "ab" * 32


def line(number: int) -> bytes:
    return encode_bad_line(BadLine(f"id{number}", number, "code", "why", f"{number:064x}"), JOB)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "out.jsonl"


def open_journal(path, **kwargs) -> Journal:
    journal = Journal(path, **kwargs)
    list(journal.scan())
    journal.start_appending()
    return journal


def test_lines_are_there_as_soon_as_they_are_appended(path):
    journal = open_journal(path)
    for number in range(3):
        journal.append(line(number))
        assert path.read_bytes() == b"".join(line(one) for one in range(number + 1))
    journal.close()
    found = list(Journal(path).scan())
    assert [(one.custom_id, one.line) for one in found] == [("id0", 0), ("id1", 1), ("id2", 2)]
    assert [one.offset for one in found] == [0, len(line(0)), len(line(0)) + len(line(1))]


def test_second_job_is_refused(path):
    journal = open_journal(path)
    with pytest.raises(OutputError, match=r"out\.jsonl is being written by another job"):
        Journal(path)
    journal.append(line(1))
    journal.rewrite([])
    with pytest.raises(OutputError, match="another job"):
        Journal(path)
    journal.close()
    Journal(path).close()


def test_lock_ends_with_its_process(path):
    code = f"""
import os, signal
from pathlib import Path
from apex_jax.batch.journal import Journal
journal = Journal(Path({str(path)!r}))
print("locked", flush=True)
signal.pause()
"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == b"locked\n"
        with pytest.raises(OutputError, match="another job"):
            Journal(path)
        other.send_signal(signal.SIGKILL)
        other.wait()
    Journal(path).close()


def test_file_replaced_while_waiting_for_it_is_opened_again(path, monkeypatch):
    path.write_bytes(line(1))
    real_stat, calls = os.stat, []

    def replaced_meanwhile(name, *args, **kwargs):
        calls.append(name)
        if len(calls) == 2:  # the one after locking
            path.with_suffix(".new").write_bytes(line(2))
            os.replace(path.with_suffix(".new"), path)
        return real_stat(name, *args, **kwargs)

    monkeypatch.setattr("apex_jax.batch.journal.os.stat", replaced_meanwhile)
    journal = Journal(path)
    monkeypatch.undo()
    assert os.path.samestat(os.fstat(journal._descriptor), os.stat(path))
    journal.close()


def test_torn_at_every_byte(path):
    whole, last = line(1) + line(2), line(3)
    for cut in range(len(last)):
        path.write_bytes(whole + last[:cut])
        journal = Journal(path)
        assert [one.line for one in journal.scan()] == [1, 2]
        assert path.read_bytes() == whole + last[:cut], "reading changes nothing"
        journal.start_appending()
        journal.append(last)
        journal.close()
        assert path.read_bytes() == whole + last


@pytest.mark.parametrize("tail", [b"\0" * 50, line(3)[:40] + b"\0" * 9 + b"\n", b"\0" * 5 + b"\n"])
def test_zeros_of_a_power_failure_are_torn_too(path, tail):
    path.write_bytes(line(1) + tail)
    journal = open_journal(path)
    journal.close()
    assert path.read_bytes() == line(1)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"my notes", "line 1 is no result line (not JSON)"),
        (b"my notes\n", "line 1 is no result line (not JSON)"),
        (b'{"custom_id": "a", "prompt": "x"}\n', "line 1 is no result line (no field 'apex')"),
        (b'{"custom_id": "a", "prompt": "x"}', "line 1 is no result line (no field 'apex')"),
        (line(1) + b'{"custom_id": "a\n', "line 2 is no result line (not JSON)"),
        (line(1) + line(2)[:30] + line(3), "line 2 is no result line (not JSON)"),
        (line(1) + b"[]\n" + line(3), "line 2 is no result line"),
    ],
)
def test_foreign_files_are_refused_and_kept(path, data, message):
    path.write_bytes(data)
    journal = Journal(path)
    with pytest.raises(OutputError) as caught:
        list(journal.scan())
    journal.close()
    assert message in str(caught.value)
    assert "--overwrite" in str(caught.value)
    assert path.read_bytes() == data


def test_endless_line_is_refused(path, monkeypatch):
    monkeypatch.setattr("apex_jax.batch.journal.MAX_RESULT_BYTES", 64)
    path.write_bytes(line(1)[:64] * 3)
    with pytest.raises(OutputError, match="no result line"):
        list(Journal(path).scan())


def test_full_disk_loses_nothing_already_written(path):
    def write(descriptor, data):
        """Room for two lines and a bit."""
        room = len(line(1)) * 2 + 20 - os.fstat(descriptor).st_size
        if room <= 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return os.write(descriptor, data[:room])

    journal = open_journal(path, write=write)
    journal.append(line(1))
    journal.append(line(2))
    with pytest.raises(OutputError, match=r"cannot write .*out\.jsonl: No space left on device; "):
        journal.append(line(3))
    assert path.read_bytes() == line(1) + line(2), "the half line is gone at once"
    with pytest.raises(OutputError, match="make room and start the same command again"):
        journal.append(line(3))
    journal.close()
    assert path.read_bytes() == line(1) + line(2)


def test_short_writes_are_continued(path):
    journal = open_journal(path, write=lambda where, data: os.write(where, data[:7]))
    journal.append(line(1))
    journal.close()
    assert path.read_bytes() == line(1)


def test_full_device():
    """/dev/full is also an output that is no regular file: no lock, no resuming."""
    from pathlib import Path

    journal = open_journal(Path("/dev/full"))
    with pytest.raises(OutputError, match="cannot write /dev/full: No space left on device"):
        journal.append(line(1))
    with pytest.raises(OutputError, match="no regular file"):
        journal.rewrite([])
    journal.close()


def test_no_room_to_rewrite_leaves_the_file(path, monkeypatch):
    journal = open_journal(path)
    for number in range(3):
        journal.append(line(number))
    before = path.read_bytes()

    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr("apex_jax.batch.journal.os.fsync", full)
        with pytest.raises(OutputError, match="No space left on device"):
            journal.rewrite([(0, len(line(0)))])
    assert path.read_bytes() == before
    assert os.listdir(path.parent) == ["out.jsonl"]
    journal.append(line(3))
    journal.close()
    assert path.read_bytes() == before + line(3)


def test_rewrite_spares_files_of_the_user(path):
    mine = path.with_name("out.jsonl.tmp")
    mine.write_text("my notes")
    path.write_bytes(line(1) + line(2))
    journal = open_journal(path)
    journal.rewrite([(0, len(line(1)))])
    journal.close()
    assert mine.read_text() == "my notes"
    assert sorted(os.listdir(path.parent)) == ["out.jsonl", "out.jsonl.tmp"]


def test_missing_folder_and_unwritable_file(path):
    with pytest.raises(OutputError, match=r"cannot write .*: No such file or directory"):
        Journal(path / "no" / "out.jsonl")
    with pytest.raises(OutputError, match=r"cannot write .*: Is a directory"):
        Journal(path.parent)


def test_empty_file_goes_away_only_if_it_was_created(path):
    Journal(path).close()
    assert not path.exists()
    path.touch()
    Journal(path).close()
    assert path.exists()


def test_symbolic_link_stays_one(path, tmp_path):
    target = tmp_path / "elsewhere.jsonl"
    target.write_bytes(line(1) + line(2))
    path.symlink_to(target)
    journal = open_journal(path)
    journal.rewrite([(len(line(1)), len(line(2)))])
    journal.close()
    assert path.is_symlink()
    assert target.read_bytes() == line(2)


def test_rewrite_keeps_the_file_mode(path):
    path.write_bytes(line(1))
    path.chmod(0o640)
    journal = open_journal(path)
    journal.rewrite([(0, len(line(1)))])
    journal.close()
    assert path.stat().st_mode & 0o777 == 0o640


def test_put_in_order_uses_the_lines_of_this_run(path):
    journal = open_journal(path)
    for number in (4, 2, 9, 3):
        journal.append(line(number))
    put_in_order(journal, IdIndex())
    assert [one.line for one in journal.scan()] == [2, 3, 4, 9]
    index = IdIndex()
    index.see(id_key("id9"), 1)
    put_in_order(journal, index)
    assert [one.line for one in journal.scan()] == [9, 2, 3, 4]
    journal.append(line(10))
    assert [one.line for one in journal.scan()] == [9, 2, 3, 4, 10]
    journal.close()


def test_keep_successes(path):
    good = json.loads(line(2)) | {"response": {"body": 1}, "error": None}
    path.write_bytes(line(1) + json.dumps(good).encode() + b"\n" + line(3))
    journal = open_journal(path)
    keep_successes(journal)
    assert [one.line for one in journal.scan()] == [2]
    journal.close()


def test_two_results_of_one_id_are_refused(path):
    path.write_bytes(line(1) + line(2) + line(1))
    journal = Journal(path)
    with pytest.raises(JobRefusedError, match="two results for custom_id 'id1'"):
        read_finished(journal, IdIndex(), drop_failed=False)
    journal.close()


@given(st.text(), st.text())
def test_any_text_is_one_ascii_line(custom_id, message):
    data = encode_bad_line(BadLine(custom_id, 1, "code", message, "0" * 64), JOB)
    assert data.isascii()
    assert data.splitlines() == [data[:-1]]
    assert decode_line(data, 0).custom_id == custom_id


@given(st.lists(st.tuples(st.integers(1, 40), st.booleans(), st.integers(0, 2**64 - 1))))
def test_index_agrees_with_dictionaries(operations):
    """Keys that collide in the small table as well as keys all over it."""
    index = IdIndex(num_slots=4)
    seen, finished = {}, {}
    for number, (small, is_finish, digest) in enumerate(operations, 1):
        key = small << 58 | small % 3
        if is_finish:
            fresh = index.finish(key, f"{digest:016x}{'0' * 48}", failed=bool(digest % 2))
            assert fresh == (key not in finished)
            finished.setdefault(key, digest)
        else:
            assert index.see(key, number) == seen.get(key)
            seen.setdefault(key, number)
    for key in {small << 58 | small % 3 for small in range(1, 41)}:
        assert index.is_finished(key) == (key in finished)
        assert index.seen_line(key) == seen.get(key)
        if key in finished:
            assert index.is_same_request(key, f"{finished[key]:016x}{'f' * 48}")
            assert not index.is_same_request(key, f"{finished[key] ^ 1:016x}{'0' * 48}")
    assert len(index) == len(seen.keys() | finished.keys())
    assert index.num_finished == len(finished)
    assert index.num_failed == sum(digest % 2 for digest in finished.values())


def test_index_takes_a_few_tens_of_bytes_an_id():
    index = IdIndex()
    for number in range(20_000):
        assert index.see(id_key(f"request-{number}"), number + 1) is None
    assert index.num_bytes / len(index) <= 64
    assert index.see(id_key("request-77"), 99_999) == 78
    assert id_key("5") != line_key(5)


@given(st.permutations(range(12)), st.integers(1, 5))
def test_reorder_buffer(order, capacity):
    buffer = ReorderBuffer(capacity)
    waiting: list[int] = []
    out: list[bytes] = []
    tickets = iter(range(12))
    while len(out) < 12:
        while not buffer.is_full and (ticket := next(tickets, None)) is not None:
            assert buffer.take_ticket() == ticket
            waiting.append(ticket)
        waiting.sort(key=order.index)
        ticket = waiting.pop(0)
        out += buffer.put(ticket, b"%d" % ticket)
        assert buffer.num_open <= capacity
    assert out == [b"%d" % ticket for ticket in range(12)]
    assert buffer.drain() == []
