"""The few shapes that programs are compiled for.

Owns the choice of row, KV-block and prefill buckets and their budget; every batch is padded up to
the smallest bucket that holds it, so that after warm-up nothing compiles. Imports no jax.
"""

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

MAX_EXECUTABLES = 80
MAX_ROW_BUCKETS = 6
# With a host lane every layer has to be left and entered by itself, by the device's rows, by a
# cohort's and by both: a few sizes fewer of each, and still more programs, most of them small.
MAX_HYBRID_EXECUTABLES = 128
MAX_HYBRID_ROW_BUCKETS = 4
MAX_HYBRID_CONTEXTS = 3
MAX_HYBRID_CHUNKS = 4
NUM_SIZES = 4  # of blocks by row bucket, and of context
# Pages cross between the lanes padded, and the link is slow: most sequences are far shorter than
# the longest, so these sizes begin low and lie closer.
MIN_TRANSIT_PAGES = 8
NUM_TRANSIT_SIZES = 5
MIN_ENTRIES = 256
MIN_ROWS = 2  # one row alone would take another matmul path on XLA's CPU, with other rounding
# A decode block is a few pages of one row: its partial sums must cost little beside reading them.
PAGES_PER_BLOCK = 8


@dataclass(frozen=True)
class HostLimits:
    """What a host lane asks of the device's programs.

    max_cohort_rows: rows that move through the layers together. num_staging_pages: of the plane
    that holds one layer's KV of the prompts on their way to the host. max_move_pages: of a sequence
    that changes lanes.
    """

    max_cohort_rows: int
    num_staging_pages: int
    max_move_pages: int


@dataclass(frozen=True)
class HostBuckets:
    """Shapes of the programs that only a host lane needs.

    cohort_rows: those of Buckets.rows that cohorts have. head_rows: where several groups of rows
    are sampled together. staging_pages: exported from the staging plane at once, or imported into
    it. move_pages: likewise of the device's pool. num_staging_pages: of the staging plane.
    """

    cohort_rows: tuple[int, ...]
    head_rows: tuple[int, ...]
    staging_pages: tuple[int, ...]
    move_pages: tuple[int, ...]
    num_staging_pages: int

    @property
    def transit_pages(self) -> tuple[int, ...]:
        """All sizes in which pages travel between the lanes."""
        return tuple(sorted({*self.staging_pages, *self.move_pages}))


@dataclass(frozen=True)
class Buckets:
    """Shapes of all programs.

    rows: decode rows of either lane, and head rows. num_blocks: KV blocks (of `block_tokens`) of a
    whole decode batch on the device, by those of the row buckets that such batches have. chunks:
    (rows, tokens) of prefill batches. context_pages: pages a prefill batch attends to, per row.
    host: None where there is no host lane.
    """

    rows: tuple[int, ...]
    num_blocks: dict[int, tuple[int, ...]]
    chunks: tuple[tuple[int, int], ...]
    context_pages: tuple[int, ...]
    page_size: int
    host: HostBuckets | None = None

    @property
    def block_tokens(self) -> int:
        return self.page_size * PAGES_PER_BLOCK

    @property
    def device_rows(self) -> tuple[int, ...]:
        """The row buckets of decode batches on the device."""
        return tuple(self.num_blocks)

    @property
    def boundaries(self) -> tuple[tuple[int, ...], ...]:
        """The row buckets of the groups that share a boundary: one alone, or device and cohort."""
        if self.host is None:
            return ()
        alone = [(rows,) for rows in self.rows]
        return (*alone, *itertools.product(self.device_rows, self.host.cohort_rows))

    @property
    def placements(self) -> tuple[tuple[int, int], ...]:
        """The (group rows, head rows) of groups that share a head with more rows than each."""
        if self.host is None:
            return ()
        pairs = itertools.product(self.rows, self.host.head_rows)
        return tuple((rows, head_rows) for rows, head_rows in pairs if rows < head_rows)

    def head_rows(self, num_rows: int) -> int:
        """Return the row bucket in which `num_rows` rows are sampled."""
        return smallest_that_holds(self.rows, num_rows)

    @property
    def num_executables(self) -> int:
        """Programs over all shapes: embed, layers and heads; for a host lane what else it needs."""
        num_decodes = sum(map(len, self.num_blocks.values()))
        num_prefills = len(self.chunks) * len(self.context_pages)
        count = num_decodes + num_prefills + len(self.chunks) + 3 * len(self.rows)
        if self.host is None:
            return count
        attention = num_decodes + num_prefills  # of a layer by itself
        joint_heads = 2 * len(set(self.host.head_rows) - set(self.rows)) + len(self.placements)
        into_and_out_of_layers = 2 * len(self.rows) + len(self.boundaries)
        pages = len(self.host.staging_pages) + 2 * len(self.host.move_pages)
        return count + attention + joint_heads + into_and_out_of_layers + pages


def entry_bucket(num_entries: int) -> int:
    """Return how many changes of scores a head takes that has so many, or fewer: a power of 4.

    Each size is compiled when it is first needed: few sizes matter more than what padding costs.
    """
    size = MIN_ENTRIES
    while size < num_entries:
        size *= 4
    return size


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
    host: HostLimits | None = None,
) -> Buckets:
    """Choose buckets within the budget of executables; `host` where there is a host lane.

    Rows: the last six powers of two up to max_requests; with a host lane the last four up to the
    larger of both lanes' rows, which share them. Blocks: from one a row to the most a batch can
    hold, so that a full cache, the case that matters here, wastes nothing. Chunks: a long prompt's,
    a shorter one's (requests mostly arrive one by one, where another ended), several at once, and
    last what an accelerator gains least by: one so short takes it little less than the next.
    Context: from one chunk to the longest request.
    """
    max_rows = max_requests if host is None else max(max_requests, host.max_cohort_rows)
    rows = [max(MIN_ROWS, 1 << (max_rows - 1).bit_length())]
    max_row_buckets = MAX_ROW_BUCKETS if host is None else MAX_HYBRID_ROW_BUCKETS
    while len(rows) < max_row_buckets and rows[0] > MIN_ROWS:
        rows.insert(0, rows[0] // 2)
    block_tokens = page_size * PAGES_PER_BLOCK
    num_blocks: dict[int, tuple[int, ...]] = {}
    for row_bucket in _up_to(rows, max_requests):
        full_rows = row_bucket * -(-max_model_len // block_tokens)
        # The whole pool, cut into blocks of which each row leaves one partly used.
        pool = num_pages // PAGES_PER_BLOCK + row_bucket
        num_blocks[row_bucket] = _progression(row_bucket, min(full_rows, pool), NUM_SIZES)
    whole, quarter = max_prefill_tokens, max_prefill_tokens // 4
    chunks = [(1, whole), (1, quarter), (4, quarter), (16, quarter // 4), (1, quarter // 4)]
    chunks = [(count, tokens) for count, tokens in chunks if count <= rows[-1] and tokens >= 4]
    if host is not None:
        chunks = chunks[:MAX_HYBRID_CHUNKS]
    contexts = _progression(
        -(-whole // page_size),
        -(-max_model_len // page_size),
        NUM_SIZES if host is None else MAX_HYBRID_CONTEXTS,
    )
    buckets = Buckets(
        tuple(rows),
        num_blocks,
        tuple(chunks),
        contexts,
        page_size,
        None if host is None else _host_buckets(host, tuple(num_blocks), rows),
    )
    limit = MAX_EXECUTABLES if host is None else MAX_HYBRID_EXECUTABLES
    assert buckets.num_executables <= limit, buckets
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


def _host_buckets(host: HostLimits, device_rows: Sequence[int], rows: Sequence[int]) -> HostBuckets:
    """Choose what only the host lane needs.

    A head of several groups holds the most rows of both lanes, and takes more than one round where
    still more are sampled.
    """
    cohort_rows = _up_to(rows, host.max_cohort_rows)
    most_pages = max(host.num_staging_pages, host.max_move_pages)
    smallest = min(MIN_TRANSIT_PAGES, most_pages)
    transit_pages = _progression(smallest, most_pages, NUM_TRANSIT_SIZES)
    return HostBuckets(
        cohort_rows=cohort_rows,
        head_rows=(*rows, device_rows[-1] + cohort_rows[-1]),
        staging_pages=_up_to(transit_pages, host.num_staging_pages),
        move_pages=_up_to(transit_pages, host.max_move_pages),
        num_staging_pages=host.num_staging_pages,
    )


def _up_to(buckets: Sequence[int], size: int) -> tuple[int, ...]:
    """Return the buckets that sizes from 1 to `size` fall into."""
    largest = smallest_that_holds(buckets, size)
    return tuple(bucket for bucket in buckets if bucket <= largest)


def _progression(smallest: int, largest: int, num_sizes: int) -> tuple[int, ...]:
    """Return up to `num_sizes` sizes in geometric progression, each at least twice the last."""
    growth = max(largest / smallest, 1.0)
    steps = min(int(math.log2(growth)), num_sizes - 1)
    sizes = (math.ceil(smallest * growth ** (step / steps)) for step in range(steps))
    return (*sizes, largest)
