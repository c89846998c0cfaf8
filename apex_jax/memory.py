"""How many KV pages the device gets.

Owns the arithmetic from bytes to pages and the reading of free memory. Refuses budgets that cannot
hold the weights or a single page, naming the flag. Called by the engine before anything is loaded.
"""

from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np

from apex_jax.buckets import PAGES_PER_BLOCK
from apex_jax.config import Config, ConfigError, LlamaConfig
from apex_jax.kv_cache import page_bytes
from apex_jax.pages import num_pages_for

GIB = 2**30
GATHERED_COPIES = 2  # of a layer's pages in a decode program: as read, and as XLA lays them out
MAX_AUTOMATIC_CPU_BYTES = 4 * GIB  # a CPU's memory is everybody's: more must be asked for
_SIGNIFICANT_BITS = (
    4  # of an automatic page count: compiled programs depend on it, free memory wavers
)


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes on the device, and the limits that follow from them.

    scratch_bytes: the estimate of what programs need beside weights and pages. free_bytes: what the
    device had before anything was loaded, None where nothing says.
    """

    weight_bytes: int
    page_bytes: int
    num_pages: int
    page_size: int
    scratch_bytes: int
    free_bytes: int | None
    max_model_len: int

    @property
    def pool_bytes(self) -> int:
        return self.num_pages * self.page_bytes

    @property
    def pool_tokens(self) -> int:
        return self.num_pages * self.page_size


def plan_memory(
    config: Config, model: LlamaConfig, dtype: np.dtype, device: jax.Device
) -> MemoryPlan:
    """Divide the device's memory; ConfigError where the settings cannot be honoured."""
    itemsize = dtype.itemsize
    weight_bytes = model.num_parameters * itemsize
    bytes_of_page = page_bytes(model, config.cache.page_size, dtype)
    scratch_bytes = _scratch_bytes(config, model, itemsize)
    free_bytes = free_device_bytes(device)
    if free_bytes is not None and weight_bytes > free_bytes:
        raise ConfigError(
            f"the weights take {weight_bytes / GIB:.2f} GiB in {dtype.name}, and "
            f"{free_bytes / GIB:.2f} GiB are free on {device.device_kind}; use a smaller model, "
            "or --config.model.dtype=float16 where it is wider now"
        )
    max_len = config.scheduler.max_model_len or model.max_position_embeddings
    if max_len > model.max_position_embeddings:
        raise ConfigError(
            f"--config.scheduler.max_model_len is {max_len}; the model was made for at most "
            f"{model.max_position_embeddings} (max_position_embeddings in its config.json)"
        )
    most_pages = config.scheduler.max_requests * num_pages_for(max_len, config.cache.page_size)
    if config.cache.device_bytes is not None:
        num_pages = min(config.cache.device_bytes // bytes_of_page, most_pages)
        _check_device_bytes(config.cache.device_bytes, bytes_of_page, free_bytes, weight_bytes)
    else:
        if free_bytes is None:
            raise ConfigError(
                f"{device.device_kind} does not say how much of its memory is free; size the KV "
                "cache with --config.cache.device_bytes"
            )
        left_bytes = (free_bytes - weight_bytes - scratch_bytes) * config.cache.device_fraction
        if device.platform == "cpu":
            left_bytes = min(left_bytes, MAX_AUTOMATIC_CPU_BYTES)
        # A decode program gathers all pages in use of one layer, beside the pool.
        num_pages = int(left_bytes / (bytes_of_page * (1 + GATHERED_COPIES / model.num_layers)))
        num_pages = min(_round_down(num_pages), most_pages)
        if num_pages < 1:
            raise ConfigError(
                f"no memory is left for the KV cache: {free_bytes / GIB:.2f} GiB are free, the "
                f"weights take {weight_bytes / GIB:.2f} and scratch about "
                f"{scratch_bytes / GIB:.2f} GiB; use a smaller model, fewer "
                "--config.scheduler.max_requests, or size the cache yourself with "
                "--config.cache.device_bytes"
            )
    pool_tokens = num_pages * config.cache.page_size
    if config.scheduler.max_model_len is not None and max_len > pool_tokens:
        raise ConfigError(
            f"--config.scheduler.max_model_len is {max_len}; the KV cache holds {pool_tokens} "
            f"tokens in all ({num_pages} pages), so it must be at most that, or the cache larger "
            "(--config.cache.device_bytes)"
        )
    return MemoryPlan(
        weight_bytes=weight_bytes,
        page_bytes=bytes_of_page,
        num_pages=num_pages,
        page_size=config.cache.page_size,
        scratch_bytes=scratch_bytes,
        free_bytes=free_bytes,
        max_model_len=min(max_len, pool_tokens),
    )


def free_device_bytes(device: jax.Device) -> int | None:
    """Return the bytes a process may still take on the device; for a CPU, of the host's memory."""
    if device.platform == "cpu":
        return free_host_bytes()
    stats = device.memory_stats()
    if not stats or "bytes_limit" not in stats:
        return None
    return stats["bytes_limit"] - stats["bytes_in_use"]


def free_host_bytes(root: Path = Path("/")) -> int | None:
    """Return available memory, or what the control group leaves where that is less.

    None where neither is known. root: of the file system, for tests.
    """
    candidates: list[int] = []
    meminfo = root / "proc/meminfo"
    if meminfo.exists():
        for line in meminfo.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                candidates.append(int(line.split()[1]) * 1024)
    cgroup = root / "sys/fs/cgroup"
    for limit_name, used_name in (
        ("memory.max", "memory.current"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    ):
        limit, used = cgroup / limit_name, cgroup / used_name
        if limit.exists() and used.exists() and limit.read_text().strip().isdigit():
            reclaimable = _file_cache_bytes(used.parent / "memory.stat")
            candidates.append(int(limit.read_text()) - int(used.read_text()) + reclaimable)
    return min(candidates, default=None)


def _file_cache_bytes(stat: Path) -> int:
    """Return what a control group's usage counts of files that were read, and may be dropped."""
    fields = dict(line.split() for line in stat.read_text().splitlines()) if stat.exists() else {}
    return int(fields.get("total_inactive_file", fields.get("inactive_file", 0)))


def _scratch_bytes(config: Config, model: LlamaConfig, itemsize: int) -> int:
    """Estimate what programs hold at their peak beside weights and pages.

    Prefill: a few activations of every token of a chunk. Head: float32 scores and their sorted
    copy. Decode: what the last, partly used block of each row is padded with.
    """
    widest = model.d_model + 2 * model.d_ffn + 3 * model.num_heads * model.head_dim
    prefill = config.scheduler.max_prefill_tokens * widest * (itemsize + 4)
    head = config.scheduler.max_requests * model.vocab_size * 4 * 4
    padding_tokens = config.scheduler.max_requests * config.cache.page_size * PAGES_PER_BLOCK
    layer_bytes = model.kv_bytes_per_token(itemsize) // model.num_layers
    return max(prefill, head, GATHERED_COPIES * padding_tokens * layer_bytes)


def check_programs(plan: MemoryPlan, temp_bytes: int) -> None:
    """Raise ConfigError where the compiled programs' scratch memory does not fit as well."""
    needed_bytes = plan.weight_bytes + plan.pool_bytes + temp_bytes
    if plan.free_bytes is not None and needed_bytes > plan.free_bytes:
        raise ConfigError(
            f"weights ({plan.weight_bytes / GIB:.2f} GiB), KV cache ({plan.pool_bytes / GIB:.2f}) "
            f"and the programs' scratch memory ({temp_bytes / GIB:.2f}) need "
            f"{needed_bytes / GIB:.2f} GiB, and {plan.free_bytes / GIB:.2f} are free; lower "
            "--config.cache.device_bytes or --config.scheduler.max_requests"
        )


def _check_device_bytes(
    device_bytes: int, bytes_of_page: int, free_bytes: int | None, weight_bytes: int
) -> None:
    if device_bytes < bytes_of_page:
        raise ConfigError(
            f"--config.cache.device_bytes is {device_bytes}; one page takes {bytes_of_page} bytes, "
            "so it must be at least that"
        )
    if free_bytes is not None and device_bytes > free_bytes - weight_bytes:
        raise ConfigError(
            f"--config.cache.device_bytes is {device_bytes}; after the weights "
            f"{free_bytes - weight_bytes} bytes are free on the device, so it must be at most that"
        )


def _round_down(value: int) -> int:
    """Keep the leading bits, so that a slightly different free memory gives the same programs."""
    shift = max(value.bit_length() - _SIGNIFICANT_BITS, 0)
    return value >> shift << shift
