"""What a step of many sequences reads and writes, in columns by slot.

Owns, of each sequence that has a slot, how far it has come, the tokens that were read, and how they
are chosen: a sweep in which nobody comes, ends or wants a page costs a few array operations,
however many take a step. Written by Sequence and by the scheduler's parts. Imports no jax.
"""

import numpy as np
from jaxtyping import Int32, Int64

from apex_jax.plan import SAMPLING, sampling_columns
from apex_jax.request import SamplingParams

MAX_STOPS = 4  # stop tokens of a sequence that are looked for all at once; most have one or two
NOBODY = -1  # as owner; also no token


class SlotTable:
    """Columns; what a slot without an owner has in them means nothing.

    owner_s: index of the sequence that the slot belongs to, NOBODY's from when it has ended or
    given its slot back. num_tokens_s, num_computed_s: as in Sequence. num_read_s: tokens of prompt
    and output that are known. num_host_tokens_s: of the output, those that the host attended for.
    max_num_tokens_s: where it ends at the latest. last_step_s: as in Sequence. sampling_s: of dtype
    SAMPLING. stops_sk: tokens that may end it, the rest NOBODY. is_watched_s: each of its tokens
    wants a look (it has more stop tokens than that, say). is_modified_s: something changes scores.
    """

    def __init__(self, num_slots: int, max_model_len: int):
        self.num_slots = num_slots
        self.owner_s = np.full(num_slots, NOBODY, np.int64)
        self.num_tokens_s = np.zeros(num_slots, np.int32)
        self.num_computed_s = np.zeros(num_slots, np.int32)
        self.num_read_s = np.zeros(num_slots, np.int32)
        self.num_host_tokens_s = np.zeros(num_slots, np.int32)
        self.max_num_tokens_s = np.zeros(num_slots, np.int32)
        self.last_step_s = np.zeros(num_slots, np.int64)
        self.sampling_s = np.zeros(num_slots, SAMPLING)
        self.stops_sk = np.full((num_slots, MAX_STOPS), NOBODY, np.int32)
        self.is_watched_s = np.zeros(num_slots, np.bool_)
        self.is_modified_s = np.zeros(num_slots, np.bool_)
        self._num_prompt_s = np.zeros(num_slots, np.int32)
        # By place in the output. Memory is taken where it is first written to.
        self._outputs_so = np.zeros((num_slots, max_model_len), np.int32)

    def enter(
        self,
        slot: int,
        owner: int,
        *,
        num_prompt_tokens: int,
        num_tokens: int,
        num_host_tokens: int,
        max_num_tokens: int,
        sampling: SamplingParams,
        stop_token_ids: frozenset[int],
        is_modified: bool,
        is_watched: bool,
    ) -> None:
        """Let a slot belong to a sequence, all of whose tokens are known."""
        self.owner_s[slot] = owner
        self._num_prompt_s[slot] = num_prompt_tokens
        self.num_tokens_s[slot] = self.num_read_s[slot] = num_tokens
        self.num_computed_s[slot] = self.last_step_s[slot] = 0
        self.num_host_tokens_s[slot] = num_host_tokens
        self.max_num_tokens_s[slot] = max_num_tokens
        self.sampling_s[slot] = sampling_columns([sampling])[0]
        has_many_stops = len(stop_token_ids) > MAX_STOPS
        self.stops_sk[slot] = NOBODY
        if not has_many_stops:
            self.stops_sk[slot, : len(stop_token_ids)] = list(stop_token_ids)
        self.is_modified_s[slot] = is_modified
        self.is_watched_s[slot] = is_watched or has_many_stops

    def disown(self, slot: int) -> None:
        """Expect no more tokens for a slot's sequence."""
        self.owner_s[slot] = NOBODY

    def plan_tokens(self, slots_b: Int32[np.ndarray, "b"]) -> Int32[np.ndarray, "b"]:
        """Let a token more of each be sampled; return its place in the output."""
        num_tokens_b = self.num_tokens_s[slots_b]
        self.num_tokens_s[slots_b] = num_tokens_b + 1
        return num_tokens_b - self._num_prompt_s[slots_b]

    def take_tokens(
        self,
        slots_b: Int32[np.ndarray, "b"],
        places_b: Int32[np.ndarray, "b"],
        tokens_b: Int32[np.ndarray, "b"],
        *,
        is_of_host: bool,
    ) -> None:
        """Keep a token of each that was read."""
        self._outputs_so[slots_b, places_b] = tokens_b
        self.num_read_s[slots_b] += 1
        if is_of_host:
            self.num_host_tokens_s[slots_b] += 1

    def read_tokens(self, slot: int, first: int) -> list[int]:
        """Return what was read of a sequence from token `first` on, one of its output."""
        num_prompt, num_read = self._num_prompt_s.item(slot), self.num_read_s.item(slot)
        return self._outputs_so[slot, first - num_prompt : num_read - num_prompt].tolist()

    def is_owned(
        self, slots_b: Int32[np.ndarray, "b"], owners_b: Int64[np.ndarray, "b"]
    ) -> np.ndarray:
        """Return of each whether its slot still belongs to it."""
        return (self.owner_s[slots_b] == owners_b) & (owners_b != NOBODY)
