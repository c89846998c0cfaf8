"""Runs a workload through Hugging Face transformers' generate(), in an environment of its own.

    python run_transformers.py JOB.json RESULT.json

A static batch goes on until its longest request has ended: requests are sorted by output length, so
that those of a batch end together, and padded on the left. (Nobody knows output lengths before; the
order that needs no oracle is run_transformers_by_prompt.py's.) The first repeat tries batch sizes
and caches on as many requests as may be in flight and keeps the fastest; later ones are told.
Imports nothing of this project: torch and transformers only.
"""

# pyright: reportMissingImports=false

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers

TRIAL_TOKENS = 24  # decoded by each trial: long enough that its prompts do not decide


class Order(NamedTuple):
    """In which requests become batches. key: what they are sorted by."""

    name: str
    key: Callable[[dict[str, Any]], tuple[int, ...]]


BY_OUTPUT = Order(
    "by output length, then prompt length, longest first",
    lambda one: (-one["output_tokens"], -len(one["prompt_token_ids"])),
)
BY_PROMPT = Order("by prompt length, longest first", lambda one: (-len(one["prompt_token_ids"]),))


class Generator:
    """A loaded model, and how batches of requests go through it."""

    def __init__(self, job: dict[str, Any], order: Order):
        self.job, self.order = job, order
        self.device = "cuda" if job["device"] == "gpu" else "cpu"
        self.dtype = getattr(torch, job["dtype"])
        if self.device == "cpu":
            torch.set_num_threads(job["threads"])
        self.model = transformers.AutoModelForCausalLM.from_pretrained(
            job["model"], dtype=self.dtype
        )
        self.model.to(self.device).eval()
        self.max_kv_bytes = 0
        self.kv_bytes_per_token = self._kv_bytes_per_token()

    def _kv_bytes_per_token(self) -> int:
        config = self.model.config
        head_dim = getattr(config, "head_dim", None) or (
            config.hidden_size // config.num_attention_heads
        )
        values = 2 * config.num_hidden_layers * config.num_key_value_heads * head_dim
        return values * self.dtype.itemsize

    def batches(self, requests: list[dict[str, Any]], size: int) -> list[list[dict[str, Any]]]:
        """Cut the requests into batches whose padded KV cache fits the budget."""
        in_order = sorted(requests, key=self.order.key)
        batches, budget = [], self.job["device_kv_bytes"]
        while in_order:
            taken = min(size, len(in_order))
            while taken > 1 and self.kv_bytes(in_order[:taken]) > budget:
                taken -= 1
            batches.append(in_order[:taken])
            in_order = in_order[taken:]
        return batches

    def kv_bytes(self, batch: list[dict[str, Any]]) -> int:
        """Return what the padded cache of a batch holds at its end."""
        longest = max(len(one["prompt_token_ids"]) for one in batch)
        num_new = max(one["output_tokens"] for one in batch)
        return len(batch) * (longest + num_new) * self.kv_bytes_per_token

    def run(
        self, batch: list[dict[str, Any]], cache: str, start_sec: float
    ) -> list[dict[str, Any]]:
        """Generate for one batch; return what each request got, with times since `start_sec`."""
        longest = max(len(one["prompt_token_ids"]) for one in batch)
        num_new = max(one["output_tokens"] for one in batch)
        tokens = torch.zeros((len(batch), longest), dtype=torch.int64)
        mask = torch.zeros_like(tokens)
        for row, one in enumerate(batch):
            prompt = one["prompt_token_ids"]
            tokens[row, longest - len(prompt) :] = torch.tensor(prompt)
            mask[row, longest - len(prompt) :] = 1
        clock = Clock()
        with torch.inference_mode():
            output = self.model.generate(
                tokens.to(self.device),
                attention_mask=mask.to(self.device),
                do_sample=False,
                num_beams=1,
                min_new_tokens=num_new,
                max_new_tokens=num_new,
                eos_token_id=None,
                pad_token_id=0,
                cache_implementation=cache,
                stopping_criteria=transformers.StoppingCriteriaList([clock]),
            )
        rows = output[:, longest:].cpu().tolist()  # reading them waits for the device
        clock.step_sec[-1] = time.perf_counter()
        self.max_kv_bytes = max(self.max_kv_bytes, self.kv_bytes(batch))
        return [
            {
                "id": one["id"],
                "prompt_token_ids": tokens[row][mask[row].bool()].tolist(),
                "output_token_ids": rows[row][: one["output_tokens"]],
                "first_token_sec": clock.step_sec[0] - start_sec,
                "finish_sec": clock.step_sec[one["output_tokens"] - 1] - start_sec,
            }
            for row, one in enumerate(batch)
        ]

    def seconds_of(self, requests: list[dict[str, Any]], size: int, cache: str) -> float:
        """Time a trial: the requests with few output tokens, in batches of `size`."""
        short = [
            {**one, "output_tokens": min(TRIAL_TOKENS, one["output_tokens"])} for one in requests
        ]
        batches = self.batches(short, size)
        self.run(batches[0], cache, 0.0)  # what a first use sets up or compiles
        start_sec = time.perf_counter()
        for batch in batches:
            self.run(batch, cache, start_sec)
        return time.perf_counter() - start_sec


class Clock(transformers.StoppingCriteria):
    """Notes when each token of a batch was there, and stops nothing."""

    def __init__(self):
        self.step_sec: list[float] = []

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        self.step_sec.append(time.perf_counter())
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)


def choose(generator: Generator, requests: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the fastest batch size and cache, with the seconds of every trial."""
    limit = generator.job["max_requests"]
    sample, trials = requests[:limit], {}
    sizes = sorted({min(limit, 2**power) for power in range(2, limit.bit_length() + 1)})
    for size in sizes:
        trials[f"dynamic, {size}"] = generator.seconds_of(sample, size, "dynamic")
    size = min(sizes, key=lambda one: trials[f"dynamic, {one}"])
    try:
        trials[f"static, {size}"] = generator.seconds_of(sample, size, "static")
    except Exception as error:  # it compiles, which not every machine can
        trials[f"static, {size}"] = f"{type(error).__name__}: {error}"[:200]
    static = trials[f"static, {size}"]
    is_static = isinstance(static, float) and static < trials[f"dynamic, {size}"]
    return {
        "batch_size": size,
        "cache": "static" if is_static else "dynamic",
        "order": f"{generator.order.name}; padded on the left",
        "trial_sec": trials,
    }


def main(order: Order) -> None:
    job = json.loads(Path(sys.argv[1]).read_text())
    generator = Generator(job, order)
    requests = job["requests"]
    settings = job["settings"] or choose(generator, requests)
    size, cache = settings["batch_size"], settings["cache"]
    batches = generator.batches(requests, size)
    generator.run([{**one, "output_tokens": 2} for one in batches[0]], cache, 0.0)
    generator.max_kv_bytes = 0
    start_sec, start_cpu_sec = time.perf_counter(), time.process_time()
    done = [one for batch in batches for one in generator.run(batch, cache, start_sec)]
    wall_sec = time.perf_counter() - start_sec
    cpu_sec = time.process_time() - start_cpu_sec
    result = {
        "version": f"{transformers.__version__}, torch {torch.__version__}",
        "dtype": str(next(generator.model.parameters()).dtype).removeprefix("torch."),
        "device": torch.cuda.get_device_name() if generator.device == "cuda" else "cpu",
        "threads": torch.get_num_threads() if generator.device == "cpu" else job["threads"],
        "num_cpus": len(os.sched_getaffinity(0)),
        "max_requests": max(map(len, batches)),
        "device_kv_bytes": generator.max_kv_bytes,
        "host_kv_bytes": 0,
        "settings": settings,
        "warm_up": "the first batch for 2 tokens, after the trials of the first repeat",
        "wall_sec": wall_sec,
        "cpu_sec": cpu_sec,
        "requests": done,
    }
    Path(sys.argv[2]).write_text(json.dumps(result))


if __name__ == "__main__":
    main(BY_OUTPUT)
