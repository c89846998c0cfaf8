"""What the report says of strategies on described cards that were held to bounds.

Owns the section of the file that launch.paced_proof writes.
"""

from collections.abc import Sequence
from typing import Any

from launch.comparison.page import Figure, Section, Table
from launch.comparison.page_charts import Bar, draw_bars
from launch.comparison.page_sources import Loaded
from launch.comparison.page_values import Cell, Found, Words, maybe, number, short, spread
from launch.drawing import BRIGHT

COLUMNS = (
    *("strategy", "tokens/s", "predicted", "over it", "arithmetic", "over it"),
    *("device idle, %", "sweep over device_only", "bounds", "turns"),
)


def is_paced(content: dict[str, Any]) -> bool:
    return {"cards", "bounds"} <= content.keys()


def paced_section(loaded: Loaded) -> Section:
    """Return each card's rates beside what was predicted, and which bounds were kept."""
    content, groups = loaded.content.value, loaded.content["groups"]
    bounds = content["bounds"]
    rows = {
        card: list(groups[f"bounds_{card}"])
        for card in content["cards"]
        if f"bounds_{card}" in groups.value
    }
    judged = [
        one
        for own in rows.values()
        for row in own
        for one in row["kept"].value.values()
        if one is not None
    ]
    faults = {**content["failed"]}
    for card, facts in content["cards"].items():
        faults |= {f"{card}: {name}": why for name, why in facts["failed"].items()}
    return Section(
        "Described cards in a steady state, held to bounds",
        f"Both lanes full of requests of {content['prompt_tokens']:,} prompt tokens; nobody ends, "
        f"nobody moves. {sum(judged)} of {len(judged)} bounds are kept."
        + "".join(f" Not measured: {name} ({why})." for name, why in faults.items()),
        "That this machine's scheduler, threads and attention op keep up with a card of that "
        "speed, and that what the simulated backend predicts is what then happens. The bounds: a "
        f"rate within {bounds['from_predicted']:.0%} of the predicted one; of "
        f"{', '.join(bounds['held'])} at least {bounds['of_arithmetic']:.0%} of the arithmetic's, "
        f"a device idle for at most {bounds['idle_percent']:g} %, and sweeps at most "
        f"{bounds['sweep_longer'] - 1:.0%} longer than those of device_only.",
        "Whether the card reaches the shares of its data sheet that its profile says, and whole "
        "jobs with their prompts, promotions and ends.",
        [_figure(card, content["cards"][card], own, loaded) for card, own in rows.items() if own],
    )


def _figure(card: str, facts: dict[str, Any], rows: Sequence[Found], loaded: Loaded) -> Figure:
    name = facts["device"]["name"]
    picture = draw_bars(
        [_bar(row) for row in rows],
        f"Tokens per second in a steady state on a described {card.upper()}",
        "A bar for each strategy; a diamond for what was predicted.",
        legend=[("measured", BRIGHT[0]), ("diamond: predicted", "none")],
    )
    cells = [
        [
            row["strategy"].value,
            spread(row["tokens_per_sec"]),
            number(row["predicted_tokens_per_sec"]),
            spread(row["over_predicted"]),
            maybe(row.get("arithmetic_tokens_per_sec")),
            spread(row.get("over_arithmetic")),
            spread(row["device_idle_percent"]),
            spread(row.get("sweep_over_device_only")),
            _verdict(row["kept"].value),
            number(row["turns"]),
        ]
        for row in rows
    ]
    note = (
        f"{name}; {facts['sizes']}. Medians over turns that alternate, in brackets the least and "
        "the most. The arithmetic's bound on apex, which chooses, is the largest of the others."
    )
    return Figure(picture, Table(COLUMNS, cells), note, loaded.source)


def _bar(row: Found) -> Bar:
    rate, ratio = row["tokens_per_sec"].value, row["over_predicted"].value["median"]
    return Bar(
        row["strategy"].value,
        f"{short(rate['median'])} (x{ratio:.2f} of predicted)",
        ((rate["median"], BRIGHT[0]),),
        (rate["min"], rate["max"]),
        row["predicted_tokens_per_sec"].value,
    )


def _verdict(kept: dict[str, bool | None]) -> Cell:
    """Return which bounds are not kept; those that are not asked for are not named."""
    missed = [name for name, one in kept.items() if one is False]
    return Words(f"not kept: {', '.join(missed)}" if missed else "kept")
