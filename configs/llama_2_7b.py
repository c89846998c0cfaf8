"""Llama 2 7B: the shape that meta-llama/Llama-2-7b-hf publishes.

Give the folder of its weights with --config.model.path=FOLDER, or run without any (for timing) with
--config.model.weights=dummy.
"""

from apex_jax.config import Config, LlamaConfig, ModelConfig, RopeConfig


def get_config() -> Config:
    """Return the settings of a job with this model."""
    architecture = LlamaConfig(
        num_layers=32,
        d_model=4096,
        d_ffn=11008,
        num_heads=32,
        num_kv_heads=32,
        head_dim=128,
        vocab_size=32_000,
        max_position_embeddings=4096,
        rms_norm_eps=1e-5,
        tie_embeddings=False,
        rope=RopeConfig(theta=10_000.0),
    )
    return Config(model=ModelConfig(architecture=architecture))
