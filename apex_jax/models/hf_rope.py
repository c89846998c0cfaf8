"""Reads rotary embedding settings in the three ways that config.json files spell them.

    rope_theta beside "rope_scaling": {"type": ...}        2023
    rope_theta beside "rope_scaling": {"rope_type": ...}   2024
    "rope_parameters": {"rope_type": ..., "rope_theta": ...}  from transformers 5

Refuses scaling types and keys that it does not know, and spellings that contradict each other.
"""

from collections.abc import Callable, Mapping
from typing import cast

from apex_jax.config import ConfigError, RopeConfig
from apex_jax.models.json_fields import Fields

_DEFAULT_THETA = 10_000.0  # transformers' own, where no file says otherwise


def read_rope(fields: Fields) -> RopeConfig:
    """Return the rotary embedding of a config.json; ConfigError names what is not supported."""
    found = [
        _read_block(fields, name)
        for name in ("rope_scaling", "rope_parameters")
        if fields.values.get(name)  # {} says as little as null
    ]
    if len(found) == 2 and found[0] != found[1]:
        raise ConfigError(f"{fields.path}: rope_scaling and rope_parameters contradict each other")
    _check_rotates_all(fields)
    return found[0] if found else RopeConfig(theta=fields.positive("rope_theta", _DEFAULT_THETA))


def _read_block(fields: Fields, name: str) -> RopeConfig:
    values = fields.values[name]
    if not isinstance(values, dict):
        raise fields.error(name, values, "an object or null")
    block = Fields(fields.path, cast(dict[str, object], values), f"{name}.")
    scaling = _scaling_type(block)
    if scaling not in _READERS:
        raise block.error(
            "rope_type", scaling, "one of " + ", ".join(_READERS) + ", the types supported"
        )
    reader, keys = _READERS[scaling]
    for key, value in block.values.items():
        if key not in (*keys, *_COMMON_KEYS) and value is not None:
            raise ConfigError(
                f"{block.path}: {block.prefix}{key} is {value!r}; this key is not supported with "
                f"rope_type {scaling}"
            )
    _check_rotates_all(block)
    return reader(block, _theta(fields, block))


def _scaling_type(block: Fields) -> str:
    old, new = block.text("type", None), block.text("rope_type", None)
    if old is not None and new is not None and old != new:
        raise block.error("type", old, f"the same as {block.prefix}rope_type ({new!r})")
    return new or old or "default"


def _theta(fields: Fields, block: Fields) -> float:
    outer = fields.positive("rope_theta", _DEFAULT_THETA)
    theta = block.positive("rope_theta", outer)
    if fields.values.get("rope_theta") is not None and theta != outer:
        raise block.error("rope_theta", theta, f"the same as rope_theta ({outer!r})")
    return theta


def _check_rotates_all(fields: Fields) -> None:
    share = fields.positive("partial_rotary_factor", 1.0)
    if share != 1:
        raise fields.error("partial_rotary_factor", share, "1 or absent: every pair is rotated")


def _factor(block: Fields) -> float:
    factor = block.positive("factor")
    if factor < 1:
        raise block.error("factor", factor, "at least 1")
    return factor


def _read_default(block: Fields, theta: float) -> RopeConfig:
    return RopeConfig(theta=theta)


def _read_linear(block: Fields, theta: float) -> RopeConfig:
    return RopeConfig(theta=theta, scaling="linear", factor=_factor(block))


def _read_llama3(block: Fields, theta: float) -> RopeConfig:
    low, high = block.positive("low_freq_factor"), block.positive("high_freq_factor")
    if low >= high:
        raise block.error("low_freq_factor", low, f"below high_freq_factor ({high})")
    return RopeConfig(
        theta=theta,
        scaling="llama3",
        factor=_factor(block),
        low_freq_factor=low,
        high_freq_factor=high,
        original_max_position_embeddings=block.count("original_max_position_embeddings"),
    )


_COMMON_KEYS = ("type", "rope_type", "rope_theta", "partial_rotary_factor")
_READERS: Mapping[str, tuple[Callable[[Fields, float], RopeConfig], tuple[str, ...]]] = {
    "default": (_read_default, ()),
    "linear": (_read_linear, ("factor",)),
    "llama3": (
        _read_llama3,
        ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    ),
}
