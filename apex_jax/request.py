"""What a user asks for, what comes back, and the state between.

Owns the ranges of sampling parameters and the derived facts of a running sequence. Imports no jax.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import NamedTuple, cast

import numpy as np
from jaxtyping import Float32, Int32

MAX_LOGPROBS = 20  # alternatives of a token: what the OpenAI API gives a chat, and vLLM by default
# Biases or bad words of a request: they travel to the device with every token, and have room there.
MAX_LISTED = 1024
MAX_CHOICES = 128  # of a request, as the OpenAI API has it


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

    min_p: tokens less probable than this share of the best one's probability are out; 0 is off.
    min_tokens: before so many no token may end the output. presence_penalty, frequency_penalty:
    taken from the score of a token in the output, once, or each time that it stands there.
    repetition_penalty: what the score of a token in the prompt or the output is divided by where it
    is positive, and multiplied by where it is not. logit_bias: added to the scores of token ids.
    bad_words: never in the output; a word of several tokens loses its last where the others stand.
    Text has to become token ids before a request is submitted. logprobs: how many of the best
    tokens are reported beside each one of the output, with the logarithms of the probabilities that
    the model itself gave them; None reports nothing. prompt_logprobs: the same of the prompt's
    tokens, from the second on. n: how many outputs are wanted, each with a seed of its own.
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
    min_p: float = 0.0
    min_tokens: int = 0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: Mapping[int, float] = field(default_factory=dict[int, float])
    bad_words: tuple[str | tuple[int, ...], ...] = ()
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    n: int = 1

    def __post_init__(self) -> None:
        for name, value, ok, right in (*self._numbers(), *self._lists()):
            if not ok:
                raise RequestError(f"{name} is {value}; it must be {right}")

    @property
    def has_penalty(self) -> bool:
        """Whether scores depend on the tokens before."""
        penalties = (self.presence_penalty, self.frequency_penalty, self.repetition_penalty - 1)
        return any(penalties)

    def _numbers(self) -> tuple[tuple[str, object, bool, str], ...]:
        """Return name, value, whether it is in its range, and the range."""
        presence, frequency = self.presence_penalty, self.frequency_penalty
        most_minimum = f"between 0 and max_tokens, which is {self.max_tokens}"
        # Of a wider range float32 scores would not come back finite.
        repetition_range = "between 0.01 and 100 (1 is off)"
        num_best = {"logprobs": self.logprobs, "prompt_logprobs": self.prompt_logprobs}
        return (
            ("n", self.n, 1 <= self.n <= MAX_CHOICES, f"between 1 and {MAX_CHOICES}"),
            ("max_tokens", self.max_tokens, self.max_tokens >= 1, "at least 1"),
            ("temperature", self.temperature, 0 <= self.temperature <= 100, "between 0 and 100"),
            ("top_k", self.top_k, self.top_k >= 0, "at least 0 (0 is off)"),
            ("top_p", self.top_p, 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("seed", self.seed, -(2**63) <= self.seed < 2**64, "a 64-bit integer"),
            (
                "stop",
                repr(self.stop),
                _are_texts(self.stop),
                "a tuple of strings that are not empty",
            ),
            ("min_p", self.min_p, 0 <= self.min_p <= 1, "between 0 and 1"),
            ("min_tokens", self.min_tokens, 0 <= self.min_tokens <= self.max_tokens, most_minimum),
            ("presence_penalty", presence, -2 <= presence <= 2, "between -2 and 2"),
            ("frequency_penalty", frequency, -2 <= frequency <= 2, "between -2 and 2"),
            (
                "repetition_penalty",
                self.repetition_penalty,
                0.01 <= self.repetition_penalty <= 100,
                repetition_range,
            ),
            *(
                (name, count, 0 <= (count or 0) <= MAX_LOGPROBS, f"between 0 and {MAX_LOGPROBS}")
                for name, count in num_best.items()
            ),
        )

    def _lists(self) -> Iterator[tuple[str, object, bool, str]]:
        """Yield the same of what is in lists, and of their lengths."""
        for token_id, bias in self.logit_bias.items():
            yield "logit_bias", f"for {token_id}", token_id >= 0, "for token ids"
            yield f"logit_bias[{token_id}]", bias, -100 <= bias <= 100, "between -100 and 100"
        for index, word in enumerate(self.bad_words):
            is_word = bool(word) and (isinstance(word, str) or min(word) >= 0)
            yield f"bad_words[{index}]", repr(word), is_word, "text or token ids"
        for name, items in (("logit_bias", self.logit_bias), ("bad_words", self.bad_words)):
            is_short = len(items) <= MAX_LISTED
            yield name, f"a list of {len(items)}", is_short, f"one of at most {MAX_LISTED}"


class TokenLogprobs(NamedTuple):
    """What the model itself thought of a token, and of its alternatives.

    Logarithms of probabilities before temperature, penalties and cuts. logprob: of the token that
    stands there. top_ids_i, top_logprobs_i: of the best tokens, best first.
    """

    logprob: float
    top_ids_i: Int32[np.ndarray, "i"]
    top_logprobs_i: Float32[np.ndarray, "i"]

    def cut(self, num_best: int) -> "TokenLogprobs":
        """Return a copy with so many alternatives."""
        best = self.top_ids_i[:num_best].copy(), self.top_logprobs_i[:num_best].copy()
        return TokenLogprobs(self.logprob, *best)


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
    num_host_tokens: how many of them were decoded in the host lane. logprobs: of each token, where
    the request asks for them; prompt_logprobs: likewise, of each token of the prompt but the first.
    """

    request: Request
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    arrival_sec: float
    first_token_sec: float
    finish_sec: float
    num_preemptions: int
    num_host_tokens: int
    logprobs: tuple[TokenLogprobs, ...] | None = None
    prompt_logprobs: tuple[TokenLogprobs, ...] | None = None

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
