"""The fields of a completion request: which there are, what they must be, what is refused.

Owns names, types and the wording of every refusal; ranges of sampling parameters are
SamplingParams' own. Called by lines.py for each input line.
"""

import dataclasses
import difflib
import math
from collections.abc import Iterable, Mapping
from typing import Any, TypeGuard

from apex_jax.request import RequestError, SamplingParams

SAMPLING_FIELDS = tuple(field.name for field in dataclasses.fields(SamplingParams))

# Accepted and without effect on the tokens.
IGNORED_FIELDS = (
    "model",
    "user",
    "metadata",
    "store",
    "service_tier",
    "safety_identifier",
    "prompt_cache_key",
)

# Known elsewhere, not served here: accepted only as null or as the value that asks for nothing.
NEUTRAL_VALUES: Mapping[str, tuple[object, ...]] = {
    "best_of": (1,),
    "stream": (False,),
    "stream_options": (),
    "echo": (False,),
    "suffix": ("",),
    "skip_special_tokens": (True,),
    "add_special_tokens": (True,),
}

BODY_FIELDS = (
    "prompt",
    "prompt_token_ids",
    *SAMPLING_FIELDS,
    *IGNORED_FIELDS,
    *NEUTRAL_VALUES,
)

_REMEDIES: Mapping[str, str] = {
    "best_of": "n gives all of them",
    "messages": "/v1/chat/completions takes it",
    "prompt": "/v1/chat/completions takes messages",
    "prompt_token_ids": "/v1/chat/completions takes messages",
    "max_completion_tokens": "/v1/completions calls it max_tokens",
    "top_logprobs": "/v1/completions calls it logprobs",
}


def is_array(value: object) -> TypeGuard[list[Any]]:
    """Whether a JSON value is an array."""
    return isinstance(value, list)


def is_object(value: object) -> TypeGuard[dict[str, Any]]:
    """Whether a JSON value is an object."""
    return isinstance(value, dict)


def show(value: object) -> str:
    """Return a JSON value for a message: ASCII, at most about 60 characters, however large."""
    if is_array(value):
        return f"an array of {len(value)}"
    if is_object(value):
        return f"an object of {len(value)} fields"
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) >= 10**30:
        return f"a number of {value.bit_length()} bits"
    named: dict[object, str] = {None: "null", True: "true", False: "false"}
    if value is None or isinstance(value, bool):
        return named[value]
    text = ascii(value[:60] if isinstance(value, str) else value)
    return text if len(text) <= 60 else text[:57] + "..."


def refuse_unknown(fields: Iterable[str], known: Iterable[str], where: str) -> None:
    """Raise RequestError for the first of `fields` not among `known`, with the nearest known."""
    names = tuple(known)
    for name in fields:
        if name in names:
            continue
        remedy = _REMEDIES.get(name)
        if remedy is None:
            near = difflib.get_close_matches(name[:100], names, n=1)
            remedy = f"did you mean {near[0]}?" if near else "known are " + ", ".join(names)
        raise RequestError(f"{where} has an unknown field {show(name)}: {remedy}")


def refuse_unserved(
    body: Mapping[str, Any],
    neutral_values: Mapping[str, tuple[object, ...]] = NEUTRAL_VALUES,
    where: str = "",
) -> None:
    """Raise RequestError for a field that asks for what this version does not do.

    where: what stands before a field's name in the message.
    """
    for name, neutral in neutral_values.items():
        value = body.get(name)
        if value is None or any(value == one and _same_kind(value, one) for one in neutral):
            continue
        remedy = f": {_REMEDIES[name]}" if name in _REMEDIES else ""
        raise RequestError(
            f"{where}{name} is {show(value)}, which this version does not do{remedy}"
        )


def _same_kind(value: object, other: object) -> bool:
    """True unless one is a bool and the other a number, which Python calls equal."""
    return isinstance(value, bool) == isinstance(other, bool)


def read_int(name: str, value: object) -> int:
    """Return `value` as an int; a bool or 5.0 is not one."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise RequestError(f"{name} is {show(value)}; it must be an integer")
    return value


def read_number(name: str, value: object) -> float:
    """Return `value` as a float; raise RequestError for anything that is no finite number."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise RequestError(f"{name} is {show(value)}; it must be a number")
    try:
        number = float(value)
    except OverflowError:
        raise RequestError(f"{name} is {show(value)}; it is out of range") from None
    if not math.isfinite(number):  # what JSON's 1e999 is read as
        raise RequestError(f"{name} is {show(value)}; it must be a finite number")
    return number


def read_bool(name: str, value: object) -> bool:
    """Return `value`, which must be true or false."""
    if not isinstance(value, bool):
        raise RequestError(f"{name} is {show(value)}; it must be true or false")
    return value


def read_text(name: str, value: object) -> str:
    """Return `value`, which must be a string that is not empty and that UTF-8 can carry."""
    if not isinstance(value, str):
        raise RequestError(f"{name} is {show(value)}; it must be a string")
    if not value:
        raise RequestError(f"{name} is empty")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise RequestError(
            f"{name} has half a surrogate pair at character {error.start}, which is not text"
        ) from None
    return value


def read_token_ids(name: str, value: object) -> tuple[int, ...]:
    """Return `value`, an array of integers from 0; the engine knows the upper end."""
    if not is_array(value):
        raise RequestError(f"{name} is {show(value)}; it must be an array of token ids")
    if all(type(one) is int and 0 <= one < 2**31 for one in value):
        return tuple(value)
    for index, one in enumerate(value):
        token_id = read_int(f"{name}[{index}]", one)
        if not 0 <= token_id < 2**31:
            raise RequestError(f"{name}[{index}] is {show(token_id)}, which is no token id")
    raise AssertionError("one of them is no token id")


def read_stop(name: str, value: object) -> tuple[str, ...]:
    """Return `value`, a string or an array of strings."""
    if is_array(value):
        return tuple(read_text(f"{name}[{index}]", one) for index, one in enumerate(value))
    if isinstance(value, str):
        return (read_text(name, value),)
    raise RequestError(f"{name} is {show(value)}; it must be a string or an array of strings")


def read_logit_bias(name: str, value: object) -> dict[int, float]:
    """Return `value`, an object of token ids, which JSON spells as text, and numbers."""
    if not is_object(value):
        raise RequestError(f"{name} is {show(value)}; it must be an object of token ids to numbers")
    biases: dict[int, float] = {}
    for key, bias in value.items():
        if not (key.isascii() and key.isdigit() and len(key) <= 10 and int(key) < 2**31):
            raise RequestError(f"{name} has the key {show(key)}, which is no token id")
        if int(key) in biases:
            raise RequestError(f"{name} has token id {int(key)} twice")
        biases[int(key)] = read_number(f"{name}[{key}]", bias)
    return biases


def read_bad_words(name: str, value: object) -> tuple[str | tuple[int, ...], ...]:
    """Return `value`, an array of words, each a text or an array of token ids."""
    if not is_array(value):
        raise RequestError(f"{name} is {show(value)}; it must be an array of texts or token ids")
    return tuple(
        read_token_ids(f"{name}[{index}]", one)
        if is_array(one)
        else read_text(f"{name}[{index}]", one)
        for index, one in enumerate(value)
    )


def read_prompt(body: Mapping[str, Any]) -> str | tuple[int, ...]:
    """Return the one prompt of a body: text, or token ids. Raises RequestError."""
    text, token_ids = body.get("prompt"), body.get("prompt_token_ids")
    if (text is None) == (token_ids is None):
        found = "neither" if text is None else "both"
        raise RequestError(f"give prompt or prompt_token_ids; the line has {found}")
    name = "prompt" if token_ids is None else "prompt_token_ids"
    value: Any = body[name]
    if is_array(value) and any(isinstance(one, str) or is_array(one) for one in value[:1]):
        if name == "prompt_token_ids" or len(value) > 1:
            raise RequestError(f"{name} is {show(value)} prompts; this version takes one a line")
        value = value[0]  # the OpenAI form of a single prompt in an array
    if name == "prompt" and not is_array(value):
        if isinstance(value, str):
            return read_text(name, value)
        raise RequestError(f"prompt is {show(value)}; it must be a string or an array of token ids")
    ids = read_token_ids(name, value)
    if not ids:
        raise RequestError(f"{name} is empty")
    return ids
