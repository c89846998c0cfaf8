"""TinyLlama 1.1B: the shape that TinyLlama/TinyLlama-1.1B-Chat-v1.0 publishes.

Give the folder of its weights with --config.model.path=FOLDER, or run without any (for timing) with
--config.model.weights=dummy.
"""

from apex_jax.config import Config, LlamaConfig, ModelConfig, RopeConfig


def get_config() -> Config:
    """Return the settings of a job with this model."""
    architecture = LlamaConfig(
        num_layers=22,
        d_model=2048,
        d_ffn=5632,
        num_heads=32,
        num_kv_heads=4,
        head_dim=64,
        vocab_size=32_000,
        max_position_embeddings=2048,
        rms_norm_eps=1e-5,
        tie_embeddings=False,
        rope=RopeConfig(theta=10_000.0),
    )
    return Config(model=ModelConfig(architecture=architecture))
