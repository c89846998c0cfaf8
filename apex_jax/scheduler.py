"""What each sweep does for which requests, and what its tokens mean.

Owns the verbs of the engine's loop and the device's rows. `plan_sweep` assumes that every row in
flight yields exactly one unknown token; `commit` learns the tokens one sweep later. What a sequence
leaves behind is handed out again at once: stages and jobs run in the order of their planning.
Refuses requests that can never fit. Called by the engine. Imports no jax.
"""

import itertools
from collections import deque
from collections.abc import Iterable

import numpy as np

from apex_jax.buckets import Buckets, fullest_chunk
from apex_jax.decode_rows import RowSet
from apex_jax.flight import Flight
from apex_jax.host_rows import HostRows
from apex_jax.lanes import LaneRoom
from apex_jax.modifiers import Modifiers, check_modifiers
from apex_jax.movement import Movement
from apex_jax.plan import DecodeBatch, HeadBatch, Move, PrefillBatch, Sampled, SweepPlan
from apex_jax.policies import DeviceOnly, Policy
from apex_jax.request import FinishReason, Request, RequestError, RequestOutput
from apex_jax.residency import Residency, SchedulerStats
from apex_jax.sequence import Lane, Sequence
from apex_jax.slot_table import SlotTable

# Requests that wait for what another one is computing, before nobody behind them is looked at.
MAX_PASSED_OVER = 32


class Scheduler:
    """Continuous batching over the pages of one or two lanes.

    num_host_pages, max_host_requests: where the policy has a host lane, for which `buckets` have
    shapes then. reuses_prefixes: prompts that begin alike share pages, and are computed once.
    """

    def __init__(
        self,
        *,
        buckets: Buckets,
        num_layers: int,
        num_pages: int,
        max_requests: int,
        max_model_len: int,
        vocab_size: int,
        eos_token_ids: frozenset[int],
        policy: Policy | None = None,
        num_host_pages: int = 0,
        max_host_requests: int = 0,
        reuses_prefixes: bool = False,
    ):
        self._policy: Policy = DeviceOnly() if policy is None else policy
        has_host = self._policy.max_cohorts > 0
        if has_host != (buckets.host is not None) or has_host != (num_host_pages > 0):
            raise ValueError(f"{self._policy} with {num_host_pages} host pages, {buckets.host}")
        self.page_size, self.reuses_prefixes = buckets.page_size, reuses_prefixes
        self._chunks = buckets.chunks
        self._vocab_size = vocab_size
        self._eos_token_ids = eos_token_ids
        self.num_slots = max_requests + max_host_requests
        table = SlotTable(self.num_slots, max_model_len)

        def make_room(lane: Lane, lane_pages: int, lane_requests: int) -> LaneRoom:
            return LaneRoom(
                lane,
                num_pages=lane_pages,
                page_size=self.page_size,
                max_requests=lane_requests,
                max_model_len=max_model_len,
                table=table,
                reuses_prefixes=reuses_prefixes,
            )

        device = make_room(Lane.DEVICE, num_pages, max_requests)
        host = make_room(Lane.HOST, num_host_pages, max_host_requests) if has_host else None
        self._residency = Residency(device, host, table)
        self._movement = Movement(self._residency, self._policy, self.page_size)
        self._host_rows: HostRows | None = None
        if host is not None and buckets.host is not None:
            self._host_rows = HostRows(
                host,
                buckets.host,
                self._residency,
                self._movement,
                self._policy,
                buckets.chunks,
                num_layers,
            )
        rooms = self._residency.rooms if self._policy.uses_device_lane else [host or device]
        self.max_model_len = min(max_model_len, max(room.num_tokens for room in rooms))
        self._num_unfinished = 0
        self._flights: deque[Flight] = deque()
        self._indices, self._sweep_ids = itertools.count(), itertools.count()

    @property
    def stats(self) -> SchedulerStats:
        return self._residency.stats

    @property
    def num_waiting(self) -> int:
        return len(self._residency.waiting)

    @property
    def num_unfinished(self) -> int:
        """Requests without a result."""
        return self._num_unfinished

    @property
    def is_idle(self) -> bool:
        """Whether nothing is left to plan or to carry to its end."""
        return self._residency.is_empty

    @property
    def num_in_flight(self) -> int:
        """Sweeps planned and not committed."""
        return len(self._flights)

    def requests_by_group(self) -> dict[str, list[str]]:
        """Return the request ids in the device lane and in each cohort, for the timeline."""
        groups = {f"cohort {number}": rows.sequences for number, rows in self._cohorts.items()}
        groups["device"] = self._residency.device.sequences
        return {name: [one.request.request_id for one in rows] for name, rows in groups.items()}

    @property
    def _cohorts(self) -> dict[int, RowSet]:
        return {} if self._host_rows is None else self._host_rows.cohorts

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
        if sampling.n > 1:
            raise RequestError(f"n is {sampling.n}: the engine takes one request for each output")
        if sampling.stop and request.is_last is None:
            raise RequestError("stop is given, and the request has no is_last to find it")
        stops = frozenset(sampling.stop_token_ids)
        stops = stops if sampling.ignore_eos else stops | self._eos_token_ids
        check_modifiers(sampling, stops, self._vocab_size)
        self._num_unfinished += 1
        self._residency.waiting.append(
            Sequence(
                index=next(self._indices),
                request=request,
                stop_token_ids=stops,
                arrival_sec=now_sec,
                modifiers=Modifiers.of(sampling, prompt, stops),
            )
        )

    def cancel(self, request_id: str) -> bool:
        """Drop a request without a result; False where there is none of that name."""
        for sequence in self._residency:
            if sequence.request.request_id == request_id and sequence.finish_reason is None:
                sequence.finish(FinishReason.CANCELLED)
                self._num_unfinished -= 1
                self._residency.vacate_if_over(sequence)
                return True
        return False

    # The verbs of the engine's loop

    def plan_sweep(self) -> SweepPlan | None:
        """Decide the next sweep, or None where nothing can run before the next commit."""
        host = self._host_rows
        dropped = host.drop_cohorts() if host else ()
        moves: list[Move] = []
        decoding = self._grow_rows(moves)
        moves += self._movement.promote()
        prefilling, chunk_tokens = self._choose_prefilling()
        flight = Flight(self._residency.table)
        prefill, prefill_head = self._plan_prefill(prefilling, chunk_tokens, flight)
        cohorts, host_prefill = (), None
        if host is not None:
            cohorts = host.form_cohorts(decoding, prefill)
            host.admit()
            host_prefill = host.plan_prefill(prefill, flight)
        decode, decode_head = self._plan_decode(decoding, flight)
        is_under_way = self._cohorts or len(self._movement)
        if not (prefill or host_prefill or decode or is_under_way or dropped):
            return None
        self._flights.append(flight)
        self._residency.count_sweep()
        return SweepPlan(
            next(self._sweep_ids),
            prefill=prefill,
            prefill_head=prefill_head,
            decode=decode,
            decode_head=decode_head,
            cohorts=cohorts,
            dropped_cohorts=dropped,
            host_prefill=host_prefill,
            moves=tuple(moves),
        )

    def launched(self, sampled_cohorts: Iterable[int], finished_moves: Iterable[int]) -> None:
        """Learn how far cohorts and moves came in the sweep planned last, before the next plan."""
        if self._host_rows is not None:
            self._host_rows.end_tokens(sampled_cohorts, self._flights[-1])
        for move_id in finished_moves:
            self._movement.end(move_id)

    def commit(self, sampled: Sampled, now_sec: float) -> list[RequestOutput]:
        """Take what the oldest planned sweep sampled, in its heads' order; return who finished."""
        flight = self._flights.popleft()
        outputs: list[RequestOutput] = []
        if sampled.prompts:  # a backend that only predicts has none
            for (sequence, start), of_chunk in zip(flight.scored, sampled.prompts, strict=True):
                sequence.take_prompt(start, of_chunk)
        first = 0
        for rows in flight.sampled:
            part = slice(first, first + len(rows.places_b))
            first = part.stop
            num_read, ended = rows.read(
                flight.table, sampled.tokens_b[part], sampled.logprobs[part], now_sec
            )
            self.stats.num_output_tokens += num_read
            if rows.lane is Lane.HOST:
                self.stats.num_host_tokens += num_read
            for sequence in ended:
                outputs.append(sequence.output())
                self._num_unfinished -= 1
                self._residency.vacate_if_over(sequence)
        assert first == len(sampled.tokens_b)
        return outputs

    def describe(self) -> str:
        """Return the state of queues and pools in a line, for error messages."""
        return (
            f"{self._residency.describe()}, {len(self._cohorts)} cohorts and "
            f"{len(self._movement)} moves under way, {len(self._flights)} sweeps in flight"
        )

    def check_ledger(self) -> None:
        """Raise RuntimeError unless pages and slots in use are exactly the live sequences'."""
        self._residency.check_ledger(self._movement.reserved_pages())

    # Device rows

    def _grow_rows(self, moves: list[Move]) -> RowSet:
        """Return the rows that decode on the device, each with a page for its next token."""
        device = self._residency.device
        for sequence in device.grow_rows():  # oldest first
            if not sequence.is_ready:
                continue  # it was driven out meanwhile
            moves += self._movement.make_room(sequence)
            if sequence.lane is not Lane.DEVICE or sequence.is_moving:
                continue  # it has been driven out itself
            if not device.grow(sequence):
                break  # it and those behind it wait for the pages of one who leaves
        return device.rows_with_page()

    def _choose_prefilling(self) -> tuple[list[Sequence], int]:
        """Return the sequences whose prompt goes on in this sweep, and the chunk length."""
        max_rows = max(rows for rows, _ in self._chunks)
        device, kept_for = self._residency.device, self._movement.kept_for
        candidates = device.filling[:max_rows]
        admissible: list[Sequence] = []
        num_passed_over = 0
        for sequence in self._residency.waiting if self._policy.uses_device_lane else ():
            if len(candidates) + len(admissible) == max_rows or sequence.num_unread:
                break
            if not device.has_row(admissible):
                break
            if device.is_coming(sequence, [*candidates, *admissible]):
                num_passed_over += 1
                if num_passed_over == MAX_PASSED_OVER:
                    break
                continue
            if not device.has_pages(sequence, admissible):
                break
            if kept_for is not None and sequence.index > kept_for.index:
                break
            admissible.append(sequence)
        candidates = sorted(candidates + admissible, key=lambda one: one.index)
        if not candidates:
            return [], 0
        rows, tokens = fullest_chunk(self._chunks, [device.num_unfilled(one) for one in candidates])
        chosen = candidates[:rows]
        for sequence in chosen:
            if sequence.lane is None:
                self._residency.admit(sequence, device)
        return chosen, tokens

    def _plan_prefill(
        self, sequences: list[Sequence], chunk_tokens: int, flight: Flight
    ) -> tuple[PrefillBatch | None, HeadBatch | None]:
        if not sequences:
            return None, None
        token_ids_bt = np.zeros((len(sequences), chunk_tokens), np.int32)
        starts = [sequence.num_computed for sequence in sequences]
        lengths = [min(sequence.num_unfilled, chunk_tokens) for sequence in sequences]
        finishing: list[int] = []
        for row, (sequence, start, length) in enumerate(
            zip(sequences, starts, lengths, strict=True)
        ):
            token_ids_bt[row, :length] = sequence.token_ids[start : start + length]
            sequence.num_computed += length
            self._residency.device.note_computed(sequence)
            if sequence.num_unfilled == 0:
                self._residency.device.end_filling(sequence)
                finishing.append(row)
        self.stats.num_prefilled_tokens += sum(lengths)
        longest = max(start + length for start, length in zip(starts, lengths, strict=True))
        batch = PrefillBatch(
            token_ids_bt,
            np.array(starts, np.int32),
            np.array(lengths, np.int32),
            self._residency.device.rows(sequences, longest),
        )
        targets = flight.add_targets(batch, sequences)
        finished = [sequences[row] for row in finishing]
        rows = RowSet.of(flight.table, finished)
        head = flight.add_head(np.array(finishing, np.int32), rows, targets)
        for sequence in finished:
            self._residency.device.decoding.update(sequence)
        return batch, head

    def _plan_decode(
        self, rows: RowSet, flight: Flight
    ) -> tuple[DecodeBatch | None, HeadBatch | None]:
        if not len(rows):
            return None, None
        device, table = self._residency.device, flight.table
        batch = device.take_step(rows, self.stats.num_sweeps)
        head = flight.add_head(np.arange(len(rows), dtype=np.int32), rows)
        is_full_b = table.num_tokens_s[rows.slots_b] >= table.max_num_tokens_s[rows.slots_b]
        if np.count_nonzero(is_full_b):
            device.decoding.discard(rows.slots_b[is_full_b])
        return batch, head
