"""A lane's room: its pages, its rows, and the sequences whose KV lives there.

Owns admission's arithmetic and the ledger of one pool; who goes where is the scheduler's business.
Imports no jax.
"""

import bisect
from collections import Counter
from collections.abc import Sequence as AbstractSequence

import numpy as np
from jaxtyping import Int32

from apex_jax.pages import BlockTables, PagePool, num_pages_for
from apex_jax.plan import DecodeBatch
from apex_jax.sequence import Lane, Sequence


class LaneRoom:
    """What one lane can hold, and who is in it.

    max_requests: sequences at once. num_slots: of both lanes together, because a sequence keeps its
    slot when it moves. sequences: by index, so the oldest first.
    """

    def __init__(
        self,
        lane: Lane,
        *,
        num_pages: int,
        page_size: int,
        max_requests: int,
        max_model_len: int,
        num_slots: int,
    ):
        self.lane, self.max_requests, self.page_size = lane, max_requests, page_size
        self.pool = PagePool(num_pages)
        self.sequences: list[Sequence] = []
        self._num_arriving = 0
        max_pages = num_pages_for(min(max_model_len, num_pages * page_size), page_size)
        self._tables = BlockTables(num_slots, max_pages, page_size)

    @property
    def num_tokens(self) -> int:
        """Tokens of KV that the pool holds in all."""
        return self.pool.num_pages * self.page_size

    @property
    def num_used(self) -> int:
        return self.pool.num_pages - self.pool.num_free

    def can_ever_hold(self, sequence: Sequence) -> bool:
        return sequence.max_num_tokens <= self.num_tokens

    def has_row(self, ahead: AbstractSequence[Sequence] = ()) -> bool:
        """Whether one more may come in, behind those `ahead`."""
        return len(self.sequences) + self._num_arriving + len(ahead) < self.max_requests

    def has_pages(self, sequence: Sequence, ahead: AbstractSequence[Sequence] = ()) -> bool:
        """Whether a sequence's tokens and the next one fit now, behind those `ahead`.

        Each one here may need a page soon: filling the last ones would only drive somebody out.
        """
        if not self.can_ever_hold(sequence):
            return False
        num_pages = sum(self._num_pages_for(one) for one in [*ahead, sequence])
        num_here = len(self.sequences) + self._num_arriving + len(ahead)
        return self.pool.num_free >= num_pages + num_here

    def enter(self, sequence: Sequence) -> None:
        """Take in a sequence that waited, with pages for its tokens and the next one."""
        assert sequence.lane is None
        assert not sequence.pages
        sequence.lane = self.lane
        self._insert(sequence)
        self._grow(sequence, self._num_pages_for(sequence))

    def reserve(self, sequence: Sequence) -> list[int]:
        """Return pages for a sequence that is on its way from the other lane."""
        self._num_arriving += 1
        return self.pool.allocate(self._num_pages_for(sequence))

    def arrive(self, sequence: Sequence, pages: list[int]) -> None:
        """Take in a sequence that has moved here, into pages reserved for it."""
        assert sequence.lane is None
        self._num_arriving -= 1
        sequence.lane, sequence.pages = self.lane, pages
        self._insert(sequence)
        assert sequence.slot is not None
        self._tables.set(sequence.slot, 0, pages)

    def forget(self, pages: list[int]) -> None:
        """Give back the pages of a sequence that ended on its way here."""
        self._num_arriving -= 1
        self.pool.release(pages)

    def leave(self, sequence: Sequence) -> None:
        """Let a sequence go, and its pages with it."""
        self.sequences.remove(sequence)
        self.pool.release(sequence.pages)
        sequence.pages, sequence.lane = [], None

    def needs_page(self, sequence: Sequence) -> bool:
        """Whether the next token's KV has no page yet."""
        return sequence.num_computed == len(sequence.pages) * self.page_size

    def grow(self, sequence: Sequence) -> bool:
        """See to a page for the next token; False where none is free."""
        if self.needs_page(sequence):
            if self.pool.num_free == 0:
                return False
            self._grow(sequence, 1)
        return True

    def rows(self, sequences: list[Sequence], num_tokens: int) -> Int32[np.ndarray, "b m"]:
        """Return a snapshot of block tables, wide enough for `num_tokens` tokens each."""
        slots_b = np.array([sequence.slot for sequence in sequences], np.int32)
        return self._tables.rows(slots_b, num_tokens)

    def take_step(self, sequences: list[Sequence], num_sweeps: int) -> DecodeBatch:
        """Plan one more token of sequences whose page for it is there; num_sweeps: the sweep's."""
        slots_b = np.array([sequence.slot for sequence in sequences], np.int32)
        positions_b = np.array([sequence.num_computed for sequence in sequences], np.int32)
        table_bm = self._tables.rows(slots_b, int(positions_b.max()) + 1)
        for sequence in sequences:
            sequence.num_computed += 1
            sequence.last_step = num_sweeps
        return DecodeBatch(slots_b, positions_b, table_bm)

    def pages_of(self, sequences: list[Sequence]) -> Counter[int]:
        return Counter(page for sequence in sequences for page in sequence.pages)

    def _num_pages_for(self, sequence: Sequence) -> int:
        return num_pages_for(sequence.num_tokens + 1, self.page_size)

    def _insert(self, sequence: Sequence) -> None:
        bisect.insort(self.sequences, sequence, key=lambda one: one.index)

    def _grow(self, sequence: Sequence, count: int) -> None:
        assert sequence.slot is not None
        pages = self.pool.allocate(count)
        self._tables.set(sequence.slot, len(sequence.pages), pages)
        sequence.pages.extend(pages)
