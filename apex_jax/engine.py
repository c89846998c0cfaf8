"""The engine: a model, its memory and its programs, driven by plan, launch, commit.

Owns the set-up (what goes where, printed before work starts) and the loop's one sweep of lag: the
tokens of a sweep are read while the next one runs, so the device never waits for Python. Refuses
settings that cannot be honoured. Called by the batch job.
"""

import os
import resource
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from apex_jax import buckets, kv_cache
from apex_jax.backends.xla import XlaBackend
from apex_jax.config import Config, ConfigError, LlamaConfig, validate
from apex_jax.dispatch import Dispatch, StuckError, SweepHandle
from apex_jax.memory import GIB, MemoryPlan, check_programs, plan_memory
from apex_jax.models import weights
from apex_jax.models.hf_config import ModelFolder, read_model_folder
from apex_jax.programs import Programs, span_of_layers
from apex_jax.request import Request, RequestOutput
from apex_jax.scheduler import Scheduler

WATCHDOG_SEC = 300.0  # a sweep takes seconds at the worst; a first use of a GPU library some more
REPORT_SEC = 2.0


@dataclass(frozen=True)
class LoadedModel:
    """What a job's identity needs to know of the model it ran with."""

    name: str
    fingerprint: str
    dtype: str
    architecture: LlamaConfig


class Engine:
    """Continuous batching of requests on one device."""

    def __init__(
        self,
        model: LoadedModel,
        scheduler: Scheduler,
        dispatch: Dispatch,
        programs: Programs,
        memory: MemoryPlan,
        device: jax.Device,
        setup_sec: dict[str, float],
    ):
        self.model, self.memory, self.programs = model, memory, programs
        self._scheduler, self._dispatch = scheduler, dispatch
        self._device, self._setup_sec = device, setup_sec
        self._previous: SweepHandle | None = None

    @classmethod
    def create(cls, config: Config, on_progress: Callable[[str], None]) -> "Engine":
        """Load the model, take its memory, compile; ConfigError says what cannot be had."""
        validate(config)
        device = choose_device(config.device.platform)
        folder = _read_folder(config)
        architecture = folder.architecture if folder else config.model.architecture
        assert architecture is not None  # validate() has seen to it
        capability = getattr(device, "compute_capability", None)
        dtype = choose_dtype(config.model.dtype, folder.dtype if folder else None, capability)
        memory = plan_memory(config, architecture, dtype, device)
        if config.compile.cache_dir:
            _use_cache(Path(config.compile.cache_dir).expanduser())

        shapes = buckets.choose(
            max_requests=config.scheduler.max_requests,
            max_prefill_tokens=config.scheduler.max_prefill_tokens,
            max_model_len=memory.max_model_len,
            num_pages=memory.num_pages,
            page_size=memory.page_size,
        )
        on_progress(_describe_plan(config, folder, architecture, dtype, memory, shapes, device))
        programs = Programs(
            architecture,
            dtype=dtype,
            buckets=shapes,
            num_pages=memory.num_pages,
            num_slots=config.scheduler.max_requests,
            num_layers=span_of_layers(architecture.num_layers, config.compile.layers_per_program),
            device=device,
            precision=config.model.precision,
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
            fingerprint = f"dummy-{config.model.seed}"
        else:
            on_progress(f"loading weights from {folder.path}")
            loaded = weights.load(folder.path, architecture, dtype, device)
            fingerprint = weights.fingerprint(folder.path)
        pages = kv_cache.allocate(architecture, memory.num_pages, memory.page_size, dtype, device)
        jax.block_until_ready((loaded, pages))
        setup_sec["load"] = time.perf_counter() - start_sec

        backend = XlaBackend(programs, loaded, pages, config.scheduler.max_requests, device)
        scheduler = Scheduler(
            buckets=shapes,
            num_pages=memory.num_pages,
            max_requests=config.scheduler.max_requests,
            max_model_len=memory.max_model_len,
            vocab_size=architecture.vocab_size,
            eos_token_ids=folder.eos_token_ids if folder else frozenset(),
        )
        model = LoadedModel(
            name=folder.path.name if folder else "dummy",
            fingerprint=fingerprint,
            dtype=dtype.name,
            architecture=architecture,
        )
        dispatch = Dispatch(backend, programs.first_layers, WATCHDOG_SEC)
        return cls(model, scheduler, dispatch, programs, memory, device, setup_sec)

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
        self._scheduler.submit(request, time.perf_counter())

    def step(self) -> list[RequestOutput]:
        """Start the next sweep, and return what the one before it finished."""
        plan = self._scheduler.plan_sweep()
        launched = self._dispatch.launch(plan) if plan is not None else None
        if launched is None and self._previous is None and self.num_unfinished:
            raise StuckError(f"nothing runs and nothing can start: {self._scheduler.describe()}")
        outputs = self._commit_previous()
        self._previous = launched
        if not self.num_unfinished:
            self._commit_previous()  # the surplus sweep of the last request to stop
            self._scheduler.check_ledger()
        return outputs

    def describe(self) -> str:
        """Return what setting up came to, in a line; the plan was printed before."""
        programs = self.programs
        return (
            f"programs   {len(programs.compile_sec)} executables, {programs.num_layers} layers in "
            f"each, ready in {self._setup_sec['compile']:.1f} s, scratch "
            f"{_size(programs.temp_bytes)}; weights in {self._setup_sec['load']:.1f} s"
        )

    def metrics(self) -> dict[str, Any]:
        """Return figures of the run so far, as JSON values; bytes and seconds as named."""
        memory, stats = self.memory, self._scheduler.stats
        peak_bytes = {"host": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}
        device_stats = self._device.memory_stats() or {}  # a CPU has none: its peak is the host's
        if "peak_bytes_in_use" in device_stats:
            peak_bytes["device"] = device_stats["peak_bytes_in_use"]
        return {
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

    def _commit_previous(self) -> list[RequestOutput]:
        if self._previous is None:
            return []
        tokens_b = self._dispatch.read(self._previous)
        self._previous = None
        return self._scheduler.commit(tokens_b, time.perf_counter())


def _describe_plan(
    config: Config,
    folder: ModelFolder | None,
    shape: LlamaConfig,
    dtype: np.dtype,
    memory: MemoryPlan,
    shapes: buckets.Buckets,
    device: jax.Device,
) -> str:
    """Return the effective plan, a few lines, before any work begins."""
    name = folder.path.name if folder else "no folder"
    source = "dummy weights" if config.model.weights == "dummy" else "its weights"
    free = "unknown" if memory.free_bytes is None else _size(memory.free_bytes)
    max_rows = shapes.rows[-1]
    chunks = _list(f"{count}x{tokens}" for count, tokens in shapes.chunks)
    return "\n".join(
        (
            f"model      {name}, {source}: {shape.num_layers} layers, width {shape.d_model}, "
            f"{shape.num_heads} heads over {shape.num_kv_heads}, "
            f"{shape.num_parameters / 1e6:.1f} M parameters, {dtype.name}",
            f"device     {device.device_kind} ({device.platform}), {free} free",
            f"strategy   {config.scheduler.strategy}; attention kernel: XLA, paged; no host lane",
            f"memory     weights {_size(memory.weight_bytes)}, KV cache {_size(memory.pool_bytes)} "
            f"({memory.num_pages} pages of {memory.page_size} = {memory.pool_tokens} tokens)",
            f"limits     {config.scheduler.max_requests} requests at once, {memory.max_model_len} "
            f"tokens a request, {config.scheduler.max_prefill_tokens} prompt tokens a sweep",
            f"buckets    rows {_list(shapes.rows)}; KV blocks of {max_rows} rows "
            f"{_list(shapes.num_blocks[max_rows])}; chunks {chunks}; context pages "
            f"{_list(shapes.context_pages)}; {shapes.num_executables} executables to make",
        )
    )


def choose_device(platform: str) -> jax.Device:
    """Return the first device of a platform; `auto` is a GPU where JAX sees one."""
    if platform == "auto":
        return jax.devices()[0]
    try:
        return jax.devices(platform)[0]
    except RuntimeError:
        seen = ", ".join(sorted({device.platform for device in jax.devices()}))
        raise ConfigError(
            f"--config.device.platform is {platform!r}, and JAX sees only: {seen}. An NVIDIA GPU "
            "needs JAX's CUDA build (launch/setup_env.sh installs it where nvidia-smi works)"
        ) from None


def choose_dtype(requested: str, published: str | None, compute_capability: str | None) -> np.dtype:
    """Return the dtype of weights, activations and KV cache, as ModelConfig.dtype says.

    published: the checkpoint's. compute_capability: of an NVIDIA GPU, such as "7.5"; None on a CPU.
    """
    if requested != "auto":
        return jnp.dtype(requested)
    if compute_capability is None:
        return jnp.dtype("float32")
    is_old = compute_capability.startswith(("5.", "6.", "7."))
    if published == "bfloat16" and is_old:
        return jnp.dtype("float16")
    return jnp.dtype(published or "float16")


def _read_folder(config: Config) -> ModelFolder | None:
    if not config.model.path:
        return None
    return read_model_folder(config.model.path, config.model.architecture)


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


class _Throttled:
    """Passes compile progress on every few seconds, and at the end."""

    def __init__(self, on_progress: Callable[[str], None]):
        self._on_progress = on_progress
        self._next_sec = time.perf_counter() + REPORT_SEC

    def __call__(self, done: int, total: int, program: str) -> None:
        if done == total or time.perf_counter() >= self._next_sec:
            self._next_sec = time.perf_counter() + REPORT_SEC
            self._on_progress(f"compiled {done} of {total} programs ({program})")


def _size(num_bytes: int) -> str:
    return f"{num_bytes / GIB:.2f} GiB" if num_bytes >= GIB else f"{num_bytes / 2**20:.1f} MiB"


def _list(values: Iterable[object]) -> str:
    return ", ".join(map(str, values))
