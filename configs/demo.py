"""The small model that ships with the project: a job that needs no download and no GPU."""

from pathlib import Path

from apex_jax.config import Config, ModelConfig, SchedulerConfig


def get_config() -> Config:
    """Return the settings of a job with the demo model."""
    return Config(
        model=ModelConfig(path=str(Path(__file__).parent / "demo_model")),
        scheduler=SchedulerConfig(max_requests=16),  # few buckets: a first start compiles them all
    )
