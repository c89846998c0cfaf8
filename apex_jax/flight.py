"""A planned sweep's samples: which sequences' next tokens its heads yield, in their order.

Owns what `commit` needs to know of a sweep until its tokens are read. Called by the scheduler.
Imports no jax.
"""

from collections.abc import Sequence as AbstractSequence
from dataclasses import dataclass, field, replace

import numpy as np
from jaxtyping import Int32

from apex_jax.decode_rows import RowSet
from apex_jax.plan import HeadBatch, PrefillBatch, PromptTargets
from apex_jax.request import TokenLogprobs
from apex_jax.sequence import Lane, Sequence
from apex_jax.slot_table import SlotTable


@dataclass(frozen=True)
class SampledRows:
    """Rows of one head, and where the attention was.

    places_b: of their tokens in the output. remarkable: rows whose token wants a look, whatever it
    is.
    """

    rows: RowSet
    lane: Lane
    places_b: Int32[np.ndarray, "b"]
    remarkable: frozenset[int]

    def read(
        self,
        table: SlotTable,
        tokens_b: Int32[np.ndarray, "b"],
        logprobs: AbstractSequence[TokenLogprobs | None],
        now_sec: float,
    ) -> tuple[int, list[Sequence]]:
        """Let each have its token; return how many wanted one, and who has ended with it.

        Those who had ended before get none: it is the surplus token of a sweep that was planned
        before the stop token was read. logprobs: of each; empty where the head computed none.
        """
        rows, is_host = self.rows, self.lane is Lane.HOST
        is_owned_b = table.is_owned(rows.slots_b, rows.owners_b)
        looks = set(self.remarkable)
        looks.update((rows.stops_bk == tokens_b[:, None]).nonzero()[0].tolist())
        num_read = int(np.count_nonzero(is_owned_b))
        owned = slice(None) if num_read == len(rows) else is_owned_b
        looks.update((~is_owned_b).nonzero()[0].tolist())
        table.take_tokens(
            rows.slots_b[owned], self.places_b[owned], tokens_b[owned], is_of_host=is_host
        )
        ended: list[Sequence] = []
        for row in sorted(looks):
            sequence, token = rows.sequences[row], tokens_b.item(row)
            if sequence.finish_reason is not None:
                continue
            if not is_owned_b[row]:  # it was pre-empted
                sequence.append(token, is_of_host=is_host)
                num_read += 1
            sequence.look_at(token, now_sec, logprobs[row] if logprobs else None)
            if sequence.finish_reason is not None:
                ended.append(sequence)
        return num_read, ended


@dataclass
class Flight:
    """Who samples in a sweep.

    scored: whose prompt's tokens get logprobs, and after which of them the chunk begins.
    """

    table: SlotTable
    sampled: list[SampledRows] = field(default_factory=list)
    scored: list[tuple[Sequence, int]] = field(default_factory=list)

    def add_head(
        self, rows_b: Int32[np.ndarray, "b"], rows: RowSet, prompt: PromptTargets | None = None
    ) -> HeadBatch | None:
        """Let rows of a batch sample in this very sweep; None where nothing is wanted of it.

        rows_b: their places in the batch.
        """
        if not len(rows) and prompt is None:
            return None
        head = rows.head(self.table, rows_b)
        if prompt is not None:
            head = replace(head, prompt=prompt)
        self._add(rows, Lane.DEVICE)
        return head

    def add_cohort(self, rows: RowSet) -> None:
        """Learn that a cohort, whose head was planned as it began its token, samples in it."""
        self._add(rows, Lane.HOST)

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

    def _add(self, rows: RowSet, lane: Lane) -> None:
        table, slots_b = self.table, rows.slots_b
        places_b = table.plan_tokens(slots_b)
        is_last_b = table.num_tokens_s[slots_b] == table.max_num_tokens_s[slots_b]
        firsts_or_lasts = ((places_b == 0) | is_last_b).nonzero()[0].tolist()
        remarkable = frozenset((*rows.watched, *firsts_or_lasts))
        self.sampled.append(SampledRows(rows, lane, places_b, remarkable))
