"""A trace file: what happened when, for https://ui.perfetto.dev and chrome://tracing.

Owns the file's format (Chrome's JSON array of events, one a line) and the thread that writes it
while the job runs: memory holds half a second's events, and a job that is killed leaves a file
that opens. Imports no jax.
"""

import contextlib
import json
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

MAX_EVENTS = 1_000_000  # about 150 MB; viewers grow slow beyond that
FLUSH_SEC = 0.5
# Encoding holds the interpreter's lock; between groups of so many events, which take a third of a
# millisecond, the dispatch loop gets its turn.
EVENTS_PER_TURN = 64
PAUSE_SEC = 50e-6
_BUFFER_BYTES = 2**20  # holds such a group, so that it is written at once: a kill tears no event

LANES = ("scheduler", "dispatch", "device", "to host", "to device", "host")  # from the top
HOST_THREAD = "host thread"
# Several may be under way at once: a lane of them is shown in as many rows as it needs.
_TRANSFERS = ("to host", "to device")
_MAX_ROWS = 100


class Event(NamedTuple):
    """lane: one of LANES, or HOST_THREAD with a number. end_sec: None if it took no time."""

    lane: str
    name: str
    start_sec: float
    end_sec: float | None
    args: Mapping[str, Any]


# Returns what native threads did since the last call (fields thread, num_tasks, start_ns, end_ns),
# and how many such spans found no room.
TakeSpans = Callable[[], tuple[np.ndarray, int]]


class TraceFile:
    """An open trace; thread-safe.

    origin_sec: the time that the file calls 0. max_events: later ones are dropped and counted.
    error: why writing has ended early. Raises OSError where the file cannot be opened. Until there
    is an event, an existing file keeps what it holds; a new one without any is taken away again.
    """

    def __init__(self, path: Path, origin_sec: float = 0.0, max_events: int = MAX_EVENTS):
        self.path = path
        self.error: OSError | None = None
        self.num_events = 0
        self.num_dropped = 0
        self._origin_sec, self._max_events = origin_sec, max_events
        self._file = open(path, "ab", _BUFFER_BYTES)  # noqa: SIM115 (until close)
        self._is_empty = True
        self._lock = threading.Lock()  # of the counts
        self._pending: deque[Event] = deque()
        self._sources: list[TakeSpans] = []
        self._row_ends_sec: dict[str, list[float]] = {lane: [] for lane in _TRANSFERS}
        self._named_tracks: set[int] = set()
        self._is_closed = False
        self._stop = threading.Event()
        self._writer = threading.Thread(target=self._keep_writing, name="trace", daemon=True)
        self._writer.start()

    def add(self, event: Event) -> None:
        if self._is_closed or self.error is not None:
            return
        with self._lock:
            if self.num_events < self._max_events:
                self.num_events += 1
                self._pending.append(event)
                return
            self.num_dropped += 1
            is_first = self.num_dropped == 1
        if is_first:
            note = f"the trace is full: it holds {self._max_events} events, later ones are dropped"
            self._pending.append(Event("scheduler", note, event.start_sec, None, {}))

    def watch(self, take_spans: TakeSpans) -> None:
        """From now on also show what the native threads behind `take_spans` do."""
        self._sources.append(take_spans)

    def close(self) -> None:
        """Write what is left; events that come later are ignored."""
        if self._is_closed:
            return
        self._stop.set()
        self._writer.join()
        self._take_from_sources()
        self._is_closed = True
        self._write_pending(pause_sec=0.0)
        with contextlib.suppress(OSError):  # closing writes again what could not be written
            if not self._is_empty and self.error is None:
                self._file.write(b"\n]\n")
            self._file.close()
            if self.path.is_file() and self.path.stat().st_size == 0:
                self.path.unlink()

    def describe(self) -> str:
        """Return what became of it, in a line."""
        if self.error is not None:
            return (
                f"error: cannot write {self.path}: {self.error.strerror}; the results are not "
                "affected"
            )
        dropped = (
            f"; full: {self.num_dropped} later events were dropped" if self.num_dropped else ""
        )
        return f"trace      {self.num_events} events in {self.path}{dropped}"

    def _keep_writing(self) -> None:
        while not self._stop.wait(FLUSH_SEC):
            self._take_from_sources()
            self._write_pending(pause_sec=PAUSE_SEC)

    def _take_from_sources(self) -> None:
        for take_spans in self._sources:
            spans, num_dropped = take_spans()
            for thread, num_tasks, start_ns, end_ns in spans.tolist():
                lane = f"{HOST_THREAD} {thread}"
                args = {"tasks": num_tasks}
                self.add(Event(lane, "tasks", start_ns * 1e-9, end_ns * 1e-9, args))
            if num_dropped:
                note = f"{num_dropped} spans of the threads were dropped"
                self.add(Event("host", note, float(spans["end_ns"][-1]) * 1e-9, None, {}))

    def _write_pending(self, pause_sec: float) -> None:
        try:
            while self._pending and self.error is None:
                count = min(EVENTS_PER_TURN, len(self._pending))
                events = [self._pending.popleft() for _ in range(count)]
                lines = [json.dumps(line, default=_plain) for line in self._lines(events)]
                if self._is_empty:
                    self._file.truncate(0)
                    self._file.write(b"[\n")
                else:
                    self._file.write(b",\n")
                self._is_empty = False
                self._file.write(",\n".join(lines).encode())
                self._file.flush()
                time.sleep(pause_sec)
        except OSError as error:
            self.error = error
            self._pending.clear()

    def _lines(self, events: list[Event]) -> Iterator[dict[str, Any]]:
        for lane, name, start_sec, end_sec, args in events:
            row = self._row(lane, start_sec, end_sec)
            track = _track(lane, row)
            if track not in self._named_tracks:
                self._named_tracks.add(track)
                title = f"{lane} ({row + 1})" if row else lane
                yield _metadata(track, "thread_name", {"name": title})
                yield _metadata(track, "thread_sort_index", {"sort_index": track})
            # Whole nanoseconds: the end of a span must not be rounded past the start of the next.
            start_ns = round((start_sec - self._origin_sec) * 1e9)
            shown = {"name": name, "pid": 1, "tid": track, "ts": start_ns / 1e3, "args": args}
            if end_sec is None:
                yield {**shown, "ph": "i", "s": "t"}
            else:
                end_ns = round((end_sec - self._origin_sec) * 1e9)
                yield {**shown, "ph": "X", "dur": (end_ns - start_ns) / 1e3}

    def _row(self, lane: str, start_sec: float, end_sec: float | None) -> int:
        """Return the first row of the lane that is free: a viewer shows no partial overlap."""
        if lane not in self._row_ends_sec or end_sec is None:
            return 0
        ends_sec = self._row_ends_sec[lane]
        free = [row for row, free_sec in enumerate(ends_sec) if free_sec <= start_sec]
        row = free[0] if free else min(len(ends_sec), _MAX_ROWS - 1)
        ends_sec[row : row + 1] = [end_sec]
        return row


def _track(lane: str, row: int) -> int:
    """Return the id of a row of the viewer, which also is its place."""
    if lane in LANES:
        return _MAX_ROWS * (1 + LANES.index(lane)) + row
    return _MAX_ROWS * (1 + len(LANES)) + int(lane.removeprefix(HOST_THREAD))


def _metadata(track: int, name: str, args: dict[str, Any]) -> dict[str, Any]:
    return {"name": name, "ph": "M", "pid": 1, "tid": track, "args": args}


def _plain(value: Any) -> Any:
    """Return what JSON does not know as what it does know; text at the worst."""
    return value.item() if issubclass(type(value), np.generic) else str(value)


def read_events(path: Path) -> list[dict[str, Any]]:
    """Return the events of a trace as JSON objects, also where the writer was killed.

    Raises ValueError for a file that is no trace.
    """
    text = path.read_text()
    with contextlib.suppress(json.JSONDecodeError):
        return json.loads(text)
    with contextlib.suppress(json.JSONDecodeError):
        return json.loads(text + "]")
    try:
        return json.loads(text.rpartition(",\n")[0] + "]")  # the last line is torn
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is no trace: {error}") from None
