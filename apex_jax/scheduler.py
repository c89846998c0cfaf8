"""Which requests run, what each sweep does for them, and what its tokens mean.

Owns the queues, slots and pages of all unfinished requests. `plan_sweep` assumes that every row in
flight yields exactly one unknown token; `commit` learns the tokens one sweep later. Whatever a
sequence leaves behind (pages, slot) is reused only after the last sweep that may still write it.
Refuses requests that can never fit. Called by the engine. Imports no jax.
"""

import bisect
import itertools
from collections import Counter, deque
from collections.abc import Sequence as AbstractSequence
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Int32

from apex_jax.buckets import Buckets, fullest_chunk
from apex_jax.pages import BlockTables, PagePool, num_pages_for
from apex_jax.plan import DecodeBatch, HeadBatch, PrefillBatch, SweepPlan
from apex_jax.request import FinishReason, Request, RequestError, RequestOutput


@dataclass
class Sequence:
    """A request on its way.

    index: order of arrival, which is also its priority. token_ids: the prompt and the output read
    so far. num_unread: tokens sampled by planned sweeps and not read yet. num_computed: tokens
    whose KV the planned sweeps have written. slot: row of the device's `tokens_by_slot`, None while
    waiting. is_decoding: its last token lies in that slot. last_sweep_id: the last planned sweep
    that touches its pages and slot.
    """

    index: int
    request: Request
    stop_token_ids: frozenset[int]
    arrival_sec: float
    token_ids: list[int]
    pages: list[int] = field(default_factory=list)
    slot: int | None = None
    is_decoding: bool = False
    num_computed: int = 0
    num_unread: int = 0
    last_sweep_id: int | None = None
    num_preemptions: int = 0
    first_token_sec: float | None = None
    finish_reason: FinishReason | None = None

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids) + self.num_unread

    @property
    def num_output(self) -> int:
        return self.num_tokens - len(self.request.prompt_token_ids)

    @property
    def is_fully_planned(self) -> bool:
        """Whether the planned sweeps sample all its tokens, unless a stop token ends it before."""
        return self.num_output >= self.request.sampling.max_tokens

    @property
    def num_unfilled(self) -> int:
        """Tokens left to prefill."""
        return 0 if self.is_decoding else len(self.token_ids) - self.num_computed

    def append(self, token: int, now_sec: float) -> None:
        """Take a token that was read, and see whether it is the last."""
        self.token_ids.append(token)
        if self.first_token_sec is None:
            self.first_token_sec = now_sec
        num_read = len(self.token_ids) - len(self.request.prompt_token_ids)
        if token in self.stop_token_ids:
            self.finish_reason = FinishReason.STOP
        elif num_read == self.request.sampling.max_tokens:
            self.finish_reason = FinishReason.LENGTH


@dataclass
class _Flight:
    """A planned sweep whose tokens are not read: who sampled in it, and what it sets free."""

    sweep_id: int
    sampled: list[Sequence]
    pages: list[int] = field(default_factory=list)
    slots: list[int] = field(default_factory=list)


@dataclass
class SchedulerStats:
    num_sweeps: int = 0
    num_preemptions: int = 0
    num_prefilled_tokens: int = 0
    num_output_tokens: int = 0
    max_running: int = 0
    max_pages: int = 0


class Scheduler:
    """Continuous batching over one pool of pages."""

    def __init__(
        self,
        *,
        buckets: Buckets,
        num_pages: int,
        max_requests: int,
        max_model_len: int,
        vocab_size: int,
        eos_token_ids: frozenset[int],
    ):
        self.page_size = buckets.page_size
        self.max_model_len = min(max_model_len, num_pages * self.page_size)
        self.stats = SchedulerStats()
        self._chunks = buckets.chunks
        self._vocab_size = vocab_size
        self._eos_token_ids = eos_token_ids
        self._pool = PagePool(num_pages)
        self._tables = BlockTables(
            max_requests, num_pages_for(max_model_len, self.page_size), self.page_size
        )
        self.max_requests = max_requests
        self._free_slots = list(range(max_requests - 1, -1, -1))
        self._waiting: list[Sequence] = []  # by index, so that a pre-empted one goes on first
        self._running: list[Sequence] = []  # likewise
        self._flights: deque[_Flight] = deque()
        self._indices = itertools.count()
        self._sweep_ids = itertools.count()

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def num_unfinished(self) -> int:
        return len(self._waiting) + len(self._running)

    @property
    def num_in_flight(self) -> int:
        """Sweeps planned and not committed."""
        return len(self._flights)

    def submit(self, request: Request, now_sec: float) -> None:
        """Queue a request; RequestError if it could never run."""
        prompt, sampling = request.prompt_token_ids, request.sampling
        if not prompt:
            raise RequestError("the prompt is empty; it needs at least one token")
        outside = [token for token in prompt if not 0 <= token < self._vocab_size]
        if outside:
            raise RequestError(
                f"prompt token id {outside[0]} is outside the vocabulary "
                f"(0 to {self._vocab_size - 1})"
            )
        num_tokens = len(prompt) + sampling.max_tokens
        if num_tokens > self.max_model_len:
            raise RequestError(
                f"prompt ({len(prompt)} tokens) plus max_tokens ({sampling.max_tokens}) is "
                f"{num_tokens}; the limit here is {self.max_model_len} (the model's context, "
                "scheduler.max_model_len or what the KV cache holds, whichever is least)"
            )
        stops = frozenset(sampling.stop_token_ids)
        self._waiting.append(
            Sequence(
                index=next(self._indices),
                request=request,
                stop_token_ids=stops if sampling.ignore_eos else stops | self._eos_token_ids,
                arrival_sec=now_sec,
                token_ids=list(prompt),
            )
        )

    def plan_sweep(self) -> SweepPlan | None:
        """Decide the next sweep, or None where nothing can run before the next commit."""
        decoding = self._grow_decoding()
        prefilling, chunk_tokens = self._choose_prefilling()
        if not decoding and not prefilling:
            return None
        flight = _Flight(next(self._sweep_ids), [])
        self._flights.append(flight)
        prefill, prefill_head = self._plan_prefill(prefilling, chunk_tokens, flight)
        decode, decode_head = self._plan_decode(decoding, flight)
        stats = self.stats
        stats.num_sweeps += 1
        stats.max_running = max(stats.max_running, len(self._running))
        stats.max_pages = max(stats.max_pages, self._pool.num_pages - self._pool.num_free)
        return SweepPlan(flight.sweep_id, prefill, prefill_head, decode, decode_head)

    def commit(self, tokens_b: Int32[np.ndarray, "b"], now_sec: float) -> list[RequestOutput]:
        """Take the tokens of the oldest planned sweep, prefill rows first; return who finished."""
        flight = self._flights.popleft()
        self._pool.release(flight.pages)
        self._free_slots.extend(flight.slots)
        outputs: list[RequestOutput] = []
        for sequence, token in zip(flight.sampled, tokens_b.tolist(), strict=True):
            sequence.num_unread -= 1
            if sequence.finish_reason is not None:
                continue  # the surplus token of a sweep planned before the stop token was read
            sequence.append(token, now_sec)
            self.stats.num_output_tokens += 1
            if sequence.finish_reason is not None:
                outputs.append(self._finish(sequence, now_sec))
        return outputs

    def describe(self) -> str:
        """Return the state of the queues in a line, for error messages."""
        return (
            f"{len(self._running)} running, {len(self._waiting)} waiting, "
            f"{len(self._flights)} sweeps in flight, "
            f"{self._pool.num_free} of {self._pool.num_pages} pages and "
            f"{len(self._free_slots)} of {self.max_requests} slots free"
        )

    def check_ledger(self) -> None:
        """Raise RuntimeError unless pages and slots in use are exactly the live sequences'."""
        pages = Counter(page for sequence in self._running for page in sequence.pages)
        pages.update(page for flight in self._flights for page in flight.pages)
        if pages != self._pool.references():
            raise RuntimeError(f"pages in use {self._pool.references()}, accounted for {pages}")
        slots = [sequence.slot for sequence in self._running if sequence.slot is not None]
        slots += [slot for flight in self._flights for slot in flight.slots]
        if sorted(slots + self._free_slots) != list(range(self.max_requests)):
            raise RuntimeError(f"slots in use {sorted(slots)}, free {sorted(self._free_slots)}")

    # Planning

    def _grow_decoding(self) -> list[Sequence]:
        """Return the sequences that decode in this sweep, each with a page for its next token."""
        ready: list[Sequence] = []
        for sequence in list(self._running):  # oldest first
            if not sequence.is_decoding or sequence.is_fully_planned:
                continue
            if sequence.num_computed == len(sequence.pages) * self.page_size:
                self._make_room(sequence)
                if sequence.slot is None or self._pool.num_free == 0:
                    continue  # pre-empted itself, or its page comes free with a sweep in flight
                self._add_pages(sequence, 1)
            ready.append(sequence)
        return ready

    def _make_room(self, sequence: Sequence) -> None:
        """Pre-empt the newest sequences until a page is free, or will be after a flight."""
        is_ending = any(one.is_fully_planned for one in self._running)
        is_ending = is_ending or any(flight.pages for flight in self._flights)
        while self._pool.num_free == 0 and sequence.slot is not None and not is_ending:
            self._preempt(self._running[-1])
            is_ending = any(flight.pages for flight in self._flights)

    def _choose_prefilling(self) -> tuple[list[Sequence], int]:
        """Return the sequences whose prompt goes on in this sweep, and the chunk length."""
        max_rows = max(rows for rows, _ in self._chunks)
        candidates = [sequence for sequence in self._running if sequence.num_unfilled][:max_rows]
        # Each running request may need a page soon: filling the last ones would only pre-empt.
        num_free = self._pool.num_free - len(self._running)
        num_slots = len(self._free_slots)
        admissible: list[Sequence] = []
        for sequence in self._waiting:
            needed = num_pages_for(sequence.num_tokens + 1, self.page_size)
            is_blocked = needed > num_free and (self._running or admissible)
            if is_blocked or num_slots == 0 or sequence.num_unread or self._pool.num_free < needed:
                break
            if len(candidates) + len(admissible) == max_rows:
                break
            num_free, num_slots = num_free - needed - 1, num_slots - 1
            admissible.append(sequence)
        candidates = sorted(candidates + admissible, key=lambda one: one.index)
        if not candidates:
            return [], 0
        rows, tokens = fullest_chunk(self._chunks, [one.num_unfilled for one in candidates])
        chosen = candidates[:rows]
        for sequence in chosen:
            if sequence.slot is None:
                self._admit(sequence)
        return chosen, tokens

    def _plan_prefill(
        self, sequences: list[Sequence], chunk_tokens: int, flight: _Flight
    ) -> tuple[PrefillBatch | None, HeadBatch | None]:
        if not sequences:
            return None, None
        token_ids_bt = np.zeros((len(sequences), chunk_tokens), np.int32)
        starts = [sequence.num_computed for sequence in sequences]
        lengths = [min(sequence.num_unfilled, chunk_tokens) for sequence in sequences]
        slots_b = self._slots(sequences)
        finishing: list[int] = []
        for row, (sequence, start, length) in enumerate(
            zip(sequences, starts, lengths, strict=True)
        ):
            token_ids_bt[row, :length] = sequence.token_ids[start : start + length]
            sequence.num_computed += length
            sequence.last_sweep_id = flight.sweep_id
            if sequence.num_unfilled == 0:
                sequence.is_decoding = True
                finishing.append(row)
        self.stats.num_prefilled_tokens += sum(lengths)
        longest = max(start + length for start, length in zip(starts, lengths, strict=True))
        batch = PrefillBatch(
            token_ids_bt,
            np.array(starts, np.int32),
            np.array(lengths, np.int32),
            self._tables.rows(slots_b, longest),
        )
        head = self._plan_head(finishing, [sequences[row] for row in finishing], flight)
        return batch, head

    def _plan_decode(
        self, sequences: list[Sequence], flight: _Flight
    ) -> tuple[DecodeBatch | None, HeadBatch | None]:
        if not sequences:
            return None, None
        slots_b = self._slots(sequences)
        positions_b = np.array([sequence.num_computed for sequence in sequences], np.int32)
        table_bm = self._tables.rows(slots_b, int(positions_b.max()) + 1)
        for sequence in sequences:
            sequence.num_computed += 1
            sequence.last_sweep_id = flight.sweep_id
        head = self._plan_head(range(len(sequences)), sequences, flight)
        return DecodeBatch(slots_b, positions_b, table_bm), head

    def _plan_head(
        self, rows: AbstractSequence[int], sequences: list[Sequence], flight: _Flight
    ) -> HeadBatch | None:
        if not sequences:
            return None
        head = HeadBatch.of(
            rows,
            self._slots(sequences).tolist(),
            [sequence.num_tokens for sequence in sequences],
            [sequence.request.sampling for sequence in sequences],
        )
        for sequence in sequences:
            sequence.num_unread += 1
        flight.sampled.extend(sequences)
        return head

    # Movement

    def _slots(self, sequences: list[Sequence]) -> Int32[np.ndarray, "b"]:
        return np.array([sequence.slot for sequence in sequences], np.int32)

    def _add_pages(self, sequence: Sequence, count: int) -> None:
        assert sequence.slot is not None
        pages = self._pool.allocate(count)
        self._tables.set(sequence.slot, len(sequence.pages), pages)
        sequence.pages.extend(pages)

    def _admit(self, sequence: Sequence) -> None:
        self._waiting.remove(sequence)
        bisect.insort(self._running, sequence, key=lambda one: one.index)
        sequence.slot = self._free_slots.pop()
        self._add_pages(sequence, num_pages_for(sequence.num_tokens + 1, self.page_size))

    def _preempt(self, sequence: Sequence) -> None:
        """Send a running sequence back to wait; its KV is recomputed later."""
        self._vacate(sequence)
        sequence.is_decoding, sequence.num_computed = False, 0
        sequence.num_preemptions += 1
        self.stats.num_preemptions += 1
        bisect.insort(self._waiting, sequence, key=lambda one: one.index)

    def _vacate(self, sequence: Sequence) -> None:
        """Take pages and slot from a running sequence, for reuse after its last planned sweep."""
        assert sequence.slot is not None
        self._running.remove(sequence)
        last = [one for one in self._flights if one.sweep_id == sequence.last_sweep_id]
        if last:
            last[0].pages.extend(sequence.pages)
            last[0].slots.append(sequence.slot)
        else:
            self._pool.release(sequence.pages)
            self._free_slots.append(sequence.slot)
        sequence.pages, sequence.slot = [], None

    def _finish(self, sequence: Sequence, now_sec: float) -> RequestOutput:
        if sequence.slot is None:  # it was pre-empted while its last token was in flight
            self._waiting.remove(sequence)
        else:
            self._vacate(sequence)
        assert sequence.finish_reason is not None
        assert sequence.first_token_sec is not None
        return RequestOutput(
            request=sequence.request,
            token_ids=tuple(sequence.token_ids[len(sequence.request.prompt_token_ids) :]),
            finish_reason=sequence.finish_reason,
            arrival_sec=sequence.arrival_sec,
            first_token_sec=sequence.first_token_sec,
            finish_sec=now_sec,
            num_preemptions=sequence.num_preemptions,
        )
