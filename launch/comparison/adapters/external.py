"""Frameworks that bring a benchmark client of their own: vLLM and SGLang.

Owns the workload in the format that a client reads, the commands to type, and the reading of its
result files as rows. Both commands use SGLang's client, whose `autobench` data set carries token
ids: vLLM's own, and SGLang's later ones, read text and would tokenise it again. Refuses a result
that did other work. Imports no jax.
"""

import json
import shlex
from collections.abc import Iterator
from itertools import accumulate
from pathlib import Path
from typing import Any

from launch.comparison.decode import FileError, load_object
from launch.comparison.latency import Served, fault_of, figures
from launch.comparison.results import RunRow
from launch.comparison.workload_file import Workload

EXTERNAL = ("vllm", "sglang")
# The last release whose client has the data set; 0.5.17 lacks it (sgl-project/sglang#31941). The
# server may be any release.
CLIENT = "sglang==0.5.16"
# SGLang gives a request at most its context less the prompt, less two tokens.
SGLANG_MARGIN_TOKENS = 2


def export(workload: Workload, path: Path) -> None:
    """Write the requests as SGLang's `autobench` data set: token ids, lengths, arrivals in ms.

    The client samples at temperature 0 and ignores the end of a text unless it is told otherwise.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        for one in workload.requests:
            row = {
                "prompt": one.prompt_token_ids,
                "prompt_len": len(one.prompt_token_ids),
                "output_len": one.output_tokens,
                "timestamp": one.arrival_sec * 1000,
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
        server += ["--context-length", str(max_model_len + SGLANG_MARGIN_TOKENS)]
        server += ["--max-total-tokens", str(kv_tokens)]
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
    where = f"{path}, line {repeat + 1}"
    wall_sec = run.get("duration")
    if not isinstance(wall_sec, int | float):
        raise FileError(f"{where} lacks the number 'duration'")
    served = list(_served(run, workload, where))
    row = {"system": name, "framework": name, "request_rate": None, "repeat": repeat}
    fault = fault_of(workload.requests, served)
    if fault is not None:
        said = next(filter(None, run.get("errors", ())), "")
        text = f"not comparable: {fault}" + (f"; the client says: {said}" if said else "")
        return RunRow(**row, status="failed", error=text)
    # The client's clock starts before it sends anything.
    whole = {
        "wall_sec": wall_sec,
        "output_tokens_per_sec": workload.header.output_tokens / wall_sec,
    }
    return RunRow(**row, status="ok", **(figures(served, None) | whole))


def _served(run: dict[str, Any], workload: Workload, where: str) -> Iterator[Served]:
    """Yield the client's details of each request, which are in the workload's order."""
    columns: list[list[Any]] = []
    for name in ("input_lens", "output_lens", "ttfts", "itls"):
        column = run.get(name)
        if not isinstance(column, list) or len(column) != len(workload.requests):
            raise FileError(
                f"{where} lacks {name!r} of {len(workload.requests)} requests; the client writes "
                "them with --output-details"
            )
        columns.append(column)
    for request, prompt, output, ttft_sec, itl_sec in zip(workload.requests, *columns, strict=True):
        token_sec = tuple(accumulate([ttft_sec, *itl_sec]))
        yield Served(
            id=request.id,
            prompt_tokens=prompt,
            output_tokens=output,
            arrival_sec=0.0,
            first_token_sec=ttft_sec,
            finish_sec=token_sec[-1],
            # A server may send several tokens at once.
            token_sec=token_sec if len(token_sec) == output else None,
        )
