"""Write a Llama of random weights as a Hugging Face folder, for comparisons of speed.

    python -m launch.make_random_model --output=runs/random_100m

Every framework then loads the same weights. The folder has no tokenizer: workloads are token ids.
Imports no jax.
"""

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
from absl import app, flags

_STD = 0.02  # as models are initialised


def define_flags() -> None:
    flags.DEFINE_string("output", None, "Folder to write; it must not exist.", required=True)
    flags.DEFINE_integer("num_layers", 12, "Decoder layers.", 1)
    flags.DEFINE_integer("d_model", 768, "Width, a multiple of num_heads.", 1)
    flags.DEFINE_integer("d_ffn", 2048, "Width of the MLP.", 1)
    flags.DEFINE_integer("num_heads", 12, "Query heads.", 1)
    flags.DEFINE_integer("num_kv_heads", 12, "Key and value heads.", 1)
    flags.DEFINE_integer("vocab_size", 32_000, "Tokens.", 2)
    flags.DEFINE_integer("seed", 0, "Of the weights.")


def config_json(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return config.json for flags by name; ValueError where they fit no Llama."""
    width, heads, kv_heads = (values[name] for name in ("d_model", "num_heads", "num_kv_heads"))
    if width % heads or width // heads % 2 or heads % kv_heads:
        raise ValueError(
            f"--num_heads is {heads}; it must divide --d_model ({width}) into heads of an even "
            f"width and be a multiple of --num_kv_heads ({kv_heads})"
        )
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "hidden_size": width,
        "intermediate_size": values["d_ffn"],
        "num_hidden_layers": values["num_layers"],
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": values["vocab_size"],
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10_000.0,
        "tie_word_embeddings": True,
        "torch_dtype": "float32",
    }


def tensors(config: dict[str, Any], seed: int) -> Iterator[tuple[str, np.ndarray]]:
    """Yield each tensor under its Hugging Face name: matrices normal, norms 1."""
    rng = np.random.default_rng(seed)
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


def write_model(folder: Path, values: Mapping[str, Any]) -> int:
    """Write the folder, which must not exist; return the number of parameters."""
    config = config_json(values)
    weights = dict(tensors(config, values["seed"]))
    folder.mkdir(parents=True)
    safetensors.numpy.save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    return sum(tensor.size for tensor in weights.values())


def main(argv: Sequence[str]) -> int:
    if len(argv) > 1:
        raise app.UsageError(f"unknown arguments {argv[1:]}")
    folder = Path(flags.FLAGS.output)
    try:
        num_parameters = write_model(folder, flags.FLAGS.flag_values_dict())
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{folder}: {num_parameters / 1e6:.1f} million parameters")
    return 0


if __name__ == "__main__":
    define_flags()
    sys.exit(app.run(main))
