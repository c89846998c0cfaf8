"""The result files that a report can be made of: read, told apart, and where each came from.

Owns the loading; a file that is none of them is refused by its name, with what is readable. Called
by launch/report.py.
"""

import csv
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from launch.comparison.decode import FileError, load_object
from launch.comparison.page import Section, Source
from launch.comparison.page_values import Found
from launch.comparison.result_file import command_of


@dataclass(frozen=True)
class Loaded:
    """A result file. content: knows the place of each value. rows: of the CSV file beside it."""

    content: Found
    source: Source
    rows: Found | None = None

    @property
    def path(self) -> Path:
        return self.source.path


@dataclass(frozen=True)
class Kind:
    """A kind of result file: what makes it, what tells it from others, what a page says of it."""

    made_by: str
    fits: Callable[[dict[str, Any]], bool]
    section: Callable[[Loaded], Section]


def find_files(paths: Sequence[Path], kinds: Sequence[Kind]) -> tuple[list[Path], list[Path]]:
    """Return the files to show, those of folders included, and those of folders nobody can show.

    Raises FileError where a path is neither a file nor a folder.
    """
    shown: list[Path] = []
    left_out: list[Path] = []
    for path in paths:
        if not path.exists():
            raise FileError(f"there is no file or folder {path}")
        if not path.is_dir():
            shown.append(path)
            continue
        for one in sorted(path.rglob("*.json")):
            content = _read(one)
            known = any(kind.fits(content) for kind in kinds)
            (shown if known else left_out).append(one)
    return shown, left_out


def sections_of(paths: Sequence[Path], kinds: Sequence[Kind], folder: Path) -> list[Section]:
    """Return a section for each file, in the order of kinds. folder: where the page will lie.

    Raises FileError for a file of no kind, or one that lacks what its kind has.
    """
    found: list[tuple[int, Section]] = []
    for path in paths:
        content = _read(path)
        order = next((index for index, kind in enumerate(kinds) if kind.fits(content)), None)
        if order is None:
            readable = "; ".join(kind.made_by for kind in kinds)
            raise FileError(f"{path} is no result file that is known here; readable are {readable}")
        try:
            found.append((order, kinds[order].section(_load(path, content, folder))))
        except (KeyError, TypeError, IndexError, AttributeError) as error:
            raise FileError(
                f"{path} looks like a file of {kinds[order].made_by}, but its rows are not what "
                f"that writes ({type(error).__name__}: {error})"
            ) from error
    return _merged([section for _, section in sorted(found, key=lambda pair: pair[0])])


def _merged(sections: Sequence[Section]) -> list[Section]:
    """Return sections, those that say the same as one with all their figures."""
    by_text: dict[tuple[str, ...], Section] = {}
    for one in sections:
        text = (one.title, one.intro, one.shows, one.cannot)
        before = by_text[text].figures if text in by_text else ()
        by_text[text] = replace(one, figures=[*before, *one.figures])
    return list(by_text.values())


def _read(path: Path) -> dict[str, Any]:
    beside = path.with_suffix(".json")
    if path.suffix == ".csv" and beside.exists():
        raise FileError(f"{path} holds rows only; name {beside}, which has the command beside them")
    try:
        return load_object(path.read_bytes(), str(path))
    except OSError as error:
        raise FileError(f"{path} cannot be read: {error.strerror}") from None


def _load(path: Path, content: dict[str, Any], folder: Path) -> Loaded:
    place = os.path.relpath(path, folder).replace(os.sep, "/") + "#"
    environment = content["environment"]
    table, rows = path.with_suffix(".csv"), None
    if "groups" not in content and "rows" not in content and table.exists():
        with table.open(newline="") as file:
            values = [
                {name: _value(text) for name, text in row.items()} for row in csv.DictReader(file)
            ]
        rows = Found(values, place.replace(path.name, table.name))
    made = _made(environment)
    return Loaded(Found(content, place), Source(path, command_of(environment), made), rows)


def _value(text: str) -> str | float | None:
    """Return a CSV cell as what it was: nothing, a number or text."""
    if text == "":
        return None
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def _made(environment: dict[str, Any]) -> str:
    """Return on what, with which versions, from which commit and when."""
    cpu, git, packages = environment["cpu"], environment["git"], environment["packages"]
    gpus = [gpu["name"] for gpu in environment["nvidia_gpus"]]
    commit = (git["commit"] or "unknown")[:8] + (" with changes" if git["is_dirty"] else "")
    return " · ".join(
        (
            *gpus,
            f"{cpu['model']}, {cpu['num_usable_cores']} cores",
            f"Python {environment['python']}, jax {packages['jax']}",
            f"commit {commit}",
            environment["date"][:10],
        )
    )
