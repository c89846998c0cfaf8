"""Which requests run in which lane, what each sweep does for them, and what its tokens mean.

Owns the queues, slots and pages of all unfinished requests. `plan_sweep` assumes that every row in
flight yields exactly one unknown token; `commit` learns the tokens one sweep later. What a sequence
leaves behind is handed out again at once: stages and jobs run in the order of their planning.
Refuses requests that can never fit. Called by the engine. Imports no jax.
"""

import bisect
import itertools
from collections import Counter, deque
from collections.abc import Iterable
from collections.abc import Sequence as AbstractSequence
from dataclasses import dataclass, field, replace

import numpy as np

from apex_jax.buckets import Buckets, fullest_chunk
from apex_jax.host_prefill import PromptGroup, choose_group
from apex_jax.lanes import LaneRoom
from apex_jax.modifiers import Modifiers, check_modifiers
from apex_jax.pages import num_pages_for
from apex_jax.plan import (
    CohortBatch,
    DecodeBatch,
    Direction,
    HeadBatch,
    HostPrefillBatch,
    Move,
    PrefillBatch,
    PromptTargets,
    Sampled,
    SweepPlan,
)
from apex_jax.policies import DeviceOnly, Load, Policy
from apex_jax.request import FinishReason, Request, RequestError, RequestOutput
from apex_jax.sequence import Lane, Sequence

MAX_PROMOTIONS = 2  # at once: a sequence on its way does not decode, and they travel one by one
# Sweeps without a token after which room on the device is kept for a host-lane request. A policy
# that merges gives every row its turn sooner; one that predicts may give it none.
PATIENCE_SWEEPS = 256
# Of a sweep's prompt tokens, what the host lane gets while the device lane prefills too.
HOST_PREFILL_SHARE = 4


@dataclass
class SchedulerStats:
    num_sweeps: int = 0
    num_preemptions: int = 0
    num_prefilled_tokens: int = 0
    num_host_prefilled_tokens: int = 0
    num_output_tokens: int = 0
    num_host_tokens: int = 0
    max_running: int = 0
    max_host_running: int = 0
    max_pages: int = 0
    max_host_pages: int = 0


@dataclass
class _Flight:
    """Who samples in a launched sweep, in the order of its heads, and where the attention was.

    scored: whose prompt's tokens get logprobs, and after which of them the chunk begins.
    """

    sampled: list[tuple[Sequence, Lane]] = field(default_factory=list)
    scored: list[tuple[Sequence, int]] = field(default_factory=list)


@dataclass
class _Moving:
    """A sequence between the lanes, and its pages where it goes."""

    sequence: Sequence
    direction: Direction
    pages: list[int]


class Scheduler:
    """Continuous batching over the pages of one or two lanes.

    num_host_pages, max_host_requests: where the policy has a host lane, for which `buckets` have
    shapes then.
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
    ):
        self._policy: Policy = DeviceOnly() if policy is None else policy
        has_host = self._policy.max_cohorts > 0
        if has_host != (buckets.host is not None) or has_host != (num_host_pages > 0):
            raise ValueError(f"{self._policy} with {num_host_pages} host pages, {buckets.host}")
        self.page_size = buckets.page_size
        self.stats = SchedulerStats()
        self._chunks, self._num_layers = buckets.chunks, num_layers
        self._max_chunk_tokens = max(tokens for _, tokens in buckets.chunks)
        self._vocab_size = vocab_size
        self._eos_token_ids = eos_token_ids
        self.num_slots = max_requests + max_host_requests

        def make_room(lane: Lane, lane_pages: int, lane_requests: int) -> LaneRoom:
            return LaneRoom(
                lane,
                num_pages=lane_pages,
                page_size=self.page_size,
                max_requests=lane_requests,
                max_model_len=max_model_len,
                num_slots=self.num_slots,
            )

        self._device = make_room(Lane.DEVICE, num_pages, max_requests)
        self._host, self._buckets = None, buckets.host
        if has_host:
            self._host = make_room(Lane.HOST, num_host_pages, max_host_requests)
        rooms = [self._device] if self._policy.uses_device_lane else []
        largest = max(room.num_tokens for room in [*rooms, *([self._host] if self._host else [])])
        self.max_model_len = min(max_model_len, largest)
        self._free_slots = list(range(self.num_slots - 1, -1, -1))
        self._num_unfinished = 0
        self._waiting: list[Sequence] = []  # by index, so that a pre-empted one goes on first
        self._kept_for: Sequence | None = (
            None  # a host-lane request that waited long for the device
        )
        self._group: PromptGroup | None = None
        self._cohorts: dict[int, list[Sequence]] = {}  # with a token under way
        self._moving: dict[int, _Moving] = {}
        self._flights: deque[_Flight] = deque()
        self._indices, self._sweep_ids = itertools.count(), itertools.count()
        self._move_ids = itertools.count()

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def num_unfinished(self) -> int:
        """Requests without a result."""
        return self._num_unfinished

    @property
    def is_idle(self) -> bool:
        """Whether nothing is left to plan or to carry to its end."""
        return not (self._waiting or any(room.sequences for room in self._rooms))

    @property
    def num_in_flight(self) -> int:
        """Sweeps planned and not committed."""
        return len(self._flights)

    @property
    def _rooms(self) -> list[LaneRoom]:
        return [self._device] if self._host is None else [self._device, self._host]

    def requests_by_group(self) -> dict[str, list[str]]:
        """Return the request ids in the device lane and in each cohort, for the timeline."""
        groups = {f"cohort {number}": rows for number, rows in self._cohorts.items()}
        groups["device"] = self._device.sequences
        return {name: [one.request.request_id for one in rows] for name, rows in groups.items()}

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
        if sampling.stop and request.is_last is None:
            raise RequestError("stop is given, and the request has no is_last to find it")
        stops = frozenset(sampling.stop_token_ids)
        stops = stops if sampling.ignore_eos else stops | self._eos_token_ids
        check_modifiers(sampling, stops, self._vocab_size)
        self._num_unfinished += 1
        self._waiting.append(
            Sequence(
                index=next(self._indices),
                request=request,
                stop_token_ids=stops,
                arrival_sec=now_sec,
                token_ids=list(prompt),
                modifiers=Modifiers.of(sampling, prompt, stops),
            )
        )

    def cancel(self, request_id: str) -> bool:
        """Drop a request without a result; False where there is none of that name."""
        live = itertools.chain(self._waiting, *(room.sequences for room in self._rooms))
        for sequence in live:
            if sequence.request.request_id == request_id and sequence.finish_reason is None:
                sequence.finish_reason = FinishReason.CANCELLED
                self._num_unfinished -= 1
                self._vacate_if_over(sequence)
                return True
        return False

    # The verbs of the engine's loop

    def plan_sweep(self) -> SweepPlan | None:
        """Decide the next sweep, or None where nothing can run before the next commit."""
        dropped = self._drop_cohorts()
        moves: list[Move] = []
        decoding = self._grow_device_rows(moves)
        self._promote(moves)
        prefilling, chunk_tokens = self._choose_prefilling()
        flight = _Flight()
        prefill, prefill_head = self._plan_prefill(prefilling, chunk_tokens, flight)
        cohorts = self._form_cohorts(decoding, prefill)
        self._admit_to_host()
        host_prefill = self._plan_host_prefill(prefill, flight)
        decode, decode_head = self._plan_decode(decoding, flight)
        has_work = prefill or host_prefill or decode or self._cohorts or self._moving or dropped
        if not has_work:
            return None
        self._flights.append(flight)
        self._count()
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
        for cohort_id in sampled_cohorts:
            for sequence in self._cohorts.pop(cohort_id):
                sequence.cohort_id = None
                sequence.num_unread += 1
                self._flights[-1].sampled.append((sequence, Lane.HOST))
                self._vacate_if_over(sequence)
        for move_id in finished_moves:
            self._end_move(self._moving.pop(move_id))

    def commit(self, sampled: Sampled, now_sec: float) -> list[RequestOutput]:
        """Take what the oldest planned sweep sampled, in its heads' order; return who finished."""
        flight = self._flights.popleft()
        outputs: list[RequestOutput] = []
        if sampled.prompts:  # a backend that only predicts has none
            for (sequence, start), of_chunk in zip(flight.scored, sampled.prompts, strict=True):
                sequence.take_prompt(start, of_chunk)
        tokens: list[int] = sampled.tokens_b.tolist()
        logprobs = sampled.logprobs or (None,) * len(tokens)
        for (sequence, lane), token, of_token in zip(flight.sampled, tokens, logprobs, strict=True):
            sequence.num_unread -= 1
            if sequence.finish_reason is not None:
                continue  # the surplus token of a sweep planned before the stop token was read
            sequence.append(token, now_sec, of_token)
            self.stats.num_output_tokens += 1
            if lane is Lane.HOST:
                sequence.num_host_tokens += 1
                self.stats.num_host_tokens += 1
            if sequence.finish_reason is not None:
                outputs.append(sequence.output())
                self._num_unfinished -= 1
                self._vacate_if_over(sequence)
        return outputs

    def describe(self) -> str:
        """Return the state of queues and pools in a line, for error messages."""
        rooms = ", ".join(
            f"{len(room.sequences)} in the {room.lane} lane ({room.pool.num_free} of "
            f"{room.pool.num_pages} pages free)"
            for room in self._rooms
        )
        return (
            f"{rooms}, {len(self._waiting)} waiting, {len(self._cohorts)} cohorts and "
            f"{len(self._moving)} moves under way, {len(self._flights)} sweeps in flight, "
            f"{len(self._free_slots)} of {self.num_slots} slots free"
        )

    def check_ledger(self) -> None:
        """Raise RuntimeError unless pages and slots in use are exactly the live sequences'."""
        for room in self._rooms:
            pages = room.pages_of(room.sequences)
            for moving in self._moving.values():
                if (moving.direction is Direction.PROMOTION) == (room.lane is Lane.DEVICE):
                    pages += Counter(moving.pages)
            if pages != room.pool.references():
                raise RuntimeError(
                    f"{room.lane} pages in use {room.pool.references()}, accounted for {pages}"
                )
        live = itertools.chain(*(room.sequences for room in self._rooms))
        slots = [sequence.slot for sequence in live if sequence.slot is not None]
        if sorted(slots + self._free_slots) != list(range(self.num_slots)):
            raise RuntimeError(f"slots in use {sorted(slots)}, free {sorted(self._free_slots)}")

    # Device rows

    def _grow_device_rows(self, moves: list[Move]) -> list[Sequence]:
        """Return the sequences that decode on the device, each with a page for its next token."""
        ready: list[Sequence] = []
        for sequence in list(self._device.sequences):  # oldest first
            if not sequence.is_ready:
                continue
            if self._device.needs_page(sequence):
                self._make_room(sequence, moves)
                # It may have been driven out itself, or wait for the page of one who leaves.
                if sequence.lane is not Lane.DEVICE or sequence.is_moving:
                    continue
                if not self._device.grow(sequence):
                    continue
            ready.append(sequence)
        return ready

    def _make_room(self, sequence: Sequence, moves: list[Move]) -> None:
        """Drive the newest from the device until a page is free, or will be when one has left."""
        room = self._device
        while room.pool.num_free == 0 and sequence.lane is Lane.DEVICE:
            # Who arrives meanwhile is the newest, but not here yet.
            is_arriving = any(one.direction is Direction.PROMOTION for one in self._moving.values())
            if is_arriving or any(one.is_fully_planned or one.is_moving for one in room.sequences):
                return
            newest = room.sequences[-1]
            if self._can_demote(newest):
                moves.append(self._start_move(newest, Direction.DEMOTION))
            else:
                self._preempt(newest)

    def _can_demote(self, sequence: Sequence) -> bool:
        host = self._host
        if host is None or not sequence.is_ready:
            return False
        return host.has_row() and host.has_pages(sequence)

    def _choose_prefilling(self) -> tuple[list[Sequence], int]:
        """Return the sequences whose prompt goes on in this sweep, and the chunk length."""
        max_rows = max(rows for rows, _ in self._chunks)
        candidates = [one for one in self._device.sequences if one.num_unfilled][:max_rows]
        admissible: list[Sequence] = []
        for sequence in self._waiting if self._policy.uses_device_lane else ():
            if len(candidates) + len(admissible) == max_rows or sequence.num_unread:
                break
            if not self._device.has_row(admissible):
                break
            if not self._device.has_pages(sequence, admissible):
                break
            if self._kept_for is not None and sequence.index > self._kept_for.index:
                break
            admissible.append(sequence)
        candidates = sorted(candidates + admissible, key=lambda one: one.index)
        if not candidates:
            return [], 0
        rows, tokens = fullest_chunk(self._chunks, [one.num_unfilled for one in candidates])
        chosen = candidates[:rows]
        for sequence in chosen:
            if sequence.lane is None:
                self._admit(sequence, self._device)
        return chosen, tokens

    def _plan_prefill(
        self, sequences: list[Sequence], chunk_tokens: int, flight: _Flight
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
            if sequence.num_unfilled == 0:
                sequence.is_decoding = True
                finishing.append(row)
        self.stats.num_prefilled_tokens += sum(lengths)
        longest = max(start + length for start, length in zip(starts, lengths, strict=True))
        batch = PrefillBatch(
            token_ids_bt,
            np.array(starts, np.int32),
            np.array(lengths, np.int32),
            self._device.rows(sequences, longest),
        )
        targets = _targets(batch, sequences, flight)
        finished = [sequences[row] for row in finishing]
        return batch, self._plan_head(finishing, finished, flight, targets)

    def _plan_decode(
        self, sequences: list[Sequence], flight: _Flight
    ) -> tuple[DecodeBatch | None, HeadBatch | None]:
        if not sequences:
            return None, None
        batch = self._take_step(sequences, self._device)
        return batch, self._plan_head(range(len(sequences)), sequences, flight)

    def _take_step(self, sequences: list[Sequence], room: LaneRoom) -> DecodeBatch:
        """Plan one more token of each sequence."""
        slots_b = np.array([sequence.slot for sequence in sequences], np.int32)
        positions_b = np.array([sequence.num_computed for sequence in sequences], np.int32)
        table_bm = room.rows(sequences, int(positions_b.max()) + 1)
        for sequence in sequences:
            sequence.num_computed += 1
            sequence.last_step = self.stats.num_sweeps
        return DecodeBatch(slots_b, positions_b, table_bm)

    def _plan_head(
        self,
        rows: AbstractSequence[int],
        sequences: list[Sequence],
        flight: _Flight,
        prompt: PromptTargets | None = None,
    ) -> HeadBatch | None:
        """Return how rows of a batch sample in this very sweep; None where nothing is wanted."""
        if not sequences and prompt is None:
            return None
        head = _head(rows, sequences)
        if prompt is not None:
            head = replace(head, prompt=prompt)
        for sequence in sequences:
            sequence.num_unread += 1
            flight.sampled.append((sequence, Lane.DEVICE))
        return head

    # Host rows

    def _admit_to_host(self) -> None:
        """Begin the prompts of those who wait for memory of the device, if the host has room."""
        host, shapes = self._host, self._buckets
        if host is None or shapes is None or self._group is not None:
            return
        candidates: list[Sequence] = []
        num_staging_pages = 0
        limit = self._policy.max_host_rows
        for sequence in self._waiting:
            is_enough = limit is not None and len(host.sequences) + len(candidates) >= limit
            if is_enough and self._device.can_ever_hold(sequence):
                break
            num_staging_pages += num_pages_for(sequence.num_tokens, self.page_size)
            if sequence.num_unread or num_staging_pages > shapes.num_staging_pages:
                break
            if not host.has_row(candidates) or not host.has_pages(sequence, candidates):
                break
            # Only memory sends to the host: who waits for a row of the device goes on waiting.
            if self._policy.uses_device_lane and self._device.has_pages(sequence):
                break
            candidates.append(sequence)
        if not candidates:
            return
        remaining = [sequence.num_tokens for sequence in candidates]
        count, chunk_tokens = choose_group(self._chunks, remaining)
        for sequence in candidates[:count]:
            self._admit(sequence, host)
        self._group = PromptGroup(
            candidates[:count], chunk_tokens, self._num_layers, self.page_size
        )

    def _plan_host_prefill(
        self, prefill: PrefillBatch | None, flight: _Flight
    ) -> HostPrefillBatch | None:
        """Plan as much of the group's prompts as the device's own leave of the sweep."""
        group = self._group
        if group is None:
            return None
        if prefill is not None and self._policy.device_prompts_first:
            return None
        num_taken = prefill.token_ids_bt.size if prefill is not None else 0
        share = self._max_chunk_tokens // HOST_PREFILL_SHARE
        num_tokens = max(self._max_chunk_tokens - num_taken, share)
        units = group.take(num_tokens * self._num_layers)
        if not group.is_complete:
            return group.batch(units, ())
        for sequence in group.sequences:
            self.stats.num_host_prefilled_tokens += len(sequence.token_ids)
            sequence.num_computed = len(sequence.token_ids)
            sequence.last_step = self.stats.num_sweeps
            sequence.is_decoding = True
        self._group = None
        sequences = list(group.sequences)
        heads: list[tuple[int, HeadBatch]] = []
        for index, chunk in enumerate(group.chunks):
            is_last = index == len(group.chunks) - 1
            sampling = sequences if is_last else []
            targets = _targets(chunk, sequences, flight)
            head = self._plan_head(range(len(sampling)), sampling, flight, targets)
            if head is not None:
                heads.append((index, head))
        for sequence in sequences:
            self._vacate_if_over(sequence)  # it was cancelled on its way
        return group.batch(units, tuple(heads))

    def _form_cohorts(
        self, decoding: list[Sequence], prefill: PrefillBatch | None
    ) -> tuple[CohortBatch, ...]:
        """Let idle cohorts begin a token, with the rows that the policy gives them."""
        host, policy = self._host, self._policy
        if host is None:
            return ()
        idle = [one for one in range(policy.max_cohorts) if one not in self._cohorts]
        rows = self._grow_host_rows(host) if idle else []
        load = self._load(decoding, prefill, rows, idle)
        policy.consider(load)
        batches: list[CohortBatch] = []
        for cohort_id, indices in policy.form(load).items() if rows else ():
            cohort = [rows[index] for index in indices]
            head = _head(range(len(cohort)), cohort)
            batches.append(CohortBatch(cohort_id, self._take_step(cohort, host), head))
            for sequence in cohort:
                sequence.cohort_id = cohort_id
            self._cohorts[cohort_id] = cohort
        return tuple(batches)

    def _load(
        self,
        decoding: list[Sequence],
        prefill: PrefillBatch | None,
        rows: list[Sequence],
        idle: list[int],
    ) -> Load:
        """Describe the sweep that is being planned; rows: host rows without a token under way."""
        assert self._host is not None
        assert self._buckets is not None
        settled = self._device.sequences
        under_way = list(itertools.chain.from_iterable(self._cohorts.values()))
        return Load(
            num_rows=len(decoding),
            num_tokens=sum(sequence.num_tokens for sequence in decoding),
            num_prompt_tokens=prefill.token_ids_bt.size if prefill is not None else 0,
            num_settled_rows=len(settled),
            num_settled_tokens=sum(sequence.num_tokens for sequence in settled),
            num_waiting=len(self._waiting),
            num_homing=self._count_homing(),
            num_homeless=sum(not self._device.can_ever_hold(one) for one in self._host.sequences),
            lengths=[sequence.num_tokens for sequence in rows],
            num_under_way=len(under_way),
            num_tokens_under_way=sum(sequence.num_tokens for sequence in under_way),
            idle_cohorts=idle,
            max_rows=self._buckets.cohort_rows[-1],
        )

    def _grow_host_rows(self, host: LaneRoom) -> list[Sequence]:
        """Return the host-lane sequences between two tokens that have a page for the next."""
        while True:
            waiting = [sequence for sequence in host.sequences if sequence.is_ready]
            ready = [sequence for sequence in waiting if host.grow(sequence)]
            is_anyone_leaving = self._cohorts or any(
                one.is_fully_planned or one.is_moving or one.num_unfilled for one in host.sequences
            )
            if ready or not waiting or is_anyone_leaving:
                return ready
            self._preempt(waiting[-1])

    def _drop_cohorts(self) -> tuple[int, ...]:
        """Forget the tokens under way of cohorts all of whose sequences have ended."""
        dropped = [
            cohort_id
            for cohort_id, sequences in self._cohorts.items()
            if all(one.finish_reason is not None for one in sequences)
        ]
        for cohort_id in dropped:
            for sequence in self._cohorts.pop(cohort_id):
                sequence.cohort_id = None
                self._vacate_if_over(sequence)
        return tuple(dropped)

    # Movement

    def _promote(self, moves: list[Move]) -> None:
        """Let the oldest between two tokens on the host go where the device has room.

        For one that has waited long, room is kept from younger requests.
        """
        self._kept_for = None
        if self._host is None or not self._policy.uses_device_lane:
            return
        directions = Counter(moving.direction for moving in self._moving.values())
        num_left = MAX_PROMOTIONS - directions[Direction.PROMOTION]
        for sequence in list(self._host.sequences):
            if not sequence.is_ready or not self._device.can_ever_hold(sequence):
                continue
            if num_left == 0 or not self._device.has_row() or not self._device.has_pages(sequence):
                if self.stats.num_sweeps - sequence.last_step > PATIENCE_SWEEPS:
                    self._kept_for = sequence
                break
            moves.append(self._start_move(sequence, Direction.PROMOTION))
            num_left -= 1

    def _count_homing(self) -> int:
        """Return for how many of the host's rows the device has room, where nobody else waits."""
        assert self._host is not None
        homing: list[Sequence] = []
        if self._waiting or not self._policy.uses_device_lane:
            return 0
        for sequence in self._host.sequences:
            if not self._device.has_row(homing) or not self._device.has_pages(sequence, homing):
                break
            homing.append(sequence)
        return len(homing)

    def _start_move(self, sequence: Sequence, direction: Direction) -> Move:
        assert self._host is not None
        is_promotion = direction is Direction.PROMOTION
        pages = (self._device if is_promotion else self._host).reserve(sequence)
        num_pages = num_pages_for(sequence.num_computed, self.page_size)
        source_i = np.array(sequence.pages[:num_pages], np.int32)
        target_i = np.array(pages[:num_pages], np.int32)
        move_id = next(self._move_ids)
        self._moving[move_id] = _Moving(sequence, direction, pages)
        sequence.is_moving = True
        device_i, host_i = (target_i, source_i) if is_promotion else (source_i, target_i)
        return Move(move_id, direction, device_i, host_i)

    def _end_move(self, moving: _Moving) -> None:
        assert self._host is not None
        source, target = self._host, self._device
        if moving.direction is Direction.DEMOTION:
            source, target = target, source
        sequence = moving.sequence
        sequence.is_moving = False
        if sequence.finish_reason is not None:
            target.forget(moving.pages)
            self._vacate_if_over(sequence)
        else:
            source.leave(sequence)
            target.arrive(sequence, moving.pages)

    def _admit(self, sequence: Sequence, room: LaneRoom) -> None:
        self._waiting.remove(sequence)
        sequence.slot = self._free_slots.pop()
        room.enter(sequence)

    def _preempt(self, sequence: Sequence) -> None:
        """Send a running sequence back to wait; its KV is recomputed later."""
        self._vacate(sequence)
        sequence.is_decoding, sequence.num_computed = False, 0
        sequence.num_preemptions += 1
        self.stats.num_preemptions += 1
        bisect.insort(self._waiting, sequence, key=lambda one: one.index)

    def _vacate_if_over(self, sequence: Sequence) -> None:
        """Take what an ended sequence has, unless something of it is still under way."""
        is_in_group = self._group is not None and sequence in self._group.sequences
        is_under_way = sequence.cohort_id is not None or sequence.is_moving or is_in_group
        if sequence.finish_reason is None or is_under_way:
            return
        if sequence.lane is None:  # it was pre-empted while its last token was in flight
            self._waiting.remove(sequence)
        else:
            self._vacate(sequence)

    def _vacate(self, sequence: Sequence) -> None:
        """Take pages and slot from a sequence."""
        assert sequence.slot is not None
        room = self._device if sequence.lane is Lane.DEVICE else self._host
        assert room is not None
        room.leave(sequence)
        self._free_slots.append(sequence.slot)
        sequence.slot = None

    def _count(self) -> None:
        stats = self.stats
        stats.num_sweeps += 1
        stats.max_running = max(stats.max_running, len(self._device.sequences))
        stats.max_pages = max(stats.max_pages, self._device.num_used)
        if self._host is not None:
            stats.max_host_running = max(stats.max_host_running, len(self._host.sequences))
            stats.max_host_pages = max(stats.max_host_pages, self._host.num_used)


def _targets(
    chunk: PrefillBatch, sequences: list[Sequence], flight: _Flight
) -> PromptTargets | None:
    """Return what follows the tokens of a chunk, where a sequence wants to know how likely."""
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
            flight.scored.append((sequence, start))
    if not rows:
        return None
    return PromptTargets(next_ids_bt, np.array(rows, np.int32), np.array(lengths, np.int32))


def _head(rows: AbstractSequence[int], sequences: list[Sequence]) -> HeadBatch:
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
