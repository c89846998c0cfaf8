"""The few shapes that programs are compiled for.

Owns the choice of row, KV-block and prefill buckets and their budget; every batch is padded up to
the smallest bucket that holds it, so that after warm-up nothing compiles. Imports no jax.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

MAX_EXECUTABLES = 80
MAX_ROW_BUCKETS = 6
NUM_SIZES = 4  # of blocks by row bucket, and of context
MIN_ROWS = 2  # one row alone would take another matmul path on XLA's CPU, with other rounding
# A decode block is a few pages of one row: its partial sums must cost little beside reading them.
PAGES_PER_BLOCK = 8


@dataclass(frozen=True)
class Buckets:
    """Shapes of all programs.

    rows: decode rows and head rows. num_blocks: KV blocks (of `block_tokens`) of a whole decode
    batch, by row bucket. chunks: (rows, tokens) of prefill batches. context_pages: pages a prefill
    batch attends to, per row.
    """

    rows: tuple[int, ...]
    num_blocks: dict[int, tuple[int, ...]]
    chunks: tuple[tuple[int, int], ...]
    context_pages: tuple[int, ...]
    page_size: int

    @property
    def block_tokens(self) -> int:
        return self.page_size * PAGES_PER_BLOCK

    def head_rows(self, num_rows: int) -> int:
        """Return the row bucket in which `num_rows` rows are sampled."""
        return smallest_that_holds(self.rows, num_rows)

    @property
    def num_executables(self) -> int:
        """Embed, layers and head programs over all shapes."""
        decode = sum(1 + len(self.num_blocks[rows]) for rows in self.rows)
        prefill = len(self.chunks) * (1 + len(self.context_pages))
        return decode + prefill + 2 * len(self.rows)


def smallest_that_holds(buckets: Iterable[int], size: int) -> int:
    """Return the smallest bucket of at least `size`; ValueError where there is none."""
    return min(bucket for bucket in buckets if bucket >= size)


def choose(
    *,
    max_requests: int,
    max_prefill_tokens: int,
    max_model_len: int,
    num_pages: int,
    page_size: int,
) -> Buckets:
    """Choose buckets within the budget of executables.

    Rows: the last six powers of two up to max_requests. Blocks: from one a row to the most a batch
    can hold, so that a full cache, the case that matters here, wastes nothing. Chunks: a long
    prompt's, a shorter one's (requests mostly arrive one by one, where another ended), or 4 or 16
    at once. Context: from one chunk to the longest request.
    """
    rows = [max(MIN_ROWS, 1 << (max_requests - 1).bit_length())]
    while len(rows) < MAX_ROW_BUCKETS and rows[0] > MIN_ROWS:
        rows.insert(0, rows[0] // 2)
    block_tokens = page_size * PAGES_PER_BLOCK
    num_blocks: dict[int, tuple[int, ...]] = {}
    for row_bucket in rows:
        full_rows = row_bucket * -(-max_model_len // block_tokens)
        # The whole pool, cut into blocks of which each row leaves one partly used.
        pool = num_pages // PAGES_PER_BLOCK + row_bucket
        num_blocks[row_bucket] = _progression(row_bucket, min(full_rows, pool))
    whole, quarter = max_prefill_tokens, max_prefill_tokens // 4
    chunks = [(1, whole), (1, quarter), (1, quarter // 4), (4, quarter), (16, quarter // 4)]
    chunks = [(count, tokens) for count, tokens in chunks if count <= rows[-1] and tokens >= 4]
    contexts = _progression(-(-whole // page_size), -(-max_model_len // page_size))
    buckets = Buckets(tuple(rows), num_blocks, tuple(chunks), contexts, page_size)
    assert buckets.num_executables <= MAX_EXECUTABLES, buckets
    return buckets


def fullest_chunk(
    chunks: Sequence[tuple[int, int]], num_remaining: Sequence[int]
) -> tuple[int, int]:
    """Return the (rows, tokens) shape that prefills most tokens, of equals the smallest.

    num_remaining: prompt tokens left of each candidate, oldest first.
    """

    def worth(shape: tuple[int, int]) -> tuple[int, int]:
        rows, tokens = shape
        return sum(min(left, tokens) for left in num_remaining[:rows]), -rows * tokens

    return max(chunks, key=worth)


def _progression(smallest: int, largest: int) -> tuple[int, ...]:
    """Return up to four sizes in geometric progression, each at least twice the one before."""
    growth = max(largest / smallest, 1.0)
    steps = min(int(math.log2(growth)), NUM_SIZES - 1)
    sizes = (math.ceil(smallest * growth ** (step / steps)) for step in range(steps))
    return (*sizes, largest)
