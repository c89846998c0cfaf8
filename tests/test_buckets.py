"""Buckets: within the budget of executables, and large enough for every batch there can be."""

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from apex_jax.buckets import (
    MAX_EXECUTABLES,
    MAX_HYBRID_EXECUTABLES,
    MAX_HYBRID_ROW_BUCKETS,
    MAX_ROW_BUCKETS,
    MIN_ROWS,
    PAGES_PER_BLOCK,
    HostLimits,
    choose,
    fullest_chunk,
    smallest_that_holds,
)
from apex_jax.pages import num_pages_for


@st.composite
def settings_of_a_job(draw):
    """Whatever config.validate and the memory plan let through."""
    page_size = draw(st.sampled_from([8, 16, 32, 64, 128]))
    num_pages = draw(st.one_of(st.integers(1, 40), st.integers(1, 200_000)))
    max_model_len = draw(st.one_of(st.integers(1, 300), st.integers(1, 131_072)))
    limits = st.builds(
        HostLimits,
        max_cohort_rows=st.integers(1, 9) | st.integers(1, 4096),
        num_staging_pages=st.integers(1, 9) | st.integers(1, 10_000),
        max_move_pages=st.integers(1, 9) | st.integers(1, 10_000),
    )
    return {
        "max_requests": draw(st.one_of(st.integers(1, 9), st.integers(1, 4096))),
        "max_prefill_tokens": 2 ** draw(st.integers(4, 16)),
        "max_model_len": min(max_model_len, num_pages * page_size),
        "num_pages": num_pages,
        "page_size": page_size,
        "host": draw(st.none() | limits),
    }


@given(settings_of_a_job())
def test_shapes_stay_within_their_budget(job):
    buckets, host = choose(**job), job["host"]
    assert buckets.num_executables <= (MAX_HYBRID_EXECUTABLES if host else MAX_EXECUTABLES)
    assert len(buckets.rows) <= (MAX_HYBRID_ROW_BUCKETS if host else MAX_ROW_BUCKETS)
    assert buckets.rows[0] >= MIN_ROWS
    assert buckets.block_tokens == PAGES_PER_BLOCK * job["page_size"]
    assert set(buckets.num_blocks) <= set(buckets.rows)
    assert host or set(buckets.num_blocks) == set(buckets.rows)
    for ascending in (buckets.rows, buckets.context_pages, *buckets.num_blocks.values()):
        assert list(ascending) == sorted(set(ascending))
    # Nothing is compiled that no batch fills: not twice the rows, nor more blocks than can be held.
    max_rows = max(job["max_requests"], host.max_cohort_rows if host else 0)
    assert buckets.rows[-1] < max(2 * max_rows, MIN_ROWS + 1)
    for rows, sizes in buckets.num_blocks.items():
        longest = num_pages_for(job["max_model_len"], buckets.block_tokens)
        assert sizes[-1] <= max(rows, min(rows * longest, job["num_pages"] // 8 + rows))
    assert len(set(buckets.chunks)) == len(buckets.chunks)
    assert max(tokens for _, tokens in buckets.chunks) == job["max_prefill_tokens"]
    assert all(rows * tokens <= job["max_prefill_tokens"] for rows, tokens in buckets.chunks)


@given(settings_of_a_job(), st.data())
def test_every_decode_batch_fits_a_bucket(job, data):
    buckets = choose(**job)
    page_size, block_tokens = job["page_size"], buckets.block_tokens
    # Rows one token into a new block waste most; any others must fit as well.
    worst = [index * block_tokens for index in range(4)]
    position = st.one_of(st.sampled_from(worst), st.integers(0, job["max_model_len"] - 1))
    num_rows = data.draw(st.integers(1, job["max_requests"]))
    positions, num_free = [], job["num_pages"]
    drawn = data.draw(st.lists(position, min_size=1, max_size=12))
    for row in range(num_rows):
        pos = min(drawn[row % len(drawn)], job["max_model_len"] - 1)
        if num_pages_for(pos + 1, page_size) > num_free:
            pos = 0
        num_free -= num_pages_for(pos + 1, page_size)
        if num_free < 0:
            break
        positions.append(pos)
    rows = smallest_that_holds(buckets.rows, len(positions))
    num_blocks = sum(pos // block_tokens + 1 for pos in positions)
    assert smallest_that_holds(buckets.num_blocks[rows], num_blocks) >= num_blocks


@given(settings_of_a_job(), st.data())
def test_every_prefill_batch_fits_a_bucket(job, data):
    buckets = choose(**job)
    longest = job["max_model_len"]
    lengths = data.draw(st.lists(st.integers(1, longest), min_size=1, max_size=8))
    lengths = lengths[: job["max_requests"]]
    rows, tokens = fullest_chunk(buckets.chunks, lengths)
    num_rows = min(rows, len(lengths))
    assert any(t == tokens and r >= num_rows for r, t in buckets.chunks)
    assert buckets.head_rows(rows) >= rows
    num_pages = num_pages_for(max(lengths), job["page_size"])
    assert smallest_that_holds(buckets.context_pages, num_pages) >= num_pages


@given(settings_of_a_job(), st.data())
def test_whatever_the_host_lane_asks_for_fits_a_bucket(job, data):
    buckets, limits = choose(**job), job["host"]
    if limits is None:
        assert buckets.host is None
        assert buckets.boundaries == buckets.placements == ()
        return
    host = buckets.host
    num_device = data.draw(st.integers(1, job["max_requests"]))
    num_cohort = data.draw(st.integers(1, limits.max_cohort_rows))
    device_rows = smallest_that_holds(buckets.rows, num_device)
    cohort_rows = smallest_that_holds(buckets.rows, num_cohort)
    assert device_rows in buckets.device_rows
    assert cohort_rows in host.cohort_rows
    assert {(device_rows,), (cohort_rows,), (device_rows, cohort_rows)} <= set(buckets.boundaries)
    num_rows = max(num_device + num_cohort, device_rows + 1, cohort_rows + 1)
    head_rows = smallest_that_holds(host.head_rows, num_rows)
    assert {(device_rows, head_rows), (cohort_rows, head_rows)} <= set(buckets.placements)
    for most, sizes in (
        (limits.num_staging_pages, host.staging_pages),
        (limits.max_move_pages, host.move_pages),
    ):
        count = data.draw(st.integers(1, most))
        assert smallest_that_holds(sizes, count) >= count
    # The host writes pages of either: it needs no more programs than for the larger.
    longer = max(host.staging_pages, host.move_pages, key=len)
    assert {*host.staging_pages, *host.move_pages} == set(longer)


def test_the_host_lane_of_the_usual_job():
    limits = HostLimits(max_cohort_rows=128, num_staging_pages=256, max_move_pages=100)
    buckets = choose(
        max_requests=64,
        max_prefill_tokens=512,
        max_model_len=4096,
        num_pages=1000,
        page_size=16,
        host=limits,
    )
    assert buckets.rows == (16, 32, 64, 128)
    assert buckets.device_rows == (16, 32, 64)
    assert buckets.host.cohort_rows == (16, 32, 64, 128)
    assert buckets.host.head_rows == (16, 32, 64, 128, 64 + 128)
    assert buckets.host.staging_pages == (8, 20, 46, 108, 256)
    assert buckets.host.move_pages == (8, 20, 46, 108)
    assert buckets.chunks == ((1, 512), (1, 128), (4, 128), (16, 32))
    assert len(buckets.context_pages) == 3
    assert len(buckets.boundaries) == 4 + 3 * 4
    assert buckets.num_executables == 107


def test_the_usual_job():
    buckets = choose(
        max_requests=64,
        max_prefill_tokens=512,
        max_model_len=4096,
        num_pages=1000,
        page_size=16,
    )
    assert buckets.rows == (2, 4, 8, 16, 32, 64)
    # 64 rows could ask for 2,048 blocks of 128 tokens, the pool has 125 and one of each row.
    assert buckets.num_blocks[64][-1] == 125 + 64
    assert buckets.num_blocks[2][-1] == 2 * 4096 // 128
    assert buckets.chunks == ((1, 512), (1, 128), (4, 128), (16, 32), (1, 32))
    assert buckets.context_pages[-1] == 4096 // 16
    sizes = sum(map(len, buckets.num_blocks.values()))
    prefill = 5 * (1 + len(buckets.context_pages))
    assert buckets.num_executables == 6 + sizes + prefill + 2 * 6


def test_one_request_still_decodes_in_two_rows():
    buckets = choose(
        max_requests=1, max_prefill_tokens=16, max_model_len=8, num_pages=1, page_size=8
    )
    assert buckets.rows == (MIN_ROWS,)
    assert all(rows <= MIN_ROWS for rows, _ in buckets.chunks)


def test_what_no_bucket_holds_is_an_error():
    assert smallest_that_holds((8, 2, 4), 3) == 4
    assert smallest_that_holds((8, 2, 4), 8) == 8
    with pytest.raises(ValueError, match="empty"):
        smallest_that_holds((2, 4), 5)


CHUNKS = ((1, 512), (1, 128), (1, 32), (4, 128))


@pytest.mark.parametrize(
    ("num_remaining", "shape"),
    [
        ([1], (1, 32)),
        ([32], (1, 32)),
        ([33], (1, 128)),
        ([128], (1, 128)),
        ([129], (1, 512)),
        ([5000], (1, 512)),
        ([20, 20], (4, 128)),  # 40 tokens in one sweep are more than 20
        ([400, 20], (1, 512)),  # 400 are more than 128 and 20
        ([300, 128, 128, 128], (4, 128)),
        ([5000, 5000, 5000, 5000], (1, 512)),  # as many tokens and as large: the oldest goes on
    ],
)
def test_the_chunk_that_prefills_most(num_remaining, shape):
    assert fullest_chunk(CHUNKS, num_remaining) == shape


@given(settings_of_a_job(), st.lists(st.integers(1, 5000), min_size=1, max_size=8))
def test_no_other_chunk_prefills_more_or_is_smaller(job, num_remaining):
    chunks = choose(**job).chunks
    rows, tokens = fullest_chunk(chunks, num_remaining)

    def filled(rows, tokens):
        return sum(min(left, tokens) for left in num_remaining[:rows])

    assume(len(chunks) > 1)
    for other in chunks:
        assert filled(*other) <= filled(rows, tokens)
        if filled(*other) == filled(rows, tokens):
            assert other[0] * other[1] >= rows * tokens
