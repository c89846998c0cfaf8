"""Runs a workload through this project's engine, in a process of its own.

    python run_apex_jax.py JOB.json RESULT.json

The job's settings are those of Config, by section. Called by launch.compare.
"""

import importlib.metadata
import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from apex_jax import __version__
from apex_jax.config import Config, LlamaConfig, RopeConfig
from apex_jax.engine import Engine
from apex_jax.request import Request, RequestOutput, SamplingParams
from apex_jax.settings import with_settings
from launch.starting import create_engine

WARM_UP_TOKENS = 4


def read_config(settings: dict[str, Any]) -> Config:
    """Return the settings as dataclasses, which JSON does not have."""
    model = dict(settings["model"])
    shape = model.pop("architecture")
    config = with_settings(Config(), {**settings, "model": model})
    if shape is not None:
        rope = RopeConfig(**shape["rope"])
        config.model.architecture = LlamaConfig(**{**shape, "rope": rope})
    return config


def generate(
    engine: Engine, requests: Sequence[dict[str, Any]], max_tokens: int | None = None
) -> list[RequestOutput]:
    """Submit all requests at once, and step until the last has ended."""
    for one in requests:
        num_tokens = min(one["output_tokens"], max_tokens or one["output_tokens"])
        sampling = SamplingParams(max_tokens=num_tokens, temperature=0.0, ignore_eos=True)
        engine.submit(Request(one["id"], tuple(one["prompt_token_ids"]), sampling))
    outputs: list[RequestOutput] = []
    while engine.num_unfinished:
        outputs += engine.step()
    return outputs


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text())
    config = read_config(job["settings"])
    engine = create_engine(config, lambda line: print(line, flush=True))
    warm_up = job["requests"][: job["max_requests"]]
    try:
        generate(engine, warm_up, WARM_UP_TOKENS)
        start_sec, start_cpu_sec = time.perf_counter(), time.process_time()
        outputs = generate(engine, job["requests"])
        wall_sec = time.perf_counter() - start_sec
        cpu_sec = time.process_time() - start_cpu_sec
        metrics, memory = engine.metrics(), engine.memory
    finally:
        engine.close()
    result = {
        "version": f"{__version__}, jax {importlib.metadata.version('jax')}",
        "dtype": engine.model.dtype,
        "device": config.device.platform,
        "threads": len(os.sched_getaffinity(0)),  # XLA's pool has as many as there are CPUs
        "num_cpus": len(os.sched_getaffinity(0)),
        "max_requests": metrics["max_running"]
        + metrics.get("hybrid", {}).get("max_host_running", 0),
        "device_kv_bytes": memory.pool_bytes,
        "host_kv_bytes": memory.host_pool_bytes if memory.num_host_pages else 0,
        "settings": job["settings"],
        "warm_up": f"{len(warm_up)} requests for {WARM_UP_TOKENS} tokens",
        "wall_sec": wall_sec,
        "cpu_sec": cpu_sec,
        "requests": [
            {
                "id": one.request.request_id,
                "prompt_token_ids": one.request.prompt_token_ids,
                "output_token_ids": one.token_ids,
                "first_token_sec": one.first_token_sec - start_sec,
                "finish_sec": one.finish_sec - start_sec,
                "num_host_tokens": one.num_host_tokens if memory.num_host_pages else None,
            }
            for one in outputs
        ],
    }
    Path(sys.argv[2]).write_text(json.dumps(result))


if __name__ == "__main__":
    main()
