"""Measure Hugging Face transformers on the same shape: a static batch, decoded greedily.

    python -m launch.bench_reference --output=reference.json

Random weights in bfloat16, generate() as users call it. A decode step's time is the difference of
two runs of different length, so that the prompt's share cancels. Exits with status 77, with nothing
measured, where torch, transformers or a GPU is missing.
"""

import dataclasses
import importlib
import importlib.util
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from absl import app, flags

from launch.environment import environment
from launch.measuring import ResultFile, Row, architecture, now, reason, spread

_OUTPUT = flags.DEFINE_string("output", "docs/results/gpu_check/reference.json", "Result file.")
_BUDGET = flags.DEFINE_float("budget_sec", 55.0, "After this time no further group begins.")
_SMOKE = flags.DEFINE_bool("smoke", False, "Tiny sizes, on the CPU.")
_SHAPE = flags.DEFINE_string("model_shape", "llama_3_1_8b", "A configs/NAME.py, or a known shape.")

EXIT_SKIPPED = 77
# (rows, context): as in bench_device.py's cap of 8 GiB, and smaller ones; the cache is held
# besides.
CASES = ((16, 1024), (64, 256), (1, 1024), (64, 1024), (16, 4096))
SHORT_TOKENS, LONG_TOKENS = 2, 34


def _import(name: str) -> Any:
    """Import what the project does not depend on, and its type checker does not find."""
    return importlib.import_module(name)


def make_model(smoke: bool) -> tuple[Any, str]:
    """Return a random model on the GPU (on the CPU for a smoke run), and its device."""
    torch, transformers = _import("torch"), _import("transformers")
    shape = architecture("smoke" if smoke else _SHAPE.value)
    config = transformers.LlamaConfig(
        vocab_size=shape.vocab_size,
        hidden_size=shape.d_model,
        intermediate_size=shape.d_ffn,
        num_hidden_layers=shape.num_layers,
        num_attention_heads=shape.num_heads,
        num_key_value_heads=shape.num_kv_heads,
        head_dim=shape.head_dim,
        max_position_embeddings=shape.max_position_embeddings,
        tie_word_embeddings=shape.tie_embeddings,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
    )
    device = "cpu" if smoke else "cuda"
    torch.set_default_dtype(torch.float32 if smoke else torch.bfloat16)
    with torch.device(device):
        model = transformers.LlamaForCausalLM(config)
    return model.eval(), device


def measure_decode(smoke: bool) -> Iterator[Row]:
    """Seconds per decode step and tokens/s of generate(), by rows and context."""
    torch = _import("torch")
    model, device = make_model(smoke)

    def seconds(rows: int, context: int, num_new: int) -> float:
        prompt = torch.ones((rows, context), dtype=torch.int64, device=device)
        start = now()
        with torch.inference_mode():
            tokens = model.generate(
                prompt,
                attention_mask=torch.ones_like(prompt),
                do_sample=False,
                min_new_tokens=num_new,
                max_new_tokens=num_new,
            )
        assert tokens.cpu().shape[1] == context + num_new  # reading them waits for them
        return now() - start

    for rows, context in ((2, 16),) if smoke else CASES:
        row: Row = {
            "rows": rows,
            "context": context,
            "attention": model.config._attn_implementation,
        }
        try:
            seconds(rows, context, SHORT_TOKENS)
            num_steps = LONG_TOKENS - SHORT_TOKENS
            samples = [
                (seconds(rows, context, LONG_TOKENS) - seconds(rows, context, SHORT_TOKENS))
                / num_steps
                for _ in range(3)
            ]
            yield {**row, **spread(samples), "tokens_per_sec": rows / np.median(samples)}
        except Exception as error:
            yield {**row, "error": reason(error)}


def why_not(smoke: bool) -> str | None:
    """Return why there is nothing to compare with, or None."""
    for name in ("torch", "transformers"):
        if importlib.util.find_spec(name) is None:
            return f"{name} is not installed"
    return None if smoke or _import("torch").cuda.is_available() else "torch sees no GPU"


def main(argv: Sequence[str]) -> int:
    del argv
    smoke, obstacle = _SMOKE.value, why_not(_SMOKE.value)
    header = {
        "what": "Hugging Face transformers, generate(); seconds per decode step",
        "smoke": smoke,
        "dtype": "float32" if smoke else "bfloat16",
        "model": dataclasses.asdict(architecture("smoke" if smoke else _SHAPE.value)),
        "environment": environment(),
    }
    results = ResultFile(Path(_OUTPUT.value), header, _BUDGET.value)
    if obstacle is not None:
        results.leave_out("decode", obstacle)
        print(f"skipped: {obstacle}")
        return EXIT_SKIPPED
    results.measure("decode", lambda: measure_decode(smoke))
    print(f"results in {results.path}")
    return 1 if results.content["failed"] else 0


if __name__ == "__main__":
    sys.exit(app.run(main))
