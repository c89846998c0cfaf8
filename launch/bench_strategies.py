"""Measure every strategy on the same requests: how device and host really overlap.

    python -m launch.bench_strategies --output=strategies.json
    python -m launch.bench_strategies --config=configs/llama_3_1_8b.py \
        --config.model.weights=dummy --kv_gib=0.5,2,4 --output=strategies.json

All strategies share weights, pools and programs and run in turn, several times. A run fills both
lanes with requests of one length and then looks at a steady state: nobody ends, nobody moves. On a
CPU one core stands in for the device and the other one is the host's. Rates are tokens per second,
`ratio` is to device_only, `arithmetic` what schedule_arithmetic.py gives with the stage times that
were measured in the very run.
"""

import dataclasses
import os
import sys
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
from absl import app, flags
from ml_collections import config_flags

from apex_jax.buckets import smallest_that_holds
from apex_jax.config import Config, LlamaConfig, ModelConfig, SchedulerConfig
from apex_jax.dispatch import DispatchStats
from apex_jax.memory import GIB
from apex_jax.overlap import BusyMeter, Kind
from apex_jax.pages import num_pages_for
from apex_jax.policies import Policy
from apex_jax.profiling.table import measurements_to_json
from apex_jax.request import Request, SamplingParams
from launch.environment import environment
from launch.measuring import ResultFile, Row
from launch.schedule_arithmetic import Load, NoClosedFormError, expected_rate, published_ratio
from launch.shared_engine import STRATEGIES, SharedEngine, WatchedBackend, use_two_cpu_devices

_CONFIG = config_flags.DEFINE_config_file("config", help_string="Of the model; unset: a small one.")
_OUTPUT = flags.DEFINE_string("output", "docs/results/strategies.json", "Result file.")
_BUDGET = flags.DEFINE_float("budget_sec", 400.0, "After this time no further group begins.")
_SHAPE = flags.DEFINE_enum("shape", "small", ["small", "narrow"], "Of the model without --config.")
_SMOKE = flags.DEFINE_bool("smoke", False, "Tiny sizes: shows that the script runs, no more.")
_KV_GIB = flags.DEFINE_list("kv_gib", ["0.11"], "KV cache on the device, GiB; a group for each.")
_NUM_HOST = flags.DEFINE_integer("host_requests", 28, "Requests in the host lane.")
_PROMPT = flags.DEFINE_integer("prompt_tokens", 1000, "Of each request.")
_SECONDS = flags.DEFINE_float("seconds", 5.0, "Length of each look at a steady state.")
_REPEATS = flags.DEFINE_integer("repeats", 3, "Turns of all strategies.")
_ONLY = flags.DEFINE_list("strategies", [], "Names of those to run besides device_only; all.")
_TRACES = flags.DEFINE_string("traces", None, "Folder for a timeline of each strategy.")

# Layers of 45 MB, which one core reads in some milliseconds; heads and KV as of a small Llama.
SMALL = LlamaConfig(
    num_layers=12,
    d_model=1024,
    d_ffn=2816,
    num_heads=8,
    num_kv_heads=2,
    head_dim=128,
    vocab_size=4096,
    max_position_embeddings=4096,
)
# Deep and narrow, but no narrower than XLA's CPU takes for running on its caller's thread: what
# Python takes for a sweep is then most of the sweep.
NARROW = dataclasses.replace(SMALL, num_layers=32, d_model=256, d_ffn=512, num_heads=4)
TINY = LlamaConfig(2, 64, 128, 4, 2, 16, 256, 1024)
OUTPUT_TOKENS = 512  # more than are ever awaited
MAX_IDLE_SWEEPS = 8  # without a prompt's progress: then nobody else finds room
GROWTH_PAGES = 8  # of each device row's KV, while it is looked at


@dataclasses.dataclass(frozen=True)
class Counts:
    """What was counted at a moment of a run.

    python_sec: CPU time of the thread that schedules and dispatches, so without its waiting (and on
    a CPU with the programs that XLA runs on it, because they are small).
    """

    now_sec: float
    python_sec: float
    num_stages: int
    num_sweeps: int
    num_tokens: int
    num_host_tokens: int
    dispatched: DispatchStats


class Run:
    """One strategy's turn: fill both lanes, settle, look."""

    def __init__(self, shared: SharedEngine, policy: Policy, num_pages: int):
        self._shared, self._policy = shared, policy
        self._engine, self._scheduler, self._dispatch = shared.start(policy, num_pages)
        self._sweep_ends_sec: list[float] = []
        self._host_marks: list[tuple[float, int]] = []  # when host tokens came, how many by then

    def fill(self, requests: Sequence[Request], num_settling: int) -> None:
        """Admit whoever finds room, then go on for so many sweeps."""
        for request in requests:
            self._engine.submit(request)
        stats, seen, num_idle = self._scheduler.stats, 0, 0
        while num_idle < MAX_IDLE_SWEEPS:
            self._engine.step()
            now = stats.num_prefilled_tokens + stats.num_host_prefilled_tokens
            num_idle = num_idle + 1 if now == seen else 0
            seen = now
        for _ in range(num_settling):
            self._engine.step()

    def look(self, seconds: float) -> tuple[Counts, Counts]:
        """Go on for so long; return what was counted before and after."""
        begin = self._count()
        num_host = begin.num_host_tokens
        while time.perf_counter() < begin.now_sec + seconds or len(self._sweep_ends_sec) < 4:
            self._engine.step()
            now = time.perf_counter()
            self._sweep_ends_sec.append(now)
            if self._scheduler.stats.num_host_tokens > num_host:
                num_host = self._scheduler.stats.num_host_tokens
                self._host_marks.append((now, num_host))
        return begin, self._count()

    def describe(self, settings: SchedulerConfig, begin: Counts, end: Counts) -> Row:
        """Return what was seen between two moments."""
        stats, seconds = self._scheduler.stats, end.now_sec - begin.now_sec
        num_sweeps = end.num_sweeps - begin.num_sweeps
        num_tokens = end.num_tokens - begin.num_tokens
        num_host_tokens = end.num_host_tokens - begin.num_host_tokens
        device_rate = (num_tokens - num_host_tokens) / seconds
        host_rate = self._host_rate(num_host_tokens / seconds)
        device_rows, host_rows = stats.max_running, stats.max_host_running
        row: Row = {
            "tokens_per_sec": device_rate + host_rate,
            "device_tokens_per_sec": device_rate,
            "host_tokens_per_sec": host_rate,
            "device_rows": device_rows,
            "host_rows": host_rows,
            "device_tpot_sec": device_rows / device_rate if device_rate else None,
            "host_tpot_sec": host_rows / host_rate if host_rate else None,
            "sweep_sec": float(np.median(np.diff(self._sweep_ends_sec))),
            "python_sec_per_sweep": (end.python_sec - begin.python_sec) / num_sweeps,
        }
        for name in ("merges", "extra_passes", "joint_heads", "head_passes", "late", "host_jobs"):
            counted = [getattr(one.dispatched, f"num_{name}") for one in (begin, end)]
            row[f"{name}_per_sweep"] = (counted[1] - counted[0]) / num_sweeps
        row |= self._busy(begin, end)
        stage_sec, shares = self._stages(begin, end)
        job_sec = [
            span.end_sec - span.start_sec
            for span in self._shared.timeline.lanes["host"]
            if span.name == "host_attention" and begin.now_sec < span.end_sec < end.now_sec
        ]
        load = self._load(settings)
        try:
            expected = expected_rate(
                settings, load, stage_sec, float(np.median(job_sec)) if job_sec else 0.0
            )
            row["arithmetic_tokens_per_sec"] = expected
            row["measured_over_arithmetic"] = row["tokens_per_sec"] / expected
        except KeyError as error:
            row["arithmetic_left_out"] = f"no stage {error} was seen"
        except NoClosedFormError as error:
            row["arithmetic_left_out"] = str(error)
        row["published_ratio"] = published_ratio(settings, load)
        row["host_job_sec"] = float(np.median(job_sec)) if job_sec else None
        row["stage_sec"] = stage_sec
        row["share_of_time"] = shares
        return row

    def _host_rate(self, otherwise: float) -> float:
        """Return host tokens per second; they come in bursts, so from burst to burst."""
        if len(self._host_marks) < 2:
            return otherwise
        (first_sec, first), (last_sec, last) = self._host_marks[0], self._host_marks[-1]
        return (last - first) / (last_sec - first_sec)

    def _load(self, settings: SchedulerConfig) -> Load:
        shapes, stats = self._shared.whole.programs.buckets, self._scheduler.stats
        num_cohorts, host_rows = self._policy.max_cohorts, stats.max_host_running
        if settings.strategy == "asymmetric_pipelining":  # which takes what it can hide
            formed = self._dispatch_sizes()
            num_cohorts, host_rows = len(formed), sum(formed)
        rows = -(-host_rows // max(1, num_cohorts))
        return Load(
            num_layers=self._shared.whole.model.architecture.num_layers,
            layers_per_program=self._shared.whole.programs.num_layers,
            device_rows=stats.max_running,
            device_bucket=smallest_that_holds(shapes.rows, stats.max_running),
            num_cohorts=num_cohorts,
            cohort_rows=host_rows / max(1, num_cohorts),
            cohort_bucket=smallest_that_holds(shapes.rows, rows),
        )

    def _dispatch_sizes(self) -> list[int]:
        """Return the rows of the cohorts that were seen last."""
        sizes: dict[object, int] = {}
        for span in self._shared.timeline.lanes["host"][-8:]:
            if span.name == "host_attention":
                sizes[span.args["cohort"]] = int(str(span.args["rows"]))
        return list(sizes.values())

    def _busy(self, begin: Counts, end: Counts) -> Row:
        meter = BusyMeter(max_pending_spans=sys.maxsize)
        for kind in (Kind.DEVICE, Kind.HOST):
            for span in self._shared.timeline.lanes[kind.value]:
                if span.end_sec > begin.now_sec and span.start_sec < end.now_sec:
                    clipped = max(span.start_sec, begin.now_sec), min(span.end_sec, end.now_sec)
                    meter.add(kind, *clipped)
        figures = meter.figures()
        num_sweeps = end.num_sweeps - begin.num_sweeps
        return {
            "device_busy_percent": figures.device_busy_percent,
            "host_busy_percent": figures.host_busy_percent,
            "overlap_percent": figures.overlap_percent,
            "bubbles_per_sweep": figures.num_bubbles / num_sweeps,
            "bubble_sec_per_sweep": figures.bubble_sec / num_sweeps,
        }

    def _stages(self, begin: Counts, end: Counts) -> tuple[dict[str, float], dict[str, float]]:
        """Return for each kind of device stage its median time, and its share of all time."""
        samples: dict[str, list[float]] = defaultdict(list)
        labels = self._shared.backend.labels[begin.num_stages : end.num_stages]
        spans = self._shared.timeline.lanes["device"][begin.num_stages : end.num_stages]
        for label, span in zip(labels, spans, strict=True):
            samples[label].append(span.end_sec - span.start_sec)
        seconds = end.now_sec - begin.now_sec
        shares = {label: round(sum(values) / seconds, 4) for label, values in samples.items()}
        return {label: float(np.median(values)) for label, values in samples.items()}, shares

    def _count(self) -> Counts:
        stats, backend = self._scheduler.stats, self._shared.backend
        return Counts(
            now_sec=time.perf_counter(),
            python_sec=time.thread_time(),
            num_stages=len(backend.labels),
            num_sweeps=stats.num_sweeps,
            num_tokens=stats.num_output_tokens,
            num_host_tokens=stats.num_host_tokens,
            dispatched=dataclasses.replace(self._dispatch.stats),
        )


def measure_cap(shared: SharedEngine, cap_gib: float, num_repeats: int) -> Iterator[Row]:
    """All strategies in turn, several times, with so much KV cache on the device."""
    num_pages = int(cap_gib * GIB) // shared.whole.memory.page_bytes
    names = ["device_only", *(_ONLY.value or list(STRATEGIES)[1:])]
    for repeat in range(num_repeats):
        for name in names:
            yield {"strategy": name, "repeat": repeat, **measure(shared, name, num_pages)}


def measure(shared: SharedEngine, name: str, num_pages: int) -> Row:
    """Give one strategy its turn."""
    settings = dataclasses.replace(
        STRATEGIES[name], max_host_requests=shared.config.scheduler.max_host_requests
    )
    memory, model = shared.whole.memory, shared.whole.model.architecture
    prompt = _PROMPT.value if not _SMOKE.value else 150
    pages_per_row = num_pages_for(prompt, memory.page_size) + GROWTH_PAGES
    num_device = num_pages // pages_per_row
    num_requests = num_device + settings.max_host_requests
    params = SamplingParams(max_tokens=OUTPUT_TOKENS, temperature=0.0, ignore_eos=True)
    requests = [Request(str(one), (1,) * prompt, params) for one in range(num_requests)]
    run = Run(shared, shared.make_policy(settings), num_pages)
    run.fill(requests, num_settling=model.num_layers + 1)
    begin, end = run.look(_SECONDS.value if not _SMOKE.value else 0.2)
    shared.finish()
    if _TRACES.value is not None:
        path = Path(_TRACES.value) / f"{name}.json"
        shared.timeline.write_trace(path, begin.now_sec, end.now_sec)
    return run.describe(settings, begin, end)


def medians(rows: Sequence[Row]) -> Iterator[Row]:
    """Return for each strategy the medians over its turns, with the least and the most."""
    by_name: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        by_name[row["strategy"]].append(row)
    base = {row["repeat"]: row for row in by_name["device_only"]}
    for name, turns in by_name.items():
        ratios = [row["tokens_per_sec"] / base[row["repeat"]]["tokens_per_sec"] for row in turns]
        sweeps = [row["sweep_sec"] / base[row["repeat"]]["sweep_sec"] for row in turns]
        summary: Row = {
            "strategy": name,
            "ratio": float(np.median(ratios)),
            "ratio_min": min(ratios),
            "ratio_max": max(ratios),
            "sweep_slowdown": float(np.median(sweeps)),
            "same_program_slowdown": _slowdown(turns, base),
        }
        for key, value in turns[0].items():
            if isinstance(value, int | float) and key != "repeat":
                summary[key] = float(
                    np.median([row[key] for row in turns if row.get(key) is not None])
                )
        yield summary


def _slowdown(turns: Sequence[Row], base: Mapping[int, Row]) -> float | None:
    """Return how much longer whole programs of layers take beside a busy host than without one.

    None where a strategy crosses every layer by itself.
    """
    quotients = [
        row["stage_sec"][label] / base[row["repeat"]]["stage_sec"][label]
        for row in turns
        for label in row["stage_sec"]
        if label.startswith("layers ") and label in base[row["repeat"]]["stage_sec"]
    ]
    return float(np.median(quotients)) if quotients else None


def make_config() -> Config:
    """Return the settings of the shared engine: those of a config file, or a small model's."""
    config = _CONFIG.value
    smoke = _SMOKE.value
    if config is None or smoke:
        shape = TINY if smoke else {"small": SMALL, "narrow": NARROW}[_SHAPE.value]
        model = ModelConfig(weights="dummy", architecture=shape)
        config = Config(model=model)
        config.device.platform = "cpu"
        config.scheduler.max_prefill_tokens = 64 if smoke else 1024
    prompt, num_host = (150, 6) if smoke else (_PROMPT.value, _NUM_HOST.value)
    config.scheduler.strategy = "async_overlap"  # whose cohort may be the largest
    config.scheduler.max_host_requests = num_host
    config.scheduler.max_model_len = prompt + OUTPUT_TOKENS
    assert config.model.architecture is not None
    page_bytes = config.cache.page_size * config.model.architecture.kv_bytes_per_token(
        4 if config.device.platform == "cpu" else 2
    )
    pages = num_pages_for(prompt + OUTPUT_TOKENS, config.cache.page_size)
    config.cache.host_bytes = num_host * pages * page_bytes
    config.cache.device_bytes = int(max(caps_gib()) * GIB)
    pages_per_row = num_pages_for(prompt, config.cache.page_size) + GROWTH_PAGES
    # More than there is memory for: who waits for a row, and not for memory, is not for the host.
    config.scheduler.max_requests = 2 * max(
        1, config.cache.device_bytes // page_bytes // pages_per_row
    )
    return config


def caps_gib() -> list[float]:
    return [2**-11.5] if _SMOKE.value else [float(gib) for gib in _KV_GIB.value]


def main(argv: Sequence[str]) -> int:
    del argv
    os.environ.setdefault("XLA_CLIENT_MEM_FRACTION", "0.95")  # as launch.generate has it
    config = make_config()
    is_cpu = config.device.platform == "cpu"
    use_two_cpu_devices(one_core_each=is_cpu and len(os.sched_getaffinity(0)) > 1)
    if is_cpu:
        config.host.threads = 1
        config.host.cpus = str(max(os.sched_getaffinity(0)))
    shared = SharedEngine(
        config,
        print,
        lambda inner, shapes, _: WatchedBackend(inner, shapes, computes_prompts=False),
    )
    header = {
        "what": "all strategies in a steady state on dummy weights; tokens per second, seconds",
        "smoke": _SMOKE.value,
        "model": dataclasses.asdict(shared.whole.model.architecture),
        "dtype": shared.whole.model.dtype,
        "prompt_tokens": _PROMPT.value,
        "idle_stage_times": measurements_to_json(shared.measurements),
        "environment": environment(shared.device),
    }
    results = ResultFile(Path(_OUTPUT.value), header, _BUDGET.value)
    num_repeats = 1 if _SMOKE.value else _REPEATS.value
    for cap in caps_gib():
        name = f"turns_{cap:.3g}_gib"
        results.measure(name, lambda cap=cap: measure_cap(shared, cap, num_repeats))
        if rows := results.content["groups"].get(name):
            results.measure(f"medians_{cap:.3g}_gib", lambda rows=rows: medians(rows))
    shared.close()
    print(f"results in {results.path}")
    return 1 if results.content["failed"] else 0


if __name__ == "__main__":
    sys.exit(app.run(main))
