"""One sweep as data: what the scheduler decides and the dispatch loop carries out.

Owns no device array and no policy; everything is numpy snapshots, so that a plan may be kept,
printed and compared after the scheduler's own state has moved on. Imports no jax.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple

import numpy as np
from jaxtyping import Int32, Shaped

from apex_jax.modifiers import ModifierBatch, RowChanges
from apex_jax.request import SamplingParams, TokenLogprobs

# How a row's token is chosen. All but the last field is told to the device with every token, in
# this order, a word of 32 bits for each number.
SAMPLING = np.dtype(
    [
        ("top_k", np.int32),
        ("sample_index", np.int32),
        ("temperature", np.float32),
        ("top_p", np.float32),
        ("min_p", np.float32),
        ("seed", np.uint32, 2),
        ("wants_logprobs", np.int32),
    ]
)


def sampling_columns(sampling: Sequence[SamplingParams]) -> Shaped[np.ndarray, "b"]:
    """Return the parameters of some rows, of dtype SAMPLING."""
    return np.array(
        [
            (
                # No vocabulary is larger than an int32, so a larger k cuts nothing either.
                min(params.top_k, 2**31 - 1),
                0,  # one sample per request in this version
                params.temperature,
                params.top_p,
                params.min_p,
                divmod(params.seed % 2**64, 2**32),
                params.logprobs is not None,
            )
            for params in sampling
        ],
        SAMPLING,
    )


def is_greedy(sampling_b: Shaped[np.ndarray, "b"]) -> bool:
    """Return whether every row takes its best token."""
    return not np.count_nonzero(sampling_b["temperature"])


def wants_logprobs(sampling_b: Shaped[np.ndarray, "b"]) -> bool:
    """Return whether any row wants its token's logprobs."""
    return bool(np.count_nonzero(sampling_b["wants_logprobs"]))


@dataclass(frozen=True)
class DecodeBatch:
    """One token for each row of one lane, fed from the device's own `tokens_by_slot`.

    slots_b: where each row's last token lies on the device.
    positions_b: index of that token in its sequence, which is also its KV length before the sweep.
    block_table_bm: pages (of the lane's own pool) of each sequence in order; entries past the
    position are unspecified.
    """

    slots_b: Int32[np.ndarray, "b"]
    positions_b: Int32[np.ndarray, "b"]
    block_table_bm: Int32[np.ndarray, "b m"]


@dataclass(frozen=True)
class PrefillBatch:
    """A chunk of prompt for each row; rows are padded to the chunk length t on the right.

    token_ids_bt: the chunk's tokens. starts_b: index of the chunk's first token in its sequence.
    lengths_b: tokens of the chunk, 1 to t. block_table_bm: as in DecodeBatch.
    """

    token_ids_bt: Int32[np.ndarray, "b t"]
    starts_b: Int32[np.ndarray, "b"]
    lengths_b: Int32[np.ndarray, "b"]
    block_table_bm: Int32[np.ndarray, "b m"]


@dataclass(frozen=True)
class PromptTargets:
    """What follows each token of a chunk of prompts, where its logprobs are wanted.

    next_ids_bt: of each row of the chunk. rows_i, lengths_i: of the rows that want them, and of how
    many tokens.
    """

    next_ids_bt: Int32[np.ndarray, "b t"]
    rows_i: Int32[np.ndarray, "i"]
    lengths_i: Int32[np.ndarray, "i"]


@dataclass(frozen=True)
class HeadBatch:
    """Rows of a decode or prefill batch whose next token is sampled; of a chunk perhaps none.

    rows_b: row of that batch. slots_b: where the token goes in `tokens_by_slot`.
    positions_b: index the sampled token will have; with the seed it fixes the randomness.
    sampling_b: of dtype SAMPLING. is_greedy: whether every row is. wants_logprobs: whether any row
    does. modifiers: what changes scores; None where nothing does.
    prompt: of a chunk whose own tokens' logprobs are wanted.
    """

    rows_b: Int32[np.ndarray, "b"]
    slots_b: Int32[np.ndarray, "b"]
    positions_b: Int32[np.ndarray, "b"]
    sampling_b: Shaped[np.ndarray, "b"]
    is_greedy: bool
    wants_logprobs: bool
    modifiers: ModifierBatch | None
    prompt: PromptTargets | None = None

    @staticmethod
    def of(
        rows: Sequence[int],
        slots: Sequence[int],
        positions: Sequence[int],
        sampling: Sequence[SamplingParams],
        changes: Sequence[RowChanges | None] | None = None,
    ) -> "HeadBatch":
        """Return the head of some rows; `changes` where any row may have some."""
        sampling_b = sampling_columns(sampling)
        return HeadBatch(
            np.array(rows, np.int32),
            np.array(slots, np.int32),
            np.array(positions, np.int32),
            sampling_b,
            is_greedy=is_greedy(sampling_b),
            wants_logprobs=wants_logprobs(sampling_b),
            modifiers=None if changes is None else ModifierBatch.of(rows, changes),
        )


@dataclass(frozen=True)
class CohortBatch:
    """One token for the rows of a host-lane cohort, which move through the layers together.

    It may take many sweeps; until it has sampled, the cohort gets no other.
    """

    cohort_id: int
    decode: DecodeBatch
    head: HeadBatch


@dataclass(frozen=True)
class StagedPrefix:
    """Pages of prompts whose KV the host has already: where they lie there, and where they go."""

    host_pages_i: Int32[np.ndarray, "i"]
    staging_pages_i: Int32[np.ndarray, "i"]


@dataclass(frozen=True)
class HostPrefillBatch:
    """A part of the layer-major prefill of prompts bound for the host.

    chunks: the prompts, cut along their tokens (several rows only where one chunk holds them);
    block tables name pages of the staging plane, which holds the KV of one layer at a time.
    A unit is one chunk in one layer, chunks within layers; this part runs units first_unit to
    end_unit - 1. staging_pages_i, host_pages_i: where the group's own KV of a layer lies after its
    last chunk, and where it goes. prefix: what is there before its first, in every layer. heads:
    where this part ends the group, those of chunks by their index: of the last one, and of those
    before whose tokens' logprobs are wanted.
    """

    chunks: tuple[PrefillBatch, ...]
    first_unit: int
    end_unit: int
    staging_pages_i: Int32[np.ndarray, "i"]
    host_pages_i: Int32[np.ndarray, "i"]
    heads: tuple[tuple[int, HeadBatch], ...]
    prefix: StagedPrefix | None = None


class Direction(StrEnum):
    PROMOTION = "promotion"  # host to device
    DEMOTION = "demotion"  # device to host


@dataclass(frozen=True)
class Move:
    """A sequence's KV going from one lane to the other, layer by layer, page by page."""

    move_id: int
    direction: Direction
    device_pages_i: Int32[np.ndarray, "i"]
    host_pages_i: Int32[np.ndarray, "i"]


@dataclass(frozen=True)
class SweepPlan:
    """What one sweep does: prefill chunks, then decode rows, each with its own head.

    cohorts: those that begin a token; others may be on their way. dropped_cohorts: those whose rows
    have all ended meanwhile. moves: those that begin.
    """

    sweep_id: int
    prefill: PrefillBatch | None = None
    prefill_head: HeadBatch | None = None
    decode: DecodeBatch | None = None
    decode_head: HeadBatch | None = None
    cohorts: tuple[CohortBatch, ...] = ()
    dropped_cohorts: tuple[int, ...] = ()
    host_prefill: HostPrefillBatch | None = None
    moves: tuple[Move, ...] = ()


class Sampled(NamedTuple):
    """What heads chose, in the order of their rows.

    logprobs: of each row whose head computed them, all that there are; empty where none did.
    prompts: of the tokens of each row of PromptTargets.
    """

    tokens_b: Int32[np.ndarray, "b"]
    logprobs: tuple[TokenLogprobs | None, ...] = ()
    prompts: tuple[tuple[TokenLogprobs, ...], ...] = ()


def join_sampled(parts: Sequence[Sampled]) -> Sampled:
    """Return what several heads chose as one."""
    if not parts:
        return Sampled(np.zeros(0, np.int32))
    logprobs: list[TokenLogprobs | None] = []
    if any(part.logprobs for part in parts):
        for part in parts:
            logprobs += part.logprobs or (None,) * len(part.tokens_b)
    return Sampled(
        np.concatenate([part.tokens_b for part in parts]),
        tuple(logprobs),
        tuple(itertools.chain.from_iterable(part.prompts for part in parts)),
    )
