"""The small model that ships with the project: a job that needs no download and no GPU.

The device's KV cache is capped to what a few requests fill, so that the host lane is seen at work.
"""

from pathlib import Path

from apex_jax.config import CacheConfig, Config, ModelConfig, SchedulerConfig

KV_BYTES = (
    3 * 2**20
)  # 48 pages of 16 tokens: five of the demo's requests, the others go to the host


def get_config() -> Config:
    """Return the settings of a job with the demo model."""
    return Config(
        model=ModelConfig(path=str(Path(__file__).parent / "demo_model")),
        cache=CacheConfig(device_bytes=KV_BYTES, host_bytes=16 * KV_BYTES),
        # Few buckets: a first start compiles them all.
        scheduler=SchedulerConfig(
            strategy="staggered",
            max_requests=8,
            max_host_requests=16,
        ),
    )
