"""The workloads that have a name: whose lengths they are, and what is assumed of them.

Owns the table of sets, the drawing of token ids for lengths, and the drawing of arrivals. Called by
make_workload. Imports no jax.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from apex_jax.config import ConfigError
from launch.workloads import (
    Drawn,
    Lengths,
    burst_arrivals,
    draw_constant,
    draw_log_normal,
    draw_trace,
    draw_uniform,
    poisson_arrivals,
    traces,
)

NEO = "lengths of NEO's synthetic workloads, arXiv 2411.01142"
WITHIN = "each uniform within 10 %"
ASSUMED = "log-normal with a standard deviation as large as the mean, which is assumed"


class Means(NamedTuple):
    """Published mean tokens of prompts and outputs, and by whom."""

    prompt_tokens: float
    output_tokens: float
    source: str


TWINS = {
    "sharegpt": Means(161, 338, "ShareGPT as in the vLLM paper, arXiv 2309.06180"),
    "lmsys": Means(69.5, 214.5, "LMSYS-Chat-1M, arXiv 2309.11998"),
}
NEO_OUTPUTS = (50, 100, 200, 300, 400)
SHORT_LONG = ((128, 1024), (256, 2048), (512, 4096))
GIVEN = ("constant", "uniform")  # lengths that the command names
NAMES = (
    *(f"neo_{output}" for output in NEO_OUTPUTS),
    *("azure_conv", "azure_code", "osc", *TWINS),
    *(f"short_long_{prompt}_{output}" for prompt, output in SHORT_LONG),
    *GIVEN,
)


@dataclass(frozen=True)
class DrawnSet:
    """Lengths, and in words what they are and where they are from."""

    drawn: Drawn
    description: str
    source: str


def draw_set(
    name: str, given: Lengths | None, num_requests: int, max_tokens: int, rng: random.Random
) -> DrawnSet:
    """Draw lengths of a set; ConfigError where it has none within the limit.

    given: for those of GIVEN. max_tokens: of prompt and output together.
    """
    if name in traces():
        trace = traces()[name]
        words = "prompt and output drawn independently from a trace's percentiles"
        return DrawnSet(draw_trace(name, num_requests, max_tokens, rng), words, trace["source"])
    if name in TWINS:
        means = TWINS[name]
        drawn = draw_log_normal(means[:2], num_requests, max_tokens, rng)
        words = f"means {means.prompt_tokens:g} in, {means.output_tokens:g} out; {ASSUMED}"
        return DrawnSet(drawn, words, f"published means of {means.source}")
    kind, lengths, source = _lengths_of(name, given)
    if kind == "constant":
        drawn, words = draw_constant(lengths, num_requests, max_tokens), "each"
    else:
        drawn, words = draw_uniform(lengths, num_requests, max_tokens, rng), WITHIN
    return DrawnSet(
        drawn, f"{lengths.prompt_tokens} in, {lengths.output_tokens} out, {words}", source
    )


def _lengths_of(name: str, given: Lengths | None) -> tuple[str, Lengths, str]:
    """Return whether lengths are constant or uniform, what they are, and whose."""
    kind, *numbers = name.rsplit("_")
    match kind:
        case "neo":
            return "uniform", Lengths(1000, int(numbers[-1])), NEO
        case "short":
            lengths = Lengths(*map(int, numbers[-2:]))
            return "constant", lengths, "short prompts and long outputs"
        case _:
            assert name in GIVEN, name
            if given is None:
                raise ConfigError(
                    f"--set={name} needs --prompt_tokens and --output_tokens of a request"
                )
            return name, given, "lengths given with the command"


def draw_token_ids(
    lengths: Sequence[int], vocabulary: Sequence[int], rng: random.Random
) -> list[tuple[int, ...]]:
    """Draw a prompt of each length, every token alike probable, and no two prompts alike."""
    return [tuple(rng.choices(vocabulary, k=length)) for length in lengths]


def middle_of(vocab_size: int) -> range:
    """Return token ids of a vocabulary that no tokenizer keeps for special tokens or bytes.

    Those lie at either end: Llama 2 has 259 at the beginning, Llama 3 has 256 at the end.
    """
    return range(vocab_size // 10, vocab_size - vocab_size // 10)


class Arrivals(NamedTuple):
    """Ascending seconds from the start of a run, and what they are in words."""

    times_sec: list[float]
    description: str


def draw_arrivals(
    kind: str, num_requests: int, rate: float | None, burst_size: int, rng: random.Random
) -> Arrivals:
    """Return arrivals of a kind: at_once, poisson or burst; ConfigError where a rate lacks."""
    if kind == "at_once":
        return Arrivals([0.0] * num_requests, "all at once")
    if rate is None:
        raise ConfigError(f"--arrivals={kind} needs --request_rate, requests a second on average")
    if kind == "poisson":
        return Arrivals(poisson_arrivals(num_requests, rate, rng), f"Poisson, {rate:g} a second")
    times_sec = burst_arrivals(num_requests, rate, burst_size)
    return Arrivals(times_sec, f"bursts of {burst_size}, {rate:g} requests a second on average")
