"""A planned sweep's samples: which sequences' next tokens its heads yield, in their order.

Owns what `commit` needs to know of a sweep until its tokens are read. Called by the scheduler.
Imports no jax.
"""

from collections.abc import Iterable
from collections.abc import Sequence as AbstractSequence
from dataclasses import dataclass, field, replace

import numpy as np

from apex_jax.plan import HeadBatch, PrefillBatch, PromptTargets
from apex_jax.sequence import Lane, Sequence


@dataclass
class Flight:
    """Who samples in a sweep, and where the attention was.

    scored: whose prompt's tokens get logprobs, and after which of them the chunk begins.
    """

    sampled: list[tuple[Sequence, Lane]] = field(default_factory=list)
    scored: list[tuple[Sequence, int]] = field(default_factory=list)

    def add_head(
        self,
        rows: AbstractSequence[int],
        sequences: AbstractSequence[Sequence],
        prompt: PromptTargets | None = None,
    ) -> HeadBatch | None:
        """Let rows of a batch sample in this very sweep; None where nothing is wanted of it."""
        if not sequences and prompt is None:
            return None
        head = head_of(rows, sequences)
        if prompt is not None:
            head = replace(head, prompt=prompt)
        self._add(sequences, Lane.DEVICE)
        return head

    def add_cohort(self, sequences: Iterable[Sequence]) -> None:
        """Learn that a cohort, whose head was planned as it began its token, samples in it."""
        self._add(sequences, Lane.HOST)

    def add_targets(
        self, chunk: PrefillBatch, sequences: AbstractSequence[Sequence]
    ) -> PromptTargets | None:
        """Return what follows a chunk's tokens, where a sequence wants to know how likely."""
        next_ids_bt = np.zeros_like(chunk.token_ids_bt)
        rows: list[int] = []
        lengths: list[int] = []
        for row, sequence in enumerate(sequences):
            start, prompt = int(chunk.starts_b[row]), sequence.request.prompt_token_ids
            following = prompt[start + 1 : start + 1 + int(chunk.lengths_b[row])]
            if sequence.wants_prompt and following:
                next_ids_bt[row, : len(following)] = following
                rows.append(row)
                lengths.append(len(following))
                self.scored.append((sequence, start))
        if not rows:
            return None
        return PromptTargets(next_ids_bt, np.array(rows, np.int32), np.array(lengths, np.int32))

    def _add(self, sequences: Iterable[Sequence], lane: Lane) -> None:
        for sequence in sequences:
            sequence.num_unread += 1
            self.sampled.append((sequence, lane))


def head_of(rows: AbstractSequence[int], sequences: AbstractSequence[Sequence]) -> HeadBatch:
    """Return how these rows of a batch sample their sequences' next tokens."""
    return HeadBatch.of(
        rows,
        [sequence.slot for sequence in sequences if sequence.slot is not None],
        [sequence.num_tokens for sequence in sequences],
        [sequence.request.sampling for sequence in sequences],
        [
            None if sequence.modifiers is None else sequence.modifiers.changes(sequence.num_unread)
            for sequence in sequences
        ],
    )
