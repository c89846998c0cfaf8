"""The host lane: one thread that owns the host's KV pools and runs its jobs in order.

A job waits for its operand's transfer, runs the op on this thread (a program that is only an FFI
call runs inline on its caller), and sends the result on its way to the device. After a failure the
pool may be lost (it was donated), so every later job fails too, at once. Called by the backends.
"""

import contextlib
import os
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from queue import Empty, SimpleQueue
from typing import Any, Protocol, runtime_checkable

import jax
import numpy as np
from jaxtyping import Array, Float, Int32

from apex_jax.backends.completions import CLOSE_SEC, SpanRecorder
from apex_jax.backends.host_programs import HostPrograms
from apex_jax.buckets import smallest_that_holds
from apex_jax.config import ConfigError, HostConfig, parse_cpus
from apex_jax.hardware import HostAttention, Job, ReadPages, WritePages, name_of
from apex_jax.ops import native_library
from apex_jax.ops.native_library import HostOp
from apex_jax.plan import DecodeBatch
from apex_jax.programs import ProgramKey

HostFuture = Future[Array | None]


@runtime_checkable
class Operand(Protocol):
    """What a device stage leaves for a job: an array on the device, or something that acts as one.

    Blocking on it waits for the stage, reading it as an array for its way to the host.
    """

    def block_until_ready(self) -> Any: ...
    def __array__(self) -> np.ndarray: ...


class HostLaneError(RuntimeError):
    """The lane runs no more jobs; the message says what the first failure was."""


class HostLane:
    """The worker of the host.

    device: where results go. cpus: those of the op's threads, the worker itself runs on the first;
    empty for anywhere. on_span: gets the spans of each job, from the worker's thread: its operand's
    arrival ("to host", as far as it is waited for), the op ("host"), its result's departure
    ("to device"). before_job: called there before each job; tests delay, block or fail in it.
    """

    def __init__(
        self,
        programs: HostPrograms,
        device: jax.Device,
        *,
        on_span: SpanRecorder,
        cpus: Sequence[int] = (),
        before_job: Callable[[Job], None] | None = None,
    ):
        self._programs, self._device, self._cpus = programs, device, cpus
        self._on_span, self._before_job = on_span, before_job
        self._pools: list[Float[Array, "p k 2 z h"]] = []
        self._jobs: SimpleQueue[tuple[Job, Operand | None, HostFuture] | None] = SimpleQueue()
        self._running: tuple[Job, float] | None = None  # and since when
        self._failure: BaseException | None = None
        is_set_up: Future[None] = Future()
        self._worker = threading.Thread(
            target=self._work, args=(is_set_up,), name="apex-host", daemon=True
        )
        self._worker.start()
        is_set_up.result()

    def submit(self, job: Job, operand: Operand | None = None) -> HostFuture:
        """Queue a job without waiting; its operand's copy to the host has been started.

        operand: of HostAttention the cohort's queries, keys and values [b, n + 2k, h], of
        WritePages the exported pages [i, k, 2, z, h]; rows and pages beyond the job's own are
        padding.
        The future yields an array on the device: attended rows [b, n, h], with zeros for padding;
        pages [i, k, 2, z, h], with zeros up to a bucket; nothing for WritePages. It raises
        what made the job fail, or HostLaneError where an earlier one failed or the lane is closed.
        """
        future: HostFuture = Future()
        self._jobs.put((job, operand, future))
        if self._failure is not None:
            self._fail_pending()
        return future

    def close(self) -> None:
        """Fail the jobs that have not begun, end the thread, free the pools."""
        self._failure = self._failure or HostLaneError("it was closed")
        self._fail_pending()
        self._jobs.put(None)
        self._worker.join(CLOSE_SEC)
        if not self._worker.is_alive():
            self._pools.clear()

    def describe(self) -> str:
        """Return what the worker does, for whoever finds that nothing moves."""
        running = self._running
        if self._failure is not None:
            doing = f"ended: {self._failure}"
        elif running is None:
            doing = "idle"
        else:
            job, start_sec = running
            seconds = time.perf_counter() - start_sec
            doing = f"{name_of(job)} of layer {job.layer} for {seconds:.1f} s"
        return f"host lane: {doing}; {self._jobs.qsize()} jobs queued"

    def _work(self, is_set_up: Future[None]) -> None:
        try:
            if self._cpus:
                os.sched_setaffinity(0, {self._cpus[0]})  # of this thread alone
            # Here, because the threads that first touch memory decide its NUMA node.
            self._pools = self._programs.allocate()
        except BaseException as error:
            is_set_up.set_exception(error)
            return
        is_set_up.set_result(None)
        while (entry := self._jobs.get()) is not None:
            self._serve(*entry)
            del entry  # its operand holds device memory while the queue is empty

    def _serve(self, job: Job, operand: Operand | None, future: HostFuture) -> None:
        if self._failure is not None:
            error = HostLaneError(f"the host lane runs no more jobs: {self._failure}")
            error.__cause__ = self._failure
            future.set_exception(error)
            return
        self._running = job, time.perf_counter()
        try:
            if self._before_job is not None:
                self._before_job(job)
            result = self._run(job, operand)
        except BaseException as error:
            self._failure = error
            future.set_exception(error)
        else:
            future.set_result(result)
        self._running = None

    def _fail_pending(self) -> None:
        """Fail what is queued from the caller's thread: the worker may be busy, or gone."""
        while not self._jobs.empty():
            with contextlib.suppress(Empty):  # the worker may have been faster
                if entry := self._jobs.get_nowait():
                    self._serve(*entry)

    def _run(self, job: Job, operand: Operand | None) -> Array | None:
        if isinstance(job, ReadPages):
            return self._send(job, self._read_pages(job))
        assert operand is not None
        arrived = self._receive(job, operand)
        if isinstance(job, WritePages):
            return self._write_pages(job, arrived)
        return self._send(job, self._attend(job, arrived))

    def _attend(
        self, job: HostAttention, qkv_bjh: Float[np.ndarray, "b j h"]
    ) -> Float[Array, "b n h"]:
        start_sec = time.perf_counter()
        rows, num_rows = len(qkv_bjh), len(job.batch.positions_b)
        program = self._programs[ProgramKey("append_and_attend", (rows,))]
        tables_bm, lengths_b = _pack(job.batch, rows, self._programs.max_sequence_pages)
        pool = self._pools[job.layer]
        pool, out_bnh, _ = program(pool, qkv_bjh, tables_bm, lengths_b, np.int32(num_rows))
        self._pools[job.layer] = pool
        out_bnh.block_until_ready()
        self._span("host", job, start_sec, work=job, rows=num_rows, cohort=job.cohort_id)
        return out_bnh

    def _write_pages(self, job: WritePages, pages_ik2zh: Float[np.ndarray, "i k 2 z h"]) -> None:
        start_sec = time.perf_counter()
        program = self._programs[ProgramKey("write_pages", (len(pages_ik2zh),))]
        ids_i, num_pages = _pad(job.pages_i, len(pages_ik2zh))
        pool = program(self._pools[job.layer], pages_ik2zh, ids_i, num_pages)
        self._pools[job.layer] = pool
        pool.block_until_ready()
        self._span("host", job, start_sec, work=job, pages=int(num_pages))

    def _read_pages(self, job: ReadPages) -> Float[Array, "i k 2 z h"]:
        start_sec = time.perf_counter()
        count = smallest_that_holds(self._programs.read_pages, len(job.pages_i))
        program = self._programs[ProgramKey("read_pages", (count,))]
        ids_i, num_pages = _pad(job.pages_i, count)
        pages_ik2zh = program(self._pools[job.layer], ids_i, num_pages)
        pages_ik2zh.block_until_ready()
        self._span("host", job, start_sec, work=job, pages=int(num_pages))
        return pages_ik2zh

    def _receive(self, job: Job, operand: Operand) -> np.ndarray:
        """Wait for the copy to the host that was started when the operand was enqueued."""
        jax.block_until_ready(operand)  # until then the device computes it, and nothing travels
        start_sec = time.perf_counter()
        arrived = np.asarray(operand)
        self._span("to host", job, start_sec, bytes=arrived.nbytes)
        return arrived

    def _send(self, job: Job, result: Array) -> Array:
        start_sec = time.perf_counter()
        sent = jax.device_put(np.asarray(result), self._device)
        self._span("to device", job, start_sec, bytes=result.nbytes)
        return sent

    def _span(self, lane: str, job: Job, start_sec: float, **args: object) -> None:
        end_sec = time.perf_counter()
        self._on_span(lane, name_of(job), start_sec, end_sec, layer=job.layer, **args)


def load_host_op(host: HostConfig) -> HostOp:
    """Load and set up the attention op as the settings say; ConfigError where it cannot be."""
    try:
        return native_library.load(
            num_threads=host.threads,
            cpus=parse_cpus(host.cpus),
            numa_node=host.numa_node,
            isa=host.isa,
        )
    except (ValueError, FileNotFoundError, RuntimeError) as error:
        raise ConfigError(f"--config.host cannot be honoured: {error}") from None


def _pack(
    batch: DecodeBatch, rows: int, max_pages: int
) -> tuple[Int32[np.ndarray, "b m"], Int32[np.ndarray, "b"]]:
    """Return block tables and lengths, the new token included, of a padded batch."""
    tables_bm, lengths_b = np.zeros((rows, max_pages), np.int32), np.zeros(rows, np.int32)
    num_rows, num_pages = batch.block_table_bm.shape
    tables_bm[:num_rows, :num_pages] = batch.block_table_bm
    lengths_b[:num_rows] = batch.positions_b + 1
    return tables_bm, lengths_b


def _pad(pages_i: Int32[np.ndarray, "i"], count: int) -> tuple[Int32[np.ndarray, "j"], np.int32]:
    """Return page ids padded to a bucket, and how many there are."""
    padded_j = np.zeros(count, np.int32)
    padded_j[: len(pages_i)] = pages_i
    return padded_j, np.int32(len(pages_i))
