"""Times of described hardware, as everybody asks for them."""

import numpy as np
import pytest

from apex_jax.cost_model import PromptWork, StageTimes, Times
from apex_jax.plan import PrefillBatch

TIMES = StageTimes(
    num_layers=4,
    linear_sec=1.0,
    linear_sec_per_row=0.1,
    pre_share=0.25,
    device_attention_sec=0.5,
    device_attention_sec_per_token=0.01,
    prefill_attention_sec_per_pair=0.02,
    host_attention_sec_per_token=0.05,
    host_row_sec=0.1,
    host_job_sec=0.4,
    host_copy_sec_per_token=0.03,
    transfer_sec=0.2,
    transfer_sec_per_row=0.05,
    transfer_sec_per_token=0.01,
    head_sec=2.0,
    head_sec_per_row=0.5,
    stage_sec=10.0,
)
# Two chunks of a 16-token shape: 16 tokens behind 8 others, and the first 4 of a prompt.
CHUNKS = PrefillBatch(
    np.zeros((2, 16), np.int32),
    np.array([8, 0], np.int32),
    np.array([16, 4], np.int32),
    np.zeros((2, 3), np.int32),
)


def test_prompts_count_their_padding_their_kv_and_the_pairs_without_padding():
    pairs = (16 * 8 + 16 * 17 // 2) + 4 * 5 // 2
    assert PromptWork.of(CHUNKS) == (2, 16, 8 + 16 + 4, pairs)


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        (TIMES.embed(7), 0),
        (TIMES.layers(3, 2, 30), 3 * (1.0 + 0.5 + 0.3)),
        (TIMES.layers(3, 20, 30), 3 * (2.0 + 0.5 + 0.3)),
        # 32 padded rows; 274 pairs take longer than reading 28 tokens.
        (TIMES.prefill(2, PromptWork.of(CHUNKS)), 2 * (3.2 + 0.5 + 0.02 * 274)),
        (TIMES.staged_layer(PromptWork.of(CHUNKS)), 3.2 + 0.5 + 0.02 * 274),
        (TIMES.pre_attention(20), 0.5),
        (TIMES.device_attention(2, 30), 0.8),
        (TIMES.post_attention(20), 1.5),
        (TIMES.linear(4), 1.0),
        (TIMES.linear(4, 16), 2.0),
        (TIMES.head(2), 2.0),
        (TIMES.head(8, is_greedy=True), 4.0),
        (TIMES.device_copy(16), 2 * 0.16),
    ],
)
def test_a_device_stage_contains_what_it_costs_to_start_one(found, expected):
    assert found == pytest.approx(10.0 + expected)


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        (TIMES.host_attention(2, 30), 0.4 + 0.2 + 1.5),
        (TIMES.host_copy(16), 0.4 + 0.48),
        (TIMES.transfer(num_rows=4), 0.4),
        (TIMES.transfer(num_tokens=16), 0.36),
        (TIMES.linear(0), 0),
        (TIMES.head(0), 0),
        (TIMES.host_attention(0, 0), 0),
        (TIMES.device_attention(0, 0), 0),
        (TIMES.device_slowdown, 1),
        (TIMES.host_slowdown, 1),
    ],
)
def test_the_host_the_link_and_what_does_not_run(found, expected):
    assert found == pytest.approx(expected)


def test_described_times_answer_all_questions():
    assert isinstance(TIMES, Times)
