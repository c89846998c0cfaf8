"""Compare frameworks on one workload, each in a process and an environment of its own.

    python -m launch.compare --workload=runs/ragged.jsonl --config=configs/default.py \
        --config.model.path=configs/demo_model --config.scheduler.strategy=device_only \
        --config.scheduler.max_requests=32 --frameworks=apex_jax,transformers,llama.cpp

All take turns with the same weights, dtype, threads, KV budget and requests in flight; all requests
are due at once. vllm and sglang are not run: their data set is written and their commands printed,
and --import=vllm=FILE makes rows of what they measured. Rules: docs/frameworks.md.

Exit status: 0 all runs are ok; 1 some failed, and are rows with the reason; 2 refused.
"""

import dataclasses
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from absl import app, flags
from ml_collections import config_flags

from apex_jax.config import Config, ConfigError, LlamaConfig
from apex_jax.models.hf_config import read_model_folder
from launch import command_line
from launch.comparison.adapters import external
from launch.comparison.adapters.agreement import agreement
from launch.comparison.adapters.environments import FRAMEWORKS, SetUpError, interpreter_of
from launch.comparison.adapters.jobs import Job, JobResult
from launch.comparison.adapters.processes import RunError, run_job
from launch.comparison.decode import FileError
from launch.comparison.latency import FORMULAS, figures
from launch.comparison.result_file import ComparisonFile
from launch.comparison.results import (
    FORMAT,
    Budgets,
    ModelUsed,
    ResultHeader,
    RunRow,
    WorkloadUsed,
)
from launch.comparison.workload_file import Workload, read_workload
from launch.environment import environment

WARM_UP = "Each run is a process of its own that warms up before its clock starts: used[].warm_up."
ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


def define_flags() -> flags.FlagHolder:
    """Define this command's flags; return that of the config."""
    known = (*FRAMEWORKS, *external.EXTERNAL)
    flags.DEFINE_string("workload", None, "File of launch.make_workload.")
    flags.DEFINE_list("frameworks", ["apex_jax", "transformers"], f"Of {', '.join(known)}.")
    flags.DEFINE_string("baseline", None, "That ratios refer to; unset: the second one.")
    flags.DEFINE_integer("repeats", 3, "Turns of each.", 1)
    flags.DEFINE_integer("threads", None, "Of a CPU, for all; unset: all it may use.", 1)
    flags.DEFINE_string("env_dir", "~/.cache/apex_jax/frameworks", "Of their environments.")
    flags.DEFINE_multi_string("python", [], "NAME=INTERPRETER: instead of an environment of ours.")
    flags.DEFINE_string("gguf", None, "For llama.cpp, instead of a file made of the weights.")
    flags.DEFINE_multi_string("import", [], "NAME=FILE: results of vllm's or sglang's client.")
    flags.DEFINE_float("timeout_sec", 3600.0, "Of one run, with its loading and warm-up.", 0.0)
    flags.DEFINE_float("budget_sec", 7200.0, "After this time no further turn begins.", 0.0)
    flags.DEFINE_string("output", "runs/frameworks.json", "Result file; .csv and .md lie beside.")
    return config_flags.DEFINE_config_file("config", help_string="Of the model, as for a job.")


def pairs(flag: str, texts: Sequence[str], known: Sequence[str]) -> dict[str, str]:
    """Return NAME=VALUE texts as a dict; ConfigError for a name that is not known."""
    found: dict[str, str] = {}
    for text in texts:
        name, sign, value = text.partition("=")
        if not sign or not value or name not in known:
            raise ConfigError(f"--{flag} is {text!r}; it must be NAME=..., of {', '.join(known)}")
        found[name] = value
    return found


def settle(
    config: Config, workload: Workload, shape: LlamaConfig, dtype: str | None
) -> tuple[Config, str]:
    """Return settings in which nothing is left to a framework, and the device: cpu or gpu.

    dtype: of the checkpoint. A KV budget that is not given is what as many of the longest requests
    as may be in flight take.
    """
    config = dataclasses.replace(
        config,
        model=dataclasses.replace(config.model),
        cache=dataclasses.replace(config.cache, prefix_reuse=False),
        scheduler=dataclasses.replace(config.scheduler),
        device=dataclasses.replace(config.device),
    )
    if config.device.platform == "auto":
        config.device.platform = "gpu" if shutil.which("nvidia-smi") else "cpu"
    if config.model.dtype == "auto":
        config.model.dtype = "float32" if config.device.platform == "cpu" else dtype or "float32"
    longest = workload.longest
    if config.scheduler.max_model_len is None:
        config.scheduler.max_model_len = longest
    if longest > config.scheduler.max_model_len:
        raise ConfigError(
            f"--config.scheduler.max_model_len is {config.scheduler.max_model_len}; the workload's "
            f"longest request has {longest} tokens"
        )
    page = config.cache.page_size
    page_bytes = page * shape.kv_bytes_per_token(ITEM_BYTES[config.model.dtype])
    longest_bytes = -(-longest // page) * page_bytes
    if config.cache.device_bytes is None:
        # One more: the engine keeps pages for the tokens that are under way.
        config.cache.device_bytes = (config.scheduler.max_requests + 1) * longest_bytes
    if config.scheduler.has_host_lane and config.cache.host_bytes is None:
        config.cache.host_bytes = (config.scheduler.max_host_requests + 1) * longest_bytes
    return config, config.device.platform


class Comparison:
    """Frameworks that take turns at one job."""

    def __init__(self, job: Job, systems: Mapping[str, tuple[str, Path]], settings: dict[str, Any]):
        """systems: interpreter and program by framework. settings: a framework's own, if any."""
        self._job, self._systems = job, systems
        self._settings = dict(settings)
        self.used: list[dict[str, Any]] = []
        self.results: dict[str, JobResult] = {}  # the first of each

    def turns(
        self, num_repeats: int, timeout_sec: float, failed: Mapping[str, str]
    ) -> Iterator[RunRow]:
        """Yield a row for each run, A B A B; failed: why a framework cannot run."""
        for repeat in range(num_repeats):
            for name in (*self._systems, *failed):
                if name in failed:
                    yield _failed(name, repeat, failed[name])
                    continue
                try:
                    yield self._turn(name, repeat, timeout_sec)
                except RunError as error:
                    yield _failed(name, repeat, str(error))

    def _turn(self, name: str, repeat: int, timeout_sec: float) -> RunRow:
        python, script = self._systems[name]
        job = dataclasses.replace(self._job, settings=self._settings.get(name))
        result = run_job(python, script, job, timeout_sec)
        self._settings[name] = result.settings
        self.results.setdefault(name, result)
        facts = {field.name: getattr(result, field.name) for field in dataclasses.fields(result)}
        self.used.append({"system": name, "repeat": repeat, **facts} | {"requests": None})
        own = figures([one.served() for one in result.requests], None)
        return RunRow(name, name, None, repeat, "ok", version=result.version, **own)


def _failed(name: str, repeat: int, why: str) -> RunRow:
    return RunRow(name, name, None, repeat, "failed", error=why)


def make_job(config: Config, device: str, threads: int, workload: Workload) -> Job:
    """Return what every framework is asked."""
    cache = config.cache
    assert config.model.path is not None
    assert cache.device_bytes is not None
    return Job(
        model=str(Path(config.model.path).expanduser().absolute()),
        dtype=config.model.dtype,
        device=device,
        threads=threads,
        max_requests=config.scheduler.max_running,
        device_kv_bytes=cache.device_bytes,
        host_kv_bytes=(cache.host_bytes or 0) if config.scheduler.has_host_lane else 0,
        requests=workload.requests,
        settings=None,
    )


def bind(threads: int | None) -> int:
    """Bind this process, and so those that it starts, to so many CPUs; return how many."""
    cpus = sorted(os.sched_getaffinity(0))
    if threads is not None and threads > len(cpus):
        raise ConfigError(f"--threads is {threads}; this process may use {len(cpus)} CPUs")
    os.sched_setaffinity(0, cpus[: threads or len(cpus)])
    return threads or len(cpus)


def print_commands(
    names: Sequence[str],
    job: Job,
    config: Config,
    shape: LlamaConfig,
    workload: Workload,
    output: Path,
) -> None:
    """Write the data set of the clients of others, and say what to type."""
    kv_bytes = shape.kv_bytes_per_token(ITEM_BYTES[job.dtype])
    for name in names:
        data, result = (output.with_suffix(f".{name}.{end}") for end in ("data.jsonl", "jsonl"))
        external.export(workload, data)
        server, client = external.commands(
            name,
            model=job.model,
            dtype=job.dtype,
            max_requests=job.max_requests,
            max_model_len=config.scheduler.max_model_len or workload.longest,
            kv_tokens=job.device_kv_bytes // kv_bytes,
            num_requests=workload.header.num_requests,
            data=data,
            result=result,
        )
        print(
            f"{name}: start its server, then the client (of {external.CLIENT}, in an environment "
            f"of its own); add --import={name}={result} here\n    {server}\n    {client}"
        )


def run(values: Mapping[str, Any], config: Config) -> int:
    """Compare what the flags name; return the exit status. ConfigError or FileError: refused."""
    known = (*FRAMEWORKS, *external.EXTERNAL)
    output, names = Path(values["output"]), list(dict.fromkeys(values["frameworks"]))
    if output.suffix != ".json":
        raise ConfigError(f"--output is {values['output']!r}; its name must end in .json")
    if unknown := [name for name in names if name not in known]:
        raise ConfigError(f"--frameworks has {unknown[0]!r}; known are {', '.join(known)}")
    if config.model.path is None or config.model.weights != "checkpoint":
        raise ConfigError("give --config.model.path: other frameworks need the weights as files")
    if values["workload"] is None:
        raise ConfigError("--workload is missing; python -m launch.make_workload makes one")
    pythons = pairs("python", values["python"], tuple(FRAMEWORKS))
    imports = pairs("import", values["import"], external.EXTERNAL)
    workload = read_workload(Path(values["workload"]))
    folder = read_model_folder(config.model.path, config.model.architecture)
    if workload.header.vocab_size > folder.architecture.vocab_size:
        raise ConfigError(
            f"{values['workload']} has token ids below {workload.header.vocab_size}, and the "
            f"model's vocabulary has {folder.architecture.vocab_size}"
        )
    config, device = settle(config, workload, folder.architecture, folder.dtype)
    here = [name for name in names if name in FRAMEWORKS]
    baseline = values["baseline"] or (here[1] if len(here) > 1 else None)
    if baseline is not None and baseline not in (*here, *imports):
        raise ConfigError(f"--baseline is {baseline!r}; it must be one of those compared")
    job = make_job(config, device, bind(values["threads"]), workload)
    imported = [
        row
        for name, path in imports.items()
        for row in external.read_rows(name, Path(path), workload)
    ]
    output.parent.mkdir(parents=True, exist_ok=True)
    others = [name for name in names if name in external.EXTERNAL and name not in imports]
    print_commands(others, job, config, folder.architecture, workload, output)

    systems, failed = {}, {}
    for name in here:
        framework = FRAMEWORKS[name]
        env_dir = Path(values["env_dir"]).expanduser()
        try:
            given = pythons.get(name) or pythons.get(framework.environment)
            python = interpreter_of(framework, env_dir, given, print)
            systems[name] = (python, framework.path)
        except SetUpError as error:
            failed[name] = str(error)
    settings: dict[str, Any] = {"apex_jax": dataclasses.asdict(config)}
    if values["gguf"] is not None:
        settings["llama.cpp"] = {"gguf": str(Path(values["gguf"]).absolute())}
    comparison = Comparison(job, systems, settings)
    header = ResultHeader(
        format=FORMAT,
        what=f"{', '.join([*here, *imports])} on {workload.header.name}",
        environment=environment(),
        workload=WorkloadUsed(values["workload"], workload.header),
        model=ModelUsed(folder.path.name, job.dtype, None),
        backend="external",
        device_profile=None,
        host_profile=None,
        budgets=Budgets(job.device_kv_bytes, job.host_kv_bytes or None),
        settings={
            "device": device,
            "threads": job.threads,
            "requests_in_flight": job.max_requests,
            "strategy": config.scheduler.strategy,
            "arrivals": "all at once",
            "repeats": values["repeats"],
        },
        baseline=baseline,
        warm_up=WARM_UP,
        formulas=FORMULAS,
    )
    results = ComparisonFile(output, header, values["budget_sec"])
    results.measure(lambda: (*imported,))
    results.measure(lambda: comparison.turns(values["repeats"], values["timeout_sec"], failed))
    results.record("used", comparison.used)
    results.record("agreement", agreements(comparison.results, baseline))
    summary = results.finish()
    print(f"\n{output.with_suffix('.md').read_text()}\nresults in {output}")
    return 1 if results.fault or any(row.num_failed for row in summary) else 0


def agreements(results: Mapping[str, JobResult], baseline: str | None) -> list[dict[str, Any]]:
    """Return how far each framework's tokens are the baseline's."""
    reference = results.get(baseline or "")
    if reference is None:
        return []
    return [
        {"system": name, "baseline": baseline, **agreement(result, reference)}
        for name, result in results.items()
        if name != baseline
    ]


def main(argv: Sequence[str]) -> int:
    del argv  # parse_flags has read it
    try:
        return run(flags.FLAGS.flag_values_dict(), flags.FLAGS.config)
    except (ConfigError, FileError) as error:
        command_line.refuse(str(error))


if __name__ == "__main__":
    _CONFIG = define_flags()
    app.run(main, flags_parser=lambda argv: command_line.parse_flags(argv, _CONFIG, (_CONFIG,)))
