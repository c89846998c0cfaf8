"""How many KV pages device and host get.

Owns the arithmetic from bytes to pages and the reading of free memory. Refuses budgets that cannot
hold the weights or a single page, naming the flag. Called by the engine before anything is loaded.
"""

import math
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
HOST_HEAD_DIM_MULTIPLE = 8  # cpu_ops/layout.h
MAX_HOST_FRACTION = 0.9  # of free memory: the process itself and the system go on needing some
# Of a layer, on their way between the lanes at once (one longer request goes alone): enough to
# overlap copies with compute, and 16 to 64 MiB for 7B and 8B models.
MAX_TRANSIT_PAGES = 256
_SIGNIFICANT_BITS = (
    4  # of an automatic page count: compiled programs depend on it, free memory wavers
)


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes on device and host, and the limits that follow from them.

    scratch_bytes: the estimate of what programs need beside weights and pages. lane_bytes: what a
    host lane takes on the device. free_bytes: what the device had before anything was loaded, None
    where nothing says. num_host_pages, num_staging_pages: 0 without a host lane; the staging plane
    holds one layer of the longest request that the host can hold. is_shared: device and host are
    one memory, because a CPU stands in for the accelerator.
    """

    weight_bytes: int
    page_bytes: int
    num_pages: int
    page_size: int
    scratch_bytes: int
    lane_bytes: int
    free_bytes: int | None
    num_host_pages: int
    num_staging_pages: int
    is_shared: bool
    max_model_len: int

    @property
    def pool_bytes(self) -> int:
        return self.num_pages * self.page_bytes

    @property
    def pool_tokens(self) -> int:
        return self.num_pages * self.page_size

    @property
    def host_pool_bytes(self) -> int:
        return self.num_host_pages * self.page_bytes

    @property
    def host_pool_tokens(self) -> int:
        return self.num_host_pages * self.page_size


def plan_memory(
    config: Config, model: LlamaConfig, dtype: np.dtype, device: jax.Device
) -> MemoryPlan:
    """Divide the memory of device and host; ConfigError where the settings cannot be honoured."""
    page_size, has_host_lane = config.cache.page_size, config.scheduler.has_host_lane
    max_len = _max_len(config, model)
    facts = _Facts.of(config, model, dtype, device, longest_pages=num_pages_for(max_len, page_size))
    num_host_pages = num_staging_pages = lane_bytes = 0
    if has_host_lane:
        num_host_pages = _host_pages(config, facts, stand_in_bytes=0)
        num_staging_pages = min(facts.longest_pages, num_host_pages)
        lane_bytes = host_lane_bytes(
            model,
            dtype,
            page_size=page_size,
            num_staging_pages=num_staging_pages,
            max_prefill_tokens=config.scheduler.max_prefill_tokens,
        )
    num_pages = _device_pages(config, facts, lane_bytes, num_host_pages)
    if has_host_lane and facts.is_shared:
        stand_in_bytes = lane_bytes + int(num_pages * facts.bytes_with_gather)
        num_host_pages = _host_pages(config, facts, stand_in_bytes)
        num_staging_pages = min(num_staging_pages, num_host_pages)
    plan = MemoryPlan(
        weight_bytes=facts.weight_bytes,
        page_bytes=facts.page_bytes,
        num_pages=num_pages,
        page_size=page_size,
        scratch_bytes=facts.scratch_bytes,
        lane_bytes=lane_bytes,
        free_bytes=facts.free_bytes,
        num_host_pages=num_host_pages,
        num_staging_pages=num_staging_pages,
        is_shared=facts.is_shared,
        max_model_len=min(max_len, max(num_pages, num_host_pages) * page_size),
    )
    if config.scheduler.max_model_len is not None and max_len > plan.max_model_len:
        host = f", the host's {plan.host_pool_tokens}" if has_host_lane else ""
        larger = "--config.cache.device_bytes" + (" or host_bytes" if has_host_lane else "")
        raise ConfigError(
            f"--config.scheduler.max_model_len is {max_len}; the KV cache holds "
            f"{plan.pool_tokens} tokens in all ({num_pages} pages){host}, so it must be at most "
            f"that, or the cache larger ({larger})"
        )
    return plan


def host_lane_bytes(
    model: LlamaConfig,
    dtype: np.dtype,
    *,
    page_size: int,
    num_staging_pages: int,
    max_prefill_tokens: int,
) -> int:
    """Return what a host lane takes on the device beside the pool.

    The staging plane; the pages in transit between the lanes, which are copies; and the hidden
    states of the prompts that prefill for the host: they fill the plane, the last chunk is padded,
    and what the embedding yields is kept until the device is known to have passed it.
    """
    layer_page_bytes = page_bytes(model, page_size, dtype) // model.num_layers
    transit_pages = max(MAX_TRANSIT_PAGES, num_staging_pages)
    group_tokens = num_staging_pages * page_size + max_prefill_tokens
    hidden_bytes = 2 * group_tokens * model.d_model * dtype.itemsize
    return (num_staging_pages + transit_pages) * layer_page_bytes + hidden_bytes


@dataclass(frozen=True)
class _Facts:
    """What is known before anything is divided.

    bytes_with_gather: of a page, with what a decode program gathers of it beside the pool.
    longest_pages: of the longest request. free_host_bytes: None also without a host lane.
    """

    device_kind: str
    is_shared: bool
    free_bytes: int | None
    free_host_bytes: int | None
    weight_bytes: int
    scratch_bytes: int
    page_bytes: int
    bytes_with_gather: float
    longest_pages: int

    @staticmethod
    def of(
        config: Config,
        model: LlamaConfig,
        dtype: np.dtype,
        device: jax.Device,
        *,
        longest_pages: int,
    ) -> "_Facts":
        bytes_of_page = page_bytes(model, config.cache.page_size, dtype)
        weight_bytes = model.num_parameters * dtype.itemsize
        free_bytes = free_device_bytes(device)
        if free_bytes is not None and weight_bytes > free_bytes:
            raise ConfigError(
                f"the weights take {weight_bytes / GIB:.2f} GiB in {dtype.name}, and "
                f"{free_bytes / GIB:.2f} GiB are free on {device.device_kind}; use a smaller "
                "model, or --config.model.dtype=float16 where it is wider now"
            )
        return _Facts(
            device_kind=device.device_kind,
            is_shared=device.platform == "cpu",
            free_bytes=free_bytes,
            free_host_bytes=free_host_bytes() if config.scheduler.has_host_lane else None,
            weight_bytes=weight_bytes,
            scratch_bytes=_scratch_bytes(config, model, dtype.itemsize),
            page_bytes=bytes_of_page,
            bytes_with_gather=bytes_of_page * (1 + GATHERED_COPIES / model.num_layers),
            longest_pages=longest_pages,
        )


def _max_len(config: Config, model: LlamaConfig) -> int:
    """Return how long a request may be by settings and model; check that the lanes can hold it."""
    scheduler = config.scheduler
    max_len = scheduler.max_model_len or model.max_position_embeddings
    if max_len > model.max_position_embeddings:
        raise ConfigError(
            f"--config.scheduler.max_model_len is {max_len}; the model was made for at most "
            f"{model.max_position_embeddings} (max_position_embeddings in its config.json)"
        )
    if scheduler.has_host_lane and model.head_dim % HOST_HEAD_DIM_MULTIPLE:
        raise ConfigError(
            f"--config.scheduler.strategy is {scheduler.strategy!r}; the host's attention takes "
            f"heads of multiples of {HOST_HEAD_DIM_MULTIPLE}, and this model's have "
            f"{model.head_dim} dimensions: use device_only"
        )
    return max_len


def _device_pages(config: Config, facts: _Facts, lane_bytes: int, num_host_pages: int) -> int:
    """Return the pages of the device's pool; ConfigError where they do not fit.

    num_host_pages: which count where the host shares the memory and was asked for so much.
    """
    most_pages = config.scheduler.max_requests * facts.longest_pages
    device_bytes = config.cache.device_bytes
    if device_bytes is not None:
        _check_device_bytes(device_bytes, facts, lane_bytes)
        return min(device_bytes // facts.page_bytes, most_pages)
    if facts.free_bytes is None:
        raise ConfigError(
            f"{facts.device_kind} does not say how much of its memory is free; size the KV cache "
            "with --config.cache.device_bytes"
        )
    others_bytes = facts.scratch_bytes + lane_bytes
    if facts.is_shared and config.cache.host_bytes is not None:
        others_bytes += math.ceil(num_host_pages * facts.page_bytes / MAX_HOST_FRACTION)
    left_bytes = facts.free_bytes - facts.weight_bytes - others_bytes
    pool_bytes = left_bytes * config.cache.device_fraction
    if facts.is_shared:
        pool_bytes = min(pool_bytes, MAX_AUTOMATIC_CPU_BYTES)
    num_pages = min(_round_down(int(pool_bytes / facts.bytes_with_gather)), most_pages)
    if num_pages < 1:
        others = "scratch and the host lane" if num_host_pages else "scratch"
        raise ConfigError(
            f"no memory is left for the KV cache: {facts.free_bytes / GIB:.2f} GiB are free, the "
            f"weights take {facts.weight_bytes / GIB:.2f} and {others} about "
            f"{others_bytes / GIB:.2f} GiB; use a smaller model, fewer "
            "--config.scheduler.max_requests, or size the cache yourself with "
            "--config.cache.device_bytes"
        )
    return num_pages


def _host_pages(config: Config, facts: _Facts, stand_in_bytes: int) -> int:
    """Return the pages of the host's pool; ConfigError where they do not fit.

    stand_in_bytes: what a CPU that stands in for the device takes beside weights and scratch.
    """
    host_bytes, free_bytes = config.cache.host_bytes, facts.free_host_bytes
    bytes_of_page = facts.page_bytes
    most_pages = config.scheduler.max_host_requests * facts.longest_pages
    if host_bytes is None and free_bytes is None:
        raise ConfigError(
            "the host does not say how much of its memory is free; size its KV cache with "
            "--config.cache.host_bytes"
        )
    own_bytes = 0
    if facts.is_shared:
        own_bytes = facts.weight_bytes + facts.scratch_bytes + stand_in_bytes
    left_bytes = None if free_bytes is None else max(0, free_bytes - own_bytes)
    if host_bytes is None:
        assert left_bytes is not None
        num_pages = min(_round_down(left_bytes // 2 // bytes_of_page), most_pages)
        if num_pages < 1:
            raise ConfigError(
                f"no memory is left for the host's KV cache: {left_bytes} bytes are free, of which "
                f"it takes half, and one page takes {bytes_of_page}; free some, use "
                "--config.scheduler.strategy=device_only, or size it yourself with "
                "--config.cache.host_bytes"
            )
        return num_pages
    if host_bytes < bytes_of_page:
        raise ConfigError(
            f"--config.cache.host_bytes is {host_bytes}; one page takes {bytes_of_page} bytes, so "
            "it must be at least that"
        )
    num_pages = min(host_bytes // bytes_of_page, most_pages)
    if left_bytes is not None and num_pages * bytes_of_page > left_bytes * MAX_HOST_FRACTION:
        right_bytes = int(left_bytes * MAX_HOST_FRACTION) // bytes_of_page * bytes_of_page
        beside = f" beside the {own_bytes} that the device's stand-in needs" if own_bytes else ""
        raise ConfigError(
            f"--config.cache.host_bytes is {host_bytes}; {left_bytes} bytes are free on the "
            f"host{beside} (its control group's limit counts), and {MAX_HOST_FRACTION:.0%} of them "
            f"may be taken, so it must be at most {right_bytes}"
        )
    return num_pages


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
    head = config.scheduler.max_running * model.vocab_size * 4 * 4
    padding_tokens = config.scheduler.max_requests * config.cache.page_size * PAGES_PER_BLOCK
    layer_bytes = model.kv_bytes_per_token(itemsize) // model.num_layers
    return max(prefill, head, GATHERED_COPIES * padding_tokens * layer_bytes)


def check_programs(plan: MemoryPlan, temp_bytes: int) -> None:
    """Raise ConfigError where the compiled programs' scratch memory does not fit as well."""
    cache_bytes = plan.pool_bytes + plan.lane_bytes
    if plan.is_shared:
        cache_bytes += plan.host_pool_bytes
    needed_bytes = plan.weight_bytes + cache_bytes + temp_bytes
    if plan.free_bytes is not None and needed_bytes > plan.free_bytes:
        raise ConfigError(
            f"weights ({plan.weight_bytes / GIB:.2f} GiB), KV cache ({cache_bytes / GIB:.2f}) "
            f"and the programs' scratch memory ({temp_bytes / GIB:.2f}) need "
            f"{needed_bytes / GIB:.2f} GiB, and {plan.free_bytes / GIB:.2f} are free; lower "
            "--config.cache.device_bytes or --config.scheduler.max_requests"
        )


def _check_device_bytes(device_bytes: int, facts: _Facts, lane_bytes: int) -> None:
    if device_bytes < facts.page_bytes:
        raise ConfigError(
            f"--config.cache.device_bytes is {device_bytes}; one page takes {facts.page_bytes} "
            "bytes, so it must be at least that"
        )
    if facts.free_bytes is None:
        return
    left_bytes = max(0, facts.free_bytes - facts.weight_bytes - lane_bytes)
    if device_bytes > left_bytes:
        others = "the weights" + (" and what the host lane needs" if lane_bytes else "")
        raise ConfigError(
            f"--config.cache.device_bytes is {device_bytes}; after {others} {left_bytes} bytes are "
            "free on the device, so it must be at most that"
        )


def _round_down(value: int) -> int:
    """Keep the leading bits, so that a slightly different free memory gives the same programs."""
    shift = max(value.bit_length() - _SIGNIFICANT_BITS, 0)
    return value >> shift << shift
