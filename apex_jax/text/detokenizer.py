"""What the tokens of an output add to the text of its prompt, as they come.

Owns the two difficulties: a character may take several tokens, of which the first may end the
prompt, and many tokenizers drop the space before the first word of what they decode. So tokens are
decoded behind some of those before them, and what ends within a character waits for its rest.
"""

from apex_jax.text.tokenizer import Tokenizer

# Prompt tokens decoded before an output so that its first token keeps a leading space. One token
# with text would do; eight also carry the longest UTF-8 character, split into single bytes.
CONTEXT_TOKENS = 8
# Tokens that wait for the rest of a character. It has four bytes; the limit keeps the cost of a
# long run of stray bytes linear.
MAX_WAITING = 16

_REPLACEMENT = "\ufffd"  # what decoders put where bytes do not make a character (yet)


class Detokenizer:
    """The text of one output, piece by piece."""

    def __init__(self, tokenizer: Tokenizer, prompt_token_ids: tuple[int, ...]) -> None:
        self._tokenizer = tokenizer
        # Tokens that are decoded together. The text of the first `_num_given` is `_prefix`, and
        # given out already; what a prompt ends with of a character is `_owned` by the prompt.
        self._window = _context(tokenizer, prompt_token_ids)
        self._num_given = len(self._window)
        self._prefix = tokenizer.decode(self._window)
        self._owned = ""
        if self._prefix.endswith(_REPLACEMENT):
            self._reopen_character()

    def push(self, *token_ids: int) -> str:
        """Take tokens and return the text that is certain now; it may be none."""
        self._window += [one for one in token_ids if self._tokenizer.has_text(one)]
        return self._take(is_last=False)

    def flush(self) -> str:
        """Return the rest after the last token: U+FFFD for the bytes of an unfinished character."""
        return self._take(is_last=True)

    def _reopen_character(self) -> None:
        """Go back before the character whose first bytes end the prompt, if there is one."""
        for num_tokens in range(1, min(3, len(self._window)) + 1):
            head = self._tokenizer.decode(self._window[:-num_tokens])
            if not head.endswith(_REPLACEMENT):
                self._owned = self._tokenizer.decode(self._window[-num_tokens:])
                self._num_given -= num_tokens
                self._prefix = head
                return

    def _take(self, *, is_last: bool) -> str:
        text = self._tokenizer.decode(self._window)
        num_waiting = len(self._window) - self._num_given
        if text.endswith(_REPLACEMENT) and num_waiting < MAX_WAITING and not is_last:
            return ""
        if text.startswith(self._prefix):
            piece = text[len(self._prefix) :]
        else:
            # Some decoders spoil a character by a stray byte after it.
            piece = self._tokenizer.decode(self._window[self._num_given :])
        piece = piece[_num_common(piece, self._owned) :]
        if piece:  # else the window still needs its first token, which has text
            del self._window[: self._num_given]
            self._num_given = len(self._window)
            self._prefix = self._tokenizer.decode(self._window)
            self._owned = ""
        return piece


def decode_output(
    tokenizer: Tokenizer, prompt_token_ids: tuple[int, ...], token_ids: tuple[int, ...]
) -> str:
    """Return what a Detokenizer gives for all tokens of an output, at less cost."""
    whole = Detokenizer(tokenizer, prompt_token_ids)
    text = whole.push(*token_ids) + whole.flush()
    if _REPLACEMENT not in text:
        return text
    # Decoded at once, a stray byte may have spoilt its neighbours.
    stream = Detokenizer(tokenizer, prompt_token_ids)
    return "".join([stream.push(one) for one in token_ids]) + stream.flush()


def _context(tokenizer: Tokenizer, prompt_token_ids: tuple[int, ...]) -> list[int]:
    """Return the shortest tail of the prompt, of 8, 16, 32 ... tokens, that has any text."""
    length = CONTEXT_TOKENS
    while True:
        tail = [one for one in prompt_token_ids[-length:] if tokenizer.has_text(one)]
        is_whole = length >= len(prompt_token_ids)
        if is_whole or tokenizer.decode(tail).strip(_REPLACEMENT):
            return tail
        length *= 2


def _num_common(one: str, other: str) -> int:
    """Return how many characters two texts have in common at their beginnings."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(one), len(other)))
