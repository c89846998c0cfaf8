"""The device's stages: pure functions over plain pytrees, split off the NNX modules.

Owns what each stage computes; compiling them is programs.py's. Each serves every layer (or span of
consecutive layers), because weights and pages are arguments. Pages may be donated and come back;
what the host is sent (`qkv_bjh`, exported pages) must not be.
"""

import itertools
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from apex_jax import sampling
from apex_jax.kv_cache import LayerPages, XlaPages
from apex_jax.models.llama import DecoderLayer, RMSNorm, State, next_token_logits
from apex_jax.packing import (
    DecodeArrays,
    ModifierArrays,
    PrefillArrays,
    pack_logprobs,
    unpack_head,
    unpack_modifiers,
    unpack_prefill_targets,
)

# Parameters of one or more layers, flat: each call takes its arguments apart, which for dicts
# takes five times as long.
Flat = tuple[Array, ...]
MakeLayer = Callable[[Flat], DecoderLayer]
Pages = tuple[LayerPages, ...]


def embed_decode(
    embedding_vd: Float[Array, "v d"],
    tokens_by_slot: Int[Array, "slots"],
    rows_b4: Int[Array, "b 4"],
) -> tuple[Float[Array, "b d"], Int[Array, "b 4"]]:
    """Look up the last token of each row where the previous sweep left it.

    Also returns rows_b4, which came along with this call and will be wanted by later ones.
    """
    tokens_b = tokens_by_slot.at[rows_b4[:, 0]].get(mode="clip")
    return jnp.take(embedding_vd, tokens_b, axis=0), rows_b4


def embed_prefill(
    embedding_vd: Float[Array, "v d"], tokens_bt: Int[Array, "b t"]
) -> Float[Array, "b t d"]:
    """Look up the tokens of each chunk."""
    return jnp.take(embedding_vd, tokens_bt, axis=0)


def layers_decode(
    make_layer: MakeLayer,
    layers: Flat,
    pages: Pages,
    x_bd: Float[Array, "b d"],
    arrays: DecodeArrays,
) -> tuple[Float[Array, "b d"], Pages]:
    """Carry one token per row through the layers; `pages` may be donated."""
    new_pages: list[LayerPages] = []
    for layer, layer_pages in zip(_layers(make_layer, layers, len(pages)), pages, strict=True):
        qkv_bjh = jnp.concatenate(layer.pre_attention(x_bd, arrays.rows_b4[:, 1]), axis=1)
        attended, layer_pages = device_attention(layer_pages, qkv_bjh, arrays)
        x_bd = layer.post_attention(x_bd, attended)
        new_pages.append(layer_pages)
    return x_bd, tuple(new_pages)


def layers_prefill(
    make_layer: MakeLayer,
    num_head_rows: int,
    layers: Flat,
    pages: Pages,
    x_btd: Float[Array, "b t d"],
    arrays: PrefillArrays,
) -> tuple[Float[Array, "b t d"], Float[Array, "rows d"], Pages]:
    """Carry a chunk per row through the layers; `pages` may be donated.

    Also returns the hidden state of each chunk's last token, padded to `num_head_rows` rows.
    """
    num_pages, _, page_size = pages[0].shape
    positions_bt, page_ids_bt, slots_bt = unpack_prefill_targets(arrays, num_pages, page_size)
    new_pages: list[LayerPages] = []
    made = _layers(make_layer, layers, len(pages))
    for layer, layer_pages in zip(made, pages, strict=True):
        qkv = layer.pre_attention(x_btd, positions_bt)
        attended, layer_pages = layer_pages.prefill(*qkv, page_ids_bt, slots_bt, arrays.rows_bi)
        x_btd = layer.post_attention(x_btd, attended)
        new_pages.append(layer_pages)
    last_b11 = jnp.maximum(arrays.rows_bi[:, 1] - 1, 0)[:, None, None]
    last_bd = jnp.take_along_axis(x_btd, last_b11, axis=1)[:, 0]
    last_bd = jnp.pad(last_bd, ((0, num_head_rows - last_bd.shape[0]), (0, 0)))
    return x_btd, last_bd, tuple(new_pages)


def pre_attention(
    make_layer: MakeLayer,
    layer: Flat,
    x_bd: Float[Array, "b d"],
    rows_b4: Int[Array, "b 4"],
) -> Float[Array, "b j h"]:
    """Enter a layer: rotated queries, rotated keys and values of each row, in this order."""
    qkv = make_layer(layer).pre_attention(x_bd, rows_b4[:, 1])
    return jnp.concatenate(qkv, axis=1)


def device_attention(
    pages: LayerPages, qkv_bjh: Float[Array, "b j h"], arrays: DecodeArrays
) -> tuple[Float[Array, "b n h"], LayerPages]:
    """Append each row's key and value and attend, itself included; `pages` may be donated."""
    rows_b4, blocks_ci = arrays
    assert blocks_ci is not None
    return pages.decode(qkv_bjh, rows_b4, blocks_ci)


def post_attention(
    make_layer: MakeLayer,
    layer: Flat,
    x_bd: Float[Array, "b d"],
    attended_bnh: Float[Array, "b n h"],
) -> Float[Array, "b d"]:
    """Leave a layer."""
    return make_layer(layer).post_attention(x_bd, attended_bnh)


class BoundaryRows(NamedTuple):
    """A group of rows between two layers; rows_b4 is that of DecodeArrays."""

    x_bd: Float[Array, "b d"]
    attended_bnh: Float[Array, "b n h"]
    rows_b4: Int[Array, "b 4"]


def boundary(
    make_layer: MakeLayer,
    left: Flat,
    entered: Flat,
    groups: tuple[BoundaryRows, ...],
) -> tuple[tuple[Float[Array, "b d"], Float[Array, "b j h"]], ...]:
    """Leave a layer and enter the next, all groups in one batch; returns each one's x and qkv."""
    x_bd, attended_bnh, rows_b4 = (jnp.concatenate(parts) for parts in zip(*groups, strict=True))
    x_bd = post_attention(make_layer, left, x_bd, attended_bnh)
    qkv_bjh = pre_attention(make_layer, entered, x_bd, rows_b4)
    ends = list(itertools.accumulate(len(group.x_bd) for group in groups))[:-1]
    return tuple(zip(jnp.split(x_bd, ends), jnp.split(qkv_bjh, ends), strict=True))


def place(
    head_rows_bd: Float[Array, "head_b d"], x_bd: Float[Array, "b d"], first: Int[Array, ""]
) -> Float[Array, "head_b d"]:
    """Put a group's rows into those of a head from row `first` on; `head_rows_bd` may be donated.

    Rows past the end are dropped: they are padding.
    """
    return head_rows_bd.at[first + jnp.arange(len(x_bd))].set(x_bd, mode="drop")


def head(
    norm_graph: nnx.GraphDef[RMSNorm],
    norm: State,
    output_vd: Float[Array, "v d"],
    tokens_by_slot: Int[Array, "slots"],
    x_bd: Float[Array, "b d"],
    packed_b9: Int[Array, "b 9"],
    *,
    is_greedy: bool,
) -> tuple[Int[Array, "b"], Int[Array, "slots"]]:
    """Choose a token per row and leave it in the row's slot; `tokens_by_slot` may be donated."""
    logits_bv = next_token_logits(x_bd, nnx.merge(norm_graph, norm), output_vd)
    slots_b, rows = unpack_head(packed_b9)
    tokens_b = sampling.greedy(logits_bv) if is_greedy else sampling.sample(logits_bv, rows)
    return tokens_b, tokens_by_slot.at[slots_b].set(tokens_b, mode="drop")


def modified_head(
    norm_graph: nnx.GraphDef[RMSNorm],
    norm: State,
    output_vd: Float[Array, "v d"],
    tokens_by_slot: Int[Array, "slots"],
    x_bd: Float[Array, "b d"],
    packed_b9: Int[Array, "b 9"],
    modifiers: ModifierArrays,
    *,
    with_logprobs: bool,
) -> tuple[Int[Array, "b"], Int[Array, "b c"] | None, Int[Array, "slots"]]:
    """Do what `head` does with modified scores; `tokens_by_slot` may be donated.

    Also returns packed logprobs of the scores as they were, where they are wanted.
    """
    logits_bv = next_token_logits(x_bd, nnx.merge(norm_graph, norm), output_vd)
    slots_b, rows = unpack_head(packed_b9)
    last_tokens_b = tokens_by_slot.at[slots_b].get(mode="clip")
    modified_bv = sampling.modify(logits_bv, last_tokens_b, *unpack_modifiers(modifiers))
    tokens_b = sampling.sample(modified_bv, rows)
    logprobs_bc = pack_logprobs(sampling.logprobs(logits_bv, tokens_b)) if with_logprobs else None
    return tokens_b, logprobs_bc, tokens_by_slot.at[slots_b].set(tokens_b, mode="drop")


def prompt_logprobs(
    norm_graph: nnx.GraphDef[RMSNorm],
    num_rows: int,
    norm: State,
    output_vd: Float[Array, "v d"],
    x_btd: Float[Array, "b t d"],
    next_ids_bt: Int[Array, "b t"],
) -> Int[Array, "b t c"]:
    """Return packed logprobs of what follows each token of a chunk, `num_rows` tokens at a time."""
    b, t, d = x_btd.shape
    padding = -(b * t) % num_rows
    x_std = jnp.pad(x_btd.reshape(-1, d), ((0, padding), (0, 0))).reshape(-1, num_rows, d)
    next_ids_sr = jnp.pad(next_ids_bt.reshape(-1), (0, padding)).reshape(-1, num_rows)

    def score(part: tuple[Float[Array, "r d"], Int[Array, "r"]]) -> Int[Array, "r c"]:
        x_rd, next_ids_r = part
        logits_rv = next_token_logits(x_rd, nnx.merge(norm_graph, norm), output_vd)
        return pack_logprobs(sampling.logprobs(logits_rv, next_ids_r))

    packed_src = jax.lax.map(score, (x_std, next_ids_sr))
    return packed_src.reshape(-1, packed_src.shape[-1])[: b * t].reshape(b, t, -1)


def export_pages(pages: XlaPages, page_ids_i: Int[Array, "i"]) -> Float[Array, "i k 2 z h"]:
    """Copy pages out in the layout of the host's pool; an id past the end yields any page."""
    gathered = [pool.at[page_ids_i].get(mode="clip") for pool in pages]
    return jnp.stack(gathered, axis=2)


def import_pages(
    pages: XlaPages, pages_ik2zh: Float[Array, "i k 2 z h"], page_ids_i: Int[Array, "i"]
) -> tuple[Float[Array, "1"], XlaPages]:
    """Write exported pages; `pages` may be donated. Ids past the end are dropped.

    Also returns an element of theirs: a marker that outlives the next donation.
    """
    k_pkzh, v_pkzh = (
        pool.at[page_ids_i].set(pages_ik2zh[:, :, half], mode="drop")
        for half, pool in enumerate(pages)
    )
    return k_pkzh[0, 0, 0, :1], XlaPages(k_pkzh, v_pkzh)


def _layers(make_layer: MakeLayer, layers: Flat, num_layers: int) -> Iterator[DecoderLayer]:
    size = len(layers) // num_layers
    return (make_layer(layers[first : first + size]) for first in range(0, len(layers), size))
