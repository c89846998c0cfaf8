"""What planning and committing a sweep costs with many requests in flight, whatever the device.

Owns the loads that are tried; the scheduler is the real one, under the loop of the simulator, which
computes nothing. Called by bench_python.
"""

import random
from collections.abc import Iterator
from typing import NamedTuple

from apex_jax.cost_model import StageTimes
from apex_jax.policies import DeviceOnly, Merging, Policy
from apex_jax.simulation import Simulation
from launch.measuring import Row
from launch.stopwatch import Stopwatch

VERBS = ("plan_sweep", "launched", "commit")
NUM_TURNS = 5  # the quickest counts: other processes only ever add time
PROMPT_TOKENS, STEADY_TOKENS, SHORT_TOKENS = 64, 2000, (100, 400)


class Load(NamedTuple):
    """Requests in both lanes, and how many tokens each puts out, least and most."""

    device_rows: int
    host_rows: int
    policy: Policy
    output_tokens: tuple[int, int]


def loads(num_requests: int) -> dict[str, Load]:
    """Return the loads by name; `steady`: nobody comes or ends."""
    steady, many = (STEADY_TOKENS, STEADY_TOKENS), num_requests
    few = many // 5
    return {
        "steady": Load(many, 0, DeviceOnly(), steady),
        "coming_and_going": Load(many, 0, DeviceOnly(), SHORT_TOKENS),
        "most_on_host": Load(few, many - few, Merging(max_cohorts=2, is_spread=True), steady),
    }


def measure_scheduling(
    times: StageTimes, stopwatch: Stopwatch, num_requests: list[int], num_sweeps: int
) -> Iterator[Row]:
    """Yield the CPU seconds a sweep of each verb, for each number of requests and load."""
    for count in num_requests:
        for name, load in loads(count).items():
            yield {"requests": count, "load": name, **_measure(times, load, stopwatch, num_sweeps)}


def _measure(times: StageTimes, load: Load, stopwatch: Stopwatch, num_sweeps: int) -> Row:
    least, most = load.output_tokens
    page_size, num_rows = 16, load.device_rows + load.host_rows
    pages_each = -(-(PROMPT_TOKENS + most + 1) // page_size) + 1
    simulation = Simulation(
        times,
        load.policy,
        num_pages=load.device_rows * pages_each,
        num_host_pages=load.host_rows * pages_each,
        max_requests=load.device_rows,
        max_host_requests=load.host_rows,
        max_model_len=PROMPT_TOKENS + most,
        max_prefill_tokens=8192,
        page_size=page_size,
    )
    scheduler, rng = simulation.scheduler, random.Random(1)
    for verb in VERBS:
        setattr(scheduler, verb, stopwatch.wrap(verb, getattr(scheduler, verb)))

    def fill() -> None:
        while scheduler.num_unfinished < num_rows + num_rows // 10:
            simulation.submit(PROMPT_TOKENS, rng.randint(least, most))

    fill()
    while scheduler.num_waiting > num_rows // 10:
        simulation.step()
    for _ in range(times.num_layers + 2 if load.host_rows else most // 4):
        fill()
        simulation.step()
    num_tokens = scheduler.stats.num_output_tokens
    turns: list[dict[str, float]] = []
    for _ in range(NUM_TURNS):
        stopwatch.take()
        for _ in range(num_sweeps):
            fill()
            simulation.step()
        taken = stopwatch.take()
        turns.append({verb: taken[verb] / num_sweeps for verb in VERBS})
    best = min(turns, key=lambda one: sum(one.values()))
    return {
        "scheduling_sec": sum(best.values()),
        **{f"{verb}_sec": seconds for verb, seconds in best.items()},
        "tokens": (scheduler.stats.num_output_tokens - num_tokens) / num_sweeps / NUM_TURNS,
    }
