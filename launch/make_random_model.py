"""Write a Llama of random weights as a Hugging Face folder, for comparisons of speed.

    python -m launch.make_random_model --output=runs/random_100m

Every framework then loads the same weights. The folder has no tokenizer: workloads are token ids.
Imports no jax.
"""

import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
from absl import app, flags

_OUTPUT = flags.DEFINE_string("output", None, "Folder to write; it must not exist.", required=True)
_LAYERS = flags.DEFINE_integer("num_layers", 12, "Decoder layers.", lower_bound=1)
_WIDTH = flags.DEFINE_integer("d_model", 768, "Width, a multiple of head_dim.", lower_bound=2)
_FFN = flags.DEFINE_integer("d_ffn", 2048, "Width of the MLP.", lower_bound=1)
_HEADS = flags.DEFINE_integer("num_heads", 12, "Query heads.", lower_bound=1)
_KV_HEADS = flags.DEFINE_integer("num_kv_heads", 12, "Key and value heads.", lower_bound=1)
_VOCAB = flags.DEFINE_integer("vocab_size", 32_000, "Tokens.", lower_bound=2)
_SEED = flags.DEFINE_integer("seed", 0, "Of the weights.")

_STD = 0.02  # as models are initialised


def config_json() -> dict[str, Any]:
    """Return config.json for the shape that the flags give; ValueError where none fits them."""
    if _WIDTH.value % _HEADS.value or _HEADS.value % _KV_HEADS.value:
        raise ValueError(
            f"--num_heads is {_HEADS.value}; it must divide --d_model ({_WIDTH.value}) and be a "
            f"multiple of --num_kv_heads ({_KV_HEADS.value})"
        )
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "hidden_size": _WIDTH.value,
        "intermediate_size": _FFN.value,
        "num_hidden_layers": _LAYERS.value,
        "num_attention_heads": _HEADS.value,
        "num_key_value_heads": _KV_HEADS.value,
        "vocab_size": _VOCAB.value,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10_000.0,
        "tie_word_embeddings": True,
        "torch_dtype": "float32",
    }


def tensors(config: dict[str, Any]) -> Iterator[tuple[str, np.ndarray]]:
    """Yield each tensor under its Hugging Face name: matrices normal, norms 1."""
    rng = np.random.default_rng(_SEED.value)
    width, ffn = config["hidden_size"], config["intermediate_size"]
    kv_width = width // config["num_attention_heads"] * config["num_key_value_heads"]

    def matrix(rows: int, columns: int) -> np.ndarray:
        return rng.standard_normal((rows, columns), np.float32) * np.float32(_STD)

    yield "model.embed_tokens.weight", matrix(config["vocab_size"], width)
    for index in range(config["num_hidden_layers"]):
        layer = f"model.layers.{index}."
        yield layer + "input_layernorm.weight", np.ones(width, np.float32)
        yield layer + "self_attn.q_proj.weight", matrix(width, width)
        yield layer + "self_attn.k_proj.weight", matrix(kv_width, width)
        yield layer + "self_attn.v_proj.weight", matrix(kv_width, width)
        yield layer + "self_attn.o_proj.weight", matrix(width, width)
        yield layer + "post_attention_layernorm.weight", np.ones(width, np.float32)
        yield layer + "mlp.gate_proj.weight", matrix(ffn, width)
        yield layer + "mlp.up_proj.weight", matrix(ffn, width)
        yield layer + "mlp.down_proj.weight", matrix(width, ffn)
    yield "model.norm.weight", np.ones(width, np.float32)


def main(argv: Sequence[str]) -> int:
    if len(argv) > 1:
        raise app.UsageError(f"unknown arguments {argv[1:]}")
    try:
        config = config_json()
        folder = Path(_OUTPUT.value)
        folder.mkdir(parents=True)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    weights = dict(tensors(config))
    safetensors.numpy.save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    num_parameters = sum(tensor.size for tensor in weights.values())
    print(f"{folder}: {num_parameters / 1e6:.1f} million parameters")
    return 0


if __name__ == "__main__":
    sys.exit(app.run(main))
