"""Text to token ids and back, through the tokenizer of a model's folder.

Owns what all tokenizers have in common, and the one that a tokenizer.json describes. Refuses a
corrupt file, or one that is not this model's. What an output adds to its prompt is the
detokenizer's business. Token-id prompts need none of this.
"""

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import tokenizers

from apex_jax.config import ConfigError


class Tokenizer(ABC):
    """One tokenizer file.

    path: the file. sha256: of its bytes, part of a job's identity. num_tokens: its token ids are
    below this, special ones included. special_ids: special tokens and their ids; they steer the
    model and have no text.
    """

    def __init__(
        self,
        path: Path,
        data: bytes,
        *,
        num_ordinary: int,
        num_tokens: int,
        special_ids: Mapping[str, int],
    ) -> None:
        """num_ordinary: the ids of tokens that no one added later are below this."""
        self.path = path
        self.sha256 = hashlib.sha256(data).hexdigest()
        self.special_ids = special_ids
        self.num_tokens = num_tokens
        self._num_ordinary = num_ordinary
        self._textless = frozenset(special_ids.values())

    def check_vocabulary(self, vocab_size: int) -> None:
        """Raise ConfigError if ordinary tokens lie outside a model's `vocab_size`.

        Fewer tokens than the model has are normal (padded embeddings), and so are a few added
        tokens beyond it (a pad token); a request that uses one of those is refused on its own.
        """
        if self._num_ordinary > vocab_size:
            raise ConfigError(
                f"{self.path} has token ids up to {self._num_ordinary - 1}, but the model's "
                f"vocabulary has {vocab_size}: they do not belong together"
            )

    def has_text(self, token_id: int) -> bool:
        """Whether a token stands for text; special ones and those of padded embeddings do not."""
        return token_id < self.num_tokens and token_id not in self._textless

    @abstractmethod
    def encode(self, text: str, *, add_special_tokens: bool) -> tuple[int, ...]:
        """Return the token ids of a text, in which special tokens may be spelt out.

        add_special_tokens: put those around it that the model expects (BOS).
        """

    @abstractmethod
    def decode(self, token_ids: Sequence[int]) -> str:
        """Return the text of tokens, without that of special ones.

        Bytes that make no character become U+FFFD; a space before the first word may be missing.
        """


class JsonTokenizer(Tokenizer):
    """A tokenizer.json, read by `tokenizers`."""

    def __init__(self, path: Path) -> None:
        """Load `path`; raise ConfigError naming it where it cannot be read or makes no sense."""
        data = read_file(path)
        try:
            self._tokenizer = tokenizers.Tokenizer.from_str(data.decode("utf-8"))
        except Exception as error:  # `tokenizers` raises plain Exception from Rust
            raise ConfigError(f"{path} is not a tokenizer.json that loads: {error}") from error
        # A file saved after training may carry both; either would change prompts silently.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        added = self._tokenizer.get_added_tokens_decoder()
        super().__init__(
            path,
            data,
            num_ordinary=_end_of(self._tokenizer.get_vocab(with_added_tokens=False)),
            num_tokens=_end_of(self._tokenizer.get_vocab(with_added_tokens=True)),
            special_ids={token.content: index for index, token in added.items() if token.special},
        )

    def encode(self, text: str, *, add_special_tokens: bool) -> tuple[int, ...]:
        return tuple(self._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids)

    def decode(self, token_ids: Sequence[int]) -> str:
        return self._tokenizer.decode(token_ids, skip_special_tokens=True)


def read_file(path: Path) -> bytes:
    """Return the bytes of a file; ConfigError names it and says why they cannot be had."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror or error}") from error


def read_json(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file; an empty one where there is no file. Raises ConfigError."""
    if not path.exists():
        return {}
    try:
        item = json.loads(read_file(path))
    except ValueError as error:
        raise ConfigError(f"{path} is not JSON: {error}") from None
    if not isinstance(item, dict):
        raise ConfigError(f"{path} holds no JSON object")
    return cast(dict[str, Any], item)


def _end_of(vocabulary: Mapping[str, int]) -> int:
    return max(vocabulary.values(), default=-1) + 1
