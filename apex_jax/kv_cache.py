"""The device's KV pages: one layer's storage, and what is appended and attended to in it.

Owns the arrays: a pool per layer, so that a program over a few layers takes just theirs, donated
and updated in place; with a host lane one more, the staging plane, where prompts bound for the host
are prefilled layer by layer. On a GPU, and on a CPU that stands in for one, attention is plain XLA
(XlaPages); on a CPU alone it is the host op (NativePages). Accounting of pages is elsewhere
(pages.py).
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from apex_jax import native_attention
from apex_jax.attention import append_kv, decode_attention, gather_pages, prefill_attention
from apex_jax.config import LlamaConfig
from apex_jax.ops import host_attention


class XlaPages(NamedTuple):
    """Keys and values of one layer, for plain XLA."""

    k_pkzh: Float[Array, "p k z h"]
    v_pkzh: Float[Array, "p k z h"]

    @property
    def shape(self) -> tuple[int, int, int]:
        """Pages, KV heads, tokens a page."""
        pages, kv_heads, page_size, _ = self.k_pkzh.shape
        return pages, kv_heads, page_size

    def decode(
        self,
        qkv_bjh: Float[Array, "b j h"],
        rows_b4: Int[Array, "b 4"],
        blocks_ci: Int[Array, "c i"],
    ) -> tuple[Float[Array, "b n h"], "XlaPages"]:
        """Append each row's key and value and attend, itself included.

        rows_b4, blocks_ci: those of packing.DecodeArrays. The pages may be donated.
        """
        kv_heads = self.shape[1]
        heads = qkv_bjh.shape[1] - 2 * kv_heads
        q, k, v = jnp.split(qkv_bjh, [heads, heads + kv_heads], axis=1)
        targets = rows_b4[:, 2], rows_b4[:, 3]
        pages = XlaPages(append_kv(self.k_pkzh, k, *targets), append_kv(self.v_pkzh, v, *targets))
        blocks = blocks_ci[:, 2:], blocks_ci[:, 0], blocks_ci[:, 1]
        return decode_attention(q, *pages, *blocks), pages

    def prefill(
        self,
        q_btnh: Float[Array, "b t n h"],
        k_btkh: Float[Array, "b t k h"],
        v_btkh: Float[Array, "b t k h"],
        page_ids_bt: Int[Array, "b t"],
        slots_bt: Int[Array, "b t"],
        rows_bi: Int[Array, "b i"],
    ) -> tuple[Float[Array, "b t n h"], "XlaPages"]:
        """Append a chunk's keys and values and attend, itself included.

        page_ids_bt, slots_bt: where each token goes; a page id past the end drops it. rows_bi: that
        of packing.PrefillArrays. The pages may be donated.
        """
        targets = page_ids_bt.reshape(-1), slots_bt.reshape(-1)
        pages = XlaPages(
            append_kv(self.k_pkzh, k_btkh.reshape(-1, *k_btkh.shape[2:]), *targets),
            append_kv(self.v_pkzh, v_btkh.reshape(-1, *v_btkh.shape[2:]), *targets),
        )
        _, kv_heads, page_size = self.shape
        attended = prefill_attention(
            q_btnh,
            partial(gather_pages, *pages),
            rows_bi[:, 2:],
            rows_bi[:, 0],
            rows_bi[:, 1],
            page_size=page_size,
            num_kv_heads=kv_heads,
        )
        return attended, pages


class NativePages(NamedTuple):
    """Keys and values of one layer, for ops.host_attention; methods as those of XlaPages."""

    pool_pk2zh: Float[Array, "p k 2 z h"]

    @property
    def shape(self) -> tuple[int, int, int]:
        pages, kv_heads, _, page_size, _ = self.pool_pk2zh.shape
        return pages, kv_heads, page_size

    def decode(
        self,
        qkv_bjh: Float[Array, "b j h"],
        rows_b4: Int[Array, "b 4"],
        blocks_ci: Int[Array, "c i"],
    ) -> tuple[Float[Array, "b n h"], "NativePages"]:
        blocks = blocks_ci[:, 2:], blocks_ci[:, 0], blocks_ci[:, 1]
        attended, pool = native_attention.append_and_decode(self.pool_pk2zh, qkv_bjh, *blocks)
        return attended, NativePages(pool)

    def prefill(
        self,
        q_btnh: Float[Array, "b t n h"],
        k_btkh: Float[Array, "b t k h"],
        v_btkh: Float[Array, "b t k h"],
        page_ids_bt: Int[Array, "b t"],
        slots_bt: Int[Array, "b t"],
        rows_bi: Int[Array, "b i"],
    ) -> tuple[Float[Array, "b t n h"], "NativePages"]:
        attended, pool = native_attention.append_and_prefill(
            self.pool_pk2zh,
            q_btnh,
            k_btkh,
            v_btkh,
            page_ids_bt,
            slots_bt,
            rows_bi[:, 2:],
            rows_bi[:, 0],
            rows_bi[:, 1],
        )
        return attended, NativePages(pool)


LayerPages = XlaPages | NativePages


def abstract_layer_pages(
    model: LlamaConfig, num_pages: int, page_size: int, dtype: np.dtype, *, is_native: bool = False
) -> LayerPages:
    """Return the shapes of one layer's pool."""

    def like(*shape: int) -> Any:  # it stands where arrays are annotated
        return jax.ShapeDtypeStruct(shape, dtype)

    if is_native:
        return NativePages(like(num_pages, model.num_kv_heads, 2, page_size, model.head_dim))
    shape = (num_pages, model.num_kv_heads, page_size, model.head_dim)
    return XlaPages(like(*shape), like(*shape))


def allocate(
    model: LlamaConfig,
    num_pages: int,
    page_size: int,
    dtype: np.dtype,
    device: jax.Device,
    *,
    is_native: bool = False,
) -> list[LayerPages]:
    """Return zeroed pools for every layer."""
    shape = (model, num_pages, page_size, dtype, device)
    return [allocate_layer(*shape, is_native=is_native) for _ in range(model.num_layers)]


def allocate_layer(
    model: LlamaConfig,
    num_pages: int,
    page_size: int,
    dtype: np.dtype,
    device: jax.Device,
    *,
    is_native: bool = False,
) -> LayerPages:
    """Return a zeroed pool for one layer (zeroed, because fresh memory may hold NaN)."""
    if is_native:
        sizes = (num_pages, model.num_kv_heads, page_size, model.head_dim)
        return NativePages(host_attention.allocate_pool(*sizes, dtype, device))
    abstract = abstract_layer_pages(model, num_pages, page_size, dtype)
    zeros = lambda like: jnp.zeros(like.shape, like.dtype, device=device)  # noqa: E731
    return jax.tree.map(zeros, abstract)


def page_bytes(model: LlamaConfig, page_size: int, dtype: np.dtype) -> int:
    """Bytes of one page over all layers, keys and values."""
    return page_size * model.kv_bytes_per_token(dtype.itemsize)
