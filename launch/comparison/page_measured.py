"""What the report says of strategies measured on this project alone: their rates, and their tokens.

Owns the sections of the files that launch.bench_strategies and parity_report write.
"""

from collections.abc import Sequence
from typing import Any

from launch.comparison.page import Figure, Section, Table
from launch.comparison.page_benchmark import DEVICE_COLOR, HOST_COLOR
from launch.comparison.page_charts import Bar, Series, draw_bars, draw_dots
from launch.comparison.page_sources import Loaded
from launch.comparison.page_values import Found, maybe, number, percent, spread


def is_strategies(content: dict[str, Any]) -> bool:
    return any(name.startswith("medians_") for name in content.get("groups", ()))


def strategies_section(loaded: Loaded) -> Section:
    """Return rates, lanes and the arithmetic's predictions of a steady state."""
    content, environment = loaded.content.value, loaded.content["environment"].value
    groups = loaded.content["groups"]
    device = (environment["device"] or {}).get("kind", "unknown device")
    figures: list[Figure] = []
    for name in groups.value:
        if name.startswith("medians_"):
            budget = name.removeprefix("medians_").replace("_gib", " GiB").replace("_", ".")
            figures += _steady_state(list(groups[name]), f"{budget} of KV on the device", loaded)
    stand_in = environment["device"] is None or environment["device"]["platform"] == "cpu"
    return Section(
        f"Every strategy in a steady state, measured on {device}"
        + (f": {loaded.path.stem}" if loaded.path.stem != "strategies" else ""),
        f"Both lanes full of requests of {content['prompt_tokens']:,} prompt tokens, a model of "
        f"{content['model']['num_layers']} layers with dummy weights, {content['dtype']}; nobody "
        "ends, nobody moves.",
        "That the loop does what the arithmetic says with the stage times of the run, where each "
        "strategy spends the device's time, and how often a host-lane request gets a token.",
        (
            "Gains on a GPU: one CPU core stands in for the device, so merging is not nearly free "
            "and its attention is slower than the host's op. "
            if stand_in
            else ""
        )
        + "Whole jobs, with their prompts, promotions and ends, are not in it.",
        figures,
    )


def _steady_state(rows: Sequence[Found], title: str, loaded: Loaded) -> list[Figure]:
    bars = [
        Bar(
            row["strategy"].value,
            f"{row['tokens_per_sec'].value:,.1f} (x{row['ratio'].value:.2f})",
            (
                (row["device_tokens_per_sec"].value, DEVICE_COLOR),
                (row["host_tokens_per_sec"].value, HOST_COLOR),
            ),
        )
        for row in rows
    ]
    lanes = draw_bars(
        bars,
        f"Tokens per second by lane, and times device_only: {title}",
        "A bar for each strategy, split by the lane that decoded.",
        legend=[("device lane", DEVICE_COLOR), ("host lane", HOST_COLOR)],
    )
    lane_rows = [
        [
            row["strategy"].value,
            number(row["tokens_per_sec"]),
            spread(row, ("ratio", "ratio_min", "ratio_max")),
            percent(row["host_tokens_per_sec"].value / row["tokens_per_sec"].value),
            maybe(row.get("device_tpot_sec")),
            maybe(row.get("host_tpot_sec")),
            number(row["device_busy_percent"], " %"),
        ]
        for row in rows
    ]
    columns = ["strategy", "tokens/s", "times device_only", "host share"]
    columns += ["s/token, device", "s/token, host", "device busy"]
    figures = [
        Figure(
            lanes,
            Table(columns, lane_rows),
            "Medians over turns of all strategies; ratios are taken within a turn, and in brackets "
            "stand the least and the most of them.",
            loaded.source,
        )
    ]
    predicted = [row for row in rows if row.get("arithmetic_tokens_per_sec")]
    picture = draw_dots(
        [row["strategy"].value for row in predicted],
        [
            _series("measured", [row["tokens_per_sec"] for row in predicted]),
            _series("arithmetic", [row["arithmetic_tokens_per_sec"] for row in predicted]),
        ],
        f"Predicted against measured, tokens per second: {title}",
        "A track for each strategy with a dot for each of the two.",
    )
    cells = [
        [
            row["strategy"].value,
            number(row["tokens_per_sec"]),
            number(row["arithmetic_tokens_per_sec"]),
            number(row["measured_over_arithmetic"]),
        ]
        for row in predicted
    ]
    note = (
        "The arithmetic is the closed form of each schedule, with the stage times that were "
        "measured in the very run; the last column is the median of each turn's quotient."
    )
    columns = ["strategy", "measured", "arithmetic", "measured over it"]
    figures.append(Figure(picture, Table(columns, cells), note, loaded.source))
    return figures


def _series(label: str, values: Sequence[Found]) -> Series:
    return Series(label, tuple((index, one.value, None) for index, one in enumerate(values)))


def is_parity(content: dict[str, Any]) -> bool:
    return _has_column(content, "equal_percent") and _has_column(content, "dtype")


def parity_section(loaded: Loaded) -> Section:
    """Return how far strategies agree with device_only in each number format."""
    rows = [
        row for dtype in loaded.content["groups"].value for row in loaded.content["groups"][dtype]
    ]
    strategies = list(dict.fromkeys(row["strategy"].value for row in rows))
    dtypes = list(dict.fromkeys(row["dtype"].value for row in rows))
    series = [
        Series(
            dtype,
            tuple(
                (
                    strategies.index(row["strategy"].value),
                    row["max_score_difference_stds"].value,
                    None,
                )
                for row in rows
                if row["dtype"].value == dtype
            ),
        )
        for dtype in dtypes
    ]
    picture = draw_dots(
        strategies,
        series,
        "Largest difference of scores from device_only, in their standard deviations",
        "A track for each strategy with a dot for each number format, on a logarithmic axis.",
        log=True,
    )
    cells = [
        [
            f"{row['strategy'].value}, {row['dtype'].value}",
            number(row["max_score_difference_stds"]),
            number(row["equal_percent"], " %"),
            maybe(row.get("earliest_difference")) or "none",
            maybe(row.get("widest_margin_stds")) or "none",
            number(row["host_token_percent"], " %"),
        ]
        for row in rows
    ]
    columns = ["strategy, dtype", "largest difference", "equal texts", "first differing token"]
    columns += ["widest margin there", "tokens from the host"]
    note = (
        "Margin: the gap between the reference's two best scores where texts part; a small one "
        "says that rounding can have done it."
    )
    return Section(
        "Parity: every strategy computes the same function",
        f"{rows[0]['requests'].value} requests of the demo model, greedy, "
        f"{rows[0]['tokens'].value:,} tokens under each strategy, against device_only.",
        "That strategies differ by rounding and nothing else: differences are of the size of the "
        "number format's, and texts part only where two scores nearly tie.",
        "Quality of long outputs of large models: the demo model has 4 million parameters.",
        [Figure(picture, Table(columns, cells), note, loaded.source)],
    )


def _has_column(content: dict[str, Any], name: str) -> bool:
    groups = content.get("groups", {}).values()
    return any(rows and name in rows[0] for rows in groups if isinstance(rows, list))
