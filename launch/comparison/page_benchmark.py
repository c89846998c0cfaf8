"""What the report says of a comparison that launch.run_benchmark or launch.compare measured.

Owns the section of one result file (launch/comparison/results.py has the format): throughput by
system, load and latency, predicted against measured. Refuses a file that does not follow it.
"""

from collections.abc import Iterator, Sequence
from typing import Any

from launch.comparison.page import Figure, Section, Table
from launch.comparison.page_charts import Bar, Series, draw_bars, draw_dots
from launch.comparison.page_curves import Curves, Point, curve_figure
from launch.comparison.page_sources import Loaded
from launch.comparison.page_values import (
    Cell,
    Found,
    Part,
    Words,
    number,
    percent,
    short,
    spread,
)
from launch.comparison.results import FORMAT, UNCLEAR, Spread, read_result
from launch.drawing import BRIGHT

DEVICE_COLOR, HOST_COLOR = BRIGHT[0], BRIGHT[3]
LATENCIES = (
    ("normalized_sec", "mean", "Normalised latency", "s per output token, mean"),
    ("ttft_sec", "p90", "Time to the first token", "s, 90th percentile"),
    ("tpot_sec", "p90", "Time per output token", "s, 90th percentile"),
)
SHOWS = {
    "xla": "How these systems compare on this machine, on one workload whose every token count is "
    "checked, in turns that alternate; the spread is over repeats.",
    "paced": "How schedules compare when a described card takes its time and this machine's CPU "
    "really attends to the host lane's KV cache.",
    "simulated": "How schedules compare when every stage takes the time that a described card and "
    "host would; equal flags give equal numbers.",
    "external": "How other programs do on the same workload file, with the same budget and dtype.",
}
CANNOT = {
    "xla": "What another machine would yield. Where a CPU stands in for the device, both lanes "
    "share its cores: gains of the hybrid on a GPU are not in it.",
    "paced": "Whether the card reaches the shares of its data sheet that its profile says: no such "
    "card was in the machine, and no tokens were computed on it.",
    "simulated": "Absolute rates: nothing was run. Padding, a shared link and contention for the "
    "host's memory are not modelled.",
    "external": "Anything about other versions, flags or machines than those of this run.",
}


def is_benchmark(content: dict[str, Any]) -> bool:
    return content.get("format") == FORMAT


def benchmark_section(loaded: Loaded) -> Section:
    """Return the section of one file. Raises FileError where it does not follow the format."""
    header = read_result(loaded.path).header
    rows = list(loaded.content["groups"]["summary"])
    workload, backend = header.workload.header, header.backend
    hardware = [name for name in (header.device_profile, header.host_profile) if name]
    where = f", {' and '.join(hardware)} ({backend})" if hardware else f" ({backend})"
    offline = [row for row in rows if row.get("request_rate") is None]
    online = [row for row in rows if row.get("request_rate") is not None]
    figures: list[Figure] = []
    if offline:
        figures.append(_throughput(offline, loaded, header.baseline))
    figures += _prediction(offline, loaded)
    figures += _lanes(offline, loaded)
    figures += _curves(online, loaded)
    return Section(
        title=f"{workload.name} on {header.model.name}{where}",
        intro=f"{header.what}. Workload: {workload.description}; {workload.num_requests:,} "
        f"requests, {workload.prompt_tokens:,} prompt and {workload.output_tokens:,} output "
        f"tokens, arrivals {workload.arrivals}, from {workload.source}; "
        f"sha256 {workload.sha256[:12]}. KV cache: "
        f"{_budget(header.budgets.device_kv_bytes)} on the device, "
        f"{_budget(header.budgets.host_kv_bytes)} on the host; {header.model.dtype}. "
        f"{header.warm_up} {header.settings.get('note') or ''}".strip(),
        shows=SHOWS[backend],
        cannot=CANNOT[backend],
        figures=figures,
    )


def _budget(num_bytes: int | None) -> str:
    return "none" if num_bytes is None else f"{num_bytes / 2**20:,.0f} MiB"


def _throughput(rows: Sequence[Found], loaded: Loaded, baseline: str | None) -> Figure:
    picture = draw_bars(
        [_bar(row) for row in rows],
        "Output tokens per second, by system",
        "Horizontal bars; the table beside them has the same numbers.",
        legend=[("device lane", DEVICE_COLOR), ("host lane", HOST_COLOR)],
    )
    columns = ["system", "tokens/s", f"over {baseline}", "steady tokens/s", f"over {baseline}"]
    columns += ["host share", "runs", "failed"]
    cells = [
        [
            _name(row),
            spread(row.get("output_tokens_per_sec")),
            _ratio(row.get("ratio")),
            spread(row.get("steady_output_tokens_per_sec")),
            _ratio(row.get("steady_ratio")),
            _share(row),
            number(row["num_ok"]),
            _failed(row),
        ]
        for row in rows
    ]
    note = (
        "Medians over repeats; whiskers and brackets are the least and the most. Bars are split by "
        "the lane that decoded. Ratios are taken within each repeat, then their median. Steady: "
        "without the first and the last tenth of the output tokens. A ratio above 1 in one repeat "
        f"and below it in another is {UNCLEAR}."
    )
    return Figure(picture, Table(columns, cells), note, loaded.source)


def _bar(row: Found) -> Bar:
    rate = row.get("output_tokens_per_sec")
    if rate is None:
        return Bar(_name(row), f"failed: {row['error'].value}"[:34])
    median, share = rate["median"].value, row.get("host_share")
    host = median * share.value if share else 0.0
    parts = ((median - host, DEVICE_COLOR), (host, HOST_COLOR))
    ratio = row.get("ratio")
    shown = f"{short(median)}" + (f" (x{ratio['median'].value:.2f})" if ratio else "")
    return Bar(_name(row), shown, parts, (rate["min"].value, rate["max"].value))


def _name(row: Found) -> str:
    system, framework = row["system"].value, row["framework"].value
    return system if framework in ("apex_jax", system) else f"{system} ({framework})"


def _ratio(ratio: Found | None) -> Cell:
    if ratio is None or not Spread(**ratio.value).crosses_one:
        return spread(ratio)
    return number(ratio["median"]), " (", *_ends(ratio), Words(f") {UNCLEAR}")


def _ends(ratio: Found) -> tuple[Part, ...]:
    return number(ratio["min"]), " to ", number(ratio["max"])


def _share(row: Found) -> Cell:
    share = row.get("host_share")
    return "" if share is None else percent(share)


def _failed(row: Found) -> Cell:
    if not row["num_failed"].value:
        return ""
    return number(row["num_failed"]), Words(f": {row['error'].value}")


def _prediction(rows: Sequence[Found], loaded: Loaded) -> Iterator[Figure]:
    """Yield measured beside predicted rates, where there are predictions."""
    both = [
        row
        for row in rows
        if row.get("predicted_output_tokens_per_sec") and row.get("output_tokens_per_sec")
    ]
    if not both:
        return
    measured = [row["output_tokens_per_sec"]["median"] for row in both]
    predicted = [row["predicted_output_tokens_per_sec"] for row in both]
    picture = draw_dots(
        [_name(row) for row in both],
        [_dots("measured", measured), _dots("predicted", predicted)],
        "Predicted against measured, output tokens per second",
        "A track for each system with a dot for each of the two.",
    )
    cells = [
        [_name(row), number(one), number(other), number(one.value / other.value)]
        for row, one, other in zip(both, measured, predicted, strict=True)
    ]
    columns = ["system", "measured", "predicted", "measured over predicted"]
    note = "Predictions were made before the run, from stage times; measured are medians."
    yield Figure(picture, Table(columns, cells), note, loaded.source)


def _dots(label: str, values: Sequence[Found]) -> Series:
    return Series(label, tuple((index, one.value, None) for index, one in enumerate(values)))


def _lanes(rows: Sequence[Found], loaded: Loaded) -> Iterator[Figure]:
    """Yield latencies of all requests and of each lane's, where they were measured."""
    known = [row for row in rows if row.get("tpot_sec")]
    if not known:
        return
    kinds = {"all requests": known} | {
        f"{lane} lane": [_lane(row, lane) for row in known] for lane in ("device", "host")
    }
    series = [
        Series(
            label,
            tuple(
                (index, one["tpot_sec"]["p50"].value, None)
                for index, one in enumerate(own)
                if one and one.get("tpot_sec")
            ),
        )
        for label, own in kinds.items()
    ]
    picture = draw_dots(
        [_name(row) for row in known],
        [one for one in series if one.points],
        "Time per output token by lane, all requests due at once, median in seconds",
        "A track for each system with a dot for each lane, on a logarithmic axis.",
        log=True,
    )
    columns = ["system", "TTFT, s", "TPOT, s"]
    for lane in ("device", "host"):
        columns += [f"requests, {lane} lane", f"TTFT, s, {lane} lane", f"TPOT, s, {lane} lane"]
    cells = [
        [
            _name(row),
            *_latencies(row),
            *(cell for lane in ("device", "host") for cell in _lane_cells(_lane(row, lane))),
        ]
        for row in known
    ]
    note = (
        "Medians over requests, in brackets the 99th percentile; of these the medians over "
        "repeats. A request counts to the lane that decoded more than half of its tokens."
    )
    yield Figure(picture, Table(columns, cells), note, loaded.source)


def _lane(row: Found, name: str) -> Found | None:
    lanes = row.get("by_lane")
    return None if lanes is None else lanes.get(name)


def _lane_cells(lane: Found | None) -> list[Cell]:
    return ["", "", ""] if lane is None else [number(lane["num_requests"]), *_latencies(lane)]


def _latencies(found: Found) -> list[Cell]:
    """Return TTFT and TPOT."""
    figures = [found.get(name) for name in ("ttft_sec", "tpot_sec")]
    return [
        "" if one is None else (number(one["p50"]), " (", number(one["p99"]), ")")
        for one in figures
    ]


def _curves(rows: Sequence[Found], loaded: Loaded) -> Iterator[Figure]:
    """Yield latency and goodput by request rate."""
    for name, quantile, title, unit in LATENCIES:
        found = [(row, row.get(name)) for row in rows]
        points = [_point(row, one and one[quantile]) for row, one in found]
        yield from _curve(points, f"{title} by request rate", f"{title}, {unit}", loaded)
    points = []
    for row in rows:
        lane = _lane(row, "host")
        latency = lane and lane.get("tpot_sec")
        points += [_point(row, latency["p50"])] if latency else []
    title = "Time per output token in the host lane"
    yield from _curve(points, f"{title} by request rate", f"{title}, s, median", loaded)
    points = [_point(row, row.get("goodput_requests_per_sec")) for row in rows]
    yield from _curve(points, "Goodput by request rate", "requests/s within their bounds", loaded)


def _point(row: Found, value: Found | None) -> Point:
    reason = f"failed: {row['error'].value}" if row.get("error") else ""
    return Point(_name(row), row["request_rate"].value, value, reason)


def _curve(points: Sequence[Point], title: str, label: str, loaded: Loaded) -> Iterator[Figure]:
    if any(point.value for point in points):
        note = "Poisson arrivals at each rate; medians over repeats of each run's figure."
        yield curve_figure(points, Curves(title, "requests/s", label, note), loaded.source)
