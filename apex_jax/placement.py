"""Where and in which dtype a model runs, and the plan of it in words.

Owns the choice of device and dtype and the lines that are printed before any work begins. Refuses a
platform that JAX does not see. Called by the engine.
"""

from collections.abc import Iterable

import jax
import jax.numpy as jnp
import numpy as np

from apex_jax.buckets import Buckets
from apex_jax.config import Config, ConfigError, HostConfig, LlamaConfig
from apex_jax.memory import GIB, MemoryPlan
from apex_jax.models.hf_config import ModelFolder
from apex_jax.ops.native_library import HostOp


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


def describe_plan(
    config: Config,
    folder: ModelFolder | None,
    shape: LlamaConfig,
    dtype: np.dtype,
    memory: MemoryPlan,
    shapes: Buckets,
    device: jax.Device,
    host_op: HostOp | None,
    device_op: HostOp | None,
) -> str:
    """Return the effective plan, a few lines, before any work begins."""
    name = folder.path.name if folder else "no folder"
    source = "dummy weights" if config.model.weights == "dummy" else "its weights"
    free = "unknown" if memory.free_bytes is None else format_size(memory.free_bytes)
    scheduler, max_rows = config.scheduler, shapes.device_rows[-1]
    chunks = _list(f"{count}x{tokens}" for count, tokens in shapes.chunks)
    lines = [
        f"model      {name}, {source}: {shape.num_layers} layers, width {shape.d_model}, "
        f"{shape.num_heads} heads over {shape.num_kv_heads}, "
        f"{shape.num_parameters / 1e6:.1f} M parameters, {dtype.name}",
        f"device     {device.device_kind} ({device.platform}), {free} free",
        f"strategy   {_describe_strategy(config, device_op)}; device attention: "
        + ("XLA, paged" if device_op is None else _describe_op(device_op)),
    ]
    if host_op is not None:
        lines.append(f"host       attention op: {_describe_op(host_op)}")
    lines += [
        f"memory     weights {format_size(memory.weight_bytes)}, KV cache "
        f"{format_size(memory.pool_bytes)} ({memory.num_pages} pages of {memory.page_size} = "
        f"{memory.pool_tokens} tokens), prefixes {'' if config.cache.prefix_reuse else 'not '}"
        "reused",
    ]
    if host_op is not None:
        lines.append(
            f"           host KV cache {format_size(memory.host_pool_bytes)} "
            f"({memory.num_host_pages} pages = {memory.host_pool_tokens} tokens), for which the "
            f"device gives {format_size(memory.lane_bytes)} more (less with a smaller "
            "scheduler.max_model_len)"
        )
    at_once = f"{scheduler.max_requests} requests at once"
    if host_op is not None:
        at_once += f" on the device, {scheduler.max_host_requests} on the host"
    lines += [
        f"limits     {at_once}, {memory.max_model_len} tokens a request, "
        f"{scheduler.max_prefill_tokens} prompt tokens a sweep",
        f"buckets    rows {_list(shapes.rows)}; KV blocks of {max_rows} rows "
        f"{_list(shapes.num_blocks[max_rows])}; chunks {chunks}; context pages "
        f"{_list(shapes.context_pages)}; {shapes.num_executables} executables to make",
    ]
    return "\n".join(lines)


def format_size(num_bytes: int) -> str:
    return f"{num_bytes / GIB:.2f} GiB" if num_bytes >= GIB else f"{num_bytes / 2**20:.1f} MiB"


def _describe_op(op: HostOp) -> str:
    where = f" on CPUs {_list(op.cpus)}" if op.cpus else ""
    return f"{op.isa}, {op.num_threads} thread{'s' if op.num_threads > 1 else ''}{where}"


def _describe_strategy(config: Config, device_op: HostOp | None) -> str:
    scheduler = config.scheduler
    match scheduler.strategy:
        case "device_only":
            has_settings = config.cache.host_bytes is not None or (
                device_op is None and config.host != HostConfig()
            )
            ignored = ", so host settings have no effect" if has_settings else ""
            return f"device_only; no host lane{ignored}"
        case "full_offload":
            return "full_offload; the device's KV cache stays empty"
        case "staggered":
            return f"staggered, {scheduler.cohorts} cohorts"
        case "passes":
            return f"passes, up to {scheduler.passes} a sweep, {scheduler.cohorts} cohorts"
        case strategy:
            return strategy


def _list(values: Iterable[object]) -> str:
    return ", ".join(map(str, values))
