"""Predicted hardware on a virtual clock: schedules by the hundred, without compiling or waiting.

Owns when each stage and job would run: the device takes stages in order, the host jobs in order,
transfers overlap with both, and Python's clock moves with what it dispatches and waits for.
Computes nothing: every sampled token is 0. Deterministic. Called by the dispatch loop. Imports no
jax.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from apex_jax.cost_model import StageTimes
from apex_jax.hardware import (
    Boundary,
    DeviceAttention,
    Embed,
    Export,
    Handle,
    Head,
    HostAttention,
    Import,
    Job,
    Layers,
    PostAttention,
    PreAttention,
    ReadPages,
    Stage,
    StagedLayer,
    name_of,
)
from apex_jax.plan import DecodeBatch, PrefillBatch, Sampled


class Work(NamedTuple):
    """What the times of a group of rows rest on.

    rows: of linear work, a prompt's padding included. tokens: of KV that attention reads. pairs:
    of prompt tokens and tokens that they attend to.
    """

    rows: int = 0
    tokens: int = 0
    pairs: int = 0


@dataclass(eq=False, slots=True)
class SimulatedHandle:
    """ready_sec: when it will be ready; known at once, since nothing overtakes anything."""

    backend: "SimulatedBackend"
    ready_sec: float
    work: Work
    num_sampled: int = 0

    def read(self) -> Sampled:
        self.backend.wait_any([self], self.ready_sec)
        return Sampled(np.zeros(self.num_sampled, np.int32))


class SimulatedBackend:
    """One device, one host and the link between them.

    layers_per_program: of the Layers stage. on_span: gets (lane, name, start_sec, end_sec) of all
    that runs. noise: standard deviation of the logarithm of each time, drawn by `seed`.
    """

    def __init__(
        self,
        times: StageTimes,
        *,
        layers_per_program: int,
        page_size: int,
        on_span: Callable[..., None] | None = None,
        noise: float = 0.0,
        seed: int = 0,
    ):
        self._times = times
        self._span, self._page_size = layers_per_program, page_size
        self._on_span = on_span
        self._noise, self._random = noise, random.Random(seed)
        self._now_sec = 0.0
        self._device_free_sec = 0.0
        self._host_free_sec = 0.0

    def enqueue(self, stage: Stage, *operands: Handle) -> tuple[SimulatedHandle, ...]:
        self._now_sec += self._times.dispatch_sec
        groups = [_simulated(operand) for operand in operands]
        works, seconds = self._cost(stage, [group.work for group in groups])
        start_sec = max(
            self._now_sec, self._device_free_sec, *(group.ready_sec for group in groups)
        )
        end_sec = start_sec + self._noisy(self._times.stage_sec + seconds)
        self._device_free_sec = end_sec
        self._report("device", name_of(stage), start_sec, end_sec)
        if isinstance(stage, Head):
            counts = [len(batch.rows_b) for batch in stage.batches]
            return tuple(SimulatedHandle(self, end_sec, Work(), count) for count in counts)
        return tuple(SimulatedHandle(self, end_sec, work) for work in works)

    def submit_host(self, job: Job, operand: Handle | None = None) -> SimulatedHandle:
        times = self._times
        self._now_sec += times.dispatch_sec
        work, arrival_sec, back_sec = Work(), self._now_sec, 0.0
        if isinstance(job, HostAttention):
            work = _work(job.batch)
            seconds = times.host_attention(work.rows, work.tokens)
            moving_sec = back_sec = times.transfer(num_rows=work.rows)
        else:
            num_tokens = len(job.pages_i) * self._page_size
            seconds, moving_sec = times.host_copy(num_tokens), times.transfer(num_tokens=num_tokens)
            back_sec = moving_sec if isinstance(job, ReadPages) else 0.0
        if operand is not None:
            left_sec = _simulated(operand).ready_sec
            arrival_sec = max(arrival_sec, left_sec + self._noisy(moving_sec))
            self._report("to host", name_of(job), left_sec, arrival_sec)
        start_sec = max(arrival_sec, self._host_free_sec)
        end_sec = start_sec + self._noisy(seconds)
        self._host_free_sec = end_sec
        self._report("host", name_of(job), start_sec, end_sec)
        if not back_sec:
            return SimulatedHandle(self, end_sec, work)
        ready_sec = end_sec + self._noisy(back_sec)
        self._report("to device", name_of(job), end_sec, ready_sec)
        return SimulatedHandle(self, ready_sec, work)

    def wait_any(self, handles: Sequence[Handle], deadline_sec: float) -> Handle | None:
        first = min((_simulated(handle) for handle in handles), key=lambda one: one.ready_sec)
        if first.ready_sec <= max(self._now_sec, deadline_sec):
            self._now_sec = max(self._now_sec, first.ready_sec)
            return first
        self._now_sec = max(self._now_sec, deadline_sec)
        return None

    def now(self) -> float:
        return self._now_sec

    def _cost(self, stage: Stage, works: list[Work]) -> tuple[list[Work], float]:
        """Return the work that each group goes on with, and the stage's seconds."""
        times = self._times
        num_rows = sum(work.rows for work in works)
        match stage:
            case Embed():
                return [_work(stage.batch)], 0.0
            case Boundary():
                return works, times.linear(num_rows)
            case DeviceAttention():
                return works, self._attention(works)
            case Layers():
                return works, self._span * (times.linear(num_rows) + self._attention(works))
            case PreAttention():
                return works, times.pre_share * times.linear(num_rows)
            case PostAttention():
                return works, (1 - times.pre_share) * times.linear(num_rows)
            case StagedLayer():
                return works, times.linear(num_rows) + self._attention(works)
            case Head():
                return [], times.head_sec
            case Export() | Import():
                # A copy within the device's memory: KV is read, and written.
                num_tokens = len(stage.pages_i) * self._page_size
                return [Work()], 2 * times.device_attention_sec_per_token * num_tokens

    def _attention(self, works: list[Work]) -> float:
        return sum(self._times.device_attention(work.tokens, work.pairs) for work in works)

    def _noisy(self, seconds: float) -> float:
        return seconds * self._random.lognormvariate(0.0, self._noise) if self._noise else seconds

    def _report(self, lane: str, name: str, start_sec: float, end_sec: float) -> None:
        if self._on_span is not None:
            self._on_span(lane, name, start_sec, end_sec)


def _work(batch: DecodeBatch | PrefillBatch) -> Work:
    if isinstance(batch, DecodeBatch):
        num_rows = len(batch.positions_b)
        return Work(num_rows, int(batch.positions_b.sum()) + num_rows)
    # Token i of a chunk attends to all before the chunk and to i + 1 of its own.
    lengths_b, starts_b = batch.lengths_b.astype(np.int64), batch.starts_b.astype(np.int64)
    pairs_b = lengths_b * starts_b + lengths_b * (lengths_b + 1) // 2
    return Work(batch.token_ids_bt.size, int((starts_b + lengths_b).sum()), int(pairs_b.sum()))


def _simulated(handle: Handle) -> SimulatedHandle:
    assert isinstance(handle, SimulatedHandle)
    return handle
