"""Run a job of very many short requests, and watch its memory, its rate and its first result.

    python -m launch.long_job --num_requests=100000 --output=docs/results/long_job.json

Starts launch.generate on the demo model and writes it requests through a pipe, which holds little,
so that what the job has read is known. Meanwhile looks at the output and at the process. Exit
status 1 where the job failed or one of the proofs did; the file then says which. Needs Linux.
"""

import contextlib
import itertools
import json
import math
import os
import random
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO

from absl import app, flags

from apex_jax.config import STRATEGIES
from launch.environment import ROOT, environment
from launch.measuring import ResultFile, Row

MODEL = ROOT / "configs" / "demo_model"
PROMPT_TOKENS, OUTPUT_TOKENS = (4, 12), (4, 8)
MAX_MODEL_LEN = 32  # whole pages, and few programs to compile
MAX_PREFILL_TOKENS = 256  # eight prompts a sweep, padded: about as many as end in one
KV_BYTES_PER_REQUEST = 2**17  # of the demo model in float32: two pages of 16 tokens
NUM_PARTS = 10  # of the job; the first one is warm-up
MAX_GROWTH_BYTES = 200_000_000
MIN_RATE_SHARE = 0.8  # of the median part's rate, which the slowest part must have
LOOK_SEC = 0.05


@dataclass(frozen=True)
class Sample:
    """What was seen at a moment.

    sec: since the first result. num_results: lines of the output. num_sent: lines of the input that
    the pipe had taken. memory_bytes: resident. cpu_sec: of the process since it began.
    """

    sec: float
    num_results: int
    num_sent: int
    memory_bytes: int
    cpu_sec: float


class Feed(threading.Thread):
    """Writes requests to a pipe as fast as its reader takes them."""

    def __init__(self, pipe: IO[bytes], num_requests: int, seed: int):
        super().__init__(daemon=True)
        self._pipe, self._num_requests, self._seed = pipe, num_requests, seed
        self.num_sent = 0

    def run(self) -> None:
        # A job that ended early has closed the pipe; its status will tell.
        with contextlib.suppress(BrokenPipeError), self._pipe:
            for line in request_lines(self._num_requests, self._seed):
                self._pipe.write(line)
                self._pipe.flush()
                self.num_sent += 1


def request_lines(num_requests: int, seed: int) -> Iterator[bytes]:
    """Yield greedy requests of a few tokens each."""
    rng = random.Random(seed)
    vocab_size = json.loads((MODEL / "config.json").read_text())["vocab_size"]
    for index in range(num_requests):
        request = {
            "custom_id": str(index),
            "prompt_token_ids": rng.choices(range(vocab_size), k=rng.randint(*PROMPT_TOKENS)),
            "max_tokens": rng.randint(*OUTPUT_TOKENS),
            "ignore_eos": True,
            "temperature": 0,
        }
        yield json.dumps(request).encode() + b"\n"


def job_command(output: Path, strategy: str, max_requests: int) -> list[str]:
    """Return the command of a job that reads its requests from stdin."""
    kv_bytes = max_requests * KV_BYTES_PER_REQUEST
    settings = {
        "scheduler.strategy": strategy,
        "scheduler.max_requests": max_requests,
        "scheduler.max_model_len": MAX_MODEL_LEN,
        "scheduler.max_prefill_tokens": MAX_PREFILL_TOKENS,
        "cache.device_bytes": kv_bytes,
        "cache.host_bytes": kv_bytes,
    }
    return [
        *(sys.executable, "-m", "launch.generate", "--config=configs/demo.py"),
        *("--input=/dev/stdin", f"--output={output}"),
        *(f"--config.{name}={value}" for name, value in settings.items()),
    ]


def watch(
    job: subprocess.Popen[bytes], feed: Feed, output: Path, num_requests: int
) -> Iterator[Sample]:
    """Yield what is seen at the first result and then after every hundredth of the job."""
    num_results, first_sec = 0, None
    next_result = 1
    with output.open("rb") as results:
        while job.poll() is None:
            num_results += results.read().count(b"\n")
            if num_results >= next_result:
                now_sec = time.perf_counter()
                first_sec = now_sec if first_sec is None else first_sec
                next_result = num_results + max(1, num_requests // (10 * NUM_PARTS))
                with contextlib.suppress(OSError, ValueError):  # it may end at any time
                    yield Sample(now_sec - first_sec, num_results, feed.num_sent, *_usage(job.pid))
            time.sleep(LOOK_SEC)


def _usage(process_id: int) -> tuple[int, float]:
    """Return a process's resident bytes and the CPU seconds it has taken."""
    folder = Path("/proc") / str(process_id)
    resident_pages = int((folder / "statm").read_text().split()[1])
    fields = (folder / "stat").read_text().rpartition(")")[2].split()
    ticks = int(fields[11]) + int(fields[12])  # user and system time
    return resident_pages * os.sysconf("SC_PAGE_SIZE"), ticks / os.sysconf("SC_CLK_TCK")


def parts(samples: Sequence[Sample], num_requests: int) -> list[Row]:
    """Return rate, CPU time a request and memory at the end, of each tenth of the job.

    Raises ValueError where they were looked at too seldom.
    """
    marks = list(samples[:1])
    for part in range(1, NUM_PARTS):
        wanted = num_requests * part / NUM_PARTS
        marks += [one for one in samples if one.num_results >= wanted][:1]
    marks += samples[-1:]
    if len(set(marks)) <= NUM_PARTS:
        raise ValueError(f"{len(samples)} looks tell no tenths apart: the job needs more requests")
    return [
        {
            "num_results": (num_results := end.num_results - begin.num_results),
            "requests_per_sec": num_results / (end.sec - begin.sec),
            "cpu_sec_per_request": (end.cpu_sec - begin.cpu_sec) / num_results,
            "memory_bytes": end.memory_bytes,
        }
        for begin, end in itertools.pairwise(marks)
    ]


def summarize(samples: Sequence[Sample], num_requests: int) -> Row:
    """Return what the samples say of memory, rate and the first result, and whether it is good."""
    rows, first = parts(samples, num_requests), samples[0]
    after = [row["memory_bytes"] for row in rows]
    growth_bytes = max(after) - after[0]
    rates = [row["requests_per_sec"] for row in rows[1:]]
    slowest = min(rates) / statistics.median(rates)
    return {
        "memory_growth_bytes": growth_bytes,
        "slowest_part_to_median": round(slowest, 4),
        "first_result": {"num_sent": first.num_sent, "num_requests": num_requests},
        "proofs": {
            f"memory grows by less than {MAX_GROWTH_BYTES // 10**6} MB after the first tenth": (
                growth_bytes < MAX_GROWTH_BYTES
            ),
            f"every later tenth has {MIN_RATE_SHARE:.0%} of their median rate": (
                slowest >= MIN_RATE_SHARE
            ),
            "the first result came before the input was read to its end": (
                first.num_sent < num_requests
            ),
        },
    }


def run(
    num_requests: int, strategy: str, max_requests: int, seed: int
) -> tuple[list[Sample], list[str]]:
    """Run the job; return what was seen, and its command. Raises RuntimeError where it failed."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "results.jsonl"
        output.touch()
        command = job_command(output, strategy, max_requests)
        with subprocess.Popen(command, stdin=subprocess.PIPE, cwd=ROOT) as job:
            assert job.stdin is not None
            feed = Feed(job.stdin, num_requests, seed)
            feed.start()
            samples: list[Sample] = []
            for sample in watch(job, feed, output, num_requests):
                samples.append(sample)
        feed.join()
        num_results = output.read_bytes().count(b"\n")
    if job.returncode != 0 or num_results != num_requests:
        raise RuntimeError(
            f"the job ended with status {job.returncode} and {num_results} results of "
            f"{num_requests} requests"
        )
    return samples, command


def main(argv: Sequence[str]) -> int:
    """Run what the flags describe; return the exit status."""
    values = flags.FLAGS
    if len(argv) > 1:
        print(f"error: {argv[1]!r} is no flag; values are given as --name=value", file=sys.stderr)
        return 2
    num_requests, found = values.num_requests, environment()
    try:
        samples, command = run(num_requests, values.strategy, values.max_requests, values.seed)
        summary = summarize(samples, num_requests)
    except (RuntimeError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    header = {
        "what": "a long job of short requests on the demo model; seconds, bytes",
        "num_requests": num_requests,
        "prompt_tokens": PROMPT_TOKENS,
        "output_tokens": OUTPUT_TOKENS,
        "job": command[1:],
        **summary,
        "environment": found,
    }
    results = ResultFile(Path(values.output), header, budget_sec=math.inf)
    results.measure("parts", lambda: parts(samples, num_requests))
    results.measure("samples", lambda: map(asdict, samples))
    for proof, holds in summary["proofs"].items():
        print(f"{'yes' if holds else 'NO '}  {proof}")
    return 0 if all(summary["proofs"].values()) else 1


if __name__ == "__main__":
    # Only here: other scripts have flags of the same names, and tests import this one.
    flags.DEFINE_integer("num_requests", 100_000, "Of the job.", lower_bound=100)
    flags.DEFINE_enum("strategy", "device_only", STRATEGIES, "Of the job.")
    flags.DEFINE_integer("max_requests", 64, "Requests that run on the device at once.", 1)
    flags.DEFINE_integer("seed", 0, "Of the requests.")
    flags.DEFINE_string("output", "docs/results/long_job.json", "Result file.")
    app.run(main)
