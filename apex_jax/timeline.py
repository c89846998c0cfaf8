"""The timeline: what device, transfers, host and scheduler did, on one clock.

Backends and the engine report to it as they go. It adds up the figures of the summary, and hands
whole spans on only where there is a trace to write. Imports no jax.
"""

import threading
from collections.abc import Callable
from typing import Any

from apex_jax.overlap import BusyMeter, Figures, Kind
from apex_jax.trace import LANES, Event, TakeSpans, TraceFile

_KINDS: dict[str, Kind | None] = {
    **dict.fromkeys(LANES),
    "device": Kind.DEVICE,
    "host": Kind.HOST,
}


class Timeline:
    """Takes reports from any thread.

    Seconds are time.perf_counter()'s, or those of a simulated clock; one timeline, one clock.
    Lanes are trace.LANES: "device" holds stages, "host" the jobs of the host's worker without its
    waiting; these two make the figures. Spans of one lane do not overlap partly, transfers
    excepted.
    """

    def __init__(self, trace: TraceFile | None = None):
        self._trace = trace
        self.on_end: Callable[[Any, float], None] | None = None  # gets work and its seconds
        self._meter = BusyMeter()
        self._lock = threading.Lock()  # of the meter

    @property
    def is_tracing(self) -> bool:
        """Whether anyone will see instants, native threads, and what spans say of themselves."""
        return self._trace is not None

    def span(
        self,
        lane: str,
        name: str,
        start_sec: float,
        end_sec: float,
        work: Any = None,
        **args: Any,
    ) -> None:
        """Report something that took time.

        work: the device's stage or the host's job. args: shown with it; by custom `sweep`,
        `cohort` (ids), `layer`, `rows` (a count) and `requests` (ids).
        """
        kind = _kind(lane)
        if kind is not None:
            with self._lock:
                self._meter.add(kind, start_sec, end_sec)
        if work is not None and self.on_end is not None:
            self.on_end(work, end_sec - start_sec)
        if self._trace is not None:
            self._trace.add(Event(lane, name, start_sec, end_sec, args))

    def instant(self, lane: str, name: str, at_sec: float, **args: Any) -> None:
        """Report something that took no time."""
        _kind(lane)
        if self._trace is not None:
            self._trace.add(Event(lane, name, at_sec, None, args))

    def rest(self, start_sec: float, end_sec: float) -> None:
        """Leave out of the figures a time in which there was no request to work on."""
        with self._lock:
            self._meter.add(Kind.REST, start_sec, end_sec)

    def forget(self) -> None:
        """Let the figures begin anew: what was measured before a job is no part of it."""
        with self._lock:
            self._meter = BusyMeter()

    def watch_threads(self, take_spans: TakeSpans) -> None:
        """Show what native threads do; `take_spans` is called twice a second while tracing."""
        if self._trace is not None:
            self._trace.watch(take_spans)

    def figures(self) -> Figures:
        with self._lock:
            return self._meter.figures()


def _kind(lane: str) -> Kind | None:
    """Return what the spans of a lane count as."""
    try:
        return _KINDS[lane]
    except KeyError:
        raise ValueError(f"lane is {lane!r}; there are {', '.join(LANES)}") from None
