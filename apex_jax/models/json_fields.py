"""Typed access to the attributes of a JSON file, with errors that name file, key and value.

Owns what counts as an integer or a number there (true is neither, null counts as absent).
Called by the readers of model folders. Imports no jax.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import TypeVar

from apex_jax.config import ConfigError


class _Required(Enum):
    """A type of its own, because None is a default one may want."""

    REQUIRED = 0


REQUIRED = _Required.REQUIRED
_Default = TypeVar("_Default")


@dataclass(frozen=True)
class Fields:
    """The attributes of one JSON object.

    path: of the file, for messages.
    prefix: where in the file the object stands, as in "rope_scaling."; empty at the top.
    """

    path: Path
    values: Mapping[str, object]
    prefix: str = ""

    def error(self, name: str, value: object, right: str) -> ConfigError:
        """Return the error that says what the value is and what it must be."""
        return ConfigError(f"{self.path}: {self.prefix}{name} is {value!r}; it must be {right}")

    def text(self, name: str, default: _Default | _Required = REQUIRED) -> str | _Default:
        """Return a string."""
        value = self.values.get(name)
        if value is None:
            return self._default(name, default)
        if not isinstance(value, str):
            raise self.error(name, value, "a string")
        return value

    def boolean(self, name: str, default: _Default | _Required = REQUIRED) -> bool | _Default:
        """Return true or false."""
        value = self.values.get(name)
        if value is None:
            return self._default(name, default)
        if not isinstance(value, bool):
            raise self.error(name, value, "true or false")
        return value

    def integer(self, name: str, default: _Default | _Required = REQUIRED) -> int | _Default:
        """Return an integer."""
        value = self.values.get(name)
        if value is None:
            return self._default(name, default)
        if not isinstance(value, int) or isinstance(value, bool):
            raise self.error(name, value, "an integer")
        return value

    def count(self, name: str, default: int | _Required = REQUIRED) -> int:
        """Return a positive integer."""
        value = self.integer(name, default)
        if value < 1:
            raise self.error(name, value, "a positive integer")
        return value

    def positive(self, name: str, default: float | _Required = REQUIRED) -> float:
        """Return a positive finite number."""
        value = self.values.get(name)
        if value is None:
            return self._default(name, default)
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise self.error(name, value, "a positive number")
        if not 0 < value < math.inf:
            raise self.error(name, value, "a positive number")
        return float(value)

    def _default(self, name: str, default: _Default | _Required) -> _Default:
        if isinstance(default, _Required):
            raise ConfigError(f"{self.path}: {self.prefix}{name} is missing")
        return default
