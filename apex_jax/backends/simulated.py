"""Predicted hardware on a virtual clock: schedules by the hundred, without compiling or waiting.

Owns when each stage and job would run: the device takes stages in order, the host jobs in order,
transfers overlap with both, and Python's clock moves with what it dispatches and waits for.
Computes nothing: every sampled token is 0. Deterministic. Called by the dispatch loop. Imports no
jax.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from apex_jax.cost_model import Times
from apex_jax.hardware import Handle, Head, Job, Stage, name_of
from apex_jax.plan import Sampled
from apex_jax.stage_costs import StageCosts, Work


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
    that runs, and as `work` the stage or job itself. noise: standard deviation of the logarithm of
    each time, drawn by `seed`.
    """

    def __init__(
        self,
        times: Times,
        *,
        layers_per_program: int,
        page_size: int,
        on_span: Callable[..., None] | None = None,
        noise: float = 0.0,
        seed: int = 0,
    ):
        self._costs = StageCosts(times, layers_per_program=layers_per_program, page_size=page_size)
        self._dispatch_sec = times.dispatch_sec
        self._on_span = on_span
        self._noise, self._random = noise, random.Random(seed)
        self._now_sec = 0.0
        self._device_free_sec = 0.0
        self._host_free_sec = 0.0

    def enqueue(self, stage: Stage, *operands: Handle) -> tuple[SimulatedHandle, ...]:
        self._now_sec += self._dispatch_sec
        works: list[Work] = []
        start_sec = max(self._now_sec, self._device_free_sec)
        for operand in operands:
            assert isinstance(operand, SimulatedHandle)
            works.append(operand.work)
            start_sec = max(start_sec, operand.ready_sec)
        works, seconds = self._costs.of_stage(stage, works)
        end_sec = start_sec + (self._noisy(seconds) if self._noise else seconds)
        self._device_free_sec = end_sec
        if self._on_span is not None:
            self._report("device", stage, start_sec, end_sec)
        if isinstance(stage, Head):
            counts = [len(batch.rows_b) for batch in stage.batches]
            return tuple(SimulatedHandle(self, end_sec, Work(), count) for count in counts)
        return tuple(SimulatedHandle(self, end_sec, work) for work in works)

    def submit_host(self, job: Job, operand: Handle | None = None) -> SimulatedHandle:
        self._now_sec += self._dispatch_sec
        work, seconds, moving_sec, back_sec = self._costs.of_job(job)
        arrival_sec = self._now_sec
        if operand is not None:
            assert isinstance(operand, SimulatedHandle)
            left_sec = operand.ready_sec
            arrival_sec = max(arrival_sec, left_sec + self._noisy(moving_sec))
            self._report("to host", job, left_sec, arrival_sec)
        start_sec = max(arrival_sec, self._host_free_sec)
        end_sec = start_sec + self._noisy(seconds)
        self._host_free_sec = end_sec
        self._report("host", job, start_sec, end_sec)
        if not back_sec:
            return SimulatedHandle(self, end_sec, work)
        ready_sec = end_sec + self._noisy(back_sec)
        self._report("to device", job, end_sec, ready_sec)
        return SimulatedHandle(self, ready_sec, work)

    def wait_any(self, handles: Sequence[Handle], deadline_sec: float) -> Handle | None:
        first: SimulatedHandle | None = None
        for handle in handles:
            assert isinstance(handle, SimulatedHandle)
            if first is None or handle.ready_sec < first.ready_sec:
                first = handle
        assert first is not None
        if first.ready_sec > deadline_sec and first.ready_sec > self._now_sec:
            self._now_sec = max(self._now_sec, deadline_sec)
            return None
        self._now_sec = max(self._now_sec, first.ready_sec)
        return first

    def now(self) -> float:
        return self._now_sec

    def idle_until(self, now_sec: float) -> None:
        """Let time pass in which nobody asks for anything."""
        self._now_sec = max(self._now_sec, now_sec)

    def _noisy(self, seconds: float) -> float:
        return seconds * self._random.lognormvariate(0.0, self._noise) if self._noise else seconds

    def _report(self, lane: str, work: Stage | Job, start_sec: float, end_sec: float) -> None:
        if self._on_span is None:
            return
        if lane in ("device", "host"):
            self._on_span(lane, name_of(work), start_sec, end_sec, work=work)
        else:
            self._on_span(lane, name_of(work), start_sec, end_sec)
