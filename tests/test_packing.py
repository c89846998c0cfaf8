"""Packed batches: what a program reads is what the plan says, and padding touches nothing."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from apex_jax import packing
from apex_jax.buckets import PAGES_PER_BLOCK
from apex_jax.packing import (
    PrefillArrays,
    join_heads,
    pack_blocks,
    pack_head,
    pack_page_ids,
    pack_prefill,
    pack_rows,
    unpack_head,
)
from apex_jax.plan import DecodeBatch, HeadBatch, PrefillBatch
from apex_jax.request import RequestError, SamplingParams

BEYOND = np.iinfo(np.int32).max


@st.composite
def decode_batches(draw):
    """A batch, and its page size. Table entries that no token needs are arbitrary page ids."""
    page_size = draw(st.sampled_from([8, 16, 32]))
    block_tokens = page_size * PAGES_PER_BLOCK
    at_border = st.builds(
        lambda index, step, off: max(index * step + off, 0),
        st.integers(0, 4),
        st.sampled_from([page_size, block_tokens]),
        st.integers(-2, 1),
    )
    positions = draw(st.lists(at_border | st.integers(0, 700), min_size=1, max_size=6))
    num_pages = max(positions) // page_size + 1 + draw(st.integers(0, 9))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    batch = DecodeBatch(
        slots_b=rng.permutation(64)[: len(positions)].astype(np.int32),
        positions_b=np.array(positions, np.int32),
        block_table_bm=rng.integers(0, 10_000, (len(positions), num_pages), dtype=np.int32),
    )
    return batch, page_size


@given(decode_batches(), st.integers(0, 5), st.integers(0, 9))
def test_blocks_hold_each_rows_tokens_in_order(batch_and_page_size, spare_rows, spare_blocks):
    batch, page_size = batch_and_page_size
    block_tokens = page_size * PAGES_PER_BLOCK
    b = len(batch.slots_b)
    rows, num_blocks = b + spare_rows, packing.num_blocks(batch, block_tokens)
    rows_b4 = pack_rows(batch, rows=rows, page_size=page_size)
    blocks_ci = pack_blocks(batch, rows=rows, blocks=num_blocks + spare_blocks, page_size=page_size)
    assert rows_b4.shape == (rows, 4)
    assert blocks_ci.shape == (num_blocks + spare_blocks, 2 + PAGES_PER_BLOCK)

    held = [[] for _ in range(b)]  # (page, slot in it) of each row's tokens
    for row, used, *pages in blocks_ci[:num_blocks].tolist():
        assert 1 <= used <= block_tokens
        held[row] += [(pages[i // page_size], i % page_size) for i in range(used)]
    for row, position in enumerate(batch.positions_b.tolist()):
        table = batch.block_table_bm[row].tolist()
        expected = [(table[i // page_size], i % page_size) for i in range(position + 1)]
        assert held[row] == expected
        # The new token goes where the last one that the row attends to lies.
        assert rows_b4[row].tolist() == [batch.slots_b[row], position, *expected[-1]]
    assert (np.diff(blocks_ci[:, 0]) >= 0).all()  # the programs' segment sums rely on it
    assert (blocks_ci[num_blocks:, 0] == rows).all()
    assert (blocks_ci[num_blocks:, 1:] == 0).all()
    # Padding rows read and write nothing that exists.
    assert (rows_b4[b:] == [BEYOND, 0, BEYOND, BEYOND]).all()


@given(decode_batches())
def test_too_few_blocks_are_refused(batch_and_page_size):
    """A batch cut off silently would attend to a part of its tokens."""
    batch, page_size = batch_and_page_size
    num_blocks = packing.num_blocks(batch, page_size * PAGES_PER_BLOCK)
    assume(num_blocks > 1)
    with pytest.raises(ValueError, match="broadcast"):
        pack_blocks(batch, rows=8, blocks=num_blocks - 1, page_size=page_size)


unpack_targets = jax.jit(packing.unpack_prefill_targets, static_argnums=(1, 2))


@given(
    st.sampled_from([8, 16]),
    st.integers(1, 4),
    st.sampled_from([9, 24]),
    st.integers(0, 2**32),
)
def test_prefill_targets_follow_the_block_table(page_size, b, context_pages, seed):
    rows, t, num_pages = 4, 32, 500
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, t + 1, b)
    starts = rng.integers(0, context_pages * page_size - lengths + 1)
    longest = int((starts + lengths).max())
    width = rng.integers(-(-longest // page_size), context_pages + 1)
    batch = PrefillBatch(
        token_ids_bt=rng.integers(0, 1000, (b, t), dtype=np.int32),
        starts_b=starts.astype(np.int32),
        lengths_b=lengths.astype(np.int32),
        block_table_bm=rng.integers(0, num_pages, (b, width), dtype=np.int32),
    )
    tokens_bt, rows_bi = pack_prefill(batch, rows=rows, context_pages=context_pages)
    assert np.array_equal(tokens_bt[:b], batch.token_ids_bt)
    assert np.array_equal(rows_bi[:b, 2 : 2 + width], batch.block_table_bm)
    assert (tokens_bt[b:] == 0).all()
    assert (rows_bi[b:] == 0).all()
    assert (rows_bi[:, 2 + width :] == 0).all()

    arrays = PrefillArrays(jnp.asarray(tokens_bt), jnp.asarray(rows_bi))
    targets = unpack_targets(arrays, num_pages, page_size)
    positions_bt, pages_bt, slots_bt = map(np.asarray, targets)
    for row in range(rows):
        length = int(lengths[row]) if row < b else 0
        assert (pages_bt[row, length:] == num_pages).all()
        for offset in range(length):
            position = int(starts[row]) + offset
            assert positions_bt[row, offset] == position
            assert pages_bt[row, offset] == batch.block_table_bm[row, position // page_size]
            assert slots_bt[row, offset] == position % page_size


SAMPLING = (
    SamplingParams(temperature=0.7, top_k=40, top_p=0.9, seed=-1),
    SamplingParams(temperature=0.0, top_k=0, top_p=1.0, seed=2**63 + 5),
    SamplingParams(temperature=100.0, top_k=2**31 - 1, top_p=1e-6, seed=12),
)


def test_head_rows_survive_the_round_trip():
    """Only some rows of a chunk finish their prompt; the others sample nothing."""
    head = HeadBatch.of([4, 0, 2], [30, 31, 1], [1000, 1, 2**30], SAMPLING)
    slots_b, rows = jax.jit(unpack_head)(jnp.asarray(pack_head(head, rows=6)))
    assert np.asarray(slots_b).tolist() == [31, BEYOND, 1, BEYOND, 30, BEYOND]
    assert not head.is_greedy
    for place, params in zip((4, 0, 2), SAMPLING, strict=True):
        assert rows.temperatures_b[place] == np.float32(params.temperature)
        assert rows.top_ks_b[place] == params.top_k
        assert rows.top_ps_b[place] == np.float32(params.top_p)
        words = [divmod(params.seed % 2**64, 2**32)]
        assert [tuple(np.asarray(rows.seeds_b2)[place].tolist())] == words
        assert rows.sample_indices_b[place] == 0
    assert [int(rows.positions_b[place]) for place in (4, 0, 2)] == [1000, 1, 2**30]
    # The rest are greedy: they take no part in the search of the whole vocabulary.
    assert np.asarray(rows.temperatures_b)[[1, 3, 5]].tolist() == [0, 0, 0]


def test_a_batch_may_have_no_head_row():
    head = HeadBatch.of([], [], [], [])
    assert (pack_head(head, rows=2)[:, 0] == BEYOND).all()


def test_joint_heads_sample_what_each_would_alone():
    """Groups lie one behind the other, each up to its last sampled row; one samples nothing."""
    batches = [
        HeadBatch.of([1, 0], [30, 31], [7, 8], SAMPLING[:2]),
        HeadBatch.of([], [], [], []),
        HeadBatch.of([3], [29], [9], SAMPLING[2:]),
    ]
    joint, firsts, num_rows = join_heads(batches)
    assert (firsts, num_rows) == ((0, 2, 2), 6)
    packed = pack_head(joint, rows=8)
    for batch, first in zip(batches, firsts, strict=True):
        alone = pack_head(batch, rows=4)
        assert np.array_equal(packed[first + batch.rows_b], alone[batch.rows_b])
    assert (np.delete(packed, [0, 1, 5], axis=0)[:, 0] == BEYOND).all()


def test_padding_pages_do_not_exist():
    page_ids = pack_page_ids(np.array([7, 0], np.int32), size=4)
    assert page_ids.tolist() == [7, 0, BEYOND, BEYOND]


def test_greedy_rows_alone_make_a_greedy_head():
    greedy = SamplingParams(temperature=0.0, top_k=3)
    assert HeadBatch.of([0, 1], [0, 1], [5, 5], [greedy, greedy]).is_greedy
    assert not HeadBatch.of([0, 1], [0, 1], [5, 5], [greedy, SAMPLING[0]]).is_greedy


def test_every_top_k_that_a_request_may_ask_for_can_be_packed():
    """A request must be refused when it is made: here it would stop everybody's sweep."""
    for top_k in (2**31 - 1, 2**31, 2**63):
        try:
            params = SamplingParams(top_k=top_k)
        except RequestError:
            continue
        head = HeadBatch.of([0], [0], [1], [params])
        assert head.sampling_b["top_k"][0] > 200_000  # beyond any vocabulary: off
