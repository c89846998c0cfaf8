"""A backend that computes nothing but notices everything: KV pages hold token ids.

Its "model" reads a sequence back from the pages the plan names and hashes it into the next token.
So a page written twice, freed too early or listed in the wrong order shows as a wrong token.
Stages run when they are enqueued or, with a delay, when they are waited for. Imports no jax.
"""

import hashlib
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from apex_jax.dispatch import Embed, Handle, Head, Layers, Stage
from apex_jax.plan import DecodeBatch, HeadBatch, PrefillBatch

VOCAB_SIZE = 50
NOTHING = -1


def next_token(token_ids: Sequence[int]) -> int:
    digest = hashlib.blake2b(np.array(token_ids, np.int64).tobytes(), digest_size=4).digest()
    return int.from_bytes(digest, "little") % VOCAB_SIZE


def expected_output(prompt: Sequence[int], max_tokens: int, stops: frozenset[int]) -> list[int]:
    token_ids = list(prompt)
    while len(token_ids) < len(prompt) + max_tokens:
        token_ids.append(next_token(token_ids))
        if token_ids[-1] in stops:
            break
    return token_ids[len(prompt) :]


@dataclass
class PaperHandle:
    """The rows' whole sequences after Embed, their next tokens after Head."""

    sequences: list[list[int]] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)

    def read(self) -> np.ndarray:
        return np.array(self.tokens, np.int32)


class PaperBackend:
    """One device with pages, slots and a queue of work."""

    def __init__(self, num_pages: int, page_size: int, num_slots: int, *, runs_late: bool):
        self.pages = np.full((num_pages, page_size), NOTHING)
        self.tokens_by_slot = np.full(num_slots, NOTHING)
        self.stages: list[Stage] = []
        self._page_size = page_size
        self._runs_late = runs_late
        self._queue: deque[Callable[[], None]] = deque()

    def now(self) -> float:
        return float(len(self.stages))

    def enqueue(self, stage: Stage, operand: Handle | None = None) -> PaperHandle:
        self.stages.append(stage)
        handle = PaperHandle()
        self._queue.append(lambda: self._run(stage, operand, handle))
        if not self._runs_late:
            self._drain()
        return handle

    def wait_any(self, handles: Sequence[Handle], deadline_sec: float) -> Handle | None:
        self._drain()
        return handles[0]

    def _drain(self) -> None:
        while self._queue:
            self._queue.popleft()()

    def _run(self, stage: Stage, operand: Handle | None, handle: PaperHandle) -> None:
        if isinstance(stage, Embed):
            batch = stage.batch
            append = self._decode if isinstance(batch, DecodeBatch) else self._prefill
            handle.sequences = append(batch)
            return
        assert isinstance(operand, PaperHandle)
        if isinstance(stage, Layers):
            handle.sequences = operand.sequences
        else:
            assert isinstance(stage, Head)
            handle.tokens = self._sample(stage.batch, operand.sequences)

    def _decode(self, batch: DecodeBatch) -> list[list[int]]:
        for slot, position, table in zip(
            batch.slots_b, batch.positions_b, batch.block_table_bm, strict=True
        ):
            self._write(table, int(position), [int(self.tokens_by_slot[slot])])
        ends = [int(position) + 1 for position in batch.positions_b]
        return self._read(batch.block_table_bm, ends)

    def _prefill(self, batch: PrefillBatch) -> list[list[int]]:
        ends: list[int] = []
        for tokens, start, length, table in zip(
            batch.token_ids_bt, batch.starts_b, batch.lengths_b, batch.block_table_bm, strict=True
        ):
            self._write(table, int(start), tokens[:length].tolist())
            ends.append(int(start + length))
        return self._read(batch.block_table_bm, ends)

    def _sample(self, head: HeadBatch, sequences: list[list[int]]) -> list[int]:
        tokens: list[int] = []
        for row, slot, position in zip(head.rows_b, head.slots_b, head.positions_b, strict=True):
            assert len(sequences[row]) == position, "the sampled position is not the next one"
            tokens.append(next_token(sequences[row]))
            self.tokens_by_slot[slot] = tokens[-1]
        return tokens

    def _write(self, table: np.ndarray, start: int, tokens: list[int]) -> None:
        for position, token in enumerate(tokens, start=start):
            page, slot = divmod(position, self._page_size)
            self.pages[table[page], slot] = token

    def _read(self, block_table_bm: np.ndarray, ends: list[int]) -> list[list[int]]:
        sequences = []
        for table, end in zip(block_table_bm, ends, strict=True):
            num_pages = -(-end // self._page_size)
            sequences.append(self.pages[table[:num_pages]].reshape(-1)[:end].tolist())
        return sequences
