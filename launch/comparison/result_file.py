"""Writes a comparison's result file while it runs, and two tables beside it: CSV and markdown.

Owns the files at one path: PATH.json (every row as it is measured), PATH.csv (the runs) and PATH.md
(the summary, with the command). Called by the commands that compare.
"""

import csv
import shlex
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from launch.comparison.results import (
    UNCLEAR,
    Quantiles,
    ResultHeader,
    RunRow,
    Spread,
    SummaryRow,
    WorkloadUsed,
    summarize,
)
from launch.measuring import ResultFile

SHOWN_ERROR = 120  # characters in a table


class ComparisonFile:
    """The result file of one comparison.

    path: its name ends in .json. budget_sec: after this time no further run begins.
    """

    def __init__(self, path: Path, header: ResultHeader, budget_sec: float):
        self._header = header
        self._file = ResultFile(path, asdict(header), budget_sec, line=_line)
        self._runs: list[RunRow] = []

    @property
    def path(self) -> Path:
        return self._file.path

    def measure(self, runs: Callable[[], Iterable[RunRow]]) -> None:
        """Write each run as it ends, and what all came to so far: a part of a file is of use."""

        def rows() -> Iterator[dict[str, Any]]:
            for run in runs():
                self._runs.append(run)
                yield asdict(run)
                self.finish()

        self._file.measure("runs", rows)

    def record(self, group: str, rows: Iterable[dict[str, Any]]) -> None:
        """Write rows beside the runs, such as what each system took."""
        self._file.record(group, rows)

    def finish(self) -> list[SummaryRow]:
        """Add the summary and write the tables; return the summary."""
        summary = summarize(self._runs, self._header.baseline)
        self._file.record("summary", map(asdict, summary))
        _write_csv(self.path.with_suffix(".csv"), self._runs)
        text = _markdown(self._header, summary, self._file.content["left_out"].get("runs"))
        self.path.with_suffix(".md").write_text(text)
        return summary

    @property
    def fault(self) -> str | None:
        """What ended the measuring before its end, where something did."""
        return self._file.content["failed"].get("runs")


def _write_csv(path: Path, runs: Sequence[RunRow]) -> None:
    """Write runs with a column for each figure: ttft_sec.p50."""
    rows = [dict(_flat(asdict(run))) for run in runs]
    columns = list(dict.fromkeys(name for row in rows for name in row))
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)


def _flat(row: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in row.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def command_of(environment: dict[str, Any]) -> str:
    """Return the command that made a result, as it can be typed."""
    script, *arguments = environment["command"]
    return shlex.join(["python", "-m", f"launch.{script.removesuffix('.py')}", *arguments])


def _markdown(header: ResultHeader, summary: Sequence[SummaryRow], cut: str | None) -> str:
    environment = header.environment
    cpu, git = environment["cpu"], environment["git"]
    hardware = [f"{cpu['model']}, {cpu['num_usable_cores']} cores"]
    if header.device_profile is not None:
        hardware.append(f"described device {header.device_profile}")
    if header.host_profile is not None:
        hardware.append(f"described host {header.host_profile}")
    return "\n".join(
        [
            f"# {header.what}",
            "",
            _workload_line(header.workload),
            f"Model {header.model.name}, {header.model.dtype}; backend {header.backend}; "
            f"{'; '.join(hardware)}. KV cache: {_budget(header.budgets.device_kv_bytes)} on the "
            f"device, {_budget(header.budgets.host_kv_bytes)} on the host. {header.warm_up}",
            *(["", f"**{note}**"] if (note := header.settings.get("note")) else []),
            "",
            *_table(summary, header.baseline),
            "",
            *([f"Cut short: {cut}.", ""] if cut else []),
            "    " + command_of(environment),
            "",
            f"Commit {git['commit']}{' with changes' if git['is_dirty'] else ''}, "
            f"{environment['date']}. Formulas: docs/benchmarks.md.",
            "",
        ]
    )


def _workload_line(used: WorkloadUsed) -> str:
    workload = used.header
    return (
        f"Workload {workload.name} ({workload.description}): {workload.num_requests} requests, "
        f"{workload.prompt_tokens} prompt and {workload.output_tokens} output tokens, arrivals "
        f"{workload.arrivals}; sha256 {workload.sha256[:12]}; from {workload.source}."
    )


def _budget(num_bytes: int | None) -> str:
    return "none" if num_bytes is None else f"{num_bytes / 2**20:.4g} MiB"


def _table(summary: Sequence[SummaryRow], baseline: str | None) -> Iterator[str]:
    """Yield the lines of a table; columns that nobody fills are left out."""
    columns: dict[str, Callable[[SummaryRow], str]] = {
        "system": lambda row: f"`{row.system}`",
        "requests/s": lambda row: _short(row.request_rate),
        "output tokens/s": lambda row: _spread(row.output_tokens_per_sec),
        f"over `{baseline}`": lambda row: _ratio(row.ratio),
        "steady tokens/s": lambda row: _spread(row.steady_output_tokens_per_sec),
        "predicted": lambda row: _short(row.predicted_output_tokens_per_sec),
        "host share": lambda row: "" if row.host_share is None else f"{row.host_share:.0%}",
        "goodput, requests/s": lambda row: _spread(row.goodput_requests_per_sec),
        "TTFT p50, p99 s": lambda row: _two(row.ttft_sec),
        "TPOT p50, p99 s": lambda row: _two(row.tpot_sec),
        "TPOT p50, p99 s, host lane": lambda row: _two(_in_host_lane(row)),
        "end to end p50, p99 s": lambda row: _two(row.e2e_sec),
        "runs": lambda row: f"{row.num_ok}",
        "failed": lambda row: _failed(row),
    }
    cells = {name: [fill(row) for row in summary] for name, fill in columns.items()}
    cells = {name: column for name, column in cells.items() if any(column)}
    yield f"| {' | '.join(cells)} |"
    yield f"|{' --- |' * len(cells)}"
    for row in zip(*cells.values(), strict=True):
        yield f"| {' | '.join(row)} |"


def _failed(row: SummaryRow) -> str:
    if not row.num_failed:
        return ""
    reason = (row.error or "").replace("|", "/")
    return f"{row.num_failed}: {reason[:SHOWN_ERROR]}"


def _spread(spread: Any) -> str:
    """Return a median with the least and the most, where they differ."""
    if spread is None:
        return ""
    ends = f"{spread.min:.4g} to {spread.max:.4g}"
    middle = f"{spread.median:.4g}"
    return middle if spread.min == spread.max else f"{middle} ({ends})"


def _ratio(ratio: Spread | None) -> str:
    """Return a ratio, and say so where it was above 1 and below it."""
    return _spread(ratio) + (f", {UNCLEAR}" if ratio is not None and ratio.crosses_one else "")


def _in_host_lane(row: SummaryRow) -> Quantiles | None:
    host = (row.by_lane or {}).get("host")
    return None if host is None else host.tpot_sec


def _two(quantiles: Any) -> str:
    return "" if quantiles is None else f"{quantiles.p50:.3g}, {quantiles.p99:.3g}"


def _short(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def _line(row: dict[str, Any]) -> str:
    """Return what is printed as a run ends."""
    head = f"{row['system']:24} repeat {row['repeat']}"
    if row["request_rate"] is not None:
        head += f" at {row['request_rate']:g}/s"
    if row["status"] == "failed":
        return f"{head}  failed: {row['error']}"
    return f"{head}  {row['output_tokens_per_sec']:.4g} tokens/s in {row['wall_sec']:.4g} s"
