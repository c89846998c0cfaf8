"""Measure the two parts of a decoder layer apart: attention over the KV cache, and the linear work.

    python -m launch.bench_layers --output=layers.json

Attention is the engine's own, over paged KV, and beside it whatever other kernels this JAX offers.
Each sample runs a chain of four layers with pools and weights of their own, so that nothing stays
in a cache that a whole sweep would have evicted. Times are of one layer: medians in seconds, with
percentiles.
"""

import dataclasses
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags
from flax import nnx

from apex_jax import packing
from apex_jax.attention import decode_attention
from apex_jax.buckets import PAGES_PER_BLOCK
from apex_jax.models import weights
from apex_jax.models.llama import State
from apex_jax.plan import DecodeBatch
from launch.environment import environment
from launch.measuring import (
    ResultFile,
    Row,
    architecture,
    measure_bandwidth,
    reason,
    spread,
    time_chain,
)

_OUTPUT = flags.DEFINE_string("output", "docs/results/gpu_check/layers.json", "Result file.")
_BUDGET = flags.DEFINE_float("budget_sec", 75.0, "After this time no further group begins.")
_SMOKE = flags.DEFINE_bool("smoke", False, "Tiny sizes: shows that the script runs, no more.")
_DTYPE = flags.DEFINE_enum("dtype", "bfloat16", ["bfloat16", "float16", "float32"], "Of all.")
_SHAPES = flags.DEFINE_list(
    "model_shapes", ["llama_3_1_8b", "llama_2_7b"], "Heads to attend with: GQA, MHA."
)

PAGE_SIZE = 16
NUM_LAYERS = 4
MAX_KV_BYTES = 6 * 2**30  # of all layers together; other kernels need copies in their own layouts
CASES = ((16, 4096), (64, 1024), (1, 4096), (4, 512), (4, 16384), (16, 512), (64, 256))
NUM_CASES_OF_OTHERS = 2  # what every kernel is timed on
LINEAR_ROWS = (2, 4, 8, 16, 32, 64, 128, 256, 512)

Kernel = Callable[..., jax.Array]


@dataclasses.dataclass(frozen=True)
class Bench:
    device: jax.Device
    dtype: Any
    smoke: bool
    bandwidth: float

    @property
    def timing(self) -> dict[str, int]:
        return (
            {"num_steps": 3, "num_repeats": 2}
            if self.smoke
            else {"num_steps": 10, "num_repeats": 7}
        )


def time_layers(bench: Bench, kernel: Kernel, q: jax.Array, layers: tuple) -> list[float]:
    """Return seconds per layer of a chain: each layer's output is the next one's query."""

    def chain(q: jax.Array, layers: tuple) -> jax.Array:
        for arrays in layers:
            q = kernel(q, *arrays)
        return q

    compiled = jax.jit(chain).lower(q, layers).compile()
    return [
        sec / len(layers) for sec in time_chain(lambda q: compiled(q, layers), q, **bench.timing)
    ]


def other_kernels(rows: int, context: int, table_bm: jax.Array) -> dict[str, tuple[Kernel, Kernel]]:
    """Return kernels as (layout, kernel): `layout` turns paged K or V into what it takes."""
    lengths = jnp.full(rows, context, jnp.int32)

    def contiguous(pages_pkzh: jax.Array) -> jax.Array:  # "b s k h"
        _, k, _, h = pages_pkzh.shape
        return pages_pkzh[table_bm].swapaxes(2, 3).reshape(rows, context, k, h)

    def dense(
        implementation: Any, q_bnh: jax.Array, k_bskh: jax.Array, v_bskh: jax.Array
    ) -> jax.Array:
        attend: Any = partial(jax.nn.dot_product_attention, implementation=implementation)
        return attend(q_bnh[:, None], k_bskh, v_bskh, key_value_seq_lengths=lengths)[:, 0]

    def pallas(q_bnh: jax.Array, k_kpzh: jax.Array, v_kpzh: jax.Array) -> jax.Array:
        from jax.experimental.pallas.ops.gpu.paged_attention import paged_attention

        scaled = q_bnh * jnp.asarray(q_bnh.shape[-1] ** -0.5, q_bnh.dtype)
        return paged_attention(scaled, k_kpzh, v_kpzh, table_bm, lengths).astype(q_bnh.dtype)

    return {
        "cudnn_contiguous": (contiguous, partial(dense, "cudnn")),
        "xla_contiguous": (contiguous, partial(dense, "xla")),
        "pallas_paged": (lambda pages_pkzh: pages_pkzh.swapaxes(0, 1), pallas),
    }


def measure_attention(bench: Bench, shape: str, only_engine: bool) -> Iterator[Row]:
    """Attention of one layer by rows and context; share is of KV bytes over measured bandwidth."""
    model = architecture("smoke" if bench.smoke else shape)
    n, k, h = model.num_heads, model.num_kv_heads, model.head_dim
    cases = CASES if only_engine else CASES[:NUM_CASES_OF_OTHERS]
    for rows, context in ((2, 256),) if bench.smoke else cases:
        kv_bytes = 2 * rows * context * k * h * bench.dtype.itemsize
        case: Row = {"shape": shape, "heads": n, "kv_heads": k, "rows": rows, "context": context}
        case["kv_bytes"] = kv_bytes
        if kv_bytes * NUM_LAYERS > MAX_KV_BYTES:
            yield {**case, "left_out": "too large for this measurement's pools"}
            continue
        num_pages = rows * context // PAGE_SIZE
        table = np.random.default_rng(0).permutation(num_pages).astype(np.int32).reshape(rows, -1)
        batch = DecodeBatch(
            np.arange(rows, dtype=np.int32), np.full(rows, context - 1, np.int32), table
        )
        blocks = packing.num_blocks(batch, PAGE_SIZE * PAGES_PER_BLOCK)
        packed_ci = packing.pack_blocks(batch, rows=rows, blocks=blocks, page_size=PAGE_SIZE)
        blocks_ci = jax.device_put(packed_ci, bench.device)

        @jax.jit
        def make_pages(key: jax.Array, num_pages=num_pages) -> jax.Array:
            return jax.random.normal(key, (num_pages, k, PAGE_SIZE, h), bench.dtype)

        keys = jax.random.split(jax.random.key(0), 2 * NUM_LAYERS + 1)
        pages = [make_pages(key) for key in keys[1:]]
        layers = tuple(zip(pages[::2], pages[1::2], strict=True))
        q = jax.random.normal(keys[0], (rows, n, h), bench.dtype)

        def engine(q: jax.Array, k_pages: jax.Array, v_pages: jax.Array, blocks_ci=blocks_ci):
            used = blocks_ci[:, 0], blocks_ci[:, 1]
            return decode_attention(q, k_pages, v_pages, blocks_ci[:, 2:], *used)

        as_is = lambda pages_pkzh: pages_pkzh  # noqa: E731
        others = other_kernels(rows, context, jnp.asarray(table))
        kernels = {"engine": (as_is, engine)} if only_engine else others
        expected = np.asarray(jax.jit(engine)(q, *layers[0]), np.float32)
        for name, (layout, kernel) in kernels.items():
            row: Row = {**case, "kernel": name}
            try:
                placed = jax.tree.map(jax.jit(layout), layers)
                error = np.abs(np.asarray(jax.jit(kernel)(q, *placed[0]), np.float32) - expected)
                samples = time_layers(bench, kernel, q, placed)
                share = kv_bytes / np.median(samples) / bench.bandwidth
                yield {
                    **row,
                    **spread(samples),
                    "share_of_bandwidth": share,
                    "max_error": error.max(),
                }
            except Exception as error:
                yield {**row, "error": reason(error)}


def measure_linear(bench: Bench, shape: str) -> Iterator[Row]:
    """Everything of a layer but attention, by rows; share is of weight bytes over bandwidth."""
    model = dataclasses.replace(
        architecture("smoke" if bench.smoke else shape), num_layers=NUM_LAYERS
    )
    # Without a vocabulary: only the layers are used.
    model = dataclasses.replace(model, vocab_size=2, tie_embeddings=True)
    loaded = weights.dummy(model, bench.dtype, bench.device, seed=0)
    graph, _ = weights.graphs(model, bench.dtype)

    def layer(x_bd: jax.Array, state: State, positions_b: jax.Array) -> jax.Array:
        one = nnx.merge(graph, state)
        q, k, v = one.pre_attention(x_bd, positions_b)
        # Attention stands in for nothing here, but keys and values must not be optimised away.
        used = (k.sum() + v.sum()) * jnp.asarray(0, q.dtype)
        return one.post_attention(x_bd, q + used)

    layer_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(loaded.layers[0]))
    for rows in (2, 4) if bench.smoke else LINEAR_ROWS:
        positions_b = jax.device_put(np.arange(rows, dtype=np.int32), bench.device)
        x_bd = jnp.ones((rows, model.d_model), bench.dtype, device=bench.device)
        arrays = tuple((state, positions_b) for state in loaded.layers)
        samples = time_layers(bench, layer, x_bd, arrays)
        share = layer_bytes / np.median(samples) / bench.bandwidth
        row: Row = {"shape": shape, "rows": rows, "weight_bytes": layer_bytes}
        yield {**row, **spread(samples), "share_of_bandwidth": share}


def main(argv: Sequence[str]) -> int:
    del argv
    device, smoke = jax.devices()[0], _SMOKE.value
    dtype = jnp.dtype("float32" if smoke else _DTYPE.value)
    header = {
        "what": "one layer's attention and linear work; seconds per layer, bytes",
        "smoke": smoke,
        "dtype": dtype.name,
        "layers_in_chain": NUM_LAYERS,
        "environment": environment(device),
    }
    results = ResultFile(Path(_OUTPUT.value), header, _BUDGET.value)
    measured: list[float] = []

    def bandwidth() -> list[Row]:
        rows, best = measure_bandwidth(device, smoke=smoke)
        measured.append(best)
        return rows

    results.measure("bandwidth", bandwidth)
    bench = Bench(device, dtype, smoke, measured[0] if measured else float("nan"))
    first, *_ = _SHAPES.value
    for shape in _SHAPES.value:
        name = f"attention_{shape}"
        results.measure(name, lambda shape=shape: measure_attention(bench, shape, True))
    results.measure("linear", lambda: measure_linear(bench, first))
    for shape in _SHAPES.value:
        name = f"other_attention_{shape}"
        results.measure(name, lambda shape=shape: measure_attention(bench, shape, False))
    print(f"results in {results.path}")
    return 1 if results.content["failed"] else 0


if __name__ == "__main__":
    sys.exit(app.run(main))
