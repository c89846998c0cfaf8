"""Play whole jobs in drawn conditions: whether `apex` is ever worse than `device_only` there.

    python -m launch.simulate_jobs --num_conditions=60

Conditions are drawn by --seed from all combinations of cards, KV budgets, host bandwidths, lengths
and numbers of requests below, as far as they can be and not everybody fits the card. Requests come
all at once, their lengths within 10 % of those named; a job is played from the first prompt to the
last token. The summary has the ratio of the rates, and names the worst conditions.
"""

import itertools
import json
import multiprocessing
import random
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from absl import app, flags

from apex_jax.config import ConfigError
from apex_jax.hardware_profiles import GIB
from launch.conditions import PAGE_SIZE, Condition, place, play_job, policy_of, steady_rows
from launch.environment import environment
from launch.workloads import Lengths, draw_uniform

Row = dict[str, Any]
STRATEGIES = ("device_only", "apex")
# A model that fits the card, and a KV budget that leaves others waiting.
CARDS = (
    *(("t4", "llama_2_7b", None), ("a10", "llama_3_1_8b", 3.22), ("a10", "llama_2_7b", None)),
    *(("l4", "llama_3_1_8b", 2.0), ("rtx_4090", "llama_3_1_8b", 1.0)),
    *(("a100_40gb", "llama_3_1_8b", 4.0), ("h100", "llama_3_1_8b", 2.0)),
)
HOST = "paper_a10"  # 409.6 GB/s, of which the op has 0.81
HOST_SCALES = (0.02, 0.05, 0.1, 0.25, 1.0)
PROMPT_TOKENS = (100, 300, 1000, 2500, 4000)
OUTPUT_TOKENS = (50, 100, 200, 400, 1000)
NUM_REQUESTS = (50, 100, 300)
MAX_SWEEPS = 12_000  # of device_only, about: longer jobs show what shorter ones do
GOOD = 0.98
NUM_WORST = 12


class JobCondition(NamedTuple):
    """A place, and how many requests of its lengths are served there."""

    where: Condition
    num_requests: int


def all_conditions() -> list[JobCondition]:
    """Return the combinations that can be, in which somebody has to wait for the card."""
    found: list[JobCondition] = []
    for (device, model, kv_gib), scale, prompt, output, num_requests in itertools.product(
        CARDS, HOST_SCALES, PROMPT_TOKENS, OUTPUT_TOKENS, NUM_REQUESTS
    ):
        where = Condition(
            device,
            HOST,
            model,
            prompt_tokens=prompt,
            output_tokens=output,
            kv_bytes=None if kv_gib is None else int(kv_gib * GIB),
            host_bandwidth_scale=scale,
        )
        try:
            device_rows, _ = steady_rows(where, place(where))
        except ConfigError:
            continue
        if device_rows < num_requests and num_requests * output < MAX_SWEEPS * device_rows:
            found.append(JobCondition(where, num_requests))
    return found


def draw(num_conditions: int, seed: int) -> list[JobCondition]:
    """Return so many of them, or all where there are no more."""
    everything = all_conditions()
    return random.Random(seed).sample(everything, min(num_conditions, len(everything)))


def play(condition: JobCondition) -> Row:
    """Return a condition's rates, and what apex has of device_only."""
    where, num_requests = condition
    found = place(where)
    lengths = Lengths(where.prompt_tokens, where.output_tokens)
    limit = min(found.max_model_len, found.device_tokens - 2 * PAGE_SIZE)
    requests = draw_uniform(lengths, num_requests, limit, random.Random(0)).requests
    jobs = {name: play_job(found, policy_of(name, found.times), requests) for name in STRATEGIES}
    chosen, alone = jobs["apex"], jobs["device_only"]
    return {
        **asdict(where),
        "num_requests": num_requests,
        "device_rows": steady_rows(where, found)[0],
        "device_only": round(alone.rate, 2),
        "apex": round(chosen.rate, 2),
        "to_device_only": round(chosen.rate / alone.rate, 4),
        "host_share": round(chosen.host_share, 4),
    }


def summarize(rows: Sequence[Row]) -> Row:
    """Return how apex compares with device_only over all conditions."""
    ratios = sorted(row["to_device_only"] for row in rows)
    return {
        "num_conditions": len(rows),
        "min": ratios[0],
        "p1": ratios[len(ratios) // 100],
        "median": statistics.median(ratios),
        "geometric_mean": round(statistics.geometric_mean(ratios), 4),
        "max": ratios[-1],
        "share_good": sum(ratio >= GOOD for ratio in ratios) / len(ratios),
    }


def describe(summary: Row, rows: Sequence[Row]) -> str:
    """Return the summary and the worst conditions as text."""
    lines = [
        "apex to device_only: " + ", ".join(f"{key} {one:.4g}" for key, one in summary.items())
    ]
    for row in sorted(rows, key=lambda row: row["to_device_only"])[:NUM_WORST]:
        lines.append(
            f"  {row['to_device_only']:.3f}: {row['model']} on {row['device']}, "
            f"{row['num_requests']} requests of {row['prompt_tokens']} + {row['output_tokens']} "
            f"tokens, {row['device_rows']} at once, host x{row['host_bandwidth_scale']}, "
            f"{row['host_share']:.1%} on the host"
        )
    return "\n".join(lines)


def main(argv: Sequence[str]) -> None:
    values = flags.FLAGS
    conditions = draw(values.num_conditions, values.seed)
    begin_sec, rows = time.perf_counter(), list[Row]()
    with multiprocessing.get_context("spawn").Pool(values.jobs) as pool:
        for row in pool.imap(play, conditions):
            rows.append(row)
            if len(rows) % 20 == 0:
                print(f"{len(rows)} of {len(conditions)} jobs", file=sys.stderr)
    summary = summarize(rows)
    print(describe(summary, rows))
    content = {
        "what": "whole jobs in drawn conditions on simulated hardware; tokens per second",
        "seed": values.seed,
        "summary": summary,
        "seconds": round(time.perf_counter() - begin_sec, 1),
        "environment": environment(),
    }
    text = json.dumps(content, indent=1).removesuffix("\n}")
    lines = ",\n".join(json.dumps(row) for row in rows)
    Path(values.output).write_text(f'{text},\n"rows": [\n{lines}\n]\n}}\n')


if __name__ == "__main__":
    # Only here: other scripts have flags of the same names, and tests import several of them.
    flags.DEFINE_integer("num_conditions", 160, "Conditions to draw.", lower_bound=1)
    flags.DEFINE_integer("seed", 0, "Of the draw.")
    flags.DEFINE_integer("jobs", 2, "Processes.", lower_bound=1)
    flags.DEFINE_string("output", "docs/results/simulated_job_grid.json", "Result file.")
    app.run(main)
