"""Rows that take a step together: who they are, and what their steps have in common.

Owns which sequences of a lane stand between two tokens, and gathers what planning and reading their
tokens takes once for as long as they stay the same. Called by the scheduler's parts. Imports no
jax.
"""

from collections.abc import Sequence as AbstractSequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int, Int32, Int64, Shaped

from apex_jax.modifiers import ModifierBatch
from apex_jax.plan import HeadBatch, is_greedy, wants_logprobs
from apex_jax.sequence import Sequence
from apex_jax.slot_table import SlotTable


@dataclass(frozen=True)
class RowSet:
    """Sequences with a slot, and what does not change while they keep it.

    owners_b: their indices. sampling_b, is_greedy, wants_logprobs: as in HeadBatch. stops_bk:
    tokens that may end them. watched: rows each of whose tokens wants a look. is_modified: whether
    anything changes scores.
    """

    sequences: AbstractSequence[Sequence]
    slots_b: Int32[np.ndarray, "b"]
    owners_b: Int64[np.ndarray, "b"]
    sampling_b: Shaped[np.ndarray, "b"]
    is_greedy: bool
    wants_logprobs: bool
    stops_bk: Int32[np.ndarray, "b k"]
    watched: tuple[int, ...]
    is_modified: bool

    @staticmethod
    def of(table: SlotTable, sequences: AbstractSequence[Sequence]) -> "RowSet":
        slots = [sequence.slot for sequence in sequences if sequence.slot is not None]
        assert len(slots) == len(sequences)
        return RowSet.in_slots(table, sequences, np.array(slots, np.int32))

    @staticmethod
    def in_slots(
        table: SlotTable, sequences: AbstractSequence[Sequence], slots_b: Int32[np.ndarray, "b"]
    ) -> "RowSet":
        sampling_b = table.sampling_s.take(slots_b)  # the quick way to gather records
        return RowSet(
            sequences,
            slots_b,
            owners_b=table.owner_s[slots_b],
            sampling_b=sampling_b,
            is_greedy=is_greedy(sampling_b),
            wants_logprobs=wants_logprobs(sampling_b),
            stops_bk=table.stops_sk[slots_b],
            watched=tuple(table.is_watched_s[slots_b].nonzero()[0].tolist()),
            is_modified=bool(np.count_nonzero(table.is_modified_s[slots_b])),
        )

    def __len__(self) -> int:
        return len(self.slots_b)

    def pick(self, rows_i: Int[np.ndarray, "i"]) -> list[Sequence]:
        """Return some of the sequences."""
        rows: list[int] = rows_i.tolist()
        return [self.sequences[row] for row in rows]

    def choose(self, table: SlotTable, rows_i: Int[np.ndarray, "i"]) -> "RowSet":
        """Return some of the rows."""
        return RowSet.in_slots(table, self.pick(rows_i), self.slots_b[rows_i])

    def head(self, table: SlotTable, rows_b: Int32[np.ndarray, "b"]) -> HeadBatch:
        """Return how the next token of each is sampled; rows_b: their rows in the batch."""
        changes = None
        if self.is_modified:
            changes = [
                None if one.modifiers is None else one.modifiers.changes(one.num_unread)
                for one in self.sequences
            ]
        return HeadBatch(
            rows_b,
            self.slots_b,
            table.num_tokens_s[self.slots_b],
            self.sampling_b,
            self.is_greedy,
            self.wants_logprobs,
            None if changes is None else ModifierBatch.of(rows_b.tolist(), changes),
        )


class DecodeRows:
    """The sequences of a lane for which `is_ready` holds.

    Whoever changes what that depends on says so, with `update` or `discard`.
    """

    def __init__(self, table: SlotTable):
        self._table = table
        self._is_ready_s = np.zeros(table.num_slots, np.bool_)
        self._sequence_s = np.empty(table.num_slots, np.object_)
        self._rows: RowSet | None = None

    @property
    def rows(self) -> RowSet:
        """All of them, oldest first."""
        if self._rows is None:
            slots_b = self._is_ready_s.nonzero()[0].astype(np.int32)
            slots_b = slots_b[self._table.owner_s[slots_b].argsort()]
            sequences: list[Sequence] = self._sequence_s[slots_b].tolist()
            self._rows = RowSet.in_slots(self._table, sequences, slots_b)
        return self._rows

    def update(self, sequence: Sequence) -> None:
        """Learn that a sequence of the lane may have become ready, or no longer be."""
        assert sequence.slot is not None
        if self._is_ready_s[sequence.slot] != sequence.is_ready:
            self._is_ready_s[sequence.slot] = sequence.is_ready
            self._sequence_s[sequence.slot] = sequence
            self._rows = None

    def discard(self, slots_i: int | Int32[np.ndarray, "i"]) -> None:
        """Forget those in some slots, if they were ready."""
        if np.count_nonzero(self._is_ready_s[slots_i]):
            self._is_ready_s[slots_i] = False
            self._sequence_s[slots_i] = None
            self._rows = None
