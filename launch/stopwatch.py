"""A thread's CPU time, split into the parts of a program that took it.

Owns the bookkeeping of nested calls; what a part is, its caller says by wrapping functions. Called
by bench_python.
"""

import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from typing import Any


class Stopwatch:
    """Splits a thread's CPU time into parts, each without what it calls of another part.

    Reading the clock costs about as much as the cheapest of what is timed: that is measured, and
    left out. clock: in seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.thread_time) -> None:
        self._clock = clock
        self._seconds: defaultdict[str, float] = defaultdict(float)
        self._num_calls: Counter[tuple[str, str]] = Counter()  # by caller and called
        self._parts = ["rest"]
        self._since = self._clock()
        self._thread = threading.get_ident()
        self._inside_sec, self._outside_sec = self._own_sec()

    def wrap(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return the function, its time counted as the part's where it runs on this thread."""

        def timed(*args: Any, **kwargs: Any) -> Any:
            if threading.get_ident() != self._thread:
                return function(*args, **kwargs)
            parts = self._parts
            self._num_calls[parts[-1], part] += 1
            now = self._clock()
            self._seconds[parts[-1]] += now - self._since
            self._since = now
            parts.append(part)
            try:
                return function(*args, **kwargs)
            finally:
                now = self._clock()
                self._seconds[parts.pop()] += now - self._since
                self._since = now

        return timed

    def take(self) -> dict[str, float]:
        """Return the seconds of each part since the last take."""
        now = self._clock()
        self._seconds[self._parts[-1]] += now - self._since
        self._since = now
        taken = self._seconds
        for (caller, called), count in self._num_calls.items():
            taken[caller] -= count * self._outside_sec
            taken[called] -= count * self._inside_sec
        self._seconds = defaultdict(float)
        self._num_calls.clear()
        return taken

    def _own_sec(self) -> tuple[float, float]:
        """Return what a wrapped call costs by itself, inside its part and in its caller's."""
        self._inside_sec = self._outside_sec = 0.0
        nothing, num_calls = self.wrap("nothing", lambda: None), 2000
        samples: list[tuple[float, float]] = []
        for _ in range(20):
            self.take()
            for _ in range(num_calls):
                nothing()
            taken = self.take()
            samples.append((taken["nothing"] / num_calls, taken["rest"] / num_calls))
        return min(inside for inside, _ in samples), min(outside for _, outside in samples)
