"""What a person sees while a job runs: one line redrawn on a terminal, plain lines elsewhere."""

import os
import time
from typing import Protocol, runtime_checkable

from apex_jax.batch.statistics import Statistics, format_duration

REDRAW_INTERVAL_SEC = 0.2
LOG_INTERVAL_SEC = 10.0
_CLEAR_LINE = "\r\x1b[K"


@runtime_checkable
class TextStream(Protocol):
    """What is needed of sys.stderr."""

    def write(self, text: str, /) -> int: ...
    def flush(self) -> None: ...
    def isatty(self) -> bool: ...
    def fileno(self) -> int: ...


class Progress:
    """Writes messages and progress to `stream`, which it never closes.

    A stream that fails (its reader went away, its disk is full) is given up: what is shown is no
    part of the job, and must not end it.
    """

    def __init__(self, stream: TextStream, log_interval_sec: float = LOG_INTERVAL_SEC) -> None:
        self._stream = stream
        self._is_terminal = stream.isatty()
        self._interval_sec = REDRAW_INTERVAL_SEC if self._is_terminal else log_interval_sec
        self._due_sec = 0.0
        self._drawn = False
        self._is_lost = False

    def message(self, text: str) -> None:
        """Print lines that stay."""
        self._clear()
        self._write(text + "\n")

    def start(self) -> None:
        """Begin the first interval."""
        self._due_sec = time.monotonic() + self._interval_sec

    def update(
        self,
        statistics: Statistics,
        *,
        num_running: int,
        num_output_tokens: int,
        elapsed_sec: float,
    ) -> None:
        """Show where the job is, if it is time to."""
        now = time.monotonic()
        if now < self._due_sec:
            return
        self._due_sec = now + self._interval_sec
        text = format_progress(statistics, num_running, num_output_tokens, elapsed_sec)
        if self._is_terminal:
            self._write(_CLEAR_LINE + text[: self._num_columns() - 1])
            self._drawn = True
        else:
            self.message(text)

    def finish(self) -> None:
        """Take the progress line away."""
        self._clear()

    def _write(self, text: str) -> None:
        """Show `text` at once, unless the stream has failed before."""
        if self._is_lost:
            return
        try:
            self._stream.write(text)
            self._stream.flush()
        except OSError:
            self._is_lost = True

    def _num_columns(self) -> int:
        """Width of the terminal: a line that wraps could not be redrawn."""
        try:
            return max(20, os.get_terminal_size(self._stream.fileno()).columns)
        except (OSError, ValueError):
            return 80

    def _clear(self) -> None:
        if self._drawn:
            self._write(_CLEAR_LINE)
            self._drawn = False


def format_progress(
    statistics: Statistics, num_running: int, num_output_tokens: int, elapsed_sec: float
) -> str:
    """Return one line: requests, output tokens/s so far, time left (by bytes of input)."""
    per_sec = 1 / elapsed_sec if elapsed_sec > 0 else 0.0
    fraction = statistics.fraction_done
    parts = [f"{statistics.num_done} done"]
    if fraction:
        parts[0] += f" of about {round(statistics.num_done / fraction)} ({fraction:.1%})"
    parts.append(f"{num_running} in work")
    if statistics.num_failed:
        parts.append(f"{statistics.num_failed} failed")
    if statistics.num_skipped:
        parts.append(f"{statistics.num_skipped} before")
    parts.append(f"{num_output_tokens * per_sec:.0f} output tokens/s")
    if fraction:
        left_sec = elapsed_sec * (1 - fraction) / fraction
        parts.append(f"{format_duration(left_sec)} left")
    return ", ".join(parts)
