"""What a user asks for, what comes back, and the state between.

Owns the ranges of sampling parameters and the derived facts of a running sequence. Imports no jax.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import cast


class RequestError(ValueError):
    """A request that cannot be served; the message says why. Other requests are not affected."""


class FinishReason(StrEnum):
    STOP = "stop"
    LENGTH = "length"
    CANCELLED = "cancelled"


@dataclass(frozen=True)
class SamplingParams:
    """How the tokens of one request are chosen.

    temperature: 0 is greedy. top_k: 0 is off. seed: any 64-bit integer; with the sample index and
    the position it alone determines the randomness. stop_token_ids end the output (and stay in
    it), like the model's own EOS tokens unless ignore_eos. stop: strings that end the output, whose
    text ends before them, or behind them with include_stop_str_in_output.
    """

    max_tokens: int = 16
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    stop: tuple[str, ...] = ()
    include_stop_str_in_output: bool = False

    def __post_init__(self) -> None:
        for name, value, ok, right in (
            ("max_tokens", self.max_tokens, self.max_tokens >= 1, "at least 1"),
            ("temperature", self.temperature, 0 <= self.temperature <= 100, "between 0 and 100"),
            ("top_k", self.top_k, self.top_k >= 0, "at least 0 (0 is off)"),
            ("top_p", self.top_p, 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("seed", self.seed, -(2**63) <= self.seed < 2**64, "a 64-bit integer"),
            ("stop", self.stop, _are_texts(self.stop), "a tuple of strings that are not empty"),
        ):
            if not ok:
                raise RequestError(f"{name} is {value}; it must be {right}")


def _are_texts(value: object) -> bool:
    """Whether a value is a list of texts; one text alone would be taken for its characters."""
    if not isinstance(value, tuple | list):
        return False
    items = cast(Sequence[object], value)
    return all(isinstance(one, str) and one for one in items)


@dataclass(frozen=True)
class Request:
    """One prompt and how to continue it.

    is_last: asked with each output token, once and in order, unless that is a stop token; True
    ends the output with it. It watches for sampling.stop: the engine knows no text.
    """

    request_id: str
    prompt_token_ids: tuple[int, ...]
    sampling: SamplingParams
    is_last: Callable[[int], bool] | None = field(default=None, compare=False)


@dataclass(frozen=True)
class RequestOutput:
    """A finished request.

    Times are seconds on the engine's clock; `token_ids` includes a stop token where one ended it.
    num_host_tokens: how many of them were decoded in the host lane.
    """

    request: Request
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    arrival_sec: float
    first_token_sec: float
    finish_sec: float
    num_preemptions: int
    num_host_tokens: int

    @property
    def ttft_sec(self) -> float:
        """Time to first token, from submission."""
        return self.first_token_sec - self.arrival_sec

    @property
    def tpot_sec(self) -> float | None:
        """Mean time per output token after the first; None for a single token."""
        if len(self.token_ids) < 2:
            return None
        return (self.finish_sec - self.first_token_sec) / (len(self.token_ids) - 1)
