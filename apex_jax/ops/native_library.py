"""Finds, loads and sets up the native library of the host attention op.

Owns the one handle of the process. Loads only when asked to, registers the FFI handlers for the CPU
platform once, and may be set up again (threads, CPUs, instruction set) at any time.
"""

import ctypes
import importlib.metadata
import os
import pathlib
from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np

from apex_jax.config import parse_cpus

LIBRARY_NAME = "libapex_host_attention.so"
HANDLERS = ("allocate", "append", "attend", "append_and_attend", "write_pages", "read_pages")

# What cpu_ops/thread_pool.h calls ThreadSpan.
THREAD_SPAN = np.dtype(
    [("thread", "i4"), ("num_tasks", "i4"), ("start_ns", "i8"), ("end_ns", "i8")]
)
_MAX_TAKEN = 4096


class HostOp(NamedTuple):
    """How the op is set up; print it before work starts."""

    library: pathlib.Path
    isa: str
    supported_isas: tuple[str, ...]  # what this CPU runs, best first
    num_threads: int  # with the calling one
    cpus: tuple[int, ...]  # thread i runs on cpus[i]; empty for anywhere


_library: tuple[pathlib.Path, ctypes.CDLL] | None = None


def load(
    library: pathlib.Path | None = None,
    *,
    num_threads: int | None = None,
    cpus: Sequence[int] = (),
    numa_node: int | None = None,
    isa: str = "",
) -> HostOp:
    """Load the op's library, register its handlers with XLA, start its threads.

    library: the file, or None for the installed one. Another library cannot be loaded later in the
    process. For the rest see `configure`. Raises FileNotFoundError with the command that builds it.
    """
    global _library
    path = _find_library() if library is None else library.resolve()
    if _library is None:
        if not path.is_file():
            raise FileNotFoundError(f"library: {path} does not exist")
        handle = ctypes.CDLL(str(path))
        if not all(hasattr(handle, f"apex_{name}") for name in ("take_spans", "check_append")):
            raise RuntimeError(f"library: {path} is of another version: run `pip install -e .`")
        handle.apex_configure.argtypes = [
            ctypes.c_int,
            ctypes.POINTER(ctypes.c_int),
            ctypes.c_int,
            ctypes.c_char_p,
        ]
        int64, array = ctypes.c_int64, ctypes.c_void_p
        handle.apex_check_append.argtypes = [int64, int64, array, array, int64, int64]
        handle.apex_check_written_pages.argtypes = [int64, array, int64]
        for name in ("configure", "isa", "supported_isas", "check_append", "check_written_pages"):
            getattr(handle, f"apex_{name}").restype = ctypes.c_char_p
        handle.apex_read.argtypes = [ctypes.c_void_p, ctypes.c_int64]
        handle.apex_read.restype = ctypes.c_uint64
        handle.apex_record.argtypes = [ctypes.c_int64]
        handle.apex_record.restype = None
        handle.apex_take_spans.argtypes = [
            ctypes.c_void_p,
            ctypes.c_int64,
            ctypes.POINTER(ctypes.c_int64),
        ]
        handle.apex_take_spans.restype = ctypes.c_int64
        for name in HANDLERS:
            capsule = jax.ffi.pycapsule(getattr(handle, f"apex_{name}"))
            jax.ffi.register_ffi_target(f"apex_{name}", capsule, platform="cpu")
        _library = (path, handle)
    elif _library[0] != path:
        raise ValueError(f"library = {path}: this process has loaded {_library[0]}")
    return configure(num_threads=num_threads, cpus=cpus, numa_node=numa_node, isa=isa)


def configure(
    *,
    num_threads: int | None = None,
    cpus: Sequence[int] = (),
    numa_node: int | None = None,
    isa: str = "",
) -> HostOp:
    """Set up the loaded op anew; calls that are running finish as they were.

    num_threads: with the calling thread; None for one fewer than the CPUs in question, which leaves
    one to Python. cpus: where thread i runs (the first is the caller's own business); empty for
    anywhere. numa_node: the node whose CPUs are taken instead. isa: one of HostOp.supported_isas
    ("portable" is in all of them), "" for the best.
    """
    path, handle = _loaded()
    if numa_node is not None:
        if cpus:
            raise ValueError(f"numa_node = {numa_node}: cpus are given too")
        cpus = _cpus_of_node(numa_node)
    usable = usable_cpus()
    for cpu in cpus:
        if cpu not in usable:
            raise ValueError(f"cpus: {cpu} is not one of this process's CPUs {sorted(usable)}")
    if num_threads is None:
        num_threads = max(1, len(cpus or usable) - 1)
    if not 1 <= num_threads <= 1024:
        raise ValueError(f"num_threads = {num_threads}: must be from 1 to 1024")
    array = (ctypes.c_int * len(cpus))(*cpus)
    error = handle.apex_configure(num_threads, array, len(cpus), isa.encode())
    if error is not None:
        raise ValueError(error.decode())
    return HostOp(
        path,
        handle.apex_isa().decode(),
        tuple(handle.apex_supported_isas().decode().split()),
        handle.apex_num_threads(),
        tuple(cpus),
    )


def read_memory(address: int, num_bytes: int) -> int:
    """Read memory in order from the op's threads; time it to learn the machine's bandwidth.

    address: of memory that the caller keeps alive, such as a pool's `unsafe_buffer_pointer()`.
    Returns a sum of the words, which means nothing.
    """
    return _loaded()[1].apex_read(address, num_bytes)


def record(capacity: int) -> None:
    """Keep what the op's threads do, up to `capacity` spans until they are taken; 0 stops.

    A span is what one thread did in one of the parallel parts of a call. `configure` starts
    threads anew, which do not record.
    """
    if capacity < 0:
        raise ValueError(f"capacity = {capacity}: must be at least 0")
    _loaded()[1].apex_record(capacity)


def take_spans() -> tuple[np.ndarray, int]:
    """Return the kept spans in order (dtype THREAD_SPAN), and how many were dropped for them.

    Times are nanoseconds of the monotonic clock, which is time.perf_counter's. Thread 0 is the
    one that made the call. Waits for the parallel part that runs.
    """
    handle = _loaded()[1]
    parts: list[np.ndarray] = []
    num_dropped, dropped = 0, ctypes.c_int64()
    while not parts or len(parts[-1]) == _MAX_TAKEN:
        spans = np.empty(_MAX_TAKEN, THREAD_SPAN)
        count = handle.apex_take_spans(spans.ctypes.data, _MAX_TAKEN, ctypes.byref(dropped))
        parts.append(spans[:count])
        num_dropped += dropped.value
    return np.concatenate(parts), num_dropped


def check_append(
    num_pages: int, page_size: int, block_tables_bm: np.ndarray, lengths_b: np.ndarray
) -> None:
    """Raise ValueError if a pool of such pages refuses these tables and lengths (int32)."""
    tables, lengths = np.ascontiguousarray(block_tables_bm), np.ascontiguousarray(lengths_b)
    check = _loaded()[1].apex_check_append
    error = check(num_pages, page_size, tables.ctypes.data, lengths.ctypes.data, *tables.shape)
    if error is not None:
        raise ValueError(error.decode())


def check_written_pages(num_pages: int, page_ids_i: np.ndarray) -> None:
    """Raise ValueError unless these (int32) are different pages of a pool."""
    ids = np.ascontiguousarray(page_ids_i)
    error = _loaded()[1].apex_check_written_pages(num_pages, ids.ctypes.data, ids.size)
    if error is not None:
        raise ValueError(error.decode())


def require_loaded() -> None:
    """Raise RuntimeError unless the op is loaded: XLA's own message would not say what to do."""
    _loaded()


def _loaded() -> tuple[pathlib.Path, ctypes.CDLL]:
    if _library is None:
        raise RuntimeError("the host attention op is not loaded: call load() first")
    return _library


def _find_library() -> pathlib.Path:
    """The library beside this file, or where an editable installation keeps it."""
    candidates = [pathlib.Path(__file__).parent / LIBRARY_NAME]
    try:
        installed = importlib.metadata.distribution("apex-jax")
        candidates.append(pathlib.Path(str(installed.locate_file(f"apex_jax/ops/{LIBRARY_NAME}"))))
    except importlib.metadata.PackageNotFoundError:
        pass
    for candidate in candidates:
        if candidate.is_file():
            return candidate.resolve()
    raise FileNotFoundError(
        f"{LIBRARY_NAME} is not built (looked for {', '.join(map(str, candidates))}): "
        "run `pip install -e .` in the checkout"
    )


def usable_cpus() -> set[int]:
    """CPUs that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return os.sched_getaffinity(0)
    return set(range(os.cpu_count() or 1))


def _cpus_of_node(numa_node: int) -> list[int]:
    """The usable CPUs of a NUMA node, from Linux's list such as "0-3,8"."""
    path = pathlib.Path(f"/sys/devices/system/node/node{numa_node}/cpulist")
    if not path.is_file():
        raise ValueError(f"numa_node = {numa_node}: {path} does not exist")
    cpus = usable_cpus().intersection(parse_cpus(path.read_text()))
    if not cpus:
        raise ValueError(f"numa_node = {numa_node}: none of its CPUs is usable by this process")
    return sorted(cpus)
