"""Draw simulated rates as SVG: for each condition a bar for every strategy.

Owns the picture; its rows are simulate's.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from launch.drawing import LIGHT, OTHER, Picture, rect, text

Row = dict[str, Any]
WIDTH, LEFT, RIGHT, BAR, GAP = 880, 170, 150, 16, 30  # pixels


def draw_rates(rows: Sequence[Row]) -> str:
    """Return a group of bars for each condition; one that could not be is its reason."""
    y, body = 8.0, list[str]()
    names = list(dict.fromkeys(row["strategy"] for row in rows if "strategy" in row))
    colors = dict(zip(names, LIGHT, strict=False))
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(_title(row), []).append(row)
    for title, group in groups.items():
        y += GAP
        body.append(text(8, y - 6, title, 'font-size="12"'))
        most = max((row["rate"] for row in group if "rate" in row), default=1.0)
        for row in group:
            body += _bar(row, most, y, colors)
            y += BAR + 2
    return Picture(WIDTH, y + 12, body, "Simulated rates by condition and strategy").to_file()


def _title(row: Row) -> str:
    lengths = f"{row['prompt_tokens']}+{row['output_tokens']} tokens ({row['workload']})"
    kv = (
        f", {row['device_kv_tokens']} tokens of KV on the card" if "device_kv_tokens" in row else ""
    )
    host = f"{row['host']} x{row['host_bandwidth_scale']:g}"
    return f"{row['model']} on {row['device']} with {host}, {lengths}{kv}"


def _bar(row: Row, most: float, y: float, colors: Mapping[str, str]) -> Iterator[str]:
    if "rate" not in row:
        yield text(16, y + 12, row["reason"])
        return
    width = (WIDTH - LEFT - RIGHT) * row["rate"] / most
    color = colors.get(row["strategy"], OTHER)
    gain = f"  x{row['to_device_only']:.2f}" if "to_device_only" in row else ""
    yield text(LEFT - 8, y + 12, row["strategy"], 'text-anchor="end"')
    yield rect(LEFT, y, width, BAR, color)
    yield text(LEFT + width + 6, y + 12, f"{row['rate']:.4g} tokens/s{gain}")
