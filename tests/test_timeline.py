"""The timeline and its trace file: parsed again, complete, bounded, and whole after a kill."""

import itertools
import json
import os
import pathlib
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

from apex_jax.ops.native_library import THREAD_SPAN
from apex_jax.overlap import Figures
from apex_jax.timeline import Timeline
from apex_jax.trace import LANES, Event, TraceFile, read_events

ROOT = pathlib.Path(__file__).parents[1]


def by_title(events):
    """Spans and instants of each row of the viewer, in order of time."""
    titles = {e["tid"]: e["args"]["name"] for e in events if e["name"] == "thread_name"}
    rows = {title: [] for title in titles.values()}
    for event in events:
        if event["ph"] != "M":
            rows[titles[event["tid"]]].append(event)
    return {
        title: sorted(row, key=lambda event: (event["ts"], -event.get("dur", 0)))
        for title, row in rows.items()
    }


def assert_nested(row):
    """Each span lies inside the one it begins in."""
    open_ends = []
    for event in row:
        if event["ph"] != "X":
            continue
        end = round(1000 * (event["ts"] + event["dur"]))
        while open_ends and open_ends[-1] <= round(1000 * event["ts"]):
            open_ends.pop()
        assert not open_ends or end <= open_ends[-1], event
        open_ends.append(end)


def test_a_trace_holds_what_was_reported(tmp_path):
    trace = TraceFile(tmp_path / "trace.json", origin_sec=100.0)
    timeline = Timeline(trace)
    assert timeline.is_tracing
    timeline.span("scheduler", "plan", 100.0, 100.001, sweep=7, requests=["a", 'b"\n'])
    timeline.span("dispatch", "launch", 100.001, 100.01, sweep=7)
    timeline.span("dispatch", "boundary", 100.002, 100.003, sweep=7, layer=3)
    timeline.span("device", "boundary", 100.002, 100.005, layer=3, rows=np.int32(4))
    timeline.span("device", "attention", 100.005, 100.0061, cohort=1, what=pathlib.Path("x"))
    timeline.instant("scheduler", "merge", 100.0025, cohort=1)
    trace.close()
    events = json.loads((tmp_path / "trace.json").read_text())
    assert events == read_events(tmp_path / "trace.json")
    assert all(event["pid"] == 1 for event in events)
    rows = by_title(events)
    assert list(rows) == ["scheduler", "dispatch", "device"]
    plan, merge = rows["scheduler"]
    assert plan == {
        "name": "plan",
        "ph": "X",
        "pid": 1,
        "tid": plan["tid"],
        "ts": 0.0,
        "dur": 1000.0,
        "args": {"sweep": 7, "requests": ["a", 'b"\n']},
    }
    assert (merge["ph"], merge["s"], merge["ts"], merge["args"]) == (
        "i",
        "t",
        2500.0,
        {"cohort": 1},
    )
    assert rows["device"][0]["args"] == {"layer": 3, "rows": 4}
    assert rows["device"][1]["args"] == {"cohort": 1, "what": "x"}
    for row in rows.values():
        assert_nested(row)
    assert trace.describe() == f"trace      6 events in {tmp_path}/trace.json"


def test_lanes_are_shown_in_their_order(tmp_path):
    trace = TraceFile(tmp_path / "trace.json")
    timeline = Timeline(trace)
    for lane in reversed(LANES):
        timeline.span(lane, "x", 1.0, 2.0)
    spans = np.array([(thread, 1, 10**9, 2 * 10**9) for thread in (12, 0, 2)], THREAD_SPAN)
    timeline.watch_threads(lambda: (spans, 0))
    trace.close()
    events = read_events(tmp_path / "trace.json")
    places = {e["tid"]: e["args"]["sort_index"] for e in events if e["name"] == "thread_sort_index"}
    titles = {e["args"]["name"]: places[e["tid"]] for e in events if e["name"] == "thread_name"}
    threads = ["host thread 0", "host thread 2", "host thread 12"]
    assert sorted(titles, key=titles.__getitem__) == [*LANES, *threads]


def test_transfers_that_overlap_have_rows_of_their_own(tmp_path):
    trace = TraceFile(tmp_path / "trace.json")
    dice = np.random.default_rng(1)
    starts = np.cumsum(dice.exponential(0.5, 200))
    for start in starts:
        trace.add(Event("to host", "qkv", float(start), float(start + dice.exponential(1.0)), {}))
    trace.close()
    rows = by_title(read_events(tmp_path / "trace.json"))
    assert set(rows) >= {"to host", "to host (2)"}
    assert sum(map(len, rows.values())) == 200
    for row in rows.values():
        for first, second in itertools.pairwise(row):
            assert first["ts"] + first["dur"] <= second["ts"] + 1e-4


def test_touching_spans_are_not_rounded_into_each_other(tmp_path):
    trace = TraceFile(tmp_path / "trace.json", origin_sec=81234.5678)
    edges = 81234.5678 + np.cumsum(np.random.default_rng(2).uniform(1e-9, 3e-6, 500))
    for start, end in itertools.pairwise(edges.tolist()):
        trace.add(Event("device", "x", start, end, {}))
    trace.close()
    assert_nested(by_title(read_events(tmp_path / "trace.json"))["device"])


def test_reports_from_many_threads(tmp_path):
    trace = TraceFile(tmp_path / "trace.json")
    timeline = Timeline(trace)

    def report(number):
        lane = LANES[number % len(LANES)]
        for index in range(500):
            timeline.span(lane, "x", index + number / 10, index + number / 10 + 0.1, index=index)

    threads = [threading.Thread(target=report, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    trace.close()
    rows = by_title(read_events(tmp_path / "trace.json"))
    assert set(rows) == set(LANES)
    for row in rows.values():
        assert [event["args"]["index"] for event in row] == list(range(500))
    assert timeline.figures().device_busy_sec == pytest.approx(50.0)
    assert timeline.figures().host_busy_sec == pytest.approx(50.0)


def test_threads_are_watched_while_the_job_runs(tmp_path, monkeypatch):
    monkeypatch.setattr("apex_jax.trace.FLUSH_SEC", 0.01)
    trace = TraceFile(tmp_path / "trace.json")
    taken = threading.Event()

    def take_spans():
        if taken.is_set():
            return np.empty(0, THREAD_SPAN), 0
        taken.set()
        return np.array([(1, 5, 1_000, 3_500)], THREAD_SPAN), 4

    Timeline(trace).watch_threads(take_spans)
    assert taken.wait(30)
    trace.close()
    rows = by_title(read_events(tmp_path / "trace.json"))
    (span,) = rows["host thread 1"]
    assert (span["ts"], span["dur"], span["args"]) == (1.0, 2.5, {"tasks": 5})
    (note,) = rows["host"]
    assert note["name"] == "4 spans of the threads were dropped"


def test_a_full_trace_says_so_in_the_file_and_on_screen(tmp_path):
    trace = TraceFile(tmp_path / "trace.json", max_events=10)
    timeline = Timeline(trace)
    for second in range(25):
        timeline.span("device", "x", float(second), second + 0.5)
    trace.close()
    rows = by_title(read_events(tmp_path / "trace.json"))
    assert len(rows["device"]) == 10
    (note,) = rows["scheduler"]
    assert note["name"] == "the trace is full: it holds 10 events, later ones are dropped"
    assert note["ts"] == 10e6
    assert trace.describe().endswith("trace.json; full: 15 later events were dropped")
    assert timeline.figures().device_busy_sec == 12.5  # figures go on


def test_without_a_trace_only_figures_are_kept():
    timeline = Timeline()
    assert not timeline.is_tracing
    timeline.span("device", "x", 0.0, 1.0, requests=["a"])
    timeline.span("dispatch", "x", 0.0, 9.0)
    timeline.instant("scheduler", "x", 99.0)
    timeline.span("host", "x", 0.5, 2.0)
    timeline.rest(2.0, 5.0)
    timeline.span("device", "x", 6.0, 8.0)
    timeline.watch_threads(lambda: pytest.fail("nobody looks"))
    assert timeline.figures() == Figures(
        observed_sec=5.0,
        device_busy_sec=3.0,
        host_busy_sec=1.5,
        both_busy_sec=0.5,
        num_bubbles=2,
        bubble_sec=2.0,
    )


def test_figures_begin_anew_where_the_job_does():
    timeline = Timeline()
    timeline.span("device", "measured", 0.0, 5.0)
    timeline.forget()
    assert timeline.figures() == Figures()
    timeline.span("device", "layers", 7.0, 8.0)
    assert timeline.figures().observed_sec == 1.0


def test_an_unknown_lane_is_an_error():
    timeline = Timeline()
    with pytest.raises(
        ValueError, match="lane is 'gpu'; there are scheduler, dispatch, device, to"
    ):
        timeline.span("gpu", "x", 0.0, 1.0)
    with pytest.raises(ValueError, match="lane is 'gpu'; there are"):
        timeline.instant("gpu", "x", 0.0)


def test_an_existing_file_is_kept_until_there_is_an_event(tmp_path):
    path = tmp_path / "trace.json"
    path.write_text("an older one")
    TraceFile(path).close()
    assert path.read_text() == "an older one"
    trace = TraceFile(path)
    trace.add(Event("device", "x", 0.0, 1.0, {}))
    trace.close()
    trace.close()  # changes nothing
    trace.add(Event("device", "late", 0.0, 1.0, {}))
    assert len(by_title(read_events(path))["device"]) == 1


def test_a_path_that_cannot_be_opened(tmp_path):
    with pytest.raises(FileNotFoundError, match="no/trace"):
        TraceFile(tmp_path / "no" / "trace.json")


def test_a_full_disk_ends_the_trace_and_nothing_else():
    trace = TraceFile(pathlib.Path("/dev/full"))
    trace._is_empty = False  # a device cannot be truncated
    timeline = Timeline(trace)
    timeline.span("device", "x", 0.0, 1.0)
    trace.close()
    assert trace.describe() == (
        "error: cannot write /dev/full: No space left on device; the results are not affected"
    )
    timeline.span("device", "x", 1.0, 2.0)
    assert timeline.figures().device_busy_sec == 2.0


KILLED = """
import sys, time
from pathlib import Path
from apex_jax import trace
from apex_jax.timeline import Timeline

trace.FLUSH_SEC = 0.001
timeline = Timeline(trace.TraceFile(Path(sys.argv[1])))
second = 0.0
while True:
    timeline.span("device", "stage", second, second + 1.0, requests=list(range(40)))
    second += 1.0
    time.sleep(20e-6)
"""


def test_the_trace_of_a_killed_job_opens(tmp_path):
    path = tmp_path / "trace.json"
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(path)], env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    deadline_sec = time.monotonic() + 60
    while not (path.exists() and path.stat().st_size > 100_000):
        assert time.monotonic() < deadline_sec
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    text = path.read_text()
    assert not text.endswith("]\n")
    starts = [event["ts"] for event in by_title(read_events(path))["device"]]
    assert starts == [1e6 * second for second in range(len(starts))]
    assert len(starts) > 100


def test_a_torn_line_costs_one_event(tmp_path):
    path = tmp_path / "trace.json"
    trace = TraceFile(path)
    for second in range(5):
        trace.add(Event("device", "x", float(second), second + 1.0, {}))
    trace.close()
    path.write_text(path.read_text()[:-20])
    assert len(by_title(read_events(path))["device"]) == 4
    path.write_text("hello")
    with pytest.raises(ValueError, match=r"trace.json is no trace: Expecting value"):
        read_events(path)
