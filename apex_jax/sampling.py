"""Choosing the next token of each row from its scores.

Owns the random numbers and the order of cuts: temperature, top-k, top-p, then Gumbel noise. The noise
of a token is a function of (request seed, sample index, position, token id) alone, so a row's choice does not
depend on its batch, on how the scores were searched, or on when it runs. Refuses nothing: parameters
are validated in request.py.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.extend.random import threefry2x32_p
from jaxtyping import Array, Float, Int, UInt32

NUM_CANDIDATES = 64  # a full sort of 128k scores costs a hundred times this top-k on XLA's CPU

# How much of the vocabulary a row needs; a batch does what its most demanding row needs.
CANDIDATES, ALL_UNSORTED, ALL_SORTED = 0, 1, 2


class SamplingRows(NamedTuple):
    """Sampling parameters of each row, as in request.SamplingParams; seeds as high and low words."""

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

    Searches the best NUM_CANDIDATES tokens, and the whole vocabulary only for rows whose cut may reach
    beyond them: exact either way.
    """
    num_candidates = min(NUM_CANDIDATES, logits_bv.shape[1])
    temperatures = jnp.where(rows.temperatures_b > 0, rows.temperatures_b, 1.0)
    scores_bv = logits_bv / temperatures[:, None]
    # The barrier keeps XLA from serving this search and the full sort below by one full sort.
    top_bc, ids_bc = jax.lax.optimization_barrier(jax.lax.top_k(scores_bv, num_candidates))
    log_total_b = jax.nn.logsumexp(scores_bv, axis=-1)

    is_greedy = rows.temperatures_b == 0
    has_small_k = (rows.top_ks_b > 0) & (rows.top_ks_b <= num_candidates)
    is_uncut = (rows.top_ks_b == 0) & (rows.top_ps_b >= 1)
    candidate_mass_b = jnp.exp(top_bc - log_total_b[:, None]).sum(-1)
    # Strictly more than top_p, by more than the rounding of the sum: then the cut lies within.
    nucleus_is_within = (rows.top_ks_b == 0) & (candidate_mass_b > rows.top_ps_b + 1e-5)
    levels_b = jnp.where(
        is_greedy | has_small_k | nucleus_is_within,
        CANDIDATES,
        jnp.where(is_uncut, ALL_UNSORTED, ALL_SORTED),
    )

    def from_candidates():
        return _draw_from_sorted(top_bc, ids_bc, log_total_b, rows)

    def from_all_unsorted():
        ids_bv = jnp.broadcast_to(jnp.arange(scores_bv.shape[1]), scores_bv.shape)
        drawn = greedy(scores_bv + token_noise(rows, ids_bv))
        return jnp.where(levels_b == ALL_UNSORTED, drawn, from_candidates())

    def from_all_sorted():
        sorted_bv, order_bv = jax.lax.top_k(scores_bv, scores_bv.shape[1])
        drawn = _draw_from_sorted(sorted_bv, order_bv, log_total_b, rows)
        return jnp.where(levels_b == ALL_SORTED, drawn, from_all_unsorted())

    drawn_b = jax.lax.switch(
        levels_b.max(), (from_candidates, from_all_unsorted, from_all_sorted)
    )
    return jnp.where(is_greedy, ids_bc[:, 0], drawn_b).astype(jnp.int32)


def _draw_from_sorted(
    scores_bc: Float[Array, "b c"],
    ids_bc: Int[Array, "b c"],
    log_total_b: Float[Array, "b"],
    rows: SamplingRows,
) -> Int[Array, "b"]:
    """Cut descending scores to top-k and top-p, and draw; the first token is always kept."""
    rank = jnp.arange(scores_bc.shape[1])[None, :]
    in_top_k = (rows.top_ks_b[:, None] == 0) | (rank < rows.top_ks_b[:, None])
    kept_bc = jnp.where(in_top_k, scores_bc, -jnp.inf)
    log_kept_b = jnp.where(rows.top_ks_b > 0, jax.nn.logsumexp(kept_bc, axis=-1), log_total_b)
    probabilities_bc = jnp.exp(kept_bc - log_kept_b[:, None])
    mass_before_bc = jnp.cumsum(probabilities_bc, axis=-1) - probabilities_bc
    in_top_p = (mass_before_bc < rows.top_ps_b[:, None]) | (rows.top_ps_b[:, None] >= 1)
    in_cut = in_top_k & (in_top_p | (rank == 0))
    noisy_bc = jnp.where(in_cut, scores_bc + token_noise(rows, ids_bc), -jnp.inf)
    best_b1 = jnp.argmax(noisy_bc, axis=-1, keepdims=True)
    return jnp.take_along_axis(ids_bc, best_b1, axis=1)[:, 0]


def token_noise(rows: SamplingRows, ids_bc: Int[Array, "b c"]) -> Float[Array, "b c"]:
    """Return Gumbel noise of each token id: threefry keyed by the row's seed, index and position."""
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
