"""The output file: append-only, one writer, whole lines.

Owns the lock, the repair of a torn end, the flush policy and what happens when the disk is full.
Each line is one write straight to the kernel, so a killed process loses at most the line it was
writing; fsync every few seconds bounds what a power failure costs.
"""

import contextlib
import fcntl
import io
import os
import secrets
import stat
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from pathlib import Path

from apex_jax.batch.results import LINE_START, FinishedLine, NotAResultError, decode_line

SYNC_INTERVAL_SEC = 5.0
# Longest output line that is read back: 64 times the longest input line.
MAX_RESULT_BYTES = 2**30


class OutputError(RuntimeError):
    """The output cannot be written or read; the message names the file, the cause, the remedy."""


class Journal:
    """An output file, open and locked.

    path: with symbolic links resolved (the file behind one is what gets replaced). is_regular:
    False for a device or pipe, which is only written to (no lock, no resuming). num_bytes: whole
    lines on disk; what follows them is torn.
    """

    def __init__(self, path: Path, write: Callable[[int, bytes], int] = os.write) -> None:
        """Open `path`, creating it, and lock it. Raises OutputError, also if a job has it locked.

        write: os.write, or a stand-in of its contract that fails (tests).
        """
        # A device keeps its name: /dev/stdout may resolve to a pipe, which has none.
        is_device = path.exists() and not path.is_file()
        self.path = path if is_device else Path(os.path.realpath(path))
        self._write = write
        self._created = not self.path.exists()
        self._descriptor = self._open_locked()
        status = os.fstat(self._descriptor)
        self.is_regular = stat.S_ISREG(status.st_mode)
        self.num_bytes = 0
        self._synced_sec = time.monotonic()

    def _open_locked(self) -> int:
        """Return a descriptor whose file is still the one at `path` once the lock is held."""
        while True:
            try:
                mode = stat.S_IFREG if self._created else os.stat(self.path).st_mode
                access = os.O_RDWR if stat.S_ISREG(mode) else os.O_WRONLY
                descriptor = os.open(self.path, access | os.O_CREAT | os.O_CLOEXEC, 0o666)
            except OSError as error:
                raise OutputError(f"cannot write {self.path}: {error.strerror}") from error
            if not stat.S_ISREG(mode) or self._lock_if_current(descriptor):
                return descriptor
            os.close(descriptor)

    def _lock_if_current(self, descriptor: int) -> bool:
        """Lock an open file; False if another job has replaced it since it was opened."""
        try:
            lock(descriptor)
            return os.path.samestat(os.fstat(descriptor), os.stat(self.path))
        except BlockingIOError:
            os.close(descriptor)
            raise OutputError(f"{self.path} is being written by another job") from None
        except FileNotFoundError:
            return False

    def scan(self) -> Iterator[FinishedLine]:
        """Yield the lines the file has; afterwards `num_bytes` says where the whole ones end.

        Raises OutputError for a file that is not this program's output, which stays as it is.
        """
        self.num_bytes = 0
        if not self.is_regular:
            return
        with open(self.path, "rb") as file:
            number = 0
            while data := file.readline(MAX_RESULT_BYTES):
                number += 1
                is_last = not file.peek(1)
                try:
                    line = decode_line(data, self.num_bytes)
                except NotAResultError as problem:
                    if is_last and not problem.is_json and _is_torn(data):
                        return
                    raise self._foreign(number, str(problem)) from problem
                if not data.endswith(b"\n"):
                    if is_last:
                        return
                    raise self._foreign(number, f"longer than {MAX_RESULT_BYTES} bytes")
                self.num_bytes += len(data)
                yield line

    def _foreign(self, number: int, problem: str) -> OutputError:
        return OutputError(
            f"{self.path} is not the output of a batch job: line {number} is no result line "
            f"({problem}); name another --output, or --overwrite it"
        )

    def start_appending(self) -> None:
        """Drop what follows the whole lines (a torn line, or with num_bytes = 0 everything)."""
        self._created = False  # from here on even an empty file is a result
        if self.is_regular:
            self._cut()
            os.lseek(self._descriptor, self.num_bytes, os.SEEK_SET)

    def append(self, line: bytes) -> None:
        """Write one line, its end included. Raises OutputError; the lines before it stay whole."""
        written = 0
        try:
            while written < len(line):
                written += self._write(self._descriptor, line[written:])
            self.num_bytes += len(line)
            if time.monotonic() - self._synced_sec > SYNC_INTERVAL_SEC:
                self.sync()
        except OSError as error:
            self._cut_quietly()
            raise self._full(error) from error

    def sync(self) -> None:
        """Ask the kernel to put the file on the disk."""
        if self.is_regular:
            os.fsync(self._descriptor)
        self._synced_sec = time.monotonic()

    def rewrite(self, spans: Iterable[tuple[int, int]]) -> None:
        """Replace the file by parts of it, in this order, in one atomic step.

        spans: (offset, num_bytes) of whole lines; may come from `scan` while this runs. The lock
        moves along. Raises OutputError and leaves the file as it was if there is no room.
        """
        if not self.is_regular:
            raise OutputError(f"{self.path} is no regular file: its lines cannot be moved")
        descriptor: int | None = None
        try:
            with replacing(self.path) as target, open(self.path, "rb") as source:
                os.fchmod(target.fileno(), stat.S_IMODE(os.fstat(self._descriptor).st_mode))
                num_bytes = _copy(source, target, spans)
                lock(target.fileno())
                descriptor = os.dup(target.fileno())
        except OSError as error:
            if descriptor is not None:
                os.close(descriptor)
            raise self._full(error) from error
        os.close(self._descriptor)
        self._descriptor = descriptor
        self.num_bytes = num_bytes
        self.start_appending()

    def close(self) -> None:
        """Sync, unlock, and remove a file that this object created if no appending began."""
        try:
            if self.is_regular:
                if self._created and os.fstat(self._descriptor).st_size == 0:
                    self.path.unlink(missing_ok=True)
                self.sync()
        except OSError as error:
            raise self._full(error) from error
        finally:
            os.close(self._descriptor)

    def _cut(self) -> None:
        if os.fstat(self._descriptor).st_size > self.num_bytes:
            os.ftruncate(self._descriptor, self.num_bytes)

    def _cut_quietly(self) -> None:
        """Cut off a half-written line; where even that fails, the next start does it."""
        if self.is_regular:
            try:
                self._cut()
            except OSError:
                return

    def _full(self, error: OSError) -> OutputError:
        return OutputError(
            f"cannot write {self.path}: {error.strerror}; the {self.num_bytes} bytes of finished "
            "lines before it are kept: make room and start the same command again to go on"
        )


@contextlib.contextmanager
def replacing(path: Path) -> Generator[io.BufferedWriter]:
    """Yield a new file that takes the place of `path` in one atomic step if all goes well.

    It lies beside `path` under a name of its own, which no file of the user has, and goes away if
    anything fails. Raises OSError.
    """
    temporary = path.with_name(f"{path.name}.{secrets.token_hex(4)}.tmp")
    with open(temporary, "xb") as file:
        try:
            yield file
            file.flush()
            os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            with contextlib.suppress(OSError):
                temporary.unlink()
            raise


def lock(descriptor: int) -> None:
    """Lock an open file against other jobs, as long as it is open. Raises BlockingIOError."""
    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _is_torn(data: bytes) -> bool:
    """True if a cut write, or blocks of zeros that a power failure left, explain a last line."""
    start = data.split(b"\0", 1)[0]
    return LINE_START.startswith(start[: len(LINE_START)]) and (
        not data.endswith(b"\n") or b"\0" in data
    )


def _copy(
    source: io.BufferedIOBase, target: io.BufferedIOBase, spans: Iterable[tuple[int, int]]
) -> int:
    """Copy parts of one file to another; return the bytes written."""
    total_bytes = 0
    for offset, num_bytes in spans:
        source.seek(offset)
        target.write(source.read(num_bytes))
        total_bytes += num_bytes
    return total_bytes
