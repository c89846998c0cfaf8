"""The figures of a run, worked out by hand, and the check that every system did the same work."""

import dataclasses
import pathlib

import pytest

from launch.comparison.latency import FORMULAS, Bounds, Served, fault_of, figures
from launch.comparison.results import LaneLatency, Quantiles, RunRow, SummaryRow
from launch.comparison.workload_file import WorkloadRequest

pytestmark = pytest.mark.main_python

# Two requests that arrive at 1 and 2: tokens at 3, 4, 7 and at 5.
FIRST = Served("0", 10, 3, 1.0, 3.0, 7.0, (3.0, 4.0, 7.0), num_host_tokens=2)
SECOND = Served("1", 20, 1, 2.0, 5.0, 5.0, (5.0,), num_host_tokens=0)


def test_formulas():
    found = figures([FIRST, SECOND], Bounds(ttft_sec=2.0, tpot_sec=2.0))
    assert found["wall_sec"] == 6.0
    assert (found["num_requests"], found["prompt_tokens"], found["output_tokens"]) == (2, 30, 4)
    assert found["output_tokens_per_sec"] == pytest.approx(4 / 6)
    assert found["host_share"] == 0.5
    assert found["ttft_sec"].mean == pytest.approx((2 + 3) / 2)
    assert found["tpot_sec"] == Quantiles(2.0, 2.0, 2.0, 2.0)  # a single token has none
    assert found["itl_sec"].mean == pytest.approx((1 + 3) / 2)
    assert found["e2e_sec"].p50 == pytest.approx((6 + 3) / 2)
    assert found["normalized_sec"].mean == pytest.approx((6 / 3 + 3 / 1) / 2)
    assert found["by_lane"]["host"] == LaneLatency(1, *[Quantiles(2.0, 2.0, 2.0, 2.0)] * 2)
    assert found["by_lane"]["device"] == LaneLatency(1, None, Quantiles(3.0, 3.0, 3.0, 3.0))
    assert found["goodput_requests_per_sec"] == pytest.approx(1 / 6)  # the second's TTFT is 3


@pytest.mark.parametrize(
    ("ttft_sec", "tpot_sec", "num_good"), [(3.0, 2.0, 2), (3.0, 1.9, 1), (1.0, 9.0, 0)]
)
def test_goodput_keeps_both_bounds(ttft_sec, tpot_sec, num_good):
    found = figures([FIRST, SECOND], Bounds(ttft_sec, tpot_sec))
    assert found["goodput_requests_per_sec"] == pytest.approx(num_good / 6)


def test_the_steady_window_leaves_out_the_first_and_the_last_tokens():
    ramp = (0.0, *(50.0 + 0.5 * one for one in range(99)), 400.0)  # slow, then 2 a second, then not
    one = Served("0", 1, 101, 0.0, 0.0, 400.0, ramp, 0)
    assert figures([one], None)["steady_output_tokens_per_sec"] == pytest.approx(2.0)
    at_once = dataclasses.replace(one, token_sec=(1.0,) * 101)
    assert figures([at_once], None)["steady_output_tokens_per_sec"] is None


def test_what_a_framework_does_not_tell_is_none():
    bare = [dataclasses.replace(one, token_sec=None, num_host_tokens=None) for one in (FIRST,)]
    found = figures(bare, None)
    for name in ("itl_sec", "steady_output_tokens_per_sec", "host_share", "by_lane"):
        assert found[name] is None
    assert found["goodput_requests_per_sec"] is None
    assert found["tpot_sec"].mean == 2.0


def test_every_figure_is_a_field_and_has_a_formula():
    found = set(figures([FIRST], None))
    counts = {"num_requests", "prompt_tokens", "output_tokens"}
    assert found <= {field.name for field in dataclasses.fields(RunRow)}
    assert found - counts | {"ratio", "predicted_output_tokens_per_sec"} == set(FORMULAS)
    assert "ratio" in {field.name for field in dataclasses.fields(SummaryRow)}


def test_the_formulas_are_in_the_docs():
    text = (pathlib.Path(__file__).parents[1] / "docs" / "benchmarks.md").read_text()
    for name in FORMULAS:
        assert f"| `{name}` |" in text


WANTED = [WorkloadRequest("0", (1,) * 10, 3, 0.0), WorkloadRequest("1", (1,) * 20, 1, 0.0)]


@pytest.mark.parametrize(
    ("first", "others", "message"),
    [
        ({}, [SECOND], None),
        ({}, [], "the workload has 2 requests and the system did 1"),
        ({}, [SECOND, SECOND], "3 requests were served, 2 of them with names of their own"),
        (
            {"prompt_tokens": 11},
            [SECOND],
            "the workload has 30 prompt tokens and the system did 31",
        ),
        ({"output_tokens": 2}, [SECOND], "the workload has 4 output tokens and the system did 3"),
        (
            {"output_tokens": 1},
            [dataclasses.replace(SECOND, output_tokens=3)],
            "request '0' has 10 prompt and 3 output tokens, and the system did 10 and 1",
        ),
        ({"id": "a"}, [SECOND], "request '0' was not served"),
    ],
)
def test_a_system_that_does_other_work_is_found_out(first, others, message):
    assert fault_of(WANTED, [dataclasses.replace(FIRST, **first), *others]) == message
