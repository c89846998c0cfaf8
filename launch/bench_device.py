"""Measure the device path: whole sweeps of the engine's own programs on dummy weights.

    python -m launch.bench_device --dtype=bfloat16 --output=device_bfloat16.json

The KV cache is filled to stated caps (one pool, of which a cap's share is used), so a sweep reads
the weights and the cap. Times are medians in seconds with 10th and 90th percentiles, shares are of
the memory bandwidth measured in the same run.
"""

import dataclasses
import itertools
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

from apex_jax import kv_cache, packing
from apex_jax.backends.completions import Completions
from apex_jax.backends.xla import XlaBackend
from apex_jax.buckets import PAGES_PER_BLOCK, Buckets
from apex_jax.dispatch import Dispatch
from apex_jax.hardware import Handle, Stage, name_of
from apex_jax.lowering import ProgramKey
from apex_jax.memory import GIB, free_device_bytes
from apex_jax.models import weights
from apex_jax.plan import DecodeBatch, HeadBatch, PrefillBatch, SweepPlan
from apex_jax.policies import DeviceOnly
from apex_jax.programs import Programs, span_of_layers
from apex_jax.request import SamplingParams
from launch.environment import environment
from launch.measuring import (
    ResultFile,
    Row,
    architecture,
    measure_bandwidth,
    now,
    spread,
    time_chain,
)

_OUTPUT = flags.DEFINE_string("output", "docs/results/gpu_check/device.json", "Result file.")
_BUDGET = flags.DEFINE_float("budget_sec", 140.0, "After this time no further group begins.")
_SMOKE = flags.DEFINE_bool("smoke", False, "Tiny sizes: shows that the script runs, no more.")
_DTYPE = flags.DEFINE_enum("dtype", "bfloat16", ["bfloat16", "float16", "float32"], "Of all.")
_SHAPE = flags.DEFINE_string("model_shape", "llama_3_1_8b", "A configs/NAME.py, or a known shape.")
_KV_GIB = flags.DEFINE_list("kv_gib", ["8", "2", "26"], "KV cache held, GiB, in order of worth.")
_ROWS = flags.DEFINE_list("rows", ["1", "4", "16", "64", "128"], "Decode rows.")

PAGE_SIZE = 16
WATCHDOG_SEC = 60.0
CHUNKS = ((1, 512), (1, 128), (1, 32), (4, 128), (1, 2048))
CONTEXT_TOKENS = (2048, 8192)
GREEDY = SamplingParams(temperature=0)
NUCLEUS = SamplingParams(top_p=0.9)
HEADS = {
    "greedy": GREEDY,
    "top_k_40": SamplingParams(top_k=40),
    "uncut": SamplingParams(),
    # Dummy weights score nearly alike, so the nucleus is most of the vocabulary: the worst case.
    "top_p_0.9": NUCLEUS,
}


class TimedBackend:
    """A backend that adds up the seconds Python spends in each kind of stage."""

    def __init__(self, backend: XlaBackend):
        self._backend = backend
        self.submit_host = backend.submit_host
        self.wait_any, self.now = backend.wait_any, backend.now
        self.enqueue_sec: dict[str, float] = {}

    def enqueue(self, stage: Stage, *operands: Handle) -> tuple[Handle, ...]:
        start = now()
        handles = self._backend.enqueue(stage, *operands)
        name = name_of(stage)
        self.enqueue_sec[name] = self.enqueue_sec.get(name, 0.0) + now() - start
        return handles


@dataclasses.dataclass(frozen=True)
class DecodeCase:
    """Rows that share a cap of KV equally; the row's newest token is number `context`."""

    cap_gib: float
    rows: int
    context: int

    @property
    def blocks(self) -> int:
        return self.rows * -(-self.context // (PAGE_SIZE * PAGES_PER_BLOCK))

    @property
    def bucket(self) -> int:
        return max(2, self.rows)

    def plan(self, sampling: SamplingParams) -> SweepPlan:
        pages = self.context // PAGE_SIZE
        # Scattered, as pages are once requests have come and gone.
        order = np.random.default_rng(0).permutation(self.rows * pages).astype(np.int32)
        slots = np.arange(self.rows, dtype=np.int32)
        positions = np.full(self.rows, self.context - 1, np.int32)
        decode = DecodeBatch(slots, positions, order.reshape(self.rows, pages))
        head = HeadBatch.of(
            range(self.rows), range(self.rows), [self.context] * self.rows, [sampling] * self.rows
        )
        return SweepPlan(0, None, None, decode, head)


class Bench:
    """Weights, one KV pool, and the programs of whatever buckets a group needs."""

    def __init__(self, device: jax.Device, *, smoke: bool):
        self.device, self.smoke = device, smoke
        self.dtype = jnp.dtype("float32" if smoke else _DTYPE.value)
        self.model = architecture("smoke" if smoke else _SHAPE.value)
        self.page_bytes = kv_cache.page_bytes(self.model, PAGE_SIZE, self.dtype)
        self.num_sweeps = 6 if smoke else 25
        self.bandwidth = float("nan")
        self.completions = Completions(lambda *span, **args: None)
        free_bytes = free_device_bytes(device) or 0
        weight_bytes = self.model.num_parameters * self.dtype.itemsize
        # Beside the pool: one layer's pages gathered by a program (twice: keys and values in
        # float32 at the worst), and 2 GiB for everything else.
        share = 1 + 2 / self.model.num_layers
        room_gib = (free_bytes * 0.95 - weight_bytes) / GIB / share - (0 if smoke else 2)
        caps = [2**-12, 2**-10] if smoke else [float(gib) for gib in _KV_GIB.value]
        self.caps_gib = [cap for cap in caps if cap <= room_gib]
        self.caps_left_out = [cap for cap in caps if cap > room_gib]
        self.num_pages = max(self._cap_pages(cap) for cap in self.caps_gib)
        self.rows = [1, 4] if smoke else [int(rows) for rows in _ROWS.value]

    def _cap_pages(self, cap_gib: float) -> int:
        return int(cap_gib * GIB) // self.page_bytes

    @cached_property
    def weights(self) -> Any:
        return weights.dummy(self.model, self.dtype, self.device, seed=0)

    @cached_property
    def pages(self) -> Any:
        """The pool of all layers. Backends share the list: each leaves the newest arrays in it."""
        shape = (self.model, self.num_pages, PAGE_SIZE, self.dtype)
        return kv_cache.allocate(*shape, self.device)

    @property
    def sweep_weight_bytes(self) -> int:
        """What a sweep reads of the weights: all but most of the embedding."""
        model = self.model
        skipped = 0 if model.tie_embeddings else model.vocab_size * model.d_model
        return (model.num_parameters - skipped) * self.dtype.itemsize

    def cases(self, cap_gib: float) -> list[DecodeCase]:
        """Return a case for each number of rows whose context is one the model has."""
        pages = self._cap_pages(cap_gib)
        cases = [
            DecodeCase(cap_gib, rows, pages // rows * PAGE_SIZE)
            for rows in self.rows
            if pages >= rows
        ]
        return [case for case in cases if case.context <= self.model.max_position_embeddings]

    def programs(self, shapes: Buckets) -> Programs:
        return Programs(
            self.model,
            dtype=self.dtype,
            buckets=shapes,
            num_pages=self.num_pages,
            num_slots=max(shapes.rows),
            num_layers=span_of_layers(self.model.num_layers, None, has_host_lane=False),
            device=self.device,
            precision="default",
        )

    def backend(self, programs: Programs) -> TimedBackend:
        slots = max(programs.buckets.rows)
        arrays = (self.weights, self.pages, slots, self.device)
        return TimedBackend(XlaBackend(programs, *arrays, completions=self.completions))

    def time_sweeps(self, programs: Programs, plan: SweepPlan) -> Row:
        """Run a plan repeatedly with the engine's lag of one sweep; return times of a sweep."""
        backend = self.backend(programs)
        dispatch = Dispatch(
            backend,
            DeviceOnly(),
            num_layers=self.model.num_layers,
            layers_per_program=programs.num_layers,
            watchdog_sec=WATCHDOG_SEC,
        )
        previous, ends, launches = None, [], []
        enqueued: dict[str, list[float]] = {}
        for _ in range(self.num_sweeps):
            backend.enqueue_sec.clear()
            start = now()
            launched = dispatch.launch(plan)
            launches.append(now() - start)
            for stage, seconds in backend.enqueue_sec.items():
                enqueued.setdefault(stage, []).append(seconds)
            if previous is not None:
                dispatch.read(previous)
                ends.append(now())
            previous = launched
        assert previous is not None
        dispatch.read(previous)
        by_stage = {name: float(np.median(values[2:])) for name, values in enqueued.items()}
        launch_sec = float(np.median(launches[2:]))
        return {
            **spread(np.diff(ends)[1:].tolist()),
            "launch_sec": launch_sec,
            "enqueue_sec": by_stage,
        }


def compile_programs(programs: Programs) -> Row:
    """Compile on all cores; return wall seconds and those of each program."""
    start = now()
    programs.compile(os.cpu_count() or 1, lambda *_: None)
    by_program = {
        str(key): round(sec, 3)
        for key, sec in sorted(programs.compile_sec.items(), key=lambda item: str(item[0]))
    }
    return {"programs": len(by_program), "wall_sec": now() - start, "program_sec": by_program}


def decode_programs(bench: Bench, cases: Sequence[DecodeCase]) -> Programs:
    buckets = sorted({case.bucket for case in cases})
    blocks = {
        bucket: tuple(sorted({case.blocks for case in cases if case.bucket == bucket}))
        for bucket in buckets
    }
    return bench.programs(Buckets(tuple(buckets), blocks, (), (), PAGE_SIZE))


def measure_sweeps(bench: Bench, cap_gib: float) -> Iterator[Row]:
    """Decode sweeps of one cap: compile, then every number of rows, greedy; then one sampled."""
    cases = bench.cases(cap_gib)
    programs = decode_programs(bench, cases)
    yield {"cap_gib": cap_gib, "compile": compile_programs(programs)}
    measured = [(case, "greedy", GREEDY) for case in cases]
    measured.append((cases[-1], "top_p_0.9", NUCLEUS))
    for case, name, sampling in measured:
        times = bench.time_sweeps(programs, case.plan(sampling))
        kv_bytes = case.rows * (case.context // PAGE_SIZE) * bench.page_bytes
        read_bytes = bench.sweep_weight_bytes + kv_bytes
        yield {
            **dataclasses.asdict(case),
            "sampling": name,
            **times,
            "tokens_per_sec": case.rows / times["sec"],
            "kv_bytes": kv_bytes,
            "read_bytes": read_bytes,
            "share_of_bandwidth": read_bytes / times["sec"] / bench.bandwidth,
        }


def measure_prefill(bench: Bench) -> Iterator[Row]:
    """Sweeps of one prompt chunk each, by chunk shape and pages of context attended to."""
    chunks = ((1, 16), (2, 16)) if bench.smoke else CHUNKS
    contexts = (32,) if bench.smoke else CONTEXT_TOKENS
    pages = tuple(tokens // PAGE_SIZE for tokens in contexts)
    programs = bench.programs(Buckets((4,), {4: (4,)}, chunks, pages, PAGE_SIZE))
    yield {"compile": compile_programs(programs)}
    for (rows, tokens), context in itertools.product(chunks, contexts):
        starts = np.full(rows, context - tokens, np.int32)
        table = np.arange(rows * context // PAGE_SIZE, dtype=np.int32).reshape(rows, -1)
        lengths = np.full(rows, tokens, np.int32)
        prefill = PrefillBatch(np.zeros((rows, tokens), np.int32), starts, lengths, table)
        head = HeadBatch.of(range(rows), range(rows), [context] * rows, [GREEDY] * rows)
        times = bench.time_sweeps(programs, SweepPlan(0, prefill, head, None, None))
        shape = {"rows": rows, "chunk_tokens": tokens, "context": context}
        yield {**shape, **times, "tokens_per_sec": rows * tokens / times["sec"]}


def measure_head(bench: Bench) -> Iterator[Row]:
    """The head alone: norm, scores of the whole vocabulary, and the choice of a token."""
    cases = bench.cases(bench.caps_gib[0])
    programs = decode_programs(bench, cases)
    compile_programs(programs)  # from the persistent cache: the first cap has compiled them
    loaded, model = bench.weights, bench.model
    output_vd = loaded.embedding if loaded.output is None else loaded.output
    tokens_by_slot = jnp.zeros(max(programs.buckets.rows), jnp.int32, device=bench.device)
    for rows, (name, sampling) in itertools.product(programs.buckets.rows, HEADS.items()):
        batch = HeadBatch.of(range(rows), range(rows), [7] * rows, [sampling] * rows)
        packed = jax.device_put(packing.pack_head(batch, rows=rows), bench.device)
        noise = np.random.default_rng(0).standard_normal((rows, model.d_model))
        x_bd = jax.device_put(noise.astype(bench.dtype), bench.device)
        program = programs[ProgramKey("head_greedy" if batch.is_greedy else "head_sample", (rows,))]

        def step(slots: jax.Array, program=program, x_bd=x_bd, packed=packed) -> jax.Array:
            return program(loaded.norm, output_vd, slots, x_bd, packed)[1]

        timing = {"num_steps": 10, "num_repeats": 2 if bench.smoke else 5}
        samples = time_chain(step, jnp.copy(tokens_by_slot), **timing)
        share = output_vd.nbytes / np.median(samples) / bench.bandwidth
        head = {"rows": rows, "sampling": name, "vocab": model.vocab_size}
        yield {**head, **spread(samples), "share_of_bandwidth": share}


def measure_cached_compile(bench: Bench) -> Iterator[Row]:
    """The first cap's programs once more, from the persistent cache, as a second job finds them."""
    jax.clear_caches()
    programs = decode_programs(bench, bench.cases(bench.caps_gib[0]))
    yield {"cap_gib": bench.caps_gib[0], "compile": compile_programs(programs)}


def main(argv: Sequence[str]) -> int:
    del argv
    device, smoke = jax.devices()[0], _SMOKE.value
    with tempfile.TemporaryDirectory() as cache:  # empty at first: what is compiled first is cold
        jax.config.update("jax_compilation_cache_dir", cache)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
        jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
        bench = Bench(device, smoke=smoke)
        header = {
            "what": "device path of the engine on dummy weights; seconds, bytes",
            "smoke": smoke,
            "dtype": bench.dtype.name,
            "model": dataclasses.asdict(bench.model),
            "layers_per_program": span_of_layers(bench.model.num_layers, None, has_host_lane=False),
            "pool_bytes": bench.num_pages * bench.page_bytes,
            "caps_gib": bench.caps_gib,
            "caps_left_out_for_memory": bench.caps_left_out,
            "sweep_weight_bytes": bench.sweep_weight_bytes,
            "environment": environment(device),
        }
        results = ResultFile(Path(_OUTPUT.value), header, _BUDGET.value)

        def bandwidth() -> list[Row]:
            rows, bench.bandwidth = measure_bandwidth(device, smoke=smoke)
            return rows

        results.measure("bandwidth", bandwidth)
        first, *others = bench.caps_gib
        results.measure(f"decode_{first:g}_gib", lambda: measure_sweeps(bench, first))
        results.measure("head", lambda: measure_head(bench))
        results.measure("prefill", lambda: measure_prefill(bench))
        for cap in others:
            results.measure(f"decode_{cap:g}_gib", lambda cap=cap: measure_sweeps(bench, cap))
        results.measure("cached_compile", lambda: measure_cached_compile(bench))
        jax.config.update("jax_compilation_cache_dir", None)
    print(f"results in {results.path}")
    return 1 if results.content["failed"] else 0


if __name__ == "__main__":
    sys.exit(app.run(main))
