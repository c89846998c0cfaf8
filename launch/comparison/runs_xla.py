"""Turns on the real engine: one set of weights, pools and programs for all strategies.

Owns the engine that they share. Every strategy runs the programs that were compiled for all of
them, a device-only one too, so that a comparison is of schedules. Called by run_benchmark.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

from apex_jax.backends.simulated import SimulatedBackend
from apex_jax.backends.xla import XlaBackend
from apex_jax.config import Config, SchedulerConfig
from apex_jax.cost_model import Times
from apex_jax.decisions import DecisionRecord
from apex_jax.dispatch import Dispatch
from apex_jax.engine import Engine
from apex_jax.hardware import Backend
from apex_jax.memory import MAX_TRANSIT_PAGES
from apex_jax.monitor import StageMonitor
from apex_jax.policies import Policy
from apex_jax.profiling.table import measurements_to_json
from apex_jax.scheduler import Scheduler
from apex_jax.strategies import make_policy
from apex_jax.sweep_loop import SweepLoop
from apex_jax.timeline import Timeline
from launch.comparison.results import Budgets, ModelUsed
from launch.comparison.runs import Started
from launch.comparison.runs_described import idle_until


class RealHardware:
    """An engine whose arrays and programs the strategies use in turn.

    config: its strategy decides about the programs; async_overlap has them for all, device_only
    for itself alone.
    """

    is_virtual = False
    warm_up = (
        "Before the first turn all programs were compiled, stage times were measured (or read from "
        "a kept profile), and each strategy served the first requests of the workload."
    )

    def __init__(self, config: Config, on_progress: Callable[[str], None]):
        self._config, self._timeline = config, Timeline()
        self._engine = Engine.create(config, on_progress, self._timeline)
        backend = self._engine._dispatch._backend
        assert isinstance(backend, XlaBackend)
        self._backend = backend
        profiler = self._engine.profiler
        assert profiler is not None
        self._measured = profiler.times(config.profile, on_progress)

    @property
    def times(self) -> Times:
        return self._measured

    @property
    def model(self) -> ModelUsed:
        model = self._engine.model
        return ModelUsed(model.name, model.dtype, model.fingerprint)

    @property
    def budgets(self) -> Budgets:
        memory = self._engine.memory
        return Budgets(memory.pool_bytes, memory.host_pool_bytes or None)

    @property
    def layers_per_program(self) -> int:
        return self._engine.programs.num_layers

    def describe(self) -> str:
        return self._engine.describe()

    def described_times(self) -> dict[str, Any]:
        return measurements_to_json(self._measured.measurements)

    def start(self, settings: SchedulerConfig) -> Started:
        """Return a loop as the engine has it for this strategy, which corrects times for itself."""
        num_layers = self._engine.programs.num_layers
        monitor = StageMonitor(self.times, num_layers) if settings.predicts else None
        self._timeline.on_end = None if monitor is None else monitor.ended
        times = self.times if monitor is None else monitor.times
        loop = self._loop(
            self._backend, make_policy(settings, times, num_layers), monitor, self._timeline
        )
        return Started(loop, self._backend.now, idle_until)

    def predict(self, settings: SchedulerConfig) -> Started:
        num_layers = self._engine.programs.num_layers
        backend = SimulatedBackend(
            self.times, layers_per_program=num_layers, page_size=self._engine.memory.page_size
        )
        policy = make_policy(settings, self.times, num_layers)
        return Started(self._loop(backend, policy), backend.now, backend.idle_until)

    def prepare_turn(self) -> None:
        """What the times were corrected by is forgotten with each turn's own monitor."""

    def close(self) -> None:
        self._engine.close()

    def _loop(
        self,
        backend: Backend,
        policy: Policy,
        monitor: StageMonitor | None = None,
        timeline: Timeline | None = None,
    ) -> SweepLoop:
        engine, has_host = self._engine, policy.max_cohorts > 0
        memory, shapes = engine.memory, engine.programs.buckets
        architecture, limits = engine.model.architecture, self._config.scheduler
        scheduler = Scheduler(
            buckets=shapes if has_host else dataclasses.replace(shapes, host=None),
            num_layers=architecture.num_layers,
            num_pages=memory.num_pages,
            max_requests=limits.max_requests,
            max_model_len=memory.max_model_len,
            vocab_size=architecture.vocab_size,
            eos_token_ids=frozenset(),
            policy=policy,
            num_host_pages=memory.num_host_pages if has_host else 0,
            max_host_requests=limits.max_host_requests if has_host else 0,
            reuses_prefixes=self._config.cache.prefix_reuse,
        )
        dispatch = Dispatch(
            backend,
            policy,
            num_layers=architecture.num_layers,
            layers_per_program=engine.programs.num_layers,
            watchdog_sec=limits.watchdog_sec,
            max_transit_pages=MAX_TRANSIT_PAGES,
            transit_sizes=shapes.host.transit_pages if shapes.host else (),
        )
        return SweepLoop(
            scheduler, dispatch, DecisionRecord(policy, monitor), backend.now, timeline
        )
