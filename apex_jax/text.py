"""Text to token ids and back, through a model folder's tokenizer.json.

Owns the wrapper around `tokenizers`: special tokens as a completion wants them, output text decoded
in the context of its prompt. Refuses a corrupt file, or one that is not this model's. Knows no
chat templates. Token-id prompts need none of this.
"""

import hashlib
from pathlib import Path

import tokenizers

from apex_jax.config import ConfigError
from apex_jax.request import RequestError

# Prompt tokens decoded before an output so that its first token keeps a leading space. One token
# with text would do; eight also carry the longest UTF-8 character, split into single bytes.
CONTEXT_TOKENS = 8

_REPLACEMENT = "\ufffd"  # what decoders put where bytes do not make a character (yet)


class Tokenizer:
    """One tokenizer.json.

    path: the file. sha256: of its bytes, part of a job's identity. num_tokens: its token ids are
    below this, special ones included.
    """

    def __init__(self, path: Path) -> None:
        """Load `path`; raise ConfigError naming it where it cannot be read or makes no sense."""
        try:
            data = path.read_bytes()
        except OSError as error:
            raise ConfigError(f"cannot read {path}: {error.strerror or error}") from error
        try:
            self._tokenizer = tokenizers.Tokenizer.from_str(data.decode("utf-8"))
        except Exception as error:  # `tokenizers` raises plain Exception from Rust
            raise ConfigError(f"{path} is not a tokenizer.json that loads: {error}") from error
        # A file saved after training may carry both; either would change prompts silently.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self.path = path
        self.sha256 = hashlib.sha256(data).hexdigest()
        ids = self._tokenizer.get_vocab(with_added_tokens=True).values()
        self.num_tokens = max(ids, default=-1) + 1

    def check_vocabulary(self, vocab_size: int) -> None:
        """Raise ConfigError if ordinary tokens lie outside a model's `vocab_size`.

        Fewer tokens than the model has are normal (padded embeddings), and so are a few added
        tokens beyond it (a pad token); a request that uses one of those is refused on its own.
        """
        ids = self._tokenizer.get_vocab(with_added_tokens=False).values()
        num_ordinary = max(ids, default=-1) + 1
        if num_ordinary > vocab_size:
            raise ConfigError(
                f"{self.path} has token ids up to {num_ordinary - 1}, but the model's vocabulary "
                f"has {vocab_size}: they do not belong together"
            )

    def encode(self, text: str, *, add_special_tokens: bool = True) -> tuple[int, ...]:
        """Return the token ids of a text; a completion prompt's have special tokens (BOS).

        Raises RequestError where the text yields no token.
        """
        ids = tuple(self._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids)
        if not ids:
            raise RequestError("prompt has no tokens: nothing in it is in the tokenizer")
        return ids

    def decode_after(self, prompt_token_ids: tuple[int, ...], token_ids: tuple[int, ...]) -> str:
        """Return what `token_ids` add to the text of the prompt before them.

        Special tokens give no text. Decoded alone, many tokenizers would drop the leading space
        of the first word; a character whose bytes begin in the prompt counts as output.
        """
        context_ids, context = self._context(prompt_token_ids)
        whole = self._decode(context_ids + token_ids)
        if whole.startswith(context):
            return whole[len(context) :]
        complete = context.rstrip(_REPLACEMENT)
        if whole.startswith(complete):
            return whole[len(complete) :]
        return self._decode(token_ids)

    def _context(self, prompt_token_ids: tuple[int, ...]) -> tuple[tuple[int, ...], str]:
        """The shortest tail of the prompt, of 8, 16, 32 ... tokens, that has any text."""
        length = CONTEXT_TOKENS
        while True:
            tail = prompt_token_ids[-length:]
            text = self._decode(tail)
            if text.strip(_REPLACEMENT) or length >= len(prompt_token_ids):
                return tail, text
            length *= 2

    def _decode(self, token_ids: tuple[int, ...]) -> str:
        return self._tokenizer.decode(list(token_ids), skip_special_tokens=True)


def load_tokenizer(folder: Path) -> Tokenizer | None:
    """Load `folder`/tokenizer.json; None where there is none. Raises ConfigError if corrupt."""
    path = folder / "tokenizer.json"
    return Tokenizer(path) if path.exists() else None
