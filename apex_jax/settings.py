"""Settings given as keyword arguments: the fields of Config, as its flags name them.

Owns their names and types; ranges are `config.validate`'s. Imports no jax. Called by LLM.
"""

import copy
import dataclasses
import difflib
from collections.abc import Mapping
from typing import Any, cast, get_args, get_type_hints

from apex_jax.config import Config, ConfigError


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


def _set_field(section: Any, section_name: str, field: str, value: object) -> None:
    """Set one field of a section, if there is one and the value is of its type."""
    _check_name(field, section, f"{section_name}.")
    hint: Any = get_type_hints(section.__class__)[field]
    kinds: tuple[Any, ...] = get_args(hint) or (hint,)
    is_int_for_float = float in kinds and type(value) is int
    # A bool is an int to Python, and no number of requests.
    is_right = isinstance(value, kinds) and (not isinstance(value, bool) or bool in kinds)
    if not is_right and not is_int_for_float:
        names = " or ".join(kind.__name__ for kind in kinds).replace("NoneType", "None")
        raise ConfigError(f"{section_name}.{field} is {value!r}; it must be {names}")
    setattr(section, field, value)


def _check_name(name: str, owner: Any, prefix: str) -> None:
    known = [field.name for field in dataclasses.fields(owner)]
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {prefix}{near[0]}?" if near else "known are " + ", ".join(known)
        raise ConfigError(f"{prefix}{name}: there is no such setting; {hint}")
