"""Print the files of bench_host_attention as the table of cpu_ops/README.md.

    python -m launch.host_attention_table docs/results/host_attention/*.json

One line for each head shape, dtype, instruction set and number of threads of a file: each
contestant's share of the read rate, the median over the large cells and the worst of them in
brackets.
"""

import json
import pathlib
import statistics
from collections.abc import Iterable

from absl import app

from launch.measuring import Row

LARGE_TOKENS = 8192  # of a call: from here on the targets hold
CONTESTANTS = ("kernel", "compiled", "jit", "torch_sdpa", "ggml_by_head", "ggml_by_token", "jnp")
KEY = ("shape", "dtype", "isa", "threads")


def table(name: str, rows: Iterable[Row]) -> list[str]:
    """Return the lines of one file."""
    groups: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        if row["context"] * row["batch"] >= LARGE_TOKENS:
            groups.setdefault(tuple(str(row[key]) for key in KEY), []).append(row)
    return [
        line(name, *key, *(share(cells, contestant) for contestant in CONTESTANTS))
        for key, cells in groups.items()
    ]


def share(rows: list[Row], contestant: str) -> str:
    """Return a contestant's median and worst share, or nothing where it did not take part."""
    shares = [row[contestant]["of_read"] for row in rows if contestant in row]
    return f"{statistics.median(shares):.2f} ({min(shares):.2f})" if shares else ""


def line(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def main(argv: list[str]) -> None:
    """Print the table of the files that are named."""
    head = ("file", *KEY, *CONTESTANTS)
    print(line(*head))
    print(line(*("---",) * len(head)))
    for path in map(pathlib.Path, argv[1:]):
        for text in table(path.stem, json.loads(path.read_text())["groups"].get("cells", ())):
            print(text)


if __name__ == "__main__":
    app.run(main)
