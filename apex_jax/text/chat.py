"""Messages to the text of a prompt, through the jinja2 template that comes with a model.

Owns the sandbox in which a template runs, with the helpers that Hugging Face's templates use. What
a template refuses, or fails at, is the request's error. A template writes BOS itself where its
model wants it, so its text is encoded without adding any.
"""

import datetime
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn, cast

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox

from apex_jax.config import ConfigError
from apex_jax.request import RequestError
from apex_jax.text.tokenizer import read_file, read_json

# What templates may write; the names are those of tokenizer_config.json.
SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token")


@dataclass(frozen=True)
class Chat:
    """A conversation that the model shall go on with.

    messages: role, content and perhaps name of each. variables: further ones for the template.
    """

    messages: tuple[Mapping[str, str], ...]
    variables: Mapping[str, Any] = field(default_factory=dict[str, Any])

    def to_json(self) -> dict[str, Any]:
        """Return what the prompt depends on, beside the template."""
        return {"messages": self.messages, "variables": self.variables}


class ChatTemplate:
    """A model's template.

    path: the file it comes from. sha256: of it and the special tokens it may write. time: of
    `strftime_now`, the same for a whole job, or None where the template does not ask for it.
    """

    def __init__(
        self,
        path: Path,
        source: str,
        special_tokens: Mapping[str, str],
        now: datetime.datetime,
    ) -> None:
        """A template that does not compile is told to those who use it, not to others."""
        self.path = path
        self.sha256 = hashlib.sha256(
            json.dumps([source, special_tokens], sort_keys=True).encode("ascii")
        ).hexdigest()
        self.time = now if "strftime_now" in source else None
        self._special_tokens = special_tokens
        self._template: jinja2.Template | None = None
        self._fault = ""
        try:
            self._template = _make_environment(now).from_string(source)
        except jinja2.TemplateError as error:
            self._fault = f"the chat template of {path} does not compile: {error}"

    def render(self, chat: Chat) -> str:
        """Return the prompt's text up to where the answer begins. Raises RequestError."""
        if self._template is None:
            raise RequestError(self._fault)
        try:
            return self._template.render(
                {
                    **self._special_tokens,
                    **chat.variables,
                    "messages": [dict(message) for message in chat.messages],
                    "tools": None,
                    "documents": None,
                    "add_generation_prompt": True,
                }
            )
        except _RefusedError as error:
            raise RequestError(f"the chat template refuses the messages: {error}") from None
        except Exception as error:  # whatever the template's expressions raise
            raise RequestError(
                f"the chat template of {self.path} fails: {type(error).__name__}: {error}"
            ) from None


def load_chat_template(folder: Path, now: datetime.datetime) -> ChatTemplate | None:
    """Return the template of a model's folder, or None where it has none.

    Raises ConfigError for a file that is corrupt.
    """
    settings_path = folder / "tokenizer_config.json"
    settings = read_json(settings_path)
    special_tokens = _special_tokens(settings, read_json(folder / "special_tokens_map.json"))
    # The newest form first: a folder that was saved again may still have the older ones.
    path = folder / "chat_template.jinja"
    if path.exists():
        try:
            return ChatTemplate(path, read_file(path).decode("utf-8"), special_tokens, now)
        except UnicodeDecodeError as error:
            raise ConfigError(f"{path} is not UTF-8: {error.reason}") from None
    for path in (settings_path, folder / "chat_template.json"):
        source = read_json(path).get("chat_template")
        if isinstance(source, list):
            named = cast(list[dict[str, str]], source)
            source = next((one["template"] for one in named if one["name"] == "default"), None)
        if source is not None:
            if not isinstance(source, str):
                raise ConfigError(f"{path}: chat_template is neither text nor a list of templates")
            return ChatTemplate(path, source, special_tokens, now)
    return None


class _RefusedError(jinja2.TemplateError):
    """What a template raises of its own accord."""


class _GenerationTag(jinja2.ext.Extension):
    """`{% generation %}` marks the assistant's words for training; here it marks nothing."""

    tags = {"generation"}  # noqa: RUF012 (jinja2 declares it so)

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.Scope(body, lineno=line)


def _make_environment(now: datetime.datetime) -> jinja2.Environment:
    environment: Any = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[_GenerationTag, jinja2.ext.loopcontrols],
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = now.strftime
    return environment


def _to_json(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Return plain JSON: jinja2's own filter escapes it for HTML."""
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _raise_exception(message: str) -> NoReturn:
    raise _RefusedError(message)


def _special_tokens(*sources: Mapping[str, Any]) -> dict[str, str]:
    """Return each special token's text, from the first source that has it."""
    found: dict[str, str] = {}
    for source in sources:
        for name in SPECIAL_TOKENS:
            value = source.get(name)
            text = cast(dict[str, object], value)["content"] if isinstance(value, dict) else value
            if isinstance(text, str):
                found.setdefault(name, text)
    return found
