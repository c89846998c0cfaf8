"""Batches to measure with: so many rows over so much KV, on pages that a pool really has.

Owns which batches of a shape are possible at all. They are read for their shapes; what they leave
in pages and slots is overwritten before it is read. Called by the profiler. Imports no jax.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from apex_jax.buckets import PAGES_PER_BLOCK, Buckets
from apex_jax.plan import DecodeBatch, HeadBatch, PrefillBatch
from apex_jax.request import SamplingParams

SAMPLED = SamplingParams(temperature=1.0, top_p=0.9)


@dataclass(frozen=True)
class Capacity:
    """What an engine has room for.

    span: layers of a program for whole layers. num_pages, num_host_pages: of the two pools.
    """

    num_layers: int
    span: int
    num_pages: int
    num_host_pages: int
    max_model_len: int


def decode_batch(lengths: Sequence[int], num_pages: int, page_size: int) -> DecodeBatch:
    """Return rows of so many tokens of KV, the new one included, on pages all over a pool."""
    pages = [-(-length // page_size) for length in lengths]
    scattered = np.random.default_rng(0).permutation(num_pages).astype(np.int32)
    table_bm = np.zeros((len(lengths), max(pages)), np.int32)
    first = 0
    for row, count in enumerate(pages):
        table_bm[row, :count] = scattered[first : first + count]
        first += count
    assert first <= num_pages, f"{first} pages of {num_pages}"
    slots_b = np.arange(len(lengths), dtype=np.int32)
    return DecodeBatch(slots_b, np.array(lengths, np.int32) - 1, table_bm)


def device_lengths(
    num_rows: int, num_blocks: int, shapes: Buckets, capacity: Capacity
) -> list[int] | None:
    """Return lengths of rows that fill exactly so many blocks, None where no batch does.

    Blocks are dealt out evenly; of each row the last is as full as the pool allows, but no more
    than the rest of the way to the longest request.
    """
    page_size, block_tokens = shapes.page_size, shapes.block_tokens
    fewest, num_longer = divmod(num_blocks, num_rows)
    most = fewest + (num_longer > 0)
    whole_pages = PAGES_PER_BLOCK * (num_blocks - num_rows)
    last_pages = min(PAGES_PER_BLOCK, (capacity.num_pages - whole_pages) // num_rows)
    if fewest < 1 or last_pages < 1 or (most - 1) * block_tokens >= capacity.max_model_len:
        return None
    counts = [most if row < num_longer else fewest for row in range(num_rows)]
    return [
        min((count - 1) * block_tokens + last_pages * page_size, capacity.max_model_len)
        for count in counts
    ]


def fullest(num_rows: int, blocks: int, shapes: Buckets, capacity: Capacity) -> list[int] | None:
    """Return lengths of the fullest batch that a program of a bucket serves, None for none.

    num_rows, blocks: a row bucket, and one of its block buckets. Rows may be fewer than the bucket
    holds where the pool has too few pages for all.
    """
    sizes = shapes.num_blocks[num_rows]
    least_blocks = max((size for size in sizes if size < blocks), default=0) + 1
    least_rows = max((rows for rows in shapes.rows if rows < num_rows), default=0) + 1
    for rows in range(num_rows, least_rows - 1, -1):
        for count in range(blocks, max(least_blocks, rows) - 1, -1):
            lengths = device_lengths(rows, count, shapes, capacity)
            if lengths is not None:
                return lengths
    return None


def host_lengths(num_rows: int, shapes: Buckets, capacity: Capacity) -> tuple[int, ...]:
    """Return lengths, in geometric progression, that so many rows of a cohort can have.

    From a page each to what fills the pool, or to the longest request that fits; none where there
    are fewer pages than rows.
    """
    assert shapes.host is not None
    longest_pages = min(shapes.host.num_staging_pages, capacity.num_host_pages // num_rows)
    longest = min(longest_pages * shapes.page_size, capacity.max_model_len)
    if longest < 1:
        return ()
    shortest = min(shapes.page_size, longest)
    between = round((shortest * longest) ** 0.5)
    return tuple(sorted({shortest, between, longest}))


def prompt_batch(
    chunk: tuple[int, int], context_pages: int, num_pages: int, page_size: int
) -> PrefillBatch:
    """Return whole chunks at the end of so many pages; rows may share pages of a small pool."""
    rows, tokens = chunk
    context = context_pages * page_size
    length = min(tokens, context)
    table_bm = np.arange(rows * context_pages, dtype=np.int32).reshape(rows, context_pages)
    return PrefillBatch(
        np.zeros((rows, tokens), np.int32),
        np.full(rows, context - length, np.int32),
        np.full(rows, length, np.int32),
        table_bm % np.int32(num_pages),
    )


def head_batch(num_rows: int, *, is_greedy: bool) -> HeadBatch:
    """Return a head of all rows of a batch."""
    rows, params = range(num_rows), SamplingParams(temperature=0.0) if is_greedy else SAMPLED
    return HeadBatch.of(rows, rows, [1] * num_rows, [params] * num_rows)


def token_batch(num_rows: int) -> DecodeBatch:
    """Return rows of one token, for stages that touch no pages."""
    rows_b = np.arange(num_rows, dtype=np.int32)
    return DecodeBatch(rows_b, np.zeros_like(rows_b), np.zeros((num_rows, 1), np.int32))


def cohort_sizes(shapes: Buckets, capacity: Capacity) -> dict[int, int]:
    """Return the cohort buckets that the host has pages for, and the most rows in each."""
    assert shapes.host is not None
    buckets = shapes.host.cohort_rows
    return {
        bucket: min(bucket, capacity.num_host_pages)
        for bucket, smaller in zip(buckets, (0, *buckets), strict=False)
        if capacity.num_host_pages > smaller
    }
