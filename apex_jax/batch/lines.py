"""Input lines: read lazily, parsed into requests or into errors that say what is wrong.

Owns the two input formats (OpenAI batch lines for completions and chats, and plain ones), the
defaults' way into a request, and the request's hash. Nothing in a line raises out of `parse_line`.
"""

import hashlib
import io
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, NoReturn

from apex_jax.batch.chat_fields import (
    CHAT_FIELDS,
    CHAT_NEUTRAL_VALUES,
    read_chat,
    read_max_tokens,
    read_num_logprobs,
)
from apex_jax.batch.fields import (
    BODY_FIELDS,
    is_object,
    read_bad_words,
    read_bool,
    read_int,
    read_logit_bias,
    read_number,
    read_prompt,
    read_stop,
    read_text,
    read_token_ids,
    refuse_unknown,
    refuse_unserved,
    show,
)
from apex_jax.config import ConfigError, SamplingDefaults
from apex_jax.request import RequestError, SamplingParams
from apex_jax.text.chat import Chat
from apex_jax.text.model_text import Prompt

# A prompt of a million token ids takes about 7 MB. Longer lines are not held in memory at all.
MAX_LINE_BYTES = 16 * 2**20

_NUMBERS = (
    "temperature",
    "top_p",
    "min_p",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
)

COMPLETIONS_URL, CHAT_URL = "/v1/completions", "/v1/chat/completions"


@dataclass(frozen=True)
class RawLine:
    """One line of the input, without its end.

    number: from 1. data: None where the line is longer than the limit. num_bytes: with its end.
    sha256: of all its bytes without the end, in hex.
    """

    number: int
    data: bytes | None
    num_bytes: int
    sha256: str


@dataclass(frozen=True)
class BatchRequest:
    """A line that asks for something: everything resolved but the tokens of text.

    sha256 covers the prompt and every sampling parameter, given or default, in hex. model: the one
    that the line names, which is not looked for: the job has one model.
    """

    custom_id: str
    line: int
    prompt: Prompt
    sampling: SamplingParams
    sha256: str
    model: str | None = None


@dataclass(frozen=True)
class BadLine:
    """A line that cannot run. custom_id: if it could be read. sha256: of the raw line, in hex."""

    custom_id: str | None
    line: int
    code: str
    message: str
    sha256: str


def read_lines(file: io.BufferedIOBase, max_bytes: int = MAX_LINE_BYTES) -> Iterator[RawLine]:
    """Yield the lines that are not blank, holding at most `max_bytes` of one at a time."""
    number = 0
    while piece := file.readline(max_bytes + 1):
        number += 1
        digest = hashlib.sha256(piece.rstrip(b"\r\n"))
        num_bytes = len(piece)
        data: bytes | None = piece.rstrip(b"\r\n")
        if not piece.endswith(b"\n") and len(piece) > max_bytes:
            data, digest = None, hashlib.sha256(piece)
            while not piece.endswith(b"\n") and (piece := file.readline(max_bytes)):
                num_bytes += len(piece)
                digest.update(piece.rstrip(b"\n"))
        if data is None or data.strip():
            yield RawLine(number, data, num_bytes, digest.hexdigest())


def parse_line(raw: RawLine, defaults: SamplingDefaults) -> BatchRequest | BadLine:
    """Return the request of a line, or what is wrong with it. Never raises for what is in it."""
    custom_id: str | None = None
    code = "invalid_json"
    try:
        item = _load_object(raw)
        code = "invalid_request"
        custom_id = _read_custom_id(item)
        return _parse_request(custom_id, raw.number, *_find_body(item), defaults)
    except RequestError as error:
        if raw.data is None:
            code = "line_too_long"
        return BadLine(custom_id, raw.number, code, str(error), raw.sha256)


def check_defaults(defaults: SamplingDefaults) -> None:
    """Raise ConfigError for a default that every request relying on it would fail with."""
    try:
        SamplingParams(**asdict(defaults))
    except RequestError as error:
        raise ConfigError(f"--config.sampling.{error}") from None


def hash_request(prompt: Prompt, sampling: SamplingParams) -> str:
    """Return the hex sha256 of a resolved request; the custom_id acts through its seed only."""
    what = prompt.to_json() if isinstance(prompt, Chat) else prompt
    return hashlib.sha256(
        canonical_json({"prompt": what, "sampling": asdict(sampling)})
    ).hexdigest()


def canonical_json(value: object) -> bytes:
    """Return the one JSON encoding of `value`: sorted keys, no spaces, ASCII."""
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode("ascii")


def derive_seed(job_seed: int, custom_id: str) -> int:
    """Return the seed of a request that gives none: 63 bits, the same in every run of a job."""
    digest = hashlib.sha256(f"{job_seed}:{custom_id}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def _load_object(raw: RawLine) -> Mapping[str, Any]:
    """Decode one line into an object whose keys are unique."""
    if raw.data is None:
        raise RequestError(
            f"the line is {raw.num_bytes} bytes long; at most {MAX_LINE_BYTES} are read"
        )
    try:
        text = raw.data.decode("utf-8-sig" if raw.number == 1 else "utf-8")
    except UnicodeDecodeError as error:
        raise RequestError(f"not UTF-8: {error.reason} at byte {error.start}") from None
    try:
        item = json.loads(
            text, parse_constant=_refuse_constant, object_pairs_hook=_refuse_duplicate_keys
        )
    except json.JSONDecodeError as error:
        raise RequestError(f"not JSON: {error.msg} at character {error.pos}") from None
    except RequestError:
        raise
    except ValueError as error:  # an integer of thousands of digits
        raise RequestError(f"not JSON that can be read: {error}") from None
    except RecursionError:
        raise RequestError("not JSON that can be read: nested too deeply") from None
    if not is_object(item):
        raise RequestError(f"the line is {show(item)}; it must be an object")
    return item


def _refuse_constant(name: str) -> NoReturn:
    raise RequestError(f"not JSON: {name} is no JSON number")


def _refuse_duplicate_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    item = dict(pairs)
    if len(item) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise RequestError(f"the field {show(twice)} stands twice in one object")
    return item


def _read_custom_id(item: Mapping[str, Any]) -> str:
    if item.get("custom_id") is None:
        raise RequestError("custom_id is missing: it is what finds the result, and what resumes")
    return read_text("custom_id", item["custom_id"])


def _find_body(item: Mapping[str, Any]) -> tuple[Mapping[str, Any], bool]:
    """Return the fields that describe the request, from either of the two formats.

    The second is whether they are those of a chat.
    """
    if not {"body", "url", "method"} & item.keys():
        is_chat = "messages" in item
        known = CHAT_FIELDS if is_chat else BODY_FIELDS
        refuse_unknown(item, ("custom_id", *known), "the line")
        return item, is_chat
    refuse_unknown(item, ("custom_id", "method", "url", "body"), "the line")
    method, url, body = item.get("method"), item.get("url"), item.get("body")
    if method not in (None, "POST"):
        raise RequestError(f"method is {show(method)}; it must be POST")
    if url not in (None, COMPLETIONS_URL, CHAT_URL):
        raise RequestError(
            f"url is {show(url)}; this version serves {COMPLETIONS_URL} and {CHAT_URL}"
        )
    if not is_object(body):
        raise RequestError(f"body is {show(body)}; it must be an object")
    is_chat = "messages" in body if url is None else url == CHAT_URL
    refuse_unknown(body, CHAT_FIELDS if is_chat else BODY_FIELDS, "body")
    return body, is_chat


def _parse_request(
    custom_id: str,
    line: int,
    body: Mapping[str, Any],
    is_chat: bool,
    defaults: SamplingDefaults,
) -> BatchRequest:
    if is_chat:
        refuse_unserved(body, CHAT_NEUTRAL_VALUES)
        prompt = read_chat(body)
        body = {
            **body,
            "max_tokens": read_max_tokens(body),
            "logprobs": read_num_logprobs(body),
        }
    else:
        refuse_unserved(body)
        prompt = read_prompt(body)
    given = {f.name: body[f.name] for f in fields(SamplingParams) if body.get(f.name) is not None}
    values: dict[str, Any] = {
        name: float(value) if name in _NUMBERS else value
        for name, value in asdict(defaults).items()
        if name != "seed"
    }
    for name, value in given.items():
        match name:
            case (
                "n"
                | "max_tokens"
                | "top_k"
                | "seed"
                | "min_tokens"
                | "logprobs"
                | "prompt_logprobs"
            ):
                values[name] = read_int(name, value)
            case _ if name in _NUMBERS:
                values[name] = read_number(name, value)
            case "logit_bias":
                values[name] = read_logit_bias(name, value)
            case "bad_words":
                values[name] = read_bad_words(name, value)
            case "stop_token_ids":
                values[name] = read_token_ids(name, value)
            case "ignore_eos" | "include_stop_str_in_output":
                values[name] = read_bool(name, value)
            case "stop":
                values[name] = read_stop(name, value)
            case _:
                raise AssertionError(f"SamplingParams.{name} has no reader")
    if "seed" not in values:
        values["seed"] = derive_seed(defaults.seed, custom_id)
    sampling = SamplingParams(**values)
    model = None if body.get("model") is None else read_text("model", body["model"])
    return BatchRequest(custom_id, line, prompt, sampling, hash_request(prompt, sampling), model)
