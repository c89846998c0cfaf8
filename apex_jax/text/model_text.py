"""The text side of a model: what its folder says about turning text to tokens and back.

Owns what is refused where the folder lacks something. Called for each request by batch/flow.py.
"""

from dataclasses import dataclass
from pathlib import Path

from apex_jax.request import RequestError, SamplingParams
from apex_jax.text.output_text import OutputText
from apex_jax.text.tokenizer import Tokenizer, load_tokenizer

Prompt = str | tuple[int, ...]


@dataclass(frozen=True)
class ModelText:
    """folder: the model's, None where it has none. tokenizer: None where the folder has none."""

    folder: Path | None
    tokenizer: Tokenizer | None

    def encode(self, prompt: Prompt) -> tuple[int, ...]:
        """Return a prompt's token ids. Raises RequestError."""
        if isinstance(prompt, tuple):
            return prompt
        token_ids = self._need_tokenizer("prompt is text", "give prompt_token_ids").encode(
            prompt, add_special_tokens=True
        )
        if not token_ids:
            raise RequestError("prompt has no tokens: nothing in it is in the tokenizer")
        return token_ids

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
        )

    def _need_tokenizer(self, why: str, remedy: str) -> Tokenizer:
        if self.tokenizer is None:
            path = (self.folder or Path()) / "tokenizer.json"
            raise RequestError(f"{why}, and there is no {path}: {remedy}")
        return self.tokenizer


def load_text(folder: Path | None) -> ModelText:
    """Read the text side of a model's folder. Raises ConfigError for a file that is corrupt."""
    return ModelText(folder, None if folder is None else load_tokenizer(folder))
