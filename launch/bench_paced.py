"""Measure strategies on a device that is only described, beside this machine's real CPU.

    python -m launch.bench_paced --device=t4 --config=configs/llama_3_2_3b.py --device_kv_gib=1.1 \
        --host_requests=64 --prompt_tokens=1000 --output=paced_t4.json

The device is a schedule of what a data sheet says (configs/hardware); the host's memory, threads
and attention op are real, and so is all of Python. Each strategy fills both lanes and is looked at
in a steady state; strategies take turns. Beside each measured rate stands what the simulated
backend predicts for the same run, with the host's times as this very process measured them, and
what the arithmetic of schedule_arithmetic.py allows with them.
"""

import dataclasses
import math
import os
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import numpy as np
from absl import app, flags
from ml_collections import config_flags

from apex_jax.backends.paced import PacedBackend
from apex_jax.backends.simulated import SimulatedBackend
from apex_jax.config import Config, ConfigError, LlamaConfig, ModelConfig, SchedulerConfig
from apex_jax.hardware import Backend, Export, Layers, Stage, StagedLayer
from apex_jax.hardware_profiles import GIB, stage_times
from apex_jax.paced_engine import PacedPlan
from apex_jax.pages import num_pages_for
from apex_jax.plan import PrefillBatch
from apex_jax.request import Request, SamplingParams
from apex_jax.stage_costs import StageCosts, Work
from apex_jax.strategies import make_policy
from configs.hardware.devices import DEVICES
from configs.hardware.hosts import HOSTS
from launch.environment import environment
from launch.measuring import ResultFile, Row, reason
from launch.paced_host import HostMeter
from launch.schedule_arithmetic import Load, expected_rate
from launch.shared_engine import Span, SpanKeeper
from launch.steady_state import Look, SteadyRun, Steered
from launch.strategy_names import settings_of

_CONFIG = config_flags.DEFINE_config_file("config", help_string="Of the model, with its shape.")
_DEVICE = flags.DEFINE_enum("device", "t4", list(DEVICES), "Profile in configs/hardware.")
_KV_GIB = flags.DEFINE_float("device_kv_gib", None, "KV cache there, GiB; unset: what is left.")
_RESERVE = flags.DEFINE_float("reserve_gib", 1.5, "Of its memory, for scratch and the driver, GiB.")
_NAMES = flags.DEFINE_list(
    "strategies",
    ["device_only", "async_overlap", "staggered", "asymmetric_pipelining", "full_offload"],
    "In turns; staggered_4 and passes_3 say how many cohorts and passes.",
)
_NUM_HOST = flags.DEFINE_integer("host_requests", 64, "Requests in the host lane.")
_PROMPT = flags.DEFINE_integer("prompt_tokens", 1000, "Of each request.")
_OUTPUT_TOKENS = flags.DEFINE_integer("output_tokens", 512, "Room for so many more of each.")
_SECONDS = flags.DEFINE_float("seconds", 10.0, "Length of each look at a steady state.")
_REPEATS = flags.DEFINE_integer("repeats", 3, "Turns of all strategies.")
_BUDGET = flags.DEFINE_float("budget_sec", 900.0, "After this time no further turn begins.")
_OUTPUT = flags.DEFINE_string("output", "docs/results/paced.json", "Result file.")
_TRACES = flags.DEFINE_string("traces", None, "Folder for a timeline of each strategy.")
_SMOKE = flags.DEFINE_bool("smoke", False, "Tiny sizes: shows that the script runs, no more.")

TINY = LlamaConfig(2, 64, 128, 4, 2, 16, 256, 1024)
HOST = HOSTS["epyc_1_thread"]  # until its times have been measured
WITH_ARITHMETIC = (
    *("device_only", "full_offload", "asymmetric_pipelining"),
    *("async_overlap", "staggered", "passes"),
)


class FreePrompts(StageCosts):
    """Costs of a run that is not about prompts: the device passes them in no time."""

    def of_stage(self, stage: Stage, works: list[Work]) -> tuple[list[Work], float]:
        after, seconds = super().of_stage(stage, works)
        is_prompt = isinstance(stage, StagedLayer | Export) or (
            isinstance(stage, Layers) and isinstance(stage.batch, PrefillBatch)
        )
        return after, 0.0 if is_prompt else seconds


class Bench:
    """What all turns share: sizes, and the times of device and host.

    num_device, num_host: requests that fill either lane.
    """

    def __init__(self, plan: PacedPlan, num_device: int, num_host: int, seconds: float):
        self.plan, self._seconds = plan, seconds
        self._num_device, self._num_host = num_device, num_host
        self.times = stage_times(plan.model, plan.dtype.itemsize, DEVICES[_DEVICE.value], HOST)

    def costs(self) -> StageCosts:
        plan = self.plan
        return FreePrompts(
            self.times,
            layers_per_program=plan.layers_per_program,
            page_size=plan.shapes.page_size,
        )

    def turn(self, name: str, backend: Backend, timeline: SpanKeeper) -> Row:
        """Give one strategy its turn on a backend, which reports to the timeline."""
        for spans in timeline.lanes.values():
            spans.clear()
        policy = Steered(
            make_policy(self._settings(name), self.times, self.plan.layers_per_program)
        )
        loop = self.plan.loop(backend, policy)
        device, host = self._requests(policy)
        num_layers = self.plan.model.num_layers
        run = SteadyRun(loop, policy, backend.now, num_layers)
        try:
            run.fill(device, host, num_settling_sweeps=num_layers + 1)
            look = run.look(self._seconds)
        finally:  # whatever it came to, the next turn finds the backend at rest
            for request in [*device, *host]:
                loop.scheduler.cancel(request.request_id)
            loop.run()
        sizes = list(policy.cohort_rows.values())
        return {
            "strategy": name,
            **look.rates(),
            **_busy(timeline, look),
            "cohort_rows": sizes,
            "arithmetic_tokens_per_sec": self._arithmetic(name, look, sizes),
            "looked_at_sec": (look.begin.now_sec, look.end.now_sec),
        }

    def _settings(self, name: str) -> SchedulerConfig:
        return settings_of(name, SchedulerConfig(max_host_requests=self._num_host))

    def _requests(self, policy: Steered) -> tuple[list[Request], list[Request]]:
        """Return who is to fill the device's lane, and who the host's."""
        params = SamplingParams(max_tokens=_output_tokens(), temperature=0.0, ignore_eos=True)
        num_device = self._num_device if policy.uses_device_lane else 0
        num_host = self._num_host if policy.max_cohorts else 0
        requests = [
            Request(str(one), (1,) * _prompt_tokens(), params)
            for one in range(num_device + num_host)
        ]
        return requests[:num_device], requests[num_device:]

    def _arithmetic(self, name: str, look: Look, cohort_sizes: Sequence[int]) -> float | None:
        """Return what smooth flows would yield; None where the table has no such strategy."""
        settings, times, plan = self._settings(name), self.times, self.plan
        if settings.strategy not in WITH_ARITHMETIC:
            return None
        if not cohort_sizes:  # pipelining may find that it does not pay
            settings = self._settings("device_only")
        rows, cohort = look.device_rows, max(cohort_sizes, default=1)
        device_length, host_length = look.lengths(_prompt_tokens())
        num_tokens = round(rows * device_length)
        stage_sec = {
            f"layers {rows}": times.layers(plan.layers_per_program, rows, num_tokens),
            f"device_attention {rows}": times.device_attention(rows, num_tokens),
            f"boundary {rows}": times.linear(rows),
            f"boundary {cohort}": times.linear(cohort),
            f"boundary {rows}+{cohort}": times.linear(rows, cohort),
            f"head {rows}": times.head(rows),
            f"head {cohort}": times.head(cohort),
        }
        load = Load(
            num_layers=plan.model.num_layers,
            layers_per_program=plan.layers_per_program,
            device_rows=rows,
            device_bucket=rows,
            num_cohorts=len(cohort_sizes),
            cohort_rows=sum(cohort_sizes) / max(1, len(cohort_sizes)),
            cohort_bucket=cohort,
        )
        job_sec = times.host_attention(cohort, round(cohort * host_length))
        return expected_rate(settings, load, stage_sec, job_sec)


def _busy(timeline: SpanKeeper, look: Look) -> Row:
    """Return how busy either side was, and how late the ends of stages were seen."""
    begin_sec, end_sec = look.begin.now_sec, look.end.now_sec
    busy = {
        lane: sum(
            max(0.0, min(span.end_sec, end_sec) - max(span.start_sec, begin_sec))
            for span in timeline.lanes[lane]
        )
        for lane in ("device", "host")
    }
    seen_sec = [
        float(str(span.args["seen_sec"]))
        for span in _within(timeline, "device", look)
        if "seen_sec" in span.args
    ]
    jobs_sec = [
        span.end_sec - span.start_sec
        for span in _within(timeline, "host", look)
        if span.name == "host_attention"
    ]
    return {
        "device_idle_percent": 100 * (1 - busy["device"] / look.seconds),
        "host_busy_percent": 100 * busy["host"] / look.seconds,
        "host_job_sec": float(np.median(jobs_sec)) if jobs_sec else None,
        "seen_sec": float(np.median(seen_sec)) if seen_sec else None,
        "seen_p99_sec": float(np.percentile(seen_sec, 99)) if seen_sec else None,
    }


def _within(timeline: SpanKeeper, lane: str, look: Look) -> list[Span]:
    return [
        span
        for span in timeline.lanes[lane]
        if span.start_sec >= look.begin.now_sec and span.end_sec <= look.end.now_sec
    ]


def predictions(
    bench: Bench, names: Sequence[str], meter: HostMeter, results: ResultFile
) -> Iterator[Row]:
    """Play every strategy on a virtual clock, with the host's times as measured all along."""
    bench.times = meter.apply(bench.times)
    for name in names:
        timeline = SpanKeeper()
        plan = bench.plan
        backend = SimulatedBackend(
            bench.times,
            layers_per_program=plan.layers_per_program,
            page_size=plan.shapes.page_size,
            on_span=timeline.span,
        )
        turn = partial(bench.turn, name, backend, timeline)
        row = _attempt(results, f"{name}, played", turn)
        if row is not None:
            yield row


def _attempt(results: ResultFile, label: str, turn: Callable[[], Row]) -> Row | None:
    """Return a turn's row; None, and a note in the file, where it was no steady state."""
    try:
        return turn()
    except ValueError as error:
        results.content["failed"][label] = reason(error)
        return None


def turns(
    bench: Bench,
    names: Sequence[str],
    backend: PacedBackend,
    timeline: SpanKeeper,
    meter: HostMeter,
    results: ResultFile,
) -> Iterator[Row]:
    """Run every strategy in real time, and again; each time measure the host before."""
    deadline_sec = time.perf_counter() + _BUDGET.value
    for repeat in range(1 if _SMOKE.value else _REPEATS.value):
        for name in names:
            if time.perf_counter() > deadline_sec:
                results.leave_out("turns", f"the time budget was spent before turn {repeat + 1}")
                return
            meter.measure()
            bench.times = meter.apply(bench.times)
            turn = partial(bench.turn, name, backend, timeline)
            row = _attempt(results, f"{name}, turn {repeat + 1}", turn)
            if row is None:
                continue
            if _TRACES.value is not None:
                path = Path(_TRACES.value) / f"{name}.json"
                timeline.write_trace(path, *row["looked_at_sec"])
            yield {"repeat": repeat, **row}


def medians(rows: Sequence[Row], predicted: Sequence[Row]) -> Iterator[Row]:
    """Return for each strategy the medians over its turns, beside what was predicted."""
    by_name: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        by_name[row["strategy"]].append(row)
    sweeps = {row["repeat"]: row["sweep_sec"] for row in by_name.get("device_only", [])}
    for prediction in predicted:
        own = by_name[prediction["strategy"]]
        if not own:
            continue
        rates = [row["tokens_per_sec"] for row in own]
        rate = float(np.median(rates))
        longer = [
            row["sweep_sec"] / sweeps[row["repeat"]] for row in own if row["repeat"] in sweeps
        ]
        arithmetic = prediction["arithmetic_tokens_per_sec"]
        middle = {
            name: float(np.median(known)) if (known := _known(own, name)) else None
            for name in (
                *("sweep_sec", "device_idle_percent", "host_busy_percent", "host_job_sec"),
                *("late_per_sweep", "python_sec_per_sweep", "seen_sec", "seen_p99_sec"),
            )
        }
        yield {
            "strategy": prediction["strategy"],
            "tokens_per_sec": rate,
            "tokens_per_sec_min": min(rates),
            "tokens_per_sec_max": max(rates),
            "over_predicted": rate / prediction["tokens_per_sec"],
            "over_arithmetic": rate / arithmetic if arithmetic else None,
            "sweep_over_device_only": float(np.median(longer)) if longer else None,
            "device_rows": own[0]["device_rows"],
            "host_rows": own[0]["host_rows"],
            **middle,
        }


def _known(rows: Sequence[Row], name: str) -> list[float]:
    return [row[name] for row in rows if row[name] is not None]


def make_config() -> tuple[Config, int]:
    """Return the settings of a run, and how many requests its device holds."""
    config = _CONFIG.value
    if _SMOKE.value:
        config = Config(model=ModelConfig(architecture=TINY))
    if config is None or config.model.architecture is None:
        raise ConfigError("--config must name a file with a model's shape, as configs/ has them")
    config.model.weights = "dummy"
    config.scheduler.strategy = "async_overlap"  # whose cohort is the largest
    config.scheduler.max_host_requests = _num_host()
    config.scheduler.max_model_len = _prompt_tokens() + _output_tokens()
    device, dtype = DEVICES[_DEVICE.value], config.model.dtype
    itemsize = 4 if dtype == "float32" else 2
    kv_gib = 0.001 if _SMOKE.value else _KV_GIB.value
    if kv_gib is not None:
        kv_bytes = int(kv_gib * GIB)
    else:
        reserve_bytes = int(_RESERVE.value * GIB)
        kv_bytes = device.kv_bytes(config.model.architecture, itemsize, reserve_bytes)
    page_size = config.cache.page_size
    row_bytes = (
        num_pages_for(config.scheduler.max_model_len, page_size)
        * page_size
        * config.model.architecture.kv_bytes_per_token(itemsize)
    )
    num_device = kv_bytes // row_bytes
    if num_device < 1:
        raise ConfigError(
            f"{device.name} has {kv_bytes / GIB:.2f} GiB for KV cache, and a request of "
            f"{config.scheduler.max_model_len} tokens takes {row_bytes / GIB:.2f}: give it more "
            "with --device_kv_gib, or fewer --prompt_tokens and --output_tokens"
        )
    config.cache.device_bytes = num_device * row_bytes
    config.scheduler.max_requests = num_device
    cpus = sorted(os.sched_getaffinity(0))
    if len(cpus) > 1 and not config.host.cpus and config.host.threads is None:
        config.host.cpus = ",".join(map(str, cpus[1:]))  # one is left to Python
        config.host.threads = len(cpus) - 1
    return config, num_device


def _num_host() -> int:
    return 6 if _SMOKE.value else _NUM_HOST.value


def _prompt_tokens() -> int:
    return 40 if _SMOKE.value else _PROMPT.value


def _output_tokens() -> int:
    return 400 if _SMOKE.value else _OUTPUT_TOKENS.value


def main(argv: Sequence[str]) -> int:
    del argv
    try:
        config, num_device = make_config()
        plan = PacedPlan.create(config)
        plan.check_host_memory()
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"device     {DEVICES[_DEVICE.value].describe()}\nmemory     {plan.describe()}")
    timeline = SpanKeeper()
    bench = Bench(plan, num_device, _num_host(), 0.005 if _SMOKE.value else _SECONDS.value)
    backend = plan.paced_backend(bench.costs(), timeline.span)
    length = _prompt_tokens() + plan.model.num_layers
    cohorts = [(max(1, _num_host() // part), length) for part in (1, 2, 4)]
    meter = HostMeter(backend, plan, cohorts)
    header = {
        "what": "strategies on a described device beside the real host; tokens per second, seconds",
        "smoke": _SMOKE.value,
        "model": dataclasses.asdict(plan.model),
        "device": dataclasses.asdict(DEVICES[_DEVICE.value]),
        "sizes": plan.describe(),
        "prompt_tokens": _prompt_tokens(),
        "environment": environment(),
    }
    # The budget is that of the turns: what they came to is said even where it was spent.
    results = ResultFile(Path(_OUTPUT.value), header, math.inf)
    groups = results.content["groups"]
    names = _NAMES.value
    results.measure("turns", lambda: turns(bench, names, backend, timeline, meter, results))
    results.measure("predictions", lambda: predictions(bench, names, meter, results))
    results.measure("times", lambda: [dataclasses.asdict(bench.times)])
    if groups.get("turns") and groups.get("predictions"):
        results.measure("medians", lambda: medians(groups["turns"], groups["predictions"]))
    backend.close()
    print(f"results in {results.path}")
    return 1 if results.content["failed"] else 0


if __name__ == "__main__":
    sys.exit(app.run(main))
