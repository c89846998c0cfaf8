"""Batches as the device takes them: padded to a bucket and packed into one or two int32 arrays.

Owns the column order, once for the host (numpy, `pack_*`) and once for the programs (`unpack_*`). A
transfer costs tens of microseconds whatever its size, so each batch travels as few arrays. Padding
rows carry slots and page ids past the end, which scatters drop.
"""

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Int32

from apex_jax.buckets import PAGES_PER_BLOCK
from apex_jax.modifiers import NUM_ENTRY_FIELDS, ModifierBatch, join_modifiers
from apex_jax.plan import DecodeBatch, HeadBatch, PrefillBatch
from apex_jax.request import TokenLogprobs
from apex_jax.sampling import Logprobs, ModifierEntries, ModifierRows, SamplingRows

# A slot or page past every end; of a padding row, whose position counts too, all four columns.
_BEYOND = np.iinfo(np.int32).max
_PADDING_4 = np.array([_BEYOND, 0, _BEYOND, _BEYOND], np.int32)


class DecodeArrays(NamedTuple):
    """A decode batch on the device.

    rows_b4: slot, position, page and slot in it of each row's new KV (in its own lane's pool).
    blocks_ci: row, used tokens, pages of each block; None until the device is to attend, which for
    a cohort of the host lane is never.
    """

    rows_b4: Int32[Array, "b 4"]
    blocks_ci: Int32[Array, "c i"] | None = None


class PrefillArrays(NamedTuple):
    """A prefill batch on the device.

    tokens_bt: padded chunks. rows_bi: start, length, then the block table of each row.
    """

    tokens_bt: Int32[Array, "b t"]
    rows_bi: Int32[Array, "b i"]


class ModifierArrays(NamedTuple):
    """What changes the scores of a head's rows, on the device.

    rows_b4: penalties (presence, frequency, repetition) and whether the row's last token is yet to
    be counted. entries_e6: those of modifiers.ENTRY; padding belongs to no row.
    """

    rows_b4: Int32[Array | np.ndarray, "b 4"]
    entries_e6: Int32[Array | np.ndarray, "e 6"]


def num_blocks(batch: DecodeBatch, block_tokens: int) -> int:
    """Return how many KV blocks the rows fill after their new token is appended."""
    return int((batch.positions_b // block_tokens).sum()) + len(batch.positions_b)


def pack_rows(batch: DecodeBatch, *, rows: int, page_size: int) -> Int32[np.ndarray, "b 4"]:
    """Return DecodeArrays.rows_b4, padded to `rows` rows."""
    b = len(batch.slots_b)
    page_index_b, slot_in_page_b = np.divmod(batch.positions_b, page_size)
    rows_b4 = np.empty((rows, 4), np.int32)
    rows_b4[b:] = _PADDING_4
    rows_b4[:b, 0] = batch.slots_b
    rows_b4[:b, 1] = batch.positions_b
    rows_b4[:b, 2] = batch.block_table_bm[np.arange(b), page_index_b]
    rows_b4[:b, 3] = slot_in_page_b
    return rows_b4


def pack_blocks(
    batch: DecodeBatch, *, rows: int, blocks: int, page_size: int
) -> Int32[np.ndarray, "c i"]:
    """Return DecodeArrays.blocks_ci, padded to `blocks` blocks; padding belongs to row `rows`."""
    b, m = batch.block_table_bm.shape
    block_tokens, table_bm = page_size * PAGES_PER_BLOCK, batch.block_table_bm
    if m % PAGES_PER_BLOCK:
        padded_m = -(-m // PAGES_PER_BLOCK) * PAGES_PER_BLOCK
        table_bm = np.zeros((b, padded_m), np.int32)
        table_bm[:, :m] = batch.block_table_bm
    table_bji = table_bm.reshape(b, -1, PAGES_PER_BLOCK)
    firsts_j = np.arange(table_bji.shape[1], dtype=np.int32) * block_tokens
    left_bj = batch.positions_b[:, None] + 1 - firsts_j  # tokens from a block's first one on
    chosen = (left_bj > 0).nonzero()
    num_used = len(chosen[0])
    blocks_ci = np.zeros((blocks, 2 + PAGES_PER_BLOCK), np.int32)
    blocks_ci[num_used:, 0] = rows
    blocks_ci[:num_used, 0] = chosen[0]
    blocks_ci[:num_used, 1] = np.minimum(left_bj[chosen], block_tokens)
    blocks_ci[:num_used, 2:] = table_bji[chosen]
    return blocks_ci


def pack_prefill(
    batch: PrefillBatch, *, rows: int, context_pages: int
) -> tuple[Int32[np.ndarray, "b t"], Int32[np.ndarray, "b i"]]:
    """Return the fields of PrefillArrays, padded to `rows` rows of `context_pages` pages."""
    b, t = batch.token_ids_bt.shape
    tokens_bt = np.zeros((rows, t), np.int32)
    tokens_bt[:b] = batch.token_ids_bt
    rows_bi = np.zeros((rows, 2 + context_pages), np.int32)
    rows_bi[:b, 0] = batch.starts_b
    rows_bi[:b, 1] = batch.lengths_b
    rows_bi[:b, 2 : 2 + batch.block_table_bm.shape[1]] = batch.block_table_bm
    return tokens_bt, rows_bi


def unpack_prefill_targets(
    arrays: PrefillArrays, num_pages: int, page_size: int
) -> tuple[Int[Array, "b t"], Int[Array, "b t"], Int[Array, "b t"]]:
    """Return position, page and slot in it of each token; padding tokens get page num_pages."""
    tokens_bt, rows_bi = arrays
    offsets_bt = jnp.broadcast_to(jnp.arange(tokens_bt.shape[1]), tokens_bt.shape)
    positions_bt = rows_bi[:, :1] + offsets_bt
    pages_bt = jnp.take_along_axis(rows_bi[:, 2:], positions_bt // page_size, 1, mode="clip")
    pages_bt = jnp.where(offsets_bt < rows_bi[:, 1:2], pages_bt, num_pages)
    return positions_bt, pages_bt, positions_bt % page_size


def pack_head(batch: HeadBatch, *, rows: int) -> Int32[np.ndarray, "b 9"]:
    """Spread the sampled rows over `rows` rows of hidden states; the others sample nothing."""
    own_b9 = np.empty((len(batch.rows_b), 9), np.int32)
    own_b9[:, 0] = batch.slots_b
    own_b9[:, 1] = batch.positions_b
    own_b9[:, 2:] = batch.sampling_b.view(np.int32).reshape(-1, 8)[:, :7]  # SAMPLING's own order
    packed_b9 = np.zeros((rows, 9), np.int32)
    packed_b9[:, 0] = _BEYOND
    packed_b9[batch.rows_b] = own_b9
    return packed_b9


def join_heads(batches: Sequence[HeadBatch]) -> tuple[HeadBatch, tuple[int, ...], int]:
    """Return several groups' heads as one, the row at which each group begins, and their number.

    Of a group only the rows up to the last that is sampled have a place: the rest may be
    overwritten by the next group.
    """
    assert all(batch.prompt is None for batch in batches), "a chunk has its head to itself"
    num_rows = [int(batch.rows_b.max(initial=-1)) + 1 for batch in batches]
    *firsts, total = itertools.accumulate(num_rows, initial=0)
    columns: dict[str, Any] = {
        field.name: np.concatenate([getattr(batch, field.name) for batch in batches])
        for field in dataclasses.fields(HeadBatch)
        if field.name.endswith("_b")
    }
    firsts_b = np.repeat(np.array(firsts, np.int32), [len(batch.rows_b) for batch in batches])
    columns["rows_b"] = columns["rows_b"] + firsts_b
    modifiers = None
    if any(batch.modifiers is not None for batch in batches):
        modifiers = join_modifiers(
            [
                (batch.modifiers or ModifierBatch.neutral(len(batch.rows_b))).after(first)
                for batch, first in zip(batches, firsts, strict=True)
            ]
        )
    joint = HeadBatch(
        **columns,
        is_greedy=all(batch.is_greedy for batch in batches),
        wants_logprobs=any(batch.wants_logprobs for batch in batches),
        modifiers=modifiers,
    )
    return joint, tuple(firsts), total


def pack_modifiers(batch: HeadBatch, *, rows: int, num_entries: int) -> ModifierArrays:
    """Spread the changes of the sampled rows over `rows` rows, and pad their entries."""
    modifiers = batch.modifiers or ModifierBatch.neutral(len(batch.rows_b))
    rows_b4 = np.zeros((rows, 4), np.int32)
    columns = (
        modifiers.presence_penalties_b.view(np.int32),
        modifiers.frequency_penalties_b.view(np.int32),
        modifiers.repetition_penalties_b.view(np.int32),
        modifiers.is_counting_b.astype(np.int32),
    )
    rows_b4[batch.rows_b] = np.stack(columns, axis=1)
    entries_e6 = np.zeros((num_entries, NUM_ENTRY_FIELDS), np.int32)
    entries_e6[:, 0] = _BEYOND
    own_e6 = modifiers.entries_e.view(np.int32).reshape(-1, NUM_ENTRY_FIELDS)
    entries_e6[: len(own_e6)] = own_e6
    return ModifierArrays(rows_b4, entries_e6)


def unpack_modifiers(arrays: ModifierArrays) -> tuple[ModifierRows, ModifierEntries]:
    """Return the penalties of each row, and the entries."""
    presences, frequencies, repetitions, is_counting = arrays.rows_b4.T
    rows, token_ids, counts, is_seen, biases, afters = arrays.entries_e6.T
    return ModifierRows(
        presence_penalties_b=_as_float(presences),
        frequency_penalties_b=_as_float(frequencies),
        repetition_penalties_b=_as_float(repetitions),
        is_counting_b=is_counting != 0,
    ), ModifierEntries(
        rows_e=rows,
        token_ids_e=token_ids,
        counts_e=counts,
        is_seen_e=is_seen != 0,
        biases_e=_as_float(biases),
        afters_e=afters,
    )


def pack_page_ids(pages_i: Int32[np.ndarray, "i"], *, size: int) -> Int32[np.ndarray, "size"]:
    """Return page ids padded to `size` with ids past the end, which scatters drop."""
    page_ids = np.full(size, _BEYOND, np.int32)
    page_ids[: len(pages_i)] = pages_i
    return page_ids


def unpack_head(packed_b9: Int[Array, "b 9"]) -> tuple[Int[Array, "b"], SamplingRows]:
    """Return the slots and the sampling parameters of each row."""
    slots, positions, top_ks, sample_indices, temperatures, top_ps, min_ps = packed_b9.T[:7]
    return slots, SamplingRows(
        temperatures_b=_as_float(temperatures),
        top_ks_b=top_ks,
        top_ps_b=_as_float(top_ps),
        min_ps_b=_as_float(min_ps),
        seeds_b2=jax.lax.bitcast_convert_type(packed_b9[:, 7:], jnp.uint32),
        sample_indices_b=sample_indices,
        positions_b=positions,
    )


def pack_logprobs(logprobs: Logprobs) -> Int32[Array, "b c"]:
    """Return one array, for one transfer: the chosen token's, ids of the best, and theirs."""
    as_word = lambda x: jax.lax.bitcast_convert_type(x, jnp.int32)  # noqa: E731
    chosen_b, ids_bi, top_bi = logprobs
    return jnp.concatenate([as_word(chosen_b)[:, None], ids_bi, as_word(top_bi)], axis=1)


def unpack_logprobs(packed_bc: Int32[np.ndarray, "b c"]) -> tuple[TokenLogprobs, ...]:
    """Return the logprobs of each row, as views."""
    num_best = packed_bc.shape[1] // 2
    floats_bc = packed_bc.view(np.float32)
    return tuple(
        TokenLogprobs(float(chosen), ids_i, top_i)
        for chosen, ids_i, top_i in zip(
            floats_bc[:, 0],
            packed_bc[:, 1 : 1 + num_best],
            floats_bc[:, 1 + num_best :],
            strict=True,
        )
    )


def _as_float(words: Int[Array, "*b"]) -> Float[Array, "*b"]:
    return jax.lax.bitcast_convert_type(words, jnp.float32)
