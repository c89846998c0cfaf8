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
PAGE_SIZE = 16


class Load(NamedTuple):
    """Requests, for how many of them the device has memory, and the tokens of each.

    output_tokens: least and most.
    """

    requests: int
    device_rows: int
    policy: Policy
    prompt_tokens: int
    output_tokens: tuple[int, int]


def loads(num_requests: int) -> dict[str, Load]:
    """Return the loads by name; `steady`: nobody comes or ends."""
    two_cohorts = Merging(max_cohorts=2, is_spread=True)
    return {
        "steady": Load(num_requests, num_requests, DeviceOnly(), 64, (2000, 2000)),
        "coming_and_going": Load(num_requests, num_requests, DeviceOnly(), 64, (100, 400)),
        "most_on_host": Load(num_requests, num_requests // 5, two_cohorts, 1024, (256, 256)),
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
    max_tokens, num_rows = load.prompt_tokens + most, load.requests
    pages_each = -(-max_tokens // PAGE_SIZE) + 1
    simulation = Simulation(
        times,
        load.policy,
        num_pages=load.device_rows * pages_each,
        num_host_pages=num_rows * pages_each,
        max_requests=num_rows,
        max_host_requests=num_rows - load.device_rows,
        max_model_len=max_tokens,
        max_prefill_tokens=8192,
        page_size=PAGE_SIZE,
    )
    scheduler, rng = simulation.scheduler, random.Random(1)
    for verb in VERBS:
        setattr(scheduler, verb, stopwatch.wrap(verb, getattr(scheduler, verb)))

    def fill() -> None:
        while scheduler.num_unfinished < num_rows + num_rows // 10:
            simulation.submit(load.prompt_tokens, rng.randint(least, most))

    while scheduler.num_waiting > num_rows // 10 or not scheduler.num_unfinished:
        fill()
        simulation.step()
    for _ in range(most // 4):
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
