"""Frameworks that bring a benchmark client of their own: vLLM and SGLang.

Owns the workload in the format their clients read, the commands to type, and the reading of their
result files as rows. Both commands use SGLang's client, whose `autobench` data set carries token
ids: vLLM's own reads text and would tokenise it again. Refuses a result that did other work.
Imports no jax.
"""

import json
import shlex
from pathlib import Path
from typing import Any

from launch.comparison.decode import FileError, load_object
from launch.comparison.results import Quantiles, RunRow
from launch.comparison.workload_file import Workload

EXTERNAL = ("vllm", "sglang")
_PERCENTILES = ("mean_{}_ms", "median_{}_ms", "p90_{}_ms", "p99_{}_ms")  # as Quantiles has them


def export(workload: Workload, path: Path) -> None:
    """Write the requests as SGLang's `autobench` data set: token ids, lengths, arrivals in ms."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        for one in workload.requests:
            row = {
                "prompt": one.prompt_token_ids,
                "prompt_len": len(one.prompt_token_ids),
                "output_len": one.output_tokens,
                "timestamp": one.arrival_sec * 1000,
                "extra_request_body": {"temperature": 0.0, "ignore_eos": True},
            }
            file.write(json.dumps(row) + "\n")


def commands(
    name: str,
    *,
    model: str,
    dtype: str,
    max_requests: int,
    max_model_len: int,
    kv_tokens: int,
    num_requests: int,
    data: Path,
    result: Path,
) -> tuple[str, str]:
    """Return the server's and the client's command with the comparison's limits.

    kv_tokens: that the budget of KV cache holds; vLLM counts it in pages of 16.
    """
    if name == "vllm":
        server = ["vllm", "serve", model, "--dtype", dtype, "--no-enable-prefix-caching"]
        server += ["--max-model-len", str(max_model_len), "--max-num-seqs", str(max_requests)]
        server += ["--num-gpu-blocks-override", str(kv_tokens // 16), "--block-size", "16"]
        port = "8000"
    else:
        server = ["python", "-m", "sglang.launch_server", "--model-path", model, "--dtype", dtype]
        server += ["--disable-radix-cache", "--max-running-requests", str(max_requests)]
        server += ["--context-length", str(max_model_len), "--max-total-tokens", str(kv_tokens)]
        port = "30000"
    client = ["python", "-m", "sglang.bench_serving", "--backend", name, "--model", model]
    client += ["--dataset-name", "autobench", "--dataset-path", str(data), "--port", port]
    client += ["--num-prompts", str(num_requests), "--request-rate", "inf", "--output-file"]
    client += [str(result), "--output-details"]
    return shlex.join(server), shlex.join(client)


def read_rows(name: str, path: Path, workload: Workload) -> list[RunRow]:
    """Return a row for each run in a client's result file; FileError where it is none."""
    try:
        lines = [line for line in path.read_bytes().splitlines() if line.strip()]
    except OSError as error:
        raise FileError(f"{path} cannot be read: {error.strerror}") from None
    if not lines:
        raise FileError(f"{path} is empty; the client appends a line for each run")
    runs = [load_object(line, f"{path}, line {number}") for number, line in enumerate(lines, 1)]
    return [_row(name, path, run, repeat, workload) for repeat, run in enumerate(runs)]


def _row(name: str, path: Path, run: dict[str, Any], repeat: int, workload: Workload) -> RunRow:
    def number(field: str) -> float:
        value = run.get(field)
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise FileError(f"{path}, line {repeat + 1} lacks the number {field!r}")
        return value

    header = workload.header
    work = {
        "requests": (header.num_requests, number("completed")),
        "prompt tokens": (header.prompt_tokens, number("total_input_tokens")),
        "output tokens": (header.output_tokens, number("total_output_tokens")),
    }
    row = {"system": name, "framework": name, "request_rate": None, "repeat": repeat}
    for what, (asked, done) in work.items():
        if asked != done:
            error = f"not comparable: the workload has {asked} {what} and the system did {done:g}"
            return RunRow(**row, status="failed", error=error)
    wall_sec = number("duration")
    return RunRow(
        **row,
        status="ok",
        num_requests=header.num_requests,
        prompt_tokens=header.prompt_tokens,
        output_tokens=header.output_tokens,
        wall_sec=wall_sec,
        output_tokens_per_sec=header.output_tokens / wall_sec,
        ttft_sec=_quantiles(run, "ttft"),
        tpot_sec=_quantiles(run, "tpot"),
        itl_sec=_quantiles(run, "itl"),
        e2e_sec=_quantiles(run, "e2e_latency"),
    )


def _quantiles(run: dict[str, Any], figure: str) -> Quantiles | None:
    """Return a figure in seconds; None where the client did not report all of it."""
    found = [run.get(name.format(figure)) for name in _PERCENTILES]
    known = [value / 1000 for value in found if isinstance(value, int | float)]
    return Quantiles(*known) if len(known) == len(found) else None
