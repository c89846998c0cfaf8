"""Paged attention on the device in plain XLA: append, decode, prefill.

Owns the arithmetic over one layer's pages `[p, k, z, h]`; scores and sums are float32. Whatever
lies in unused slots, NaN included, does not reach a result. Refuses nothing: shapes are the stages'
business.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

CONTEXT_STEP_PAGES = 16  # pages of context per step of a prefill: bounds the scores held at once

# Yields keys and values [i, m, k, z, h] of pages [i, m]; values of unused tokens [i, m * z] are 0.
GatherPages = Callable[
    [Int[Array, "i m"], Bool[Array, "i s"]],
    tuple[Float[Array, "i m k z h"], Float[Array, "i m k z h"]],
]


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
    k_cmkzh, v_cmkzh = gather_pages(k_pages_pkzh, v_pages_pkzh, block_pages_cm, used_cz)

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
    gather: GatherPages,
    block_table_bm: Int[Array, "b m"],
    starts_b: Int[Array, "b"],
    lengths_b: Int[Array, "b"],
    *,
    page_size: int,
    num_kv_heads: int,
    step_pages: int = CONTEXT_STEP_PAGES,
    stops_early: bool = False,
) -> Float[Array, "b t n h"]:
    """Attend a chunk of queries per row causally to the pages of its sequence, itself included.

    starts_b: index of each chunk's first token. lengths_b: tokens of the chunk, the queries after
    them being padding; 0 for a padding row. The context (all m pages of the table) is walked in
    steps of a few pages with a running softmax. stops_early: at the end of the longest row, which a
    GPU would have to ask its host for; otherwise the number of steps is compiled in.
    """
    b, t, n, h = q_btnh.shape
    k_heads, z = num_kv_heads, page_size
    step_pages = min(step_pages, block_table_bm.shape[1])
    num_steps = -(-block_table_bm.shape[1] // step_pages)
    padding = num_steps * step_pages - block_table_bm.shape[1]
    table_bsm = jnp.pad(block_table_bm, ((0, 0), (0, padding))).reshape(b, num_steps, step_pages)
    q_bkgth = q_btnh.reshape(b, t, k_heads, n // k_heads, h).transpose(0, 2, 3, 1, 4)
    query_index_bt = starts_b[:, None] + jnp.arange(t)[None, :]
    ends_b1 = (starts_b + lengths_b)[:, None]

    def step(step_index, carry):
        max_bkgt, sum_bkgt, attended_bkgth = carry
        pages_bm = table_bsm[:, step_index]
        kv_index_s = step_index * step_pages * z + jnp.arange(step_pages * z)
        used_bs = kv_index_s[None, :] < ends_b1
        is_past_bts = kv_index_s[None, None, :] <= query_index_bt[:, :, None]
        visible_bts = is_past_bts & used_bs[:, None, :]
        k_bmkzh, v_bmkzh = gather(pages_bm, used_bs)
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
        return new_max, sums, attended_bkgth * rescale[..., None] + partial

    shape = q_bkgth.shape[:-1]
    start = (
        # Not -inf: a padding row sees nothing, and -inf less -inf is NaN.
        jnp.full(shape, jnp.finfo(jnp.float32).min, jnp.float32),
        jnp.zeros(shape, jnp.float32),
        jnp.zeros((*shape, h), jnp.float32),
    )
    last_step = num_steps
    if stops_early:
        last_step = -(-ends_b1.max() // (step_pages * z))
    _, sum_bkgt, attended_bkgth = jax.lax.fori_loop(0, last_step, step, start)
    attended_bkgth = attended_bkgth / jnp.maximum(sum_bkgt, 1e-30)[..., None]
    return attended_bkgth.transpose(0, 3, 1, 2, 4).reshape(b, t, n, h).astype(q_btnh.dtype)


def gather_pages(
    k_pages_pkzh: Float[Array, "p k z h"],
    v_pages_pkzh: Float[Array, "p k z h"],
    page_ids_im: Int[Array, "i m"],
    used_is: Bool[Array, "i s"],
) -> tuple[Float[Array, "i m k z h"], Float[Array, "i m k z h"]]:
    """Return keys and values of pages; unused values are zero: their weight is, but 0 * NaN is NaN.

    Page ids past the end yield any page.
    """
    i, m = page_ids_im.shape
    k_imkzh, v_imkzh = (
        pages.at[page_ids_im].get(mode="clip") for pages in (k_pages_pkzh, v_pages_pkzh)
    )
    used_imz = used_is.reshape(i, m, v_pages_pkzh.shape[2])
    return k_imkzh, jnp.where(used_imz[:, :, None, :, None], v_imkzh, 0)
