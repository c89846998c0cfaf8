"""Pages between the lanes: requests that move, and prompts on their way to the host.

Owns how far each move has come, and how many pages are under way at once. Called by the dispatch
loop. Imports no jax.
"""

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Int32

from apex_jax.hardware import Export, Handle, Import, ReadPages, WritePages
from apex_jax.plan import Direction, Move, StagedPrefix
from apex_jax.under_way import Transit
from apex_jax.work import Work


@dataclass
class _Moving:
    """A move on its way, a few layers at a time."""

    move: Move
    next_layer: int = 0
    under_way: deque[tuple[int, Handle]] = field(default_factory=deque)


class PageTraffic:
    """Moves and staged prompts, layer by layer; max_pages, sizes: of the Transit."""

    def __init__(self, work: Work, num_layers: int, max_pages: int, sizes: Sequence[int]):
        self._work, self._num_layers = work, num_layers
        self._transit = Transit(max_pages, sizes, work.is_ready)
        self._moves: list[_Moving] = []
        self._prefixes: deque[Handle] = deque()  # of the group's next layers, read by the host

    def __len__(self) -> int:
        """Return how many moves are on their way."""
        return len(self._moves)

    def describe(self) -> str:
        moves = ", ".join(
            f"{one.move.direction} {one.move.move_id} at layer {one.next_layer} with "
            f"{len(one.under_way)} under way"
            for one in self._moves
        )
        return moves or "no moves"

    # Moves

    def add(self, moves: Iterable[Move]) -> None:
        self._moves += [_Moving(move) for move in moves]

    def carry(self) -> list[Move]:
        """Take moves as far as they can go without waiting; return those that have arrived."""
        finished: list[Move] = []
        for moving in list(self._moves):
            if moving.move.direction is Direction.DEMOTION:
                self._carry_to_host(moving)
            else:
                self._carry_to_device(moving)
            if moving.next_layer == self._num_layers and not moving.under_way:
                self._moves.remove(moving)
                finished.append(moving.move)
        return finished

    def keep_moving(self) -> list[Move]:
        """Let moves go on until the device runs out of stages; return those that have arrived.

        Few pages are between the lanes at once, so who looked after them but once a sweep would
        leave the link idle for most of it.
        """
        finished: list[Move] = []
        stages = self._work.stages
        while self._moves and stages.depth() > 1:
            self._transit.forget_arrived()
            if not self._transit.handles:
                break
            self._work.wait([self._transit.handles[0], *stages.all_but_one()])
            finished += self.carry()
        return finished

    def await_any(self) -> None:
        """Wait for pages under way, where there are any."""
        self._transit.forget_arrived()
        if self._transit.handles:
            self._work.wait(self._transit.handles)

    def _carry_to_host(self, moving: _Moving) -> None:
        move = moving.move
        while self._has_layer_to_go(moving):
            layer = moving.next_layer
            self._to_host(layer, move.device_pages_i, move.host_pages_i, from_staging=False)
            moving.next_layer += 1

    def _carry_to_device(self, moving: _Moving) -> None:
        move = moving.move
        while moving.under_way and self._work.is_ready(moving.under_way[0][1]):
            layer, was_read = moving.under_way.popleft()
            self._work.enqueue(Import(layer, move.device_pages_i), was_read)
        while self._has_layer_to_go(moving):
            was_read = self._read(moving.next_layer, move.host_pages_i)
            moving.under_way.append((moving.next_layer, was_read))
            moving.next_layer += 1

    def _has_layer_to_go(self, moving: _Moving) -> bool:
        """Whether a move's next layer may set out."""
        return moving.next_layer < self._num_layers and self._has_room(
            len(moving.move.host_pages_i)
        )

    # Prompts bound for the host

    def stage_prefix(self, prefix: StagedPrefix, layer: int) -> None:
        """Bring a layer of what the host has of the group's prompts into the staging plane.

        The next layer is read ahead: behind this one's own pages on their way to the host, it would
        be there only when these are, and the device would wait.
        """
        while len(self._prefixes) < 2 and layer + len(self._prefixes) < self._num_layers:
            self._await_room(len(prefix.host_pages_i))
            was_read = self._read(layer + len(self._prefixes), prefix.host_pages_i)
            self._prefixes.append(was_read)
        was_read = self._prefixes.popleft()
        self._work.wait([was_read])
        self._work.enqueue(Import(layer, prefix.staging_pages_i, to_staging=True), was_read)

    def unstage(
        self,
        layer: int,
        staging_pages_i: Int32[np.ndarray, "i"],
        host_pages_i: Int32[np.ndarray, "i"],
    ) -> None:
        """Send a layer of prompts from the staging plane to the host, as soon as there is room."""
        self._await_room(len(host_pages_i))
        self._to_host(layer, staging_pages_i, host_pages_i, from_staging=True)

    # Both

    def _read(self, layer: int, host_pages_i: Int32[np.ndarray, "i"]) -> Handle:
        was_read = self._work.submit_host(ReadPages(layer, host_pages_i))
        self._transit.set_out(len(host_pages_i), was_read)
        return was_read

    def _to_host(
        self,
        layer: int,
        device_pages_i: Int32[np.ndarray, "i"],
        host_pages_i: Int32[np.ndarray, "i"],
        *,
        from_staging: bool,
    ) -> None:
        (exported,) = self._work.enqueue(Export(layer, device_pages_i, from_staging=from_staging))
        written = self._work.submit_host(WritePages(layer, host_pages_i), exported)
        self._transit.set_out(len(host_pages_i), written)

    def _has_room(self, num_pages: int) -> bool:
        """Whether so many pages of a layer may set out."""
        self._work.stages.depth()  # forgets exports that have ended: their handles hold copies
        return self._transit.has_room(num_pages)

    def _await_room(self, num_pages: int) -> None:
        while not self._has_room(num_pages):
            self._work.wait(self._transit.handles[:1])
