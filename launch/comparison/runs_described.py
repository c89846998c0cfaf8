"""Turns on a described device: beside a described host on a virtual clock, or beside the real one.

Owns the two kinds of hardware that need no weights, and how their sizes follow from profiles.
Called by run_benchmark.
"""

import dataclasses
import time
from typing import Any

from apex_jax.backends.simulated import SimulatedBackend
from apex_jax.config import Config, ConfigError, SchedulerConfig
from apex_jax.cost_model import StageTimes
from apex_jax.hardware_profiles import GIB, DeviceProfile, HostProfile, stage_times
from apex_jax.monitor import StageMonitor
from apex_jax.paced_engine import PacedPlan
from apex_jax.pages import num_pages_for
from apex_jax.stage_costs import StageCosts
from apex_jax.strategies import make_policy
from apex_jax.timeline import Timeline
from launch.comparison.results import Budgets, ModelUsed
from launch.comparison.runs import Started
from launch.conditions import RESERVE_BYTES
from launch.paced_host import HostMeter

NUM_MEASURED = 3  # times the host is timed before the first turn


def plan_of(config: Config, device: DeviceProfile, host: HostProfile | None) -> PacedPlan:
    """Return the sizes of a run; ConfigError where they cannot be.

    The config's budgets hold; where it has none, the device gives what the weights leave. host:
    whose memory bounds the host lane; None for this machine's.
    """
    model = config.model.architecture
    if model is None:
        raise ConfigError(
            "a described device needs the model's shape: --config=configs/llama_2_7b.py has one, "
            "and so have others in configs/"
        )
    itemsize = 4 if config.model.dtype == "float32" else 2
    left_bytes = device.kv_bytes(model, itemsize, RESERVE_BYTES)
    cache = dataclasses.replace(config.cache)
    cache.device_bytes = left_bytes if cache.device_bytes is None else cache.device_bytes
    if cache.device_bytes > left_bytes:
        raise ConfigError(
            f"--config.cache.device_bytes is {cache.device_bytes}; {device.name} has {left_bytes} "
            f"beside the weights ({left_bytes / GIB:.2f} GiB)"
        )
    if host is not None and (cache.host_bytes or 0) > host.memory_bytes:
        raise ConfigError(
            f"--config.cache.host_bytes is {cache.host_bytes}; {host.name} has "
            f"{host.memory_bytes} bytes of memory"
        )
    if host is not None and cache.host_bytes is None:
        cache.host_bytes = int(0.8 * host.memory_bytes)
    without = dataclasses.replace(config.model, weights="dummy")  # nothing is loaded
    plan = PacedPlan.create(dataclasses.replace(config, cache=cache, model=without))
    if host is None:
        plan.check_host_memory()
    return plan


class SimulatedHardware:
    """A described device beside a described host, on a virtual clock."""

    warm_up = "Nothing warms up on a virtual clock."
    is_virtual = True

    def __init__(self, plan: PacedPlan, times: StageTimes, name: str):
        """name: of the model."""
        self._plan, self._name = plan, name
        self.times = times

    @property
    def model(self) -> ModelUsed:
        return ModelUsed(self._name, self._plan.dtype.name, None)

    @property
    def budgets(self) -> Budgets:
        plan = self._plan
        host_bytes = plan.num_host_pages * plan.page_bytes
        return Budgets(plan.num_pages * plan.page_bytes, host_bytes or None)

    def describe(self) -> str:
        return self._plan.describe()

    def described_times(self) -> dict[str, Any]:
        return dataclasses.asdict(self.times)

    @property
    def layers_per_program(self) -> int:
        return self._plan.layers_per_program

    def start(self, settings: SchedulerConfig) -> Started:
        plan = self._plan
        backend = SimulatedBackend(
            self.times,
            layers_per_program=plan.layers_per_program,
            page_size=plan.shapes.page_size,
        )
        policy = make_policy(settings, self.times, plan.layers_per_program)
        loop = plan.loop(backend, policy, reuses_prefixes=plan.config.cache.prefix_reuse)
        return Started(loop, backend.now, backend.idle_until)

    predict = start

    def prepare_turn(self) -> None:
        """A virtual clock has nothing to measure."""

    def close(self) -> None:
        """Nothing was taken."""


class PacedHardware:
    """A described device beside this machine's CPU, memory and host op, on the real clock.

    Strategies go by the device's described times and the host's measured ones.
    """

    warm_up = (
        "Before the first turn every page of the host's pool was written, the host's jobs were "
        "timed, and each strategy served the first requests of the workload."
    )
    is_virtual = False

    def __init__(self, plan: PacedPlan, described: StageTimes, name: str, mean_tokens: int):
        """described: also of a host, until it is measured. mean_tokens: of a request's KV."""
        self._plan, self._simulated = plan, SimulatedHardware(plan, described, name)
        costs = StageCosts(
            described,
            layers_per_program=plan.layers_per_program,
            page_size=plan.shapes.page_size,
        )
        self._timeline = Timeline()
        self._backend = plan.paced_backend(costs, self._timeline.span)
        self._meter: HostMeter | None = None
        if plan.shapes.host is not None:
            self._meter = HostMeter(self._backend, plan, _timed_cohorts(plan, mean_tokens))
            for _ in range(NUM_MEASURED):
                self._meter.measure()
            self._simulated.times = self._meter.apply(described)

    @property
    def times(self) -> StageTimes:
        return self._simulated.times

    @property
    def model(self) -> ModelUsed:
        return self._simulated.model

    @property
    def budgets(self) -> Budgets:
        return self._simulated.budgets

    def describe(self) -> str:
        return self._plan.describe()

    def described_times(self) -> dict[str, Any]:
        return self._simulated.described_times()

    @property
    def layers_per_program(self) -> int:
        return self._plan.layers_per_program

    def start(self, settings: SchedulerConfig) -> Started:
        """Return a loop as an engine has it for this strategy, which corrects times for itself."""
        plan, span = self._plan, self._plan.layers_per_program
        monitor = StageMonitor(self.times, span) if settings.predicts else None
        self._timeline.on_end = None if monitor is None else monitor.ended
        policy = make_policy(settings, self.times if monitor is None else monitor.times, span)
        reuses_prefixes = plan.config.cache.prefix_reuse
        loop = plan.loop(self._backend, policy, reuses_prefixes=reuses_prefixes, monitor=monitor)
        return Started(loop, self._backend.now, idle_until)

    def predict(self, settings: SchedulerConfig) -> Started:
        return self._simulated.start(settings)

    def prepare_turn(self) -> None:
        """Time the host again: the machine may not be what it was."""
        if self._meter is not None:
            self._meter.measure()
            self._simulated.times = self._meter.apply(self.times)

    def close(self) -> None:
        self._backend.close()


def simulated(
    config: Config, device: DeviceProfile, host: HostProfile, name: str
) -> SimulatedHardware:
    """Return simulated hardware; ConfigError where it cannot be."""
    plan = plan_of(config, device, host)
    return SimulatedHardware(plan, stage_times(plan.model, plan.dtype.itemsize, device, host), name)


def paced(
    config: Config, device: DeviceProfile, first_guess: HostProfile, name: str, mean_tokens: int
) -> PacedHardware:
    """Return paced hardware; ConfigError where it cannot be.

    first_guess: of this machine's host, which is timed where there is a host lane.
    """
    plan = plan_of(config, device, None)
    described = stage_times(plan.model, plan.dtype.itemsize, device, first_guess)
    return PacedHardware(plan, described, name, mean_tokens)


def idle_until(now_sec: float) -> None:
    """Sleep until the real clock says so."""
    while (left_sec := now_sec - time.perf_counter()) > 0:
        time.sleep(left_sec)


def _timed_cohorts(plan: PacedPlan, mean_tokens: int) -> list[tuple[int, int]]:
    """Return (rows, tokens) of cohorts of different sizes that the pool holds."""
    assert plan.shapes.host is not None
    tokens = min(mean_tokens, plan.max_model_len)
    most_rows = plan.num_host_pages // num_pages_for(tokens, plan.shapes.page_size)
    rows = max(1, min(most_rows, plan.shapes.host.cohort_rows[-1]))
    if rows >= 4:
        return [(rows, tokens), (rows // 2, tokens), (rows // 4, tokens)]
    return [(rows, tokens), (rows, max(1, tokens // 2))]
