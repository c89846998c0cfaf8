"""Choosing the next token of each row from its scores.

Owns the random numbers and the order of what happens to scores, which is vLLM's: biases, penalties
and masks; then temperature, min-p, top-k, top-p and Gumbel noise. The noise of a token is a
function of (request seed, sample index, position, token id) alone, so a row's choice does not
depend on its batch, on how the scores were searched, or on when it runs. Refuses nothing:
parameters are validated in request.py.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.extend.random import threefry2x32_p
from jaxtyping import Array, Bool, Float, Int, UInt32

from apex_jax.modifiers import ALWAYS, MASK
from apex_jax.request import MAX_LOGPROBS

NUM_CANDIDATES = (
    64  # the best of 128k scores come at a hundredth of the cost of all of them in order
)

# How much of the vocabulary a row needs; a batch does what its most demanding row needs.
CANDIDATES, WHOLE_UNCUT, WHOLE_CUT = 0, 1, 2


class SamplingRows(NamedTuple):
    """Parameters of each row, as in request.SamplingParams; seeds as high and low words."""

    temperatures_b: Float[Array, "b"]
    top_ks_b: Int[Array, "b"]
    top_ps_b: Float[Array, "b"]
    min_ps_b: Float[Array, "b"]
    seeds_b2: UInt32[Array, "b 2"]
    sample_indices_b: Int[Array, "b"]
    positions_b: Int[Array, "b"]


class ModifierRows(NamedTuple):
    """Penalties of each row; is_counting_b: its last token is in no entry's count."""

    presence_penalties_b: Float[Array, "b"]
    frequency_penalties_b: Float[Array, "b"]
    repetition_penalties_b: Float[Array, "b"]
    is_counting_b: Bool[Array, "b"]


class ModifierEntries(NamedTuple):
    """Changes of single scores, as in modifiers.ENTRY; those of rows past the end are padding."""

    rows_e: Int[Array, "e"]
    token_ids_e: Int[Array, "e"]
    counts_e: Int[Array, "e"]
    is_seen_e: Bool[Array, "e"]
    biases_e: Float[Array, "e"]
    afters_e: Int[Array, "e"]


class Logprobs(NamedTuple):
    """Logarithms of probabilities: of the chosen token, and of the best ones, best first."""

    chosen_b: Float[Array, "b"]
    top_ids_bi: Int[Array, "b i"]
    top_bi: Float[Array, "b i"]


def modify(
    logits_bv: Float[Array, "b v"],
    last_tokens_b: Int[Array, "b"],
    rows: ModifierRows,
    entries: ModifierEntries,
) -> Float[Array, "b v"]:
    """Return scores with biases added, penalties taken off, and masked tokens at minus infinity.

    last_tokens_b: of each row, counted here where the entries could not count it. Only the scores
    that entries name are touched, and that of the last token.
    """
    num_rows = len(logits_bv)
    beyond = jnp.iinfo(jnp.int32).max
    is_mask_e = entries.biases_e == MASK
    last_e = last_tokens_b.at[entries.rows_e].get(mode="clip")
    is_counting_e = rows.is_counting_b.at[entries.rows_e].get(mode="fill", fill_value=False)
    is_last_e = is_counting_e & ~is_mask_e & (entries.token_ids_e == last_e)
    # A last token that has an entry is counted in it, one that has none gets one.
    num_entries_b = jnp.zeros(num_rows, jnp.int32)
    num_entries_b = num_entries_b.at[entries.rows_e].add(is_last_e.astype(jnp.int32), mode="drop")
    is_new_b = rows.is_counting_b & (num_entries_b == 0)

    rows_i = jnp.concatenate(
        [
            jnp.where(is_mask_e, beyond, entries.rows_e),
            jnp.where(is_new_b, jnp.arange(num_rows), beyond),
        ]
    )
    ids_i = jnp.concatenate([entries.token_ids_e, last_tokens_b])
    counts_i = jnp.concatenate(
        [entries.counts_e + is_last_e.astype(jnp.int32), is_new_b.astype(jnp.int32)]
    )
    is_seen_i = jnp.concatenate([entries.is_seen_e | is_last_e, is_new_b])
    biases_i = jnp.concatenate([entries.biases_e, jnp.zeros(num_rows)])

    of_row = lambda values_b: values_b.at[rows_i].get(mode="clip")  # noqa: E731
    scores_i = logits_bv.at[rows_i, ids_i].get(mode="clip") + biases_i
    repetition_i = jnp.where(is_seen_i, of_row(rows.repetition_penalties_b), 1.0)
    scores_i = jnp.where(scores_i > 0, scores_i / repetition_i, scores_i * repetition_i)
    scores_i -= of_row(rows.frequency_penalties_b) * counts_i.astype(jnp.float32)
    scores_i -= jnp.where(counts_i > 0, of_row(rows.presence_penalties_b), 0.0)
    modified_bv = logits_bv.at[rows_i, ids_i].set(scores_i, mode="drop")

    is_on_e = is_mask_e & ((entries.afters_e == ALWAYS) | (entries.afters_e == last_e))
    masked_rows_e = jnp.where(is_on_e, entries.rows_e, beyond)
    return modified_bv.at[masked_rows_e, entries.token_ids_e].set(MASK, mode="drop")


def logprobs(logits_bv: Float[Array, "b v"], tokens_b: Int[Array, "b"]) -> Logprobs:
    """Return those of chosen tokens and of the MAX_LOGPROBS best ones (or all, if fewer)."""
    log_totals_b1 = jax.nn.logsumexp(logits_bv, axis=-1, keepdims=True)
    chosen_b1 = jnp.take_along_axis(logits_bv, tokens_b[:, None], axis=1) - log_totals_b1
    top_bi, ids_bi = jax.lax.top_k(logits_bv, min(MAX_LOGPROBS, logits_bv.shape[1]))
    return Logprobs(chosen_b1[:, 0], ids_bi, top_bi - log_totals_b1)


def greedy(logits_bv: Float[Array, "b v"]) -> Int[Array, "b"]:
    """Return the best token of each row; of equals the first."""
    return jnp.argmax(logits_bv, axis=-1).astype(jnp.int32)


def sample(logits_bv: Float[Array, "b v"], rows: SamplingRows) -> Int[Array, "b"]:
    """Return a token per row, drawn from its cut distribution; greedy where the temperature is 0.

    Searches the best NUM_CANDIDATES tokens, and the whole vocabulary only for rows whose cut may
    reach beyond them: exact either way. Scores equal to the last one kept are kept too.
    """
    vocab = logits_bv.shape[1]
    is_greedy = rows.temperatures_b == 0
    temperatures_b1 = jnp.where(is_greedy, 1.0, jnp.maximum(rows.temperatures_b, 1e-30))[:, None]
    # The best score is 0: dividing by a tiny temperature then sends only the others to infinity.
    scores_bv = (logits_bv - logits_bv.max(-1, keepdims=True)) / temperatures_b1
    lowest_by_min_p_b1 = jnp.log(rows.min_ps_b)[:, None]
    scores_bv = jnp.where(scores_bv >= lowest_by_min_p_b1, scores_bv, -jnp.inf)
    rows = rows._replace(top_ks_b=jnp.where(rows.top_ks_b < vocab, rows.top_ks_b, 0))
    num_candidates = min(NUM_CANDIDATES, vocab)
    top_bc, ids_bc = jax.lax.top_k(scores_bv, num_candidates)
    log_total_b = jax.nn.logsumexp(scores_bv, axis=-1)

    has_small_k = (rows.top_ks_b > 0) & (rows.top_ks_b < num_candidates)
    is_uncut = (rows.top_ks_b == 0) & (rows.top_ps_b >= 1)
    mass_b = jnp.exp(top_bc - log_total_b[:, None]).sum(-1)
    # More than top_p by more than the sum's rounding: then the cut lies within.
    nucleus_is_within = (rows.top_ks_b == 0) & (mass_b > rows.top_ps_b + 1e-5)
    lowest_of_candidates_b1 = _lowest_kept_of_sorted(top_bc, log_total_b, rows)
    # What equals the last candidate may go on beyond it (half precision has few distinct scores).
    # Not top_bc[:, -1]: where a slice of top_k is sliced again, XLA's CPU sorts everything instead.
    last_b = top_bc.min(-1)
    holds_all_kept = lowest_of_candidates_b1[:, 0] > last_b
    # Where the last candidate is out by min-p (or a mask), so are all beyond it.
    holds_all_left = last_b == -jnp.inf
    levels_b = jnp.where(
        is_greedy | ((has_small_k | nucleus_is_within) & holds_all_kept) | holds_all_left,
        CANDIDATES,
        jnp.where(is_uncut, WHOLE_UNCUT, WHOLE_CUT),
    )

    def from_candidates() -> Int[Array, "b"]:
        best_b1 = _draw(top_bc, ids_bc, lowest_of_candidates_b1, rows)[:, None]
        return jnp.take_along_axis(ids_bc, best_b1, axis=1)[:, 0]

    def from_whole(lowest_b1: Float[Array, "b 1"]) -> Int[Array, "b"]:
        ids_bv = jnp.broadcast_to(jnp.arange(vocab), scores_bv.shape)
        drawn_b = _draw(scores_bv, ids_bv, lowest_b1, rows)
        return jnp.where(levels_b == CANDIDATES, from_candidates(), drawn_b)

    drawn_b = jax.lax.switch(
        levels_b.max(),
        (
            from_candidates,
            lambda: from_whole(jnp.full_like(temperatures_b1, -jnp.inf)),
            lambda: from_whole(_lowest_kept(scores_bv, rows)),
        ),
    )
    return jnp.where(is_greedy, greedy(logits_bv), drawn_b.astype(jnp.int32))


def _draw(
    scores_bc: Float[Array, "b c"],
    ids_bc: Int[Array, "b c"],
    lowest_b1: Float[Array, "b 1"],
    rows: SamplingRows,
) -> Int[Array, "b"]:
    """Return the column of each row's draw among scores of at least the lowest kept."""
    noisy_bc = scores_bc + token_noise(rows, ids_bc)
    return jnp.argmax(jnp.where(scores_bc >= lowest_b1, noisy_bc, -jnp.inf), axis=-1)


def _lowest_kept_of_sorted(
    top_bc: Float[Array, "b c"], log_total_b: Float[Array, "b"], rows: SamplingRows
) -> Float[Array, "b 1"]:
    """Return the lowest of the candidates, which are in order, that survives top-k and top-p."""
    top_ks_b1, top_ps_b1 = rows.top_ks_b[:, None], rows.top_ps_b[:, None]
    kth_b1 = jnp.clip(top_ks_b1 - 1, 0, top_bc.shape[1] - 1)
    in_top_k = (top_ks_b1 == 0) | (top_bc >= jnp.take_along_axis(top_bc, kth_b1, axis=1))
    kept_bc = jnp.where(in_top_k, top_bc, -jnp.inf)
    log_kept_b = jnp.where(rows.top_ks_b > 0, jax.nn.logsumexp(kept_bc, axis=-1), log_total_b)
    probabilities_bc = jnp.exp(kept_bc - log_kept_b[:, None])
    mass_before_bc = jnp.cumsum(probabilities_bc, axis=-1) - probabilities_bc
    # The best one is always kept; and a sum that rounds to 1 early cuts nothing where top_p is 1.
    in_top_p = (
        (mass_before_bc < top_ps_b1) | (top_ps_b1 >= 1) | (top_bc == top_bc.max(-1, keepdims=True))
    )
    return jnp.where(in_top_k & in_top_p, top_bc, jnp.inf).min(-1, keepdims=True)


def _lowest_kept(scores_bv: Float[Array, "b v"], rows: SamplingRows) -> Float[Array, "b 1"]:
    """Return the lowest score that survives top-k and top-p, found without sorting.

    Floats are mapped to integers of the same order, and the threshold's bits are settled one by one
    from the top, by counting (top-k) or weighing (top-p) what lies at or above: 64 passes over the
    scores.
    """
    bits_bv = jax.lax.bitcast_convert_type(scores_bv, jnp.uint32)
    sign = jnp.uint32(1 << 31)
    keys_bv = jnp.where(bits_bv >= sign, ~bits_bv, bits_bv | sign)

    def highest_threshold(
        weights_bv: Float[Array, "b v"], target_b1: Float[Array, "b 1"]
    ) -> UInt32[Array, "b 1"]:
        def settle_bit(step: Int[Array, ""], threshold_b1: UInt32[Array, "b 1"]):
            raised_b1 = threshold_b1 | (sign >> step.astype(jnp.uint32))
            above_b1 = jnp.where(keys_bv >= raised_b1, weights_bv, 0).sum(-1, keepdims=True)
            return jnp.where(above_b1 >= target_b1, raised_b1, threshold_b1)

        start_b1 = jnp.zeros(target_b1.shape, jnp.uint32)
        return jax.lax.fori_loop(0, 32, settle_bit, start_b1)

    top_k_b1 = highest_threshold(
        jnp.ones_like(scores_bv), rows.top_ks_b[:, None].astype(jnp.float32)
    )
    top_k_b1 = jnp.where(rows.top_ks_b[:, None] > 0, top_k_b1, 0)
    weights_bv = jnp.exp(scores_bv - scores_bv.max(-1, keepdims=True))
    weights_bv = jnp.where(keys_bv >= top_k_b1, weights_bv, 0)
    target_b1 = weights_bv.sum(-1, keepdims=True) * jnp.minimum(rows.top_ps_b[:, None], 1)
    top_p_b1 = jnp.where(rows.top_ps_b[:, None] < 1, highest_threshold(weights_bv, target_b1), 0)
    # A top_p that rounds to 0 is met above the best score, which is kept all the same.
    lowest_b1 = jnp.minimum(jnp.maximum(top_k_b1, top_p_b1), keys_bv.max(-1, keepdims=True))
    is_kept = keys_bv >= lowest_b1
    return jnp.where(is_kept, scores_bv, jnp.inf).min(-1, keepdims=True)


def token_noise(rows: SamplingRows, ids_bc: Int[Array, "b c"]) -> Float[Array, "b c"]:
    """Return Gumbel noise of each id: threefry keyed by the row's seed, index and position."""
    as_word = lambda x: x.astype(jnp.uint32)  # noqa: E731
    key_high, key_low = threefry2x32_p.bind(
        rows.seeds_b2[:, 0],
        rows.seeds_b2[:, 1],
        as_word(rows.sample_indices_b),
        as_word(rows.positions_b),
    )
    shape = ids_bc.shape
    bits, _ = threefry2x32_p.bind(
        jnp.broadcast_to(key_high[:, None], shape),
        jnp.broadcast_to(key_low[:, None], shape),
        as_word(ids_bc),
        jnp.zeros(shape, jnp.uint32),
    )
    # The midpoints of 2^23 equal steps: exact in float32, and neither 0 nor 1.
    uniform = ((bits >> 9).astype(jnp.float32) + 0.5) * 2.0**-23
    return -jnp.log(-jnp.log(uniform))
