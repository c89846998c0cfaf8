"""Measure what a sweep costs Python, by strategy and by part of the program.

    python -m launch.bench_python --output=docs/results/python_time.json

Everything is real but what the device computes: the programs take and return what the engine's do
and compute next to nothing, so that none of them, run by XLA's CPU inside the call, counts as
Python's. When a stage or job ends is for a simulated clock to say, with the times of an 8B model on
a fast GPU: the loop decides, asks and waits as it would there. On a GPU the launching of kernels
comes on top, XLA's own time in the same thread. Seconds are CPU time of that thread a sweep. What
scheduling takes with many more requests in flight is measured apart, on the simulator alone.
"""

import dataclasses
import gc
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags
from jaxtyping import Int32

from apex_jax import packing, stages
from apex_jax.backends.simulated import SimulatedBackend
from apex_jax.backends.xla import XlaBackend
from apex_jax.buckets import Buckets
from apex_jax.config import Config, LlamaConfig, ModelConfig
from apex_jax.cost_model import StageTimes
from apex_jax.hardware import Handle, Job, Stage
from apex_jax.pages import num_pages_for
from apex_jax.request import Request, SamplingParams
from launch.environment import environment
from launch.measuring import ResultFile, Row
from launch.scheduling_time import measure_scheduling
from launch.shared_engine import STRATEGIES, SharedEngine, WatchedBackend, use_two_cpu_devices
from launch.stopwatch import Stopwatch

_OUTPUT = flags.DEFINE_string("output", "docs/results/python_time.json", "Result file.")
_BUDGET = flags.DEFINE_float("budget_sec", 400.0, "After this time no further group begins.")
_SMOKE = flags.DEFINE_bool("smoke", False, "Tiny sizes: shows that the script runs, no more.")
_SPANS = flags.DEFINE_list(
    "layers_per_program", ["4", "8", "32"], "Layers of a program; a group each."
)
_ROWS = flags.DEFINE_integer("device_rows", 16, "Requests in the device lane.")
_NUM_HOST = flags.DEFINE_integer("host_requests", 32, "Requests in the host lane.")
_ONLY = flags.DEFINE_list("strategies", [], "Names of those to run; all.")

PROMPT_TOKENS, OUTPUT_TOKENS, PAGE_SIZE = 900, 600, 128
MAX_MODEL_LEN = 1536
# With those of the prompt one more, which lasts for as long as anyone looks.
PAGES_PER_ROW = num_pages_for(PROMPT_TOKENS, PAGE_SIZE) + 1
NUM_TURNS = 4  # the quickest counts: other processes only ever add time
PARTS = (
    "engine",
    "scheduler",
    "dispatch",
    "backend",
    "packing",
    "transfers",
    "programs",
    "completions",
)
PACKERS = ("num_blocks", "pack_rows", "pack_blocks", "pack_head", "join_heads")
# An 8B model in bfloat16 on a GPU that reads 3.3 TB/s: 4 ms a sweep. The host is quick enough for
# pipelining to take all its rows.
TIMES = StageTimes(
    num_layers=32,
    linear_sec=1.1e-4,
    device_attention_sec_per_token=1.3e-9,
    host_attention_sec_per_token=2e-9,
    host_job_sec=1e-5,
    transfer_sec=1e-5,
    head_sec=3e-4,
    stage_sec=3e-6,
)


class PairedHandle(NamedTuple):
    """What a stage or job really yields, and when it would be ready."""

    backend: "PairedBackend"
    real: Handle
    simulated: Handle

    def read(self) -> Int32[np.ndarray, "b"]:
        return self.backend.read(self.real)


class PairedBackend(WatchedBackend):
    """The real backend's work beside the simulated one's clock.

    counts: of its verbs so far.
    """

    def __init__(
        self,
        real: XlaBackend,
        shapes: Buckets,
        simulated: SimulatedBackend,
        stopwatch: Stopwatch,
        counts: Counter[str],
    ):
        super().__init__(real, shapes, computes_prompts=False)
        self._simulated, self._counts = simulated, counts
        self.now = simulated.now
        self.read = stopwatch.wrap("backend", lambda handle: handle.read())
        self._wait_really = stopwatch.wrap("backend", real.wait_any)
        self._submit_really = stopwatch.wrap("backend", super().submit_host)
        # The simulated clock's work, and that of following it, is nobody's.
        self.enqueue = stopwatch.wrap("measuring", self._enqueue)
        self.submit_host = stopwatch.wrap("measuring", self._submit)
        self.wait_any = stopwatch.wrap("measuring", self._wait)

    def _enqueue(self, stage: Stage, *operands: PairedHandle) -> tuple[PairedHandle, ...]:
        self._counts["stages"] += 1
        simulated = self._simulated.enqueue(stage, *(one.simulated for one in operands))
        real = super().enqueue(stage, *(one.real for one in operands))
        return tuple(PairedHandle(self, *pair) for pair in zip(real, simulated, strict=True))

    def _submit(self, job: Job, operand: PairedHandle | None = None) -> PairedHandle:
        self._counts["jobs"] += 1
        real = self._submit_really(job, operand.real if operand else None)
        simulated = self._simulated.submit_host(job, operand.simulated if operand else None)
        return PairedHandle(self, real, simulated)

    def _wait(self, handles: Sequence[PairedHandle], deadline_sec: float) -> PairedHandle | None:
        """Ask or wait for real as well, as it is in simulated time."""
        self._counts["waits"] += 1
        begin_sec = self.now()
        first = self._simulated.wait_any([one.simulated for one in handles], deadline_sec)
        patience_sec = 60.0 if self.now() > begin_sec else 0.0
        self._wait_really([one.real for one in handles], time.perf_counter() + patience_sec)
        return next((one for one in handles if one.simulated is first), None)


def hollow_stages(model: LlamaConfig) -> dict[str, Callable[..., Any]]:
    """Return stages that take and yield what those of `apex_jax.stages` do, and do next to nothing.

    Each looks at one number of every array it gets, or jax would drop the argument.
    """

    def look(*arrays: Any) -> Any:
        leaves = jax.tree.leaves(arrays)
        return sum(leaf.ravel()[0].astype(jnp.float32) for leaf in leaves)

    def embed_decode(embedding_vd: Any, tokens_by_slot: Any, rows_b4: Any) -> Any:
        x_bd = jnp.zeros((len(rows_b4), model.d_model))
        return x_bd + look(embedding_vd, tokens_by_slot, rows_b4), rows_b4

    def head(
        _: Any,
        norm: Any,
        output_vd: Any,
        tokens_by_slot: Any,
        x_bd: Any,
        packed_b9: Any,
        *,
        is_greedy: bool,
    ) -> Any:
        del is_greedy
        seen = look(norm, output_vd, tokens_by_slot, x_bd, packed_b9)
        tokens_b = jnp.zeros(len(x_bd), jnp.int32) + (seen > jnp.finfo(jnp.float32).max)
        return tokens_b, tokens_by_slot

    def queries(rows: int) -> jax.Array:
        return jnp.zeros((rows, model.num_heads + 2 * model.num_kv_heads, model.head_dim))

    def layers_decode(_: Any, layers: Any, pages: Any, x_bd: Any, arrays: Any) -> Any:
        return x_bd + look(layers, pages, arrays), pages

    def layers_prefill(
        _: Any, num_head_rows: int, layers: Any, pages: Any, x_btd: Any, arrays: Any
    ) -> Any:
        last_bd = jnp.zeros((num_head_rows, model.d_model))
        return x_btd + look(layers, pages, arrays), last_bd, pages

    def pre_attention(_: Any, state: Any, x_bd: Any, rows_b4: Any) -> Any:
        return queries(len(x_bd)) + look(state, x_bd, rows_b4)

    def device_attention(pages: Any, qkv_bjh: Any, arrays: Any) -> Any:
        return qkv_bjh[:, : model.num_heads] + look(pages, arrays), pages

    def post_attention(_: Any, state: Any, x_bd: Any, attended_bnh: Any) -> Any:
        return x_bd + look(state, attended_bnh)

    def boundary(_: Any, left: Any, entered: Any, groups: Any) -> Any:
        seen = look(left, entered, groups)
        return tuple((one.x_bd + seen, queries(len(one.x_bd)) + seen) for one in groups)

    made = (
        embed_decode,
        head,
        layers_decode,
        layers_prefill,
        pre_attention,
        device_attention,
        post_attention,
        boundary,
    )
    return {one.__name__: one for one in made}


def measure_span(span: int, stopwatch: Stopwatch) -> Iterator[Row]:
    """All strategies with so many layers in a program."""
    counts: Counter[str] = Counter()

    def pair(real: XlaBackend, shapes: Buckets, _: jax.Device) -> PairedBackend:
        executables = real._programs._executables
        for key, executable in executables.items():
            executables[key] = stopwatch.wrap("programs", executable)
        real.enqueue = stopwatch.wrap("backend", real.enqueue)
        completions = real._completions
        completions.enqueued = stopwatch.wrap("completions", completions.enqueued)
        simulated = SimulatedBackend(TIMES, layers_per_program=span, page_size=PAGE_SIZE)
        return PairedBackend(real, shapes, simulated, stopwatch, counts)

    shared = SharedEngine(make_config(span), print, pair)
    shared.times = TIMES
    for name in _ONLY.value or (["device_only", "passes_2"] if _SMOKE.value else STRATEGIES):
        yield {"strategy": name, **measure(shared, name, stopwatch, counts)}
    shared.close()


def measure(shared: SharedEngine, name: str, stopwatch: Stopwatch, counts: Counter[str]) -> Row:
    """Give one strategy its turn: fill both lanes, settle, then look at each sweep."""
    policy = shared.make_policy(STRATEGIES[name])
    rows, num_host = num_requests()
    engine, scheduler, dispatch = shared.start(policy, rows * PAGES_PER_ROW)
    scheduler.plan_sweep = stopwatch.wrap("scheduler", scheduler.plan_sweep)
    scheduler.launched = stopwatch.wrap("scheduler", scheduler.launched)
    scheduler.commit = stopwatch.wrap("scheduler", scheduler.commit)
    dispatch.launch = stopwatch.wrap("dispatch", dispatch.launch)
    dispatch.read = stopwatch.wrap("dispatch", dispatch.read)
    step = stopwatch.wrap("engine", engine.step)
    params = SamplingParams(max_tokens=OUTPUT_TOKENS, temperature=0.0, ignore_eos=True)
    for one in range(rows + num_host):
        engine.submit(Request(str(one), (1,) * PROMPT_TOKENS, params))
    stats, num_prompts = scheduler.stats, rows + (num_host if policy.max_cohorts else 0)
    while (
        stats.num_prefilled_tokens + stats.num_host_prefilled_tokens < num_prompts * PROMPT_TOKENS
    ):
        engine.step()
    period = shared.whole.model.architecture.num_layers + 1  # sweeps of a merging cohort's token
    for _ in range(period):
        engine.step()
    gc.collect()
    stopwatch.take()
    counts.clear()
    num_tokens = stats.num_output_tokens

    def turn() -> dict[str, float]:
        """Return seconds a sweep by part, over a merging cohort's way through the layers."""
        for _ in range(period):
            step()
        taken = stopwatch.take()
        return {part: taken[part] / period for part in PARTS}

    turns = [turn() for _ in range(1 if _SMOKE.value else NUM_TURNS)]
    sec = min(turns, key=lambda one: sum(one.values()))
    num_sweeps = period * len(turns)
    shared.finish()
    return {
        "python_sec": sum(sec.values()),
        **{f"{part}_sec": value for part, value in sec.items()},
        **{f"num_{verb}": counts[verb] / num_sweeps for verb in ("stages", "jobs", "waits")},
        "device_rows": stats.max_running,
        "host_rows": stats.max_host_running,
        "tokens": (stats.num_output_tokens - num_tokens) / num_sweeps,
    }


def num_requests() -> tuple[int, int]:
    """Return how many there are in the device lane and in the host lane."""
    return (2, 4) if _SMOKE.value else (_ROWS.value, _NUM_HOST.value)


def make_model() -> LlamaConfig:
    return LlamaConfig(TIMES.num_layers, 64, 64, 4, 2, 16, 256, MAX_MODEL_LEN)


def make_config(span: int) -> Config:
    """Return the settings of an engine with a host lane, in whose memory the rows fit exactly."""
    shape = make_model()
    config = Config(model=ModelConfig(weights="dummy", architecture=shape))
    config.device.platform, config.host.threads = "cpu", 1
    config.compile.layers_per_program = span
    config.cache.page_size = PAGE_SIZE
    page_bytes = PAGE_SIZE * shape.kv_bytes_per_token(4)
    rows, num_host = num_requests()
    config.cache.device_bytes = rows * PAGES_PER_ROW * page_bytes
    config.cache.host_bytes = num_host * MAX_MODEL_LEN // PAGE_SIZE * page_bytes
    scheduler = config.scheduler
    scheduler.strategy = "async_overlap"  # whose cohort may be the largest
    scheduler.max_requests, scheduler.max_host_requests = 2 * rows, num_host
    scheduler.max_prefill_tokens, scheduler.max_model_len = 1024, MAX_MODEL_LEN
    return config


def main(argv: Sequence[str]) -> int:
    del argv
    use_two_cpu_devices(one_core_each=False)
    # Handing a program to another thread costs the caller more than running one that is hollow.
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    for name, function in hollow_stages(make_model()).items():
        setattr(stages, name, function)
    stopwatch = Stopwatch()
    for module, name, part in (
        *((packing, name, "packing") for name in PACKERS),
        (jax, "device_put", "transfers"),
    ):
        setattr(module, name, stopwatch.wrap(part, getattr(module, name)))
    header = {
        "what": "Python's CPU seconds a sweep, in all and by part; counts a sweep",
        "smoke": _SMOKE.value,
        "simulated_times": dataclasses.asdict(TIMES),
        "environment": environment(jax.devices()[0]),
    }
    results = ResultFile(Path(_OUTPUT.value), header, _BUDGET.value)
    num_requests, num_sweeps = ([20], 3) if _SMOKE.value else ([100, 1000, 4000], 50)
    results.measure(
        "scheduling", lambda: measure_scheduling(TIMES, stopwatch, num_requests, num_sweeps)
    )
    for span in [8] if _SMOKE.value else map(int, _SPANS.value):
        results.measure(f"{span}_layers_per_program", lambda s=span: measure_span(s, stopwatch))
    print(f"results in {results.path}")
    return 1 if results.content["failed"] else 0


if __name__ == "__main__":
    sys.exit(app.run(main))
