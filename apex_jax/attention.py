"""Paged attention on the device in plain XLA: append, decode, prefill.

Owns the arithmetic over one layer's pages `[p, k, z, h]`; scores and sums are float32. Whatever
lies in unused slots, NaN included, does not reach a result. Refuses nothing: shapes are the stages'
business.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

CONTEXT_STEP_PAGES = 16  # pages of context per step of a prefill: bounds the scores held at once


def append_kv(
    pages_pkzh: Float[Array, "p k z h"],
    new_ikh: Float[Array, "i k h"],
    page_ids_i: Int[Array, "i"],
    slots_i: Int[Array, "i"],
) -> Float[Array, "p k z h"]:
    """Write one token's keys (or values) per row; rows whose page id is p are dropped."""
    return pages_pkzh.at[page_ids_i, :, slots_i].set(new_ikh, mode="drop")


def decode_attention(
    q_bnh: Float[Array, "b n h"],
    k_pages_pkzh: Float[Array, "p k z h"],
    v_pages_pkzh: Float[Array, "p k z h"],
    block_pages_cm: Int[Array, "c m"],
    block_rows_c: Int[Array, "c"],
    block_lengths_c: Int[Array, "c"],
) -> Float[Array, "b n h"]:
    """Attend one query per row to the row's own blocks of pages.

    The KV of the whole batch is one flat list of blocks of m pages, so that the work follows the
    tokens held and not the longest row. block_rows_c: the row a block belongs to, ascending; b for
    padding. block_lengths_c: tokens used in the block. A row's softmax is put together from its
    blocks' partial sums (the split of flash decoding).
    """
    b, n, h = q_bnh.shape
    c, m = block_pages_cm.shape
    k_heads, z = k_pages_pkzh.shape[1:3]
    q_ckgh = q_bnh.reshape(b, k_heads, n // k_heads, h).at[block_rows_c].get(mode="clip")
    used_cz = jnp.arange(m * z)[None, :] < block_lengths_c[:, None]
    k_cmkzh = k_pages_pkzh.at[block_pages_cm].get(mode="clip")
    v_cmkzh = _gather_used(v_pages_pkzh, block_pages_cm, used_cz)

    scores_ckgz = jnp.einsum(
        "ckgh,cmkzh->ckgmz", q_ckgh, k_cmkzh, preferred_element_type=jnp.float32
    ).reshape(c, k_heads, n // k_heads, m * z)
    mask = used_cz[:, None, None, :]
    scores_ckgz = jnp.where(mask, scores_ckgz * h**-0.5, -jnp.inf)
    max_bkg = jax.ops.segment_max(scores_ckgz.max(-1), block_rows_c, b, indices_are_sorted=True)
    # A padding row has no block and a maximum of -inf; its weights must not become NaN.
    max_bkg = jnp.where(jnp.isfinite(max_bkg), max_bkg, 0.0)
    max_ckg = max_bkg.at[block_rows_c].get(mode="clip")
    weights_ckgz = jnp.exp(scores_ckgz - max_ckg[..., None])
    sums_bkg = jax.ops.segment_sum(weights_ckgz.sum(-1), block_rows_c, b, indices_are_sorted=True)
    partial_ckgh = jnp.einsum(
        "ckgmz,cmkzh->ckgh",
        weights_ckgz.reshape(c, k_heads, n // k_heads, m, z).astype(v_cmkzh.dtype),
        v_cmkzh,
        preferred_element_type=jnp.float32,
    )
    attended_bkgh = jax.ops.segment_sum(partial_ckgh, block_rows_c, b, indices_are_sorted=True)
    attended_bkgh = attended_bkgh / jnp.maximum(sums_bkg, 1e-30)[..., None]
    return attended_bkgh.reshape(b, n, h).astype(q_bnh.dtype)


def prefill_attention(
    q_btnh: Float[Array, "b t n h"],
    k_pages_pkzh: Float[Array, "p k z h"],
    v_pages_pkzh: Float[Array, "p k z h"],
    block_table_bm: Int[Array, "b m"],
    starts_b: Int[Array, "b"],
    lengths_b: Int[Array, "b"],
) -> Float[Array, "b t n h"]:
    """Attend a chunk of queries per row causally to the pages of its sequence, itself included.

    starts_b: index of each chunk's first token. lengths_b: tokens of the chunk, the queries after
    them being padding; 0 for a padding row. The context (all m pages of the table) is walked in
    steps of a few pages with a running softmax; how many is known when the program is compiled.
    """
    b, t, n, h = q_btnh.shape
    k_heads, z = k_pages_pkzh.shape[1:3]
    step_pages = min(CONTEXT_STEP_PAGES, block_table_bm.shape[1])
    num_steps = -(-block_table_bm.shape[1] // step_pages)
    padding = num_steps * step_pages - block_table_bm.shape[1]
    table_bsm = jnp.pad(block_table_bm, ((0, 0), (0, padding))).reshape(b, num_steps, step_pages)
    q_bkgth = q_btnh.reshape(b, t, k_heads, n // k_heads, h).transpose(0, 2, 3, 1, 4)
    query_index_bt = starts_b[:, None] + jnp.arange(t)[None, :]
    ends_b1 = (starts_b + lengths_b)[:, None]

    def step(carry, step_index_and_pages):
        max_bkgt, sum_bkgt, attended_bkgth = carry
        step_index, pages_bm = step_index_and_pages
        kv_index_s = step_index * step_pages * z + jnp.arange(step_pages * z)
        used_bs = kv_index_s[None, :] < ends_b1
        is_past_bts = kv_index_s[None, None, :] <= query_index_bt[:, :, None]
        visible_bts = is_past_bts & used_bs[:, None, :]
        k_bmkzh = k_pages_pkzh.at[pages_bm].get(mode="clip")
        v_bmkzh = _gather_used(v_pages_pkzh, pages_bm, used_bs)
        scores = jnp.einsum(
            "bkgth,bmkzh->bkgtmz", q_bkgth, k_bmkzh, preferred_element_type=jnp.float32
        ).reshape(*max_bkgt.shape, step_pages * z)
        scores = jnp.where(visible_bts[:, None, None], scores * h**-0.5, -jnp.inf)
        new_max = jnp.maximum(max_bkgt, scores.max(-1))
        rescale = jnp.exp(max_bkgt - new_max)
        weights = jnp.exp(scores - new_max[..., None])
        partial = jnp.einsum(
            "bkgtmz,bmkzh->bkgth",
            weights.reshape(*max_bkgt.shape, step_pages, z).astype(v_bmkzh.dtype),
            v_bmkzh,
            preferred_element_type=jnp.float32,
        )
        sums = sum_bkgt * rescale + weights.sum(-1)
        return (new_max, sums, attended_bkgth * rescale[..., None] + partial), None

    shape = q_bkgth.shape[:-1]
    start = (
        # Not -inf: a padding row sees nothing, and -inf less -inf is NaN.
        jnp.full(shape, jnp.finfo(jnp.float32).min, jnp.float32),
        jnp.zeros(shape, jnp.float32),
        jnp.zeros((*shape, h), jnp.float32),
    )
    steps = (jnp.arange(num_steps), table_bsm.transpose(1, 0, 2))
    (_, sum_bkgt, attended_bkgth), _ = jax.lax.scan(step, start, steps)
    attended_bkgth = attended_bkgth / jnp.maximum(sum_bkgt, 1e-30)[..., None]
    return attended_bkgth.transpose(0, 3, 1, 2, 4).reshape(b, t, n, h).astype(q_btnh.dtype)


def _gather_used(
    pages_pkzh: Float[Array, "p k z h"],
    page_ids_im: Int[Array, "i m"],
    used_is: Bool[Array, "i s"],
) -> Float[Array, "i m k z h"]:
    """Return pages of values with unused slots zeroed: their weight is 0, but 0 * NaN is NaN."""
    i, m = page_ids_im.shape
    z = pages_pkzh.shape[2]
    gathered = pages_pkzh.at[page_ids_im].get(mode="clip")
    used_imz = used_is.reshape(i, m, z)
    return jnp.where(used_imz[:, :, None, :, None], gathered, jnp.zeros((), pages_pkzh.dtype))
