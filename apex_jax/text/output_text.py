"""The text of one output while it grows, and the stop string that ends it.

Where an output ends depends on its text alone, not on how tokens cut it: at the stop string that is
complete first, the longest of those that are complete at once.
"""

from apex_jax.text.detokenizer import Detokenizer
from apex_jax.text.tokenizer import Tokenizer


class OutputText:
    """Watches an output of which each token is pushed once, in order.

    text: what is certain so far, cut where a stop string ended it. stop_string: the one that did.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompt_token_ids: tuple[int, ...],
        stop: tuple[str, ...],
        *,
        include_stop: bool,
        min_tokens: int = 0,
    ) -> None:
        """include_stop: leave the stop string in the text. min_tokens: those that end nothing.

        A stop string that is a special token's ends the output at that token, which has no text.
        """
        self._detokenizer = Detokenizer(tokenizer, prompt_token_ids)
        self._stop, self._include_stop = stop, include_stop
        ids = tokenizer.special_ids
        self._num_free = min_tokens
        self._special = {ids[one]: one for one in stop if one in ids}
        self.text = ""
        self.stop_string: str | None = None

    def push(self, token_id: int) -> bool:
        """Take the next token; True if a stop string is complete with it."""
        if self._num_free:
            self._num_free -= 1
            self.text += self._detokenizer.push(token_id)
            return False
        self.stop_string = self._special.get(token_id)
        if self.stop_string is None:
            self._add(self._detokenizer.push(token_id))
        return self.stop_string is not None

    def end(self) -> str:
        """Return the whole text once no token follows."""
        if self.stop_string is None:
            self.text += self._detokenizer.flush()
        return self.text

    def _add(self, piece: str) -> None:
        if not piece:
            return
        num_old = len(self.text)
        self.text += piece
        # (where it ends, where it begins, which): the first is complete first, then the longest.
        found: list[tuple[int, int, str]] = []
        for stop in self._stop:
            begin = self.text.find(stop, max(0, num_old - len(stop) + 1))
            if begin >= 0:
                found.append((begin + len(stop), begin, stop))
        if found:
            end, begin, self.stop_string = min(found)
            self.text = self.text[: end if self._include_stop else begin]
