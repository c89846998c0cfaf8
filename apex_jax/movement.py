"""Between the lanes: who is promoted, and who is driven out where a lane's memory ends.

Owns what is on its way. A sequence between the lanes does not decode. Called by the scheduler.
Imports no jax.
"""

import itertools
from collections import Counter
from dataclasses import dataclass

import numpy as np

from apex_jax.pages import num_pages_for
from apex_jax.plan import Direction, Move
from apex_jax.policies import Policy
from apex_jax.residency import Residency
from apex_jax.sequence import Lane, Sequence

MAX_PROMOTIONS = 2  # at once: a sequence on its way does not decode, and they travel one by one
# Sweeps without a token after which room on the device is kept for a host-lane request. A policy
# that merges gives every row its turn sooner; one that predicts may give it none.
PATIENCE_SWEEPS = 256


@dataclass
class _Moving:
    """A sequence between the lanes, and its pages where it goes."""

    sequence: Sequence
    direction: Direction
    pages: list[int]

    @property
    def lane(self) -> Lane:
        """Where it goes."""
        return Lane.DEVICE if self.direction is Direction.PROMOTION else Lane.HOST


class Movement:
    """Promotion, demotion and pre-emption.

    kept_for: a host-lane request that waited long, for which room on the device is kept.
    """

    def __init__(self, residency: Residency, policy: Policy, page_size: int):
        self._residency, self._policy, self._page_size = residency, policy, page_size
        self.kept_for: Sequence | None = None
        self._moving: dict[int, _Moving] = {}
        self._move_ids = itertools.count()

    def __len__(self) -> int:
        return len(self._moving)

    def promote(self) -> list[Move]:
        """Let the oldest between two tokens on the host go where the device has room.

        For one that has waited long, room is kept from younger requests.
        """
        self.kept_for = None
        device, host = self._residency.device, self._residency.host
        if host is None or not self._policy.uses_device_lane:
            return []
        moves: list[Move] = []
        is_kept = self._policy.keeps_host_rows and len(self._residency.waiting) > 0
        # Who was driven out comes on top of those who are worth having there.
        limit = self._policy.max_host_rows
        num_over = 0 if limit is None else max(0, len(host.sequences) - limit)
        num_left = MAX_PROMOTIONS - self._num_to(Lane.DEVICE)
        for sequence in host.decoding.rows.sequences:
            if not device.can_ever_hold(sequence):
                continue
            num_idle = self._residency.stats.num_sweeps - sequence.last_step
            if is_kept and len(moves) >= num_over and num_idle <= PATIENCE_SWEEPS:
                continue
            if num_left == 0 or not device.has_row() or not device.has_pages(sequence):
                if num_idle > PATIENCE_SWEEPS:
                    self.kept_for = sequence
                break
            moves.append(self._start(sequence, Direction.PROMOTION))
            num_left -= 1
        return moves

    def make_room(self, sequence: Sequence) -> list[Move]:
        """Drive the newest from the device until a page is free, or will be when one has left."""
        room, moves = self._residency.device, list[Move]()
        while room.pool.num_free == 0 and sequence.lane is Lane.DEVICE:
            # Who arrives meanwhile is the newest, but not here yet.
            is_arriving = self._num_to(Lane.DEVICE) > 0
            if is_arriving or room.is_anyone_full or any(one.is_moving for one in room.sequences):
                break
            newest = room.sequences[-1]
            if self._can_demote(newest):
                moves.append(self._start(newest, Direction.DEMOTION))
            else:
                self._residency.preempt(newest)
        return moves

    def count_homing(self) -> int:
        """Return for how many of the host's rows the device has room, where nobody else waits."""
        device, host = self._residency.device, self._residency.host
        if host is None or self._residency.waiting or not self._policy.uses_device_lane:
            return 0
        homing: list[Sequence] = []
        for sequence in host.sequences:
            if sequence.is_moving or sequence.num_unfilled:
                continue
            if not device.has_row(homing) or not device.has_pages(sequence, homing):
                break
            homing.append(sequence)
        return len(homing)

    def end(self, move_id: int) -> None:
        """Let a sequence arrive where it went, unless it has ended on its way."""
        moving = self._moving.pop(move_id)
        assert self._residency.host is not None
        source, target = self._residency.host, self._residency.device
        if moving.direction is Direction.DEMOTION:
            source, target = target, source
        sequence = moving.sequence
        sequence.is_moving = False
        if sequence.finish_reason is not None:
            target.forget(moving.pages)
            self._residency.vacate_if_over(sequence)
        else:
            source.leave(sequence)
            target.arrive(sequence, moving.pages)
            target.decoding.update(sequence)

    def reserved_pages(self) -> dict[Lane, Counter[int]]:
        """Return the pages in each lane of those who are on their way there."""
        pages = {lane: Counter[int]() for lane in Lane}
        for moving in self._moving.values():
            pages[moving.lane].update(moving.pages)
        return pages

    def _num_to(self, lane: Lane) -> int:
        return sum(moving.lane is lane for moving in self._moving.values())

    def _can_demote(self, sequence: Sequence) -> bool:
        host = self._residency.host
        if host is None or not sequence.is_ready:
            return False
        return host.has_row() and host.has_pages(sequence)

    def _start(self, sequence: Sequence, direction: Direction) -> Move:
        device, host = self._residency.device, self._residency.host
        assert host is not None
        is_promotion = direction is Direction.PROMOTION
        source, target = (host, device) if is_promotion else (device, host)
        pages = target.reserve(sequence)
        num_pages = num_pages_for(sequence.num_computed, self._page_size)
        source_i = np.array(sequence.pages[:num_pages], np.int32)
        target_i = np.array(pages[:num_pages], np.int32)
        move_id = next(self._move_ids)
        self._moving[move_id] = _Moving(sequence, direction, pages)
        sequence.is_moving = True
        source.decoding.update(sequence)
        device_i, host_i = (target_i, source_i) if is_promotion else (source_i, target_i)
        return Move(move_id, direction, device_i, host_i)
