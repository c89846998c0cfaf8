"""Who waits, who is in which lane, and in which slot.

Owns the waiting list, the slots and both lanes' rooms, and reconciles them; who goes where when is
decided by the scheduler and its parts. Imports no jax.
"""

import bisect
import itertools
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from apex_jax.lanes import LaneRoom
from apex_jax.sequence import Lane, Sequence
from apex_jax.slot_table import SlotTable


@dataclass
class SchedulerStats:
    """What has been planned and read so far, and the most that was in use at once.

    num_admitted_tokens: of requests as they enter a lane; num_reused_tokens: of those, such as have
    their KV already.
    """

    num_sweeps: int = 0
    num_preemptions: int = 0
    num_admitted_tokens: int = 0
    num_reused_tokens: int = 0
    num_prefilled_tokens: int = 0
    num_host_prefilled_tokens: int = 0
    num_output_tokens: int = 0
    num_host_tokens: int = 0
    max_running: int = 0
    max_host_running: int = 0
    max_pages: int = 0
    max_host_pages: int = 0


class Residency:
    """Sequences without a result, by the place they have.

    waiting: by index, so that a pre-empted one goes on first. host: None without a host lane.
    """

    def __init__(self, device: LaneRoom, host: LaneRoom | None, table: SlotTable):
        self.device, self.host, self.table, self.num_slots = device, host, table, table.num_slots
        self.waiting: list[Sequence] = []
        self.stats = SchedulerStats()
        self._free_slots = list(range(self.num_slots - 1, -1, -1))

    @property
    def rooms(self) -> list[LaneRoom]:
        return [self.device] if self.host is None else [self.device, self.host]

    @property
    def is_empty(self) -> bool:
        return not (self.waiting or any(room.sequences for room in self.rooms))

    def __iter__(self) -> Iterator[Sequence]:
        return itertools.chain(self.waiting, *(room.sequences for room in self.rooms))

    def admit(self, sequence: Sequence, room: LaneRoom) -> None:
        """Give a slot and a lane to a sequence that waited."""
        self.waiting.remove(sequence)
        sequence.enter_slot(self.table, self._free_slots.pop())
        room.enter(sequence)
        self.stats.num_admitted_tokens += len(sequence.token_ids)
        self.stats.num_reused_tokens += sequence.num_computed

    def preempt(self, sequence: Sequence) -> None:
        """Send a running sequence back to wait; its KV is recomputed later."""
        self._vacate(sequence)
        sequence.is_decoding = False
        sequence.num_preemptions += 1
        self.stats.num_preemptions += 1
        bisect.insort(self.waiting, sequence, key=lambda one: one.index)

    def vacate_if_over(self, sequence: Sequence) -> None:
        """Take what an ended sequence has, unless something of it is still under way."""
        if sequence.finish_reason is None or sequence.is_under_way:
            return
        if sequence.lane is None:  # it was pre-empted while its last token was in flight
            self.waiting.remove(sequence)
        else:
            self._vacate(sequence)

    def _vacate(self, sequence: Sequence) -> None:
        """Take pages and slot from a sequence."""
        room = self.device if sequence.lane is Lane.DEVICE else self.host
        assert room is not None
        room.leave(sequence)
        self._free_slots.append(sequence.leave_slot())

    def count_sweep(self) -> None:
        """Count a planned sweep, and what is in use now."""
        stats = self.stats
        stats.num_sweeps += 1
        stats.max_running = max(stats.max_running, len(self.device.sequences))
        stats.max_pages = max(stats.max_pages, self.device.num_used)
        if self.host is not None:
            stats.max_host_running = max(stats.max_host_running, len(self.host.sequences))
            stats.max_host_pages = max(stats.max_host_pages, self.host.num_used)

    def describe(self) -> str:
        rooms = ", ".join(
            f"{len(room.sequences)} in the {room.lane} lane ({room.pool.num_free} of "
            f"{room.pool.num_pages} pages free)"
            for room in self.rooms
        )
        num_free = len(self._free_slots)
        return f"{rooms}, {len(self.waiting)} waiting, {num_free} of {self.num_slots} slots free"

    def check_ledger(self, arriving: Mapping[Lane, Counter[int]]) -> None:
        """Raise RuntimeError unless pages, rows and slots are exactly the live sequences'.

        arriving: pages in each lane of those who are on their way there.
        """
        for room in self.rooms:
            room.pool.check()
            pages = room.pages_of(room.sequences) + arriving[room.lane]
            if pages != room.pool.references():
                raise RuntimeError(
                    f"{room.lane} pages in use {room.pool.references()}, accounted for {pages}"
                )
            ready = [sequence.index for sequence in room.sequences if sequence.is_ready]
            if ready != room.decoding.rows.owners_b.tolist():
                raise RuntimeError(f"{room.lane} rows {room.decoding.rows.owners_b}, ready {ready}")
        slots = [sequence.slot for sequence in self if sequence.slot is not None]
        if sorted(slots + self._free_slots) != list(range(self.num_slots)):
            raise RuntimeError(f"slots in use {sorted(slots)}, free {sorted(self._free_slots)}")
