"""The engine as a Python object: prompts or conversations in, texts out, as in a batch job.

Owns one engine and its model's text side, from loading to the freeing of their memory. A fault of
the engine closes it. For one thread. Nobody in this package calls it: users do.
"""

import contextlib
import dataclasses
import itertools
import logging
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral
from pathlib import Path
from types import TracebackType
from typing import Any, SupportsIndex

import jax

from apex_jax.batch.chat_fields import read_chat
from apex_jax.batch.fields import read_text, read_token_ids
from apex_jax.batch.flow import Finished, RequestFlow
from apex_jax.batch.lines import check_defaults, derive_seed
from apex_jax.batch.protocol import BatchEngine
from apex_jax.config import Config, ConfigError
from apex_jax.engine import Engine
from apex_jax.request import (
    FinishReason,
    RequestError,
    RequestOutput,
    SamplingParams,
    TokenLogprobs,
)
from apex_jax.settings import with_settings
from apex_jax.text.model_text import Prompt, load_text

Message = Mapping[str, Any]
# Text, token ids, or the messages of a conversation.
PromptLike = str | Iterable[SupportsIndex] | Iterable[Message]

_logger = logging.getLogger("apex_jax")


@dataclass(frozen=True)
class GenerationRequest:
    """A prompt with sampling parameters of its own, used as they are."""

    prompt: PromptLike
    sampling: SamplingParams


@dataclass(frozen=True)
class Completion:
    """One continuation of a prompt.

    text: None without a tokenizer. stop_reason: the stop string or the token of stop_token_ids that
    ended it, if one did. logprobs: of each token, where the request asks for them.
    """

    text: str | None
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    stop_reason: str | int | None
    logprobs: tuple[TokenLogprobs, ...] | None = None


@dataclass(frozen=True)
class Generation:
    """What came of one prompt.

    index: its place among those given, from 0. outputs: as many as SamplingParams.n says; none
    where there is an error, which says why it cannot run. details: token ids of the prompt, times
    and lanes of the first output; None with an error.
    """

    index: int
    outputs: tuple[Completion, ...] = ()
    error: str | None = None
    details: RequestOutput | None = None


class LLM:
    """A loaded model. As a context manager it frees device and host memory at the end."""

    def __init__(
        self,
        model: str | Path | None = None,
        *,
        config: Config | None = None,
        on_progress: Callable[[str], None] = _logger.info,
        **settings: Any,
    ) -> None:
        """Load a model's folder and compile its programs.

        model: the folder, like settings["model"]["path"]. config: settings to start from.
        on_progress: gets the plan, and how far loading is. settings: sections of Config, such as
        scheduler={"strategy": "staggered"}. Raises ConfigError for what cannot be honoured.
        """
        self._engine: BatchEngine | None = None
        self._flow: RequestFlow[int] | None = None
        self._request_ids = map(str, itertools.count())
        config = with_settings(config or Config(), settings)
        if model is not None:
            config.model.path = str(model)
        check_defaults(config.sampling)
        self._default_sampling = SamplingParams(**dataclasses.asdict(config.sampling))
        path = config.model.path
        folder = None if path is None else Path(path).expanduser()
        if folder is not None and not folder.is_dir():
            raise ConfigError(f"model is {path!r}; there is no such folder")
        text = load_text(folder)
        if config.scheduler.has_host_lane:
            # One may have to stand in for a GPU. Too late once JAX runs; the engine says so then.
            with contextlib.suppress(RuntimeError):
                jax.config.update("jax_num_cpu_devices", 2)
        self._engine = engine = Engine.create(config, on_progress)
        try:
            if text.tokenizer is not None:
                text.tokenizer.check_vocabulary(engine.model.architecture.vocab_size)
        except ConfigError:
            self.close()
            raise
        self._flow = RequestFlow(engine, text, config.scheduler.max_running)

    def __enter__(self) -> "LLM":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def generate(
        self,
        prompts: str | Iterable[PromptLike],
        sampling: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        on_result: Callable[[Generation], None] | None = None,
    ) -> list[Generation]:
        """Continue one prompt or several; the results are in their order.

        sampling: for all of them, or of each; None is the settings' defaults. Of one for all, each
        prompt but the first has a seed of its own, derived from that and its place. on_result: gets
        each result as it finishes. Raises RequestError for a prompt that cannot run, and drops the
        others; `stream` goes on with them.
        """
        asked = [prompts] if isinstance(prompts, str) else list(prompts)
        if isinstance(sampling, Sequence):
            if len(sampling) != len(asked):
                raise RequestError(f"{len(asked)} prompts have {len(sampling)} sampling parameters")
            asked = [GenerationRequest(*pair) for pair in zip(asked, sampling, strict=True)]
            sampling = None
        results: list[Generation | None] = [None] * len(asked)
        with contextlib.closing(self.stream(asked, sampling)) as stream:
            for result in stream:
                if result.error is not None:
                    raise RequestError(f"prompt {result.index}: {result.error}")
                results[result.index] = result
                if on_result is not None:
                    on_result(result)
        return [result for result in results if result is not None]

    def chat(
        self,
        messages: Sequence[Any],
        sampling: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        on_result: Callable[[Generation], None] | None = None,
    ) -> list[Generation]:
        """Answer one conversation or several, each a list of messages with role and content.

        Through the model's chat template; otherwise as `generate`.
        """
        is_one = bool(messages) and isinstance(messages[0], Mapping)
        conversations: Sequence[Any] = [messages] if is_one else messages
        for index, conversation in enumerate(conversations):
            if not all(isinstance(one, Mapping) for one in conversation):
                raise RequestError(f"conversation {index} is no list of messages")
        return self.generate(conversations, sampling, on_result=on_result)

    def stream(
        self,
        requests: Iterable[PromptLike | GenerationRequest],
        sampling: SamplingParams | None = None,
    ) -> Generator[Generation]:
        """Yield results as they finish, reading `requests` only as far as they are needed.

        A request that cannot run yields its error, and the others go on. One stream at a time; one
        that is left before its end drops what it has under way. sampling: as for `generate`.
        """
        flow = self._need_open()
        if flow.num_in_flight:
            raise RuntimeError("another stream of this LLM is open: exhaust it or close it first")
        arriving = enumerate(requests)
        try:
            while True:
                yield from self._feed(flow, arriving, sampling or self._default_sampling)
                if not flow.num_in_flight:
                    return
                yield from map(_to_generation, self._step(flow))
        finally:
            if self._flow is not None:
                flow.cancel_all()

    def metrics(self) -> dict[str, Any]:
        """Return figures of the engine so far, as JSON values."""
        self._need_open()
        assert self._engine is not None
        return self._engine.metrics()

    def close(self) -> None:
        """Free the memory of device and host; another LLM may then be made in this process."""
        engine, self._engine, self._flow = self._engine, None, None
        if engine is not None:
            engine.close()

    def _need_open(self) -> RequestFlow[int]:
        if self._flow is None:
            raise RuntimeError("this LLM is closed, by its user or by a fault: make another")
        return self._flow

    def _feed(
        self,
        flow: RequestFlow[int],
        arriving: Iterator[tuple[int, PromptLike | GenerationRequest]],
        shared: SamplingParams,
    ) -> Iterator[Generation]:
        """Submit requests until the queue is long enough; yield those that are refused."""
        while flow.has_room and (item := next(arriving, None)) is not None:
            index, request = item
            if isinstance(request, GenerationRequest):
                prompt, sampling = request.prompt, request.sampling
            else:
                seed = derive_seed(shared.seed, str(index)) if index else shared.seed
                prompt, sampling = request, dataclasses.replace(shared, seed=seed)
            try:
                flow.submit(next(self._request_ids), _read_prompt(prompt), sampling, index)
            except RequestError as error:
                yield Generation(index, error=str(error))

    def _step(self, flow: RequestFlow[int]) -> list[Finished[int]]:
        try:
            return flow.step()
        except BaseException:
            self.close()
            raise


def _read_prompt(prompt: object) -> Prompt:
    """Return a prompt as a batch line would have it. Raises RequestError."""
    if isinstance(prompt, str):
        return read_text("prompt", prompt)
    if not isinstance(prompt, Iterable):
        raise RequestError(f"prompt is {prompt!r}; it must be text, token ids or messages")
    items: list[Any] = list(prompt)
    if not items:
        raise RequestError("prompt is empty")
    if isinstance(items[0], Mapping):
        return read_chat({"messages": [dict(one) for one in items]})
    # Integers of other libraries, such as numpy's, are welcome; true and false are not.
    is_foreign = [isinstance(one, Integral) and not isinstance(one, bool) for one in items]
    return read_token_ids(
        "prompt", [int(one) if ok else one for one, ok in zip(items, is_foreign, strict=True)]
    )


def _to_generation(finished: Finished[int]) -> Generation:
    completions = tuple(
        Completion(
            choice.text,
            choice.output.token_ids,
            choice.output.finish_reason,
            choice.stop_reason,
            choice.output.logprobs,
        )
        for choice in finished.choices
    )
    return Generation(finished.tag, completions, details=finished.choices[0].output)
