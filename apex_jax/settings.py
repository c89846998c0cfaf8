"""Settings given as keyword arguments: the fields of Config, as its flags name them.

Owns their names and types, and sizes such as 3GiB; ranges are `config.validate`'s. Imports no jax.
Called by LLM, and for sizes by the command line.
"""

import copy
import dataclasses
import difflib
import re
from collections.abc import Mapping
from decimal import Decimal
from typing import Any, cast, get_args, get_type_hints

from apex_jax.config import Config, ConfigError

SIZE_FIELDS = ("cache.device_bytes", "cache.host_bytes")
_UNITS = {
    **dict.fromkeys(("", "b"), 1),
    **{f"{letter}b": 1000**power for power, letter in enumerate("kmgt", start=1)},
    **{f"{letter}ib": 1024**power for power, letter in enumerate("kmgt", start=1)},
}


def with_settings(config: Config, sections: Mapping[str, Any]) -> Config:
    """Return a copy of `config` in which some fields have other values.

    sections: as {"scheduler": {"strategy": "staggered"}}, or whole sections as dataclasses. Raises
    ConfigError for a name that does not exist or a value of the wrong type.
    """
    changed = copy.deepcopy(config)
    for name, values in sections.items():
        _check_name(name, config, "")
        section = getattr(changed, name)
        if isinstance(values, type(section)):
            setattr(changed, name, copy.deepcopy(values))
        elif isinstance(values, Mapping):
            for field, value in cast(Mapping[str, object], values).items():
                _set_field(section, name, field, value)
        else:
            raise ConfigError(
                f"{name} is {values!r}; it must be a mapping of settings or a "
                f"{type(section).__name__}"
            )
    return changed


def read_size(name: str, text: str) -> int:
    """Return the bytes of a size such as 3GiB, for the field `name`.

    Raises ConfigError for what is none. A bare letter (3G) is refused: it stands for 1000 or 1024.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-z]*)\s*", text.lower())
    factor = None if match is None else _UNITS.get(match[2])
    if match is None or factor is None or (factor == 1 and "." in match[1]):
        raise ConfigError(
            f"{name} is {text!r}; it must be a whole number of bytes, or a size such as 3GiB, "
            "512MiB or 1.5GB"
        )
    return int(Decimal(match[1]) * factor)


def _set_field(section: Any, section_name: str, field: str, value: object) -> None:
    """Set one field of a section, if there is one and the value is of its type."""
    name = f"{section_name}.{field}"
    _check_name(field, section, f"{section_name}.")
    if isinstance(value, str) and name in SIZE_FIELDS:
        value = read_size(name, value)
    hint: Any = get_type_hints(section.__class__)[field]
    kinds: tuple[Any, ...] = get_args(hint) or (hint,)
    is_int_for_float = float in kinds and type(value) is int
    # A bool is an int to Python, and no number of requests.
    is_right = isinstance(value, kinds) and (not isinstance(value, bool) or bool in kinds)
    if not is_right and not is_int_for_float:
        names = " or ".join(kind.__name__ for kind in kinds).replace("NoneType", "None")
        raise ConfigError(f"{name} is {value!r}; it must be {names}")
    setattr(section, field, value)


def _check_name(name: str, owner: Any, prefix: str) -> None:
    known = [field.name for field in dataclasses.fields(owner)]
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {prefix}{near[0]}?" if near else "known are " + ", ".join(known)
        raise ConfigError(f"{prefix}{name}: there is no such setting; {hint}")
