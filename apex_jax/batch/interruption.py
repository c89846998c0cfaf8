"""SIGINT and SIGTERM: finish writing what is complete, then stop.

While a job starts, a signal raises at once; once it works, the signal is only noted and the loop
looks. A second one ends the process on the spot, which costs a torn line at most.
"""

import signal
import threading
from types import FrameType, TracebackType
from typing import Any

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupted(BaseException):
    """A signal came before the work began. signal_number: which."""

    def __init__(self, signal_number: int) -> None:
        super().__init__(signal.Signals(signal_number).name)
        self.signal_number = signal_number


class Interruption:
    """Context manager that holds the handlers. signal_number: what came, None so far."""

    def __init__(self) -> None:
        self.signal_number: int | None = None
        self._raises = True
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "Interruption":
        # Python allows handlers in the main thread only; elsewhere the caller keeps its own.
        if threading.current_thread() is threading.main_thread():
            for one in _SIGNALS:
                self._previous[one] = signal.signal(one, self._handle)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for one, previous in self._previous.items():
            signal.signal(one, previous)

    def defer(self) -> None:
        """From now on note signals instead of raising."""
        self._raises = False

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.signal_number = number
        for one in _SIGNALS:
            signal.signal(one, signal.SIG_DFL)
        if self._raises:
            raise Interrupted(number)
