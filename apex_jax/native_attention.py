"""Paged attention on a device that is a CPU, by the host op: append and decode, append and prefill.

Owns what lies between the device's batches and the op: block tables out of blocks, chunks as single
tokens. One layer's pages are a pool of ops.host_attention, `[p, k, 2, z, h]`. The op reads the
pages where they lie, used tokens only, which XLA's gathers cannot. Refuses nothing: shapes are the
stages' business.
"""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from apex_jax.attention import prefill_attention
from apex_jax.ops import host_attention

CONTEXT_STEP_PAGES = 4  # of a prefill: steps behind the longest row's end are not taken


def append_and_decode(
    pool_pk2zh: Float[Array, "p k 2 z h"],
    qkv_bjh: Float[Array, "b j h"],
    block_pages_cm: Int[Array, "c m"],
    block_rows_c: Int[Array, "c"],
    block_lengths_c: Int[Array, "c"],
) -> tuple[Float[Array, "b n h"], Float[Array, "p k 2 z h"]]:
    """Write each row's key and value behind its blocks' other tokens, then attend to them all.

    Blocks are those of attention.decode_attention; rows without one are padding, after the others.
    """
    b, (c, m) = qkv_bjh.shape[0], block_pages_cm.shape
    lengths_b = jnp.zeros(b, jnp.int32).at[block_rows_c].add(block_lengths_c, mode="drop")
    first_b = jnp.searchsorted(block_rows_c, jnp.arange(b))
    place_c = jnp.arange(c) - first_b.at[block_rows_c].get(mode="clip")
    tables_bcm = jnp.zeros((b, c, m), jnp.int32)
    tables_bcm = tables_bcm.at[block_rows_c, place_c].set(block_pages_cm, mode="drop")
    num_rows = jnp.sum(lengths_b > 0, dtype=jnp.int32)
    tables_bs = tables_bcm.reshape(b, c * m)
    pool_pk2zh, attended_bnh, _ = host_attention.append_and_attend(
        pool_pk2zh, qkv_bjh, tables_bs, lengths_b, num_rows
    )
    return attended_bnh, pool_pk2zh


def append_and_prefill(
    pool_pk2zh: Float[Array, "p k 2 z h"],
    q_btnh: Float[Array, "b t n h"],
    k_btkh: Float[Array, "b t k h"],
    v_btkh: Float[Array, "b t k h"],
    page_ids_bt: Int[Array, "b t"],
    slots_bt: Int[Array, "b t"],
    block_table_bm: Int[Array, "b m"],
    starts_b: Int[Array, "b"],
    lengths_b: Int[Array, "b"],
) -> tuple[Float[Array, "b t n h"], Float[Array, "p k 2 z h"]]:
    """Write a chunk's keys and values, then attend causally; see attention.prefill_attention.

    page_ids_bt, slots_bt: where each token goes; page id p is padding.
    """
    num_pages = pool_pk2zh.shape[0]
    page_ids_i, slots_i = page_ids_bt.reshape(-1), slots_bt.reshape(-1)
    is_padding_i = page_ids_i >= num_pages
    order_i = jnp.argsort(is_padding_i)  # stable; the op wants padding behind all that counts
    k_ikh, v_ikh = (x.reshape(-1, *x.shape[2:])[order_i] for x in (k_btkh, v_btkh))
    pool_pk2zh = host_attention.append(
        pool_pk2zh,
        k_ikh,
        v_ikh,
        page_ids_i[order_i, None].astype(jnp.int32),
        slots_i[order_i].astype(jnp.int32) + 1,
        jnp.sum(~is_padding_i, dtype=jnp.int32),
    )

    def gather(
        page_ids_bm: Int[Array, "b m"], used_bs: Bool[Array, "b s"]
    ) -> tuple[Float[Array, "b m k z h"], Float[Array, "b m k z h"]]:
        ids_i = jnp.minimum(page_ids_bm.reshape(-1), num_pages - 1).astype(jnp.int32)
        pages_ik2zh = host_attention.read_pages(pool_pk2zh, ids_i)
        pages_bmk2zh = pages_ik2zh.reshape(*page_ids_bm.shape, *pages_ik2zh.shape[1:])
        used_bmz = used_bs.reshape(*page_ids_bm.shape, -1)
        v_bmkzh = jnp.where(used_bmz[:, :, None, :, None], pages_bmk2zh[:, :, :, 1], 0)
        return pages_bmk2zh[:, :, :, 0], v_bmkzh

    attended_btnh = prefill_attention(
        q_btnh,
        gather,
        block_table_bm,
        starts_b,
        lengths_b,
        page_size=pool_pk2zh.shape[3],
        num_kv_heads=pool_pk2zh.shape[1],
        step_pages=CONTEXT_STEP_PAGES,
        stops_early=True,
    )
    return attended_btnh, pool_pk2zh
