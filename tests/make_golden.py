"""Write tests/golden: tiny random Llamas as transformers saves them, and what they should compute.

Run by hand, in an environment with torch and transformers, when a variant is added:

    pip install torch transformers numpy
    python tests/make_golden.py

Each folder holds a model and expected.npz, all computed by transformers in float32 on the CPU with
eager attention (bfloat16 files are widened first):

    tokens_{i}   int32 [t]      prompt i followed by NUM_NEW greedy tokens (EOS is ignored)
    margins_{i}  float32 [NUM_NEW]  gap between the two best logits where each token was chosen
    stds_{i}     float32 [NUM_NEW]  standard deviation of those logits
    logits_{i}   float32 [t, v]  scores at every position, for the first NUM_WITH_LOGITS prompts
"""

import json
import pathlib
import shutil
import sys
from typing import Any

import numpy as np
import torch
import transformers

GOLDEN = pathlib.Path(__file__).parent / "golden"
NUM_NEW, NUM_WITH_LOGITS = 64, 2
# The second is longer than the context llama3 scaling starts from, and than linear's first quarter.
PROMPT_LENGTHS = (9, 70, 1, 2, 5, 16, 17, 31, 33, 48)
# Large weights: with the usual 0.02 a model this small is nearly linear in its last token.
BASE: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "initializer_range": 0.3,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
    "rope_theta": 500.0,  # wavelengths on both sides of both limits, and between
}
# name: (differences from BASE, arguments of save_pretrained, dtype saved)
VARIANTS: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "mha_untied": ({"num_key_value_heads": 4}, {}, "float32"),
    "gqa_tied_sharded": (
        {"num_key_value_heads": 2, "tie_word_embeddings": True, "eos_token_id": [2, 3]},
        {"max_shard_size": "24KB"},
        "float32",
    ),
    "mqa_bfloat16": ({"num_key_value_heads": 1}, {}, "bfloat16"),
    "head_dim_apart": (
        {"num_key_value_heads": 2, "head_dim": 12, "hidden_size": 40, "intermediate_size": 48},
        {},
        "float32",
    ),
    "rope_linear": (
        {
            "num_key_value_heads": 2,
            "rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4},
        },
        {},
        "float32",
    ),
    "rope_llama3": (
        {"num_key_value_heads": 2, "tie_word_embeddings": True, "rope_parameters": LLAMA3},
        {},
        "float32",
    ),
}


def make_model(differences: dict[str, Any], seed: int) -> transformers.LlamaForCausalLM:
    """Return a random model in float32; its norms' scales are random too, not all 1."""
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(**{**BASE, **differences})
    model = transformers.LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("norm.weight"):
                parameter.uniform_(0.5, 1.5)
    return model


def load_model(folder: pathlib.Path) -> transformers.LlamaForCausalLM:
    return transformers.LlamaForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    ).eval()


@torch.no_grad()
def score(model: transformers.LlamaForCausalLM, tokens: list[int]) -> np.ndarray:
    return model(torch.tensor([tokens]), use_cache=False).logits[0].float().numpy()


def decode(model: transformers.LlamaForCausalLM, prompt: list[int], num_new: int) -> dict[str, Any]:
    """Continue greedily without a KV cache: slow, and nothing to get wrong."""
    tokens, margins, stds = list(prompt), [], []
    for _ in range(num_new):
        logits = score(model, tokens)[-1]
        second, first = np.sort(logits)[-2:]
        margins.append(first - second)
        stds.append(logits.std())
        tokens.append(int(logits.argmax()))
    return {
        "tokens": np.array(tokens, np.int32),
        "margins": np.array(margins, np.float32),
        "stds": np.array(stds, np.float32),
    }


def respell_rope_of_2023(path: pathlib.Path) -> None:
    """Write what transformers wrote before 4.43: rope_theta beside rope_scaling.type."""
    config = json.loads(path.read_text())
    parameters = config.pop("rope_parameters")
    config["rope_theta"] = parameters.pop("rope_theta")
    config["rope_scaling"] = {"type": parameters.pop("rope_type"), **parameters}
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def write_variant(name: str, seed: int) -> None:
    differences, save_arguments, dtype = VARIANTS[name]
    folder = GOLDEN / name
    shutil.rmtree(folder, ignore_errors=True)
    model = make_model(differences, seed)
    model.to(getattr(torch, dtype)).save_pretrained(folder, **save_arguments)
    if name == "rope_linear":
        respell_rope_of_2023(folder / "config.json")
    for path in folder.iterdir():
        path.chmod(0o644)

    model = load_model(folder)
    rng = np.random.default_rng(seed)
    expected = {}
    for i, length in enumerate(PROMPT_LENGTHS):
        prompt = rng.integers(0, BASE["vocab_size"], length).tolist()
        decoded = decode(model, prompt, NUM_NEW)
        if i < NUM_WITH_LOGITS:
            decoded["logits"] = score(model, decoded["tokens"].tolist())
        expected |= {f"{key}_{i}": value for key, value in decoded.items()}
    expected["prompt_lengths"] = np.array(PROMPT_LENGTHS, np.int32)
    np.savez_compressed(folder / "expected.npz", **expected)
    smallest = min(
        (expected[f"margins_{i}"] / expected[f"stds_{i}"]).min() for i in range(len(PROMPT_LENGTHS))
    )
    sys.stdout.write(f"{name}: smallest margin {smallest:.1e} standard deviations\n")


if __name__ == "__main__":
    for seed, name in enumerate(VARIANTS):
        write_variant(name, seed)
