"""A request on its way: its tokens, where its KV lives, how far it has come.

Owns the derived facts of one sequence; the scheduler changes it. What changes with every token is
in the columns of its slot while it has one, so that many may take a step at once. Imports no jax.
"""

import itertools
from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import StrEnum

from apex_jax.modifiers import Modifiers
from apex_jax.request import FinishReason, Request, RequestOutput, TokenLogprobs
from apex_jax.slot_table import SlotTable


class Lane(StrEnum):
    """Where a sequence's KV and decode attention live."""

    DEVICE = "device"
    HOST = "host"


@dataclass(eq=False)
class Sequence:
    """A request on its way.

    index: order of arrival, which is also its priority. lane: where its pages are, None while
    waiting. is_decoding: its last token lies in its slot. is_moving: its KV is between the lanes.
    is_in_group: its prompt is on its way to the host, with others'.
    cohort_id: of the cohort in which its next token is under way. modifiers: what changes its
    scores, None where nothing does. logprobs, prompt_logprobs: of the output read so far and of the
    prompt's tokens from the second on, where the request asks for them.
    """

    index: int
    request: Request
    stop_token_ids: frozenset[int]
    arrival_sec: float
    pages: list[int] = field(default_factory=list)
    lane: Lane | None = None
    is_decoding: bool = False
    is_moving: bool = False
    is_in_group: bool = False
    cohort_id: int | None = None
    num_preemptions: int = 0
    modifiers: Modifiers | None = None
    logprobs: list[TokenLogprobs] = field(default_factory=list[TokenLogprobs])
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list[TokenLogprobs])
    first_token_sec: float | None = None
    finish_sec: float | None = None
    finish_reason: FinishReason | None = None
    max_num_tokens: int = field(init=False)
    _columns: tuple[SlotTable, int] | None = None  # and its slot
    # While it has a slot, later tokens and the counts are in its columns.
    _token_ids: list[int] = field(init=False)
    _num_unread: int = 0
    _num_host_tokens: int = 0

    def __post_init__(self) -> None:
        self.max_num_tokens = len(self.request.prompt_token_ids) + self.request.sampling.max_tokens
        self._token_ids = list(self.request.prompt_token_ids)

    def enter_slot(self, table: SlotTable, slot: int) -> None:
        """Get a slot, and let its columns count from now on."""
        assert self._columns is None
        assert self._num_unread == 0
        request = self.request
        is_watched = request.is_last is not None or request.sampling.logprobs is not None
        table.enter(
            slot,
            self.index,
            num_prompt_tokens=len(request.prompt_token_ids),
            num_tokens=len(self._token_ids),
            num_host_tokens=self._num_host_tokens,
            max_num_tokens=self.max_num_tokens,
            sampling=request.sampling,
            stop_token_ids=self.stop_token_ids,
            is_modified=self.modifiers is not None,
            is_watched=is_watched or self.modifiers is not None,
        )
        self._columns = table, slot

    def leave_slot(self) -> int:
        """Give the slot back, and return it."""
        assert self._columns is not None
        table, slot = self._columns
        self._token_ids, self._num_unread = self.token_ids, self.num_unread
        self._num_host_tokens = self.num_host_tokens
        table.disown(slot)
        self._columns = None
        return slot

    @property
    def slot(self) -> int | None:
        """Row of the device's `tokens_by_slot`; None while waiting."""
        return None if self._columns is None else self._columns[1]

    @property
    def token_ids(self) -> list[int]:
        """The prompt and the output read so far."""
        if self._columns is not None:
            table, slot = self._columns
            self._token_ids += table.read_tokens(slot, len(self._token_ids))
        return self._token_ids

    @property
    def num_tokens(self) -> int:
        """Those and the tokens sampled by planned sweeps that were not read yet."""
        if self._columns is None:
            return len(self._token_ids) + self._num_unread
        table, slot = self._columns
        return table.num_tokens_s.item(slot)

    @property
    def num_read(self) -> int:
        if self._columns is None:
            return len(self._token_ids)
        table, slot = self._columns
        return table.num_read_s.item(slot)

    @property
    def num_unread(self) -> int:
        return self.num_tokens - self.num_read

    @property
    def num_computed(self) -> int:
        """Tokens whose KV planned sweeps (or the cohort's token under way) have written."""
        if self._columns is None:
            return 0
        table, slot = self._columns
        return table.num_computed_s.item(slot)

    @num_computed.setter
    def num_computed(self, count: int) -> None:
        assert self._columns is not None
        table, slot = self._columns
        table.num_computed_s[slot] = count

    @property
    def num_host_tokens(self) -> int:
        """Output tokens whose attention the host did."""
        if self._columns is None:
            return self._num_host_tokens
        table, slot = self._columns
        return table.num_host_tokens_s.item(slot)

    @property
    def last_step(self) -> int:
        """Number of the sweep that planned its last step since it has its slot, 0 before."""
        if self._columns is None:
            return 0
        table, slot = self._columns
        return table.last_step_s.item(slot)

    @last_step.setter
    def last_step(self, num_sweeps: int) -> None:
        assert self._columns is not None
        table, slot = self._columns
        table.last_step_s[slot] = num_sweeps

    @property
    def is_fully_planned(self) -> bool:
        """Whether the planned sweeps sample all its tokens, unless a stop token ends it before."""
        return self.num_tokens >= self.max_num_tokens

    @property
    def num_unfilled(self) -> int:
        """Tokens left to prefill."""
        return 0 if self.is_decoding else self.num_read - self.num_computed

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

    def append(self, token: int, *, is_of_host: bool) -> None:
        """Take a token that was read after the slot was given back."""
        assert self._columns is None
        self._token_ids.append(token)
        self._num_unread -= 1
        self._num_host_tokens += is_of_host

    def look_at(self, token: int, now_sec: float, logprobs: TokenLogprobs | None = None) -> None:
        """See whether the token that was read last ends the output, and keep what goes with it.

        Of most tokens nobody needs to know; RowSet.watched says of whose. logprobs: of the
        MAX_LOGPROBS best tokens, where a head computed them.
        """
        if self.modifiers is not None:
            self.modifiers.append(token)
        num_best = self.request.sampling.logprobs
        if num_best is not None:
            assert logprobs is not None
            self.logprobs.append(logprobs.cut(num_best))
        if self.first_token_sec is None:
            self.first_token_sec = now_sec
        is_last = self.request.is_last
        if token in self.stop_token_ids or (is_last is not None and is_last(token)):
            self.finish(FinishReason.STOP, now_sec)
        elif self.num_read == self.max_num_tokens:
            self.finish(FinishReason.LENGTH, now_sec)

    def finish(self, reason: FinishReason, now_sec: float | None = None) -> None:
        """Expect no more tokens; those still under way are surplus."""
        self.finish_reason, self.finish_sec = reason, now_sec
        if self._columns is not None:
            table, slot = self._columns
            table.disown(slot)

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
        assert self.finish_sec is not None
        asked = self.request.sampling
        return RequestOutput(
            request=self.request,
            token_ids=tuple(self.token_ids[len(self.request.prompt_token_ids) :]),
            finish_reason=self.finish_reason,
            arrival_sec=self.arrival_sec,
            first_token_sec=self.first_token_sec,
            finish_sec=self.finish_sec,
            num_preemptions=self.num_preemptions,
            num_host_tokens=self.num_host_tokens,
            logprobs=None if asked.logprobs is None else tuple(self.logprobs),
            prompt_logprobs=None if asked.prompt_logprobs is None else tuple(self.prompt_logprobs),
        )
