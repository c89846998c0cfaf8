"""Keeps weights as an Orbax checkpoint: already fused, so that loading is one parallel read.

The only module that imports Orbax, whose API still moves; `weights` imports it where a folder needs
it. Refuses checkpoints whose tree or shapes differ from the model's.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from orbax.checkpoint import v1 as ocp

from apex_jax.config import ConfigError
from apex_jax.models.llama import LlamaWeights


def save(path: Path, weights: LlamaWeights) -> None:
    """Write a checkpoint to `path`, which must not exist and appears only when it is complete."""
    ocp.save(str(path.absolute()), _to_tree(weights))


def load(path: Path, abstract: LlamaWeights, device: jax.Device) -> LlamaWeights:
    """Read a checkpoint into `device`, in the structure, shapes and dtype of `abstract`.

    Raises ConfigError naming a tensor that is missing, unknown, misshapen or out of float16's
    range, and for a checkpoint that Orbax cannot read.
    """
    sharding = jax.sharding.SingleDeviceSharding(device)
    target = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        _to_tree(abstract),
    )
    try:
        stored = ocp.metadata(str(path.absolute())).metadata
    # Orbax and tensorstore raise whatever a file happens to break: there is no narrower class.
    except Exception as error:
        raise ConfigError(f"{path} is not an Orbax checkpoint: {error}") from error
    if stored is None:  # and the reason is in Orbax's log
        raise ConfigError(f"{path} cannot be read: the descriptions of its tensors are damaged")
    _check(path, dict(_leaves(stored)), dict(_leaves(target)))
    try:
        tree = ocp.load(str(path.absolute()), target)
    except Exception as error:
        raise ConfigError(f"{path} cannot be read: {error}") from error
    _check_representable(path, dict(_leaves(stored)), dict(_leaves(tree)))
    return _from_tree(tree)


def _to_tree(weights: LlamaWeights) -> dict[str, Any]:
    """Return plain dicts and lists: what is on disk should not know our classes."""
    tree: dict[str, Any] = {
        "embedding": weights.embedding,
        "layers": list(weights.layers),
        "norm": weights.norm,
    }
    if weights.output is not None:
        tree["output"] = weights.output
    return tree


def _from_tree(tree: Mapping[str, Any]) -> LlamaWeights:
    return LlamaWeights(
        embedding=tree["embedding"],
        layers=tuple(tree["layers"]),
        norm=tree["norm"],
        output=tree.get("output"),
    )


def _leaves(tree: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (dotted name, leaf), of arrays and of Orbax's descriptions of them alike."""
    if isinstance(tree, Mapping):
        children = tree.items()
    elif isinstance(tree, list | tuple):
        children = enumerate(tree)
    else:
        yield prefix, tree
        return
    for key, child in children:
        yield from _leaves(child, f"{prefix}.{key}" if prefix else str(key))


def _check(path: Path, stored: Mapping[str, Any], target: Mapping[str, Any]) -> None:
    for name, leaf in target.items():
        if name not in stored:
            raise ConfigError(f"{path}: tensor {name} is missing from the checkpoint")
        if tuple(stored[name].shape) != leaf.shape:
            raise ConfigError(
                f"{path}: tensor {name} has shape {tuple(stored[name].shape)}; config.json makes "
                f"it {leaf.shape}"
            )
    for name in stored:
        if name not in target:
            raise ConfigError(f"{path}: tensor {name} is not part of a Llama of this shape")


def _check_representable(
    path: Path, stored: Mapping[str, Any], loaded: Mapping[str, jax.Array]
) -> None:
    """Refuse values beyond float16's range, which would silently have become infinite."""
    is_finite = jax.jit(lambda values: jnp.isfinite(values).all())
    for name, values in loaded.items():
        was_narrowed = values.dtype == jnp.float16 and stored[name].dtype != jnp.float16
        if was_narrowed and not is_finite(values):
            raise ConfigError(
                f"{path}: tensor {name} holds values that float16 cannot; "
                "use --config.model.dtype=bfloat16 or float32"
            )
