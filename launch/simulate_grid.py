"""Play every strategy in hundreds of drawn conditions: whether `apex` chooses well in each.

    python -m launch.simulate_grid --output=docs/results/simulated_grid.json \
        --plot=docs/results/simulated_grid.svg

Conditions are drawn by --seed from all combinations of cards, models, contexts, KV budgets, host
bandwidths and host memory below, as far as they can be. Each is a steady state: both lanes full,
nobody ends. The summary says how `apex` compares with the best fixed strategy, with device_only and
with apex_paper, and names the worst conditions.
"""

import itertools
import json
import multiprocessing
import random
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from absl import app, flags

from apex_jax.adaptive import Adaptive
from apex_jax.config import ConfigError
from apex_jax.hardware_profiles import GIB
from launch.conditions import Condition, place, play_steady, policy_of, steady_rows
from launch.environment import environment
from launch.plot_grid import draw_grid

Row = dict[str, Any]
FIXED = (
    *("device_only", "async_overlap", "staggered_2", "passes_2", "passes_4"),
    "asymmetric_pipelining",
)
CHOOSING = ("apex_paper", "apex")
DEVICES = ("t4", "a10", "l4", "rtx_4090", "a100_40gb", "h100")
MODELS = ("llama_3_2_3b", "llama_2_7b", "llama_3_1_8b")
CONTEXTS = (256, 1024, 4096, 16384)  # tokens of KV of a row
KV_GIB = (0.5, 2.0, None)  # of the card; None: all that the weights leave
HOST = "paper_t4"  # 256 GB/s, of which the op has 0.81
HOST_SCALES = (0.05, 0.1, 0.25, 0.5, 1.0, 2.0)
HOST_GIB = (4, 16, 64, 144)
GOOD = 0.98
NUM_WORST = 12


def all_conditions() -> list[Condition]:
    """Return the combinations that can be, each load once: more memory may hold no more rows."""
    found: dict[tuple[object, ...], Condition] = {}
    for device, model, context, kv_gib, scale, host_gib in itertools.product(
        DEVICES, MODELS, CONTEXTS, KV_GIB, HOST_SCALES, HOST_GIB
    ):
        condition = Condition(
            device,
            HOST,
            model,
            prompt_tokens=context - 1,
            output_tokens=1,
            kv_bytes=None if kv_gib is None else int(kv_gib * GIB),
            host_bytes=host_gib * GIB,
            host_bandwidth_scale=scale,
        )
        try:
            rows = steady_rows(condition, place(condition))
        except ConfigError:
            continue
        if all(rows):
            found.setdefault((device, model, context, scale, *rows), condition)
    return list(found.values())


def draw(num_conditions: int, seed: int) -> list[Condition]:
    """Return so many of them, or all where there are no more."""
    everything = all_conditions()
    return random.Random(seed).sample(everything, min(num_conditions, len(everything)))


def play(condition: Condition) -> tuple[Row, dict[str, tuple[int, float]]]:
    """Return a condition's rates and ratios; and, by strategy, sweeps and their CPU seconds."""
    found = place(condition)
    device_rows, host_rows = steady_rows(condition, found)
    row: Row = {**asdict(condition), "device_rows": device_rows, "host_rows": host_rows}
    rates: dict[str, float] = {}
    spent: dict[str, tuple[int, float]] = {}
    for name in (*FIXED, *CHOOSING):
        begin_sec = time.process_time()
        policy = policy_of(name, found.times)
        played = play_steady(condition, found, policy)
        spent[name] = played.num_sweeps, time.process_time() - begin_sec
        rates[name] = played.rate
        if isinstance(policy, Adaptive):
            assert policy.decision is not None
            best = policy.decision.best
            row[f"{name}_choice"] = list(best.choice)
            row[f"{name}_predicted"] = round(best.rate, 2)
    best_fixed = max(FIXED, key=lambda name: rates[name])
    row |= {
        "rates": {name: round(rate, 2) for name, rate in rates.items()},
        "best_fixed": best_fixed,
        "to_best_fixed": round(rates["apex"] / rates[best_fixed], 4),
        "to_device_only": round(rates["apex"] / rates["device_only"], 4),
        "to_apex_paper": round(rates["apex"] / rates["apex_paper"], 4),
    }
    return row, spent


def summarize(rows: Sequence[Row]) -> Row:
    """Return least, first percentile, median, largest and the share that is good, by ratio."""
    summary: Row = {"num_conditions": len(rows)}
    for name in ("to_best_fixed", "to_device_only", "to_apex_paper"):
        ratios = sorted(row[name] for row in rows)
        summary[name] = {
            "min": ratios[0],
            "p1": ratios[len(ratios) // 100],
            "median": statistics.median(ratios),
            "max": ratios[-1],
            "share_good": sum(ratio >= GOOD for ratio in ratios) / len(ratios),
        }
    for name in FIXED[1:]:
        losing = [row for row in rows if row["rates"][name] < row["rates"]["device_only"]]
        summary.setdefault("share_below_device_only", {})[name] = len(losing) / len(rows)
    return summary


def speeds(spent: Sequence[dict[str, tuple[int, float]]]) -> dict[str, float]:
    """Return simulated sweeps per CPU second, by strategy."""
    total: dict[str, list[float]] = defaultdict(lambda: [0, 0.0])
    for of_condition in spent:
        for name, (num_sweeps, seconds) in of_condition.items():
            total[name][0] += num_sweeps
            total[name][1] += seconds
    return {name: round(num_sweeps / seconds) for name, (num_sweeps, seconds) in total.items()}


def run(conditions: Sequence[Condition], num_jobs: int) -> tuple[list[Row], dict[str, Any]]:
    """Play conditions in so many processes; return their rows in order, and how fast it was."""
    played: list[tuple[Row, dict[str, tuple[int, float]]]] = []
    begin_sec = time.perf_counter()
    with multiprocessing.get_context("spawn").Pool(num_jobs) as pool:
        for one in pool.imap(play, conditions, chunksize=4):
            played.append(one)
            if len(played) % 50 == 0:
                print(f"{len(played)} of {len(conditions)} conditions", file=sys.stderr)
    of_8b = [spent for row, spent in played if row["model"] == "llama_3_1_8b"]
    return [row for row, _ in played], {
        "seconds": round(time.perf_counter() - begin_sec, 1),
        "jobs": num_jobs,
        "sweeps_per_cpu_sec_of_8b": speeds(of_8b),
    }


def describe(summary: Row, rows: Sequence[Row]) -> str:
    """Return the summary and the worst conditions as text."""
    lines = [f"{summary['num_conditions']} conditions"]
    for name in ("to_best_fixed", "to_device_only", "to_apex_paper"):
        values = ", ".join(f"{key} {value:.4g}" for key, value in summary[name].items())
        lines.append(f"apex {name}: {values}")
    for name, share in summary["share_below_device_only"].items():
        lines.append(f"{name} is below device_only in {share:.1%}")
    for row in sorted(rows, key=lambda row: row["to_best_fixed"])[:NUM_WORST]:
        lines.append(
            f"  {row['to_best_fixed']:.3f} of {row['best_fixed']}: {row['model']} on "
            f"{row['device']}, {row['prompt_tokens'] + 1} tokens, {row['device_rows']}+"
            f"{row['host_rows']} rows, host x{row['host_bandwidth_scale']}, {row['apex_choice']}"
        )
    return "\n".join(lines)


def main(argv: Sequence[str]) -> None:
    values = flags.FLAGS
    rows, speed = run(draw(values.num_conditions, values.seed), values.jobs)
    summary = summarize(rows)
    print(describe(summary, rows))
    content = {
        "what": "strategies in drawn steady states on simulated hardware; tokens per second",
        "seed": values.seed,
        "summary": summary,
        "speed": speed,
        "environment": environment(),
    }
    text = json.dumps(content, indent=1).removesuffix("\n}")
    lines = ",\n".join(json.dumps(row) for row in rows)
    Path(values.output).write_text(f'{text},\n"rows": [\n{lines}\n]\n}}\n')
    if values.plot is not None:
        Path(values.plot).write_text(draw_grid(rows))


if __name__ == "__main__":
    # Only here: other scripts have flags of the same names, and tests import several of them.
    flags.DEFINE_integer("num_conditions", 600, "Conditions to draw.", lower_bound=1)
    flags.DEFINE_integer("seed", 0, "Of the draw.")
    flags.DEFINE_integer("jobs", 2, "Processes.", lower_bound=1)
    flags.DEFINE_string("output", "docs/results/simulated_grid.json", "Result file.")
    flags.DEFINE_string("plot", None, "SVG file of the losing region and the gains.")
    app.run(main)
