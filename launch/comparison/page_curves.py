"""A figure of lines: what changes along an axis, for several systems, with its table.

Owns how points become lines and a table of one column for each line. Called by the modules that
turn results into sections.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from launch.comparison.page import Figure, Source, Table
from launch.comparison.page_charts import Series, draw_lines
from launch.comparison.page_values import Cell, Found, Words, number, spread


class Point(NamedTuple):
    """value: a number, or a median with its least and most; None where there is only a reason."""

    line: str
    x: float
    value: Found | None
    reason: str = ""


@dataclass(frozen=True)
class Curves:
    """What a figure of lines is about. reference: a value of y with a line of its own."""

    title: str
    x_label: str
    y_label: str
    note: str
    log_x: bool = False
    reference: float | None = None


def curve_figure(points: Sequence[Point], curves: Curves, source: Source) -> Figure:
    """Return the lines and their table, a row for each x."""
    names = list(dict.fromkeys(point.line for point in points))
    series = [
        Series(
            name,
            tuple(
                (point.x, *_value(point.value))
                for point in sorted(points, key=lambda point: point.x)
                if point.line == name and point.value is not None
            ),
        )
        for name in names
    ]
    drawn = [one for one in series if one.points]
    picture = draw_lines(
        drawn,
        curves.title,
        f"{curves.y_label} by {curves.x_label}: {', '.join(one.label for one in drawn)}.",
        curves.x_label,
        curves.y_label,
        log_x=curves.log_x,
        reference=curves.reference,
    )
    xs = sorted({point.x for point in points})
    cells = {(point.x, point.line): _cell(point) for point in points}
    rows = [[f"{x:,g}", *(cells.get((x, name), "") for name in names)] for x in xs]
    return Figure(picture, Table([curves.x_label, *names], rows), curves.note, source)


def _value(found: Found) -> tuple[float, tuple[float, float] | None]:
    if isinstance(found.value, dict):
        return found.value["median"], (found.value["min"], found.value["max"])
    return found.value, None


def _cell(point: Point) -> Cell:
    if point.value is None:
        return Words(point.reason)
    return spread(point.value) if isinstance(point.value.value, dict) else number(point.value)
