"""The factor of a stage: what moves it, how fast, and what does not."""

import inspect
import itertools
import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from apex_jax.correction import CorrectedTimes, Correction
from apex_jax.cost_model import PromptWork, StageTimes, Times

PREDICTED_SEC = 2e-3
TIMES = StageTimes(
    num_layers=4,
    linear_sec=1.0,
    device_attention_sec=0.5,
    host_job_sec=0.4,
    transfer_sec=0.2,
    head_sec=2.0,
    stage_sec=0.1,
    dispatch_sec=0.01,
)
QUESTIONS = {
    "embed": (3,),
    "layers": (2, 3, 30),
    "prefill": (2, PromptWork(1, 16, 16, 136)),
    "staged_layer": (PromptWork(1, 16, 16, 136),),
    "pre_attention": (3,),
    "device_attention": (3, 30),
    "post_attention": (3,),
    "linear": (3, 2),
    "head": (3,),
    "device_copy": (16,),
    "host_attention": (3, 30),
    "host_copy": (16,),
    "transfer": (3, 0),
}


def follow(ratios, correction=None, samples_per_sweep=1):
    """Return the factor after each sweep whose samples are so many times the prediction."""
    correction = Correction() if correction is None else correction
    factors = []
    for ratio in ratios:
        for _ in range(samples_per_sweep):
            correction.add("linear", PREDICTED_SEC, PREDICTED_SEC * ratio)
        correction.end_sweep()
        factors.append(correction.factor("linear"))
    return factors


def noisy(seed, num_sweeps, ratio, sigma, outlier_share):
    draw = random.Random(seed)
    return [
        ratio * draw.lognormvariate(0, sigma) * (10 if draw.random() < outlier_share else 1)
        for _ in range(num_sweeps)
    ]


@given(st.floats(0.2, 5.0), st.floats(0.2, 5.0))
def test_a_lasting_change_is_followed_within_twenty_sweeps(first, then):
    factors = follow([first] * 40 + [then] * 20)
    assert factors[39] == pytest.approx(first, rel=0.051)
    assert factors[-1] == pytest.approx(then, rel=0.051)
    assert all(max(a / b, b / a) < 1.501 for a, b in zip([1.0, *factors], factors, strict=False))


@pytest.mark.parametrize("sigma", [0.0, 0.05, 0.1])
@pytest.mark.parametrize("outlier_share", [0.0, 0.05, 0.1])
def test_it_is_followed_through_noise_and_outliers(sigma, outlier_share):
    for seed in range(40):
        steady = noisy(seed, 40, 1.0, sigma, outlier_share)
        slowed = noisy(seed + 1000, 40, 3.0, sigma, outlier_share)
        factors = follow(steady + slowed)
        assert all(abs(math.log(factor)) < 0.3 for factor in factors[:40])
        assert all(factor == pytest.approx(3.0, rel=0.3) for factor in factors[60:])


@pytest.mark.parametrize("sigma", [0.05, 0.3])
def test_noise_alone_makes_few_moves(sigma):
    """Without a dead band that knows the noise, the factor would move in almost every sweep."""
    moves = 0
    for seed in range(50):
        factors = follow(noisy(seed, 100, 1.0, sigma, 0.05))
        moves += sum(a != b for a, b in itertools.pairwise(factors))
    assert moves < 50 * 100 * 0.05


def test_ten_fold_outliers_move_nothing():
    ratios = [1.0] * 30
    ratios[3::10] = [10.0] * 3
    assert set(follow(ratios)) == {1.0}


def test_an_error_within_the_dead_band_is_left_alone():
    assert set(follow([1.04] * 30)) == {1.0}


def test_little_is_known_after_eight_sweeps():
    assert follow([2.0] * 9) == [1] * 8 + [pytest.approx(1.5)]
    assert Correction().factor("never measured") == 1.0


def test_samples_of_one_sweep_count_as_one():
    """A sweep has a boundary for each layer: one slow sweep must not fill the window."""
    correction = Correction()
    follow([1.0] * 8, correction, samples_per_sweep=32)
    assert follow([10.0] * 3, correction, samples_per_sweep=32) == [1.0] * 3
    assert correction.summary()["linear"]["num_sweeps"] == 11


def test_a_sweep_without_the_stage_changes_nothing():
    correction = Correction()
    (*_, factor) = follow([2.0] * 20, correction)
    for _ in range(50):
        correction.add("head", 1.0, 1.0)
        correction.end_sweep()
    assert correction.factor("linear") == factor
    assert correction.factor("head") == 1.0


@pytest.mark.parametrize(("predicted", "measured"), [(0.0, 1.0), (1.0, 0.0), (-1.0, 1.0)])
def test_where_there_is_nothing_to_compare_nothing_is_taken(predicted, measured):
    correction = Correction()
    correction.add("linear", predicted, measured)
    correction.end_sweep()
    assert correction.summary() == {}


def test_the_summary_tells_the_error_with_and_without_the_factor():
    correction = Correction()
    follow([3.0] * 200, correction)
    told = correction.summary()["linear"]
    assert told["factor"] == pytest.approx(3.0)
    assert told["error_before"] == pytest.approx(2.0)
    assert told["error_after"] == pytest.approx(0.0, abs=1e-9)


def test_corrected_times_answer_every_question_with_the_factor_of_its_stage():
    correction = Correction()
    times = CorrectedTimes(TIMES, correction)
    assert isinstance(times, Times)
    asked = {name for name, _ in inspect.getmembers(Times, inspect.isfunction)}
    assert set(QUESTIONS) == {name for name in asked if not name.startswith("_")}
    for name, arguments in QUESTIONS.items():
        plain = getattr(TIMES, name)(*arguments)
        assert getattr(times, name)(*arguments) == plain > 0
        for _ in range(20):
            correction.add(name, 1.0, 2.0)
            correction.end_sweep()
        assert getattr(times, name)(*arguments) == pytest.approx(2 * plain)
    assert times.dispatch_sec == TIMES.dispatch_sec
    for _ in range(20):
        correction.add("dispatch", 1.0, 2.0)
        correction.end_sweep()
    assert times.dispatch_sec == pytest.approx(2 * TIMES.dispatch_sec)
    assert (times.num_layers, times.device_slowdown, times.host_slowdown) == (4, 1.0, 1.0)
