"""Hold strategies on described cards, in a steady state, to the bounds that they have to keep.

    python -m launch.paced_proof --output=docs/results/paced_steady.json

Lets launch.bench_paced measure each card in a process of its own, so that one that fails leaves the
other's rows, and judges medians over the turns. Wants a quiet machine for ten minutes, and 9 GiB
of its memory. What the bounds are: docs/described_hardware.md.

Exit status: 0 all bounds are kept; 1 some are not, or a card was not measured.
"""

import json
import math
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from absl import app, flags

from launch.environment import environment
from launch.measuring import ResultFile, Row

# The KV cache of a card holds 7 or 8 of the requests; the host's lane takes 8 GiB.
PROMPT_TOKENS, OUTPUT_TOKENS = 1000, 448
CARDS = {
    "t4": ("--config=configs/llama_3_2_3b.py", "--device_kv_gib=1.2", "--host_requests=48"),
    "a10": ("--config=configs/llama_3_1_8b.py", "--device_kv_gib=1.5", "--host_requests=40"),
}
STRATEGIES = (
    *("device_only", "full_offload", "asymmetric_pipelining"),
    *("async_overlap", "staggered", "passes_2", "apex"),
)
NUM_TURNS, LOOK_SEC, BUDGET_SEC = 3, 4.0, 270.0

FROM_PREDICTED = 0.05  # a measured rate, of every strategy
OF_ARITHMETIC, IDLE_PERCENT, SWEEP_LONGER = 0.95, 2.0, 1.03  # of those that merge
HELD = ("async_overlap", "staggered", "apex")


def judge(card: str, turns: Sequence[Row], predictions: Sequence[Row]) -> Iterator[Row]:
    """Yield a row for each strategy of a card: medians with least and most, and what they keep.

    The arithmetic's bound on a strategy that chooses is the largest on those that do not.
    """
    bounds = {row["strategy"]: row["arithmetic_tokens_per_sec"] for row in predictions}
    largest = max((bound for bound in bounds.values() if bound is not None), default=None)
    sweeps_sec = {
        row["repeat"]: row["sweep_sec"] for row in turns if row["strategy"] == "device_only"
    }
    for prediction in predictions:
        name = prediction["strategy"]
        own = [row for row in turns if row["strategy"] == name]
        if not own:
            continue
        rates = [row["tokens_per_sec"] for row in own]
        predicted, bound = prediction["tokens_per_sec"], bounds[name] or largest
        row = {
            "card": card,
            "strategy": name,
            "turns": len(own),
            "device_rows": own[0]["device_rows"],
            "host_rows": own[0]["host_rows"],
            "tokens_per_sec": _spread(rates),
            "predicted_tokens_per_sec": predicted,
            "over_predicted": _spread([rate / predicted for rate in rates]),
            "arithmetic_tokens_per_sec": bound,
            "over_arithmetic": None if bound is None else _spread([one / bound for one in rates]),
            "device_idle_percent": _spread([one["device_idle_percent"] for one in own]),
            "host_busy_percent": _spread([one["host_busy_percent"] for one in own]),
            "sweep_over_device_only": _spread(
                [
                    one["sweep_sec"] / sweeps_sec[one["repeat"]]
                    for one in own
                    if one["repeat"] in sweeps_sec
                ]
            ),
        }
        yield row | {"kept": kept(row)}


def kept(row: Row) -> dict[str, bool | None]:
    """Return which bounds a row's medians keep; None where a bound is not asked of it."""
    found: dict[str, bool | None] = {
        "predicted": abs(_middle(row, "over_predicted") - 1) <= FROM_PREDICTED
    }
    asked = ("arithmetic", "idle", "sweep")
    if row["strategy"] not in HELD:
        return found | dict.fromkeys(asked)
    return found | {
        "arithmetic": _middle(row, "over_arithmetic") >= OF_ARITHMETIC,
        "idle": _middle(row, "device_idle_percent") <= IDLE_PERCENT,
        "sweep": _middle(row, "sweep_over_device_only") <= SWEEP_LONGER,
    }


def _middle(row: Row, name: str) -> float:
    """Return a median; NaN, which keeps no bound, where nothing was measured."""
    return math.nan if row[name] is None else row[name]["median"]


def _spread(samples: Sequence[float]) -> Row | None:
    if not samples:
        return None
    return {"median": median(samples), "min": min(samples), "max": max(samples)}


def measure(card: str, path: Path, smoke: bool) -> dict[str, Any]:
    """Let a process of its own measure a card into a file; return what it holds.

    Raises RuntimeError where it left none.
    """
    path.unlink(missing_ok=True)
    arguments = [
        f"--device={card}",
        *CARDS[card],
        f"--prompt_tokens={PROMPT_TOKENS}",
        f"--output_tokens={OUTPUT_TOKENS}",
        f"--seconds={LOOK_SEC}",
        f"--repeats={NUM_TURNS}",
        f"--strategies={','.join(STRATEGIES)}",
        f"--budget_sec={BUDGET_SEC}",
        f"--output={path}",
        *(["--smoke"] if smoke else []),
    ]
    done = subprocess.run([sys.executable, "-m", "launch.bench_paced", *arguments], check=False)
    if not path.exists():
        raise RuntimeError(f"launch.bench_paced ended with status {done.returncode} and no file")
    return json.loads(path.read_text())


def main(argv: Sequence[str]) -> int:
    """Measure all cards, write what they came to, and return the exit status."""
    del argv
    values = flags.FLAGS
    output = Path(values.output)
    header = {
        "what": "strategies on described cards in a steady state, held to their bounds",
        "smoke": values.smoke,  # sizes at which no bound can be kept
        "prompt_tokens": PROMPT_TOKENS,
        "bounds": {
            "from_predicted": FROM_PREDICTED,
            "of_arithmetic": OF_ARITHMETIC,
            "idle_percent": IDLE_PERCENT,
            "sweep_longer": SWEEP_LONGER,
            "held": HELD,
        },
        "cards": {},
        "environment": environment(),
    }
    results = ResultFile(output, header, math.inf, _line)
    rows: list[Row] = []

    def bounds_of(card: str) -> Iterator[Row]:
        path = output.with_suffix(f".{card}")  # stays where this process is killed
        content = measure(card, path, values.smoke)
        facts = ("device", "model", "sizes", "failed", "left_out")
        results.content["cards"][card] = {name: content[name] for name in facts}
        groups = content["groups"]
        results.record(f"turns_{card}", groups.get("turns", []))
        for row in judge(card, groups.get("turns", []), groups.get("predictions", [])):
            rows.append(row)
            yield row
        path.unlink()

    for card in values.card:
        results.measure(f"bounds_{card}", lambda card=card: bounds_of(card))
    is_kept = all(one is not False for row in rows for one in row["kept"].values())
    is_whole = {(row["card"], row["strategy"]) for row in rows} == {
        (card, name) for card in values.card for name in STRATEGIES
    }
    print(f"all bounds are kept: {'yes' if is_kept and is_whole else 'no'}; results in {output}")
    return 0 if is_whole and (is_kept or values.smoke) else 1


def _line(row: Row) -> str:
    """Return what is printed of a turn or a judgement."""
    if "kept" not in row:
        return f"{row['strategy']:24} {row['tokens_per_sec']:.4g} tokens/s"
    judged = ", ".join(
        f"{name} {'kept' if one else 'NOT kept'}"
        for name, one in row["kept"].items()
        if one is not None
    )
    rate = row["tokens_per_sec"]["median"]
    return f"{row['card']:4} {row['strategy']:24} {rate:.4g} tokens/s  {judged}"


if __name__ == "__main__":
    # Only here: other scripts have flags of the same names, and tests import this one.
    flags.DEFINE_multi_enum("card", list(CARDS), list(CARDS), "Named once or more; unset: all.")
    flags.DEFINE_bool("smoke", False, "Tiny sizes: shows that the script runs, no more.")
    flags.DEFINE_string("output", "docs/results/paced_steady.json", "Result file.")
    app.run(main)
