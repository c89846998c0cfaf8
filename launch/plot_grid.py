"""Draw the grid's gains over device_only as SVG: a cell for each host bandwidth and context.

Owns the pictures and what a cell is; its rows are simulate_grid's. Called by simulate_grid and by
the report.
"""

import statistics
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from launch.drawing import Picture, rect, text

Row = dict[str, Any]
WIDTH, CELL_WIDTH, CELL_HEIGHT, LEFT, TOP = 360, 50, 30, 56, 44  # pixels of a panel
# From Paul Tol's sunset scheme: a loss, no difference, more and more of a gain.
LOSS, NONE, GAINS = "#f67e4b", "#eaeccc", ("#c2e4ef", "#98cae1", "#6ea6cd", "#4a7bb7")
HYBRIDS = ("async_overlap", "staggered_2", "passes_2", "passes_4", "asymmetric_pipelining")
GAIN_STEPS = (1.02, 1.1, 1.25, 1.5)


class Cells(NamedTuple):
    """What a panel shows: a value for each context (line) and host bandwidth (column)."""

    title: str
    values: dict[tuple[int, float], float]
    form: str
    color: Callable[[float], str]

    @property
    def contexts(self) -> list[int]:
        return sorted({context for context, _ in self.values})

    @property
    def scales(self) -> list[float]:
        return sorted({scale for _, scale in self.values})


def losing(rows: Sequence[Row]) -> Cells:
    """Return where fixed hybrids lose: the share of conditions in which one of them does."""
    title = "Share of conditions in which a fixed hybrid is below device_only"
    return Cells(title, _by_cell(rows, _losing), "{:.0%}", _loss_color)


def gains(rows: Sequence[Row]) -> Cells:
    """Return what apex gains: the median over a cell's conditions."""
    title = "Median rate of apex over device_only"
    return Cells(title, _by_cell(rows, _median_gain), "{:.2f}", _gain_color)


def draw_panel(cells: Cells) -> Picture:
    """Return one panel."""
    height = TOP + CELL_HEIGHT * len(cells.contexts) + 24
    return Picture(WIDTH, height, list(_panel(cells, 0)), cells.title)


def draw_grid(rows: Sequence[Row]) -> str:
    """Return two panels side by side as a file."""
    both, body = (losing(rows), gains(rows)), list[str]()
    for index, cells in enumerate(both):
        x = (WIDTH + 20) * index
        body += [text(x + 8, 16, cells.title, 'font-size="11"'), *_panel(cells, x)]
    height = TOP + CELL_HEIGHT * len(both[0].contexts) + 24
    title = "Where fixed hybrids lose, and what apex gains"
    return Picture(2 * WIDTH + 20, height, body, title).to_file()


def _panel(cells: Cells, left: float) -> Iterator[str]:
    corner = left + LEFT
    yield text(corner - 8, TOP - 8, "context", 'class="muted" text-anchor="end"')
    bottom = TOP + CELL_HEIGHT * len(cells.contexts) + 16
    yield text(corner, bottom, "host bandwidth, of a host with 256 GB/s", 'class="muted"')
    for column, scale in enumerate(cells.scales):
        x = corner + (column + 0.5) * CELL_WIDTH
        yield text(x, TOP - 8, f"x{scale:g}", 'text-anchor="middle"')
    for line, context in enumerate(cells.contexts):
        y = TOP + CELL_HEIGHT * line
        yield text(corner - 8, y + 19, f"{context:,}", 'text-anchor="end"')
        for column, scale in enumerate(cells.scales):
            value = cells.values.get((context, scale))
            if value is None:
                continue
            x = corner + column * CELL_WIDTH
            yield rect(x, y, CELL_WIDTH - 2, CELL_HEIGHT - 2, cells.color(value))
            attributes = 'class="on-color" text-anchor="middle"'
            yield text(x + CELL_WIDTH / 2 - 1, y + 18, cells.form.format(value), attributes)


def _by_cell(
    rows: Sequence[Row], value: Callable[[Sequence[Row]], float]
) -> dict[tuple[int, float], float]:
    found: dict[tuple[int, float], list[Row]] = {}
    for row in rows:
        context = row["prompt_tokens"] + row["output_tokens"]
        found.setdefault((context, row["host_bandwidth_scale"]), []).append(row)
    return {cell: value(there) for cell, there in found.items()}


def _losing(rows: Sequence[Row]) -> float:
    return statistics.fmean(min(_gain(row, name) for name in HYBRIDS) < 1 for row in rows)


def _median_gain(rows: Sequence[Row]) -> float:
    return statistics.median(_gain(row, "apex") for row in rows)


def _gain(row: Row, strategy: str) -> float:
    return row["rates"][strategy] / row["rates"]["device_only"]


def _loss_color(share: float) -> str:
    return LOSS if share > 0.5 else "#fdb366" if share > 0.1 else NONE


def _gain_color(gain: float) -> str:
    if gain < 1 / GAIN_STEPS[0]:
        return LOSS
    return (NONE, *GAINS)[sum(gain >= step for step in GAIN_STEPS)]
