"""A lane's room: its pages, its rows, and the sequences whose KV lives there.

Owns admission's arithmetic, the ledger of one pool and what sequences share of it; who goes where
is the scheduler's business. Full pages of a prompt are known as soon as the stages that fill them
are planned, those of an output when its sequence leaves: stages run in the order of their planning.
Nobody writes to a page that is known. Imports no jax.
"""

import bisect
from collections import Counter
from collections.abc import Sequence as AbstractSequence

import numpy as np
from jaxtyping import Bool, Int32

from apex_jax.decode_rows import DecodeRows, RowSet
from apex_jax.pages import BlockTables, PagePool, num_pages_for
from apex_jax.plan import DecodeBatch
from apex_jax.prefix_cache import PageNode, PrefixCache
from apex_jax.sequence import Lane, Sequence
from apex_jax.slot_table import SlotTable


class LaneRoom:
    """What one lane can hold, and who is in it.

    max_requests: sequences at once. table: of both lanes together, because a sequence keeps its
    slot when it moves. reuses_prefixes: a sequence that begins like another one shares its pages.
    sequences: by index, so the oldest first. filling: those of them whose prompt is not planned to
    its end. decoding: those between two tokens.
    """

    def __init__(
        self,
        lane: Lane,
        *,
        num_pages: int,
        page_size: int,
        max_requests: int,
        max_model_len: int,
        table: SlotTable,
        reuses_prefixes: bool = False,
    ):
        self.lane, self.max_requests, self.page_size = lane, max_requests, page_size
        self._known = PrefixCache(page_size) if reuses_prefixes else None
        self._known_until: dict[Sequence, PageNode] = {}  # of sequences here, where not the root
        self._found: tuple[tuple[Sequence, int, int] | None, list[PageNode]] = None, []
        self.pool = PagePool(num_pages, self._known)
        self.sequences: list[Sequence] = []
        self.filling: list[Sequence] = []
        self.decoding = DecodeRows(table)
        self._table, self._is_here_s = table, np.zeros(table.num_slots, np.bool_)
        self._num_arriving = 0
        max_pages = num_pages_for(min(max_model_len, num_pages * page_size), page_size)
        self._tables = BlockTables(table.num_slots, max_pages, page_size)

    @property
    def num_tokens(self) -> int:
        """Tokens of KV that the pool holds in all."""
        return self.pool.num_pages * self.page_size

    @property
    def num_used(self) -> int:
        return self.pool.num_pages - self.pool.num_free

    @property
    def num_settled_tokens(self) -> int:
        """Tokens of the sequences here, those included that are planned and not read yet."""
        return int(self._table.num_tokens_s[self._is_here_s].sum())

    @property
    def is_anyone_full(self) -> bool:
        """Whether all tokens of a sequence here are planned, so that it will leave soon."""
        table, is_here_s = self._table, self._is_here_s
        is_full_i = table.num_tokens_s[is_here_s] >= table.max_num_tokens_s[is_here_s]
        return bool(np.count_nonzero(is_full_i))

    def count_longer_than(self, num_tokens: int) -> int:
        """Return how many sequences here may come to more tokens."""
        return int(np.count_nonzero(self._table.max_num_tokens_s[self._is_here_s] > num_tokens))

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
        num_pages = sum(self._num_pages_wanted(one) for one in [*ahead, sequence])
        num_here = len(self.sequences) + self._num_arriving + len(ahead)
        return self.pool.num_free >= num_pages + num_here

    def num_unfilled(self, sequence: Sequence) -> int:
        """Return how many tokens there are to prefill of a sequence that is here or may enter."""
        if sequence.lane is not None:
            return sequence.num_unfilled
        return len(sequence.token_ids) - len(self._find(sequence)) * self.page_size

    def is_coming(self, sequence: Sequence, prefilling: AbstractSequence[Sequence]) -> bool:
        """Whether one of those `prefilling` will fill the next page that a sequence could share."""
        if self._known is None or not prefilling:
            return False
        known = self._find(sequence)
        page_index, node = len(known), known[-1] if known else self._known.root
        if page_index == self._most_shared(sequence):
            return False
        tokens = self._known.tokens_of(sequence.token_ids, page_index)
        return any(
            self._node_of(one) is node
            and self._known.tokens_of(one.token_ids, page_index) == tokens
            for one in prefilling
        )

    def enter(self, sequence: Sequence) -> None:
        """Take in a sequence that waited, with pages for its tokens and the next one.

        The first of them may hold its tokens already: those count as computed.
        """
        assert sequence.lane is None
        assert not sequence.pages
        assert sequence.slot is not None
        known = self._find(sequence)
        if known:
            self._known_until[sequence] = known[-1]
            sequence.pages = [node.page for node in known]
            self.pool.share(sequence.pages)
            self._tables.set(sequence.slot, 0, sequence.pages)
            sequence.num_computed = len(known) * self.page_size
        sequence.lane = self.lane
        self._insert(sequence)
        bisect.insort(self.filling, sequence, key=lambda one: one.index)
        self._grow(sequence, self._num_pages_for(sequence) - len(known))

    def note_computed(self, sequence: Sequence) -> None:
        """Let others share the full pages of what is planned of a sequence's known tokens."""
        if self._known is not None:
            self._note_known(sequence, min(sequence.num_computed, len(sequence.token_ids)))

    def end_filling(self, sequence: Sequence) -> None:
        """Learn that the whole prompt of a sequence is planned."""
        sequence.is_decoding = True
        self.filling.remove(sequence)

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
        assert sequence.slot is not None
        if self._known is not None:
            # Nor is the last token's KV whole, where it was under way when its cohort was dropped.
            num_whole = min(sequence.num_computed, len(sequence.token_ids) - 1)
            self._note_known(sequence, num_whole)
            self._known_until.pop(sequence, None)
        self.decoding.discard(sequence.slot)
        self._is_here_s[sequence.slot] = False
        self.sequences.remove(sequence)
        if not sequence.is_decoding:
            self.filling.remove(sequence)
        self.pool.release(reversed(sequence.pages))  # so that the first ones are kept longest
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

    def grow_rows(self) -> list[Sequence]:
        """Give each that decodes a page for its next token; return those for whom none was left.

        The oldest come first.
        """
        rows = self.decoding.rows
        needing_i = (~self._has_page(rows)).nonzero()[0]
        given_i, lacking_i = needing_i[: self.pool.num_free], needing_i[self.pool.num_free :]
        if len(given_i):
            pages = self.pool.allocate(len(given_i))
            self._tables.append(rows.slots_b[given_i], pages)
            for sequence, page in zip(rows.pick(given_i), pages, strict=True):
                sequence.pages.append(page)
        return rows.pick(lacking_i)

    def rows_with_page(self) -> RowSet:
        """Return those that decode and can take a step now, oldest first."""
        rows = self.decoding.rows
        has_page_i = self._has_page(rows).nonzero()[0]
        return rows if len(has_page_i) == len(rows) else rows.choose(self._table, has_page_i)

    def _has_page(self, rows: RowSet) -> Bool[np.ndarray, "b"]:
        """Return of each whether its next token's KV has a page."""
        num_pages_b = self._tables.num_pages_s[rows.slots_b]
        return self._table.num_computed_s[rows.slots_b] < num_pages_b * self.page_size

    def take_step(self, rows: RowSet, num_sweeps: int) -> DecodeBatch:
        """Plan one more token of rows whose page for it is there; num_sweeps: the sweep's."""
        table, slots_b = self._table, rows.slots_b
        positions_b = table.num_computed_s[slots_b]
        table.num_computed_s[slots_b] = positions_b + 1
        table.last_step_s[slots_b] = num_sweeps
        table_bm = self._tables.rows(slots_b, int(positions_b.max()) + 1)
        return DecodeBatch(slots_b, positions_b, table_bm)

    def pages_of(self, sequences: list[Sequence]) -> Counter[int]:
        return Counter(page for sequence in sequences for page in sequence.pages)

    def _num_pages_for(self, sequence: Sequence) -> int:
        return num_pages_for(sequence.num_tokens + 1, self.page_size)

    def _num_pages_wanted(self, sequence: Sequence) -> int:
        """Return how many of its pages a sequence takes from those that are free."""
        num_pages = self._num_pages_for(sequence)
        for node in self._find(sequence) if sequence.lane is None else ():
            if not self.pool.is_used(node.page):
                break  # it and those behind it may be gone when the sequence enters
            num_pages -= 1
        return num_pages

    def _most_shared(self, sequence: Sequence) -> int:
        """Return how many known pages a sequence can use: the last token's logits are wanted.

        Those of its whole prompt where it asks for them.
        """
        return 0 if sequence.wants_prompt else (len(sequence.token_ids) - 1) // self.page_size

    def _find(self, sequence: Sequence) -> list[PageNode]:
        """Return the known pages of a sequence that waits."""
        if self._known is None:
            return []
        # Asked several times as it enters, and in every sweep while the room is full.
        asked = (sequence, self._most_shared(sequence), self._known.num_changes)
        if asked != self._found[0]:
            self._found = asked, self._known.find(sequence.token_ids, asked[1])
        return self._found[1]

    def _node_of(self, sequence: Sequence) -> PageNode:
        """Return the last known page of a sequence that is here or waits."""
        assert self._known is not None
        if sequence.lane is None:
            return (self._find(sequence) or [self._known.root])[-1]
        return self._known_until.get(sequence, self._known.root)

    def _note_known(self, sequence: Sequence, num_tokens: int) -> None:
        assert self._known is not None
        node = self._known_until.get(sequence, self._known.root)
        num_pages = num_tokens // self.page_size
        self._known_until[sequence] = self._known.add(
            node, sequence.token_ids, sequence.pages, num_pages
        )

    def _insert(self, sequence: Sequence) -> None:
        assert sequence.slot is not None
        self._is_here_s[sequence.slot] = True
        bisect.insort(self.sequences, sequence, key=lambda one: one.index)

    def _grow(self, sequence: Sequence, count: int) -> None:
        assert sequence.slot is not None
        pages = self.pool.allocate(count)
        self._tables.set(sequence.slot, len(sequence.pages), pages)
        sequence.pages.extend(pages)
