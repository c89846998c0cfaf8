"""Bad words from text to token ids.

Owns which spellings of a word are forbidden: the one that begins a text and the one that follows a
space, as in vLLM. Called before a request is submitted, since the engine knows no text.
"""

import dataclasses
from collections.abc import Callable, Sequence

from apex_jax.request import RequestError, SamplingParams


def resolve_bad_words(
    sampling: SamplingParams, encode: Callable[[str], Sequence[int]] | None
) -> SamplingParams:
    """Return the same parameters with token ids for every bad word. Raises RequestError.

    encode: text to token ids without special ones; None where there is no tokenizer.
    """
    if not any(isinstance(word, str) for word in sampling.bad_words):
        return sampling
    if encode is None:
        raise RequestError("bad_words has text, and there is no tokenizer: give arrays of ids")
    words: list[tuple[int, ...]] = []
    for word in sampling.bad_words:
        if not isinstance(word, str):
            words.append(word)
            continue
        bare = word.lstrip(" ") or word
        spellings = [tuple(encode(text)) for text in (bare, f" {bare}")]
        if not any(spellings):
            raise RequestError(f"bad_words has {word!r}, which the tokenizer has no tokens for")
        words += [spelling for spelling in dict.fromkeys(spellings) if spelling]
    return dataclasses.replace(sampling, bad_words=tuple(words))
