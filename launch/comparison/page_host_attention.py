"""What the report says of the host's attention op.

Owns the section of the files that launch.bench_host_attention writes.
"""

import statistics
from collections.abc import Sequence
from typing import Any

from launch.comparison.page import Figure, Section, Table
from launch.comparison.page_charts import Series, draw_dots
from launch.comparison.page_sources import Loaded
from launch.comparison.page_values import Cell, Found, number
from launch.host_attention_table import KEY, LARGE_TOKENS

CONTESTANTS = {
    "kernel": "C++ kernel alone",
    "compiled": "op, compiled call",
    "jit": "op, jit call",
    "torch_sdpa": "torch",
    "ggml_by_head": "ggml, by head",
    "ggml_by_token": "ggml, by token",
    "jnp": "plain XLA",
}


def is_host_attention(content: dict[str, Any]) -> bool:
    cells = content.get("groups", {}).get("cells", [])
    return bool(cells) and "read_gb_per_sec" in cells[0]


def host_attention_section(loaded: Loaded) -> Section:
    """Return which share of the memory's read rate each attention reaches, by head shape."""
    cells = [
        cell
        for cell in loaded.content["groups"]["cells"]
        if cell["context"].value * cell["batch"].value >= LARGE_TOKENS
    ]
    names = [name for name in CONTESTANTS if any(cell.get(name) for cell in cells)]
    groups: dict[str, list[Found]] = {}
    for cell in cells:
        *names_of, threads = (str(cell[key].value) for key in KEY)
        groups.setdefault(f"{', '.join(names_of)}, {threads} thr.", []).append(cell)
    shares = {
        (label, name): [cell[name]["of_read"].value for cell in group if cell.get(name)]
        for label, group in groups.items()
        for name in names
    }
    series = [
        Series(
            CONTESTANTS[name],
            tuple(
                (index, statistics.median(shares[label, name]), None)
                for index, label in enumerate(groups)
                if shares[label, name]
            ),
        )
        for name in names
    ]
    picture = draw_dots(
        list(groups),
        series,
        f"Share of the read rate that attention reaches: {loaded.path.stem}",
        "A track for each head shape, dtype, instruction set and number of threads.",
    )
    rows = [
        [label, *(_median_and_worst(shares[label, name]) for name in names)] for label in groups
    ]
    columns = ["shape, dtype, instructions", *(CONTESTANTS[name] for name in names)]
    note = (
        "Bytes of KV over time, relative to the rate at which the same threads only read: medians "
        f"over the cells of at least {LARGE_TOKENS:,} tokens, in brackets the least of them."
    )
    return Section(
        "The host's attention op",
        "Decode attention over paged KV in host memory, beside a loop that only reads, and torch, "
        "ggml and plain XLA, in turn in one process.",
        "How near the op comes to the memory's own rate on this machine, which is the ceiling of "
        "what a host lane can add.",
        "Other machines, and what remains of it while a GPU reads the same memory. Reading and "
        "attending are timed in turn: on a machine that others use a share may exceed 1.",
        [Figure(picture, Table(columns, rows), note, loaded.source)],
    )


def _median_and_worst(shares: Sequence[float]) -> Cell:
    if not shares:
        return ""
    return number(statistics.median(shares)), " (", number(min(shares)), ")"
