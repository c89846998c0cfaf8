"""A tokenizer.model as Llama 1 and 2 have it, through the sentencepiece library.

Owns what the library leaves to its caller: special tokens spelt out in a text, BOS before it, and
tokens added later. Each piece of text between special tokens begins a sentence of its own, as in
the tokenizer.json that such models come with too. The library is loaded where it is needed only.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from apex_jax.config import ConfigError
from apex_jax.text.tokenizer import Tokenizer, read_file, read_json


class SentencePieceTokenizer(Tokenizer):
    """A tokenizer.model, with added_tokens.json and tokenizer_config.json beside it."""

    def __init__(self, path: Path) -> None:
        """Load `path`; raise ConfigError naming what cannot be read or is missing."""
        data = read_file(path)
        self._processor = processor = _load(path, data)
        size: int = processor.vocab_size()
        special_ids: dict[str, int] = {
            processor.id_to_piece(index): index
            for index in range(size)
            if processor.is_control(index) or processor.is_unknown(index)
        }
        settings = read_json(path.with_name("tokenizer_config.json"))
        added = read_json(path.with_name("added_tokens.json"))
        added |= {
            token["content"]: int(index)
            for index, token in settings.get("added_tokens_decoder", {}).items()
        }
        # None of them is in the model, which knows no text for them.
        special_ids |= {text: index for text, index in added.items() if index >= size}
        super().__init__(
            path,
            data,
            num_ordinary=size,
            num_tokens=max([size - 1, *special_ids.values()]) + 1,
            special_ids=special_ids,
        )
        has_bos = settings.get("add_bos_token", True) and processor.bos_id() >= 0
        has_eos = settings.get("add_eos_token", False) and processor.eos_id() >= 0
        self._before = (processor.bos_id(),) if has_bos else ()
        self._behind = (processor.eos_id(),) if has_eos else ()
        longest_first = sorted(special_ids, key=len, reverse=True)
        self._special = re.compile(f"({'|'.join(map(re.escape, longest_first))})")

    def encode(self, text: str, *, add_special_tokens: bool) -> tuple[int, ...]:
        token_ids: list[int] = []
        for part in self._special.split(text):
            if part in self.special_ids:
                token_ids.append(self.special_ids[part])
            else:
                token_ids += self._processor.encode(part)
        if add_special_tokens:
            return (*self._before, *token_ids, *self._behind)
        return tuple(token_ids)

    def decode(self, token_ids: Sequence[int]) -> str:
        return self._processor.decode([one for one in token_ids if self.has_text(one)])


def _load(path: Path, data: bytes) -> Any:
    """Return the library's processor of a model. Raises ConfigError."""
    try:
        import sentencepiece
    except ImportError:
        raise ConfigError(
            f"{path} needs the sentencepiece library: pip install sentencepiece, or put the "
            "model's tokenizer.json beside it"
        ) from None
    processor = sentencepiece.SentencePieceProcessor()
    try:
        processor.LoadFromSerializedProto(data)
    except RuntimeError as error:
        raise ConfigError(
            f"{path} is not a sentencepiece model that loads ({error}); Llama 3's file of this "
            "name is another format, and needs the model's tokenizer.json"
        ) from None
    return processor
