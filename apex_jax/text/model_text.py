"""The text side of a model: what its folder says about turning text to tokens and back.

Owns what is refused where the folder lacks something. Called for each request by batch/flow.py.
"""

import datetime
from dataclasses import dataclass
from pathlib import Path

from apex_jax.request import RequestError, SamplingParams
from apex_jax.text.chat import Chat, ChatTemplate, load_chat_template
from apex_jax.text.detokenizer import decode_output
from apex_jax.text.output_text import OutputText
from apex_jax.text.sentence_piece import SentencePieceTokenizer
from apex_jax.text.tokenizer import JsonTokenizer, Tokenizer

Prompt = str | tuple[int, ...] | Chat


@dataclass(frozen=True)
class ModelText:
    """folder: the model's, None where it has none. The others are None where that lacks them."""

    folder: Path | None
    tokenizer: Tokenizer | None
    chat_template: ChatTemplate | None = None

    def encode(self, prompt: Prompt) -> tuple[int, ...]:
        """Return a prompt's token ids. Raises RequestError."""
        if isinstance(prompt, tuple):
            return prompt
        is_chat = isinstance(prompt, Chat)
        what = "the conversation" if is_chat else "prompt"
        tokenizer = self._need_tokenizer(f"{what} is text", "give prompt_token_ids")
        text = self._render(prompt) if is_chat else prompt
        token_ids = tokenizer.encode(text, add_special_tokens=not is_chat)
        if not token_ids:
            raise RequestError(f"{what} has no tokens: nothing in it is in the tokenizer")
        return token_ids

    def decode_within(self, token_ids: tuple[int, ...]) -> str:
        """Return the text of tokens as it is in the midst of one, where a leading space counts."""
        tokenizer = self._need_tokenizer("text is wanted", "take token ids")
        before = tokenizer.encode("a", add_special_tokens=False)
        return decode_output(tokenizer, before, token_ids)

    def watch(
        self, prompt_token_ids: tuple[int, ...], sampling: SamplingParams
    ) -> OutputText | None:
        """Return what finds a request's stop strings, None where it has none."""
        if not sampling.stop:
            return None
        return OutputText(
            self._need_tokenizer("stop is text", "give stop_token_ids"),
            prompt_token_ids,
            sampling.stop,
            include_stop=sampling.include_stop_str_in_output,
            min_tokens=sampling.min_tokens,
        )

    def _render(self, chat: Chat) -> str:
        if self.chat_template is None:
            raise RequestError(
                f"messages need a chat template, and {self.folder} has none (chat_template.jinja, "
                "or in tokenizer_config.json): give prompt"
            )
        return self.chat_template.render(chat)

    def _need_tokenizer(self, why: str, remedy: str) -> Tokenizer:
        if self.tokenizer is None:
            path = (self.folder or Path()) / "tokenizer.json"
            raise RequestError(f"{why}, and there is no {path} or tokenizer.model: {remedy}")
        return self.tokenizer


def load_tokenizer(folder: Path) -> Tokenizer | None:
    """Load the tokenizer of a model's folder; None where it has none.

    Raises ConfigError for a file that is corrupt.
    """
    path = folder / "tokenizer.json"
    if path.exists():
        return JsonTokenizer(path)
    path = folder / "tokenizer.model"
    return SentencePieceTokenizer(path) if path.exists() else None


def load_text(folder: Path | None, now: datetime.datetime | None = None) -> ModelText:
    """Read the text side of a model's folder. Raises ConfigError for a file that is corrupt.

    now: for a chat template that asks for the time; None is the clock's.
    """
    if folder is None:
        return ModelText(None, None)
    now = datetime.datetime.now() if now is None else now
    return ModelText(folder, load_tokenizer(folder), load_chat_template(folder, now))
