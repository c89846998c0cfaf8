"""A batch job on an output that exists: what is done again, what is not, what is refused."""

import json
import os
import random
import threading
from pathlib import Path

import pytest
from batch_files import (
    BAD_LINES,
    Job,
    make_config,
    read_output,
    request_line,
    without_time,
    write_byte_tokenizer,
    write_input,
    write_lines,
)
from fake_engine import FakeEngine

from apex_jax.batch.identity import differences
from apex_jax.models.model_files import fingerprint


@pytest.fixture
def job(tmp_path):
    return Job(tmp_path)


@pytest.mark.parametrize("ordered", [False, True])
def test_resume_completes_the_rest(job, ordered):
    write_input(job, 40, BAD_LINES)
    assert job.run(ordered=ordered) == 1
    whole = job.output.read_bytes()
    expected = without_time(read_output(job.output))
    lines = whole.splitlines(keepends=True)
    random.seed(0)
    for keep in (0, 1, 17, len(lines)):
        kept = lines[:keep] if ordered else random.sample(lines, keep)
        job.output.write_bytes(b"".join(kept) + b'{"custom_id": "r1')
        assert job.run(ordered=ordered) == 1
        assert without_time(read_output(job.output)) == expected
        assert job.output.read_bytes().startswith(b"".join(kept))
        assert len(job.engine.submitted) <= 46 - keep
        if ordered:
            found = [item["apex"]["line"] for item in read_output(job.output)]
            assert found == sorted(found)
        assert f"{keep} lines finished before" in job.said


def test_ordered_run_puts_an_unordered_output_in_order(job):
    write_input(job, 40)
    job.run()
    lines = job.output.read_bytes().splitlines(keepends=True)
    job.output.write_bytes(b"".join(reversed(lines[:25])))
    assert job.run(ordered=True) == 0
    assert [item["apex"]["line"] for item in read_output(job.output)] == list(range(1, 41))


def test_retry_failed(job):
    write_input(job, 10, BAD_LINES)
    assert job.run() == 1
    before = without_time(read_output(job.output))
    assert job.run(retry_failed=True) == 1
    assert without_time(read_output(job.output)) == before
    write_byte_tokenizer(job.folder)
    assert job.run(retry_failed=True) == 2
    assert "tokenizer_sha256 was null, now" in job.said
    (job.folder / "tokenizer.json").unlink()
    repaired = ["", *[{"custom_id": f"new{i}", "prompt_token_ids": [i]} for i in range(6)]]
    write_input(job, 10, repaired)
    assert job.run() == 2
    assert "line 11: it failed as a line that could not run, and now it could" in job.said
    assert "--retry_failed runs failed lines again" in job.said
    assert without_time(read_output(job.output)) == before
    assert job.run(retry_failed=True, ordered=True) == 0
    found = read_output(job.output)
    assert [item["apex"]["line"] for item in found] == list(range(1, 17))
    assert job.engine.submitted == [f"new{i}" for i in range(6)]


def test_failed_lines_stay_failed_without_retry(job):
    write_input(job, 4, BAD_LINES)
    job.run()
    before = job.output.read_bytes()
    assert job.run() == 1
    assert job.output.read_bytes() == before
    assert job.engine.submitted == []
    assert "10 lines finished before, 6 of them failed" in job.said


def test_appended_input_is_more_work_and_removed_lines_are_noted(job):
    write_input(job, 5)
    job.run()
    write_input(job, 8)
    assert job.run() == 0
    assert len(read_output(job.output)) == 8
    write_input(job, 6)
    assert job.run() == 0
    assert "note: 2 results in" in job.said


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"max_tokens": 3}, "'r1' (line 2): max_tokens was 6, now 3;"),
        ({"top_p": 0.5, "top_k": 2}, "top_k was 0, now 2; top_p was 1.0, now 0.5;"),
        ({"stop_token_ids": [4]}, "stop_token_ids was [], now [4];"),
        ({"prompt_token_ids": [9, 9]}, "'r1' (line 2): the prompt;"),
        ({"n": 2}, "'r1' (line 2): n was 1, now 2;"),
        ({"n": 0}, "'r1' (line 2): the line cannot run now (n is 0"),
    ],
)
@pytest.mark.parametrize("pipe", [False, True])
def test_changed_request_stops_the_job(job, change, message, pipe):
    write_input(job, 5)
    job.run()
    before = job.output.read_bytes()
    lines = [request_line(number) for number in range(5)]
    lines[1] = request_line(1, **change)
    write_lines(job.input, lines)
    if pipe:  # an input that can be read only once is compared on the way
        data, path = job.input.read_bytes(), job.folder / "pipe"
        os.mkfifo(path)
        thread = threading.Thread(target=path.write_bytes, args=(data,))
        thread.start()
        assert job.run(input=path) == 3
        thread.join()
    else:
        assert job.run() == 2
        assert job.engine is None, "refused before the model loads"
    assert message in job.said
    assert "go back to what it was, name another --output, or drop all results" in job.said
    assert job.output.read_bytes() == before
    num_choices = change.get("n", 1)
    assert job.run(overwrite=True) == (0 if num_choices else 1)
    assert len(read_output(job.output)) == 5
    assert len(job.engine.submitted) == 4 + num_choices


def test_repaired_request_is_refused_until_retried(job):
    write_input(job, 2, [{"custom_id": "x", "prompt_token_ids": [1], "n": 0}])
    assert job.run() == 1
    write_input(job, 2, [{"custom_id": "x", "prompt_token_ids": [1]}])
    assert job.run() == 2
    assert "'x' (line 3): the line could not run before, and now it could" in job.said
    assert job.run(retry_failed=True) == 0


def test_changed_bad_line_is_refused(job):
    write_lines(job.input, ["nonsense\n"])
    assert job.run() == 1
    write_lines(job.input, ["other nonsense\n"])
    assert job.run() == 2
    assert "answered line 1: its text" in job.said


@pytest.mark.parametrize(
    ("sampling", "fingerprint", "message"),
    [
        ({}, "beef", 'model.fingerprint was "f00d", now "beef"; go back'),
        ({"temperature": 0.5}, "f00d", "defaults.temperature was 1.0, now 0.5; go back"),
        ({"seed": 1}, "f00d", "defaults.seed was 0, now 1; go back"),
    ],
)
@pytest.mark.parametrize("sidecar", [True, False])
def test_other_model_or_defaults_stop_the_job(job, sampling, fingerprint, message, sidecar):
    explicit = {"temperature": 0, "seed": 1, "top_p": 1, "top_k": 0}
    write_lines(job.input, [request_line(number, **explicit) for number in range(4)])
    job.run()
    before = job.output.read_bytes()
    if not sidecar:
        job.sidecar.write_text("[torn")
        message = "out.jsonl.job.json, which could say what differs, is lost or does not match"

    def engine(config, timeline):
        return FakeEngine(config, timeline, fingerprint=fingerprint)

    config = make_config(job.folder, **sampling)
    assert job.run(config=config, engine=engine) == 2
    assert f"{job.output} belongs to another job" in job.said
    assert message in job.said
    assert job.output.read_bytes() == before
    assert job.run(config=config, engine=engine, overwrite=True) == 0
    assert job.run(config=config, engine=engine) == 0
    assert job.engine.submitted == []


def test_lost_sidecar_of_the_same_job_is_written_again(job):
    write_input(job, 3)
    job.run()
    identity = json.loads(job.sidecar.read_text())
    job.sidecar.unlink()
    assert job.run() == 0
    assert json.loads(job.sidecar.read_text()) == identity


def load_folder(config, timeline):
    """An engine whose model is what lies in the folder."""
    return FakeEngine(config, timeline, fingerprint=fingerprint(Path(config.model.path)))


@pytest.fixture
def weights(job):
    path = job.folder / "model.safetensors"
    path.write_bytes(b"weights")
    return path


def test_a_finished_job_loads_no_model(job, weights):
    write_input(job, 8, ["no JSON\n"])
    assert job.run(engine=load_folder) == 1
    whole = job.output.read_bytes()
    write_lines(job.output, reversed(whole.decode("ascii").splitlines(keepends=True)))
    assert job.run(engine=load_folder, ordered=True, metrics=job.folder / "m.json") == 1
    assert job.engine is None
    assert "all 9 requests are finished: the model is not loaded; the results are in" in job.said
    assert "note: 1 lines failed" in job.said
    assert [item["apex"]["line"] for item in read_output(job.output)] == list(range(1, 10))
    assert not (job.folder / "m.json").exists()

    assert job.run(engine=load_folder, retry_failed=True) == 1
    assert job.engine.submitted == [], "one line was left, and failed again"
    write_input(job, 9)
    job.output.write_bytes(whole)
    assert job.run(engine=load_folder, overwrite=True) == 0
    write_input(job, 4)
    assert job.run(engine=load_folder, retry_failed=True) == 0
    assert job.engine is None
    assert "all 4 requests are finished" in job.said
    assert "note: 5 results in" in job.said


def test_a_finished_job_in_another_order_of_lines(job, weights):
    write_input(job, 6)
    assert job.run(engine=load_folder) == 0
    write_lines(job.input, [request_line(number) for number in (4, 2, 5, 0, 3, 1)])
    assert job.run(engine=load_folder, ordered=True) == 0
    assert job.engine is None
    assert [item["custom_id"] for item in read_output(job.output)] == [
        f"r{number}" for number in (4, 2, 5, 0, 3, 1)
    ]


def test_another_model_is_refused_before_it_loads(job, weights):
    write_input(job, 8)
    assert job.run(engine=load_folder) == 0
    for change, message in (
        (lambda config: setattr(config.model, "dtype", "float16"), 'dtype was "float32", now "flo'),
        (lambda config: setattr(config.model, "precision", "highest"), "model.precision was "),
        (lambda config: setattr(config.model, "weights", "dummy"), 'now "dummy-0"'),
        (lambda config: weights.write_bytes(b"others"), "model.fingerprint was "),
    ):
        config = make_config(job.folder)
        change(config)
        assert job.run(config=config, engine=load_folder) == 2
        assert message in job.said
        assert job.engine is None


def test_a_finished_job_without_its_sidecar_asks_the_model(job, weights):
    write_input(job, 3)
    assert job.run(engine=load_folder) == 0
    job.sidecar.unlink()
    assert job.run(engine=load_folder) == 0
    assert job.engine is not None
    assert job.run(engine=load_folder) == 0
    assert job.engine is None


def test_differences_of_identities():
    old = {"model": {"dtype": "float32", "gone": 1}, "format": 1}
    new = {"model": {"dtype": "float16"}, "format": 1, "more": None}
    assert differences(old, new) == [
        'model.dtype was "float32", now "float16"',
        "more was null, now null",
    ]
