"""Print the files of bench_host_attention as the table of cpu_ops/README.md.

    python -m launch.host_attention_table docs/results/host_attention/*.json

One line for each head shape, dtype, instruction set and number of threads: the medians over the
large cells of each contestant's share of the read rate, the worst cell in brackets.
"""

import json
import pathlib

from absl import app

from launch.measuring import Row

PEERS = ("torch_sdpa", "ggml_by_head", "ggml_by_token", "jnp")
COLUMNS = ("kernel", "compiled", "jit", *PEERS)
HEAD = ("file", "shape", "dtype", "isa", "threads", *COLUMNS)


def line(cells: tuple[str, ...]) -> str:
    return f"| {' | '.join(cells)} |"


def share(row: Row, contestant: str) -> str:
    """Return a contestant's median and worst share, or nothing where it did not take part."""
    if contestant not in row:
        return ""
    return f"{row[contestant]:.2f} ({row[f'worst_{contestant}']:.2f})"


def table(path: pathlib.Path) -> list[str]:
    """Return a file's lines."""
    rows = json.loads(path.read_text())["groups"]["large_cells_of_read"]
    return [
        line(
            (
                *(path.stem, row["shape"], row["dtype"], row["isa"], str(row["threads"])),
                *(share(row, contestant) for contestant in COLUMNS),
            )
        )
        for row in rows
    ]


def main(argv: list[str]) -> None:
    """Print the table of the files that are named."""
    print(line(HEAD))
    print(line(("---",) * len(HEAD)))
    for path in map(pathlib.Path, argv[1:]):
        print("\n".join(table(path)))


if __name__ == "__main__":
    app.run(main)
