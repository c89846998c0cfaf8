"""What changes the scores of a request's tokens before one is chosen: penalties, biases, masks.

Owns the entries that a head is sent: sparse, rebuilt from the tokens that were read, so a request
that is pre-empted, moved or resumed has nothing to restore. The newest token may still be on the
device alone; what depends on it is settled there. Imports no jax.
"""

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float32, Shaped

from apex_jax.request import RequestError, SamplingParams

ALWAYS = np.iinfo(np.int32).max  # as `after`; no vocabulary is so large
MASK = -np.inf  # as `bias`

# One change of one row's score. row: of the head's batch. token_id: whose score. count: how often
# the output has it. is_seen: whether prompt or output has it. bias: what is added. A mask has
# nothing else, and applies only where the row's last token is `after`. Of the others, a row has
# one entry a token at most.
ENTRY = np.dtype(
    [
        ("row", np.int32),
        ("token_id", np.int32),
        ("count", np.int32),
        ("is_seen", np.int32),
        ("bias", np.float32),
        ("after", np.int32),
    ]
)
NUM_ENTRY_FIELDS = 6
Entries = Shaped[np.ndarray, "e"]


@dataclass(frozen=True)
class RowChanges:
    """What changes the scores of one row for its next token.

    is_counting: penalties are to count the row's last token, which is on the device alone.
    """

    sampling: SamplingParams
    is_counting: bool
    entries_e: Entries


@dataclass(frozen=True)
class ModifierBatch:
    """The changes of all rows of a head, in the order of its rows; neutral for rows without any.

    is_counting_b: the last token of the row is yet to be counted. entries_e: of dtype ENTRY.
    """

    presence_penalties_b: Float32[np.ndarray, "b"]
    frequency_penalties_b: Float32[np.ndarray, "b"]
    repetition_penalties_b: Float32[np.ndarray, "b"]
    is_counting_b: Bool[np.ndarray, "b"]
    entries_e: Entries

    @staticmethod
    def neutral(num_rows: int) -> "ModifierBatch":
        """Return what changes nothing."""
        zeros_b, ones_b = np.zeros(num_rows, np.float32), np.ones(num_rows, np.float32)
        counting_b = np.zeros(num_rows, np.bool_)
        return ModifierBatch(zeros_b, zeros_b, ones_b, counting_b, np.zeros(0, ENTRY))

    @staticmethod
    def of(rows: Sequence[int], changes: Sequence[RowChanges | None]) -> "ModifierBatch | None":
        """Return the changes of the rows of a batch; None where no row has any."""
        if all(one is None for one in changes):
            return None
        plain = SamplingParams()
        sampling = [plain if one is None else one.sampling for one in changes]
        parts = [np.zeros(0, ENTRY) if one is None else one.entries_e for one in changes]
        entries_e = _concatenate(parts)
        entries_e["row"] = np.repeat(np.array(rows, np.int32), [len(part) for part in parts])
        return ModifierBatch(
            np.array([one.presence_penalty for one in sampling], np.float32),
            np.array([one.frequency_penalty for one in sampling], np.float32),
            np.array([one.repetition_penalty for one in sampling], np.float32),
            np.array([one is not None and one.is_counting for one in changes], np.bool_),
            entries_e,
        )

    def after(self, num_rows: int) -> "ModifierBatch":
        """Return the same where the batch begins `num_rows` rows later."""
        entries_e = self.entries_e.copy()
        entries_e["row"] += num_rows
        return dataclasses.replace(self, entries_e=entries_e)


def join_modifiers(batches: Sequence[ModifierBatch]) -> ModifierBatch:
    """Return the changes of several batches of rows as one, in their order."""
    columns = {
        field.name: np.concatenate([getattr(batch, field.name) for batch in batches])
        for field in dataclasses.fields(ModifierBatch)
        if field.name != "entries_e"
    }
    return ModifierBatch(**columns, entries_e=_concatenate([one.entries_e for one in batches]))


class Modifiers:
    """Of one request: its changes of scores, kept as its output grows.

    stop_token_ids: what would end the output, and may not before min_tokens.
    """

    def __init__(
        self,
        sampling: SamplingParams,
        prompt_token_ids: Sequence[int],
        stop_token_ids: frozenset[int],
    ):
        self._sampling = sampling
        self._places: dict[int, int] = {}
        self._entries = np.zeros(16, ENTRY)
        self._output: list[int] = []
        for token_id, bias in sampling.logit_bias.items():
            self._entry_of(token_id)["bias"] = bias
        self._is_counting = sampling.has_penalty
        if sampling.repetition_penalty != 1:
            for token_id in dict.fromkeys(prompt_token_ids):
                self._entry_of(token_id)["is_seen"] = True
        self._stops = _masks((stop, ALWAYS) for stop in sorted(stop_token_ids))
        words = [word for word in sampling.bad_words if not isinstance(word, str)]
        self._single_words = _masks((word[0], ALWAYS) for word in words if len(word) == 1)
        # By all but the last two tokens: the newest token decides, and may be unread.
        self._words: dict[tuple[int, ...], list[tuple[int, int]]] = {}
        for *before, newest, last in (word for word in words if len(word) > 1):
            self._words.setdefault(tuple(before), []).append((last, newest))
        self._lengths = sorted({len(before) for before in self._words})

    @staticmethod
    def of(
        sampling: SamplingParams,
        prompt_token_ids: Sequence[int],
        stop_token_ids: frozenset[int],
    ) -> "Modifiers | None":
        """Return those of a request; None where nothing changes its scores."""
        needs_stops = sampling.min_tokens > 0 and stop_token_ids
        if sampling.has_penalty or sampling.logit_bias or sampling.bad_words or needs_stops:
            return Modifiers(sampling, prompt_token_ids, stop_token_ids)
        return None

    def append(self, token_id: int) -> None:
        """Count a token of the output."""
        self._output.append(token_id)
        if self._is_counting:
            entry = self._entry_of(token_id)
            entry["count"] += 1
            entry["is_seen"] = True

    def changes(self, num_unread: int) -> RowChanges | None:
        """Return what changes the next token's scores; None where nothing does.

        num_unread: tokens of the output that were not appended yet, 0 or 1.
        """
        assert num_unread in (0, 1), "only the newest token is on the device"
        parts = [self._entries[: len(self._places)], self._single_words]
        if len(self._output) + num_unread < self._sampling.min_tokens:
            parts.append(self._stops)
        if self._words:
            parts.append(self._words_at_hand(has_unread=num_unread == 1))
        entries_e = _concatenate(parts)
        is_counting = self._is_counting and num_unread == 1
        if not is_counting and not len(entries_e):
            return None
        return RowChanges(self._sampling, is_counting, entries_e)

    def _words_at_hand(self, *, has_unread: bool) -> Entries:
        """Mask the last tokens of bad words whose others but the newest stand at the end."""
        known = self._output if has_unread else self._output[:-1]
        found: list[tuple[int, int]] = []
        for length in self._lengths:
            if length > len(known):
                break
            before = tuple(known[len(known) - length :])
            found += self._words.get(before, ())
        if has_unread:
            return _masks(found)
        newest = self._output[-1:]
        return _masks((last, ALWAYS) for last, after in found if newest == [after])

    def _entry_of(self, token_id: int) -> np.void:
        """Return the entry of a token, which may be new."""
        place = self._places.setdefault(token_id, len(self._places))
        if place == len(self._entries):
            self._entries = np.concatenate([self._entries, np.zeros_like(self._entries)])
        entry = self._entries[place]
        entry["token_id"], entry["after"] = token_id, ALWAYS
        return entry


def check_modifiers(
    sampling: SamplingParams, stop_token_ids: frozenset[int], vocab_size: int
) -> None:
    """Raise RequestError where a request names what is no token, or leaves none to choose."""
    named = [("logit_bias", token_id) for token_id in sampling.logit_bias]
    banned = set(stop_token_ids if sampling.min_tokens else ())
    for word in sampling.bad_words:
        if isinstance(word, str):
            raise RequestError(f"bad_words has the text {word!r}; the engine takes token ids")
        named += [("bad_words", token_id) for token_id in word]
        banned.add(word[-1])
    for name, token_id in named:
        if token_id >= vocab_size:
            raise RequestError(
                f"{name} has token id {token_id}, which is outside the vocabulary "
                f"(0 to {vocab_size - 1})"
            )
    if banned.issuperset(range(vocab_size)):
        raise RequestError("bad_words and min_tokens leave no token to choose")


def _concatenate(parts: Sequence[Shaped[np.ndarray, "_"]]) -> Entries:
    """Return entries as one array; as words, since NumPy copies records one by one."""
    return np.concatenate([part.view(np.int32) for part in parts]).view(ENTRY)


def _masks(pairs: Iterable[tuple[int, int]]) -> Entries:
    """Return entries that take out tokens: pairs of token and `after`."""
    return np.array([(0, token_id, 0, 0, MASK, after) for token_id, after in pairs], ENTRY)
