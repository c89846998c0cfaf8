"""Busy, overlap and bubbles against plain loops over random spans, in any order of arrival."""

import itertools
import random

import hypothesis
import pytest
from hypothesis import strategies as st

from apex_jax.overlap import BusyMeter, Figures, Kind


def brute_force(spans):
    """What Figures says it is, stretch by stretch; no span is empty."""
    edges = sorted({edge for _, start, end in spans for edge in (start, end)})
    device_ends = [end for kind, _, end in spans if kind is Kind.DEVICE]
    device_starts = [start for kind, start, _ in spans if kind is Kind.DEVICE]
    found = dict.fromkeys(("observed", "device", "host", "both", "bubble"), 0.0)
    num_bubbles, was_bubble = 0, False
    for left, right in itertools.pairwise(edges):
        on = {kind for kind, start, end in spans if start <= left and right <= end}
        sec = right - left
        found["observed"] += sec * (on != {Kind.REST})
        found["device"] += sec * (Kind.DEVICE in on)
        found["host"] += sec * (Kind.HOST in on)
        found["both"] += sec * ({Kind.DEVICE, Kind.HOST} <= on)
        is_inside = bool(device_ends) and min(device_starts) <= left and right <= max(device_ends)
        is_bubble = is_inside and not on & {Kind.DEVICE, Kind.REST}
        found["bubble"] += sec * is_bubble
        num_bubbles += is_bubble and not was_bubble
        was_bubble = is_bubble
    return found, num_bubbles


def assert_equals_brute_force(figures, spans):
    found, num_bubbles = brute_force(spans)
    assert figures.observed_sec == pytest.approx(found["observed"], abs=1e-9)
    assert figures.device_busy_sec == pytest.approx(found["device"], abs=1e-9)
    assert figures.host_busy_sec == pytest.approx(found["host"], abs=1e-9)
    assert figures.both_busy_sec == pytest.approx(found["both"], abs=1e-9)
    assert figures.bubble_sec == pytest.approx(found["bubble"], abs=1e-9)
    assert figures.num_bubbles == num_bubbles


@st.composite
def random_spans(draw):
    """Spans of all kinds; times on a coarse grid touch, others do not."""
    on_grid = st.integers(0, 40).map(lambda tick: tick / 8)
    times = draw(st.sampled_from([on_grid, st.floats(0, 5, allow_subnormal=False)]))
    kinds = st.sampled_from(draw(st.sampled_from([list(Kind), [Kind.HOST, Kind.DEVICE]])))
    span = st.tuples(kinds, times, times)
    spans = draw(st.lists(span, max_size=30))
    return [(kind, *sorted(ends)) for kind, *ends in spans if ends[0] != ends[1]]


@hypothesis.settings(max_examples=300)
@hypothesis.given(spans=random_spans())
def test_equals_brute_force_in_any_order(spans):
    meter = BusyMeter()
    for number, span in enumerate(spans):
        meter.add(*span)
        if number % 7 == 0:
            meter.figures()  # looking changes nothing
    assert_equals_brute_force(meter.figures(), spans)


@pytest.mark.parametrize("seed", range(30))
def test_equals_brute_force_when_most_is_settled(seed):
    """Lanes in order, one reported up to 12 spans behind the other; at most 32 are kept."""
    dice = random.Random(seed)
    lanes = {}
    for kind, num_spans in ((Kind.DEVICE, 150), (Kind.HOST, dice.choice([0, 40, 150]))):
        now, lanes[kind] = dice.random(), []
        for _ in range(num_spans):
            now += dice.choice([0.0, 0.0, dice.random()])
            end = now + dice.random()
            lanes[kind].append((kind, now, end))
            now = end
    spans = sorted(itertools.chain(*lanes.values()), key=lambda span: span[2])
    last = spans[-1][2]
    rests = [(Kind.REST, last * part / 4, last * part / 4 + 0.7) for part in (0, 1, 2, 3)]
    spans = sorted([*spans, *rests], key=lambda span: span[2])
    late = {kind: dice.randrange(12) for kind in Kind}
    order = sorted(range(len(spans)), key=lambda index: index + late[spans[index][0]])
    meter = BusyMeter(max_pending_spans=32)
    for number, index in enumerate(order):
        meter.add(*spans[index])
        if number == 100:
            seen = [spans[index] for index in order[:101]]
            assert_equals_brute_force(meter.figures(), seen)
    assert_equals_brute_force(meter.figures(), spans)


def test_bubbles_of_a_device_that_is_silent_for_long():
    host = [(Kind.HOST, second + 1.0, second + 1.5) for second in range(40)]
    spans = [(Kind.DEVICE, 0.0, 1.0), *host, (Kind.DEVICE, 50.0, 51.0)]
    spans += [(Kind.REST, 10.0, 12.0), (Kind.REST, 25.0, 26.0)]
    spans.sort(key=lambda span: span[2])
    meter = BusyMeter(max_pending_spans=8)
    for span in spans[:-1]:
        meter.add(*span)
        assert meter.figures().num_bubbles == 0  # nobody knows yet whether work goes on
    meter.add(*spans[-1])
    assert meter.figures().num_bubbles == 3
    assert_equals_brute_force(meter.figures(), spans)


def test_memory_is_bounded_though_a_lane_is_silent():
    meter = BusyMeter(max_pending_spans=32)
    for second in range(10_000):
        meter.add(Kind.DEVICE, float(second), second + 0.5)
        assert sum(map(len, meter._pending.values())) < 2 * 32
    assert meter.figures() == Figures(9999.5, 5000.0, 0.0, 0.0, 9999, 4999.5)


def test_what_comes_too_late_counts_from_where_it_can():
    meter = BusyMeter(max_pending_spans=8)
    for second in range(8):
        meter.add(Kind.DEVICE, float(second), second + 1.0)
    meter.add(Kind.HOST, 0.0, 8.0)  # the older half is settled: up to 4 or 5
    figures = meter.figures()
    assert figures.device_busy_sec == 8
    assert 3 <= figures.host_busy_sec == figures.both_busy_sec <= 4


def test_percentages():
    figures = Figures(
        observed_sec=10.0, device_busy_sec=9.0, host_busy_sec=4.0, both_busy_sec=3.0, bubble_sec=1.0
    )
    assert figures.device_busy_percent == 90.0
    assert figures.host_busy_percent == 40.0
    assert figures.overlap_percent == 75.0
    nothing = BusyMeter().figures().to_json()
    assert set(nothing.values()) == {0.0}
    assert figures.to_json()["overlap_percent"] == 75.0
