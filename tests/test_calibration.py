"""What is measured when a predicting strategy starts, on hardware whose times are known."""

import pytest

from apex_jax.backends.simulated import SimulatedBackend
from apex_jax.buckets import HostLimits, choose
from apex_jax.calibration import calibrate
from apex_jax.cost_model import StageTimes

TRUE = StageTimes(
    num_layers=8,
    linear_sec=2e-3,
    linear_sec_per_row=1e-4,
    pre_share=0.25,
    device_attention_sec=1e-4,
    device_attention_sec_per_token=1e-6,
    host_attention_sec_per_token=2e-6,
    host_job_sec=3e-4,
)


def measure(backend, num_host_pages=64):
    shapes = choose(
        max_requests=32,
        max_prefill_tokens=64,
        max_model_len=512,
        num_pages=64,
        page_size=16,
        host=HostLimits(max_cohort_rows=32, num_staging_pages=32, max_move_pages=32),
    )
    return calibrate(
        backend,
        shapes,
        num_layers=TRUE.num_layers,
        num_pages=64,
        num_host_pages=num_host_pages,
    )


# A pool of three pages has no two batches to tell tokens from overhead by, and holds 48 tokens.
@pytest.mark.parametrize(("num_host_pages", "most_tokens"), [(64, 500), (32, 500), (3, 48)])
def test_known_times_are_found(num_host_pages, most_tokens):
    found = measure(SimulatedBackend(TRUE, layers_per_program=2, page_size=16), num_host_pages)
    for num_rows in (1, 4, 32):
        assert found.linear(num_rows) == pytest.approx(TRUE.linear(num_rows), rel=0.02)
    assert found.pre_share == pytest.approx(TRUE.pre_share, rel=0.02)
    for num_tokens in (100, 1000):
        assert found.device_attention(2, num_tokens) == pytest.approx(
            TRUE.device_attention(2, num_tokens), rel=0.02
        )
    assert found.host_attention(2, most_tokens) == pytest.approx(
        TRUE.host_attention(2, most_tokens), rel=0.02
    )


def test_a_device_that_never_answers_is_reported():
    backend = SimulatedBackend(TRUE, layers_per_program=2, page_size=16)
    backend.wait_any = lambda handles, deadline_sec: None
    with pytest.raises(TimeoutError, match="took more than 60 s when it was measured"):
        measure(backend)
