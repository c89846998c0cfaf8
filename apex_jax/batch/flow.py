"""Requests on their way through an engine: text in front, text behind, a queue that stays short.

Owns which requests are in flight, each with a tag of its sender. Called by the batch job's loop and
by LLM, which differ in where requests come from and where results go.
"""

import dataclasses
from dataclasses import dataclass
from functools import partial
from typing import Generic, TypeVar

from apex_jax.batch.bad_words import resolve_bad_words
from apex_jax.batch.protocol import BatchEngine
from apex_jax.request import FinishReason, Request, RequestOutput, SamplingParams
from apex_jax.text.detokenizer import decode_output
from apex_jax.text.model_text import ModelText, Prompt
from apex_jax.text.output_text import OutputText

Tag = TypeVar("Tag")


@dataclass(frozen=True)
class Finished(Generic[Tag]):
    """A request's result. text: None without a tokenizer.

    stop_reason: the stop string or the token of stop_token_ids that ended it, if one did.
    """

    tag: Tag
    output: RequestOutput
    text: str | None
    stop_reason: str | int | None


@dataclass(frozen=True)
class _InFlight(Generic[Tag]):
    tag: Tag
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
        return len(self._in_flight)

    def submit(self, request_id: str, prompt: Prompt, sampling: SamplingParams, tag: Tag) -> None:
        """Send a request on its way. Raises RequestError where it can never run."""
        token_ids = self._text.encode(prompt)
        tokenizer = self._text.tokenizer
        encode = None if tokenizer is None else partial(tokenizer.encode, add_special_tokens=False)
        sampling = resolve_bad_words(sampling, encode)
        watched = self._text.watch(token_ids, sampling)
        is_last = None if watched is None else watched.push
        self._engine.submit(Request(request_id, token_ids, sampling, is_last))
        self._in_flight[request_id] = _InFlight(tag, watched)

    def step(self) -> list[Finished[Tag]]:
        """Run one sweep; return what is finished."""
        return [self._finish(output) for output in self._engine.step()]

    def cancel_all(self) -> None:
        """Drop what is under way, without results."""
        for request_id in self._in_flight:
            self._engine.cancel(request_id)
        self._in_flight.clear()

    def _finish(self, output: RequestOutput) -> Finished[Tag]:
        flight = self._in_flight.pop(output.request.request_id)
        sampling, watched = output.request.sampling, flight.watched
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
        return Finished(flight.tag, dataclasses.replace(output, request=request), text, stop_reason)
