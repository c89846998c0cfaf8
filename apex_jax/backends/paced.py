"""A described device beside the real host, on the real clock: how schedules behave on a card that
is not there.

Owns when each device stage would run: one behind the other, each for as long as its costs say. The
host lane is the real one, on KV of the real size; its jobs begin when their operands would have
arrived. There are no weights and no logits: every sampled token is 0. Called by the dispatch loop.
"""

import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, cast

import numpy as np

from apex_jax.backends.completions import Completions, SpanRecorder
from apex_jax.backends.host_lane import HostFuture, HostLane
from apex_jax.buckets import Buckets, smallest_that_holds
from apex_jax.config import LlamaConfig
from apex_jax.hardware import Handle, Head, HostAttention, Job, Stage, WritePages
from apex_jax.plan import Sampled
from apex_jax.stage_costs import StageCosts, Work


class DeviceStream:
    """When the stages of a device run, which takes them in order.

    The schedule is absolute: a stage begins when it was asked for, its operands were there and the
    one before had ended, whenever it is that a thread wakes up and sees it. Delays do not add up.
    """

    def __init__(self) -> None:
        self._free_sec = 0.0

    def append(
        self, seconds: float, asked_sec: float, operands_sec: Sequence[float]
    ) -> tuple[float, float]:
        """Return when a stage begins and ends that takes so many seconds."""
        start_sec = max(asked_sec, self._free_sec, *operands_sec)
        self._free_sec = start_sec + seconds
        return start_sec, self._free_sec


@dataclass(eq=False, slots=True)
class StageHandle:
    """What a device stage yields; it is its own marker.

    ready_sec: when it has ended, on time.perf_counter: known at once, since it waits for nobody.
    """

    ready_sec: float
    work: Work
    num_sampled: int = 0

    @property
    def marker(self) -> "StageHandle":
        return self

    def is_ready(self) -> bool:
        return time.perf_counter() >= self.ready_sec

    def block_until_ready(self) -> None:
        _sleep_until(self.ready_sec)

    def read(self) -> Sampled:
        self.block_until_ready()
        return Sampled(np.zeros(self.num_sampled, np.int32))


@dataclass(eq=False, slots=True)
class JobHandle:
    """What a host job yields. marker: yields when the result is there for the device."""

    marker: Future[float]
    work: Work

    @property
    def ready_sec(self) -> float:
        """When the device may use the result; waits for the job, raises what made it fail."""
        return self.marker.result()

    def read(self) -> Sampled:
        raise TypeError("a host job yields no tokens; read a Head stage's")


@dataclass(frozen=True, slots=True)
class _Arriving:
    """A job's operand: values that reach the host when those of a real device would."""

    left_sec: float
    arrival_sec: float
    values: np.ndarray

    def block_until_ready(self) -> None:
        _sleep_until(self.left_sec)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        _sleep_until(self.arrival_sec)
        return self.values


class PacedBackend:
    """One described device and the host's real lane.

    costs: of the device's stages and of the link; what they say of the host is not asked. on_span:
    gets the device's stages as they were scheduled, each with `seen_sec`: how long after its end a
    thread saw it. host_lane, operands: what stands in for the rows and pages of the device; None
    where there is no host lane.
    """

    def __init__(
        self,
        costs: StageCosts,
        *,
        on_span: SpanRecorder,
        host_lane: HostLane | None = None,
        operands: "DummyOperands | None" = None,
    ):
        self._costs, self._on_span = costs, on_span
        self._stream = DeviceStream()
        self._scheduled: deque[tuple[float, float]] = deque()  # spans not seen to end
        self._completions = Completions(self._see_end)
        self._host_lane, self._operands = host_lane, operands

    def enqueue(self, stage: Stage, *operands: Handle) -> tuple[StageHandle, ...]:
        begin_sec = time.perf_counter()
        groups = [_own(operand) for operand in operands]
        works, seconds = self._costs.of_stage(stage, [group.work for group in groups])
        ready_sec = [group.ready_sec for group in groups]
        asked_sec = self._dispatched(begin_sec)
        span = self._stream.append(seconds, asked_sec, ready_sec)
        self._scheduled.append(span)
        if isinstance(stage, Head):
            counts = [len(batch.rows_b) for batch in stage.batches]
            handles = tuple(StageHandle(span[1], Work(), count) for count in counts)
        else:
            handles = tuple(StageHandle(span[1], work) for work in works)
        self._completions.enqueued(handles[-1], stage, begin_sec)
        return handles

    def submit_host(self, job: Job, operand: Handle | None = None) -> JobHandle:
        assert self._host_lane is not None
        assert self._operands is not None
        begin_sec = time.perf_counter()
        cost = self._costs.of_job(job)
        arriving = None
        if operand is not None:
            left_sec = _own(operand).ready_sec
            values = self._operands.of(job)
            arriving = _Arriving(left_sec, left_sec + cost.moving_sec, values)
        result = self._host_lane.submit(job, arriving)
        handle = JobHandle(_with_way_back(result, cost.back_sec), cost.work)
        self._completions.submitted(handle)
        self._dispatched(begin_sec)
        return handle

    def wait_any(self, handles: Sequence[Handle], deadline_sec: float) -> Handle | None:
        own = cast(Sequence[StageHandle | JobHandle], handles)
        return self._completions.wait_any(own, deadline_sec)

    def now(self) -> float:
        return time.perf_counter()

    def describe(self) -> str:
        """Return what device and host do, for whoever finds that nothing moves."""
        workers = (self._completions, self._host_lane)
        return "; ".join(worker.describe() for worker in workers if worker is not None)

    def close(self) -> None:
        """End the threads and free the host's memory."""
        if self._host_lane is not None:
            self._host_lane.close()
        self._completions.close()

    def _dispatched(self, begin_sec: float) -> float:
        """Spend what Python would on starting a program, and return when that is done.

        It keeps the interpreter busy, as starting one does.
        """
        end_sec = begin_sec + self._costs.times.dispatch_sec
        while (now_sec := time.perf_counter()) < end_sec:
            pass
        return now_sec

    def _see_end(
        self, lane: str, name: str, start_sec: float, end_sec: float, **args: object
    ) -> None:
        scheduled = self._scheduled.popleft()
        self._on_span(lane, name, *scheduled, seen_sec=end_sec - scheduled[1], **args)


class DummyOperands:
    """What travels to the host in place of rows and pages: finite, and not all alike."""

    def __init__(self, model: LlamaConfig, dtype: np.dtype, shapes: Buckets):
        assert shapes.host is not None
        self._rows, self._pages = shapes.host.cohort_rows, shapes.host.transit_pages
        kv_heads, head_dim = model.num_kv_heads, model.head_dim
        rng = np.random.default_rng(0)

        def draw(*shape: int) -> np.ndarray:
            return rng.standard_normal(shape, np.float32).astype(dtype)

        self._qkv_bjh = draw(self._rows[-1], model.num_heads + 2 * kv_heads, head_dim)
        self._pages_ik2zh = draw(self._pages[-1], kv_heads, 2, shapes.page_size, head_dim)

    def of(self, job: Job) -> np.ndarray:
        """Return values for the bucket that holds the job's rows or pages."""
        if isinstance(job, HostAttention):
            return self._qkv_bjh[: smallest_that_holds(self._rows, len(job.batch.positions_b))]
        assert isinstance(job, WritePages)
        return self._pages_ik2zh[: smallest_that_holds(self._pages, len(job.pages_i))]


def _with_way_back(result: HostFuture, back_sec: float) -> Future[float]:
    """Return what yields when a job's result has reached the device, as soon as it has left."""
    there: Future[float] = Future()

    def leave(ended: HostFuture) -> None:
        error = ended.exception()
        if error is not None:
            there.set_exception(error)
        else:
            there.set_result(time.perf_counter() + back_sec)

    result.add_done_callback(leave)
    return there


def _sleep_until(at_sec: float) -> None:
    while (left_sec := at_sec - time.perf_counter()) > 0:
        time.sleep(left_sec)


def _own(handle: Handle) -> StageHandle | JobHandle:
    assert isinstance(handle, StageHandle | JobHandle)
    return handle
