"""What a question about stage times comes to in a table that was measured."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from apex_jax.buckets import Buckets, HostBuckets
from apex_jax.cost_model import PromptWork, Times
from apex_jax.measured_times import Grid, MeasuredTimes
from apex_jax.profiling.table import Measurements, Point

PLANE = Grid({(1, 10): 1.0, (1, 30): 3.0, (4, 10): 7.0, (4, 30): 3.0})
SHAPES = Buckets(
    rows=(2, 4, 8),
    num_blocks={2: (2, 6), 4: (4, 12)},  # blocks of 128 tokens
    chunks=((1, 64), (1, 16), (4, 16)),
    context_pages=(4, 8),
    page_size=16,
    host=HostBuckets(
        cohort_rows=(2, 4, 8),
        head_rows=(2, 4, 8, 12),
        staging_pages=(8, 16),
        move_pages=(8, 16),
        num_staging_pages=16,
    ),
)


def make_times(span=2, **stages):
    measured = {
        name: {shape: Point(sec, 0.0) for shape, sec in points.items()}
        for name, points in stages.items()
    }
    return MeasuredTimes(Measurements(measured, 1e-4, 1.5, 2.0), SHAPES, num_layers=4, span=span)


# Grids


@pytest.mark.parametrize(
    ("at", "expected"),
    [
        ((1, 10), 1.0),
        ((1, 20), 2.0),
        ((2, 10), 3.0),
        ((2.5, 20), 3.5),  # between 2 and 5
        ((1, 5), 1.0),  # below the first
        ((0, 0), 1.0),
        ((1, 50), 5.0),  # on with the last slope
        ((4, 50), 3.0),  # which never falls
        ((6, 10), 11.0),
        ((6, 30), 3.0),
    ],
)
def test_a_grid_interpolates_axis_by_axis(at, expected):
    assert PLANE(*at) == pytest.approx(expected)


def test_each_row_of_a_grid_may_have_sizes_of_its_own():
    grid = Grid({(1, 10): 1.0, (1, 100): 10.0, (2, 20): 4.0})
    assert grid(2, 1000) == 4.0, "one point says nothing of a slope"
    assert grid(1.5, 20) == pytest.approx((2.0 + 4.0) / 2)


@given(
    st.dictionaries(
        st.tuples(st.integers(1, 50), st.integers(1, 500)), st.floats(0.0, 10.0), min_size=1
    ),
    st.floats(0, 50),
    st.floats(500, 5000),
    st.floats(0, 5000),
)
def test_beyond_the_last_point_more_never_takes_less(points, first, second, more):
    grid, last = Grid(points), max(knot for knot, _ in points)
    assert grid(min(first, last), second + more) >= grid(min(first, last), second) - 1e-9
    assert grid(last + more, second) >= grid(last, second) - 1e-9


@given(st.dictionaries(st.integers(1, 50), st.floats(0.0, 10.0), min_size=1), st.floats(0, 50))
def test_between_points_times_lie_between_theirs(points, at):
    grid = Grid({(knot,): value for knot, value in points.items()})
    if at <= max(points):
        assert min(points.values()) - 1e-9 <= grid(at) <= max(points.values()) + 1e-9


# Buckets


def test_rows_take_what_their_bucket_takes():
    by_rows = {(2,): 1.0, (4,): 3.0, (8,): 4.0}
    times = make_times(
        embed=by_rows,
        pre_attention=by_rows,
        post_attention=by_rows,
        boundary=by_rows,
        transfer_rows=by_rows,
        head_greedy={**by_rows, (12,): 9.0},
        head_sample={(2,): 2.0, (12,): 12.0},
    )
    for ask in (times.embed, times.pre_attention, times.post_attention, times.linear):
        assert [ask(rows) for rows in (1, 2, 3, 5, 8)] == [1.0, 1.0, 3.0, 4.0, 4.0]
        assert ask(16) == pytest.approx(6.0), "beyond the buckets"
    assert times.linear(0, 3) == 3.0, "a cohort alone"
    assert times.transfer(num_rows=3) == 3.0
    assert times.head(9, is_greedy=True) == 9.0
    assert times.head(3) == pytest.approx(4.0), "4 rows, between what was measured"
    assert (times.linear(0), times.head(0), times.transfer()) == (0.0, 0.0, 0.0)


def test_a_merged_boundary_pads_both_groups():
    times = make_times(merged_boundary={(2, 2): 1.0, (2, 8): 2.0, (4, 2): 3.0, (4, 8): 5.0})
    assert times.linear(1, 1) == 1.0
    assert times.linear(3, 7) == 5.0
    assert times.linear(4, 3) == pytest.approx(3 + 2 / 3)


def test_decode_rows_are_told_by_the_blocks_they_are_likely_to_fill():
    by_blocks = {(2, 2): 1.0, (2, 6): 3.0, (4, 4): 2.0, (4, 12): 6.0}
    times = make_times(layers=by_blocks, device_attention=by_blocks)
    # Two rows of 128 tokens in all: half a block each, and what is partly used: two blocks.
    assert times.device_attention(2, 128) == 1.0
    assert times.device_attention(2, 400) == 3.0
    assert times.device_attention(3, 400) == 6.0
    assert times.layers(2, 3, 400) == 6.0
    assert times.layers(4, 3, 400) == 12.0, "two programs"
    assert times.device_attention(2, 0) == 0.0
    assert times.device_attention(2, 2000) > 3.0


def test_prompts_take_what_their_chunk_and_context_take():
    points = {(64, 1, 4): 4.0, (64, 1, 8): 6.0, (16, 1, 4): 1.0, (16, 1, 8): 2.0, (64, 4, 8): 3.0}
    times = make_times(prefill=points, staged_layer=points)
    assert times.prefill(2, PromptWork(1, 64, 64, 0)) == 4.0
    assert times.prefill(4, PromptWork(1, 64, 65, 0)) == 12.0
    assert times.staged_layer(PromptWork(3, 16, 3 * 100, 0)) == 3.0
    assert times.staged_layer(PromptWork(1, 40, 64, 0)) == pytest.approx(2.5)
    calibrated = make_times(prefill={(16, 1, 4): 1.0, (32, 1, 4): 2.0})
    assert calibrated.prefill(2, PromptWork(4, 16, 64, 0)) == pytest.approx(4.0), "all tokens"


def test_pages_take_what_their_bucket_takes_and_the_host_is_not_padded():
    by_pages = {(8,): 1.0, (16,): 2.0}
    times = make_times(
        device_copy=by_pages,
        host_copy=by_pages,
        transfer_pages=by_pages,
        host_attention={(1, 16): 1.0, (1, 32): 1.5, (4, 16): 2.0, (4, 32): 4.0},
    )
    for ask in (times.device_copy, times.host_copy):
        assert [ask(tokens) for tokens in (1, 128, 129)] == [1.0, 1.0, 2.0]
    assert times.transfer(num_tokens=129) == 2.0
    assert times.host_attention(4, 4 * 24) == 3.0
    assert times.host_attention(2, 2 * 16) == pytest.approx(1 + 1 / 3)
    assert times.host_attention(0, 0) == 0.0


def test_measured_times_answer_all_questions():
    times = make_times()
    assert isinstance(times, Times)
    assert (times.num_layers, times.dispatch_sec) == (4, 1e-4)
    assert (times.device_slowdown, times.host_slowdown) == (1.5, 2.0)
