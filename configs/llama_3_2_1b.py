"""Llama 3.2 1B: the shape that meta-llama/Llama-3.2-1B publishes.

Give the folder of its weights with --config.model.path=FOLDER, or run without any (for timing) with
--config.model.weights=dummy.
"""

from apex_jax.config import Config, LlamaConfig, ModelConfig, RopeConfig


def get_config() -> Config:
    """Return the settings of a job with this model."""
    architecture = LlamaConfig(
        num_layers=16,
        d_model=2048,
        d_ffn=8192,
        num_heads=32,
        num_kv_heads=8,
        head_dim=64,
        vocab_size=128_256,
        max_position_embeddings=131_072,
        rms_norm_eps=1e-5,
        tie_embeddings=True,
        rope=RopeConfig(
            theta=500_000.0,
            scaling="llama3",
            factor=32.0,
            low_freq_factor=1.0,
            high_freq_factor=4.0,
            original_max_position_embeddings=8192,
        ),
    )
    return Config(model=ModelConfig(architecture=architecture))
