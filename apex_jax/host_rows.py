"""The host lane's side of a sweep: prompts on their way there, and cohorts that begin a token.

Owns the group of prompts under way and who is in which cohort. The policy says who rides. Called by
the scheduler. Imports no jax.
"""

from collections.abc import Iterable, Iterator

import numpy as np

from apex_jax.buckets import HostBuckets
from apex_jax.decode_rows import RowSet
from apex_jax.flight import Flight
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
        self._nobody = RowSet.of(residency.table, ())
        self.cohorts: dict[int, RowSet] = {}

    def admit(self) -> None:
        """Begin the prompts of those who wait for memory of the device, if the host has room."""
        if self._group is not None:
            return
        candidates = list(self._candidates())
        if not candidates:
            return
        remaining = [self._room.num_unfilled(sequence) for sequence in candidates]
        count, chunk_tokens = choose_group(self._chunks, remaining)
        sequences: list[Sequence] = []
        for sequence in candidates[:count]:
            # Those before it may have taken pages that it would have shared.
            if sequences and self._room.num_unfilled(sequence) > chunk_tokens[0]:
                break
            self._residency.admit(sequence, self._room)
            sequence.is_in_group = True
            sequences.append(sequence)
        self._group = PromptGroup(sequences, chunk_tokens, self._num_layers, self._room.page_size)

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
            if room.is_coming(sequence, ahead):
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
            stats.num_host_prefilled_tokens += sequence.num_unfilled
            sequence.num_computed = sequence.num_read
            self._room.note_computed(sequence)
            sequence.last_step = stats.num_sweeps
            sequence.is_in_group = False
            self._room.end_filling(sequence)
        heads: list[tuple[int, HeadBatch]] = []
        for index, chunk in enumerate(group.chunks):
            sampling = group.sequences if chunk is group.chunks[-1] else ()
            targets = flight.add_targets(chunk, group.sequences)
            rows = RowSet.of(self._residency.table, sampling)
            head = flight.add_head(np.arange(len(rows), dtype=np.int32), rows, targets)
            if head is not None:
                heads.append((index, head))
        for sequence in group.sequences:
            self._room.decoding.update(sequence)
            self._residency.vacate_if_over(sequence)  # it was cancelled on its way
        return group.batch(units, tuple(heads))

    def form_cohorts(
        self, decoding: RowSet, prefill: PrefillBatch | None
    ) -> tuple[CohortBatch, ...]:
        """Let idle cohorts begin a token, with the rows that the policy gives them.

        decoding, prefill: the device's rows and prompts in this sweep.
        """
        policy, table = self._policy, self._residency.table
        idle = [one for one in range(policy.max_cohorts) if one not in self.cohorts]
        rows = self._grow() if idle else self._nobody
        load = self._load(decoding, prefill, rows, idle)
        policy.consider(load)
        batches: list[CohortBatch] = []
        for cohort_id, indices in policy.form(load).items() if len(rows) else ():
            cohort = rows.choose(table, np.array(indices, np.int64))
            head = cohort.head(table, np.arange(len(cohort), dtype=np.int32))
            decode = self._room.take_step(cohort, self._residency.stats.num_sweeps)
            batches.append(CohortBatch(cohort_id, decode, head))
            for sequence in cohort.sequences:
                sequence.cohort_id = cohort_id
            self._room.decoding.discard(cohort.slots_b)
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
            for cohort_id, rows in self.cohorts.items()
            if self._policy.drops_tokens
            or all(one.finish_reason is not None for one in rows.sequences)
        ]
        for cohort_id in dropped:
            cohort = self.cohorts.pop(cohort_id)
            for sequence in cohort.sequences:
                sequence.num_computed -= 1
            self._leave_cohort(cohort)
        return tuple(dropped)

    def _leave_cohort(self, cohort: RowSet) -> None:
        for sequence in cohort.sequences:
            sequence.cohort_id = None
            self._room.decoding.update(sequence)
            self._residency.vacate_if_over(sequence)

    def _grow(self) -> RowSet:
        """Return the rows between two tokens that have a page for the next."""
        room = self._room
        while True:
            lacking = room.grow_rows()
            ready = room.rows_with_page()
            if len(ready) or not lacking or self._is_anyone_leaving():
                return ready
            self._residency.preempt(lacking[-1])

    def _is_anyone_leaving(self) -> bool:
        """Whether pages become free, or rows ready, without anyone being pre-empted."""
        room = self._room
        return bool(self.cohorts or room.is_anyone_full or room.filling) or any(
            one.is_moving for one in room.sequences
        )

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
        decoding: RowSet,
        prefill: PrefillBatch | None,
        rows: RowSet,
        idle: list[int],
    ) -> Load:
        """Describe the sweep that is being planned; rows: those without a token under way."""
        device, num_tokens_s = self._residency.device, self._residency.table.num_tokens_s
        under_way = list(self.cohorts.values())
        return Load(
            num_rows=len(decoding),
            num_tokens=int(num_tokens_s[decoding.slots_b].sum()),
            num_prompt_tokens=prefill.token_ids_bt.size if prefill is not None else 0,
            num_settled_rows=len(device.sequences),
            num_settled_tokens=device.num_settled_tokens,
            waiting=self._waiting(),
            num_homing=self._movement.count_homing(),
            num_homeless=self._room.count_longer_than(device.num_tokens),
            lengths=num_tokens_s[rows.slots_b].tolist(),
            num_under_way=sum(map(len, under_way)),
            num_tokens_under_way=sum(int(num_tokens_s[one.slots_b].sum()) for one in under_way),
            idle_cohorts=idle,
            max_rows=self._shapes.cohort_rows[-1],
        )
