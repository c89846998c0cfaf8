"""Engines of several strategies in one process, over the same weights, pools and programs.

Owns what a comparison needs beside an engine: other limits over the same arrays, a backend that
says which rows each stage had, and prompts whose computing may be left
out. Engines are used one after the other. Called by the measurements that compare strategies.
"""

import dataclasses
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp

from apex_jax.backends.handles import HiddenHandle
from apex_jax.backends.xla import XlaBackend
from apex_jax.buckets import Buckets
from apex_jax.config import Config, SchedulerConfig
from apex_jax.cost_model import Times
from apex_jax.decisions import DecisionRecord
from apex_jax.dispatch import Dispatch
from apex_jax.engine import Engine
from apex_jax.hardware import Handle, Job, Layers, Stage, StagedLayer, name_of
from apex_jax.memory import MAX_TRANSIT_PAGES
from apex_jax.plan import PrefillBatch
from apex_jax.policies import Policy
from apex_jax.scheduler import Scheduler
from apex_jax.strategies import make_policy
from apex_jax.timeline import Timeline
from apex_jax.trace import LANES, Event, TraceFile

STRATEGIES = {
    "device_only": SchedulerConfig(strategy="device_only"),
    "full_offload": SchedulerConfig(strategy="full_offload"),
    "asymmetric_pipelining": SchedulerConfig(strategy="asymmetric_pipelining"),
    "async_overlap": SchedulerConfig(strategy="async_overlap"),
    "staggered_2": SchedulerConfig(strategy="staggered", cohorts=2),
    "staggered_4": SchedulerConfig(strategy="staggered", cohorts=4),
    "passes_2": SchedulerConfig(strategy="passes", cohorts=2, passes=2),
    "passes_4": SchedulerConfig(strategy="passes", cohorts=2, passes=4),
    "apex": SchedulerConfig(strategy="apex"),
}


class Span(NamedTuple):
    """lane, name, start_sec, end_sec: as a timeline takes them. args: with layer, rows, ..."""

    lane: str
    name: str
    start_sec: float
    end_sec: float
    args: dict[str, object]


class SpanKeeper(Timeline):
    """A timeline whose spans can be read again, by lane and in the order of their ends."""

    def __init__(self) -> None:
        super().__init__()
        self.lanes: dict[str, list[Span]] = {lane: [] for lane in LANES}

    def span(
        self,
        lane: str,
        name: str,
        start_sec: float,
        end_sec: float,
        work: object = None,
        **args: object,
    ) -> None:
        super().span(lane, name, start_sec, end_sec, work, **args)
        self.lanes[lane].append(Span(lane, name, start_sec, end_sec, args))

    def write_trace(self, path: Path, from_sec: float, to_sec: float) -> None:
        """Write the spans of a while to a file of their own, for launch.plot_timeline."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
        trace = TraceFile(path, origin_sec=from_sec)
        for spans in self.lanes.values():
            for span in spans:
                if from_sec <= span.start_sec and span.end_sec <= to_sec:
                    trace.add(Event(*span))
        trace.close()


class WatchedBackend:
    """A backend that is looked at while it works.

    labels: a name for each stage so far, with the rows of its groups: `boundary 4+16`; the
    timeline's device spans come in the same order. computes_prompts: False leaves the layers of
    prompts out, so that a long context costs no more than its pages (which hold zeros).
    """

    def __init__(self, backend: XlaBackend, shapes: Buckets, *, computes_prompts: bool):
        self._backend, self._shapes = backend, shapes
        self.now, self.wait_any = backend.now, backend.wait_any
        self.computes_prompts = computes_prompts
        self.labels: list[str] = []
        self._last_stage: Handle | None = None
        self._last_job: Handle | None = None

    def enqueue(self, stage: Stage, *operands: Handle) -> tuple[Handle, ...]:
        is_prompt = isinstance(stage, StagedLayer) or (
            isinstance(stage, Layers) and isinstance(stage.batch, PrefillBatch)
        )
        if is_prompt and not self.computes_prompts:
            return (self._as_if_computed(*operands),)
        handles = self._backend.enqueue(stage, *operands)
        self._last_stage = handles[-1]
        rows = [str(len(x)) for one in operands if (x := getattr(one, "x", None)) is not None]
        self.labels.append(f"{name_of(stage)} {'+'.join(rows)}".strip())
        return handles

    def submit_host(self, job: Job, operand: Handle | None = None) -> Handle:
        self._last_job = self._backend.submit_host(job, operand)
        return self._last_job

    def finish(self) -> None:
        """Wait for all that is under way."""
        last = [one for one in (self._last_stage, self._last_job) if one is not None]
        for handle in last:
            self._backend.wait_any([handle], self.now() + 60.0)

    def _as_if_computed(self, hidden: Handle) -> Handle:
        """Return what a prompt's layers would: some hidden state for its head."""
        assert isinstance(hidden, HiddenHandle)
        rows, _, width = hidden.x.shape
        rows = self._shapes.head_rows(rows)
        zeros_bd = jnp.zeros((rows, width), hidden.x.dtype, device=hidden.x.device)
        return HiddenHandle(hidden.x, zeros_bd, hidden.arrays)


Watch = Callable[[XlaBackend, Buckets, jax.Device], WatchedBackend]


class Started(NamedTuple):
    """An engine, and what can be asked about it."""

    engine: Engine
    scheduler: Scheduler
    dispatch: Dispatch


class SharedEngine:
    """One engine's arrays and programs, for every strategy in turn.

    config: its strategy decides about the programs; async_overlap has them for all. watch: makes
    the backend that all engines use. timeline: holds the spans of all engines.
    """

    def __init__(self, config: Config, on_progress: Callable[[str], None], watch: Watch):
        self.timeline = SpanKeeper()
        self.config = config
        self.whole = Engine.create(config, on_progress, self.timeline)
        inner = self.whole._dispatch._backend
        assert isinstance(inner, XlaBackend)
        self.backend = watch(inner, self.whole.programs.buckets, self.device)
        profiler = self.whole.profiler
        assert profiler is not None
        calibrated = profiler.calibrate()  # of idle hardware
        self.measurements = calibrated.measurements
        self.times: Times = calibrated  # predicting strategies go by them

    def make_policy(self, settings: SchedulerConfig) -> Policy:
        return make_policy(settings, self.times, self.whole.programs.num_layers)

    @property
    def device(self) -> jax.Device:
        return self.whole._device

    def start(self, policy: Policy, num_pages: int) -> "Started":
        """Return an engine of a strategy, with so many of the device's pages."""
        whole, has_host = self.whole, policy.max_cohorts > 0
        shapes, memory = whole.programs.buckets, whole.memory
        architecture = whole.model.architecture
        scheduler = Scheduler(
            buckets=shapes if has_host else dataclasses.replace(shapes, host=None),
            num_layers=architecture.num_layers,
            num_pages=num_pages,
            max_requests=self.config.scheduler.max_requests,
            max_model_len=memory.max_model_len,
            vocab_size=architecture.vocab_size,
            eos_token_ids=frozenset(),
            policy=policy,
            num_host_pages=memory.num_host_pages if has_host else 0,
            max_host_requests=self.config.scheduler.max_host_requests if has_host else 0,
        )
        dispatch = Dispatch(
            self.backend,
            policy,
            num_layers=architecture.num_layers,
            layers_per_program=whole.programs.num_layers,
            watchdog_sec=self.config.scheduler.watchdog_sec,
            max_transit_pages=MAX_TRANSIT_PAGES,
        )
        engine = Engine(
            whole.model,
            scheduler,
            dispatch,
            whole.programs,
            memory,
            whole._device,
            self.timeline,
            whole._workers,
            whole._setup_sec,
            DecisionRecord(policy, None),
        )
        return Started(engine, scheduler, dispatch)

    def finish(self) -> None:
        """Wait for all that is under way, and until the timeline knows of it."""
        self.backend.finish()
        while len(self.timeline.lanes["device"]) < len(self.backend.labels):
            time.sleep(1e-3)

    def close(self) -> None:
        self.whole.close()


def use_two_cpu_devices(*, one_core_each: bool) -> None:
    """Let one CPU device stand in for the accelerator, beside the host's; before jax starts.

    one_core_each: the stand-in's threads stay on the first core, whose number is the lowest.
    """
    jax.config.update("jax_num_cpu_devices", 2)
    if not one_core_each:
        return
    flags = os.environ.get("XLA_FLAGS", "")
    os.environ["XLA_FLAGS"] = f"{flags} --xla_cpu_multi_thread_eigen=false".strip()
    cpus = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(cpus)})  # XLA's threads, which start now, keep it
    jax.devices("cpu")
    os.sched_setaffinity(0, cpus)
