"""The decisions file of a job: a JSON object a line, for each sweep.

Owns the file; what an entry holds is decisions.py's. A disk that fills ends the log, not the job.
"""

import json
from pathlib import Path
from typing import Any


class DecisionLog:
    """An open log, which replaces what was there. Raises OSError where it cannot be opened."""

    def __init__(self, path: Path):
        self.path = path
        self.num_sweeps = 0
        self.error: OSError | None = None
        self._file = open(path, "w")  # noqa: SIM115 (until close)

    def write(self, entry: dict[str, Any]) -> None:
        if self.error is not None or self._file.closed:
            return
        try:
            self._file.write(json.dumps(entry) + "\n")
            self.num_sweeps += 1
        except OSError as error:
            self.error = error

    def close(self) -> None:
        try:
            self._file.close()
        except OSError as error:
            self.error = self.error or error

    def describe(self) -> str:
        """Return what became of it, in a line."""
        if self.error is not None:
            reason = self.error.strerror
            return f"error: cannot write {self.path}: {reason}; the results are not affected"
        return f"decisions  of {self.num_sweeps} sweeps in {self.path}"
