"""The monitor: which predictions stages and jobs are set against."""

import numpy as np
import pytest

from apex_jax.cost_model import StageTimes
from apex_jax.hardware import (
    Boundary,
    DeviceAttention,
    Embed,
    Head,
    HostAttention,
    Layers,
    PostAttention,
    PreAttention,
    StagedLayer,
    WritePages,
)
from apex_jax.monitor import StageMonitor
from apex_jax.plan import DecodeBatch, HeadBatch, PrefillBatch
from apex_jax.request import SamplingParams

TIMES = StageTimes(
    num_layers=4,
    linear_sec=1.0,
    linear_sec_per_row=0.3,
    device_attention_sec_per_token=0.01,
    host_attention_sec_per_token=0.05,
    head_sec=2.0,
    device_slowdown=1.5,
    host_slowdown=2.0,
)


def ints(*values):
    return np.array(values, np.int32)


DECODE = DecodeBatch(ints(0, 1, 2, 3), ints(9, 19, 29, 39), ints([0], [1], [2], [3]))
PREFILL = PrefillBatch(np.zeros((1, 20), np.int32), ints(0), ints(16), ints([2]))
HEAD = HeadBatch.of([0], [0], [10], [SamplingParams(temperature=0.0)])


@pytest.mark.parametrize(
    ("work", "name", "predicted_sec"),
    [
        (Layers(DECODE, 0), "layers", 2 * (1.2 + 1.0)),  # 4 rows, 100 tokens
        (Layers(PREFILL, 0), "prefill", 2 * (6.0 + 0.16)),
        (StagedLayer(PREFILL, 0), "staged_layer", 6.16),
        (DeviceAttention(DECODE, 1), "device_attention", 1.0),
        (Head((HEAD,)), "head", 2.0),
        (Boundary(1), "linear", 1.2),
        (PreAttention(0), "pre_attention", 0.3),
        (PostAttention(3), "post_attention", 0.9),
        (HostAttention(0, 1, DECODE), "host_attention", 2 * 5.0),
    ],
)
def test_twice_the_predicted_time_is_a_factor_of_two(work, name, predicted_sec):
    monitor = StageMonitor(TIMES, layers_per_program=2)
    for _ in range(20):
        monitor.ended(DeviceAttention(DECODE, 0), 1.0)  # says how many rows the device has
        monitor.ended(work, 2 * predicted_sec)
        monitor.end_sweep(1e6)  # so long that the host's share is nothing
    if name == "device_attention":  # of which one sample of each sweep was as predicted
        assert monitor.correction.factor(name) == pytest.approx(2**0.5, rel=1e-3)
    else:
        assert monitor.correction.factor(name) == pytest.approx(2.0, rel=1e-3)


@pytest.mark.parametrize(
    "work",
    [Embed(DECODE), Boundary(1, cohort_id=0), PreAttention(0, cohort_id=1), WritePages(0, ints(1))],
)
def test_what_says_nothing_is_left_out(work):
    monitor = StageMonitor(TIMES, layers_per_program=2)
    monitor.ended(work, 5.0)
    monitor.end_sweep(1.0)
    assert monitor.correction.summary() == {}


def test_a_stage_beside_a_busy_host_is_expected_to_be_slow():
    monitor = StageMonitor(TIMES, layers_per_program=2)
    for _ in range(20):
        monitor.ended(HostAttention(0, 1, DECODE), 10.0)
        monitor.ended(DeviceAttention(DECODE, 0), 1.25)
        monitor.end_sweep(20.0)  # the host was busy for half of it
    assert monitor.correction.factor("device_attention") == pytest.approx(1.0)
    assert monitor.correction.factor("host_attention") == pytest.approx(1.0)


def test_corrected_times_are_used_at_once():
    monitor = StageMonitor(TIMES, layers_per_program=2)
    before_sec = monitor.times.host_attention(4, 100)
    for _ in range(20):
        monitor.ended(HostAttention(0, 1, DECODE), 30.0)
        monitor.end_sweep(1e6)
    assert monitor.times.host_attention(4, 100) == pytest.approx(3 * before_sec)
