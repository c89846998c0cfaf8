"""The Llama decoder as Flax NNX modules.

Owns the arithmetic of one layer, split at attention (`pre_attention`, `post_attention`) so that a
stage may put any attention in between. Refuses nothing: configurations are validated where they are
read. Linear weights are laid out [out, in] (a row's result on XLA's CPU then does not depend on how
many rows share the batch), q, k, v and gate, up are fused into one matrix each.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from apex_jax.config import LlamaConfig, RopeConfig


def rope_frequencies(rope: RopeConfig, head_dim: int) -> Float[Array, "half_h"]:
    """Return the float32 angle per position of each rotated pair, scaling applied.

    Source: Hugging Face transformers `modeling_rope_utils` ("default", "linear", "llama3").
    """
    exponents = jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim
    frequencies = 1.0 / (rope.theta**exponents)
    if rope.scaling == "default":
        return frequencies
    if rope.scaling == "linear":
        return frequencies / rope.factor
    if rope.scaling != "llama3":
        raise ValueError(f"rope.scaling is {rope.scaling!r}; known: default, linear, llama3")
    # Long wavelengths are stretched by `factor`, short ones kept, those between interpolated.
    wavelengths = 2 * jnp.pi / frequencies
    context = rope.original_max_position_embeddings
    ramp = (context / wavelengths - rope.low_freq_factor) / (
        rope.high_freq_factor - rope.low_freq_factor
    )
    keep = jnp.clip(ramp, 0.0, 1.0)
    return (1 - keep) * frequencies / rope.factor + keep * frequencies


def rotate(
    x: Float[Array, "*b heads h"], angles: Float[Array, "*b half_h"]
) -> Float[Array, "*b heads h"]:
    """Rotate pairs (i, i + h/2) of each head by `angles`, in float32, back to x's dtype."""
    cos, sin = jnp.cos(angles)[..., None, :], jnp.sin(angles)[..., None, :]
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x.dtype)


def causal_attention(
    q_btnh: Float[Array, "b t n h"],
    k_btkh: Float[Array, "b t k h"],
    v_btkh: Float[Array, "b t k h"],
) -> Float[Array, "b t n h"]:
    """Attend causally within each row; scores and weights in float32."""
    b, t, n, h = q_btnh.shape
    q_btkgh = q_btnh.reshape(b, t, k_btkh.shape[2], -1, h)
    scores = jnp.einsum("btkgh,bskh->bkgts", q_btkgh, k_btkh, preferred_element_type=jnp.float32)
    visible = jnp.tril(jnp.ones((t, t), bool))[None, None, None]
    weights = jax.nn.softmax(jnp.where(visible, scores * h**-0.5, -jnp.inf), axis=-1)
    attended = jnp.einsum("bkgts,bskh->btkgh", weights.astype(v_btkh.dtype), v_btkh)
    return attended.reshape(b, t, n, h)


class Linear(nnx.Module):
    """y = W x without bias; `weight` is [out, in]."""

    def __init__(self, num_in: int, num_out: int, *, dtype: np.dtype, rngs: nnx.Rngs):
        init = jax.nn.initializers.normal(stddev=0.02)
        self.weight = nnx.Param(init(rngs.params(), (num_out, num_in), dtype))

    def __call__(self, x: Float[Array, "*b i"]) -> Float[Array, "*b o"]:
        return jnp.einsum("...i,oi->...o", x, self.weight[...])


class RMSNorm(nnx.Module):
    """Root-mean-square norm, computed in float32 and scaled in the dtype of x."""

    def __init__(self, width: int, *, eps: float, dtype: np.dtype):
        self.eps = eps
        self.scale = nnx.Param(jnp.ones((width,), dtype))

    def __call__(self, x: Float[Array, "*b d"]) -> Float[Array, "*b d"]:
        x_f32 = x.astype(jnp.float32)
        mean_square = jnp.mean(jnp.square(x_f32), axis=-1, keepdims=True)
        normed = (x_f32 * jax.lax.rsqrt(mean_square + self.eps)).astype(x.dtype)
        return normed * jnp.expand_dims(self.scale[...], range(x.ndim - 1))


class DecoderLayer(nnx.Module):
    """One Llama layer, split at attention."""

    def __init__(self, config: LlamaConfig, *, dtype: np.dtype, rngs: nnx.Rngs):
        self.num_heads, self.num_kv_heads = config.num_heads, config.num_kv_heads
        self.head_dim, self.rope = config.head_dim, config.rope
        width, qkv_heads = config.d_model, config.num_heads + 2 * config.num_kv_heads
        self.input_norm = RMSNorm(width, eps=config.rms_norm_eps, dtype=dtype)
        self.qkv_proj = Linear(width, qkv_heads * config.head_dim, dtype=dtype, rngs=rngs)
        self.o_proj = Linear(config.num_heads * config.head_dim, width, dtype=dtype, rngs=rngs)
        self.post_norm = RMSNorm(width, eps=config.rms_norm_eps, dtype=dtype)
        self.gate_up_proj = Linear(width, 2 * config.d_ffn, dtype=dtype, rngs=rngs)
        self.down_proj = Linear(config.d_ffn, width, dtype=dtype, rngs=rngs)

    def pre_attention(
        self, x: Float[Array, "*b d"], positions: Int[Array, "*b"]
    ) -> tuple[Float[Array, "*b n h"], Float[Array, "*b k h"], Float[Array, "*b k h"]]:
        """Return rotated queries, rotated keys and values of each token."""
        heads = self.num_heads + 2 * self.num_kv_heads
        qkv = self.qkv_proj(self.input_norm(x)).reshape(*x.shape[:-1], heads, self.head_dim)
        q, k, v = jnp.split(qkv, [self.num_heads, self.num_heads + self.num_kv_heads], axis=-2)
        frequencies = rope_frequencies(self.rope, self.head_dim)
        angles = positions.astype(jnp.float32)[..., None] * jnp.expand_dims(
            frequencies, range(positions.ndim)
        )
        return rotate(q, angles), rotate(k, angles), v

    def post_attention(
        self, x: Float[Array, "*b d"], attended: Float[Array, "*b n h"]
    ) -> Float[Array, "*b d"]:
        """Add the attention output and the MLP to the residual stream."""
        x = x + self.o_proj(attended.reshape(*x.shape[:-1], -1))
        gate, up = jnp.split(self.gate_up_proj(self.post_norm(x)), 2, axis=-1)
        return x + self.down_proj(jax.nn.silu(gate) * up)


def next_token_logits(
    x: Float[Array, "*b d"], norm: RMSNorm, output_vd: Float[Array, "v d"]
) -> Float[Array, "*b v"]:
    """Return float32 scores of the next token."""
    return jnp.einsum("...d,vd->...v", norm(x), output_vd, preferred_element_type=jnp.float32)


class Llama(nnx.Module):
    """Embedding, layers, final norm and output head."""

    def __init__(self, config: LlamaConfig, *, dtype: np.dtype, rngs: nnx.Rngs):
        self.config = config
        init = jax.nn.initializers.normal(stddev=0.02)
        self.embedding = nnx.Param(init(rngs.params(), (config.vocab_size, config.d_model), dtype))
        self.layers = nnx.List(
            [DecoderLayer(config, dtype=dtype, rngs=rngs) for _ in range(config.num_layers)]
        )
        self.norm = RMSNorm(config.d_model, eps=config.rms_norm_eps, dtype=dtype)
        if not config.tie_embeddings:
            self.lm_head = Linear(config.d_model, config.vocab_size, dtype=dtype, rngs=rngs)

    def embed(self, tokens: Int[Array, "*b"]) -> Float[Array, "*b d"]:
        return jnp.take(self.embedding[...], tokens, axis=0)

    @property
    def output_vd(self) -> Float[Array, "v d"]:
        """The output matrix: the embedding itself where the two are tied."""
        return self.embedding[...] if self.config.tie_embeddings else self.lm_head.weight[...]

    def logits(self, x: Float[Array, "*b d"]) -> Float[Array, "*b v"]:
        return next_token_logits(x, self.norm, self.output_vd)

    def __call__(self, tokens_bt: Int[Array, "b t"]) -> Float[Array, "b t v"]:
        """Score whole sequences with dense causal attention (for training and as a plain twin)."""
        num_tokens = tokens_bt.shape[1]
        positions_bt = jnp.broadcast_to(jnp.arange(num_tokens), tokens_bt.shape)
        x_btd = self.embed(tokens_bt)
        for layer in self.layers:
            q, k, v = layer.pre_attention(x_btd, positions_bt)
            x_btd = layer.post_attention(x_btd, causal_attention(q, k, v))
        return self.logits(x_btd)


# A module's parameters by name, as nnx.to_pure_dict gives them. No nnx.State: each call of a
# program takes its arguments apart, a dict in a microsecond, a State in ten.
State = dict[str, Any]


class LlamaWeights(NamedTuple):
    """A model's parameters as a plain pytree, in the pieces that stages take.

    layers: the state of each DecoderLayer. norm: of the final RMSNorm. output: the output matrix,
    None where it is the embedding.
    """

    embedding: Float[Array, "v d"]
    layers: tuple[State, ...]
    norm: State
    output: Float[Array, "v d"] | None
