"""The device's stages: pure functions over plain pytrees, split off the NNX modules.

Owns what each stage computes; compiling them is programs.py's. One `layers` function serves any
span of consecutive layers, because their weights and pages are arguments.
"""

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from apex_jax import sampling
from apex_jax.attention import append_kv, decode_attention, prefill_attention
from apex_jax.kv_cache import LayerPages
from apex_jax.models.llama import DecoderLayer, RMSNorm, next_token_logits
from apex_jax.packing import DecodeArrays, PrefillArrays, unpack_head, unpack_prefill_targets

Layers = tuple[nnx.State, ...]
Pages = tuple[LayerPages, ...]


def embed_decode(
    embedding_vd: Float[Array, "v d"],
    tokens_by_slot: Int[Array, "slots"],
    rows_b4: Int[Array, "b 4"],
) -> Float[Array, "b d"]:
    """Look up the last token of each row where the previous sweep left it."""
    tokens_b = tokens_by_slot.at[rows_b4[:, 0]].get(mode="clip")
    return jnp.take(embedding_vd, tokens_b, axis=0)


def embed_prefill(
    embedding_vd: Float[Array, "v d"], tokens_bt: Int[Array, "b t"]
) -> Float[Array, "b t d"]:
    """Look up the tokens of each chunk."""
    return jnp.take(embedding_vd, tokens_bt, axis=0)


def layers_decode(
    graph: nnx.GraphDef[DecoderLayer],
    layers: Layers,
    pages: Pages,
    x_bd: Float[Array, "b d"],
    arrays: DecodeArrays,
) -> tuple[Float[Array, "b d"], Pages]:
    """Carry one token per row through the layers; `pages` may be donated."""
    _, positions_b, page_ids_b, slots_b = arrays.rows_b4.T
    block_rows_c, block_lengths_c = arrays.blocks_ci[:, 0], arrays.blocks_ci[:, 1]
    new_pages: list[LayerPages] = []
    for state, (k_pages, v_pages) in zip(layers, pages, strict=True):
        layer = nnx.merge(graph, state)
        q, k, v = layer.pre_attention(x_bd, positions_b)
        k_pages = append_kv(k_pages, k, page_ids_b, slots_b)
        v_pages = append_kv(v_pages, v, page_ids_b, slots_b)
        attended = decode_attention(
            q, k_pages, v_pages, arrays.blocks_ci[:, 2:], block_rows_c, block_lengths_c
        )
        x_bd = layer.post_attention(x_bd, attended)
        new_pages.append(LayerPages(k_pages, v_pages))
    return x_bd, tuple(new_pages)


def layers_prefill(
    graph: nnx.GraphDef[DecoderLayer],
    num_head_rows: int,
    layers: Layers,
    pages: Pages,
    x_btd: Float[Array, "b t d"],
    arrays: PrefillArrays,
) -> tuple[Float[Array, "b t d"], Float[Array, "rows d"], Pages]:
    """Carry a chunk per row through the layers; `pages` may be donated.

    Also returns the hidden state of each chunk's last token, padded to `num_head_rows` rows.
    """
    num_pages, _, page_size, _ = pages[0].k_pkzh.shape
    positions_bt, page_ids_bt, slots_bt = unpack_prefill_targets(arrays, num_pages, page_size)
    page_ids_i, slots_i = page_ids_bt.reshape(-1), slots_bt.reshape(-1)
    new_pages: list[LayerPages] = []
    for state, (k_pages, v_pages) in zip(layers, pages, strict=True):
        layer = nnx.merge(graph, state)
        q, k, v = layer.pre_attention(x_btd, positions_bt)
        k_pages = append_kv(k_pages, k.reshape(-1, *k.shape[2:]), page_ids_i, slots_i)
        v_pages = append_kv(v_pages, v.reshape(-1, *v.shape[2:]), page_ids_i, slots_i)
        attended = prefill_attention(
            q, k_pages, v_pages, arrays.rows_bi[:, 2:], arrays.rows_bi[:, 0], arrays.rows_bi[:, 1]
        )
        x_btd = layer.post_attention(x_btd, attended)
        new_pages.append(LayerPages(k_pages, v_pages))
    last_b11 = jnp.maximum(arrays.rows_bi[:, 1] - 1, 0)[:, None, None]
    last_bd = jnp.take_along_axis(x_btd, last_b11, axis=1)[:, 0]
    last_bd = jnp.pad(last_bd, ((0, num_head_rows - last_bd.shape[0]), (0, 0)))
    return x_btd, last_bd, tuple(new_pages)


def head(
    norm_graph: nnx.GraphDef[RMSNorm],
    norm: nnx.State,
    output_vd: Float[Array, "v d"],
    tokens_by_slot: Int[Array, "slots"],
    x_bd: Float[Array, "b d"],
    packed_b8: Int[Array, "b 8"],
    *,
    is_greedy: bool,
) -> tuple[Int[Array, "b"], Int[Array, "slots"]]:
    """Choose a token per row and leave it in the row's slot; `tokens_by_slot` may be donated."""
    logits_bv = next_token_logits(x_bd, nnx.merge(norm_graph, norm), output_vd)
    slots_b, rows = unpack_head(packed_b8)
    tokens_b = sampling.greedy(logits_bv) if is_greedy else sampling.sample(logits_bv, rows)
    return tokens_b, tokens_by_slot.at[slots_b].set(tokens_b, mode="drop")
