"""What is simulated: a model on a described card beside a described host, and who is served there.

Owns the names that such conditions go by, what memory they leave for KV cache, and how one is
played under one strategy. Refuses unknown names in one line; a condition that cannot be is refused
when it is placed. Called by the simulate scripts. Imports no jax.
"""

import importlib
import pkgutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import NamedTuple

import configs
from apex_jax.config import ConfigError, LlamaConfig, SchedulerConfig
from apex_jax.cost_model import StageTimes
from apex_jax.hardware_profiles import GIB, DeviceProfile, HostProfile, stage_times
from apex_jax.policies import Policy
from apex_jax.simulation import Simulation, Steady, frozen_state
from apex_jax.strategies import make_policy
from configs.hardware.devices import DEVICES
from configs.hardware.hosts import HOSTS
from launch import strategy_names
from launch.workloads import Lengths

ITEMSIZE = 2  # of weights and KV: float16 or bfloat16
PAGE_SIZE = 16
RESERVE_BYTES = int(1.5 * GIB)  # of the card, for programs' scratch and the driver's own
MAX_DEVICE_REQUESTS, MAX_HOST_REQUESTS = 256, 1024
LAYERS_PER_PROGRAM = 4
ALL_STRATEGIES = (
    *("device_only", "async_overlap", "staggered_2", "passes_2", "passes_4"),
    *("asymmetric_pipelining", "full_offload", "apex_paper", "apex"),
)


@dataclass(frozen=True)
class Condition:
    """Names of profiles and of a model in configs/, and what is served.

    kv_bytes, host_bytes: for KV cache; None for all that the weights leave on the card, and for 80
    % of the host's memory. host_bandwidth_scale: of what the host's profile says. prompt_tokens,
    output_tokens: of a request.
    """

    device: str
    host: str
    model: str
    prompt_tokens: int
    output_tokens: int
    kv_bytes: int | None = None
    host_bytes: int | None = None
    host_bandwidth_scale: float = 1.0


@dataclass(frozen=True)
class Place:
    """A condition worked out: stage times, and how many tokens of KV each lane holds."""

    times: StageTimes
    device_tokens: int
    host_tokens: int
    max_model_len: int


def settings_of(name: str) -> SchedulerConfig:
    """Return what a strategy's name stands for: passes_4 may pass 4 layers; ConfigError else."""
    return strategy_names.settings_of(name, SchedulerConfig(max_host_requests=MAX_HOST_REQUESTS))


def device_profile(name: str) -> DeviceProfile:
    """Return a profile of configs/hardware; ConfigError where there is none of that name."""
    if name not in DEVICES:
        raise ConfigError(f"no device is called {name!r}; there are {', '.join(DEVICES)}")
    return DEVICES[name]


def host_profile(name: str) -> HostProfile:
    """Return a profile of configs/hardware; ConfigError where there is none of that name."""
    if name not in HOSTS:
        raise ConfigError(f"no host is called {name!r}; there are {', '.join(HOSTS)}")
    return HOSTS[name]


def architecture(name: str) -> LlamaConfig:
    """Return the shape that configs/NAME.py states; ConfigError where there is none."""
    modules = [one.name for one in pkgutil.iter_modules(configs.__path__) if not one.ispkg]
    shapes = {
        module: importlib.import_module(f"configs.{module}").get_config().model.architecture
        for module in ([name] if name in modules else modules)
    }
    known = [module for module, shape in shapes.items() if shape is not None]
    if name not in known:
        raise ConfigError(f"no model is called {name!r}; there are {', '.join(known)}")
    return shapes[name]


def place(condition: Condition) -> Place:
    """Return stage times and room; ConfigError where the card cannot hold the model or a request.

    A KV budget on the card may be smaller than what the weights leave there, not larger.
    """
    device, host = device_profile(condition.device), host_profile(condition.host)
    model = architecture(condition.model)
    left_bytes = device.kv_bytes(model, ITEMSIZE, RESERVE_BYTES)
    if condition.kv_bytes is not None and condition.kv_bytes > left_bytes:
        raise ConfigError(
            f"{device.name} has {left_bytes / GIB:.2f} GiB for KV cache beside {condition.model}, "
            f"fewer than the {condition.kv_bytes / GIB:.2f} GiB asked for"
        )
    if condition.host_bytes is not None and condition.host_bytes > host.memory_bytes:
        raise ConfigError(
            f"{condition.host} has {host.memory_bytes / GIB:.0f} GiB of memory, fewer than the "
            f"{condition.host_bytes / GIB:.0f} GiB asked for"
        )
    kv_bytes = left_bytes if condition.kv_bytes is None else condition.kv_bytes
    host_bytes = (
        int(0.8 * host.memory_bytes) if condition.host_bytes is None else condition.host_bytes
    )
    scaled = replace(host, bytes_per_sec=host.bytes_per_sec * condition.host_bandwidth_scale)
    token_bytes = model.kv_bytes_per_token(ITEMSIZE)
    longest = condition.prompt_tokens + condition.output_tokens
    if longest > model.max_position_embeddings:
        raise ConfigError(
            f"{condition.model} reaches {model.max_position_embeddings} tokens, fewer than a "
            f"request's {longest}"
        )
    found = Place(
        stage_times(model, ITEMSIZE, device, scaled),
        kv_bytes // token_bytes,
        host_bytes // token_bytes,
        model.max_position_embeddings,
    )
    if found.device_tokens < longest + PAGE_SIZE:
        raise ConfigError(
            f"{kv_bytes / GIB:.2f} GiB of KV cache on {device.name} hold {found.device_tokens} "
            f"tokens of {condition.model}, fewer than a request's {longest}"
        )
    return found


def policy_of(strategy: str, times: StageTimes) -> Policy:
    """Return the policy that a strategy's name stands for."""
    return make_policy(settings_of(strategy), times, LAYERS_PER_PROGRAM)


def steady_rows(condition: Condition, found: Place) -> tuple[int, int]:
    """Return how many whole requests each lane holds at once."""
    tokens = condition.prompt_tokens + condition.output_tokens
    return (
        min(found.device_tokens // tokens, MAX_DEVICE_REQUESTS),
        min(found.host_tokens // tokens, MAX_HOST_REQUESTS),
    )


def play_steady(condition: Condition, found: Place, policy: Policy) -> Steady:
    """Return what a strategy yields while both lanes are full of half-way requests."""
    device_rows, host_rows = steady_rows(condition, found)
    length = condition.prompt_tokens + condition.output_tokens // 2
    return frozen_state(
        found.times,
        policy,
        device_lengths=[length] * device_rows,
        host_lengths=[length] * host_rows,
        layers_per_program=LAYERS_PER_PROGRAM,
    )


class Job(NamedTuple):
    """What a whole job came to.

    rate: output tokens per second, from the first arrival to the last token. host_share: of the
    output tokens, those decoded in the host lane. ttft_sec, tpot_sec: means over requests, the
    latter over those with more than one token.
    """

    seconds: float
    rate: float
    host_share: float
    ttft_sec: float
    tpot_sec: float | None
    num_preemptions: int
    num_sweeps: int


def play_job(
    found: Place,
    policy: Policy,
    requests: Sequence[Lengths],
    arrivals_sec: Sequence[float] | None = None,
    max_prefill_tokens: int = 512,
) -> Job:
    """Run requests to their ends: admission, prompts, promotion and drain included.

    arrivals_sec: ascending; None for all at once.
    """
    longest = max(sum(lengths) for lengths in requests)
    simulation = Simulation(
        found.times,
        policy,
        num_pages=found.device_tokens // PAGE_SIZE,
        num_host_pages=found.host_tokens // PAGE_SIZE,
        max_requests=MAX_DEVICE_REQUESTS,
        max_host_requests=MAX_HOST_REQUESTS,
        max_model_len=longest,
        max_prefill_tokens=max_prefill_tokens,
        page_size=PAGE_SIZE,
        layers_per_program=LAYERS_PER_PROGRAM,
    )
    for arrival_sec, lengths in zip(arrivals_sec or [0.0] * len(requests), requests, strict=True):
        simulation.submit_at(arrival_sec, *lengths)
    simulation.run()
    outputs, stats = simulation.outputs, simulation.scheduler.stats
    seconds = max(one.finish_sec for one in outputs) - min(one.arrival_sec for one in outputs)
    tpots_sec = [one.tpot_sec for one in outputs if one.tpot_sec is not None]
    return Job(
        seconds=seconds,
        rate=stats.num_output_tokens / seconds,
        host_share=stats.num_host_tokens / stats.num_output_tokens,
        ttft_sec=fmean(one.ttft_sec for one in outputs),
        tpot_sec=fmean(tpots_sec) if tpots_sec else None,
        num_preemptions=stats.num_preemptions,
        num_sweeps=stats.num_sweeps,
    )
