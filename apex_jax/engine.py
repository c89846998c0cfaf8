"""The engine: a model, its memory and its programs, driven by the sweep loop.

Owns the set-up: what goes where, printed before work starts, and the threads beside Python's own.
Refuses settings that cannot be honoured. Called by the batch job.
"""

import contextlib
import os
import resource
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

from apex_jax import kv_cache
from apex_jax.backends.completions import Completions
from apex_jax.backends.host_lane import HostLane
from apex_jax.backends.host_programs import HostPrograms, choose_host_device
from apex_jax.backends.xla import XlaBackend
from apex_jax.config import Config, ConfigError, LlamaConfig, parse_cpus
from apex_jax.decisions import DecisionRecord
from apex_jax.dispatch import Dispatch, StuckError
from apex_jax.engine_plan import EnginePlan
from apex_jax.memory import MAX_TRANSIT_PAGES, MemoryPlan, check_programs
from apex_jax.models import weights
from apex_jax.models.model_files import fingerprint_of
from apex_jax.monitor import StageMonitor
from apex_jax.ops import native_library
from apex_jax.placement import format_size
from apex_jax.profiling.profiler import Profiler
from apex_jax.programs import Programs
from apex_jax.request import Request, RequestOutput
from apex_jax.scheduler import Scheduler
from apex_jax.strategies import make_policy
from apex_jax.sweep_loop import SweepLoop
from apex_jax.timeline import Timeline

REPORT_SEC = 2.0
THREAD_SPANS = 65536  # of each thread of the op; they are taken twice a second


@dataclass(frozen=True)
class LoadedModel:
    """What a job's identity needs to know of the model it ran with."""

    name: str
    fingerprint: str
    dtype: str
    architecture: LlamaConfig


@dataclass(frozen=True)
class Workers:
    """The threads beside Python's own, to be closed with the engine."""

    completions: Completions
    host_lane: HostLane | None

    def describe(self) -> str:
        """Return what they do, for whoever finds that nothing moves."""
        workers = (self.completions, self.host_lane)
        return "; ".join(worker.describe() for worker in workers if worker is not None)

    def close(self) -> None:
        if self.host_lane is not None:
            self.host_lane.close()
        self.completions.close()


class Engine:
    """Continuous batching of requests on one device, with or without a host lane beside it."""

    def __init__(
        self,
        model: LoadedModel,
        scheduler: Scheduler,
        dispatch: Dispatch,
        programs: Programs,
        memory: MemoryPlan,
        device: jax.Device,
        timeline: Timeline,
        workers: Workers,
        setup_sec: dict[str, float],
        decisions: DecisionRecord,
        profiler: Profiler | None = None,
    ):
        """profiler: None for an engine over the arrays of another, which has one."""
        self.decisions = decisions
        self.model, self.memory, self.programs = model, memory, programs
        self.profiler = profiler
        self._scheduler, self._dispatch, self._timeline = scheduler, dispatch, timeline
        self._device, self._workers, self._setup_sec = device, workers, setup_sec
        self._loop = SweepLoop(scheduler, dispatch, decisions, time.perf_counter, timeline)
        self._idle_since_sec: float | None = time.perf_counter()

    @classmethod
    def create(
        cls,
        config: Config,
        on_progress: Callable[[str], None],
        timeline: Timeline | None = None,
    ) -> "Engine":
        """Load the model, take its memory, compile; ConfigError says what cannot be had."""
        plan = EnginePlan.create(config)
        config, device, memory = plan.config, plan.device, plan.memory
        folder, architecture, dtype = plan.folder, plan.architecture, plan.dtype
        timeline = Timeline() if timeline is None else timeline
        if config.compile.cache_dir:
            _use_cache(Path(config.compile.cache_dir).expanduser())
        has_host = config.scheduler.has_host_lane
        host_device = choose_host_device(device) if has_host else None
        on_progress(plan.describe())
        programs = Programs(
            architecture,
            dtype=dtype,
            buckets=plan.shapes,
            num_pages=memory.num_pages,
            num_slots=config.scheduler.max_running,
            num_layers=plan.layers_per_program,
            device=device,
            precision=config.model.precision,
            has_native_pages=plan.device_op is not None,
            on_late=on_progress,
        )
        setup_sec: dict[str, float] = {}
        start_sec = time.perf_counter()
        programs.compile(os.cpu_count() or 1, _Throttled(on_progress))
        setup_sec["compile"] = time.perf_counter() - start_sec
        check_programs(memory, programs.temp_bytes)

        start_sec = time.perf_counter()
        if folder is None or config.model.weights == "dummy":
            on_progress("making dummy weights")
            loaded = weights.dummy(architecture, dtype, device, config.model.seed)
        else:
            on_progress(f"loading weights from {folder.path}")
            loaded = weights.load(folder.path, architecture, dtype, device)
        cache_shape = (architecture, memory.page_size, dtype, device)
        pages = kv_cache.allocate(
            architecture, memory.num_pages, *cache_shape[1:], is_native=plan.device_op is not None
        )
        staging = None
        if has_host:
            staging = kv_cache.allocate_layer(
                architecture, memory.num_staging_pages, *cache_shape[1:]
            )
        jax.block_until_ready((loaded, pages, staging))
        workers = Workers(
            Completions(timeline.span),
            None if host_device is None else _make_host_lane(plan, host_device, timeline),
        )
        setup_sec["load"] = time.perf_counter() - start_sec

        backend = XlaBackend(
            programs,
            loaded,
            pages,
            config.scheduler.max_running,
            device,
            completions=workers.completions,
            host_lane=workers.host_lane,
            staging=staging,
        )
        profiler = Profiler(backend, plan.shapes, plan.capacity, plan.profile_key())
        monitor = None
        if config.scheduler.predicts:
            times = profiler.times(config.profile, on_progress)
            monitor = StageMonitor(times, programs.num_layers)
            timeline.on_end = monitor.ended
        policy = make_policy(
            config.scheduler, None if monitor is None else monitor.times, programs.num_layers
        )
        timeline.forget()  # what was measured is no part of the job
        scheduler = Scheduler(
            buckets=plan.shapes,
            num_layers=architecture.num_layers,
            num_pages=memory.num_pages,
            max_requests=config.scheduler.max_requests,
            max_model_len=memory.max_model_len,
            vocab_size=architecture.vocab_size,
            eos_token_ids=folder.eos_token_ids if folder else frozenset(),
            policy=policy,
            num_host_pages=memory.num_host_pages,
            max_host_requests=config.scheduler.max_host_requests if has_host else 0,
            reuses_prefixes=config.cache.prefix_reuse,
        )
        dispatch = Dispatch(
            backend,
            policy,
            num_layers=architecture.num_layers,
            layers_per_program=programs.num_layers,
            watchdog_sec=config.scheduler.watchdog_sec,
            max_transit_pages=MAX_TRANSIT_PAGES,
            transit_sizes=plan.shapes.host.transit_pages if plan.shapes.host else (),
        )
        model = LoadedModel(
            name=folder.path.name if folder else "dummy",
            fingerprint=fingerprint_of(config.model),
            dtype=dtype.name,
            architecture=architecture,
        )
        return cls(
            model,
            scheduler,
            dispatch,
            programs,
            memory,
            device,
            timeline,
            workers,
            setup_sec,
            DecisionRecord(policy, monitor),
            profiler,
        )

    @property
    def num_unfinished(self) -> int:
        return self._scheduler.num_unfinished

    @property
    def num_waiting(self) -> int:
        return self._scheduler.num_waiting

    @property
    def num_output_tokens(self) -> int:
        """Tokens decoded so far, those of unfinished requests included."""
        return self._scheduler.stats.num_output_tokens

    def submit(self, request: Request) -> None:
        """Queue a request; RequestError if it could never run."""
        now_sec = time.perf_counter()
        self._scheduler.submit(request, now_sec)
        if self._idle_since_sec is not None:
            self._timeline.rest(self._idle_since_sec, now_sec)
            self._idle_since_sec = None

    def cancel(self, request_id: str) -> bool:
        """Drop a request without a result; False where there is none of that name."""
        is_found = self._scheduler.cancel(request_id)
        if is_found and not self.num_unfinished:
            with self._explained():
                self._drain()
        return is_found

    def step(self) -> list[RequestOutput]:
        """Start the next sweep, and return what the one before it finished.

        Raises StuckError where nothing moves any more, and what made a host job fail; the engine
        is of no use after that.
        """
        with self._explained():
            outputs = self._loop.step()
            if not self.num_unfinished:
                self._drain()
        return outputs

    def close(self) -> None:
        """End the threads and free the host's memory; the engine is of no use after that."""
        self._workers.close()

    def describe(self) -> str:
        """Return what setting up came to, in a line; the plan was printed before."""
        programs = self.programs
        return (
            f"programs   {len(programs.compile_sec)} executables, {programs.num_layers} layers in "
            f"each, ready in {self._setup_sec['compile']:.1f} s, scratch "
            f"{format_size(programs.temp_bytes)}; weights in {self._setup_sec['load']:.1f} s"
        )

    def log_decisions(self, on_decision: Callable[[dict[str, Any]], None]) -> None:
        """Hand each sweep's decision on, as JSON values, where the strategy chooses."""
        self.decisions.on_decision = on_decision

    def metrics(self) -> dict[str, Any]:
        """Return figures of the run so far, as JSON values; bytes and seconds as named."""
        memory, stats = self.memory, self._scheduler.stats
        peak_bytes = {"host": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}
        device_stats = self._device.memory_stats() or {}  # a CPU has none: its peak is the host's
        if "peak_bytes_in_use" in device_stats:
            peak_bytes["device"] = device_stats["peak_bytes_in_use"]
        metrics: dict[str, Any] = {
            "compile_sec": self._setup_sec["compile"],
            "compile_sec_by_program": {
                str(key): seconds for key, seconds in self.programs.compile_sec.items()
            },
            "load_sec": self._setup_sec["load"],
            "num_executables": len(self.programs.compile_sec),
            "peak_bytes": peak_bytes,
            "planned_bytes": {
                "weights": memory.weight_bytes,
                "kv_cache": memory.pool_bytes,
                "scratch": self.programs.temp_bytes,
            },
            "num_sweeps": stats.num_sweeps,
            "num_preemptions": stats.num_preemptions,
            "num_prefilled_tokens": stats.num_prefilled_tokens,
            "max_running": stats.max_running,
            "max_pages": stats.max_pages,
            "num_pages": memory.num_pages,
        }
        if self._scheduler.reuses_prefixes:
            metrics["prefix_reuse"] = {
                "admitted_tokens": stats.num_admitted_tokens,
                "reused_tokens": stats.num_reused_tokens,
                "hit_rate": stats.num_reused_tokens / max(1, stats.num_admitted_tokens),
            }
        prediction = self.decisions.summary()
        if prediction:
            metrics["prediction"] = prediction
        if memory.num_host_pages:
            metrics["planned_bytes"]["host_kv_cache"] = memory.host_pool_bytes
            metrics["planned_bytes"]["host_lane_on_device"] = memory.lane_bytes
            dispatched = self._dispatch.stats
            metrics["hybrid"] = {
                "num_merges": dispatched.num_merges,
                "num_extra_passes": dispatched.num_extra_passes,
                "num_joint_heads": dispatched.num_joint_heads,
                "num_head_passes": dispatched.num_head_passes,
                "num_late": dispatched.num_late,
                "num_host_jobs": dispatched.num_host_jobs,
                "num_moves": {str(name): count for name, count in dispatched.num_moves.items()},
                "num_host_tokens": stats.num_host_tokens,
                "num_host_prefilled_tokens": stats.num_host_prefilled_tokens,
                "max_host_running": stats.max_host_running,
                "max_host_pages": stats.max_host_pages,
                "num_host_pages": memory.num_host_pages,
                **self._timeline.figures().to_json(),
            }
        return metrics

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        """Add to the error that nothing moves where everything stands."""
        try:
            yield
        except StuckError as error:
            raise StuckError(f"{error}\n{self._workers.describe()}\n{_stacks()}") from None

    def _drain(self) -> None:
        """Carry to its end what no request waits for any more, and see that nothing is lost."""
        surplus = self._loop.run()
        assert not surplus, f"{len(surplus)} requests finished twice"
        self._idle_since_sec = time.perf_counter()


def _make_host_lane(plan: EnginePlan, host_device: jax.Device, timeline: Timeline) -> HostLane:
    """Take the host's memory, compile the host's programs and start its worker."""
    memory, shapes = plan.memory, plan.shapes.host
    assert shapes is not None
    programs = HostPrograms(
        plan.architecture,
        dtype=plan.dtype,
        num_pages=memory.num_host_pages,
        page_size=memory.page_size,
        max_sequence_pages=memory.num_staging_pages,
        rows=shapes.cohort_rows,
        written_pages=shapes.transit_pages,
        read_pages=shapes.transit_pages,
        device=host_device,
    )
    if timeline.is_tracing:
        native_library.record(THREAD_SPANS)
        timeline.watch_threads(native_library.take_spans)
    cpus = parse_cpus(plan.config.host.cpus)
    return HostLane(programs, plan.device, on_span=timeline.span, cpus=cpus)


def _use_cache(folder: Path) -> None:
    """Keep compiled programs in a folder, however quickly they compiled."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"--config.compile.cache_dir is {str(folder)!r}, which cannot be made "
            f"({error.strerror}); name another folder, or none with --config.compile.cache_dir="
        ) from None
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def _stacks() -> str:
    """Return where every thread stands, for whoever has to find out why nothing moves."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    stacks = (
        f"thread {names.get(ident, ident)}:\n{''.join(traceback.format_stack(frame, limit=8))}"
        for ident, frame in sys._current_frames().items()
    )
    return "".join(stacks)


class _Throttled:
    """Passes compile progress on every few seconds, and at the end."""

    def __init__(self, on_progress: Callable[[str], None]):
        self._on_progress = on_progress
        self._next_sec = time.perf_counter() + REPORT_SEC

    def __call__(self, done: int, total: int, program: str) -> None:
        if done == total or time.perf_counter() >= self._next_sec:
            self._next_sec = time.perf_counter() + REPORT_SEC
            self._on_progress(f"compiled {done} of {total} programs ({program})")
