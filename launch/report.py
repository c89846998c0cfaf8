"""Make a page of result files: pictures, tables, and where every number came from.

    python -m launch.report docs/results --output=docs/results/page
    python -m launch.report runs/mine.json --output=runs/report

Arguments are result files, or folders of them. Writes FOLDER/index.html, which needs no network and
no scripts, and an SVG file for each figure. A file that is no known result is refused by name; in a
folder it is passed over, and named. docs/reports.md lists what can be read.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from absl import app, flags

from launch.comparison import (
    page_benchmark,
    page_grid,
    page_host_attention,
    page_long_job,
    page_measured,
    page_paced,
    page_prefix,
    page_simulated,
)
from launch.comparison.decode import FileError
from launch.comparison.page import write_page
from launch.comparison.page_sources import Kind, find_files, sections_of

# In the order of the page's sections.
KINDS = (
    Kind(
        "launch.run_benchmark and launch.compare",
        page_benchmark.is_benchmark,
        page_benchmark.benchmark_section,
    ),
    Kind("launch.paced_proof", page_paced.is_paced, page_paced.paced_section),
    Kind("launch.simulate_paper", page_simulated.is_paper, page_simulated.paper_section),
    Kind("launch.simulate", page_simulated.is_job, page_simulated.jobs_section),
    Kind("launch.simulate_jobs", page_grid.is_job_grid, page_grid.job_grid_section),
    Kind("launch.simulate_grid", page_grid.is_grid, page_grid.grid_section),
    Kind("launch.bench_strategies", page_measured.is_strategies, page_measured.strategies_section),
    Kind("launch.long_job", page_long_job.is_long_job, page_long_job.long_job_section),
    Kind("launch.bench_prefix", page_prefix.is_prefix, page_prefix.prefix_section),
    Kind(
        "launch.bench_host_attention",
        page_host_attention.is_host_attention,
        page_host_attention.host_attention_section,
    ),
    Kind("launch.parity_report", page_measured.is_parity, page_measured.parity_section),
)


def report(paths: Sequence[Path], folder: Path) -> tuple[list[Path], list[Path]]:
    """Write the page; return the files written, and those of folders that could not be shown.

    Raises FileError, and then writes nothing.
    """
    shown, left_out = find_files(paths, KINDS)
    if not shown:
        raise FileError(f"no result files in {', '.join(map(str, paths))}")
    return write_page(sections_of(shown, KINDS, folder), folder), left_out


def main(argv: Sequence[str]) -> int:
    """Write the page that the command line asks for; return the exit status."""
    try:
        if len(argv) < 2:
            raise FileError("name result files, or folders of them")
        written, left_out = report([Path(one) for one in argv[1:]], Path(flags.FLAGS.output))
    except (FileError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for path in left_out:
        print(f"note: {path} is no result file that is known here", file=sys.stderr)
    print(f"{written[0]} and {len(written) - 1} picture{'' if len(written) == 2 else 's'}")
    return 0


if __name__ == "__main__":
    # Only here: other scripts have a flag of the same name, and tests import this one.
    flags.DEFINE_string("output", "runs/report", "Folder of the page.")
    app.run(main)
