"""A Llama in plain float64 numpy: whole sequences in, logits out, nothing cached, nothing fused.

An oracle for tests: written from the formulas, shares no code with apex_jax but its configuration.
Tensors go by their Hugging Face names, without "model." and ".weight".
"""

import pathlib

import numpy as np
from safetensors.flax import load_file

from apex_jax.config import LlamaConfig, RopeConfig

Tensors = dict[str, np.ndarray]


def load_tensors(folder: pathlib.Path) -> Tensors:
    """Read a folder's safetensors."""
    tensors: Tensors = {}
    for path in sorted(folder.glob("*.safetensors")):
        for name, values in load_file(path).items():
            short_name = name.removeprefix("model.").removesuffix(".weight")
            tensors[short_name] = np.asarray(values).astype(np.float64)
    return tensors


def unfuse(config: LlamaConfig, weights) -> Tensors:
    """Take apex_jax's own weights (LlamaWeights) apart, as for models that exist in no file."""
    tensors = {"embed_tokens": weights.embedding, "norm": weights.norm["scale"]}
    if weights.output is not None:
        tensors["lm_head"] = weights.output
    q_rows, kv_rows = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    for i, layer in enumerate(weights.layers):
        qkv, gate_up = layer["qkv_proj"]["weight"], layer["gate_up_proj"]["weight"]
        parts = {
            "input_layernorm": layer["input_norm"]["scale"],
            "self_attn.q_proj": qkv[:q_rows],
            "self_attn.k_proj": qkv[q_rows : q_rows + kv_rows],
            "self_attn.v_proj": qkv[q_rows + kv_rows :],
            "self_attn.o_proj": layer["o_proj"]["weight"],
            "post_attention_layernorm": layer["post_norm"]["scale"],
            "mlp.gate_proj": gate_up[: config.d_ffn],
            "mlp.up_proj": gate_up[config.d_ffn :],
            "mlp.down_proj": layer["down_proj"]["weight"],
        }
        tensors |= {f"layers.{i}.{name}": values for name, values in parts.items()}
    return {name: np.asarray(values).astype(np.float64) for name, values in tensors.items()}


def frequencies(rope: RopeConfig, head_dim: int) -> np.ndarray:
    """Angle per position of each pair, [h / 2]."""
    plain = rope.theta ** -(np.arange(0, head_dim, 2) / head_dim)
    if rope.scaling == "default":
        return plain
    if rope.scaling == "linear":
        return plain / rope.factor
    scaled = []
    for frequency in plain:
        turns = rope.original_max_position_embeddings * frequency / (2 * np.pi)
        if turns > rope.high_freq_factor:
            scaled.append(frequency)
        elif turns < rope.low_freq_factor:
            scaled.append(frequency / rope.factor)
        else:
            span = rope.high_freq_factor - rope.low_freq_factor
            keep = (turns - rope.low_freq_factor) / span
            scaled.append((1 - keep) * frequency / rope.factor + keep * frequency)
    return np.array(scaled)


def logits(config: LlamaConfig, tensors: Tensors, tokens: list[int]) -> np.ndarray:
    """Scores of the next token at every position of one sequence, [t, v]."""
    t, h, eps = len(tokens), config.head_dim, config.rms_norm_eps
    angles = np.outer(np.arange(t), frequencies(config.rope, h))
    cos, sin = np.cos(angles), np.sin(angles)

    def norm(x, name):
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * tensors[name]

    def rotate(x):  # [t, h]
        a, b = x[:, : h // 2], x[:, h // 2 :]
        return np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)

    def head(x, head_index):
        return x[:, head_index * h : (head_index + 1) * h]

    x = tensors["embed_tokens"][tokens]
    for layer in (f"layers.{i}." for i in range(config.num_layers)):
        y = norm(x, layer + "input_layernorm")
        q, k, v = (y @ tensors[f"{layer}self_attn.{name}_proj"].T for name in "qkv")
        attended = []
        for n in range(config.num_heads):
            k_head = n // (config.num_heads // config.num_kv_heads)
            scores = rotate(head(q, n)) @ rotate(head(k, k_head)).T / np.sqrt(h)
            scores[np.triu_indices(t, 1)] = -np.inf
            weights = np.exp(scores - scores.max(-1, keepdims=True))
            attended.append(weights / weights.sum(-1, keepdims=True) @ head(v, k_head))
        x = x + np.concatenate(attended, axis=-1) @ tensors[layer + "self_attn.o_proj"].T
        y = norm(x, layer + "post_attention_layernorm")
        gate, up = (y @ tensors[f"{layer}mlp.{name}_proj"].T for name in ("gate", "up"))
        x = x + (gate / (1 + np.exp(-gate)) * up) @ tensors[layer + "mlp.down_proj"].T
    output = tensors["embed_tokens" if config.tie_embeddings else "lm_head"]
    return norm(x, "norm") @ output.T


def margins_and_stds(logits_tv: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Gap between the two best scores and standard deviation of all, of each row."""
    best = np.sort(logits_tv, axis=-1)
    return best[:, -1] - best[:, -2], logits_tv.std(-1)


def decode(
    config: LlamaConfig, tensors: Tensors, prompt: list[int], num_new: int
) -> tuple[list[int], np.ndarray, np.ndarray]:
    """Continue a prompt greedily; return the new tokens, and their margins and stds."""
    tokens = list(prompt)
    for _ in range(num_new):
        tokens.append(int(logits(config, tensors, tokens)[-1].argmax()))
    margins, stds = margins_and_stds(logits(config, tensors, tokens[:-1])[len(prompt) - 1 :])
    return tokens[len(prompt) :], margins, stds
