"""Compare every strategy's tokens and scores with device_only's, in each number format.

    python -m launch.parity_report --output=docs/results/parity.json

The demo model continues its own sample prompts greedily. The reference is device_only with room
for all requests; the strategies get a device that holds a few of them. Where texts part, the
reference's own margin there (the gap of its two best scores) tells whether rounding can have done
it. Scores are compared up to there, in standard deviations of the reference's. Writes a table
beside the JSON file, and fails nothing: tests do that.
"""

import dataclasses
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import app, flags

from apex_jax.backends.xla import XlaBackend
from apex_jax.buckets import Buckets
from apex_jax.config import CacheConfig, Config, DeviceConfig, ModelConfig, SchedulerConfig
from apex_jax.models import weights
from apex_jax.models.hf_config import read_model_folder
from apex_jax.request import Request, RequestOutput, SamplingParams
from apex_jax.text.model_text import load_text
from launch.environment import ROOT, environment
from launch.measuring import ResultFile, Row
from launch.scoring import Answers, ScoringBackend, compare
from launch.shared_engine import SharedEngine, use_two_cpu_devices

_OUTPUT = flags.DEFINE_string("output", "docs/results/parity.json", "Result file.")
_BUDGET = flags.DEFINE_float("budget_sec", 420.0, "After this time no further group begins.")
_SMOKE = flags.DEFINE_bool("smoke", False, "A few requests in float32, to show that it runs.")
_PLATFORM = flags.DEFINE_enum("platform", "cpu", ["cpu", "gpu"], "Of the device.")
_DTYPES = flags.DEFINE_list("dtypes", ["float32", "bfloat16", "float16"], "Of weights and KV.")

MODEL = ROOT / "configs" / "demo_model"
PROMPTS = ROOT / "configs" / "demo_requests.jsonl"
NUM_HOST_ROWS = 24
NUM_DEVICE_PAGES = 40  # about six requests; the others go to the host
STRATEGIES = {
    "apex": SchedulerConfig(strategy="apex"),
    "apex_paper": SchedulerConfig(strategy="apex_paper"),
    "full_offload": SchedulerConfig(strategy="full_offload"),
    "asymmetric_pipelining": SchedulerConfig(strategy="asymmetric_pipelining"),
    "async_overlap": SchedulerConfig(strategy="async_overlap"),
    "staggered": SchedulerConfig(strategy="staggered", cohorts=3),
    "passes": SchedulerConfig(strategy="passes", cohorts=2, passes=3),
}
COLUMNS = (
    *("dtype", "strategy", "equal_percent", "earliest_difference", "widest_margin_stds"),
    *("max_score_difference_stds", "host_token_percent"),
)


def platform() -> str:
    return "cpu" if _SMOKE.value else _PLATFORM.value


def read_requests(num_tokens: int) -> list[Request]:
    """Return the sample prompts as greedy requests of one length; a seed names each of them."""
    text = load_text(MODEL)
    requests: list[Request] = []
    for index, line in enumerate(PROMPTS.read_text().splitlines()):
        fields = json.loads(line)
        prompt = fields.get("body", fields)["prompt"]
        token_ids = text.encode(prompt if isinstance(prompt, str) else tuple(prompt))
        params = SamplingParams(max_tokens=num_tokens, temperature=0.0, seed=index, ignore_eos=True)
        requests.append(Request(str(index), token_ids, params))
    return requests


def answer(
    shared: SharedEngine, settings: SchedulerConfig, num_pages: int, requests: Sequence[Request]
) -> Answers:
    """Run all requests to their end."""
    backend = shared.backend
    assert isinstance(backend, ScoringBackend)
    engine = shared.start(shared.make_policy(settings), num_pages).engine
    outputs: dict[str, RequestOutput] = {}
    for request in requests:
        engine.submit(request)
    while engine.num_unfinished:
        for output in engine.step():
            outputs[output.request.request_id] = output
    return Answers(outputs, backend.take())


def measure_dtype(dtype: str, requests: Sequence[Request]) -> Iterator[Row]:
    """Every strategy in one number format."""
    longest = max(len(one.prompt_token_ids) + one.sampling.max_tokens for one in requests)
    config = Config(
        model=ModelConfig(path=str(MODEL), dtype=dtype, precision="highest"),
        cache=CacheConfig(host_bytes=2**27, device_bytes=2**26),
        scheduler=SchedulerConfig(
            strategy="async_overlap",
            max_requests=2 * NUM_HOST_ROWS,
            max_host_requests=NUM_HOST_ROWS,
            max_prefill_tokens=64,
            max_model_len=longest,
        ),
        device=DeviceConfig(platform=platform()),
    )

    def watch(backend: XlaBackend, shapes: Buckets, device: jax.Device) -> ScoringBackend:
        model = read_model_folder(str(MODEL)).architecture
        loaded = weights.load(MODEL, model, np.dtype(dtype), device)
        return ScoringBackend(backend, shapes, weights.to_module(model, loaded))

    shared = SharedEngine(config, print, watch)
    try:
        everything = shared.whole.memory.num_pages
        right = answer(shared, SchedulerConfig(), everything, requests)
        for name, settings in STRATEGIES.items():
            settings = dataclasses.replace(settings, max_host_requests=NUM_HOST_ROWS)
            got = answer(shared, settings, NUM_DEVICE_PAGES, requests)
            yield {"dtype": dtype, "strategy": name, **compare(right, got)}
    finally:
        shared.close()


def write_table(path: Path, groups: Mapping[str, Sequence[Row]]) -> None:
    """Write the rows of all number formats as a markdown table."""
    lines = [COLUMNS, ["---"] * len(COLUMNS)]
    lines += [[_cell(row[name]) for name in COLUMNS] for rows in groups.values() for row in rows]
    path.write_text("".join(f"| {' | '.join(line)} |\n" for line in lines))


def _cell(value: Any) -> str:
    if value is None:
        return "none"
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def main(argv: Sequence[str]) -> int:
    del argv
    use_two_cpu_devices(one_core_each=False)
    requests = read_requests(num_tokens=12 if _SMOKE.value else 64)
    dtypes = ["float32"] if _SMOKE.value else _DTYPES.value
    header = {
        "what": "strategies against device_only on the demo model, greedy; margins and "
        "differences in standard deviations of the reference's scores",
        "smoke": _SMOKE.value,
        "device_pages": NUM_DEVICE_PAGES,
        "environment": environment(jax.devices(platform())[0]),
    }
    results = ResultFile(Path(_OUTPUT.value), header, _BUDGET.value)
    for dtype in dtypes:
        results.measure(dtype, lambda dtype=dtype: measure_dtype(dtype, requests))
    write_table(results.path.with_suffix(".md"), results.content["groups"])
    print(f"results in {results.path}")
    return 1 if results.content["failed"] else 0


if __name__ == "__main__":
    sys.exit(app.run(main))
