"""What a job would come to: what fits where, and what each strategy is predicted to yield.

    python -m launch.generate --plan_only --config=configs/NAME.py --input=IN.jsonl
    python -m launch.generate --plan_only --config=configs/llama_2_7b.py --input=IN.jsonl \
        --device_profile=t4 --host_profile=paper_t4

Loads no weights and compiles nothing. Predictions are from the profile that launch.run_profiler
kept of this engine, or from a described device and host (configs/hardware). Called by
launch.generate.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

from apex_jax.batch.lines import BatchRequest, parse_line, read_lines
from apex_jax.config import STRATEGIES, Config, ConfigError, LlamaConfig, validate
from apex_jax.cost_model import Times
from apex_jax.forecast import Forecast, Job, Room, describe, forecast
from apex_jax.hardware_profiles import GIB, DeviceProfile, HostProfile, stage_times
from apex_jax.models.hf_config import read_model_folder
from apex_jax.programs import span_of_layers
from apex_jax.request import RequestError
from apex_jax.text.model_text import load_text
from configs.hardware.devices import DEVICES
from configs.hardware.hosts import HOSTS
from launch.starting import prepare_jax

Profile = TypeVar("Profile", DeviceProfile, HostProfile)

SAMPLE_LINES = 2000  # of the input, for the mean lengths
LEFT_OUT = "rates are of full lanes: a job's end, when rows run out, and prefix reuse are left out"
RESERVE_BYTES = GIB  # of a described device, for programs' scratch and the driver


def plan(config: Config, source: Path, device: str | None, host: str | None) -> str:
    """Return the plan in words. ConfigError where it cannot be had, or nothing to predict from.

    device, host: names of described hardware; None for this machine's.
    """
    validate(config)
    if (device is None) != (host is None):
        raise ConfigError("--device_profile and --host_profile go together: name both, or neither")
    job, left_out = read_job(config, source)
    lines = [
        f"job        {job.num_requests} requests, {job.prompt_tokens:.0f} prompt tokens and at "
        f"most {job.output_tokens:.0f} output tokens on average",
        *left_out,
    ]
    if device is None or host is None:
        lines += _plan_here(config, job)
    else:
        lines += _plan_described(
            config,
            job,
            _named(DEVICES, device, "--device_profile"),
            _named(HOSTS, host, "--host_profile"),
        )
    return "\n".join(lines)


def read_job(config: Config, source: Path) -> tuple[Job, list[str]]:
    """Return how many requests the input has, and their mean lengths; and what is left out, if any.

    Lengths are those of the first lines; an output is taken to be as long as it may be, and each of
    several outputs of a line is a request. Lines in error are left out.
    """
    text = load_text(Path(config.model.path).expanduser() if config.model.path else None)
    num_lines, prompts, outputs = 0, list[int](), list[int]()
    errors: list[str] = []
    try:
        with source.open("rb") as file:
            for raw in read_lines(file):
                num_lines += 1
                if num_lines <= SAMPLE_LINES:
                    entry = parse_line(raw, config.sampling)
                    if not isinstance(entry, BatchRequest):
                        errors.append(f"line {num_lines}: {entry.message}")
                        continue
                    try:
                        num_tokens = len(text.encode(entry.prompt))
                    except RequestError as error:  # such as a text where there is no tokenizer
                        errors.append(f"line {num_lines}: {error}")
                        continue
                    prompts += [num_tokens] * entry.sampling.n
                    outputs += [entry.sampling.max_tokens] * entry.sampling.n
    except OSError as error:
        raise ConfigError(f"cannot read --input={source}: {error.strerror}") from None
    if not prompts:
        because = f" ({errors[0]})" if errors else ""
        raise ConfigError(
            f"--input={source} has no line that could run: there is nothing to plan{because}"
        )
    num_seen = min(num_lines, SAMPLE_LINES)
    job = Job(round(num_lines * len(prompts) / num_seen), _mean(prompts), _mean(outputs))
    if not errors:
        return job, []
    return job, [f"left out   {len(errors)} of {num_seen} lines, the first: {errors[0]}"]


def _plan_here(config: Config, job: Job) -> list[str]:
    prepare_jax(config)
    from apex_jax.engine_plan import EnginePlan  # imports jax
    from apex_jax.measured_times import MeasuredTimes
    from apex_jax.profiling.table import find_kept

    if not config.scheduler.has_host_lane:
        scheduler = dataclasses.replace(config.scheduler, strategy="apex")
        config = dataclasses.replace(config, scheduler=scheduler)
    engine = EnginePlan.create(config)
    lines = [engine.describe()]
    if engine.host_op is None:
        return [*lines, "profile    not needed: the device holds all that may run, so nobody waits"]
    notes: list[str] = []
    kept = find_kept(config.profile.cache_dir, engine.profile_key(), notes.append)
    if kept is None:
        return [
            *lines,
            *notes,
            "profile    none is kept of this engine: python -m launch.run_profiler with the same "
            "--config measures one; or name --device_profile and --host_profile",
        ]
    span = engine.layers_per_program
    times = MeasuredTimes(
        kept.measurements, engine.shapes, num_layers=engine.architecture.num_layers, span=span
    )
    lines.append(f"profile    measured {kept.measured_at} on {kept.key['device']}")
    return [*lines, _table(config, times, span, engine.room, job)]


def _plan_described(
    config: Config, job: Job, device: DeviceProfile, host: HostProfile
) -> list[str]:
    model, itemsize = _model(config)
    cache, scheduler = config.cache, config.scheduler
    token_bytes = model.kv_bytes_per_token(itemsize)
    device_bytes = cache.device_bytes
    if device_bytes is None:
        left_bytes = device.kv_bytes(model, itemsize, RESERVE_BYTES)
        device_bytes = int(left_bytes * cache.device_fraction)
    host_bytes = host.memory_bytes // 2 if cache.host_bytes is None else cache.host_bytes
    room = Room(
        device_tokens=device_bytes // token_bytes,
        device_requests=scheduler.max_requests,
        host_tokens=host_bytes // token_bytes,
        host_requests=scheduler.max_host_requests,
    )
    span = span_of_layers(model.num_layers, config.compile.layers_per_program, has_host_lane=True)
    times = stage_times(model, itemsize, device, host)
    return [
        f"device     described: {device.describe()}",
        f"host       described: {host.describe()}",
        f"memory     KV cache {device_bytes / GIB:.2f} GiB ({room.device_tokens} tokens) on the "
        f"device, {host_bytes / GIB:.2f} GiB ({room.host_tokens} tokens) on the host",
        _table(config, times, span, room, job),
    ]


def _table(config: Config, times: Times, span: int, room: Room, job: Job) -> str:
    forecasts: list[Forecast] = [
        forecast(strategy, config.scheduler, times, span, room, job) for strategy in STRATEGIES
    ]
    table = describe(sorted(forecasts, key=lambda one: -one.rate))
    return f"{table}\nnote       {LEFT_OUT}"


def _model(config: Config) -> tuple[LlamaConfig, int]:
    """Return the shape, and the bytes of a weight; 2 where the dtype is the device's to say."""
    if config.model.path:
        folder = read_model_folder(config.model.path, config.model.architecture)
        model = folder.architecture
    else:
        assert config.model.architecture is not None  # validate() has seen to it
        model = config.model.architecture
    return model, 4 if config.model.dtype == "float32" else 2


def _named(profiles: dict[str, Profile], name: str, flag: str) -> Profile:
    if name not in profiles:
        raise ConfigError(f"{flag} is {name!r}; there are {', '.join(profiles)}")
    return profiles[name]


def _mean(values: Sequence[int]) -> float:
    return sum(values) / len(values)
