"""Prompts on their way to the host: how they are grouped and cut, and how far a group has come.

A group goes through the device layer by layer, all its chunks in one layer before the next, so that
only one layer's KV is on the device at a time. Owns that progress. Called by the scheduler. Imports
no jax.
"""

from collections.abc import Sequence as AbstractSequence

import numpy as np
from jaxtyping import Int32

from apex_jax.pages import num_pages_for
from apex_jax.plan import HeadBatch, HostPrefillBatch, PrefillBatch, StagedPrefix
from apex_jax.sequence import Sequence


def choose_group(
    chunks: AbstractSequence[tuple[int, int]], num_remaining: AbstractSequence[int]
) -> tuple[int, tuple[int, ...]]:
    """Return how many prompts go together, and the lengths of the chunks they are cut into.

    Several go together where one (rows, tokens) chunk holds them whole; otherwise the first goes
    alone. num_remaining: tokens of each prompt, oldest first.
    """

    def num_held(shape: tuple[int, int]) -> int:
        rows, tokens = shape
        longer = (row for row, left in enumerate(num_remaining[:rows]) if left > tokens)
        return next(longer, min(rows, len(num_remaining)))

    rows, tokens = max(chunks, key=lambda one: (num_held(one), -one[0] * one[1]))
    if num_held((rows, tokens)) > 1:
        return num_held((rows, tokens)), (tokens,)
    sizes = sorted(tokens for rows, tokens in chunks if rows == 1)
    lengths: list[int] = []
    while (left := num_remaining[0] - sum(lengths)) > 0:
        lengths.append(next((size for size in sizes if size >= left), sizes[-1]))
    return 1, tuple(lengths)


class PromptGroup:
    """Sequences that prefill together for the host; their host pages are there already.

    chunks: of all of them, in order. What of them is computed is in the first of their pages.
    """

    def __init__(
        self,
        sequences: AbstractSequence[Sequence],
        chunk_tokens: tuple[int, ...],
        num_layers: int,
        page_size: int,
    ):
        self.sequences = tuple(sequences)
        counts = [num_pages_for(one.num_tokens, page_size) for one in sequences]
        pages = [one.pages[:count] for one, count in zip(sequences, counts, strict=True)]
        host_pages_i = np.concatenate(pages).astype(np.int32)
        staging_pages_i = np.arange(len(host_pages_i), dtype=np.int32)
        is_known = [
            np.arange(count) < one.num_computed // page_size
            for one, count in zip(sequences, counts, strict=True)
        ]
        is_known_i = np.concatenate(is_known)
        self._host_pages_i = host_pages_i[~is_known_i]
        self._staging_pages_i = staging_pages_i[~is_known_i]
        self._prefix: StagedPrefix | None = None
        if is_known_i.any():
            self._prefix = StagedPrefix(host_pages_i[is_known_i], staging_pages_i[is_known_i])
        firsts = np.cumsum([0, *counts[:-1]])
        # Entries past a row's pages are unspecified, so its neighbour's may stand there.
        table_bm = (firsts[:, None] + np.arange(max(counts))).astype(np.int32)
        self.chunks = tuple(_cut(sequences, chunk_tokens, table_bm, page_size))
        self._num_units = num_layers * len(self.chunks)
        self._next_unit = 0

    def take(self, budget: int) -> tuple[int, int]:
        """Return the next units as (first, end): at least one, then as many as the budget allows.

        budget: tokens times layers, padding included.
        """
        first = self._next_unit
        while self._next_unit < self._num_units:
            budget -= self.chunks[self._next_unit % len(self.chunks)].token_ids_bt.size
            if budget < 0 and self._next_unit > first:
                break
            self._next_unit += 1
        return first, self._next_unit

    @property
    def is_complete(self) -> bool:
        """Whether all units have been taken."""
        return self._next_unit == self._num_units

    def batch(
        self, units: tuple[int, int], heads: tuple[tuple[int, HeadBatch], ...]
    ) -> HostPrefillBatch:
        return HostPrefillBatch(
            self.chunks, *units, self._staging_pages_i, self._host_pages_i, heads, self._prefix
        )


def _cut(
    sequences: AbstractSequence[Sequence],
    chunk_tokens: tuple[int, ...],
    table_bm: Int32[np.ndarray, "b m"],
    page_size: int,
) -> list[PrefillBatch]:
    """Cut what is left of prompts into chunks; where these are several there is one sequence."""
    batches: list[PrefillBatch] = []
    starts = [sequence.num_computed for sequence in sequences]
    for num_tokens in chunk_tokens:
        parts = [
            sequence.token_ids[start : start + num_tokens]
            for sequence, start in zip(sequences, starts, strict=True)
        ]
        token_ids_bt = np.zeros((len(parts), num_tokens), np.int32)
        for row, part in enumerate(parts):
            token_ids_bt[row, : len(part)] = part
        starts_b = np.array(starts, np.int32)
        lengths_b = np.array([len(part) for part in parts], np.int32)
        num_pages = num_pages_for(int((starts_b + lengths_b).max()), page_size)
        batches.append(PrefillBatch(token_ids_bt, starts_b, lengths_b, table_bm[:, :num_pages]))
        starts = [start + num_tokens for start in starts]
    return batches
