"""What the report says of simulated jobs: the paper's evaluation, and any conditions.

Owns the sections of the files that launch.simulate_paper and simulate write.
"""

import re
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from launch.comparison.page import Figure, Section, Table
from launch.comparison.page_charts import Bar, Series, draw_bars, draw_dots
from launch.comparison.page_curves import Curves, Point, curve_figure
from launch.comparison.page_sources import Loaded
from launch.comparison.page_values import Found, maybe, number
from launch.drawing import BRIGHT

SHOWS = (
    "How schedules compare, and which resource is the limit, given the stage times: the product's "
    "own scheduler and dispatch loop ran, on a virtual clock. Equal flags give equal numbers."
)
CANNOT = (
    "Whether a card reaches the shares of its data sheet that its profile says: none was measured. "
    "Padding to buckets, contention for the host's memory, a link shared by both directions and "
    "throttling are not modelled. Ratios are worth more than rates."
)


def is_paper(content: dict[str, Any]) -> bool:
    rows = content.get("rows")
    return bool(rows) and "published" in rows[0]


def paper_section(loaded: Loaded) -> Section:
    """Return the paper's figures: gains by card and workload beside the published ones."""
    cases = list(loaded.content["rows"])
    cards = list(dict.fromkeys(case["title"].value.split(",")[0] for case in cases))
    figures = [
        _gains(card, [case for case in cases if case["title"].value.startswith(card)], loaded)
        for card in cards
    ]
    return Section(
        "The paper's evaluation, simulated",
        f"Whole jobs of {loaded.content['num_requests'].value} requests, all there at the start, "
        "with the KV budgets of the paper's evaluation. Gains are over this project's device_only; "
        "the published ones are over vLLM, a range over all workloads of a card.",
        SHOWS,
        CANNOT + " It does not reproduce the published baseline: vLLM's own losses are not in "
        "device_only.",
        [*figures, *_by_output_length(cases, loaded), _bandwidths(cases, loaded)],
    )


def _gains(card: str, cases: Sequence[Found], loaded: Loaded) -> Figure:
    strategies = [name for name in cases[0]["gains"].value if name != "device_only"]
    picture = draw_dots(
        [case["title"].value.partition(", ")[2] for case in cases],
        [
            Series(
                name,
                tuple((index, case["gains"][name].value, None) for index, case in enumerate(cases)),
            )
            for name in strategies
        ],
        f"{card}: gain over device_only by workload",
        "A track for each workload; a dot for each strategy; the published range in grey.",
        bands=[tuple(case["published"].value) for case in cases],
        band_label="published, over vLLM",
        log=True,
        reference=1.0,
    )
    rows = [
        [
            case["title"].value,
            (number(case["published"][0]), " to ", number(case["published"][1])),
            *(number(case["gains"][name]) for name in strategies),
        ]
        for case in cases
    ]
    note = "At the nominal bandwidth of the paper's hosts. The axis is logarithmic; the line is 1."
    return Figure(picture, Table(["case", "published", *strategies], rows), note, loaded.source)


def _by_output_length(cases: Sequence[Found], loaded: Loaded) -> Iterator[Figure]:
    """Yield gains by output length where cases differ in nothing else."""
    groups: dict[str, list[Found]] = {}
    for case in cases:
        match = re.fullmatch(r"(\w+, \d+) \+ \d+ tokens", case["title"].value)
        if match:
            groups.setdefault(match[1], []).append(case)
    for name, group in groups.items():
        if len(group) < 2:
            continue
        points = [
            Point(strategy, case["lengths"][1].value, case["gains"][strategy])
            for case in group
            for strategy in case["gains"].value
            if strategy != "device_only"
        ]
        curves = Curves(
            f"Gain over device_only by output length: {name} prompt tokens",
            "output tokens",
            "times device_only",
            "Above the dashed line a strategy gains, beneath it it loses.",
            log_x=True,
            reference=1.0,
        )
        yield curve_figure(points, curves, loaded.source)


def _bandwidths(cases: Sequence[Found], loaded: Loaded) -> Figure:
    """Show at which host bandwidth apex_paper would gain what was published."""
    ends = [case["host_gb_per_sec_that_reproduces"] for case in cases]
    low = [(i, one[0].value, None) for i, one in enumerate(ends) if one[0].value is not None]
    high = [(i, one[1].value, None) for i, one in enumerate(ends) if one[1].value is not None]
    nominal = [(index, case["host_gb_per_sec"].value, None) for index, case in enumerate(cases)]
    picture = draw_dots(
        [case["title"].value for case in cases],
        [
            Series("least published gain", tuple(low)),
            Series("largest", tuple(high)),
            Series("nominal", tuple(nominal)),
        ],
        "Host bandwidth at which apex_paper gains what was published, GB/s",
        "A track for each case, on a logarithmic axis.",
        log=True,
    )
    rows = [
        [
            case["title"].value,
            number(case["host_gb_per_sec"]),
            *("none" if end.value is None else number(end) for end in one),
        ]
        for case, one in zip(cases, ends, strict=True)
    ]
    columns = ["case", "nominal, times the op's share", "for the least gain", "for the largest"]
    note = "None: no bandwidth up to twice the nominal one gains that."
    return Figure(picture, Table(columns, rows), note, loaded.source)


class Measure(NamedTuple):
    """A column that is drawn along an axis. reference: a value with a line of its own."""

    column: str
    title: str
    y_label: str
    note: str
    reference: float | None = None


GAIN = Measure(
    "to_device_only",
    "Gain over device_only",
    "times device_only",
    "Above the dashed line a strategy gains, beneath it it loses. Host: of its nominal bandwidth.",
    1.0,
)
HOST_SHARE = Measure(
    "host_share",
    "Host share",
    "of output tokens",
    "Output tokens whose attention the host did, over all of them.",
)


def is_job(content: dict[str, Any]) -> bool:
    return str(content.get("what", "")).startswith("strategies on simulated hardware")


def jobs_section(loaded: Loaded) -> Section:
    """Return gains over device_only by output length and by KV budget, and the host's share."""
    if loaded.rows is None:
        raise KeyError(f"the rows, which lie in {loaded.path.with_suffix('.csv').name}")
    rows = [row for row in loaded.rows if row.get("strategy")]
    figures = [
        *_by(rows, GAIN, "output_tokens", "output length", "output tokens", loaded),
        *_by(rows, GAIN, "device_kv_tokens", "KV budget", "tokens of KV on the card", loaded),
        *_by(rows, HOST_SHARE, "output_tokens", "output length", "output tokens", loaded),
    ]
    is_steady = all(row.get("sweep_sec") for row in rows)
    kind = "steady states" if is_steady else "whole jobs"
    return Section(
        f"Gains by condition, simulated: {loaded.path.stem}",
        f"{len(rows)} rows, {kind}: {_conditions(rows)}.",
        SHOWS,
        CANNOT,
        figures or [_rates(rows, loaded)],
    )


def _conditions(rows: Sequence[Found]) -> str:
    names = ("model", "device", "host", "workload")
    return ", ".join(
        f"{name} {' and '.join(dict.fromkeys(str(row[name].value) for row in rows))}"
        for name in names
    )


def _by(
    rows: Sequence[Found], measure: Measure, axis: str, title: str, x_label: str, loaded: Loaded
) -> Iterator[Figure]:
    """Yield a figure for each set of conditions that differ in the axis, strategy and host only."""
    fixed = ("model", "device", "workload", "prompt_tokens", "output_tokens", "device_kv_tokens")
    fixed = tuple(name for name in (*fixed, "request_rate") if name != axis)
    groups: dict[tuple[object, ...], list[Found]] = {}
    for row in rows:
        if row.get(measure.column) and row["strategy"].value != "device_only":
            groups.setdefault(tuple(row[name].value for name in fixed), []).append(row)
    several_hosts = len({row["host_bandwidth_scale"].value for row in rows}) > 1
    for key, group in groups.items():
        if len({row[axis].value for row in group}) < 2:
            continue
        points = [
            Point(
                row["strategy"].value
                + (f", host x{row['host_bandwidth_scale'].value:g}" if several_hosts else ""),
                row[axis].value,
                row[measure.column],
            )
            for row in group
        ]
        named = dict(zip(fixed, key, strict=True))
        curves = Curves(
            f"{measure.title} by {title}: {_of(named)}",
            x_label,
            measure.y_label,
            measure.note,
            log_x=True,
            reference=measure.reference,
        )
        yield curve_figure(points, curves, loaded.source)


def _of(named: dict[str, object]) -> str:
    parts = [f"{named['model']} on {named['device']}", f"{named['prompt_tokens']} prompt tokens"]
    if "output_tokens" in named:
        parts.append(f"{named['output_tokens']} output tokens")
    if "device_kv_tokens" in named:
        parts.append(f"{named['device_kv_tokens']:,} tokens of KV")
    if named.get("request_rate"):
        parts.append(f"{named['request_rate']} requests/s")
    return ", ".join(parts)


def _rates(rows: Sequence[Found], loaded: Loaded) -> Figure:
    """Show the rates where conditions form no axis."""

    def label(row: Found) -> str:
        of = (
            f"{row['model'].value} on {row['device'].value}, x{row['host_bandwidth_scale'].value:g}"
        )
        return f"{row['strategy'].value}: {of}"

    picture = draw_bars(
        [
            Bar(label(row), f"{row['rate'].value:,.0f}", ((row["rate"].value, BRIGHT[0]),))
            for row in rows
        ],
        f"Simulated output tokens per second: {loaded.path.stem}",
        "A bar for each condition and strategy.",
    )
    cells = [
        [
            label(row),
            number(row["rate"]),
            maybe(row.get("to_device_only")),
            maybe(row.get("host_share")),
        ]
        for row in rows
    ]
    columns = ["condition", "tokens/s", "over device_only", "host share"]
    return Figure(picture, Table(columns, cells), "One row a strategy.", loaded.source)
