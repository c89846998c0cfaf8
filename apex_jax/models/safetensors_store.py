"""Reads Hugging Face Llama weights from safetensors files, one tensor at a time.

Owns the mapping from Hugging Face's names to ours and the checks of what is in the files. Refuses,
by name, tensors that are missing, unknown, misshapen, quantized or cut off, before any is read.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes  # teaches numpy, and so safetensors, what bfloat16 is
import numpy as np
import safetensors

from apex_jax.config import ConfigError, LlamaConfig
from apex_jax.models.llama import LlamaWeights, State
from apex_jax.models.model_files import SAFETENSORS_FILE, SAFETENSORS_INDEX

_DTYPES = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
_EMBEDDING, _OUTPUT = "model.embed_tokens.weight", "lm_head.weight"
_IGNORED_SUFFIX = "rotary_emb.inv_freq"  # a buffer that old files hold; we compute our own
_LAYER_PARTS = {
    "input_norm": ("scale", ("input_layernorm",)),
    "qkv_proj": ("weight", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
    "o_proj": ("weight", ("self_attn.o_proj",)),
    "post_norm": ("scale", ("post_attention_layernorm",)),
    "gate_up_proj": ("weight", ("mlp.gate_proj", "mlp.up_proj")),
    "down_proj": ("weight", ("mlp.down_proj",)),
}


@dataclass(frozen=True)
class Tensor:
    """Where a tensor lies, as the header of its file says.

    dtype: in the format's own words, as "BF16". end: in bytes from the start of the file.
    """

    path: Path
    name: str
    dtype: str
    shape: tuple[int, ...]
    end: int


@dataclass(frozen=True)
class _Fused:
    """Tensors whose rows, one after the other, are one of our parameters. A leaf of a pytree."""

    parts: tuple[tuple[str, tuple[int, ...]], ...]  # (name, shape)


def load(
    folder: Path, model: LlamaConfig, abstract: LlamaWeights, device: jax.Device
) -> LlamaWeights:
    """Read the weights into `device`, in the structure, shapes and dtype of `abstract`.

    The host holds one parameter at a time. Raises ConfigError naming the tensor and its file.
    """
    tensors = read_headers(folder)
    sources = _sources(model)
    _check(folder, model, tensors, sources)
    if model.tie_embeddings and _OUTPUT in tensors:
        _check_really_tied(tensors[_OUTPUT], _read(tensors[_OUTPUT]), _read(tensors[_EMBEDDING]))

    def place(target: jax.ShapeDtypeStruct, source: _Fused) -> jax.Array:
        fused = np.empty(target.shape, target.dtype)
        start = 0
        for name, shape in source.parts:
            part = fused[start : start + shape[0]]
            with np.errstate(over="ignore"):  # reported below, by name
                part[...] = _read(tensors[name])
            _check_representable(tensors[name], part)
            start += shape[0]
        # Without the wait, transfers would queue up and keep all of the model on the host.
        return jax.device_put(fused, device).block_until_ready()

    return jax.tree.map(place, abstract, sources)


def stored_dtype(folder: Path) -> jnp.dtype:
    """Return the narrowest dtype that holds every tensor of the files exactly."""
    dtypes = {_dtype(tensor) for tensor in read_headers(folder).values()}
    return jnp.result_type(*dtypes) if len(dtypes) == 1 else jnp.dtype(jnp.float32)


def read_headers(folder: Path) -> Mapping[str, Tensor]:
    """Return all tensors of a folder by name; ConfigError for files missing, bad or cut off."""
    if (folder / SAFETENSORS_FILE).exists():  # as in transformers, it goes before an index
        return _read_header(folder / SAFETENSORS_FILE)
    index_path = folder / SAFETENSORS_INDEX
    try:
        shard_of: dict[str, str] = json.loads(index_path.read_bytes())["weight_map"]
        shards = sorted(set(shard_of.values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{index_path} is not an index of shards: {error!r}") from None
    tensors: dict[str, Tensor] = {}
    for shard in shards:
        if Path(shard).name != shard or not (folder / shard).is_file():
            raise ConfigError(f"{index_path} lists {shard!r}, which is not in the folder")
        header = _read_header(folder / shard)
        tensors |= {name: header[name] for name in header if shard_of.get(name, shard) == shard}
    for name, shard in shard_of.items():
        if name not in tensors:
            raise ConfigError(
                f"{folder / shard}: tensor {name} is missing; the index lists it there"
            )
    return tensors


def _read_header(path: Path) -> dict[str, Tensor]:
    """Parse a header; the library would do it, but does not say which tensor is cut off."""
    file_bytes = path.stat().st_size
    try:
        with path.open("rb") as file:
            data_start = 8 + int.from_bytes(file.read(8), "little")
            if data_start > file_bytes:
                raise ConfigError(f"{path} is cut off in its header, at {file_bytes} bytes")
            header: dict[str, dict[str, Any]] = json.loads(file.read(data_start - 8))
        header.pop("__metadata__", None)
        tensors = [
            Tensor(path, name, e["dtype"], tuple(e["shape"]), data_start + e["data_offsets"][1])
            for name, e in header.items()
        ]
    except (OSError, ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"{path} is not a safetensors file: {error!r}") from None
    for tensor in sorted(tensors, key=lambda one: one.end):
        if tensor.end > file_bytes:
            raise ConfigError(
                f"{path} is cut off at {file_bytes} bytes: tensor {tensor.name} ends at "
                f"{tensor.end}"
            )
    return {tensor.name: tensor for tensor in tensors}


def _sources(model: LlamaConfig) -> LlamaWeights:
    """Return the tree of weights with a _Fused in the place of each parameter."""
    width, kv_rows = model.d_model, model.num_kv_heads * model.head_dim
    shapes = {
        "self_attn.q_proj": (model.num_heads * model.head_dim, width),
        "self_attn.k_proj": (kv_rows, width),
        "self_attn.v_proj": (kv_rows, width),
        "self_attn.o_proj": (width, model.num_heads * model.head_dim),
        "mlp.gate_proj": (model.d_ffn, width),
        "mlp.up_proj": (model.d_ffn, width),
        "mlp.down_proj": (width, model.d_ffn),
        "input_layernorm": (width,),
        "post_attention_layernorm": (width,),
    }

    def layer(index: int) -> State:
        return {
            module: {
                parameter: _Fused(
                    tuple((f"model.layers.{index}.{name}.weight", shapes[name]) for name in names)
                )
            }
            for module, (parameter, names) in _LAYER_PARTS.items()
        }

    def table(name: str) -> Any:
        return _Fused(((name, (model.vocab_size, width)),))

    return LlamaWeights(
        embedding=table(_EMBEDDING),
        layers=tuple(layer(index) for index in range(model.num_layers)),
        norm={"scale": _Fused((("model.norm.weight", (width,)),))},
        output=None if model.tie_embeddings else table(_OUTPUT),
    )


def _check(
    folder: Path, model: LlamaConfig, tensors: Mapping[str, Tensor], sources: LlamaWeights
) -> None:
    expected = {name: shape for leaf in jax.tree.leaves(sources) for name, shape in leaf.parts}
    for name, shape in expected.items():
        if name not in tensors:
            raise ConfigError(f"{folder}: tensor {name} is missing from the weights")
        if tensors[name].shape != shape:
            raise ConfigError(
                f"{tensors[name].path}: tensor {name} has shape {tensors[name].shape}; config.json "
                f"makes it {shape}"
            )
    tolerated = {_OUTPUT} if model.tie_embeddings else set()
    for name, tensor in tensors.items():
        if name in expected or name in tolerated:
            _dtype(tensor)
        elif not name.endswith(_IGNORED_SUFFIX):
            raise ConfigError(f"{tensor.path}: tensor {name} is not part of a Llama of this shape")


def _dtype(tensor: Tensor) -> np.dtype:
    if tensor.dtype not in _DTYPES:
        raise ConfigError(
            f"{tensor.path}: tensor {tensor.name} is {tensor.dtype}; supported are "
            + ", ".join(_DTYPES)
        )
    return _DTYPES[tensor.dtype]


def _check_really_tied(tensor: Tensor, output_vd: np.ndarray, embedding_vd: np.ndarray) -> None:
    """Refuse what transformers would compute untied, with a warning."""
    if not np.array_equal(output_vd, embedding_vd):
        raise ConfigError(
            f"{tensor.path}: tensor {tensor.name} differs from the embedding, but config.json ties "
            "the two (tie_word_embeddings)"
        )


def _check_representable(tensor: Tensor, values: np.ndarray) -> None:
    """Refuse values beyond float16's range, which would silently become infinite."""
    if values.dtype == np.float16 and tensor.dtype != "F16" and not np.isfinite(values).all():
        raise ConfigError(
            f"{tensor.path}: tensor {tensor.name} holds values that float16 cannot; "
            "use --config.model.dtype=bfloat16 or float32"
        )


def _read(tensor: Tensor) -> np.ndarray:
    """Copy a tensor into memory of its own, and unmap its file: mapped pages count as resident."""
    try:
        with safetensors.safe_open(tensor.path, framework="numpy") as file:
            return file.get_tensor(tensor.name)
    except safetensors.SafetensorError as error:
        raise ConfigError(f"{tensor.path}: tensor {tensor.name}: {error}") from None
