"""Predicted rates against what the simulated backend plays, over drawn hardware and loads."""

import random
import statistics

import pytest

from apex_jax.cost_model import StageTimes
from apex_jax.pipelining import AsymmetricPipelining
from apex_jax.policies import DeviceOnly, Merging
from apex_jax.prediction import DEVICE_ONLY, Choice, Demand, Predictor
from apex_jax.simulation import frozen_state, steady_state

pytestmark = [
    pytest.mark.usefixtures("without_annotations_checked"),
    pytest.mark.main_python,
]

SPAN = 4
TIMES = StageTimes(num_layers=8, linear_sec=1.0, device_attention_sec=0.5, host_row_sec=0.1)
# Each with its prediction: of `demand`, by a predictor whose stage times are the simulation's.
POLICIES = {
    "device_only": (lambda times: DeviceOnly(), lambda one, demand: one.device_only(demand)),
    "async_overlap": (
        lambda times: Merging(),
        lambda one, demand: one.merging(demand, Choice("merging", 1, 1, 512)),
    ),
    "staggered": (
        lambda times: Merging(2, is_spread=True),
        lambda one, demand: one.merging(demand, Choice("merging", 2, 1, 512)),
    ),
    "passes": (
        lambda times: Merging(2, passes=3),
        lambda one, demand: one.merging(demand, Choice("merging", 2, 3, 512)),
    ),
    "all_passes": (
        lambda times: Merging(1, passes=None),
        lambda one, demand: one.merging(demand, Choice("merging", 1, None, 512)),
    ),
    "asymmetric_pipelining": (
        AsymmetricPipelining,
        lambda one, demand: one.pipelining(demand, 512),
    ),
}


def draw(rng):
    """Return stage times in units of a layer's linear work, device rows and host rows."""
    times = StageTimes(
        num_layers=rng.choice([8, 16]),
        linear_sec=1.0,
        linear_sec_per_row=rng.choice([0, 0.01]),
        device_attention_sec=rng.choice([0.05, 0.5, 2.0]),
        host_row_sec=rng.choice([0.02, 0.1, 0.3]),
        host_job_sec=rng.choice([0, 0.05]),
        transfer_sec=rng.choice([0, 0.3]),
        head_sec=rng.choice([0, 2.0]),
        stage_sec=rng.choice([0, 0.01]),
    )
    return times, rng.choice([1, 4, 16, 64]), rng.choice([2, 8, 30, 100])


@pytest.mark.parametrize("name", POLICIES)
def test_predictions_agree_with_what_the_loop_does(name):
    make_policy, predict = POLICIES[name]
    rng = random.Random(name)
    errors = []
    for _ in range(8):
        times, device_rows, host_rows = draw(rng)
        policy = make_policy(times)
        played = steady_state(
            times,
            policy,
            device_rows=device_rows,
            host_rows=host_rows if policy.max_cohorts else 0,
            num_rounds=3,
            layers_per_program=SPAN,
        )
        demand = Demand(device_rows, 100 * device_rows, host_rows, 100)
        predicted = predict(Predictor(times, SPAN), demand)
        errors.append(abs(predicted.rate / played.rate - 1))
    assert statistics.median(errors) < 0.03
    assert sorted(errors)[-2] < 0.15


@pytest.mark.parametrize(("cohorts", "passes"), [(1, None), (2, 1), (2, 2), (2, 4), (3, 1)])
def test_a_rehearsal_agrees_with_what_the_loop_does(cohorts, passes):
    rng = random.Random(f"{cohorts} {passes}")
    for _ in range(4):
        times, device_rows, host_rows = draw(rng)
        is_spread = passes == 1 and cohorts > 1
        played = frozen_state(
            times,
            Merging(cohorts, passes, is_spread=is_spread),
            device_lengths=[100] * device_rows,
            host_lengths=[100] * host_rows,
            layers_per_program=SPAN,
        )
        demand = Demand(device_rows, 100 * device_rows, host_rows, 100)
        choice = Choice("merging", cohorts, passes, 512)
        seen = Predictor(times, SPAN).rehearsed(demand, choice)
        assert seen.rate == pytest.approx(played.rate, rel=0.03)
        assert seen.host_rows == host_rows


def test_rates_add_up():
    predictor = Predictor(TIMES, SPAN)
    demand = Demand(device_rows=4, device_tokens=400, host_rows=60, host_row_tokens=100)
    alone = predictor.device_only(demand)
    assert alone.choice == DEVICE_ONLY
    assert alone.rate == pytest.approx(4 / (8 * 1.5))
    assert alone.host_tpot_sec is None
    merged = predictor.merging(demand, Choice("merging", 2, 1, 30))
    assert merged.host_rows == 60
    assert merged.host_tpot_sec == pytest.approx(9 * merged.sweep_sec)
    assert merged.host_busy == pytest.approx(2 * 3.0 * 8 / 9 / merged.sweep_sec, rel=0.01)


def test_prompts_make_a_sweep_longer_and_leave_the_host_more_time():
    predictor = Predictor(TIMES, SPAN)
    demand = Demand(device_rows=4, device_tokens=400, host_rows=300, host_row_tokens=100)
    choice = Choice("merging", 2, 1, 150)
    quiet = predictor.merging(demand, choice)
    prompts = predictor.merging(demand._replace(prompt_sec=30.0), choice)
    assert prompts.sweep_sec == pytest.approx(quiet.sweep_sec + 30.0, rel=0.01)
    assert prompts.device_rate < quiet.device_rate


def test_rows_that_fit_a_window():
    predictor = Predictor(TIMES, SPAN)
    demand = Demand(4, 400, host_rows=50, host_row_tokens=100)
    assert predictor.rows_within(2.05, demand) == 20
    assert predictor.rows_within(0.05, demand) == 0
    assert predictor.rows_within(1e6, demand) == 50


def test_a_busy_host_slows_the_device_where_they_share_cores():
    shared = StageTimes(**{**vars(TIMES), "device_slowdown": 1.5, "host_slowdown": 2.0})
    demand = Demand(device_rows=4, device_tokens=400, host_rows=60, host_row_tokens=100)
    choice = Choice("merging", 2, 1, 30)
    alone, together = Predictor(TIMES, SPAN), Predictor(shared, SPAN)
    assert together.device_only(demand) == alone.device_only(demand)
    slowed = together.merging(demand, choice)
    assert slowed.host_busy > 0.5
    expected = alone.merging(demand, choice).sweep_sec * (1 + 0.5 * slowed.host_busy)
    assert slowed.sweep_sec == pytest.approx(expected, rel=0.01)


def test_python_may_be_what_takes_longest():
    times = StageTimes(**{**vars(TIMES), "dispatch_sec": 10.0})
    assert Predictor(times, SPAN).device_only(Demand(4, 400)).sweep_sec == pytest.approx(4 * 10.0)
