"""What the dispatch loop has given a backend: stages not seen to end, and how to wait for them.

Owns the order of enqueueing and the watchdog's patience. Called by the dispatch loop and its parts.
Imports no jax.
"""

import functools
import math
from collections.abc import Sequence

from apex_jax.hardware import Backend, Handle, Job, Stage
from apex_jax.under_way import StageQueue

AT_ONCE = -math.inf  # a deadline that has passed on every clock


class StuckError(RuntimeError):
    """Nothing moved within the watchdog's time."""


class Work:
    """A backend, and what it was given.

    last: the last stage of the sweep that is being launched; None where it has none yet. stages:
    those not seen to end. is_ready: whether a stage or job has ended; raises what made a job fail.
    """

    def __init__(self, backend: Backend, watchdog_sec: float):
        self.backend, self.watchdog_sec = backend, watchdog_sec
        self.last: Handle | None = None
        # Of the backend alone: a method would hold this object, and device memory, in a cycle.
        self.is_ready = functools.partial(_is_ready, backend)
        self.stages = StageQueue(self.is_ready)

    def begin_sweep(self) -> None:
        """Forget what has ended."""
        self.last = None
        self.stages.depth()

    def enqueue(self, stage: Stage, *operands: Handle) -> tuple[Handle, ...]:
        """Start a stage without waiting; returns a handle for each group of rows."""
        handles = self.backend.enqueue(stage, *operands)
        self.last = handles[-1]
        self.stages.append(handles[-1])
        return handles

    def submit_host(self, job: Job, operand: Handle | None = None) -> Handle:
        """Queue a job for the host without waiting."""
        return self.backend.submit_host(job, operand)

    def wait(self, handles: Sequence[Handle]) -> Handle:
        """Return the first handle that is ready; StuckError after the watchdog's time."""
        deadline_sec = self.backend.now() + self.watchdog_sec
        ready = self.backend.wait_any(handles, deadline_sec)
        if ready is None:
            raise StuckError(f"nothing moved for {self.watchdog_sec:g} s")
        return ready


def _is_ready(backend: Backend, handle: Handle) -> bool:
    return backend.wait_any((handle,), AT_ONCE) is not None
