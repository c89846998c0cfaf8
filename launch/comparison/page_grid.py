"""What the report says of the grid of drawn conditions: where hybrids lose, whether apex sees it.

Owns the sections of the files that launch.simulate_grid and simulate_jobs write.
"""

import statistics
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from launch.comparison.page import Figure, Section, Table
from launch.comparison.page_charts import Bar, Series, draw_bars, draw_dots
from launch.comparison.page_simulated import CANNOT, SHOWS
from launch.comparison.page_sources import Loaded
from launch.comparison.page_values import Found, number, percent
from launch.drawing import BRIGHT
from launch.plot_grid import Cells, draw_panel, gains, job_gains, losing

# Of the rate that apex predicted for its choice over what the choice then yielded.
PREDICTED_BOUNDS = (0.9, 0.95, 0.98, 1.02, 1.05, 1.1)
GAIN_BOUNDS = (0.8, 0.9, 0.98, 1.02, 1.25, 1.5, 2.0, 4.0)
STEADY_NOTE = (
    "A cell is all conditions of one context (tokens of KV of a row) and one host bandwidth, "
    "relative to a host with 256 GB/s, whatever the card, model and memory."
)
JOB_NOTE = (
    "A cell is all jobs of one output length and one host bandwidth, relative to a host with 410 "
    "GB/s, whatever the card, model, prompt length and number of requests."
)


def is_grid(content: dict[str, Any]) -> bool:
    return "to_best_fixed" in content.get("summary", ())


def grid_section(loaded: Loaded) -> Section:
    """Return where fixed hybrids lose, what apex gains and how well it predicts."""
    content = loaded.content
    rows, summary = content["rows"].value, content["summary"]
    return Section(
        "Drawn conditions: where hybrids lose, and whether apex sees it",
        f"{summary['num_conditions'].value} steady states drawn from cards, models, contexts, KV "
        "budgets, host bandwidths and host memory; eight strategies played in each.",
        SHOWS,
        CANNOT + " A steady state is no whole job: bringing requests into the host lane and home "
        "again costs something too, and is in the simulated jobs.",
        [
            _panel(losing(rows), "The losing region of the hybrid: ", loaded, percent, STEADY_NOTE),
            _share_below(summary, loaded),
            _panel(gains(rows), "", loaded, number, STEADY_NOTE),
            _quality(summary, loaded),
            _predictions(rows, loaded),
        ],
    )


def _panel(cells: Cells, before: str, loaded: Loaded, form: Any, note: str) -> Figure:
    title = before + (cells.title[0].lower() + cells.title[1:] if before else cells.title)
    picture = draw_panel(cells._replace(title=title))
    columns = [cells.line_name, *(f"host x{scale:g}" for scale in cells.scales)]
    rows = [
        [
            f"{line:,}",
            *(
                form(cells.values[line, scale]) if (line, scale) in cells.values else ""
                for scale in cells.scales
            ),
        ]
        for line in cells.lines
    ]
    return Figure(picture, Table(columns, rows), note, loaded.source)


def _share_below(summary: Found, loaded: Loaded) -> Figure:
    shares = summary["share_below_device_only"]
    found = [(name, shares[name]) for name in shares.value]
    picture = draw_bars(
        [Bar(name, f"{share.value:.1%}", ((share.value, BRIGHT[1]),)) for name, share in found],
        "Share of all conditions in which a strategy is below device_only",
        "A bar for each fixed hybrid.",
    )
    rows = [[name, percent(share)] for name, share in found]
    note = "Fixed strategies; apex falls back to device_only where no hybrid is predicted to pay."
    return Figure(picture, Table(["strategy", "share"], rows), note, loaded.source)


def _quality(summary: Found, loaded: Loaded) -> Figure:
    titles = {
        "to_best_fixed": "over the best fixed strategy",
        "to_device_only": "over device_only",
        "to_apex_paper": "over apex_paper",
    }
    keys = ("min", "p1", "median", "max")
    picture = draw_dots(
        list(titles.values()),
        [
            Series(
                key,
                tuple((index, summary[name][key].value, None) for index, name in enumerate(titles)),
            )
            for key in keys
        ],
        "The rate of apex over others: least, first percentile, median, most",
        "A track for each comparison, on a logarithmic axis.",
        log=True,
        reference=1.0,
    )
    rows = [
        [title, *(number(summary[name][key]) for key in keys), percent(summary[name]["share_good"])]
        for name, title in titles.items()
    ]
    note = "The axis is logarithmic; the line is at 1. Good: at least 0.98."
    return Figure(picture, Table(["apex", *keys, "share good"], rows), note, loaded.source)


def _predictions(rows: Sequence[dict[str, Any]], loaded: Loaded) -> Figure:
    """Count how far the rate that apex predicted lies from what it then had."""
    title = "Predicted against played: the rate that apex predicted over what it had"
    ratios = [row["apex_predicted"] / row["rates"]["apex"] for row in rows]
    return _histogram(ratios, PREDICTED_BOUNDS, title, loaded)


def _histogram(
    ratios: Sequence[float], bounds: Sequence[float], title: str, loaded: Loaded
) -> Figure:
    """Count the conditions whose ratio lies between bounds."""
    places = Counter(sum(ratio >= bound for bound in bounds) for ratio in ratios)
    first, last = f"below {bounds[0]:g}", f"{bounds[-1]:g} or more"
    between = (f"{low:g} to {high:g}" for low, high in pairwise(bounds))
    counts = [(label, places[index]) for index, label in enumerate((first, *between, last))]
    picture = draw_bars(
        [Bar(label, str(count), ((count, BRIGHT[0]),)) for label, count in counts],
        title,
        "A bar for each range of the quotient, as long as the number of conditions in it.",
    )
    table = Table(["quotient", "conditions"], [[label, number(count)] for label, count in counts])
    note = f"The median of all {len(ratios)} is {statistics.median(ratios):.3f}."
    return Figure(picture, table, note, loaded.source)


def is_job_grid(content: dict[str, Any]) -> bool:
    return "geometric_mean" in content.get("summary", ())


def job_grid_section(loaded: Loaded) -> Section:
    """Return what apex gains, and where it loses, in whole jobs."""
    rows, summary = loaded.content["rows"].value, loaded.content["summary"]
    return Section(
        "Drawn jobs: what apex gains from the first prompt to the last token",
        f"{summary['num_conditions'].value} whole jobs drawn from cards, KV budgets, host "
        "bandwidths, lengths and numbers of requests, all requests there at the start; in each "
        "somebody has to wait for the card.",
        SHOWS,
        CANNOT,
        [
            _panel(job_gains(rows), "", loaded, number, JOB_NOTE),
            _histogram(
                [row["to_device_only"] for row in rows],
                GAIN_BOUNDS,
                "Jobs by the rate of apex over device_only",
                loaded,
            ),
        ],
    )
