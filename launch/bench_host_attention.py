"""Measure the host attention op against the machine's memory and against other implementations.

    python -m launch.bench_host_attention --output=docs/results/host_attention.json

Each cell (head shape, dtype, threads, context, batch) reads KV from memory only: calls rotate over
more than 2 GiB. A round times every contestant in turn, so noise meets all alike; what counts is
the median over rounds of (KV bytes per second) / (bytes per second of reading the same memory in
order with the same threads). The op is called through jax.jit, one layer a call, and inside one
program as the overhead rows. Peers: torch's scaled_dot_product_attention (contiguous KV, where
torch is installed) and attention in plain jnp (contiguous KV). --native adds the bare kernel.
"""

import functools
import importlib
import json
import pathlib
import statistics
import subprocess
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

from apex_jax.ops import host_attention, native_library
from launch.environment import environment

_OUTPUT = flags.DEFINE_string("output", None, "JSON file to write.", required=True)
_LIBRARY = flags.DEFINE_string("library", None, "The op's library, if not the installed one.")
_NATIVE = flags.DEFINE_string("native", None, "attention_benchmark, as CMake builds it.")
_THREADS = flags.DEFINE_list("threads", ["1", "2"], "Numbers of threads.")
_ISA = flags.DEFINE_string("isa", "", "Instruction set; empty for the best.")
_DTYPES = flags.DEFINE_list("dtypes", ["bfloat16", "float16"], "Dtypes of the KV.")
_CELLS = flags.DEFINE_list(
    "cells",
    ["128x1", "128x64", "512x16", "1024x8", "1024x64", "4096x4", "8192x1", "8192x8", "32768x2"],
    "CONTEXTxBATCH of each cell.",
)
_PEERS = flags.DEFINE_bool("peers", True, "Also time torch and jnp.")
_ROUNDS = flags.DEFINE_integer("rounds", 5, "Rounds per cell.")

SHAPES = {"llama-2-7b": (32, 32, 128), "llama-3.1-8b": (32, 8, 128)}  # query heads, KV heads, h
PAGE_SIZE = 64
POOL_BYTES = 2304 << 20
MIN_CALL_SEC = 0.03  # each contestant repeats its call this long in a round
NATIVE_DTYPES = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}


class Pool:
    """More than 2 GiB of one layer's KV, and random block tables that divide it into calls."""

    def __init__(self, kv_heads: int, head_dim: int, dtype: str, context: int, batch: int) -> None:
        pages_per_call = batch * -(-context // PAGE_SIZE)
        page_bytes = kv_heads * 2 * PAGE_SIZE * head_dim * np.dtype(dtype).itemsize
        self.num_calls = max(2, POOL_BYTES // (pages_per_call * page_bytes))
        num_pages = self.num_calls * pages_per_call
        self.array = host_attention.allocate_pool(num_pages, kv_heads, PAGE_SIZE, head_dim, dtype)
        self.call_bytes = pages_per_call * page_bytes
        ids = np.random.default_rng(0).permutation(num_pages).astype(np.int32)
        self.tables = [jnp.asarray(part) for part in ids.reshape(self.num_calls, batch, -1)]
        self.lengths = jnp.full((batch,), context, jnp.int32)


def rotate(call: Callable[[int], Any], num_calls: int) -> Callable[[], None]:
    """Return a function that makes the next call on the next part of the memory."""
    state = [0]

    def step() -> None:
        call(state[0] % num_calls)
        state[0] += 1

    return step


def calls_per_sec(step: Callable[[], None]) -> float:
    count, start = 0, time.perf_counter()
    while (elapsed := time.perf_counter() - start) < MIN_CALL_SEC or count == 0:
        step()
        count += 1
    return count / elapsed


def torch_peer(shape, dtype: str, context: int, batch: int, threads: int, num_calls: int):
    """Return torch's step over as many contiguous copies as the pool has calls, or None."""
    try:
        torch = importlib.import_module("torch")
    except ImportError:
        return None
    torch.set_num_threads(threads)
    heads, kv_heads, head_dim = shape
    kind = getattr(torch, dtype)
    kv = torch.zeros(num_calls, 2, batch, kv_heads, context, head_dim, dtype=kind)
    q = torch.ones(batch, heads, 1, head_dim, dtype=kind)
    attend = functools.partial(
        torch.nn.functional.scaled_dot_product_attention, enable_gqa=heads != kv_heads
    )
    return rotate(lambda i: attend(q, kv[i, 0], kv[i, 1]), num_calls)


@jax.jit
def _jnp_attend(q_bkgh: jax.Array, kv_2bksh: jax.Array) -> jax.Array:
    scores = jnp.einsum("bkgh,bksh->bkgs", q_bkgh, kv_2bksh[0], preferred_element_type=jnp.float32)
    weights = jax.nn.softmax(scores * q_bkgh.shape[-1] ** -0.5).astype(kv_2bksh.dtype)
    return jnp.einsum("bkgs,bksh->bkgh", weights, kv_2bksh[1])


def jnp_peer(shape, dtype: str, context: int, batch: int, num_calls: int) -> Callable[[], None]:
    """Return jnp's step; XLA's own threads, as many as there are CPUs."""
    heads, kv_heads, head_dim = shape
    kv = [jnp.zeros((2, batch, kv_heads, context, head_dim), dtype) for _ in range(num_calls)]
    q = jnp.ones((batch, kv_heads, heads // kv_heads, head_dim), dtype)
    return rotate(lambda i: _jnp_attend(q, kv[i]).block_until_ready(), num_calls)


def measure(name: str, dtype: str, context: int, batch: int, op: native_library.HostOp) -> dict:
    """Return one cell's row: GB/s and quotients, medians and extremes over the rounds."""
    shape = heads, kv_heads, head_dim = SHAPES[name]
    pool = Pool(kv_heads, head_dim, dtype, context, batch)
    kv_bytes = 2 * batch * context * kv_heads * head_dim * np.dtype(dtype).itemsize
    q = jnp.ones((batch, heads, head_dim), dtype)
    address = pool.array.unsafe_buffer_pointer()

    def attend(i: int) -> None:
        out, _ = host_attention.attend(pool.array, q, pool.tables[i], pool.lengths)
        out.block_until_ready()

    def read(i: int) -> None:
        native_library.read_memory(address + i * pool.call_bytes, pool.call_bytes)

    steps = {"read": rotate(read, pool.num_calls), "op": rotate(attend, pool.num_calls)}
    if _PEERS.value:
        small = max(2, pool.num_calls // 2)  # both copies beside the pool: at least 1 GiB each
        torch_step = torch_peer(shape, dtype, context, batch, op.num_threads, small)
        if torch_step is not None:
            steps["torch_sdpa"] = torch_step
        steps["jnp"] = jnp_peer(shape, dtype, context, batch, small)
    for step in steps.values():
        step()  # compiles
    rounds = [
        {key: calls_per_sec(step) for key, step in steps.items()} for _ in range(_ROUNDS.value)
    ]
    row: dict[str, Any] = {
        "shape": name,
        "dtype": dtype,
        "threads": op.num_threads,
        "context": context,
        "batch": batch,
    }
    for key in steps:
        bytes_per_call = pool.call_bytes if key == "read" else kv_bytes
        rates = [one[key] * bytes_per_call / 1e9 for one in rounds]
        row[f"{key}_gb_per_sec"] = spread(rates)
        if key != "read":
            read_rates = [one["read"] * pool.call_bytes / 1e9 for one in rounds]
            row[f"{key}_of_read"] = spread(
                [rate / read_rate for rate, read_rate in zip(rates, read_rates, strict=True)]
            )
    return row


def spread(values: list[float]) -> dict[str, float]:
    numbers = {"median": statistics.median(values), "min": min(values), "max": max(values)}
    return {key: round(value, 4) for key, value in numbers.items()}


def native_row(name: str, dtype: str, context: int, batch: int, op: native_library.HostOp) -> str:
    """Return what the native benchmark says of the same cell: the bare kernel, no XLA."""
    heads, kv_heads, head_dim = SHAPES[name]
    settings = {
        "kv_heads": kv_heads,
        "group": heads // kv_heads,
        "head_dim": head_dim,
        "dtype": NATIVE_DTYPES[dtype],
        "context": context,
        "batch": batch,
        "threads": op.num_threads,
        "page": PAGE_SIZE,
        "isa": op.isa,
        "rounds": _ROUNDS.value,
    }
    command = [_NATIVE.value, *(f"{key}={value}" for key, value in settings.items())]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def call_overhead_microseconds() -> dict[str, float]:
    """Return the time of the least call, one token of one head: alone, and inside one program."""
    pool = host_attention.allocate_pool(8, 1, 16, 8, "bfloat16")
    q = jnp.ones((1, 1, 8), jnp.float32)
    tables, lengths = jnp.zeros((1, 1), jnp.int32), jnp.ones((1,), jnp.int32)

    @jax.jit
    def chain(pool, q):
        for _ in range(200):
            q, _ = host_attention.attend(pool, q, tables, lengths)
        return q

    def alone() -> None:
        host_attention.attend(pool, q, tables, lengths)[0].block_until_ready()

    def inside() -> None:
        chain(pool, q).block_until_ready()

    alone()
    inside()
    return {
        "alone": statistics.median(1e6 / calls_per_sec(alone) for _ in range(9)),
        "inside_one_program": statistics.median(5e3 / calls_per_sec(inside) for _ in range(9)),
    }


def main(argv: list[str]) -> None:
    """Measure what the flags ask for and write the JSON."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {argv[1:]}")
    library = pathlib.Path(_LIBRARY.value) if _LIBRARY.value else None
    rows, native_rows = [], []
    op = native_library.load(library, num_threads=1, isa=_ISA.value)
    overhead = call_overhead_microseconds()
    print(f"microseconds a call: {overhead}")
    for threads in map(int, _THREADS.value):
        op = native_library.configure(num_threads=threads, isa=_ISA.value)
        for name in SHAPES:
            for dtype in _DTYPES.value:
                for cell in _CELLS.value:
                    context, batch = map(int, cell.split("x"))
                    rows.append(measure(name, dtype, context, batch, op))
                    print(json.dumps(rows[-1]), flush=True)
                    if _NATIVE.value:
                        native_rows.append(native_row(name, dtype, context, batch, op))
                        print(native_rows[-1], flush=True)
    result = {
        "environment": environment(),
        "isa": op.isa,
        "page_size": PAGE_SIZE,
        "rounds": _ROUNDS.value,
        "microseconds_per_call": overhead,
        "summary_of_cells_with_8k_tokens": summarise(rows),
        "cells": rows,
        "bare_kernel": native_rows,
    }
    pathlib.Path(_OUTPUT.value).parent.mkdir(parents=True, exist_ok=True)
    pathlib.Path(_OUTPUT.value).write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result["summary_of_cells_with_8k_tokens"], indent=1))


def summarise(rows: list[dict]) -> list[dict]:
    """Return the median and the worst quotient of each (shape, dtype, threads)."""
    groups: dict[tuple, list[float]] = {}
    for row in rows:
        if row["context"] * row["batch"] >= 8192:
            key = (row["shape"], row["dtype"], row["threads"])
            groups.setdefault(key, []).append(row["op_of_read"]["median"])
    return [
        {
            "shape": shape,
            "dtype": dtype,
            "threads": threads,
            "median_of_read": round(statistics.median(quotients), 3),
            "worst_of_read": round(min(quotients), 3),
        }
        for (shape, dtype, threads), quotients in groups.items()
    ]


if __name__ == "__main__":
    app.run(main)
