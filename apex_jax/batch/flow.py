"""Requests on their way through an engine: text in front, text behind, a queue that stays short.

Owns which requests are in flight, each with a tag of its sender, and how one that wants several
outputs becomes one of the engine's for each. Called by the batch job's loop and by LLM, which
differ in where requests come from and where results go.
"""

import dataclasses
from dataclasses import dataclass
from functools import partial
from typing import Generic, TypeVar

from apex_jax.batch.bad_words import resolve_bad_words
from apex_jax.batch.lines import derive_seed
from apex_jax.batch.protocol import BatchEngine
from apex_jax.request import FinishReason, Request, RequestOutput, SamplingParams
from apex_jax.text.detokenizer import decode_output
from apex_jax.text.model_text import ModelText, Prompt
from apex_jax.text.output_text import OutputText

Tag = TypeVar("Tag")


@dataclass(frozen=True)
class Choice:
    """One output of a request. text: None without a tokenizer.

    stop_reason: the stop string or the token of stop_token_ids that ended it, if one did.
    """

    output: RequestOutput
    text: str | None
    stop_reason: str | int | None


@dataclass(frozen=True)
class Finished(Generic[Tag]):
    """A request's result: as many choices as it asked for."""

    tag: Tag
    choices: tuple[Choice, ...]


@dataclass(frozen=True)
class _Group(Generic[Tag]):
    """A request on its way. choices: those that are finished, by their index."""

    tag: Tag
    num_choices: int
    choices: dict[int, Choice]


@dataclass(frozen=True)
class _InFlight(Generic[Tag]):
    """One choice on its way."""

    group: _Group[Tag]
    index: int
    watched: OutputText | None


class RequestFlow(Generic[Tag]):
    """One engine and what its sender has under way in it."""

    def __init__(self, engine: BatchEngine, text: ModelText, max_running: int) -> None:
        """max_running: requests that the engine runs at once."""
        self._engine, self._text = engine, text
        # Twice what can run: a sweep may finish all of them at once, and the next must find work.
        self._max_waiting = 2 * max_running
        self._in_flight: dict[str, _InFlight[Tag]] = {}

    @property
    def has_room(self) -> bool:
        """Whether the engine's queue should get another request before the next sweep."""
        return self._engine.num_waiting < self._max_waiting

    @property
    def num_in_flight(self) -> int:
        """Outputs that are under way."""
        return len(self._in_flight)

    def submit(self, request_id: str, prompt: Prompt, sampling: SamplingParams, tag: Tag) -> None:
        """Send a request on its way. Raises RequestError where it can never run.

        Its first choice is what it would get alone; only that one tells of the prompt's logprobs.
        """
        token_ids = self._text.encode(prompt)
        tokenizer = self._text.tokenizer
        encode = None if tokenizer is None else partial(tokenizer.encode, add_special_tokens=False)
        sampling = resolve_bad_words(sampling, encode)
        group = _Group(tag, sampling.n, {})
        for index in range(sampling.n):
            watched = self._text.watch(token_ids, sampling)
            is_last = None if watched is None else watched.push
            name = self._free_name(f"{request_id}#{index}" if index else request_id)
            # If the engine refuses any of them it is the first: they differ in their seeds only.
            params = _sampling_of(sampling, index)
            self._engine.submit(Request(name, token_ids, params, is_last))
            self._in_flight[name] = _InFlight(group, index, watched)

    def step(self) -> list[Finished[Tag]]:
        """Run one sweep; return what is finished."""
        finished: list[Finished[Tag]] = []
        for output in self._engine.step():
            flight = self._in_flight.pop(output.request.request_id)
            group = flight.group
            group.choices[flight.index] = self._to_choice(output, flight.watched)
            if len(group.choices) == group.num_choices:
                choices = tuple(group.choices[index] for index in range(group.num_choices))
                finished.append(Finished(group.tag, choices))
        return finished

    def cancel_all(self) -> None:
        """Drop what is under way, without results."""
        for request_id in self._in_flight:
            self._engine.cancel(request_id)
        self._in_flight.clear()

    def _free_name(self, name: str) -> str:
        """Return a name that nobody in flight has: any text may be a request's."""
        while name in self._in_flight:
            name += "#"
        return name

    def _to_choice(self, output: RequestOutput, watched: OutputText | None) -> Choice:
        sampling = output.request.sampling
        stop_reason: str | int | None = None
        if watched is not None:
            stop_reason = watched.stop_string
        is_by_token = output.finish_reason is FinishReason.STOP and stop_reason is None
        if is_by_token and output.token_ids[-1] in sampling.stop_token_ids:
            stop_reason = output.token_ids[-1]
        if watched is not None:
            text = watched.end()
        elif self._text.tokenizer is None:
            text = None
        else:
            # The token that stopped the output is among token_ids, but is no part of the text.
            shown = output.token_ids[: -1 if is_by_token else None]
            text = decode_output(self._text.tokenizer, output.request.prompt_token_ids, shown)
        # Without its watcher a result can be pickled.
        request = dataclasses.replace(output.request, is_last=None)
        return Choice(dataclasses.replace(output, request=request), text, stop_reason)


def _sampling_of(sampling: SamplingParams, index: int) -> SamplingParams:
    """Return the parameters of one choice of a request."""
    if index == 0:
        return dataclasses.replace(sampling, n=1)
    seed = derive_seed(sampling.seed, f"choice {index}")
    return dataclasses.replace(sampling, n=1, seed=seed, prompt_logprobs=None)
