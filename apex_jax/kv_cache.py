"""Storage of the device's KV pages.

Owns the arrays: one pair of pools per layer, so that a program over a few layers takes just theirs,
donated and updated in place; with a host lane one more pair, the staging plane, where prompts bound
for the host are prefilled layer by layer. Accounting of pages is elsewhere (pages.py).
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from apex_jax.config import LlamaConfig


class LayerPages(NamedTuple):
    """Keys and values of one layer."""

    k_pkzh: Float[Array, "p k z h"]
    v_pkzh: Float[Array, "p k z h"]


def abstract_layer_pages(
    model: LlamaConfig, num_pages: int, page_size: int, dtype: np.dtype
) -> LayerPages:
    """Return the shapes of one layer's pools."""
    shape = (num_pages, model.num_kv_heads, page_size, model.head_dim)
    like: Any = jax.ShapeDtypeStruct(shape, dtype)  # it stands where arrays are annotated
    return LayerPages(like, like)


def allocate(
    model: LlamaConfig, num_pages: int, page_size: int, dtype: np.dtype, device: jax.Device
) -> list[LayerPages]:
    """Return zeroed pools for every layer."""
    shape = (model, num_pages, page_size, dtype, device)
    return [allocate_layer(*shape) for _ in range(model.num_layers)]


def allocate_layer(
    model: LlamaConfig, num_pages: int, page_size: int, dtype: np.dtype, device: jax.Device
) -> LayerPages:
    """Return zeroed pools for one layer (zeroed, because fresh memory may hold NaN)."""
    abstract = abstract_layer_pages(model, num_pages, page_size, dtype)
    zeros = lambda like: jnp.zeros(like.shape, like.dtype, device=device)  # noqa: E731
    return jax.tree.map(zeros, abstract)


def page_bytes(model: LlamaConfig, page_size: int, dtype: np.dtype) -> int:
    """Bytes of one page over all layers, keys and values."""
    return page_size * model.kv_bytes_per_token(dtype.itemsize)
