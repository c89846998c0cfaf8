"""Writes a Llama of a Hugging Face folder as a GGUF file, without a tokenizer.

llama.cpp rotates neighbouring elements of a head where Hugging Face rotates halves, so the rows of
the query and key matrices are reordered. Refuses what changes RoPE. Called by run_llama_cpp.py.
"""

# pyright: reportMissingImports=false

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from safetensors import safe_open

_PARTS = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_TABLES = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}


def write_gguf(folder: Path, path: Path, dtype: str) -> None:
    """Write the weights in float32, or float16 where that is the dtype; ValueError else."""
    config = json.loads((folder / "config.json").read_text())
    if config.get("rope_scaling"):
        raise ValueError("rope_scaling is not translated to GGUF; give a file of your own (--gguf)")
    if dtype not in ("float32", "float16"):
        raise ValueError(f"no GGUF file is written in {dtype}; give one of your own (--gguf)")
    heads = config["num_attention_heads"]
    kv_heads = config.get("num_key_value_heads") or heads
    head_dim = config.get("head_dim") or config["hidden_size"] // heads
    rope = config.get("rope_parameters") or {}
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_rope_dimension_count(head_dim)
    writer.add_rope_freq_base(rope.get("rope_theta") or config.get("rope_theta") or 10_000.0)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("no_vocab")
    for name, tensor in _tensors(folder):
        target = _target(name)
        if target is None or (name == "lm_head.weight" and config.get("tie_word_embeddings")):
            continue
        if ".q_proj." in name or ".k_proj." in name:
            tensor = _interleave(tensor, heads if ".q_proj." in name else kv_heads)
        is_matrix = tensor.ndim == 2
        writer.add_tensor(target, tensor.astype(dtype if is_matrix else np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _tensors(folder: Path) -> Any:
    """Yield names and float32 arrays; numpy has no bfloat16, whose bits are float32's upper."""
    for file in sorted(folder.glob("*.safetensors")):
        header_bytes = int.from_bytes(file.open("rb").read(8), "little")
        with file.open("rb") as raw:
            raw.seek(8)
            header = json.loads(raw.read(header_bytes))
        with safe_open(file, framework="numpy") as tensors:
            for name in tensors.keys():  # noqa: SIM118 (no dict)
                entry = header[name]
                if entry["dtype"] != "BF16":
                    yield name, tensors.get_tensor(name).astype(np.float32)
                    continue
                begin, end = entry["data_offsets"]
                bits = np.fromfile(
                    file, np.uint16, (end - begin) // 2, offset=8 + header_bytes + begin
                )
                values = (bits.astype(np.uint32) << 16).view(np.float32)
                yield name, values.reshape(entry["shape"])


def _target(name: str) -> str | None:
    if name in _TABLES:
        return _TABLES[name]
    parts = name.removeprefix("model.layers.").removesuffix(".weight").split(".", 1)
    if len(parts) == 2 and parts[1] in _PARTS:
        return f"blk.{parts[0]}.{_PARTS[parts[1]]}.weight"
    return None  # rotary_emb.inv_freq of old files


def _interleave(weight_oi: np.ndarray, num_heads: int) -> np.ndarray:
    """Bring row h/2 + i of each head beside row i."""
    out, width = weight_oi.shape
    halves = weight_oi.reshape(num_heads, 2, out // num_heads // 2, width)
    return halves.swapaxes(1, 2).reshape(out, width)
