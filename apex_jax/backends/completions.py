"""Completions: one place to wait for device stages and host jobs alike.

Owns the thread that blocks on the stages' markers in the order of their enqueueing and stamps when
each ended, and the condition on which `wait_any` sleeps. Knows nothing of what stages compute.
Called by the xla backend.
"""

import contextlib
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from queue import SimpleQueue
from typing import Any, Protocol, TypeVar, runtime_checkable

from apex_jax.hardware import Stage, name_of

CLOSE_SEC = 10.0  # a stage or job that takes longer hangs; its thread is left to the process's end


@runtime_checkable
class Marked(Protocol):
    """A handle whose marker tells when it is ready.

    marker: of a device stage an array of its result that is never donated, of a host job its
    Future.
    """

    @property
    def marker(self) -> Any: ...


# Takes (lane, name, start_sec, end_sec, **args): what ran where and when; `args` say which layer,
# how many rows and so on, and `work` is the stage or job itself on the lanes where it runs.
SpanRecorder = Callable[..., None]
MarkedT = TypeVar("MarkedT", bound=Marked)


class Completions:
    """What has ended, on device and host.

    on_span: gets the device's spans, from the waiter's thread. A stage begins when the one before
    it has ended, or when it is enqueued, whichever is later.
    """

    def __init__(self, on_span: SpanRecorder):
        self._on_span = on_span
        self._stages: SimpleQueue[tuple[Any, Stage, float] | None] = SimpleQueue()
        self._running: tuple[Stage, float] | None = None  # the one waited for, enqueued when
        self._changed = threading.Condition()
        self._num_sleeping = 0  # in wait_any; they look once more after they are counted
        self._refusal: str | None = None  # why nothing can be waited for any more
        self._waiter = threading.Thread(target=self._wait_for_stages, daemon=True)
        self._waiter.name = "apex-completions"
        self._waiter.start()

    def enqueued(self, handle: Marked, stage: Stage, start_sec: float | None = None) -> None:
        """Follow a device stage; call it in the order of enqueueing.

        start_sec: when enqueueing began, None for now (a CPU may run a small program inside the
        call).
        """
        if start_sec is None:
            start_sec = time.perf_counter()
        self._stages.put((handle.marker, stage, start_sec))

    def submitted(self, handle: Marked) -> None:
        """Follow a host job."""
        handle.marker.add_done_callback(self._wake)

    def wait_any(self, handles: Sequence[MarkedT], deadline_sec: float) -> MarkedT | None:
        """Return the first handle that is ready, in their order, or None at the deadline.

        deadline_sec: on time.perf_counter. Raises what made the handle's stage or job fail, and
        RuntimeError once these completions are closed and none is ready.
        """
        ready = _first_ready(handles)
        if ready is None and time.perf_counter() < deadline_sec:
            ready = self._sleep_until_ready(handles, deadline_sec)
        if ready is not None:
            _raise_failure(ready.marker)
        return ready

    def describe(self) -> str:
        """Return what the device does, for whoever finds that nothing moves."""
        running = self._running
        if running is None:
            return "device: idle"
        stage, enqueue_sec = running
        seconds = time.perf_counter() - enqueue_sec
        return (
            f"device: {name_of(stage)} enqueued {seconds:.1f} s ago; "
            f"{self._stages.qsize()} stages queued behind it"
        )

    def close(self) -> None:
        """Let what is enqueued end, then the thread; whoever still waits gets a RuntimeError."""
        self._stages.put(None)
        self._waiter.join(CLOSE_SEC)
        self._refuse("the completions are closed")

    def _sleep_until_ready(self, handles: Sequence[MarkedT], deadline_sec: float) -> MarkedT | None:
        with self._changed:
            self._num_sleeping += 1
            try:
                while True:
                    ready = _first_ready(handles)
                    left_sec = deadline_sec - time.perf_counter()
                    if ready is not None or left_sec <= 0:
                        return ready
                    if self._refusal is not None:
                        raise RuntimeError(self._refusal)
                    self._changed.wait(left_sec)
            finally:
                self._num_sleeping -= 1

    def _wait_for_stages(self) -> None:
        end_sec = 0.0
        try:
            while (entry := self._stages.get()) is not None:
                end_sec = self._wait_for_stage(*entry, end_sec)
                del entry  # its marker holds device memory while the queue is empty
        except Exception as error:  # of on_span
            self._refuse(f"the completions' thread failed: {error}")
            raise

    def _wait_for_stage(
        self, marker: Any, stage: Stage, enqueue_sec: float, previous_end_sec: float
    ) -> float:
        """Wait until a stage has ended, and return when."""
        self._running = stage, enqueue_sec
        with contextlib.suppress(Exception):  # wait_any raises it to whoever waits for this stage
            marker.block_until_ready()
        end_sec = time.perf_counter()
        self._running = None
        self._wake()
        layer = getattr(stage, "layer", getattr(stage, "first_layer", None))
        shown = {"layer": layer, "cohort": getattr(stage, "cohort_id", None)}
        args = {name: value for name, value in shown.items() if value is not None}
        start_sec = max(enqueue_sec, previous_end_sec)
        self._on_span("device", name_of(stage), start_sec, end_sec, work=stage, **args)
        return end_sec

    def _wake(self, _: object = None) -> None:
        if self._num_sleeping:
            with self._changed:
                self._changed.notify_all()

    def _refuse(self, reason: str) -> None:
        self._refusal = self._refusal or reason
        self._wake()


def _first_ready(handles: Sequence[MarkedT]) -> MarkedT | None:
    for handle in handles:
        if is_ready(handle):
            return handle
    return None


def is_ready(handle: Marked) -> bool:
    """Whether a stage or job has ended, well or not; costs a microsecond at most."""
    marker = handle.marker
    return marker.done() if isinstance(marker, Future) else marker.is_ready()


def _raise_failure(marker: Any) -> None:
    """Raise what made an ended stage or job fail."""
    if isinstance(marker, Future):
        marker.result()
    else:
        marker.block_until_ready()
