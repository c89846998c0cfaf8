"""JSON objects into dataclasses, strictly: what is wrong is one message that says where.

Owns the check of names and types by a dataclass's annotations; ranges are the classes' own, in
their `__post_init__`, which raises ValueError. Called by the readers of workload and result files.
Imports no jax.
"""

import dataclasses
import json
import types
from collections.abc import Mapping
from functools import cache
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

Class = TypeVar("Class")
MAX_SHOWN = 60  # characters of a value in a message
NAMES = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}


class FileError(ValueError):
    """A file that is not what it should be; the message names it, the place and the remedy."""


def decode(cls: type[Class], item: object, where: str) -> Class:
    """Return a dataclass filled from a JSON object; FileError says what is wrong with `where`."""
    hints = _hints(cls)
    if not isinstance(item, Mapping):
        raise FileError(f"{where} is {show(item)}; it must be an object")
    for name in item:
        if name not in hints:
            raise FileError(f"{where} has the field {name!r}; those known are {', '.join(hints)}")
    optional = {one.name for one in dataclasses.fields(_dataclass(cls)) if _has_default(one)}
    for name in hints:
        if name not in item and name not in optional:
            raise FileError(f"{where} lacks the field {name!r}")
    values = {name: _value(hints[name], value, f"{where}: {name}") for name, value in item.items()}
    try:
        return cls(**values)
    except FileError:
        raise
    except ValueError as error:
        raise FileError(f"{where}: {error}") from None


def load_object(text: str | bytes, where: str) -> dict[str, Any]:
    """Parse JSON that must be an object; FileError else."""
    try:
        item = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise FileError(f"{where} is not JSON: {error}") from None
    if not isinstance(item, dict):
        raise FileError(f"{where} is {show(item)}; it must be an object")
    return item


def show(value: object) -> str:
    """Return a value as a message shows it."""
    text = json.dumps(value, default=str)
    return text if len(text) <= MAX_SHOWN else f"{text[: MAX_SHOWN - 4]} ..."


def _value(hint: Any, value: Any, where: str) -> Any:
    """Return a value as its annotation says it is."""
    origin, arguments = get_origin(hint), get_args(hint)
    if hint is Any:
        return value
    if origin in (Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        (hint,) = (one for one in arguments if one is not type(None))
        return _value(hint, value, where)
    if origin is Literal:
        if value not in arguments:
            raise FileError(f"{where} is {show(value)}; it must be one of {', '.join(arguments)}")
        return value
    if dataclasses.is_dataclass(hint):
        return decode(_dataclass(hint), value, where)
    if origin is dict:
        if not isinstance(value, dict):
            raise FileError(f"{where} is {show(value)}; it must be an object")
        return {key: _value(arguments[1], one, f"{where}.{key}") for key, one in value.items()}
    if origin is tuple:
        if not isinstance(value, list):
            raise FileError(f"{where} is {show(value)}; it must be a list")
        if arguments[0] is int and set(map(type, value)) <= {int}:  # token ids, by the million
            return tuple(value)
        return tuple(_value(arguments[0], one, f"{where}[{i}]") for i, one in enumerate(value))
    if hint is float and type(value) is int:
        return float(value)
    if type(value) is not hint:
        raise FileError(f"{where} is {show(value)}; it must be {NAMES[hint]}")
    return value


@cache
def _hints(cls: type) -> dict[str, Any]:
    return get_type_hints(cls)


def _dataclass(cls: Any) -> Any:
    assert dataclasses.is_dataclass(cls)
    return cls


def _has_default(field: dataclasses.Field[Any]) -> bool:
    missing = dataclasses.MISSING
    return field.default is not missing or field.default_factory is not missing
