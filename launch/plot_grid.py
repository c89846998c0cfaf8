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
    """What a panel shows: a value for each line (a number of tokens) and host bandwidth."""

    title: str
    values: dict[tuple[int, float], float]
    form: str
    color: Callable[[float], str]
    line_name: str = "context"
    of_host: str = "of a host with 256 GB/s"

    @property
    def lines(self) -> list[int]:
        return sorted({line for line, _ in self.values})

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


def job_gains(rows: Sequence[Row]) -> Cells:
    """Return what apex gains in whole jobs (rows of simulate_jobs), by their output length."""
    found: dict[tuple[int, float], list[float]] = {}
    for row in rows:
        cell = row["output_tokens"], row["host_bandwidth_scale"]
        found.setdefault(cell, []).append(row["to_device_only"])
    values = {cell: statistics.median(ratios) for cell, ratios in found.items()}
    title = "Median rate of apex over device_only in whole jobs"
    return Cells(title, values, "{:.2f}", _gain_color, "output", "of a host with 410 GB/s")


def draw_panel(cells: Cells) -> Picture:
    """Return one panel."""
    height = TOP + CELL_HEIGHT * len(cells.lines) + 24
    return Picture(WIDTH, height, list(_panel(cells, 0)), cells.title)


def draw_grid(rows: Sequence[Row]) -> str:
    """Return two panels side by side as a file."""
    both, body = (losing(rows), gains(rows)), list[str]()
    for index, cells in enumerate(both):
        x = (WIDTH + 20) * index
        body += [text(x + 8, 16, cells.title, 'font-size="11"'), *_panel(cells, x)]
    height = TOP + CELL_HEIGHT * len(both[0].lines) + 24
    title = "Where fixed hybrids lose, and what apex gains"
    return Picture(2 * WIDTH + 20, height, body, title).to_file()


def _panel(cells: Cells, left: float) -> Iterator[str]:
    corner = left + LEFT
    yield text(corner - 8, TOP - 8, cells.line_name, 'class="muted" text-anchor="end"')
    bottom = TOP + CELL_HEIGHT * len(cells.lines) + 16
    yield text(corner, bottom, f"host bandwidth, {cells.of_host}", 'class="muted"')
    for column, scale in enumerate(cells.scales):
        x = corner + (column + 0.5) * CELL_WIDTH
        yield text(x, TOP - 8, f"x{scale:g}", 'text-anchor="middle"')
    for index, line in enumerate(cells.lines):
        y = TOP + CELL_HEIGHT * index
        yield text(corner - 8, y + 19, f"{line:,}", 'text-anchor="end"')
        for column, scale in enumerate(cells.scales):
            value = cells.values.get((line, scale))
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
