"""Draw simulated rates as SVG: for each condition a bar for every strategy.

Owns the picture; its rows are simulate's.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any
from xml.sax.saxutils import escape

from launch.plot_timeline import BAR_COLORS, OTHER_COLOR

Row = dict[str, Any]
WIDTH, LEFT, RIGHT, BAR, GAP = 880, 170, 150, 16, 30  # pixels


def draw_rates(rows: Sequence[Row]) -> str:
    """Return a group of bars for each condition; one that could not be is its reason."""
    y, body = 8.0, list[str]()
    names = list(dict.fromkeys(row["strategy"] for row in rows if "strategy" in row))
    colors = dict(zip(names, BAR_COLORS, strict=False))
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(_title(row), []).append(row)
    for title, group in groups.items():
        y += GAP
        body.append(_text(8, y - 6, title, 'font-size="12"'))
        most = max((row["rate"] for row in group if "rate" in row), default=1.0)
        for row in group:
            body += _bar(row, most, y, colors)
            y += BAR + 2
    height = y + 12
    return "\n".join(
        (
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height:.0f}" '
            f'viewBox="0 0 {WIDTH} {height:.0f}" font-family="Helvetica, Arial, sans-serif" '
            'font-size="11" fill="#222222">',
            f'<rect width="{WIDTH}" height="{height:.0f}" fill="#ffffff"/>',
            *body,
            "</svg>\n",
        )
    )


def _title(row: Row) -> str:
    lengths = f"{row['prompt_tokens']}+{row['output_tokens']} tokens ({row['workload']})"
    kv = (
        f", {row['device_kv_tokens']} tokens of KV on the card" if "device_kv_tokens" in row else ""
    )
    host = f"{row['host']} x{row['host_bandwidth_scale']:g}"
    return f"{row['model']} on {row['device']} with {host}, {lengths}{kv}"


def _bar(row: Row, most: float, y: float, colors: Mapping[str, str]) -> Iterator[str]:
    if "rate" not in row:
        yield _text(16, y + 12, row["reason"], "")
        return
    width = (WIDTH - LEFT - RIGHT) * row["rate"] / most
    color = colors.get(row["strategy"], OTHER_COLOR)
    gain = f"  x{row['to_device_only']:.2f}" if "to_device_only" in row else ""
    yield _text(LEFT - 8, y + 12, row["strategy"], 'text-anchor="end"')
    yield f'<rect x="{LEFT}" y="{y}" width="{width:.1f}" height="{BAR}" fill="{color}"/>'
    yield _text(LEFT + width + 6, y + 12, f"{row['rate']:.4g} tokens/s{gain}", "")


def _text(x: float, y: float, text: str, attributes: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" {attributes}>{escape(text)}</text>'
