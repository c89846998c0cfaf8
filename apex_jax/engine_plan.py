"""What an engine will be, decided before anything is loaded or compiled.

Owns the choice of device, dtype, memory and shapes from the settings, and its words. Asks the
device how much memory is free, and no more. Refuses what cannot be had. Called by the engine, and
by whoever only wants to know.
"""

import dataclasses
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from apex_jax import buckets
from apex_jax.backends.host_lane import load_host_op
from apex_jax.config import Config, ConfigError, LlamaConfig, validate
from apex_jax.forecast import Room
from apex_jax.memory import MemoryPlan, plan_memory
from apex_jax.models.hf_config import ModelFolder, read_model_folder
from apex_jax.ops.native_library import HostOp, usable_cpus
from apex_jax.pages import num_pages_for
from apex_jax.placement import choose_device, choose_dtype, describe_plan
from apex_jax.profiling.batches import Capacity
from apex_jax.profiling.table import make_key
from apex_jax.programs import span_of_layers
from apex_jax.strategies import cohort_rows


@dataclass(frozen=True)
class EnginePlan:
    """Everything that follows from the settings and the machine.

    config: as it will be honoured. folder: None for dummy weights without one. host_op: None
    without a host lane. device_op: the same op as the device's attention; None where that is XLA's.
    layers_per_program: of the Layers stage.
    """

    config: Config
    device: jax.Device
    folder: ModelFolder | None
    architecture: LlamaConfig
    dtype: np.dtype
    memory: MemoryPlan
    shapes: buckets.Buckets
    host_op: HostOp | None
    device_op: HostOp | None
    layers_per_program: int

    @classmethod
    def create(cls, config: Config) -> "EnginePlan":
        """Decide; ConfigError says what cannot be had."""
        validate(config)
        device = choose_device(config.device.platform)
        folder = None
        if config.model.path:
            folder = read_model_folder(config.model.path, config.model.architecture)
        architecture = folder.architecture if folder else config.model.architecture
        assert architecture is not None  # validate() has seen to it
        capability = getattr(device, "compute_capability", None)
        dtype = choose_dtype(config.model.dtype, folder.dtype if folder else None, capability)
        config, memory = _plan_lanes(config, architecture, dtype, device)
        has_host = config.scheduler.has_host_lane
        return cls(
            config=config,
            device=device,
            folder=folder,
            architecture=architecture,
            dtype=dtype,
            memory=memory,
            shapes=_choose_buckets(config, memory),
            host_op=load_host_op(config.host) if has_host else None,
            device_op=_load_device_op(config, architecture, memory, device),
            layers_per_program=span_of_layers(
                architecture.num_layers, config.compile.layers_per_program, has_host_lane=has_host
            ),
        )

    @property
    def capacity(self) -> Capacity:
        """What a profiler may use of the engine."""
        return Capacity(
            num_layers=self.architecture.num_layers,
            span=self.layers_per_program,
            num_pages=self.memory.num_pages,
            num_host_pages=self.memory.num_host_pages,
            max_model_len=self.memory.max_model_len,
        )

    @property
    def room(self) -> Room:
        """What the lanes hold."""
        scheduler = self.config.scheduler
        return Room(
            device_tokens=self.memory.pool_tokens,
            device_requests=scheduler.max_requests,
            host_tokens=self.memory.host_pool_tokens,
            host_requests=scheduler.max_host_requests,
        )

    def profile_key(self) -> dict[str, Any]:
        """Return what a profile of the engine holds for."""
        op = self.host_op or self.device_op
        return make_key(
            device=self.device.device_kind,
            model=self.architecture,
            dtype=self.dtype.name,
            precision=self.config.model.precision,
            isa=op.isa if op else "",
            num_threads=op.num_threads if op else 0,
            cpus=op.cpus if op else (),
            shapes=self.shapes,
            capacity=self.capacity,
        )

    def describe(self) -> str:
        """Return the plan in a few lines."""
        return describe_plan(
            self.config,
            self.folder,
            self.architecture,
            self.dtype,
            self.memory,
            self.shapes,
            self.device,
            host_op=self.host_op,
            device_op=self.device_op,
        )


def _plan_lanes(
    config: Config, architecture: LlamaConfig, dtype: np.dtype, device: jax.Device
) -> tuple[Config, MemoryPlan]:
    """Divide the memory; without a host lane where a strategy that chooses would never use it."""
    if config.scheduler.chooses:
        scheduler = dataclasses.replace(config.scheduler, strategy="device_only")
        alone = dataclasses.replace(config, scheduler=scheduler)
        memory = plan_memory(alone, architecture, dtype, device)
        longest_pages = num_pages_for(memory.max_model_len, memory.page_size)
        if memory.num_pages >= scheduler.max_requests * longest_pages:
            return alone, memory
    return config, plan_memory(config, architecture, dtype, device)


def _load_device_op(
    config: Config, architecture: LlamaConfig, memory: MemoryPlan, device: jax.Device
) -> HostOp | None:
    """Load the op that is the device's attention; None where XLA's is.

    A CPU with a host lane stands in for a GPU, and so has a GPU's attention.
    """
    if config.device.attention == "xla":
        return None
    sizes = {"a head_dim": architecture.head_dim, "pages": memory.page_size}
    odd = (f"{name} of {size}, no multiple of 8" for name, size in sizes.items() if size % 8)
    why_not = "a host lane" if config.scheduler.has_host_lane else next(odd, "")
    if device.platform != "cpu":
        why_not = f"a {device.platform} as its device"
    if not why_not:
        host = config.host
        if host.threads is None and not host.cpus and host.numa_node is None:
            host = dataclasses.replace(host, threads=len(usable_cpus()))
        return load_host_op(host)
    if config.device.attention == "native":
        raise ConfigError(
            f"--config.device.attention is 'native', but the engine has {why_not}; leave it auto"
        )
    return None


def _choose_buckets(config: Config, memory: MemoryPlan) -> buckets.Buckets:
    """Return the shapes to compile for what the memory holds."""
    limits = None
    if memory.num_host_pages:
        limits = buckets.HostLimits(
            max_cohort_rows=cohort_rows(config.scheduler),
            num_staging_pages=memory.num_staging_pages,
            max_move_pages=min(memory.num_staging_pages, memory.num_pages),
        )
    return buckets.choose(
        max_requests=config.scheduler.max_requests,
        max_prefill_tokens=config.scheduler.max_prefill_tokens,
        max_model_len=memory.max_model_len,
        num_pages=memory.num_pages,
        page_size=memory.page_size,
        host=limits,
    )
