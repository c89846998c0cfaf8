"""Numbers that know where they stand: a result file's content with the place of every value.

Owns how a number of the report is written and where it points to, so that whoever doubts one finds
it in its file. Called by the modules that turn results into sections of the page.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from html import escape
from typing import Any


@dataclass(frozen=True)
class Found:
    """A value of a result file. place: FILE#/groups/cells/3/of_read."""

    value: Any
    place: str

    def __getitem__(self, key: str | int) -> "Found":
        return Found(self.value[key], f"{self.place}/{key}")

    def __iter__(self) -> Iterator["Found"]:
        return (self[index] for index in range(len(self.value)))

    def get(self, key: str) -> "Found | None":
        """Return a field, None where there is none or it is null."""
        return None if self.value.get(key) is None else self[key]


@dataclass(frozen=True)
class Number:
    """A number in a table. text: as it is shown. place: None where it was computed for the page."""

    value: float
    text: str
    place: str | None

    def to_html(self) -> str:
        place = 'class="computed"' if self.place is None else f'data-at="{escape(self.place)}"'
        return f'<data value="{json.dumps(self.value)}" {place}>{escape(self.text)}</data>'


@dataclass(frozen=True)
class Words:
    """Text in a table that may take several lines, such as why there is no number."""

    text: str

    def to_html(self) -> str:
        return escape(self.text, quote=False)


Part = str | Number | Words
Cell = Part | tuple[Part, ...]


def number(found: Found | float, unit: str = "") -> Number:
    """Return a number to three digits, or to the whole one where it is large."""
    value, place = (found.value, found.place) if isinstance(found, Found) else (found, None)
    return Number(value, short(value) + unit, place)


def percent(found: Found | float) -> Number:
    """Return a share as per cent."""
    value, place = (found.value, found.place) if isinstance(found, Found) else (found, None)
    return Number(value, short(100 * value) + "\N{NO-BREAK SPACE}%", place)


def maybe(found: Found | None) -> Cell:
    """Return a number, or nothing where there is none."""
    return "" if found is None else number(found)


SPREAD = ("median", "min", "max")


def spread(found: Found | None, names: tuple[str, str, str] = SPREAD) -> Cell:
    """Return a median with the least and the most in brackets."""
    if found is None:
        return ""
    middle, low, high = (found[name] for name in names)
    if short(low.value) == short(high.value):
        return number(middle)
    return number(middle), " (", number(low), " to ", number(high), ")"


def short(value: float) -> str:
    """Return three digits of a number, all those before the point where there are more."""
    if isinstance(value, int) or abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:#.3g}".rstrip(".") if abs(value) >= 0.001 else f"{value:.3g}"
