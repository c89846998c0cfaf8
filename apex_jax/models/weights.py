"""Brings a model's weights onto a device, from a folder or from nothing.

Owns the structure that every source yields (`abstract`) and picks the reader that fits a folder.
Each layer's state is a dict of plain arrays. A sweep passes those of all layers as arguments, which
must be flat for that (`layer_maker`): dicts take five times as long to take apart. Called by the
engine.
"""

import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, UInt32

from apex_jax.config import ConfigError, LlamaConfig
from apex_jax.models import safetensors_store
from apex_jax.models.llama import DecoderLayer, Llama, LlamaWeights, RMSNorm
from apex_jax.models.model_files import ORBAX_FOLDER, is_orbax

_DUMMY_STD = 0.02  # as models are initialised: activations grow slowly enough for float16


def abstract(model: LlamaConfig, dtype: np.dtype) -> LlamaWeights:
    """Return the shapes and dtypes of all weights: programs compile before they are loaded."""
    state = nnx.to_pure_dict(nnx.state(_abstract_module(model, dtype)))
    return LlamaWeights(
        embedding=state["embedding"],
        layers=tuple(state["layers"][index] for index in range(model.num_layers)),
        norm=state["norm"],
        output=None if model.tie_embeddings else state["lm_head"]["weight"],
    )


def graphs(
    model: LlamaConfig, dtype: np.dtype
) -> tuple[nnx.GraphDef[DecoderLayer], nnx.GraphDef[RMSNorm]]:
    """Return what nnx.merge needs beside the state of a layer, and of the final norm."""
    module = _abstract_module(model, dtype)
    return nnx.graphdef(module.layers[0]), nnx.graphdef(module.norm)


def layer_maker(model: LlamaConfig, dtype: np.dtype) -> Callable[[Sequence[Array]], DecoderLayer]:
    """Return what makes a layer of its state's leaves."""
    graph, _ = graphs(model, dtype)
    structure = jax.tree.structure(abstract(model, dtype).layers[0])
    return lambda leaves: nnx.merge(graph, structure.unflatten(leaves))


def load(folder: Path, model: LlamaConfig, dtype: np.dtype, device: jax.Device) -> LlamaWeights:
    """Read the weights of a safetensors or Orbax folder into `device`, cast to `dtype`.

    Raises ConfigError naming the tensor and file that are missing, unknown, misshapen or damaged,
    or whose values float16 cannot hold.
    """
    if not is_orbax(folder):
        return safetensors_store.load(folder, model, abstract(model, dtype), device)
    try:  # only here: safetensors and dummy weights load where Orbax is not installed
        from apex_jax.models import orbax_store
    except ImportError as error:
        raise ConfigError(
            f"{folder / ORBAX_FOLDER} needs orbax-checkpoint, which does not import: {error}"
        ) from None
    return orbax_store.load(folder / ORBAX_FOLDER, abstract(model, dtype), device)


def dummy(model: LlamaConfig, dtype: np.dtype, device: jax.Device, seed: int) -> LlamaWeights:
    """Make random weights on `device`; equal for equal seeds, on any device."""
    leaves, structure = jax.tree.flatten(abstract(model, dtype))
    sharding = jax.sharding.SingleDeviceSharding(device)
    fill = jax.jit(_fill, static_argnums=(0, 1), out_shardings=sharding)
    with jax.default_device(device):
        filled = [
            fill(leaf.shape, leaf.dtype, jnp.uint32(zlib.crc32(f"{seed},{index}".encode())))
            for index, leaf in enumerate(leaves)
        ]
    return jax.tree.unflatten(structure, filled)


def to_module(model: LlamaConfig, weights: LlamaWeights) -> Llama:
    """Return the weights as the module that scores whole sequences."""
    state: dict[str, Any] = {
        "embedding": weights.embedding,
        "layers": dict(enumerate(weights.layers)),
        "norm": weights.norm,
    }
    if weights.output is not None:
        state["lm_head"] = {"weight": weights.output}
    return nnx.merge(nnx.graphdef(_abstract_module(model, weights.embedding.dtype)), state)


def _abstract_module(model: LlamaConfig, dtype: np.dtype) -> Llama:
    return nnx.eval_shape(lambda: Llama(model, dtype=dtype, rngs=nnx.Rngs(0)))


def _fill(shape: tuple[int, ...], dtype: np.dtype, seed: UInt32[Array, ""]) -> Float[Array, "..."]:
    """Fill a matrix uniformly with the standard deviation above, a vector (a norm's scale) with 1.

    A hash of the element's number, because it fuses into the store. jax.random wants 12 bytes of
    scratch memory an element (more than a small GPU has left) and is 15 times slower on a CPU.
    """
    if len(shape) == 1:
        return jnp.ones(shape, dtype)
    bits = _mix(jax.lax.iota(jnp.uint32, shape[0] * shape[1]) ^ seed)
    unit = bits.astype(jnp.int32).astype(jnp.float32) * jnp.float32(2.0**-31)  # in [-1, 1]
    return (unit * jnp.float32(_DUMMY_STD * 3**0.5)).astype(dtype).reshape(shape)


def _mix(x: UInt32[Array, "*shape"]) -> UInt32[Array, "*shape"]:
    """Scramble bits: the finaliser of MurmurHash3 (Appleby, public domain)."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)
