"""The host op's executables, and the pools they work on.

Owns the shapes that the host lane runs in: append and attend by row bucket, page moves by bucket of
page counts. Block tables have one fixed width, so that shapes depend on the bucket alone. Compiled
ahead of time, so that nothing compiles afterwards. Called by the host lane.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Float

from apex_jax.config import ConfigError, LlamaConfig
from apex_jax.ops import host_attention
from apex_jax.programs import ProgramKey


class HostPrograms:
    """All host executables of one model.

    rows: buckets of cohorts. written_pages, read_pages: buckets of how many come from the device at
    once, and go there. max_sequence_pages: of the longest sequence, the width of block tables.
    device: the CPU device whose memory holds the pools; where a CPU stands in for the
    accelerator, another one than that. native_library.load() comes before.
    """

    def __init__(
        self,
        model: LlamaConfig,
        *,
        dtype: np.dtype,
        num_pages: int,
        page_size: int,
        max_sequence_pages: int,
        rows: Iterable[int],
        written_pages: Iterable[int],
        read_pages: Sequence[int],
        device: jax.Device,
    ):
        self.max_sequence_pages, self.read_pages = max_sequence_pages, read_pages
        self._num_layers, self._dtype, self._device = model.num_layers, dtype, device
        self._page_shape = (model.num_kv_heads, 2, page_size, model.head_dim)
        self._num_pages = num_pages
        self._executables: dict[ProgramKey, Any] = {}
        kv_heads = model.num_kv_heads

        def struct(shape: tuple[int, ...], dtype: np.dtype) -> Any:
            sharding = jax.sharding.SingleDeviceSharding(device)
            return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

        def compile_for(count: int, function: Callable[..., Any], *arguments: Any) -> None:
            donated = () if function is host_attention.read_pages else (0,)
            lowered = jax.jit(function, donate_argnums=donated).lower(*arguments)
            self._executables[ProgramKey(function.__name__, (count,))] = lowered.compile()

        int32 = np.dtype("int32")
        pool = struct((num_pages, *self._page_shape), dtype)
        count = struct((), int32)
        for num_rows in rows:
            qkv = struct((num_rows, model.num_heads + 2 * kv_heads, model.head_dim), dtype)
            tables = struct((num_rows, max_sequence_pages), int32)
            lengths = struct((num_rows,), int32)
            compile_for(
                num_rows, host_attention.append_and_attend, pool, qkv, tables, lengths, count
            )
        for num_written in written_pages:
            pages = struct((num_written, *self._page_shape), dtype)
            ids = struct((num_written,), int32)
            compile_for(num_written, host_attention.write_pages, pool, pages, ids, count)
        for num_read in read_pages:
            ids = struct((num_read,), int32)
            compile_for(num_read, host_attention.read_pages, pool, ids, count)

    def __getitem__(self, key: ProgramKey) -> Any:
        return self._executables[key]

    def allocate(self) -> list[Float[Array, "p k 2 z h"]]:
        """Return a zeroed pool for every layer."""
        kv_heads, _, page_size, head_dim = self._page_shape
        shape = (self._num_pages, kv_heads, page_size, head_dim)
        return [
            host_attention.allocate_pool(*shape, self._dtype, self._device)
            for _ in range(self._num_layers)
        ]


def choose_host_device(device: jax.Device) -> jax.Device:
    """Return the CPU device that holds the host's pools beside an accelerator or its stand-in.

    Raises ConfigError where JAX has none.
    """
    try:
        candidates = jax.devices("cpu")
    except RuntimeError:
        raise ConfigError(
            "a host lane needs JAX's CPU platform beside the GPU's: add it, as in "
            "JAX_PLATFORMS=cuda,cpu, or leave JAX_PLATFORMS unset"
        ) from None
    for candidate in candidates:
        if candidate != device:
            return candidate
    raise ConfigError(
        "a host lane beside a CPU needs two CPU devices: "
        'jax.config.update("jax_num_cpu_devices", 2) before their first use'
    )
