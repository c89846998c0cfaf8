"""What the host attention op's threads record: on Python's clock, bounded, off by default."""

import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from apex_jax.ops import host_attention, native_library
from apex_jax.timeline import Timeline
from apex_jax.trace import TraceFile, read_events


@pytest.fixture(autouse=True)
def op():
    return native_library.load(num_threads=2)


def attend_once(pool):
    q_bnh = jnp.ones((4, 8, 64), jnp.float32)
    block_tables_bm = jnp.arange(64, dtype=jnp.int32).reshape(4, 16)
    lengths_b = jnp.full(4, 16 * 16, jnp.int32)
    jax.block_until_ready(host_attention.attend(pool, q_bnh, block_tables_bm, lengths_b))


@pytest.fixture
def pool():
    pool = host_attention.allocate_pool(64, 4, 16, 64, jnp.float32)
    attend_once(pool)  # compiles
    return pool


def test_spans_lie_within_the_call_that_made_them(pool):
    native_library.record(1000)
    for _ in range(20):
        start_sec = time.perf_counter()
        attend_once(pool)
        end_sec = time.perf_counter()
        spans, num_dropped = native_library.take_spans()
        assert num_dropped == 0
        # One parallel part of 4 rows x 4 KV heads.
        assert spans["num_tasks"].sum() == 16
        assert 1 <= len(spans) == len(set(spans["thread"])) <= 2
        assert set(spans["thread"]) <= {0, 1}
        assert (spans["start_ns"] >= start_sec * 1e9).all()
        assert (spans["end_ns"] > spans["start_ns"]).all()
        assert (spans["end_ns"] <= end_sec * 1e9).all()


def test_all_threads_record(pool):
    native_library.record(10_000)
    seen = set()
    deadline_sec = time.monotonic() + 60
    while seen != {0, 1} and time.monotonic() < deadline_sec:
        attend_once(pool)
        seen |= set(native_library.take_spans()[0]["thread"].tolist())
    assert seen == {0, 1}


def test_what_finds_no_room_is_counted(pool):
    native_library.record(3)
    for _ in range(5):
        attend_once(pool)
    spans, num_dropped = native_library.take_spans()
    assert len(spans) == 3
    assert 2 <= num_dropped <= 7
    assert native_library.take_spans()[1] == 0


def test_more_spans_than_are_taken_at_once_come_in_order(pool, monkeypatch):
    monkeypatch.setattr(native_library, "_MAX_TAKEN", 4)
    native_library.record(100)
    for _ in range(9):
        attend_once(pool)
    spans, _ = native_library.take_spans()
    assert spans["num_tasks"].sum() == 9 * 16
    ends_of_regions = np.maximum.accumulate(spans["end_ns"])
    later_region = np.flatnonzero(np.diff(spans["thread"]) <= 0)
    assert (spans["start_ns"][later_region + 1] >= ends_of_regions[later_region]).all()


def test_nothing_is_recorded_unless_asked_for(pool):
    attend_once(pool)
    assert len(native_library.take_spans()[0]) == 0
    native_library.record(10)
    native_library.record(0)
    attend_once(pool)
    assert len(native_library.take_spans()[0]) == 0
    native_library.record(10)
    native_library.configure(num_threads=2)
    attend_once(pool)
    assert len(native_library.take_spans()[0]) == 0


def test_a_negative_capacity_is_an_error():
    with pytest.raises(ValueError, match="capacity = -1: must be at least 0"):
        native_library.record(-1)


def test_a_trace_shows_the_threads_under_the_job_that_used_them(pool, tmp_path):
    trace = TraceFile(tmp_path / "trace.json", origin_sec=time.perf_counter())
    timeline = Timeline(trace)
    native_library.record(1000)
    timeline.watch_threads(native_library.take_spans)
    start_sec = time.perf_counter()
    attend_once(pool)
    timeline.span("host", "attention", start_sec, time.perf_counter(), layer=0)
    trace.close()
    events = read_events(tmp_path / "trace.json")
    titles = {e["tid"]: e["args"]["name"] for e in events if e["name"] == "thread_name"}
    spans = [(titles[event["tid"]], event) for event in events if event["ph"] == "X"]
    (job,) = [event for title, event in spans if title == "host"]
    threads = [event for title, event in spans if title.startswith("host thread ")]
    assert sum(event["args"]["tasks"] for event in threads) == 16
    for event in threads:
        assert job["ts"] <= event["ts"] <= event["ts"] + event["dur"] <= job["ts"] + job["dur"]
