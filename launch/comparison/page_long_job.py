"""What the report says of a long job of short requests.

Owns the section of the files that launch.long_job writes.
"""

from typing import Any

from launch.comparison.page import Figure, Section, Table
from launch.comparison.page_charts import Bar, draw_bars
from launch.comparison.page_curves import Curves, Point, curve_figure
from launch.comparison.page_sources import Loaded
from launch.comparison.page_values import number
from launch.drawing import BRIGHT


def is_long_job(content: dict[str, Any]) -> bool:
    return "memory_growth_bytes" in content


def long_job_section(loaded: Loaded) -> Section:
    """Return memory and rate along a job of many short requests."""
    content, groups = loaded.content, loaded.content["groups"]
    parts, first = list(groups["parts"]), content["first_result"]
    columns = ["tenth", "requests/s", "CPU s/request", "memory, bytes"]
    keys = ("requests_per_sec", "cpu_sec_per_request", "memory_bytes")
    rates = draw_bars(
        [
            Bar(
                f"tenth {index}",
                f"{part['requests_per_sec'].value:,.0f}",
                ((part["requests_per_sec"].value, BRIGHT[0]),),
            )
            for index, part in enumerate(parts, 1)
        ],
        "Requests per second in each tenth of the job",
        "A bar for each tenth.",
    )
    rows = [
        [str(index), *(number(part[key]) for key in keys)] for index, part in enumerate(parts, 1)
    ]
    samples = list(groups["samples"])
    memory = curve_figure(
        [
            Point("memory", sample["num_results"].value, sample["memory_bytes"])
            for sample in samples[::5]
        ],
        Curves(
            "Resident memory by results written",
            "results",
            "bytes",
            "Every fifth sample. The first tenth is warm-up.",
        ),
        loaded.source,
    )
    proofs = content["proofs"]
    return Section(
        "A long job of short requests",
        f"{content['num_requests'].value:,} requests of {content['prompt_tokens'][0].value} to "
        f"{content['prompt_tokens'][1].value} prompt and {content['output_tokens'][0].value} to "
        f"{content['output_tokens'][1].value} output tokens on the demo model, sent through a "
        f"pipe. Memory grew by {content['memory_growth_bytes'].value / 1e6:.1f} MB after the first "
        f"tenth; the first result came when {first['num_sent'].value:,} requests had been sent. "
        "Checked: "
        + "; ".join(f"{proof}: {'yes' if proofs.value[proof] else 'no'}" for proof in proofs.value)
        + ".",
        "That memory and rate do not depend on how much of the job is done, and that results come "
        "while the input is still being read.",
        "The rate on any other machine; one that does other work shows that in single tenths, but "
        "hardly in the CPU time of a request.",
        [
            Figure(rates, Table(columns, rows), "Tenths by results written.", loaded.source),
            memory,
        ],
    )
