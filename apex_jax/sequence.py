"""A request on its way: its tokens, where its KV lives, how far it has come.

Owns the derived facts of one sequence; the scheduler changes it. Imports no jax.
"""

import itertools
from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import StrEnum

from apex_jax.modifiers import Modifiers
from apex_jax.request import FinishReason, Request, RequestOutput, TokenLogprobs


class Lane(StrEnum):
    """Where a sequence's KV and decode attention live."""

    DEVICE = "device"
    HOST = "host"


@dataclass(eq=False)
class Sequence:
    """A request on its way.

    index: order of arrival, which is also its priority. token_ids: the prompt and the output read
    so far. num_unread: tokens sampled by launched sweeps and not read yet. num_computed: tokens
    whose KV the planned sweeps (or the cohort's token under way) have written. lane: where its
    pages are, None while waiting. slot: row of the device's `tokens_by_slot`, None while waiting.
    is_decoding: its last token lies in that slot. is_moving: its KV is between the lanes.
    is_in_group: its prompt is on its way to the host, with others'.
    last_step: number of the sweep that planned its last step, 0 before the first.
    cohort_id: of the cohort in which its next token is under way. num_host_tokens: output tokens
    whose attention the host did. modifiers: what changes its scores, None where nothing does.
    logprobs, prompt_logprobs: of the output read so far and of the prompt's tokens from the second
    on, where the request asks for them.
    """

    index: int
    request: Request
    stop_token_ids: frozenset[int]
    arrival_sec: float
    token_ids: list[int]
    pages: list[int] = field(default_factory=list)
    lane: Lane | None = None
    slot: int | None = None
    is_decoding: bool = False
    is_moving: bool = False
    is_in_group: bool = False
    cohort_id: int | None = None
    num_computed: int = 0
    last_step: int = 0
    num_unread: int = 0
    num_preemptions: int = 0
    num_host_tokens: int = 0
    modifiers: Modifiers | None = None
    logprobs: list[TokenLogprobs] = field(default_factory=list[TokenLogprobs])
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list[TokenLogprobs])
    first_token_sec: float | None = None
    last_token_sec: float | None = None
    finish_reason: FinishReason | None = None
    max_num_tokens: int = field(init=False)  # no property: every row is asked in every sweep

    def __post_init__(self) -> None:
        self.max_num_tokens = len(self.request.prompt_token_ids) + self.request.sampling.max_tokens

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids) + self.num_unread

    @property
    def is_fully_planned(self) -> bool:
        """Whether the planned sweeps sample all its tokens, unless a stop token ends it before."""
        return self.num_tokens >= self.max_num_tokens

    @property
    def num_unfilled(self) -> int:
        """Tokens left to prefill."""
        return 0 if self.is_decoding else len(self.token_ids) - self.num_computed

    @property
    def is_under_way(self) -> bool:
        """Whether planned stages or jobs outlive the sweep that knows of its end."""
        return self.cohort_id is not None or self.is_moving or self.is_in_group

    @property
    def is_ready(self) -> bool:
        """Whether it stands between two tokens and wants another."""
        if not self.is_decoding or self.is_moving or self.cohort_id is not None:
            return False
        return self.finish_reason is None and not self.is_fully_planned

    def append(self, token: int, now_sec: float, logprobs: TokenLogprobs | None = None) -> None:
        """Take a token that was read, and see whether it is the last.

        logprobs: of the MAX_LOGPROBS best tokens, where a head computed them.
        """
        self.token_ids.append(token)
        if self.modifiers is not None:
            self.modifiers.append(token)
        num_best = self.request.sampling.logprobs
        if num_best is not None:
            assert logprobs is not None
            self.logprobs.append(logprobs.cut(num_best))
        if self.first_token_sec is None:
            self.first_token_sec = now_sec
        self.last_token_sec = now_sec
        is_last = self.request.is_last
        if token in self.stop_token_ids or (is_last is not None and is_last(token)):
            self.finish_reason = FinishReason.STOP
        elif len(self.token_ids) == self.max_num_tokens:
            self.finish_reason = FinishReason.LENGTH

    @property
    def wants_prompt(self) -> bool:
        """Whether logprobs of its prompt are wanted that were not read."""
        num_prompt = len(self.request.prompt_token_ids)
        is_asked = self.request.sampling.prompt_logprobs is not None
        return is_asked and len(self.prompt_logprobs) < num_prompt - 1

    def take_prompt(self, start: int, logprobs: Iterable[TokenLogprobs]) -> None:
        """Take those of the tokens behind `start`; some of them again after a pre-emption."""
        num_best = self.request.sampling.prompt_logprobs
        assert num_best is not None
        new = itertools.islice(logprobs, len(self.prompt_logprobs) - start, None)
        self.prompt_logprobs += (one.cut(num_best) for one in new)

    def output(self) -> RequestOutput:
        """Return the finished request."""
        assert self.finish_reason is not None
        assert self.first_token_sec is not None
        assert self.last_token_sec is not None
        asked = self.request.sampling
        return RequestOutput(
            request=self.request,
            token_ids=tuple(self.token_ids[len(self.request.prompt_token_ids) :]),
            finish_reason=self.finish_reason,
            arrival_sec=self.arrival_sec,
            first_token_sec=self.first_token_sec,
            finish_sec=self.last_token_sec,
            num_preemptions=self.num_preemptions,
            num_host_tokens=self.num_host_tokens,
            logprobs=None if asked.logprobs is None else tuple(self.logprobs),
            prompt_logprobs=None if asked.prompt_logprobs is None else tuple(self.prompt_logprobs),
        )
