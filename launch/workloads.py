"""Lengths of requests, drawn: alike, uniform, or as a published trace or its means have them.

Owns the sampling, of arrivals too; the traces' quantiles are in configs/workload_quantiles.json,
with who published them. Prompt and output are drawn independently, for in those traces they hardly
correlate. Called by the simulate scripts and make_workload. Imports no jax.
"""

import json
import math
import random
from collections.abc import Callable, Sequence
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import configs
from apex_jax.config import ConfigError

UNIFORM_SHARE = 0.1  # lengths lie so far below or above the one asked for
MAX_DRAWS = 1000  # for a request within the limit


class Lengths(NamedTuple):
    """Tokens of a request."""

    prompt_tokens: int
    output_tokens: int


class Drawn(NamedTuple):
    """Requests, and the share of those drawn that were left out because they were too long."""

    requests: list[Lengths]
    share_dropped: float


@cache
def traces() -> dict[str, Any]:
    """Return the published traces by name."""
    (folder,) = configs.__path__
    return json.loads((Path(folder) / "workload_quantiles.json").read_text())


def draw_trace(name: str, num_requests: int, max_tokens: int, rng: random.Random) -> Drawn:
    """Draw from a published trace; ConfigError where there is none of that name."""
    if name not in traces():
        raise ConfigError(
            f"no workload is called {name!r}; there are uniform, {', '.join(traces())}"
        )
    trace = traces()[name]
    prompt = _sampler(trace["prompt_tokens"], trace["mean_prompt_tokens"])
    output = _sampler(trace["output_tokens"], trace["mean_output_tokens"])
    return _draw(lambda: Lengths(prompt(rng), output(rng)), num_requests, max_tokens)


def draw_uniform(lengths: Lengths, num_requests: int, max_tokens: int, rng: random.Random) -> Drawn:
    """Draw prompt and output each within 10 % of what is asked for."""

    def near(tokens: int) -> int:
        return max(1, round(tokens * rng.uniform(1 - UNIFORM_SHARE, 1 + UNIFORM_SHARE)))

    return _draw(lambda: Lengths(*map(near, lengths)), num_requests, max_tokens)


def draw_constant(lengths: Lengths, num_requests: int, max_tokens: int) -> Drawn:
    """Return requests that are all alike."""
    return _draw(lambda: lengths, num_requests, max_tokens)


def draw_log_normal(
    means: tuple[float, float], num_requests: int, max_tokens: int, rng: random.Random
) -> Drawn:
    """Draw prompt and output from log-normal distributions of these means.

    Their standard deviation is taken to be as large as the mean, since only means are known.
    """
    sigma = math.sqrt(math.log(2))  # of the logarithm, so that deviation and mean are equal

    def near(mean: float) -> int:
        return max(1, round(rng.lognormvariate(math.log(mean) - sigma**2 / 2, sigma)))

    return _draw(lambda: Lengths(*map(near, means)), num_requests, max_tokens)


def burst_arrivals(num_requests: int, rate: float, burst_size: int) -> list[float]:
    """Return ascending times of arrivals in bursts of so many, `rate` a second on average."""
    return [number // burst_size * burst_size / rate for number in range(num_requests)]


def poisson_arrivals(num_requests: int, rate: float, rng: random.Random) -> list[float]:
    """Return ascending times of so many arrivals, `rate` a second on average."""
    now_sec, arrivals = 0.0, list[float]()
    for _ in range(num_requests):
        now_sec += rng.expovariate(rate)
        arrivals.append(now_sec)
    return arrivals


def _draw(one: Callable[[], Lengths], num_requests: int, max_tokens: int) -> Drawn:
    requests: list[Lengths] = []
    num_dropped = 0
    while len(requests) < num_requests:
        lengths = one()
        if sum(lengths) <= max_tokens:
            requests.append(lengths)
            continue
        num_dropped += 1
        if num_dropped > MAX_DRAWS * (len(requests) + 1):
            raise ConfigError(f"hardly any request of the workload has at most {max_tokens} tokens")
    return Drawn(requests, num_dropped / max(1, num_dropped + num_requests))


def _sampler(quantiles: Sequence[int], mean: float) -> Callable[[random.Random], int]:
    """Return a sampler of what has these percentiles and this mean.

    Between two percentiles values are spread evenly, but for the last two: the longest request of a
    trace lies far beyond the rest, and how steeply the tail falls off follows from the mean.
    """
    num_steps = len(quantiles) - 1
    body = sum((low + high) / 2 for low, high in pairwise(quantiles[:-1]))
    tail_mean = mean * num_steps - body
    low, high = quantiles[-2:]
    power = max(1.0, (high - low) / max(tail_mean - low, 1.0) - 1)

    def draw(rng: random.Random) -> int:
        step, part = divmod(rng.random() * num_steps, 1)
        index = int(step)
        start, end = quantiles[index], quantiles[index + 1]
        return max(
            1, round(start + (end - start) * part ** (power if index == num_steps - 1 else 1))
        )

    return draw
