"""What the report says of prompts that begin alike.

Owns the section of the files that launch.bench_prefix writes.
"""

from typing import Any

from launch.comparison.page import Figure, Section, Table
from launch.comparison.page_charts import Bar, draw_bars
from launch.comparison.page_sources import Loaded
from launch.comparison.page_values import number
from launch.drawing import BRIGHT


def is_prefix(content: dict[str, Any]) -> bool:
    return "questions_speed_up" in content.get("groups", {})


def prefix_section(loaded: Loaded) -> Section:
    """Return how long the same requests take with prefix reuse and without."""
    content, groups = loaded.content, loaded.content["groups"]
    bars: list[Bar] = []
    rows: list[list[Any]] = []
    for group, title in (("questions", "one system prompt"), ("n", "outputs of one prompt")):
        for row in groups[group]:
            way = "reused" if row["prefix_reuse"].value else "computed"
            seconds = row["sec"].value
            label = f"{title}, {way}"
            bars.append(Bar(label, f"{seconds:,.1f} s", ((seconds, BRIGHT[0]),)))
            columns = ("repeat", "outputs", "prompt_tokens", "prefilled_tokens", "sec")
            rows.append([label, *(number(row[key]) for key in columns)])
    chart = draw_bars(bars, "Seconds with prefixes reused and computed", "A bar for each turn.")
    heads = ["requests", "repeat", "outputs", "prompt tokens", "prefilled", "seconds"]
    faster = groups["questions_speed_up"][0]["speed_up"].value
    return Section(
        "Prompts that begin alike",
        f"Requests behind one system prompt of {content['system_tokens'].value:,} tokens, and "
        f"{content['n'].value} outputs of one prompt, on {content['model'].value}: "
        f"{faster:.1f} times faster where the pages of what they share are found again.",
        "What computing a shared beginning once saves, all else being equal; outputs are compared.",
        "Other lengths: the longer the outputs, the less there is to save.",
        [Figure(chart, Table(heads, rows), "Turns alternate.", loaded.source)],
    )
