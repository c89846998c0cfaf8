"""What is under way and not known to have ended: stages of the device, pages between the lanes.

Owns the two queues, each in the order in which things began; to ask whether a handle is ready, and
to wait, is the dispatch loop's business, which calls it. Imports no jax.
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence

from apex_jax.hardware import Handle

IsReady = Callable[[Handle], bool]
# Stages between two looks at what has ended, where nobody asks: their handles hold device memory.
MAX_UNSEEN = 16


class StageQueue:
    """The device's stages, oldest first."""

    def __init__(self, is_ready: IsReady):
        self._is_ready = is_ready
        self._stages: deque[Handle] = deque()

    def __len__(self) -> int:
        return len(self._stages)

    def __iter__(self) -> Iterator[Handle]:
        return iter(self._stages)

    def append(self, stage: Handle) -> None:
        self._stages.append(stage)
        if len(self._stages) % MAX_UNSEEN == 0:
            self.depth()

    def depth(self) -> int:
        """Return how many stages the device has left to end, as far as is known."""
        while self._stages and self._is_ready(self._stages[0]):
            self._stages.popleft()
        return len(self._stages)

    def all_but_one(self) -> tuple[Handle, ...]:
        """Return the stage whose end leaves the device one stage; none where it has no more."""
        if len(self._stages) < 2:
            return ()
        # A CPU may end independent stages out of order: then it is the oldest that counts.
        last_but_one = self._stages[-2]
        return (self._stages[0] if self._is_ready(last_but_one) else last_but_one,)


class Transit:
    """Pages of a layer between the lanes, a batch for each transfer.

    max_pages: at once, because their copies take device memory; one batch of more goes alone.
    sizes: numbers of pages that a batch is padded to, in ascending order; none for no padding.
    """

    def __init__(self, max_pages: int, sizes: Sequence[int], is_ready: IsReady):
        self._max_pages, self._sizes, self._is_ready = max_pages, sizes, is_ready
        self._batches: deque[tuple[int, Handle]] = deque()

    @property
    def handles(self) -> list[Handle]:
        return [handle for _, handle in self._batches]

    def set_out(self, num_pages: int, arrival: Handle) -> None:
        self._batches.append((self._padded(num_pages), arrival))

    def has_room(self, num_pages: int) -> bool:
        """Whether a batch of so many pages may set out."""
        self.forget_arrived()
        num_under_way = sum(count for count, _ in self._batches) + self._padded(num_pages)
        return not self._batches or num_under_way <= self._max_pages

    def forget_arrived(self) -> None:
        while self._batches and self._is_ready(self._batches[0][1]):
            self._batches.popleft()

    def _padded(self, num_pages: int) -> int:
        return next((size for size in self._sizes if size >= num_pages), num_pages)
