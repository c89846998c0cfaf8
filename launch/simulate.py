"""Play strategies on described hardware: every combination of the values given.

    python -m launch.simulate --device=t4,a10 --host=paper_t4 --model=llama_2_7b,llama_3_1_8b \
        --prompt_tokens=1000 --output_tokens=100,400 --output=runs/simulated.csv
    python -m launch.simulate --workload=azure_conv --num_requests=300 --request_rate=2 \
        --strategies=device_only,apex --output=runs/online.csv --plot=runs/online.svg

Without --num_requests each condition is a steady state: both lanes full of requests half-way
through, which neither grow nor end. With it, it is a whole job, from the first prompt to the last
token. Rows go to a CSV file; what they were made with, to a JSON file beside it. A condition that
cannot be is a row with the reason. docs/simulation.md says what simulation can show.
"""

import csv
import itertools
import json
import random
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from absl import app, flags

from apex_jax.adaptive import Adaptive
from apex_jax.config import ConfigError
from apex_jax.hardware_profiles import GIB
from apex_jax.policies import Policy
from launch.conditions import (
    ALL_STRATEGIES,
    ITEMSIZE,
    PAGE_SIZE,
    Condition,
    Place,
    architecture,
    device_profile,
    host_profile,
    place,
    play_job,
    play_steady,
    policy_of,
    settings_of,
    steady_rows,
)
from launch.environment import environment
from launch.plot_rates import draw_rates
from launch.workloads import Drawn, Lengths, draw_trace, draw_uniform, poisson_arrivals, traces

Row = dict[str, Any]
COLUMNS = (
    *("device", "host", "model", "workload", "prompt_tokens", "output_tokens", "device_kv_tokens"),
    *("host_kv_tokens", "host_bandwidth_scale", "request_rate", "strategy", "rate"),
    *("to_device_only", "host_share", "device_rows", "host_rows", "sweep_sec", "seconds"),
    *("ttft_sec", "tpot_sec", "num_preemptions", "share_dropped", "choice", "reason"),
)
SHOWN = (
    *("device", "host", "model", "prompt_tokens", "output_tokens", "strategy", "rate"),
    *("to_device_only", "host_share", "reason"),
)


def conditions(values: Any) -> list[Condition]:
    """Return every combination of the flags' values; ConfigError where a name means nothing."""
    for name in values.device:
        device_profile(name)
    for name in values.host:
        host_profile(name)
    for name in values.strategies:
        settings_of(name)
    token_bytes = {name: architecture(name).kv_bytes_per_token(ITEMSIZE) for name in values.model}
    if values.kv_gib and values.kv_tokens:
        raise ConfigError("--kv_gib and --kv_tokens both say how large the card's KV cache is")
    lengths = _lengths(values)
    combined: list[Condition] = []
    for device, host, model, (prompt_tokens, output_tokens), host_gib, scale in itertools.product(
        values.device,
        values.host,
        values.model,
        lengths,
        _numbers("host_gib", values.host_gib) or [None],
        _numbers("host_bandwidth_scale", values.host_bandwidth_scale),
    ):
        budgets = [gib * GIB for gib in _numbers("kv_gib", values.kv_gib)]
        budgets += [n * token_bytes[model] for n in _numbers("kv_tokens", values.kv_tokens)]
        combined += [
            Condition(
                device,
                host,
                model,
                prompt_tokens,
                output_tokens,
                None if budget is None else int(budget),
                None if host_gib is None else int(host_gib * GIB),
                scale,
            )
            for budget in budgets or [None]
        ]
    return combined


def _lengths(values: Any) -> list[Lengths]:
    """Return prompt and output lengths: those given, or the means of a published trace."""
    if values.workload == "uniform":
        pairs = itertools.product(
            _numbers("prompt_tokens", values.prompt_tokens or ["1000"]),
            _numbers("output_tokens", values.output_tokens or ["200"]),
        )
        return [Lengths(int(prompt), int(output)) for prompt, output in pairs]
    if values.prompt_tokens or values.output_tokens:
        raise ConfigError("--prompt_tokens and --output_tokens are those of --workload=uniform")
    if not values.num_requests:
        raise ConfigError("a published --workload is a whole job: give --num_requests")
    draw_trace(values.workload, 1, sys.maxsize, random.Random(0))
    trace = traces()[values.workload]
    return [Lengths(round(trace["mean_prompt_tokens"]), round(trace["mean_output_tokens"]))]


def _numbers(flag: str, texts: Sequence[str]) -> list[float]:
    """Return a list flag's positive numbers."""
    numbers: list[float] = []
    for text in texts:
        try:
            numbers.append(float(text))
        except ValueError:
            unit = "; the unit is GiB already" if flag.endswith("_gib") else ""
            raise ConfigError(f"--{flag}: {text!r} is no number{unit}") from None
        if numbers[-1] <= 0:
            raise ConfigError(f"--{flag}: {text} must be above 0")
    return numbers


def play(condition: Condition, values: Any) -> Iterator[Row]:
    """Yield a row for each strategy, or one with the reason why the condition cannot be."""
    head: Row = {
        **{name: value for name, value in asdict(condition).items() if name in COLUMNS},
        "workload": values.workload,
        "request_rate": values.request_rate,
    }
    try:
        found = place(condition)
        drawn = _draw(condition, found, values) if values.num_requests else None
    except ConfigError as error:
        yield {**head, "reason": str(error)}
        return
    head |= {"device_kv_tokens": found.device_tokens, "host_kv_tokens": found.host_tokens}
    device_only_rate: float | None = None
    for name in values.strategies:
        policy = policy_of(name, found.times)
        if drawn is None:
            played = _play_steady(condition, found, policy)
        else:
            played = _play_job(found, policy, drawn, values)
        if name == "device_only":
            device_only_rate = played["rate"]
        if device_only_rate is not None:
            played["to_device_only"] = played["rate"] / device_only_rate
        if isinstance(policy, Adaptive) and policy.decision is not None:
            played["choice"] = " ".join(str(part) for part in policy.decision.best.choice)
        yield {**head, "strategy": name, **played}


def _draw(condition: Condition, found: Place, values: Any) -> Drawn:
    """Draw the requests of a job, the same for every strategy and place that can hold them."""
    rng, num_requests = random.Random(values.seed), values.num_requests
    limit = min(found.max_model_len, found.device_tokens - 2 * PAGE_SIZE)
    if values.workload == "uniform":
        lengths = Lengths(condition.prompt_tokens, condition.output_tokens)
        return draw_uniform(lengths, num_requests, limit, rng)
    return draw_trace(values.workload, num_requests, limit, rng)


def _play_steady(condition: Condition, found: Place, policy: Policy) -> Row:
    device_rows, host_rows = steady_rows(condition, found)
    steady = play_steady(condition, found, policy)
    return {
        "rate": steady.rate,
        "host_share": steady.host_rate / steady.rate,
        "device_rows": device_rows if policy.uses_device_lane else 0,
        "host_rows": host_rows if policy.max_cohorts else 0,
        "sweep_sec": steady.sweep_sec,
    }


def _play_job(found: Place, policy: Policy, drawn: Drawn, values: Any) -> Row:
    arrivals_sec = None
    if values.request_rate:
        rng = random.Random(values.seed + 1)
        arrivals_sec = poisson_arrivals(len(drawn.requests), values.request_rate, rng)
    job = play_job(found, policy, drawn.requests, arrivals_sec, values.max_prefill_tokens)
    row = {name: value for name, value in job._asdict().items() if name in COLUMNS}
    return {**row, "share_dropped": drawn.share_dropped}


def write(path: Path, rows: Sequence[Row]) -> None:
    """Write rows as CSV; what a row does not have is empty."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows({name: _short(value) for name, value in row.items()} for row in rows)
    header = {"what": "strategies on simulated hardware; tokens per second, seconds"}
    content = {**header, "num_rows": len(rows), "environment": environment()}
    path.with_suffix(".json").write_text(json.dumps(content, indent=1) + "\n")


def table(rows: Sequence[Row]) -> str:
    """Return the columns that matter as text."""
    cells = [SHOWN, *([_short(row.get(name, "")) for name in SHOWN] for row in rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(SHOWN) - 1)]
    return "\n".join(
        "  ".join((*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[-1]))
        for row in cells
    )


def _short(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) else "" if value is None else str(value)


def main(argv: Sequence[str]) -> int:
    """Play what the flags describe; return the exit status."""
    values = flags.FLAGS
    try:
        if len(argv) > 1:
            raise ConfigError(f"{argv[1]!r} is no flag; values are given as --name=value")
        if values.request_rate and not values.num_requests:
            raise ConfigError("--request_rate is of whole jobs: give --num_requests")
        wanted = conditions(values)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    rows: list[Row] = []
    for number, condition in enumerate(wanted, 1):
        print(f"condition {number} of {len(wanted)}", file=sys.stderr)
        rows += play(condition, values)
    print(table(rows))
    write(Path(values.output), rows)
    json_file = Path(values.output).with_suffix(".json")
    print(f"results in {values.output} and {json_file}", file=sys.stderr)
    if values.plot is not None:
        Path(values.plot).write_text(draw_rates(rows))
    return 0


def define_flags() -> None:
    """Define this command's flags; other scripts have some of the same names."""
    flags.DEFINE_list("device", ["t4"], "Profiles of configs/hardware/devices.py.")
    flags.DEFINE_list("host", ["paper_t4"], "Profiles of configs/hardware/hosts.py.")
    flags.DEFINE_list("model", ["llama_2_7b"], "Names of files in configs/ with a shape.")
    flags.DEFINE_list("kv_gib", [], "KV cache on the card, GiB; unset: what the weights leave.")
    flags.DEFINE_list("kv_tokens", [], "The same in tokens.")
    flags.DEFINE_list("host_gib", [], "KV cache on the host, GiB; unset: 80 % of its memory.")
    flags.DEFINE_list("host_bandwidth_scale", ["1"], "Of what the host's profile says.")
    flags.DEFINE_list("prompt_tokens", [], "Of a request; unset: 1000. Jobs: within 10 %.")
    flags.DEFINE_list("output_tokens", [], "Of a request; unset: 200. Jobs: within 10 %.")
    flags.DEFINE_string("workload", "uniform", "Or a trace of configs/workload_quantiles.json.")
    flags.DEFINE_list("strategies", list(ALL_STRATEGIES), "By name; passes_4 may pass 4 layers.")
    flags.DEFINE_integer("num_requests", None, "Of a whole job; unset: steady states.", 1)
    flags.DEFINE_float("request_rate", None, "Poisson arrivals per second; unset: all at once.", 0)
    flags.DEFINE_integer("max_prefill_tokens", 512, "Prompt tokens per sweep of a job.", 16)
    flags.DEFINE_integer("seed", 0, "Of lengths and arrivals.")
    flags.DEFINE_string("output", "runs/simulated.csv", "CSV file; a JSON file lies beside it.")
    flags.DEFINE_string("plot", None, "SVG file of the rates.")


if __name__ == "__main__":
    define_flags()
    app.run(main)
