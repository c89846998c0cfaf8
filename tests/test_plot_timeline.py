"""The picture of a timeline: every lane, spans where they were, bounded, one message for misuse."""

import os
import pathlib
import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree

import pytest

from apex_jax.timeline import Timeline
from apex_jax.trace import TraceFile
from launch.drawing import round_step
from launch.plot_timeline import COHORT_COLORS, LEFT, RIGHT, WIDTH, plot

ROOT = pathlib.Path(__file__).parents[1]
SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture
def trace(tmp_path):
    """Ten sweeps of 10 ms."""
    file = TraceFile(tmp_path / "trace.json")
    timeline = Timeline(file)
    for sweep in range(10):
        now = sweep / 100
        timeline.span("dispatch", "launch", now, now + 0.009, sweep=sweep)
        timeline.span("dispatch", "boundary", now + 0.002, now + 0.003)
        timeline.span("device", "boundary", now, now + 0.004, layer=3, cohort=sweep % 2)
        timeline.span("device", "head <&>", now + 0.004, now + 0.0075)
        timeline.span("host", "attention", now + 0.005, now + 0.008, cohort=sweep % 2)
        timeline.instant("scheduler", "late", now)
    file.close()
    return tmp_path / "trace.json"


def bars(picture):
    """What can be pointed at: (title, x, width) of each."""
    found = []
    for rect in ElementTree.fromstring(picture).iter(f"{SVG}rect"):
        title = rect.find(f"{SVG}title")
        if title is not None:
            found.append((title.text, float(rect.get("x", "")), float(rect.get("width", ""))))
    return found


def texts(picture):
    return [text.text for text in ElementTree.fromstring(picture).iter(f"{SVG}text")]


def test_spans_are_drawn_where_they_were(trace):
    picture = plot(trace, 0.02, 0.03)
    pixels_per_sec = (WIDTH - LEFT - RIGHT) / 0.01
    expected = [
        ("launch, 9.000 ms, sweep 2", 0.0, 0.009),
        ("boundary, 1.000 ms", 0.002, 0.001),
        ("boundary, 4.000 ms, layer 3, cohort 0", 0.0, 0.004),
        ("head <&>, 3.500 ms", 0.004, 0.0035),
        ("attention, 3.000 ms, cohort 0", 0.005, 0.003),
    ]
    found = bars(picture)
    assert [title for title, _, _ in found] == [title for title, _, _ in expected]
    for (_, x, width), (_, start_sec, sec) in zip(found, expected, strict=True):
        assert x == pytest.approx(LEFT + start_sec * pixels_per_sec, abs=0.01)
        assert width == pytest.approx(sec * pixels_per_sec, abs=0.01)
    shown = texts(picture)
    assert [text for text in shown if text in ("dispatch", "device", "host", "scheduler")] == [
        *("dispatch", "device", "host")  # nothing of the scheduler's took any time
    ]
    assert [text for text in shown if re.fullmatch(r"\d+ %", text)] == ["90 %", "75 %", "30 %"]
    assert {"boundary 3", "ms from 0.02 s", "cohort 0"} <= set(shown)
    assert COHORT_COLORS[0] in picture
    assert COHORT_COLORS[1] not in picture


def test_spans_are_cut_at_the_edges(trace):
    (cut,) = [bar for bar in bars(plot(trace, 0.022, 0.026)) if bar[0].startswith("launch")]
    assert cut == ("launch, 9.000 ms, sweep 2", LEFT, WIDTH - LEFT - RIGHT)
    titles = [title for title, _, _ in bars(plot(trace, None, None))]
    assert titles.count("boundary, 1.000 ms") == 10


def test_nested_spans_are_drawn_lower(trace):
    root = ElementTree.fromstring(plot(trace, 0.02, 0.03))
    launch, boundary, *_ = (
        rect for rect in root.iter(f"{SVG}rect") if rect.find(f"{SVG}title") is not None
    )
    assert float(boundary.get("y", "")) > float(launch.get("y", ""))
    assert float(boundary.get("height", "")) < float(launch.get("height", ""))


def test_a_long_trace_makes_a_small_picture(tmp_path):
    file = TraceFile(tmp_path / "trace.json")
    for index in range(20_000):
        Timeline(file).span("device", f"stage {index % 12}", index * 1e-4, index * 1e-4 + 9e-5)
    file.close()
    picture = plot(tmp_path / "trace.json", None, None)
    assert 500 < len(bars(picture)) < 4 * WIDTH
    assert "90 %" in texts(picture)
    assert {"stage 0", "stage 7", "other"} <= set(texts(picture))


@pytest.mark.parametrize(
    ("times", "message"),
    [
        (
            (5.0, 6.0),
            r"nothing happened from 5 s to 6 s; the trace's events are from [\d.]+ s to [\d.]+ s",
        ),
        ((0.02, 0.01), "--to_sec=0.01 must be after --from_sec=0.02"),
    ],
)
def test_times_that_are_wrong(trace, times, message):
    with pytest.raises(ValueError, match=message):
        plot(trace, *times)


@pytest.mark.parametrize("seconds", [1e-7, 3e-5, 0.01, 0.7, 86400.0])
def test_ticks_are_round_and_few(seconds):
    step_ms = round_step(100 * seconds)
    assert re.fullmatch(r"[125]e[+-]\d\d", f"{step_ms:.0e}")
    assert 3 <= 1e3 * seconds / step_ms <= 10 + 1e-9


def test_the_command(trace):
    def run(*arguments):
        return subprocess.run(
            [sys.executable, "-m", "launch.plot_timeline", *arguments],
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            cwd=trace.parent,
            capture_output=True,
            text=True,
            timeout=60,
        )

    done = run(f"--trace={trace}", "--output=a.svg", "--from_sec=0.02", "--to_sec=0.03")
    assert (done.returncode, done.stderr) == (0, "")
    assert (trace.parent / "a.svg").read_text() == plot(trace, 0.02, 0.03)
    for arguments, message in (
        (["--output=b.svg"], "error: give --trace=FILE and --output=FILE.svg"),
        (["--trace=none", "--output=b.svg"], "error: [Errno 2] No such file"),
        (["--trace=a.svg", "--output=b.svg"], "error: a.svg is no trace: Expecting value"),
    ):
        done = run(*arguments)
        assert done.returncode == 2
        assert done.stderr.startswith(message)
    assert not (trace.parent / "b.svg").exists()
