"""Choosing the next token of each row from its scores.

Owns the random numbers and the order of cuts: temperature, top-k, top-p, then Gumbel noise. The
noise of a token is a function of (request seed, sample index, position, token id) alone, so a row's
choice does not depend on its batch, on how the scores were searched, or on when it runs. Refuses
nothing: parameters are validated in request.py.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.extend.random import threefry2x32_p
from jaxtyping import Array, Float, Int, UInt32

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
    seeds_b2: UInt32[Array, "b 2"]
    sample_indices_b: Int[Array, "b"]
    positions_b: Int[Array, "b"]


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
    holds_all_kept = (lowest_of_candidates_b1[:, 0] > last_b) | (last_b == -jnp.inf)
    levels_b = jnp.where(
        is_greedy | ((has_small_k | nucleus_is_within) & holds_all_kept),
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
