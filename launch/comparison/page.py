"""The report as a page: sections of figures, each with its table and where it came from.

Owns the HTML, which needs neither scripts nor a network, and the files: FOLDER/index.html and an
SVG file for each figure beside it. What a section says is the business of the modules page_*.
"""

import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from launch.comparison.page_values import Cell, Part, Words
from launch.drawing import STYLE, Picture

CSS = Path(__file__).with_name("page.css")


@dataclass(frozen=True)
class Source:
    """Where a figure's numbers are from. made: on what, when, from which commit."""

    path: Path
    command: str | None
    made: str


@dataclass(frozen=True)
class Table:
    """rows: the first cell of each is its heading."""

    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]


@dataclass(frozen=True)
class Figure:
    """A picture, the same as a table, and a sentence or two on how to read them."""

    picture: Picture
    table: Table
    note: str
    source: Source


@dataclass(frozen=True)
class Section:
    """What one result file says. shows, cannot: what its numbers can prove, and what not."""

    title: str
    intro: str
    shows: str
    cannot: str
    figures: Sequence[Figure]


def write_page(sections: Sequence[Section], folder: Path) -> list[Path]:
    """Write index.html and the figures' SVG files; return their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    names = _Names()
    parts: list[str] = []
    links: list[str] = []
    written = [folder / "index.html"]
    for section in sections:
        name = names.of(section.title)
        links.append(f'<li><a href="#{name}">{escape(section.title)}</a></li>')
        figures: list[str] = []
        for figure in section.figures:
            own = names.of(figure.picture.title)
            written.append(folder / f"{own}.svg")
            written[-1].write_text(figure.picture.to_file())
            lines = _figure(figure, own, len(written) - 1, folder)
            figures.append("\n".join(lines))
        parts.append("\n".join(_section(section, name, figures)))
    written[0].write_text(_document(links, parts))
    return written


class _Names:
    """Ids that are unique on the page and in its folder."""

    def __init__(self) -> None:
        self._taken = Counter[str]()

    def of(self, title: str) -> str:
        name = re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-")
        self._taken[name] += 1
        return name if self._taken[name] == 1 else f"{name}-{self._taken[name]}"


def _document(links: Iterable[str], sections: Iterable[str]) -> str:
    return "\n".join(
        (
            "<!DOCTYPE html>",
            '<html lang="en">',
            "<head>",
            '<meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            "<title>APEX-JAX: results</title>",
            f"<style>\n{STYLE}{CSS.read_text()}</style>",
            "</head>",
            "<body>",
            "<header>",
            "<h1>APEX-JAX: results</h1>",
            "<p>Beneath each figure stand the command that made its numbers and the file that holds"
            " them. A number in a table carries its exact value and its place in that file"
            " (<code>data-at</code>); those computed for this page, such as medians over several"
            " rows, are in italics.</p>",
            "</header>",
            '<nav aria-label="Contents">',
            "<ul>",
            *links,
            "</ul>",
            "</nav>",
            "<main>",
            *sections,
            "</main>",
            "</body>",
            "</html>\n",
        )
    )


def _section(section: Section, name: str, figures: Iterable[str]) -> Iterator[str]:
    yield f'<section id="{name}" aria-labelledby="{name}-heading">'
    yield f'<h2 id="{name}-heading">{escape(section.title)}</h2>'
    yield f"<p>{escape(section.intro)}</p>"
    yield '<div class="claims">'
    yield f"<div><h3>What this can show</h3><p>{escape(section.shows)}</p></div>"
    yield f"<div><h3>What it cannot</h3><p>{escape(section.cannot)}</p></div>"
    yield "</div>"
    yield from figures
    yield "</section>"


def _figure(figure: Figure, name: str, index: int, folder: Path) -> Iterator[str]:
    title = escape(figure.picture.title)
    yield f'<figure id="{name}">'
    yield f'<h3 id="{name}-heading">{title}</h3>'
    yield '<div class="both">'
    yield f'<div class="picture">{figure.picture.to_element(name)}</div>'
    yield f'<section class="scroll" tabindex="0" aria-label="Table {index}: {title}">'
    yield from _table(figure.table)
    yield "</section>"
    yield "</div>"
    yield "<figcaption>"
    yield f"<p>{escape(figure.note)}</p>"
    source = figure.source
    link = os.path.relpath(source.path, folder).replace(os.sep, "/")
    made = f"<code>{escape(source.command)}</code>" if source.command else "an unknown command"
    yield f"<p>Made by {made}</p>"
    yield (
        f'<p>Data: <a href="{escape(link)}">{escape(source.path.name)}</a>'
        f' · picture: <a href="{name}.svg">SVG</a> · {escape(source.made)}</p>'
    )
    yield "</figcaption>"
    yield "</figure>"


def _table(table: Table) -> Iterator[str]:
    yield "<table>"
    heads = "".join(f'<th scope="col">{_breakable(name)}</th>' for name in table.columns)
    yield f"<thead><tr>{heads}</tr></thead>"
    yield "<tbody>"
    for head, *cells in table.rows:
        yield f'<tr><th scope="row">{_cell(head)}</th>{"".join(map(_data_cell, cells))}</tr>'
    yield "</tbody>"
    yield "</table>"


def _breakable(name: str) -> str:
    """Return a name that may be broken at its underscores: else it makes a column too wide."""
    return escape(name).replace("_", "_<wbr>")


def _data_cell(cell: Cell) -> str:
    has_words = any(isinstance(part, Words) for part in _parts(cell))
    attributes = ' class="words"' if has_words else ""
    return f"<td{attributes}>{_cell(cell)}</td>"


def _cell(cell: Cell) -> str:
    return "".join(
        escape(part, quote=False) if isinstance(part, str) else part.to_html()
        for part in _parts(cell)
    )


def _parts(cell: Cell) -> tuple[Part, ...]:
    return cell if isinstance(cell, tuple) else (cell,)
