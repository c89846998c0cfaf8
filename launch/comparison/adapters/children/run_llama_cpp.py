"""Runs a workload through llama.cpp (llama-cpp-python), in an environment of its own.

    python run_llama_cpp.py JOB.json RESULT.json

All sequences share one KV cache of the budget's size, and each decode call takes the next token of
every running one and prompts of new ones beside them, as llama.cpp's own server does. The weights
are a GGUF file that write_gguf.py makes of the model's folder, or settings["gguf"]. Imports nothing
of this project.
"""

# pyright: reportMissingImports=false

import ctypes
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
from write_gguf import write_gguf

BATCH_TOKENS = 512  # of a decode call: llama.cpp's own default
WARM_UP_TOKENS = 2


class Sequence:
    """A request in one of the sequence slots; num_fed: tokens whose KV is in the cache."""

    def __init__(self, request: dict[str, Any], slot: int):
        self.request, self.slot, self.num_fed = request, slot, 0
        self.output: list[int] = []
        self.token_sec: list[float] = []

    @property
    def to_feed(self) -> list[int]:
        known = self.request["prompt_token_ids"] + self.output
        return known[self.num_fed :]

    @property
    def num_reserved(self) -> int:
        return len(self.request["prompt_token_ids"]) + self.request["output_tokens"]

    @property
    def is_done(self) -> bool:
        return len(self.output) == self.request["output_tokens"]


class Runner:
    """A model and a context; both stay until the process ends."""

    def __init__(self, job: dict[str, Any], gguf: str):
        llama_cpp.llama_backend_init()
        model_params = llama_cpp.llama_model_default_params()
        model_params.n_gpu_layers = 999 if job["device"] == "gpu" else 0
        self.model = llama_cpp.llama_model_load_from_file(gguf.encode(), model_params)
        if not self.model:
            raise RuntimeError(f"llama.cpp does not load {gguf}")
        config = json.loads(Path(job["model"], "config.json").read_text())
        heads = config["num_attention_heads"]
        head_dim = config.get("head_dim") or config["hidden_size"] // heads
        kv_heads = config.get("num_key_value_heads") or heads
        itemsize = 4 if job["dtype"] == "float32" else 2
        self.token_bytes = 2 * config["num_hidden_layers"] * kv_heads * head_dim * itemsize
        self.max_requests = min(job["max_requests"], 256)  # sequences of a context
        needed = sum(
            sorted(len(one["prompt_token_ids"]) + one["output_tokens"] for one in job["requests"])[
                -self.max_requests :
            ]
        )
        self.kv_tokens = min(job["device_kv_bytes"] // self.token_bytes, needed) // 256 * 256
        if self.kv_tokens == 0:
            raise RuntimeError("the KV cache's budget is below llama.cpp's least, 256 tokens")
        params = llama_cpp.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_ubatch = self.kv_tokens, BATCH_TOKENS, BATCH_TOKENS
        params.n_seq_max, params.kv_unified = self.max_requests, True
        params.n_threads = params.n_threads_batch = job["threads"]
        kv_type = "GGML_TYPE_F32" if job["dtype"] == "float32" else "GGML_TYPE_F16"
        params.type_k = params.type_v = getattr(llama_cpp, kv_type)
        params.no_perf = True
        self.context = llama_cpp.llama_init_from_model(self.model, params)
        if not self.context:
            raise RuntimeError("llama.cpp makes no context; its own messages stand above")
        self.vocab_size = llama_cpp.llama_vocab_n_tokens(
            llama_cpp.llama_model_get_vocab(self.model)
        )
        self.batch = llama_cpp.llama_batch_init(BATCH_TOKENS, 0, 1)
        self.max_running = 0

    def generate(self, requests: list[dict[str, Any]]) -> list[Sequence]:
        """Run all requests; at once go as many as there are slots and room for to their ends."""
        waiting, running, done = list(requests), [], []
        slots = list(range(self.max_requests))
        while waiting or running:
            while waiting and slots and self._fits(waiting[0], running):
                running.append(Sequence(waiting.pop(0), slots.pop()))
            if not running:
                raise RuntimeError(f"request {waiting[0]['id']!r} is longer than the KV cache")
            self.max_running = max(self.max_running, len(running))
            self._step(running)
            for one in [one for one in running if one.is_done]:
                memory = llama_cpp.llama_get_memory(self.context)
                llama_cpp.llama_memory_seq_rm(memory, one.slot, -1, -1)
                slots.append(one.slot)
                running.remove(one)
                done.append(one)
        return done

    def _fits(self, request: dict[str, Any], running: list[Sequence]) -> bool:
        held = sum(one.num_reserved for one in running)
        return held + len(request["prompt_token_ids"]) + request["output_tokens"] <= self.kv_tokens

    def _step(self, running: list[Sequence]) -> None:
        """Decode once: the next token of each, and of prompts as many as the batch has room for."""
        batch, size, ends = self.batch, 0, []
        for one in sorted(running, key=lambda one: len(one.to_feed)):
            tokens = one.to_feed
            fed = tokens[: BATCH_TOKENS - size]
            for offset, token in enumerate(fed):
                batch.token[size], batch.pos[size] = token, one.num_fed + offset
                batch.n_seq_id[size], batch.seq_id[size][0] = 1, one.slot
                batch.logits[size] = offset == len(tokens) - 1
                size += 1
            one.num_fed += len(fed)
            if fed and len(fed) == len(tokens):
                ends.append((one, size - 1))
        batch.n_tokens = size
        if (status := llama_cpp.llama_decode(self.context, batch)) != 0:
            raise RuntimeError(f"llama_decode returned {status}")
        for one, place in ends:
            logits = llama_cpp.llama_get_logits_ith(self.context, place)
            pointer = ctypes.cast(logits, ctypes.POINTER(ctypes.c_float))
            scores = np.ctypeslib.as_array(pointer, (self.vocab_size,))
            one.output.append(int(scores.argmax()))
            one.token_sec.append(time.perf_counter())


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text())
    settings = job["settings"] or {}
    with tempfile.TemporaryDirectory() as folder:
        gguf = settings.get("gguf") or str(Path(folder, "model.gguf"))
        if not settings.get("gguf"):
            write_gguf(Path(job["model"]), Path(gguf), job["dtype"])
        runner = Runner(job, gguf)
    warm_up = [
        {**one, "output_tokens": min(WARM_UP_TOKENS, one["output_tokens"])}
        for one in job["requests"][: job["max_requests"]]
    ]
    runner.generate(warm_up)
    start_sec, start_cpu_sec = time.perf_counter(), time.process_time()
    done = runner.generate(job["requests"])
    wall_sec = time.perf_counter() - start_sec
    cpu_sec = time.process_time() - start_cpu_sec
    result = {
        "version": f"llama-cpp-python {llama_cpp.__version__}",
        "dtype": job["dtype"] if not settings.get("gguf") else "that of the given GGUF file",
        "device": job["device"],
        "threads": llama_cpp.llama_n_threads(runner.context),
        "num_cpus": len(os.sched_getaffinity(0)),
        "max_requests": runner.max_running,
        "device_kv_bytes": runner.kv_tokens * runner.token_bytes,
        "host_kv_bytes": 0,
        "settings": {"batch_tokens": BATCH_TOKENS, **settings},
        "warm_up": f"{len(warm_up)} requests for {WARM_UP_TOKENS} tokens",
        "wall_sec": wall_sec,
        "cpu_sec": cpu_sec,
        "requests": [
            {
                "id": one.request["id"],
                "prompt_token_ids": one.request["prompt_token_ids"],
                "output_token_ids": one.output,
                "first_token_sec": one.token_sec[0] - start_sec,
                "finish_sec": one.token_sec[-1] - start_sec,
            }
            for one in done
        ],
    }
    Path(sys.argv[2]).write_text(json.dumps(result))


if __name__ == "__main__":
    main()
