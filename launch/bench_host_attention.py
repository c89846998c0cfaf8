"""Measure the host attention op against the machine's memory and against other implementations.

    python -m launch.bench_host_attention --output=docs/results/host_attention/bfloat16.json

Each cell (head shape, dtype, instruction set, threads, context, batch) reads KV from memory only:
calls rotate over more than 2 GiB. A round times every contestant in turn, so noise meets all alike;
what counts is the median over rounds of (KV bytes per second) / (bytes per second of reading the
same memory in order with the same threads). Rounds in which other processes took CPU time are
taken again, and each row says how much they had in those that were kept. Contestants, one layer a
call: `jit`, attend as a user calls it; `compiled`, append and attend compiled ahead of time with
the pool donated, as the engine calls it; `torch_sdpa`, the fastest of torch's formulations where
torch is installed; `jnp` under jit. With --native also, interleaved with a reader of its own,
`kernel`, the op without XLA, and ggml's flash attention where the native benchmark was built with
it (cpu_ops/README.md); and a group of rows that tells where the limit lies.
"""

import functools
import importlib
import importlib.util
import json
import os
import pathlib
import resource
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

from apex_jax.ops import host_attention, native_library
from launch.environment import environment
from launch.measuring import ResultFile, Row

_OUTPUT = flags.DEFINE_string("output", None, "JSON file to write.", required=True)
_LIBRARY = flags.DEFINE_string("library", None, "The op's library, if not the installed one.")
_NATIVE = flags.DEFINE_string("native", None, "attention_benchmark, as CMake builds it.")
_SHAPES = flags.DEFINE_list("shapes", ["llama_2_7b", "llama_3_1_8b"], "Head shapes.")
_THREADS = flags.DEFINE_list("threads", ["1", "2"], "Numbers of threads.")
_ISAS = flags.DEFINE_list("isas", [""], "Instruction sets; an empty one is the best.")
_DTYPES = flags.DEFINE_list("dtypes", ["bfloat16", "float16"], "Dtypes of the KV and queries.")
_CELLS = flags.DEFINE_list(
    "cells",
    ["128x1", "128x64", "1024x8", "4096x8", "32768x1"],
    "CONTEXTxBATCH of each cell.",
)
_PEERS = flags.DEFINE_bool("peers", True, "Also time torch and jnp.")
_ROUNDS = flags.DEFINE_integer("rounds", 5, "Rounds per cell.")
_BUDGET = flags.DEFINE_integer("budget_sec", 3600, "No further cell begins after this time.")
_SMOKE = flags.DEFINE_bool("smoke", False, "A tiny pool: does it run?")

# Query heads, KV heads, head_dim.
SHAPES = {
    "llama_2_7b": (32, 32, 128),
    "llama_3_1_8b": (32, 8, 128),
    "llama_3_1_70b": (64, 8, 128),
}
PAGE_SIZE = 64
MIN_CALL_SEC = 0.03  # each contestant repeats its call this long in a round
REST_SEC = 0.02
NATIVE_DTYPES = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}
QUIET_SHARE = 0.03  # of a CPU: what others may take in a round that counts
MAX_ATTEMPTS = 3  # times the rounds asked for, until so many were quiet

Step = Callable[[], Any]
Result = TypeVar("Result")


def pool_bytes() -> int:
    return (8 if _SMOKE.value else 2304) << 20


class Pool:
    """More than 2 GiB of one layer's KV, and random block tables that divide it into calls."""

    def __init__(self, kv_heads: int, head_dim: int, dtype: str, context: int, batch: int) -> None:
        pages_per_call = batch * -(-context // PAGE_SIZE)
        page_bytes = kv_heads * 2 * PAGE_SIZE * head_dim * np.dtype(dtype).itemsize
        self.call_bytes = pages_per_call * page_bytes
        self.num_calls = max(2, pool_bytes() // self.call_bytes)
        num_pages = self.num_calls * pages_per_call
        self.array = host_attention.allocate_pool(num_pages, kv_heads, PAGE_SIZE, head_dim, dtype)
        ids = np.random.default_rng(0).permutation(num_pages).astype(np.int32)
        self.tables = [jnp.asarray(part) for part in ids.reshape(self.num_calls, batch, -1)]
        self.lengths = jnp.full((batch,), context, jnp.int32)


def rotate(call: Callable[[int], Any], num_calls: int) -> Step:
    """Return a function that makes the next call on the next part of the memory."""
    state = [0]

    def step() -> None:
        call(state[0] % num_calls)
        state[0] += 1

    return step


def calls_per_sec(step: Step, min_sec: float = MIN_CALL_SEC) -> float:
    """Time a step, once the threads of what ran before have stopped to spin."""
    time.sleep(REST_SEC)
    count, start = 0, time.perf_counter()
    while (elapsed := time.perf_counter() - start) < min_sec or count == 0:
        step()
        count += 1
    return count / elapsed


def others_cpu_sec() -> float:
    """Return the CPU time that other processes have had so far; 0 where Linux does not tell."""
    stat = pathlib.Path("/proc/stat")
    if not stat.exists():
        return 0
    user, nice, system, _, _, irq, softirq, steal = map(int, stat.read_text().split()[1:9])
    busy_sec = (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")
    usages = map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return busy_sec - sum(usage.ru_utime + usage.ru_stime for usage in usages)


def quietest(measure_once: Callable[[], Result], count: int) -> tuple[list[Result], float]:
    """Measure until `count` results are quiet, or often enough; return the quietest.

    The second value is the largest share of a CPU that others had in one of them.
    """
    results: list[tuple[float, int, Result]] = []
    while len(results) < MAX_ATTEMPTS * count:
        start, others_sec = time.perf_counter(), others_cpu_sec()
        result = measure_once()
        share = (others_cpu_sec() - others_sec) / (time.perf_counter() - start)
        results.append((max(share, 0.0), len(results), result))
        if sum(share <= QUIET_SHARE for share, *_ in results) >= count:
            break
    kept = sorted(results)[:count]
    return [result for *_, result in kept], kept[-1][0]


def op_steps(pool: Pool, num_heads: int) -> dict[str, Step]:
    """Return the reader's step and the op's, as `jit` and as `compiled`."""
    kv_heads, head_dim = pool.array.shape[1], pool.array.shape[4]
    batch, dtype = len(pool.lengths), pool.array.dtype
    q = jnp.ones((batch, num_heads, head_dim), dtype)
    qkv = jnp.ones((batch, num_heads + 2 * kv_heads, head_dim), dtype)
    address = pool.array.unsafe_buffer_pointer()
    compiled = (
        jax.jit(host_attention.append_and_attend, donate_argnums=0)
        .lower(pool.array, qkv, pool.tables[0], pool.lengths)
        .compile()
    )

    def read(i: int) -> None:
        native_library.read_memory(address + i * pool.call_bytes, pool.call_bytes)

    def jit(i: int) -> None:
        out, _ = host_attention.attend(pool.array, q, pool.tables[i], pool.lengths)
        out.block_until_ready()

    def as_the_engine(i: int) -> None:
        pool.array, out, _ = compiled(pool.array, qkv, pool.tables[i], pool.lengths)
        out.block_until_ready()

    calls = {"read": read, "jit": jit, "compiled": as_the_engine}
    return {name: rotate(call, pool.num_calls) for name, call in calls.items()}


def torch_step(
    shape: tuple[int, int, int], dtype: str, context: int, batch: int, threads: int
) -> tuple[str, Step]:
    """Return the name and the step of torch's fastest formulation over contiguous KV."""
    torch = importlib.import_module("torch")
    torch.set_num_threads(threads)
    heads, kv_heads, head_dim = shape
    kind = getattr(torch, dtype)
    call_bytes = 2 * batch * kv_heads * context * head_dim * np.dtype(dtype).itemsize
    num_calls = max(2, pool_bytes() // 2 // call_bytes)
    # Written to: memory that was only asked for is one page of zeros, in every cache.
    kv = torch.full((num_calls, 2, batch, kv_heads, context, head_dim), 0.5, dtype=kind)
    q_bn1h = torch.ones(batch, heads, 1, head_dim, dtype=kind)
    q_bkgh = q_bn1h.view(batch, kv_heads, heads // kv_heads, head_dim)
    attend = torch.nn.functional.scaled_dot_product_attention
    scale = head_dim**-0.5

    def repeated(x_bksh: Any) -> Any:
        expanded = x_bksh[:, :, None].expand(-1, -1, heads // kv_heads, -1, -1)
        return expanded.reshape(batch, heads, context, head_dim)

    def matmuls(k: Any, v: Any) -> Any:
        scores = torch.matmul(q_bkgh, k.transpose(-1, -2)) * scale
        return torch.matmul(torch.softmax(scores, -1), v)

    formulations = {
        "sdpa, enable_gqa": lambda k, v: attend(q_bn1h, k, v, enable_gqa=heads != kv_heads),
        "sdpa, a group as query tokens": lambda k, v: attend(q_bkgh, k, v),
        "sdpa, repeated KV": lambda k, v: attend(q_bn1h, repeated(k), repeated(v)),
        "matmul, softmax, matmul": matmuls,
    }
    steps = {
        name: rotate(lambda i, call=call: call(kv[i, 0], kv[i, 1]), num_calls)
        for name, call in formulations.items()
        if heads != kv_heads or name not in ("sdpa, repeated KV", "sdpa, a group as query tokens")
    }
    for step in steps.values():
        step()
    best = max(steps, key=lambda name: calls_per_sec(steps[name]))
    return best, steps[best]


@jax.jit
def _jnp_attend(q_bkgh: jax.Array, kv_2bksh: jax.Array) -> jax.Array:
    scores = jnp.einsum("bkgh,bksh->bkgs", q_bkgh, kv_2bksh[0], preferred_element_type=jnp.float32)
    weights = jax.nn.softmax(scores * q_bkgh.shape[-1] ** -0.5).astype(kv_2bksh.dtype)
    return jnp.einsum("bkgs,bksh->bkgh", weights, kv_2bksh[1])


def jnp_step(shape: tuple[int, int, int], dtype: str, context: int, batch: int) -> Step:
    """Return jnp's step; XLA's own threads, as many as there are CPUs."""
    heads, kv_heads, head_dim = shape
    call_bytes = 2 * batch * kv_heads * context * head_dim * np.dtype(dtype).itemsize
    num_calls = max(2, pool_bytes() // 2 // call_bytes)
    kv = [jnp.zeros((2, batch, kv_heads, context, head_dim), dtype) for _ in range(num_calls)]
    q = jnp.ones((batch, kv_heads, heads // kv_heads, head_dim), dtype)
    return rotate(lambda i: _jnp_attend(q, kv[i]).block_until_ready(), num_calls)


def measure(name: str, dtype: str, context: int, batch: int, op: native_library.HostOp) -> Row:
    """Return one cell's row: of each contestant GB/s and the quotient by the reader's."""
    shape = num_heads, kv_heads, head_dim = SHAPES[name]
    pool = Pool(kv_heads, head_dim, dtype, context, batch)
    kv_bytes = 2 * batch * context * kv_heads * head_dim * np.dtype(dtype).itemsize
    row: Row = {
        "shape": name,
        "dtype": dtype,
        "isa": op.isa,
        "threads": op.num_threads,
        "context": context,
        "batch": batch,
    }
    steps = op_steps(pool, num_heads)
    if _PEERS.value:
        if importlib.util.find_spec("torch") is not None:
            row["torch_formulation"], steps["torch_sdpa"] = torch_step(
                shape, dtype, context, batch, op.num_threads
            )
        steps["jnp"] = jnp_step(shape, dtype, context, batch)
    for step in steps.values():
        step()  # compiles

    def one_round() -> dict[str, float]:
        per_sec = {key: calls_per_sec(step) for key, step in steps.items()}
        num_bytes = dict.fromkeys(steps, kv_bytes) | {"read": pool.call_bytes}
        return {key: per_sec[key] * num_bytes[key] / 1e9 for key in steps}

    rounds, row["others_cpu_share"] = quietest(one_round, _ROUNDS.value)
    rates = {key: [one[key] for one in rounds] for key in steps}
    row["read_gb_per_sec"] = statistics.median(rates["read"])
    row["least_read_gb_per_sec"] = min(rates["read"])
    row |= {key: against(rates[key], rates["read"]) for key in steps if key != "read"}
    if _NATIVE.value:
        row |= native_columns(shape, dtype, context, batch, op)
    return row


def against(rates: list[float], read_rates: list[float]) -> dict[str, float]:
    """Return the median rate, and the median and the extremes of its rounds' quotients."""
    quotients = [rate / read for rate, read in zip(rates, read_rates, strict=True)]
    numbers = {
        "gb_per_sec": statistics.median(rates),
        "of_read": statistics.median(quotients),
        "least_of_read": min(quotients),
        "most_of_read": max(quotients),
    }
    return {key: float(f"{number:.4g}") for key, number in numbers.items()}


def run_native(
    shape: tuple[int, int, int],
    dtype: str,
    context: int,
    batch: int,
    op: native_library.HostOp,
    **others: int,
) -> dict[str, Any]:
    """Return what the native benchmark prints for a cell; others: its remaining settings."""
    num_heads, kv_heads, head_dim = shape
    settings = {
        "kv_heads": kv_heads,
        "group": num_heads // kv_heads,
        "head_dim": head_dim,
        "dtype": NATIVE_DTYPES[dtype],
        "context": context,
        "batch": batch,
        "threads": op.num_threads,
        "page": PAGE_SIZE,
        "isa": op.isa,
        "rounds": _ROUNDS.value,
        "pool_mib": pool_bytes() >> 20,
    }
    settings |= others
    command = [_NATIVE.value, *(f"{key}={value}" for key, value in settings.items())]
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return json.loads(printed)


def native_columns(
    shape: tuple[int, int, int], dtype: str, context: int, batch: int, op: native_library.HostOp
) -> Row:
    """Return the cell's native contestants, against their own reader."""
    (found,), share = quietest(lambda: run_native(shape, dtype, context, batch, op), 1)
    read_rates = found["read"]["gb_per_sec"]
    names = {"attend": "kernel", "ggml_by_head": "ggml_by_head", "ggml_by_token": "ggml_by_token"}
    columns: Row = {
        "native_others_cpu_share": share,
        "native_read_gb_per_sec": statistics.median(read_rates),
        "least_native_read_gb_per_sec": min(read_rates),
    }
    return columns | {
        name: against(found[key]["gb_per_sec"], read_rates)
        for key, name in names.items()
        if key in found
    }


def call_overhead(op: native_library.HostOp) -> Iterator[Row]:
    """Yield the microseconds of the least call, one token of one head, by the way it is called."""
    pool = host_attention.allocate_pool(8, 1, PAGE_SIZE, 8, "bfloat16")
    q = jnp.ones((1, 1, 8), jnp.bfloat16)
    qkv = jnp.ones((1, 3, 8), jnp.bfloat16)
    tables, lengths = jnp.zeros((1, 1), jnp.int32), jnp.ones((1,), jnp.int32)
    calls_inside = 200

    @jax.jit
    def chain(pool: jax.Array, q: jax.Array) -> jax.Array:
        for _ in range(calls_inside):
            q, _ = host_attention.attend(pool, q, tables, lengths)
        return q

    def jit() -> None:
        host_attention.attend(pool, q, tables, lengths)[0].block_until_ready()

    def inside() -> None:
        chain(pool, q).block_until_ready()

    engine_pool = [host_attention.allocate_pool(8, 1, PAGE_SIZE, 8, "bfloat16")]
    compiled = (
        jax.jit(host_attention.append_and_attend, donate_argnums=0)
        .lower(engine_pool[0], qkv, tables, lengths)
        .compile()
    )

    def as_the_engine() -> None:
        engine_pool[0], out, _ = compiled(engine_pool[0], qkv, tables, lengths)
        out.block_until_ready()

    steps = {"jit": (jit, 1), "compiled": (as_the_engine, 1), "in_one_program": (inside, 200)}
    for name, (step, calls) in steps.items():
        step()
        samples, share = quietest(functools.partial(calls_per_sec, step, 0.1), _ROUNDS.value)
        microseconds = 1e6 / calls / statistics.median(samples)
        yield {"call": name, "microseconds": microseconds, "others_cpu_share": share}
    if _NATIVE.value:
        run = functools.partial(run_native, (1, 1, 8), "bfloat16", 1, 1, op, pool_mib=0)
        (found,), share = quietest(run, 1)
        microseconds = found["attend"]["least_microseconds_per_call"]
        yield {"call": "kernel", "microseconds": microseconds, "others_cpu_share": share}


def limits(op: native_library.HostOp) -> Iterator[Row]:
    """Yield what tells where the limit lies, by group size, dtype and instruction set.

    On KV that stays in the L2 cache (512 tokens of one KV head) the kernel's rate is what its
    arithmetic allows; beside the read rate of memory it says which of the two is the limit.
    """
    shapes = {name: SHAPES[name] for name in _SHAPES.value}
    for isa in [name or op.isa for name in _ISAS.value]:
        for dtype in _DTYPES.value:
            for name, (num_heads, kv_heads, head_dim) in shapes.items():
                group = num_heads // kv_heads
                run = functools.partial(
                    run_native,
                    (group, 1, head_dim),
                    dtype,
                    512,
                    1,
                    op._replace(isa=isa),
                    pool_mib=0,
                )
                (found,), share = quietest(run, 1)
                yield {
                    "shape": name,
                    "group": group,
                    "dtype": dtype,
                    "isa": isa,
                    "cached_kernel_gb_per_sec": statistics.median(found["attend"]["gb_per_sec"]),
                    "cached_read_gb_per_sec": statistics.median(found["read"]["gb_per_sec"]),
                    "instructions_per_64_bytes": run(count=1).get("instructions_per_64_bytes"),
                    "others_cpu_share": share,
                }


def cells(op_of: Callable[[int, str], native_library.HostOp]) -> Iterator[Row]:
    for isa in _ISAS.value:
        for threads in map(int, _THREADS.value):
            for dtype in _DTYPES.value:
                for name in _SHAPES.value:
                    for cell in _CELLS.value:
                        context, batch = map(int, cell.split("x"))
                        yield measure(name, dtype, context, batch, op_of(threads, isa))


def main(argv: list[str]) -> None:
    """Measure what the flags ask for and write the JSON."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {argv[1:]}")
    for name in _SHAPES.value:
        if name not in SHAPES:
            raise app.UsageError(f"--shapes={name}: known are {', '.join(SHAPES)}")
    library = pathlib.Path(_LIBRARY.value) if _LIBRARY.value else None
    op = native_library.load(library, num_threads=1)
    header = {
        "environment": environment(),
        "smoke": _SMOKE.value,
        "isas": op.supported_isas,
        "page_size": PAGE_SIZE,
        "rounds": _ROUNDS.value,
    }
    results = ResultFile(pathlib.Path(_OUTPUT.value), header, _BUDGET.value)
    if _PEERS.value and importlib.util.find_spec("torch") is None:
        results.leave_out("torch_sdpa", "torch is not installed")
    results.measure("call_overhead", functools.partial(call_overhead, op))
    configure = lambda threads, isa: native_library.configure(num_threads=threads, isa=isa)  # noqa: E731
    if _NATIVE.value:
        results.measure("limits", functools.partial(limits, op))
    results.measure("cells", functools.partial(cells, configure))
    if results.content["failed"]:
        raise SystemExit(1)


if __name__ == "__main__":
    app.run(main)
