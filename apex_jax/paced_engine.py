"""Sets up what runs a model's schedules on a described device: no weights, no compiled stages.

Owns the sizes (pages of either lane, shapes of batches) and the host's programs and memory. Loops
over them are one for each strategy, one after the other. Refuses what the host cannot hold. Called
by bench_paced and run_benchmark.
"""

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from apex_jax import buckets
from apex_jax.backends.completions import SpanRecorder
from apex_jax.backends.host_lane import HostLane, load_host_op
from apex_jax.backends.host_programs import HostPrograms
from apex_jax.backends.paced import DummyOperands, PacedBackend
from apex_jax.config import Config, ConfigError, LlamaConfig, parse_cpus, validate
from apex_jax.hardware import Backend, Job
from apex_jax.kv_cache import page_bytes
from apex_jax.memory import GIB, MAX_HOST_FRACTION, free_host_bytes
from apex_jax.monitor import StageMonitor
from apex_jax.pages import num_pages_for
from apex_jax.policies import Policy
from apex_jax.programs import span_of_layers
from apex_jax.stage_costs import StageCosts
from apex_jax.strategies import cohort_rows
from apex_jax.sweep_loop import SweepLoop


@dataclass(frozen=True)
class PacedPlan:
    """The sizes of a run, which hold for a paced backend and for a simulated one alike.

    config: its strategy says whether there is a host lane, and how large its cohorts may be; loops
    may be of any strategy that needs no more. page_bytes: of a page in all layers.
    """

    config: Config
    model: LlamaConfig
    dtype: np.dtype
    shapes: buckets.Buckets
    page_bytes: int
    num_pages: int
    num_host_pages: int
    max_model_len: int
    layers_per_program: int

    @classmethod
    def create(cls, config: Config) -> "PacedPlan":
        """Size everything by the configuration; ConfigError where it cannot be had.

        config: with the model's architecture and with cache.device_bytes, of a device that is not
        there. cache.host_bytes: None for what max_host_requests can use.
        """
        validate(config)
        model, scheduler, page_size = (
            config.model.architecture,
            config.scheduler,
            config.cache.page_size,
        )
        if model is None or config.cache.device_bytes is None:
            raise ConfigError(
                "a described device needs --config.model.architecture, as configs/ has it for some "
                "models, and --config.cache.device_bytes"
            )
        dtype = jnp.dtype("float16" if config.model.dtype == "auto" else config.model.dtype)
        bytes_of_page = page_bytes(model, page_size, dtype)
        longest = min(model.max_position_embeddings, scheduler.max_model_len or 2**31)
        pages_per_request = num_pages_for(longest, page_size)
        num_pages = min(
            config.cache.device_bytes // bytes_of_page, scheduler.max_requests * pages_per_request
        )
        num_host_pages = 0
        if scheduler.has_host_lane:
            num_host_pages = scheduler.max_host_requests * pages_per_request
            if config.cache.host_bytes is not None:
                num_host_pages = min(num_host_pages, config.cache.host_bytes // bytes_of_page)
        if num_pages < 1:
            raise ConfigError(
                f"--config.cache.device_bytes is {config.cache.device_bytes}; one page takes "
                f"{bytes_of_page} bytes, so it must be at least that"
            )
        max_model_len = min(longest, max(num_pages, num_host_pages) * page_size)
        return cls(
            config=config,
            model=model,
            dtype=dtype,
            shapes=_shapes(config, num_pages, num_host_pages, max_model_len),
            page_bytes=bytes_of_page,
            num_pages=num_pages,
            num_host_pages=num_host_pages,
            max_model_len=max_model_len,
            layers_per_program=span_of_layers(
                model.num_layers,
                config.compile.layers_per_program,
                has_host_lane=scheduler.has_host_lane,
            ),
        )

    def check_host_memory(self) -> None:
        """Raise ConfigError where this machine cannot hold the host's KV cache."""
        needed_bytes, free_bytes = self.num_host_pages * self.page_bytes, free_host_bytes()
        if free_bytes is not None and needed_bytes > free_bytes * MAX_HOST_FRACTION:
            raise ConfigError(
                f"the host's KV cache would take {needed_bytes / GIB:.2f} GiB, and "
                f"{free_bytes / GIB:.2f} are free, of which {MAX_HOST_FRACTION:.0%} may be taken; "
                "lower --config.scheduler.max_host_requests, max_model_len or "
                "--config.cache.host_bytes"
            )

    def describe(self) -> str:
        """Return the sizes in a line."""
        return (
            f"KV cache in {self.dtype.name}, in pages of {self.config.cache.page_size} tokens: "
            f"{self.num_pages} ({self.num_pages * self.page_bytes / GIB:.2f} GiB) on the device, "
            f"{self.num_host_pages} ({self.num_host_pages * self.page_bytes / GIB:.2f} GiB) on the "
            "host"
        )

    def loop(
        self,
        backend: Backend,
        policy: Policy,
        *,
        reuses_prefixes: bool = False,
        monitor: StageMonitor | None = None,
    ) -> SweepLoop:
        """Return a loop of one strategy over a backend that no other loop uses at the time.

        reuses_prefixes, monitor: as SweepLoop.create takes them.
        """
        scheduler = self.config.scheduler
        return SweepLoop.create(
            backend,
            policy,
            self.shapes,
            num_layers=self.model.num_layers,
            layers_per_program=self.layers_per_program,
            num_pages=self.num_pages,
            num_host_pages=self.num_host_pages,
            max_requests=scheduler.max_requests,
            max_host_requests=scheduler.max_host_requests,
            max_model_len=self.max_model_len,
            vocab_size=self.model.vocab_size,
            watchdog_sec=scheduler.watchdog_sec,
            reuses_prefixes=reuses_prefixes,
            monitor=monitor,
        )

    def paced_backend(
        self,
        costs: StageCosts,
        on_span: SpanRecorder,
        before_job: Callable[[Job], None] | None = None,
    ) -> PacedBackend:
        """Take the host's memory, compile the host's programs, and start its worker.

        before_job: as HostLane has it.
        """
        if self.shapes.host is None:
            return PacedBackend(costs, on_span=on_span)
        load_host_op(self.config.host)
        device = jax.devices("cpu")[0]
        programs = HostPrograms(
            self.model,
            dtype=self.dtype,
            num_pages=self.num_host_pages,
            page_size=self.shapes.page_size,
            max_sequence_pages=self.shapes.host.num_staging_pages,
            rows=self.shapes.host.cohort_rows,
            written_pages=self.shapes.host.transit_pages,
            read_pages=self.shapes.host.transit_pages,
            device=device,
        )
        cpus = parse_cpus(self.config.host.cpus)
        lane = HostLane(programs, device, on_span=on_span, cpus=cpus, before_job=before_job)
        operands = DummyOperands(self.model, self.dtype, self.shapes)
        return PacedBackend(costs, on_span=on_span, host_lane=lane, operands=operands)


def _shapes(
    config: Config, num_pages: int, num_host_pages: int, max_model_len: int
) -> buckets.Buckets:
    limits = None
    if num_host_pages:
        longest_pages = num_pages_for(max_model_len, config.cache.page_size)
        limits = buckets.HostLimits(
            max_cohort_rows=cohort_rows(config.scheduler),
            num_staging_pages=min(longest_pages, num_host_pages),
            max_move_pages=min(longest_pages, num_pages, num_host_pages),
        )
    return buckets.choose(
        max_requests=config.scheduler.max_requests,
        max_prefill_tokens=config.scheduler.max_prefill_tokens,
        max_model_len=max_model_len,
        num_pages=num_pages,
        page_size=config.cache.page_size,
        host=limits,
    )
