"""Draw the grid's gains over device_only as SVG: a cell for each host bandwidth and context.

Owns the picture; its rows are simulate_grid's.
"""

import statistics
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from xml.sax.saxutils import escape

Row = dict[str, Any]
WIDTH, CELL_WIDTH, CELL_HEIGHT, LEFT, TOP = 880, 62, 30, 70, 62  # pixels
# From Paul Tol's sunset scheme: a loss, no difference, more and more of a gain.
LOSS, NONE, GAINS = "#f67e4b", "#eaeccc", ("#c2e4ef", "#98cae1", "#6ea6cd", "#4a7bb7")
HYBRIDS = ("async_overlap", "staggered_2", "passes_2", "passes_4", "asymmetric_pipelining")
GAIN_STEPS = (1.02, 1.1, 1.25, 1.5)


def draw_grid(rows: Sequence[Row]) -> str:
    """Return two panels: where fixed hybrids lose, and what apex gains."""
    panels = [
        *_panel(
            rows, "a fixed hybrid is below device_only: share", 0, _losing, _loss_color, "{:.0%}"
        ),
        *_panel(
            rows, "apex over device_only: median", WIDTH / 2, _median_gain, _gain_color, "{:.2f}"
        ),
    ]
    num_lines = len({_context(row) for row in rows})
    height = TOP + CELL_HEIGHT * num_lines + 34
    return "\n".join(
        (
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height}" '
            f'viewBox="0 0 {WIDTH} {height}" font-family="Helvetica, Arial, sans-serif" '
            'font-size="11" fill="#222222">',
            f'<rect width="{WIDTH}" height="{height}" fill="#ffffff"/>',
            *panels,
            "</svg>\n",
        )
    )


def _panel(
    rows: Sequence[Row],
    title: str,
    left: float,
    value: Callable[[Sequence[Row]], float],
    color: Callable[[float], str],
    form: str,
) -> Iterator[str]:
    scales = sorted({row["host_bandwidth_scale"] for row in rows})
    contexts = sorted({_context(row) for row in rows})
    yield _text(left + 12, 20, title, 'font-size="13"')
    yield _text(left + LEFT - 8, TOP - 10, "context", 'text-anchor="end"')
    bottom = TOP + CELL_HEIGHT * len(contexts)
    yield _text(left + LEFT, bottom + 18, "host bandwidth, of a host with 256 GB/s", "")
    for column, scale in enumerate(scales):
        x = left + LEFT + (column + 0.5) * min(CELL_WIDTH, (WIDTH / 2 - LEFT - 8) / len(scales))
        yield _text(x, TOP - 10, f"x{scale:g}", 'text-anchor="middle"')
    for line, context in enumerate(contexts):
        y = TOP + CELL_HEIGHT * line
        yield _text(left + LEFT - 8, y + 19, str(context), 'text-anchor="end"')
        for column, scale in enumerate(scales):
            width = min(CELL_WIDTH, (WIDTH / 2 - LEFT - 8) / len(scales))
            there = [
                row
                for row in rows
                if row["host_bandwidth_scale"] == scale and _context(row) == context
            ]
            if not there:
                continue
            x, shown = left + LEFT + column * width, value(there)
            yield (
                f'<rect x="{x:.1f}" y="{y}" width="{width - 1:.1f}" height="{CELL_HEIGHT - 1}" '
                f'fill="{color(shown)}"/>'
            )
            yield _text(x + width / 2, y + 19, form.format(shown), 'text-anchor="middle"')


def _context(row: Row) -> int:
    return row["prompt_tokens"] + row["output_tokens"]


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


def _text(x: float, y: float, text: str, attributes: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" {attributes}>{escape(text)}</text>'
