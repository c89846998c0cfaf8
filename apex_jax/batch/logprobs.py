"""Log-probabilities as the OpenAI API has them, and those of prompts as vLLM has.

Owns the text that stands for a single token. One that has none of its own (a byte of a character,
an end of text, any where there is no tokenizer) is called token_id:N, as vLLM can.
"""

from collections.abc import Callable, Sequence
from typing import Any

from apex_jax.request import RequestOutput, TokenLogprobs

_REPLACEMENT = "\ufffd"  # what decoders put where bytes do not make a character


class TokenTexts:
    """The texts of single tokens, each looked up once.

    decode: token ids to their text in the midst of one, where a leading space counts; None where
    there is no tokenizer.
    """

    def __init__(self, decode: Callable[[tuple[int, ...]], str] | None) -> None:
        self._decode = decode
        self._texts: dict[int, str] = {}

    def own_text(self, token_id: int) -> str:
        """Return the text of a token; empty where it has none of its own."""
        text = self._texts.get(token_id)
        if text is None:
            text = "" if self._decode is None else self._decode((token_id,))
            text = self._texts[token_id] = "" if _REPLACEMENT in text else text
        return text

    def name(self, token_id: int) -> str:
        """Return what stands for a token in a result."""
        return self.own_text(token_id) or f"token_id:{token_id}"

    def offsets(self, token_ids: Sequence[int]) -> list[int]:
        """Return where in their text each token begins; the bytes of a character do together."""
        offsets: list[int] = []
        offset, without_text = 0, list[int]()
        for token_id in token_ids:
            text = self.own_text(token_id)
            if text and without_text:
                offset += len(self._decode(tuple(without_text))) if self._decode else 0
                without_text.clear()
            if not text:
                without_text.append(token_id)
            offsets.append(offset)
            offset += len(text)
        return offsets


def logprob_fields(
    output: RequestOutput, texts: TokenTexts, *, is_chat: bool = False
) -> dict[str, Any]:
    """Return the fields of a choice that hold logprobs: what was asked for, or null."""
    fields: dict[str, Any] = {"logprobs": None}
    if output.logprobs is not None:
        in_form = chat_logprobs if is_chat else completion_logprobs
        fields["logprobs"] = in_form(output.token_ids, output.logprobs, texts)
    if output.prompt_logprobs is not None:
        prompt = output.request.prompt_token_ids
        fields["prompt_logprobs"] = prompt_logprobs(prompt, output.prompt_logprobs, texts)
    return fields


def completion_logprobs(
    token_ids: Sequence[int], logprobs: Sequence[TokenLogprobs], texts: TokenTexts
) -> dict[str, Any]:
    """Return the `logprobs` object of a choice: the best tokens, and the chosen one."""
    top: list[dict[str, float]] = []
    for token_id, of_token in zip(token_ids, logprobs, strict=True):
        best = zip(of_token.top_ids_i.tolist(), of_token.top_logprobs_i.tolist(), strict=True)
        named: dict[str, float] = {}
        for one, logprob in best:
            named.setdefault(texts.name(one), logprob)
        named.setdefault(texts.name(token_id), of_token.logprob)
        top.append(named)
    return {
        "tokens": [texts.name(token_id) for token_id in token_ids],
        "token_logprobs": [of_token.logprob for of_token in logprobs],
        "top_logprobs": top,
        "text_offset": texts.offsets(token_ids),
    }


def chat_logprobs(
    token_ids: Sequence[int], logprobs: Sequence[TokenLogprobs], texts: TokenTexts
) -> dict[str, Any]:
    """Return the `logprobs` object of a chat's choice."""

    def entry(token_id: int, logprob: float) -> dict[str, Any]:
        own = texts.own_text(token_id)
        in_bytes = list(own.encode("utf-8")) if own else None
        return {"token": texts.name(token_id), "logprob": logprob, "bytes": in_bytes}

    content: list[dict[str, Any]] = []
    for token_id, of_token in zip(token_ids, logprobs, strict=True):
        best = zip(of_token.top_ids_i.tolist(), of_token.top_logprobs_i.tolist(), strict=True)
        top = [entry(one, logprob) for one, logprob in best]
        content.append({**entry(token_id, of_token.logprob), "top_logprobs": top})
    return {"content": content}


def prompt_logprobs(
    prompt_token_ids: Sequence[int], logprobs: Sequence[TokenLogprobs], texts: TokenTexts
) -> list[dict[str, Any] | None]:
    """Return by token id what each token of a prompt could have been; null for the first."""
    found: list[dict[str, Any] | None] = [None]
    for token_id, of_token in zip(prompt_token_ids[1:], logprobs, strict=True):
        best = zip(of_token.top_ids_i.tolist(), of_token.top_logprobs_i.tolist(), strict=True)
        named = {token_id: of_token.logprob, **dict(best)}
        found.append(
            {
                str(one): {"logprob": logprob, "decoded_token": texts.name(one)}
                for one, logprob in named.items()
            }
        )
    return found
