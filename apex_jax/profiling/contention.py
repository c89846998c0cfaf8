"""How much device and host slow each other down when both work.

Owns two queues that run at once: on a GPU they share next to nothing; where a CPU stands in for the
device they share its cores and its memory. Called by the profiler. Imports no jax.
"""

import math
import statistics
from collections.abc import Callable
from typing import NamedTuple

from apex_jax.hardware import Handle
from apex_jax.plan import DecodeBatch
from apex_jax.profiling.chains import StageChains

NUM_REPEATS = 3
BUSY_SEC = 0.05  # how long the side that is timed should work
MARGIN = 3  # times as long the other side has work: it must not end first
MAX_PROGRAMS = 24  # XLA's CPU client blocks whoever enqueues more than 32
MAX_JOBS = 1000


class Queue(NamedTuple):
    """Work of one side. start: so many of a kind, returns the last. most: of them at once."""

    start: Callable[[int], Handle]
    most: int


def measure_contention(
    chains: StageChains, on_device: DecodeBatch, on_host: DecodeBatch
) -> tuple[float, float]:
    """Return how many times as long device stages and host jobs take while the other side works.

    on_device: rows that go through whole layers. on_host: a cohort that is attended to.
    """
    entered = chains.enter(on_host)

    def start_programs(count: int) -> Handle:
        handle = chains.embedded(on_device)
        for index in range(count):
            handle = chains.start_program(on_device, index, handle)
        return handle

    def start_jobs(count: int) -> Handle:
        return [chains.start_job(on_host, index, entered) for index in range(count)][-1]

    device, host = Queue(start_programs, MAX_PROGRAMS), Queue(start_jobs, MAX_JOBS)
    device_sec, host_sec = _alone(chains, device), _alone(chains, host)
    return (
        _slowdown(chains, device, device_sec, host, host_sec),
        _slowdown(chains, host, host_sec, device, device_sec),
    )


def _alone(chains: StageChains, queue: Queue) -> float:
    """Return the seconds of one piece of work; the first is not timed."""
    chains.wait(queue.start(1))
    begin_sec = chains.now()
    chains.wait(queue.start(4))
    return (chains.now() - begin_sec) / 4


def _slowdown(
    chains: StageChains,
    timed: Queue,
    timed_sec: float,
    other: Queue,
    other_sec: float,
) -> float:
    """Return the ratio of the times of a queue with and without the other, at least 1."""
    longest_sec = min(BUSY_SEC, other.most * other_sec / MARGIN)
    count = max(1, min(timed.most, int(longest_sec / timed_sec)))
    num_others = max(1, min(other.most, math.ceil(MARGIN * count * timed_sec / other_sec)))

    def run(num_beside: int) -> float:
        beside = other.start(num_beside) if num_beside else None
        begin_sec = chains.now()
        chains.wait(timed.start(count))
        seconds = chains.now() - begin_sec
        if beside is not None:
            chains.wait(beside)
        return seconds

    ratios = [run(num_others) / run(0) for _ in range(NUM_REPEATS)]
    return max(1.0, statistics.median(ratios))
