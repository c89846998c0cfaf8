"""Strategies that choose: what they choose, when they change, and that it pays."""

import random
from dataclasses import replace

import pytest

from apex_jax.adaptive import MIN_SWEEPS, Apex, ApexPaper
from apex_jax.candidates import TpotBounds
from apex_jax.cost_model import StageTimes
from apex_jax.monitor import StageMonitor
from apex_jax.pipelining import AsymmetricPipelining
from apex_jax.policies import DeviceOnly, Load, Merging, Waiting
from apex_jax.simulation import Simulation, steady_state

pytestmark = [
    pytest.mark.usefixtures("without_annotations_checked"),
    pytest.mark.main_python,
]

SPAN = 4
TIMES = StageTimes(num_layers=32, linear_sec=1.0, device_attention_sec=0.5, host_row_sec=0.1)


def load(device_rows, host_rows, waiting=0, **others):
    return Load(
        num_rows=device_rows,
        num_tokens=100 * device_rows,
        num_settled_rows=device_rows,
        num_settled_tokens=100 * device_rows,
        waiting=Waiting(waiting, 100.0, 1000.0, 128.0),
        lengths=[100] * host_rows,
        idle_cohorts=[0, 1, 2],
        max_rows=512,
        **others,
    )


def decided(policy, seen):
    policy.consider(seen)
    return policy.decision


def test_nobody_on_the_host_is_nothing_to_decide():
    policy = Apex(TIMES, SPAN)
    decision = decided(policy, load(4, 0))
    assert decision.best.choice.name == "device_only"
    assert decision.reason == "no requests in the host lane"
    assert policy.form(load(4, 0)) == {}


def test_many_host_rows_merge_in_cohorts_that_fit_their_window():
    policy = Apex(TIMES, SPAN)
    decision = decided(policy, load(4, 1000))
    assert decision.best.choice.name == "merging"
    window_sec = 32 * 1.5
    rows = sum(len(members) for members in policy.form(load(4, 1000)).values())
    assert 0.9 * window_sec < rows * TIMES.host_row_sec
    assert decision.best.rate > 1.5 * decision.device_only.rate
    assert decision.best.rate == max(one.rate for one in (decision.best, *decision.alternatives))


def test_few_host_rows_are_worth_passes_of_their_own():
    decision = decided(Apex(TIMES, SPAN), load(4, 8))
    assert decision.best.choice.passes != 1


def test_a_host_that_does_not_pay_is_left_alone_and_gets_nobody_more():
    slow = StageTimes(**{**vars(TIMES), "host_row_sec": 500.0})
    policy = Apex(slow, SPAN)
    decision = decided(policy, load(64, 4, waiting=10))
    assert decision.best.choice.name == "device_only"
    assert decision.reason == "the host lane would yield no more"
    assert policy.form(load(64, 4)) == {}
    assert policy.max_host_rows == 0


def test_no_more_are_let_in_than_yield_something():
    policy = Apex(TIMES, SPAN)
    policy.consider(load(4, 0, waiting=100_000))
    assert policy.max_host_rows is not None
    saturating = 32 * 1.5 / TIMES.host_row_sec
    assert 0.9 * saturating < policy.max_host_rows < 3 * saturating


def test_a_bound_on_the_time_per_token_is_kept():
    free = decided(Apex(TIMES, SPAN), load(4, 480)).best
    assert free.host_tpot_sec is not None
    bound_sec = free.host_tpot_sec / 4
    held = decided(Apex(TIMES, SPAN, TpotBounds(host_sec=bound_sec)), load(4, 480)).best
    assert held.host_tpot_sec is not None
    assert held.host_tpot_sec <= bound_sec
    assert held.rate < free.rate
    impossible = decided(Apex(TIMES, SPAN, TpotBounds(host_sec=1e-9)), load(4, 480)).best
    assert impossible.choice.name == "device_only"


def test_a_bound_on_the_device_s_time_per_token_is_kept():
    free = decided(Apex(TIMES, SPAN), load(4, 8)).best
    alone_sec = 32 * 1.5
    bound_sec = (alone_sec + free.sweep_sec) / 2
    held = decided(Apex(TIMES, SPAN, TpotBounds(device_sec=bound_sec)), load(4, 8)).best
    assert alone_sec <= held.sweep_sec <= bound_sec < free.sweep_sec
    # Nothing is faster than the device by itself.
    impossible = decided(Apex(TIMES, SPAN, TpotBounds(device_sec=1e-9)), load(4, 8)).best
    assert impossible.choice.name == "device_only"


def test_it_stays_with_what_is_about_as_good():
    policy = Apex(TIMES, SPAN)
    first = decided(policy, load(4, 100)).best.choice
    for extra in range(4 * MIN_SWEEPS):
        assert decided(policy, load(4, 100 + extra % 2)).best.choice[:3] == first[:3]


def test_tokens_under_way_end_where_the_host_is_left_alone():
    policy = Apex(TIMES, SPAN)
    policy.consider(load(4, 0, num_under_way=0))
    assert policy.passes == 1  # they merge, and cost nothing


def test_rows_that_the_device_has_room_for_are_hurried_home():
    policy = Apex(TIMES, SPAN)
    policy.consider(load(8, 100))
    assert decided(policy, load(8, 100, num_homing=1)).best.choice.name == "merging"
    decision = decided(policy, load(8, 100, num_homing=60))
    assert decision.best.choice.name == "homing"
    assert policy.form(load(8, 100)) == {}
    assert policy.passes is None
    assert not policy.drops_tokens
    # And what was in force before is taken up again.
    assert decided(policy, load(8, 100)).best.choice.name == "merging"
    assert policy.form(load(8, 100))


def test_tokens_that_would_keep_rows_from_home_for_long_are_given_up():
    policy = Apex(replace(TIMES, host_row_sec=10.0), SPAN)
    policy.consider(load(8, 10))
    policy.consider(load(8, 4, num_homing=4, num_under_way=6, num_tokens_under_way=600))
    assert policy.drops_tokens
    policy.consider(load(8, 10))
    assert not policy.drops_tokens


def test_who_gets_more_from_the_device_than_the_way_to_the_host_costs_stays_away():
    """Copies as dear as the prompt many times over, for few tokens; then for many."""
    dear = replace(TIMES, host_copy_sec_per_token=1.0, host_row_sec=1.0)
    seen = load(4, 0, waiting=100)
    for output_tokens, pays in ((4.0, False), (4000.0, True)):
        policy = Apex(dear, SPAN)
        waiting = seen.waiting._replace(output_tokens=output_tokens)
        policy.consider(replace(seen, waiting=waiting))
        assert (policy.max_host_rows > 0) == pays
        assert policy.keeps_host_rows == pays


def test_the_paper_s_rule_lets_everybody_ride_where_the_device_has_no_rows():
    policy = ApexPaper(TIMES, SPAN)
    assert decided(policy, load(0, 60)).best.choice.cohort_rows == 60


@pytest.mark.parametrize("ratio", [0.5, 0.8, 1.25, 2.0])
def test_the_paper_s_rule_is_equation_6(ratio):
    linear_sec, attention_sec, rows = 1.0, 0.5, 16
    limit = 2 * linear_sec / attention_sec + 3 + attention_sec / linear_sec
    host_row_sec = ratio * limit * attention_sec / rows
    policy = ApexPaper(StageTimes(**{**vars(TIMES), "host_row_sec": host_row_sec}), SPAN)
    decision = decided(policy, load(rows, 500))
    assert (decision.best.choice.name == "pipelining") == (ratio < 1)
    assert "equation 6" in decision.reason


def test_the_paper_s_rule_leaves_few_requests_alone():
    decision = decided(ApexPaper(TIMES, SPAN, min_host_rows=8), load(16, 7))
    assert decision.best.choice.name == "device_only"
    assert decision.reason == "fewer than 8 requests in the host lane"


def test_prompts_give_pipelining_more_to_hide_behind():
    # Between equation 6 and its form with a prompt in the sweep.
    policy = ApexPaper(
        StageTimes(**{**vars(TIMES), "linear_sec_per_row": 0.01, "host_row_sec": 0.3}), SPAN
    )
    assert decided(policy, load(16, 500)).best.choice.name == "merging"
    with_prompt = decided(policy, load(16, 500, num_prompt_tokens=512))
    assert with_prompt.best.choice.name == "pipelining"


@pytest.mark.parametrize("seed", range(24))
def test_it_is_as_good_as_the_best_fixed_strategy(seed):
    """98 %, of drawn conditions; docs/results/grid.json has many more."""
    rng = random.Random(1000 + seed)
    times = StageTimes(
        num_layers=12,
        linear_sec=1.0,
        linear_sec_per_row=rng.choice([0, 0.005]),
        device_attention_sec=rng.choice([0.05, 0.2, 0.5, 1.0]),
        host_row_sec=rng.choice([0.02, 0.1, 0.4]),
        host_job_sec=rng.choice([0, 0.05]),
        transfer_sec=rng.choice([0, 0.05, 0.2]),
        head_sec=1.0,
    )
    device_rows, host_rows = rng.choice([2, 6, 24]), rng.choice([4, 16, 48])
    fixed = [
        DeviceOnly(),
        Merging(),
        Merging(2, is_spread=True),
        Merging(2, passes=3),
        AsymmetricPipelining(times),
    ]

    def rate(policy):
        return steady_state(
            times,
            policy,
            device_rows=device_rows,
            host_rows=host_rows if policy.max_cohorts else 0,
            num_rounds=3,
            layers_per_program=SPAN,
        ).rate

    rates = [rate(policy) for policy in fixed]
    chosen = rate(Apex(times, SPAN))
    assert chosen >= 0.98 * rates[0]
    assert chosen >= 0.95 * max(rates)


def play_job(policy, requests, *, num_pages=8):
    """Play requests of (prompt, output) tokens to their end; returns the simulation."""
    simulation = Simulation(
        replace(TIMES, num_layers=8),
        policy,
        num_pages=num_pages,
        num_host_pages=200,
        max_model_len=1024,
        max_requests=8,
        max_host_requests=16,
    )
    for prompt_tokens, output_tokens in requests:
        simulation.submit(prompt_tokens, output_tokens)
    simulation.run()
    assert len(simulation.outputs) == len(requests)
    return simulation


def test_whom_only_the_host_can_hold_it_serves_whether_that_pays_or_not():
    slow = replace(TIMES, num_layers=8, host_row_sec=500.0)
    policy = Apex(slow, SPAN)
    simulation = play_job(policy, [(30, 40), (30, 40), (300, 30)])
    assert simulation.scheduler.stats.num_host_tokens >= 29  # all but the prompt's own
    assert policy.max_host_rows == 0


def test_a_job_s_end_does_not_wait_for_tokens_under_way():
    """With merges alone a row has to wait nine sweeps until it may change lanes."""
    times = replace(TIMES, num_layers=8, host_row_sec=0.05)
    requests = [(20, 40)] * 16
    chosen = play_job(Apex(times, SPAN), requests, num_pages=36)
    merged = play_job(Merging(), requests, num_pages=36)
    assert chosen.dispatch.stats.num_moves  # somebody came home
    assert chosen.backend.now() < 0.9 * merged.backend.now()


def drift(*, knows, corrects=True):
    """Play a job whose host op becomes three times as slow half-way; returns rates after that.

    In steps of 20 sweeps. Tokens of the host are counted in layers.
    """
    slowdown = 1.0

    class Drifting(StageTimes):
        def host_attention(self, num_rows, num_tokens):
            return slowdown * super().host_attention(num_rows, num_tokens)

    described = StageTimes(**{**vars(TIMES), "num_layers": 8, "host_row_sec": 0.02})
    times = Drifting(**vars(described))
    monitor = StageMonitor(described, SPAN)
    believed = times if knows else monitor.times if corrects else described
    policy = Apex(believed, SPAN)
    simulation = Simulation(
        times,
        policy,
        num_pages=32,
        num_host_pages=300,
        page_size=2048,
        max_model_len=2048,
        max_requests=16,
        max_host_requests=200,
        monitor=monitor,
    )
    for _ in range(16 + 100):
        simulation.submit(16, 2000)
    for _ in range(100):
        simulation.step()
    slowdown = 3.0
    rates = []
    for _ in range(4):
        begin = progress(simulation)
        for _ in range(20):
            simulation.step()
        seconds, tokens = (b - a for a, b in zip(begin, progress(simulation), strict=True))
        rates.append(tokens / seconds)
    return rates, policy.decision.best.choice, monitor


def progress(simulation):
    stats = simulation.scheduler.stats
    host_tokens = simulation.dispatch.stats.num_host_row_layers / 8
    return simulation.backend.now(), stats.num_output_tokens - stats.num_host_tokens + host_tokens


def test_it_follows_a_host_that_becomes_three_times_as_slow():
    knew, best_choice, _ = drift(knows=True)
    learned, choice, monitor = drift(knows=False)
    blind, _, _ = drift(knows=False, corrects=False)
    assert choice.name == best_choice.name
    assert monitor.correction.factor("host_attention") == pytest.approx(3.0, rel=0.02)
    assert min(learned[1:]) > 0.95 * min(knew[1:])
    assert max(blind[1:]) < 0.95 * min(knew[1:])
