"""Compare strategies on one workload: throughput, latencies, goodput, and what was predicted.

    python -m launch.run_benchmark --config=configs/demo.py --requests=my_prompts.jsonl \
        --strategies=device_only,apex --output=runs/mine.json --page=runs/mine
    python -m launch.run_benchmark --backend=simulated --device_profile=t4 --host_profile=paper_t4 \
        --config=configs/llama_2_7b.py --workload=runs/azure_conv.jsonl --request_rates=own,1,2 \
        --ttft_sec=10 --tpot_sec=0.5 --output=runs/t4.json

All strategies take turns on the same hardware, weights and budgets. Writes OUTPUT.json, .csv and
.md, and with --page=FOLDER a page with plots. Formulas and rules: docs/benchmarks.md.

Exit status: 0 all runs are ok; 1 some failed, and are rows with the reason; 2 refused.
"""

import dataclasses
import math
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags
from ml_collections import config_flags

from apex_jax.config import Config, ConfigError, LlamaConfig
from apex_jax.models.hf_config import read_model_folder
from apex_jax.pages import num_pages_for
from apex_jax.text.model_text import load_text
from configs.hardware.hosts import HOSTS
from launch import command_line
from launch.comparison.decode import FileError
from launch.comparison.latency import FORMULAS, Bounds
from launch.comparison.result_file import ComparisonFile
from launch.comparison.results import (
    FORMAT,
    Budgets,
    ModelUsed,
    ResultHeader,
    WorkloadUsed,
)
from launch.comparison.runs import Benchmark, Hardware, Turns, reason
from launch.comparison.runs_described import paced, simulated
from launch.comparison.workload_file import Workload, read_workload, write_workload
from launch.conditions import device_profile, host_profile
from launch.environment import environment
from launch.make_workload import import_batch
from launch.measuring import measure_bandwidth
from launch.report import report
from launch.shared_engine import use_two_cpu_devices
from launch.starting import prepare_jax
from launch.strategy_names import settings_of

OWN = "own"  # a rate's name: arrivals as the workload has them
FIRST_GUESS = HOSTS["epyc_1_thread"]  # of a paced run's host, until it is timed
# What each backend must be told of; the rest of it is real.
PROFILES = {
    "xla": (),
    "paced": ("device_profile",),
    "simulated": ("device_profile", "host_profile"),
}


def define_flags() -> flags.FlagHolder:
    """Define this command's flags; return that of the config."""
    flags.DEFINE_string("workload", None, "File of launch.make_workload.")
    flags.DEFINE_string("requests", None, "Instead: prompts as launch.generate takes them.")
    flags.DEFINE_list("strategies", ["device_only", "apex"], "By name; passes_4 may pass 4 layers.")
    flags.DEFINE_enum(
        "backend", "xla", list(PROFILES), "Real; a described device; that and its host."
    )
    flags.DEFINE_string("device_profile", None, "For paced and simulated: such as t4.")
    flags.DEFINE_string("host_profile", None, "For simulated: such as paper_t4.")
    flags.DEFINE_list("request_rates", [OWN], "Requests a second; own: the workload's arrivals.")
    flags.DEFINE_float("ttft_sec", None, "Bound for goodput; goes with --tpot_sec.", 0.0)
    flags.DEFINE_float("tpot_sec", None, "Bound for goodput; goes with --ttft_sec.", 0.0)
    flags.DEFINE_integer("repeats", None, "Turns of each; unset: 3, and 1 simulated.", 1)
    flags.DEFINE_integer(
        "warm_up_requests", 8, "Each strategy serves so many before, uncounted.", 0
    )
    flags.DEFINE_float("budget_sec", 3600.0, "After this time no further turn begins.", 0.0)
    flags.DEFINE_string("output", "runs/benchmark.json", "Result file; .csv and .md lie beside it.")
    flags.DEFINE_string("page", None, "Folder for a page with plots, as launch.report makes it.")
    return config_flags.DEFINE_config_file("config", help_string="Of the model, as for a job.")


def make_turns(values: Any, config: Config) -> Turns:
    """Return what the flags ask for; ConfigError where a value means nothing."""
    systems = {name: settings_of(name, config.scheduler) for name in values.strategies}
    if not systems:
        raise ConfigError("--strategies is empty; name one, or better two")
    given = {flag for flag in ("device_profile", "host_profile") if getattr(values, flag)}
    if given != set(PROFILES[values.backend]):
        needs = " and ".join(f"--{flag}" for flag in PROFILES[values.backend]) or "no profile"
        raise ConfigError(f"--backend={values.backend} takes {needs}")
    if (values.ttft_sec is None) != (values.tpot_sec is None):
        raise ConfigError("--ttft_sec and --tpot_sec go together: goodput keeps both")
    bounds = None if values.ttft_sec is None else Bounds(values.ttft_sec, values.tpot_sec)
    repeats = values.repeats
    if repeats is None:
        repeats = 1 if values.backend == "simulated" else 3
    rates = list(map(_rate, values.request_rates))
    return Turns(systems, rates, repeats, values.warm_up_requests, bounds)


def _rate(text: str) -> float | None:
    if text == OWN:
        return None
    try:
        rate = float(text)
    except ValueError:
        rate = math.nan
    if not 0 < rate < math.inf:
        raise ConfigError(f"--request_rates has {text!r}; rates are above 0, or {OWN!r}")
    return rate


def load_workload(values: Any, config: Config) -> tuple[str, Workload]:
    """Return the workload and its file's name; the model must have its tokens."""
    if (values.workload is None) == (values.requests is None):
        raise ConfigError("give either --workload, or --requests with prompts")
    vocab_size = _shape(config).vocab_size
    if values.workload is not None:
        workload, file = read_workload(Path(values.workload)), values.workload
    else:
        folder = Path(config.model.path).expanduser() if config.model.path else None
        text = load_text(folder)
        workload = import_batch(Path(values.requests), config.sampling, text, vocab_size)
        path = Path(values.output).with_suffix(".workload.jsonl")
        write_workload(path, workload)
        file = str(path)
    if workload.header.vocab_size > vocab_size:
        raise ConfigError(
            f"{file} has token ids below {workload.header.vocab_size}, and the model's vocabulary "
            f"has {vocab_size}: make the workload with --model or --vocab_size={vocab_size}"
        )
    return file, workload


def settle(config: Config, turns: Turns, workload: Workload) -> Config:
    """Return settings that hold for all strategies: shapes for any, lengths for the longest."""
    scheduler = dataclasses.replace(config.scheduler)
    has_host = any(one.has_host_lane for one in turns.systems.values())
    scheduler.strategy = "async_overlap" if has_host else "device_only"  # the largest cohort
    limit = scheduler.max_model_len
    scheduler.max_model_len = min(workload.longest, limit or workload.longest)
    model = dataclasses.replace(config.model, architecture=_shape(config))
    host = dataclasses.replace(config.host)
    return dataclasses.replace(config, scheduler=scheduler, model=model, host=host)


def _shape(config: Config) -> LlamaConfig:
    if config.model.path:
        return read_model_folder(config.model.path, config.model.architecture).architecture
    if config.model.architecture is None:
        raise ConfigError("--config names no model: give --config.model.path")
    return config.model.architecture


def make_hardware(values: Any, config: Config, workload: Workload, name: str) -> Hardware:
    """Return what strategies take turns on; ConfigError where it cannot be had."""
    if values.backend == "simulated":
        device, host = device_profile(values.device_profile), host_profile(values.host_profile)
        return simulated(config, device, host, name)
    if values.backend == "paced":
        header = workload.header
        mean_tokens = round((header.prompt_tokens + header.output_tokens / 2) / header.num_requests)
        device = device_profile(values.device_profile)
        return paced(config, device, FIRST_GUESS, name, mean_tokens)
    from launch.comparison.runs_xla import RealHardware

    return RealHardware(config, lambda line: print(line, file=sys.stderr, flush=True))


def note_on(config: Config, workload: Workload, hardware: Hardware) -> str | None:
    """Return what a reader must know of all the rows, None where there is nothing.

    Where every request finds room on the device at once, no strategy sends any to the host.
    """
    shape, cache, requests = _shape(config), config.cache, workload.requests
    page_bytes = cache.page_size * shape.kv_bytes_per_token(
        jnp.dtype(hardware.model.dtype).itemsize
    )
    wanted = page_bytes * sum(num_pages_for(one.num_tokens, cache.page_size) for one in requests)
    given = hardware.budgets.device_kv_bytes or 0
    if wanted > given or len(requests) > config.scheduler.max_requests:
        return None
    return (
        f"Every request fits on the device at once ({wanted:,} bytes of KV cache, of {given:,}): "
        "strategies have nothing to differ in. Lower --config.cache.device_bytes, or take more "
        "requests."
    )


def leave_the_first_core(config: Config) -> None:
    """Keep the host op off the first core, which is the stand-in's for a device, or Python's."""
    cpus = sorted(os.sched_getaffinity(0))
    if len(cpus) > 1 and not config.host.cpus and config.host.threads is None:
        config.host.cpus = ",".join(map(str, cpus[1:]))
        config.host.threads = len(cpus) - 1


def _start_jax(config: Config) -> jax.Device:
    """Return the device; a CPU that was asked for is divided between it and the host's lane."""
    prepare_jax(config)
    if config.device.platform != "cpu":
        return jax.devices()[0]
    leave_the_first_core(config)
    use_two_cpu_devices(one_core_each=len(os.sched_getaffinity(0)) > 1)
    return jax.devices("cpu")[0]


def host_bandwidth(num_bytes: int = 2**28) -> float:
    """Return bytes per second that one thread of this machine reads in order: the best of 5.

    num_bytes: that are read, more than a cache holds.
    """
    numbers = np.ones(num_bytes // 8)
    seconds: list[float] = []
    for _ in range(5):
        begin_sec = time.perf_counter()
        numbers.sum()
        seconds.append(time.perf_counter() - begin_sec)
    return numbers.nbytes / min(seconds)


def bandwidths(device: jax.Device | None) -> dict[str, float]:
    """Return bytes per second of the memories, measured before anything is in them."""
    measured = {"host_bytes_per_sec_of_one_thread": host_bandwidth()}
    if device is not None and device.platform == "gpu":
        _, measured["device_bytes_per_sec"] = measure_bandwidth(device, smoke=False)
    return measured


def make_header(
    values: Any,
    config: Config,
    turns: Turns,
    used: WorkloadUsed,
    hardware: Hardware | None,
    name: str,
    facts: dict[str, Any],
    note: str | None,
) -> ResultHeader:
    """Return the header; hardware: None where there could be none. facts: of the machine."""
    baseline = "device_only" if "device_only" in turns.systems else next(iter(turns.systems))
    return ResultHeader(
        format=FORMAT,
        what=f"{', '.join(turns.systems)} on {used.header.name}",
        environment=facts,
        workload=used,
        model=hardware.model if hardware else ModelUsed(name, config.model.dtype, None),
        backend=values.backend,
        device_profile=values.device_profile,
        host_profile=values.host_profile,
        budgets=hardware.budgets if hardware else Budgets(None, None),
        settings={
            "max_requests": config.scheduler.max_requests,
            "max_host_requests": config.scheduler.max_host_requests,
            "max_prefill_tokens": config.scheduler.max_prefill_tokens,
            "max_model_len": config.scheduler.max_model_len,
            "page_size": config.cache.page_size,
            "prefix_reuse": config.cache.prefix_reuse,
            "layers_per_program": hardware.layers_per_program if hardware else None,
            "host_threads": config.host.threads,
            "host_cpus": config.host.cpus,
            "ttft_sec": values.ttft_sec,
            "tpot_sec": values.tpot_sec,
            "repeats": turns.num_repeats,
            "warm_up_requests": turns.num_warm_up,
            "stage_times": hardware.described_times() if hardware else None,
            "note": note,
        },
        baseline=baseline,
        warm_up=hardware.warm_up if hardware else "Nothing ran.",
        formulas=FORMULAS,
    )


def run(values: Any, config: Config, name: str) -> int:
    """Compare what the flags name; return the exit status. ConfigError or FileError: refused."""
    output = Path(values.output)
    if output.suffix != ".json":
        raise ConfigError(f"--output is {values.output!r}; its name must end in .json")
    turns = make_turns(values, config)
    file, workload = load_workload(values, config)
    config = settle(config, turns, workload)
    device = _start_jax(config) if values.backend == "xla" else None
    if values.backend == "paced":
        leave_the_first_core(config)
    facts = environment(device) | {"measured": bandwidths(device)}
    hardware: Hardware | None = None
    why = ""
    try:
        hardware = make_hardware(values, config, workload, name)
    except (ConfigError, FileError):
        raise
    except Exception as error:  # such as a device that is out of memory
        why = reason(error)
    used = WorkloadUsed(file, workload.header)
    note = note_on(config, workload, hardware) if hardware else None
    header = make_header(values, config, turns, used, hardware, name, facts, note)
    results = ComparisonFile(output, header, values.budget_sec)
    if hardware is None:
        results.measure(lambda: turns.all_failed(why))
    else:
        print(f"{hardware.describe()}\nwarm-up    {hardware.warm_up}")
        if note is not None:
            print(f"note: {note}", file=sys.stderr)
        benchmark = Benchmark(hardware, workload, turns)
        results.measure(benchmark.run)
        hardware.close()
    summary = results.finish()
    print(f"\n{output.with_suffix('.md').read_text()}\nresults in {output}")
    if values.page is not None:
        page, *plots = report([output], Path(values.page))[0]
        print(f"page with {len(plots)} plots in {page}")
    return 1 if results.fault or any(row.num_failed for row in summary) else 0


def main(argv: Sequence[str]) -> int:
    del argv  # parse_flags has read it
    values = flags.FLAGS
    path = Path(config_flags.get_config_filename(values["config"]))
    name = Path(values.config.model.path).name if values.config.model.path else path.stem
    try:
        return run(values, values.config, name)
    except (ConfigError, FileError) as error:
        command_line.refuse(str(error))


if __name__ == "__main__":
    _CONFIG = define_flags()
    app.run(main, flags_parser=lambda argv: command_line.parse_flags(argv, _CONFIG, (_CONFIG,)))
