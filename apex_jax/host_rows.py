"""The host lane's side of a sweep: prompts on their way there, and cohorts that begin a token.

Owns the group of prompts under way and who is in which cohort. The policy says who rides. Called by
the scheduler. Imports no jax.
"""

import itertools
from collections.abc import Iterable, Iterator

from apex_jax.buckets import HostBuckets
from apex_jax.flight import Flight, head_of
from apex_jax.host_prefill import PromptGroup, choose_group
from apex_jax.lanes import LaneRoom
from apex_jax.movement import Movement
from apex_jax.pages import num_pages_for
from apex_jax.plan import CohortBatch, HeadBatch, HostPrefillBatch, PrefillBatch
from apex_jax.policies import Load, Policy, Waiting
from apex_jax.residency import Residency
from apex_jax.sequence import Sequence

# Of a sweep's prompt tokens, what the host lane gets while the device lane prefills too.
HOST_PREFILL_SHARE = 4
NUM_SEEN_WAITING = 16  # of those who wait, who stand for the rest: there may be thousands


class HostRows:
    """Sequences of the host lane, as planning sees them.

    chunks: (rows, tokens) of prompts, of which a sweep has at most one with the most tokens.
    cohorts: with a token under way, by id.
    """

    def __init__(
        self,
        room: LaneRoom,
        shapes: HostBuckets,
        residency: Residency,
        movement: Movement,
        policy: Policy,
        chunks: tuple[tuple[int, int], ...],
        num_layers: int,
    ):
        self._room, self._shapes, self._residency = room, shapes, residency
        self._movement, self._policy = movement, policy
        self._chunks, self._num_layers = chunks, num_layers
        self._max_chunk_tokens = max(tokens for _, tokens in chunks)
        self._group: PromptGroup | None = None
        self.cohorts: dict[int, list[Sequence]] = {}

    def admit(self) -> None:
        """Begin the prompts of those who wait for memory of the device, if the host has room."""
        if self._group is not None:
            return
        candidates = list(self._candidates())
        if not candidates:
            return
        remaining = [sequence.num_tokens for sequence in candidates]
        count, chunk_tokens = choose_group(self._chunks, remaining)
        for sequence in candidates[:count]:
            self._residency.admit(sequence, self._room)
            sequence.is_in_group = True
        self._group = PromptGroup(
            candidates[:count], chunk_tokens, self._num_layers, self._room.page_size
        )

    def _candidates(self) -> Iterator[Sequence]:
        room, device, limit = self._room, self._residency.device, self._policy.max_host_rows
        ahead: list[Sequence] = []
        num_staging_pages = 0
        for sequence in self._residency.waiting:
            is_enough = limit is not None and len(room.sequences) + len(ahead) >= limit
            if is_enough and device.can_ever_hold(sequence):
                return
            num_staging_pages += num_pages_for(sequence.num_tokens, room.page_size)
            if sequence.num_unread or num_staging_pages > self._shapes.num_staging_pages:
                return
            if not room.has_row(ahead) or not room.has_pages(sequence, ahead):
                return
            # Only memory sends to the host: who waits for a row of the device goes on waiting.
            if self._policy.uses_device_lane and device.has_pages(sequence):
                return
            ahead.append(sequence)
            yield sequence

    def plan_prefill(self, prefill: PrefillBatch | None, flight: Flight) -> HostPrefillBatch | None:
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
        self._group = None
        stats = self._residency.stats
        for sequence in group.sequences:
            stats.num_host_prefilled_tokens += len(sequence.token_ids)
            sequence.num_computed = len(sequence.token_ids)
            sequence.last_step = stats.num_sweeps
            sequence.is_decoding, sequence.is_in_group = True, False
        heads: list[tuple[int, HeadBatch]] = []
        for index, chunk in enumerate(group.chunks):
            sampling = group.sequences if chunk is group.chunks[-1] else ()
            targets = flight.add_targets(chunk, group.sequences)
            head = flight.add_head(range(len(sampling)), sampling, targets)
            if head is not None:
                heads.append((index, head))
        for sequence in group.sequences:
            self._residency.vacate_if_over(sequence)  # it was cancelled on its way
        return group.batch(units, tuple(heads))

    def form_cohorts(
        self, decoding: list[Sequence], prefill: PrefillBatch | None
    ) -> tuple[CohortBatch, ...]:
        """Let idle cohorts begin a token, with the rows that the policy gives them.

        decoding, prefill: the device's rows and prompts in this sweep.
        """
        policy = self._policy
        idle = [one for one in range(policy.max_cohorts) if one not in self.cohorts]
        rows = self._grow() if idle else []
        load = self._load(decoding, prefill, rows, idle)
        policy.consider(load)
        batches: list[CohortBatch] = []
        for cohort_id, indices in policy.form(load).items() if rows else ():
            cohort = [rows[index] for index in indices]
            head = head_of(range(len(cohort)), cohort)
            decode = self._room.take_step(cohort, self._residency.stats.num_sweeps)
            batches.append(CohortBatch(cohort_id, decode, head))
            for sequence in cohort:
                sequence.cohort_id = cohort_id
            self.cohorts[cohort_id] = cohort
        return tuple(batches)

    def end_tokens(self, cohort_ids: Iterable[int], flight: Flight) -> None:
        """Learn that cohorts sampled in the sweep planned last."""
        for cohort_id in cohort_ids:
            cohort = self.cohorts.pop(cohort_id)
            flight.add_cohort(cohort)
            self._leave_cohort(cohort)

    def drop_cohorts(self) -> tuple[int, ...]:
        """Forget the tokens under way of cohorts all of whose sequences have ended.

        Of all cohorts where the policy says so; their rows then stand where they began.
        """
        dropped = [
            cohort_id
            for cohort_id, sequences in self.cohorts.items()
            if self._policy.drops_tokens or all(one.finish_reason is not None for one in sequences)
        ]
        for cohort_id in dropped:
            cohort = self.cohorts.pop(cohort_id)
            for sequence in cohort:
                sequence.num_computed -= 1
            self._leave_cohort(cohort)
        return tuple(dropped)

    def _leave_cohort(self, cohort: list[Sequence]) -> None:
        for sequence in cohort:
            sequence.cohort_id = None
            self._residency.vacate_if_over(sequence)

    def _grow(self) -> list[Sequence]:
        """Return the sequences between two tokens that have a page for the next."""
        room = self._room
        while True:
            waiting = [sequence for sequence in room.sequences if sequence.is_ready]
            ready = [sequence for sequence in waiting if room.grow(sequence)]
            is_anyone_leaving = self.cohorts or any(
                one.is_fully_planned or one.is_moving or one.num_unfilled for one in room.sequences
            )
            if ready or not waiting or is_anyone_leaving:
                return ready
            self._residency.preempt(waiting[-1])

    def _waiting(self) -> Waiting:
        """Describe who waits by those who come next."""
        waiting = self._residency.waiting
        first = waiting[:NUM_SEEN_WAITING]
        if not first:
            return Waiting()
        num_tokens = [sequence.num_tokens for sequence in first]
        count, chunk_tokens = choose_group(self._chunks, num_tokens)
        rows = next(rows for rows, _ in self._chunks if rows >= count) if count > 1 else 1
        return Waiting(
            len(waiting),
            sum(num_tokens) / len(first),
            sum(one.max_num_tokens for one in first) / len(first) - sum(num_tokens) / len(first),
            sum(chunk_tokens) * rows / count,
        )

    def _load(
        self,
        decoding: list[Sequence],
        prefill: PrefillBatch | None,
        rows: list[Sequence],
        idle: list[int],
    ) -> Load:
        """Describe the sweep that is being planned; rows: those without a token under way."""
        device = self._residency.device
        under_way = list(itertools.chain.from_iterable(self.cohorts.values()))
        return Load(
            num_rows=len(decoding),
            num_tokens=sum(sequence.num_tokens for sequence in decoding),
            num_prompt_tokens=prefill.token_ids_bt.size if prefill is not None else 0,
            num_settled_rows=len(device.sequences),
            num_settled_tokens=sum(sequence.num_tokens for sequence in device.sequences),
            waiting=self._waiting(),
            num_homing=self._movement.count_homing(),
            num_homeless=sum(not device.can_ever_hold(one) for one in self._room.sequences),
            lengths=[sequence.num_tokens for sequence in rows],
            num_under_way=len(under_way),
            num_tokens_under_way=sum(sequence.num_tokens for sequence in under_way),
            idle_cohorts=idle,
            max_rows=self._shapes.cohort_rows[-1],
        )
