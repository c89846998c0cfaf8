"""The fields of a chat request: those of a completion, with messages in place of a prompt.

Owns what a message may hold. Called by lines.py for lines of /v1/chat/completions.
"""

import difflib
from collections.abc import Mapping
from typing import Any

from apex_jax.batch.fields import (
    BODY_FIELDS,
    NEUTRAL_VALUES,
    is_array,
    is_object,
    read_bool,
    read_int,
    read_text,
    refuse_unknown,
    refuse_unserved,
    show,
)
from apex_jax.request import MAX_LOGPROBS, RequestError
from apex_jax.text.chat import Chat

# Of a completion, but of no chat.
_COMPLETION_ONLY = ("prompt", "prompt_token_ids", "suffix", "best_of")

# Known elsewhere, not served here: accepted only as null or as the value that asks for nothing.
CHAT_NEUTRAL_VALUES: Mapping[str, tuple[object, ...]] = {
    **{name: values for name, values in NEUTRAL_VALUES.items() if name not in _COMPLETION_ONLY},
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "parallel_tool_calls": (True, False),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "documents": ([],),
    "add_generation_prompt": (True,),
    "continue_final_message": (False,),
}

CHAT_FIELDS = (
    "messages",
    "max_completion_tokens",
    "top_logprobs",
    "chat_template_kwargs",
    *(name for name in BODY_FIELDS if name not in (*_COMPLETION_ONLY, *CHAT_NEUTRAL_VALUES)),
    *CHAT_NEUTRAL_VALUES,
)

# tool and ipython bring the results of tools, as text.
ROLES = ("system", "developer", "user", "assistant", "tool", "ipython")

_MESSAGE_NEUTRAL_VALUES: Mapping[str, tuple[object, ...]] = {
    "tool_calls": ([],),
    "function_call": (),
    "refusal": (),
    "audio": (),
    "annotations": ([],),
}
_MESSAGE_FIELDS = ("role", "content", "name", "tool_call_id", *_MESSAGE_NEUTRAL_VALUES)

# The template's own, which a request may not replace.
_RESERVED_VARIABLES = ("messages", "tools", "documents", "add_generation_prompt")


def read_chat(body: Mapping[str, Any]) -> Chat:
    """Return the conversation of a body. Raises RequestError."""
    messages = body.get("messages")
    if not is_array(messages):
        raise RequestError(f"messages is {show(messages)}; it must be an array of messages")
    if not messages:
        raise RequestError("messages is empty")
    variables: object = body.get("chat_template_kwargs")
    if variables is None:
        variables = dict[str, Any]()
    if not is_object(variables):
        raise RequestError(f"chat_template_kwargs is {show(variables)}; it must be an object")
    reserved = [name for name in _RESERVED_VARIABLES if name in variables]
    if reserved:
        raise RequestError(f"chat_template_kwargs may not set {reserved[0]}")
    return Chat(
        tuple(_read_message(f"messages[{index}]", one) for index, one in enumerate(messages)),
        variables,
    )


def read_max_tokens(body: Mapping[str, Any]) -> object:
    """Return what a chat body gives for max_tokens, under its new name or the old one."""
    old, new = body.get("max_tokens"), body.get("max_completion_tokens")
    if old is not None and new is not None and old != new:
        raise RequestError(
            f"max_tokens is {show(old)} and max_completion_tokens {show(new)}: they mean the same, "
            "give one of them"
        )
    return old if new is None else new


def read_num_logprobs(body: Mapping[str, Any]) -> int | None:
    """Return how many alternatives of each token a chat asks for; None for no logprobs at all."""
    asked, count = body.get("logprobs"), body.get("top_logprobs")
    num_best = 0 if count is None else read_int("top_logprobs", count)
    if not 0 <= num_best <= MAX_LOGPROBS:
        raise RequestError(f"top_logprobs is {num_best}; it must be between 0 and {MAX_LOGPROBS}")
    if asked is not None and read_bool("logprobs", asked):
        return num_best
    if num_best:
        raise RequestError(f"top_logprobs is {num_best}: it needs logprobs, as true")
    return None


def _read_message(name: str, item: object) -> dict[str, str]:
    if not is_object(item):
        raise RequestError(f"{name} is {show(item)}; it must be an object")
    refuse_unknown(item, _MESSAGE_FIELDS, name)
    refuse_unserved(item, _MESSAGE_NEUTRAL_VALUES, f"{name}.")
    role = item.get("role")
    if role not in ROLES:
        near = difflib.get_close_matches(str(role)[:100], ROLES, n=1)
        right = f"did you mean {near[0]}?" if near else "known are " + ", ".join(ROLES)
        raise RequestError(f"{name}.role is {show(role)}: {right}")
    message = {"role": str(role), "content": _read_content(f"{name}.content", item.get("content"))}
    for extra in ("name", "tool_call_id"):
        if item.get(extra) is not None:
            message[extra] = read_text(f"{name}.{extra}", item[extra])
    return message


def _read_content(name: str, value: object) -> str:
    """Return a message's text; of several parts, one a line."""
    if isinstance(value, str):
        return read_text(name, value) if value else ""
    if not is_array(value):
        raise RequestError(f"{name} is {show(value)}; it must be a string or an array of parts")
    return "\n".join(_read_part(f"{name}[{index}]", one) for index, one in enumerate(value))


def _read_part(name: str, part: object) -> str:
    if not is_object(part):
        raise RequestError(f"{name} is {show(part)}; it must be an object")
    kind = part.get("type")
    if kind != "text":
        raise RequestError(f"{name} is of type {show(kind)}; this version reads text only")
    refuse_unknown(part, ("type", "text"), name)
    text = part.get("text")
    return "" if text == "" else read_text(f"{name}.text", text)
