"""Forecasts: lanes filled by arithmetic, and which resource is said to bind."""

import pytest

from apex_jax.config import STRATEGIES, SchedulerConfig
from apex_jax.cost_model import StageTimes
from apex_jax.forecast import Forecast, Job, Room, describe, forecast
from apex_jax.prediction import Demand, Predictor

TIMES = StageTimes(
    num_layers=32,
    linear_sec=1e-3,
    linear_sec_per_row=1e-6,
    device_attention_sec_per_token=1e-7,
    host_attention_sec_per_token=1e-6,
    head_sec=1e-3,
)
ROOM = Room(device_tokens=4400, device_requests=64, host_tokens=100_000, host_requests=512)
JOB = Job(num_requests=1000, prompt_tokens=300, output_tokens=200)  # 400 tokens on average


def ask(strategy, room=ROOM, job=JOB, times=TIMES, **settings):
    return forecast(strategy, SchedulerConfig(**settings), times, 4, room, job)


def test_lanes_hold_what_their_tokens_allow():
    alone = ask("device_only")
    assert (alone.device_rows, alone.host_rows, alone.host_share) == (11, 0, 0)
    assert alone.limit == "device memory"
    merged = ask("async_overlap")
    assert (merged.device_rows, merged.host_rows) == (11, 250)
    assert merged.rate > alone.rate
    assert merged.host_tpot_sec > merged.device_tpot_sec


def test_prompts_take_their_time():
    demand = Demand(device_rows=11, device_tokens=4400)
    decoding = Predictor(TIMES, 4).device_only(demand)
    forecasted = ask("device_only")
    prefill_sec = 32 * (1e-3 + 300 * 301 // 2 * 0) / 200  # a prompt's, per output token
    assert 1 / forecasted.rate == pytest.approx(1 / decoding.rate + prefill_sec, rel=0.02)


@pytest.mark.parametrize(
    ("strategy", "room", "job", "limit"),
    [
        ("device_only", ROOM, JOB._replace(num_requests=8), "queue"),
        ("staggered", ROOM, JOB._replace(num_requests=40), "queue"),
        ("staggered", ROOM._replace(host_tokens=8000), JOB, "host memory"),
        ("staggered", ROOM._replace(host_requests=20), JOB, "max_host_requests"),
        ("staggered", ROOM._replace(host_tokens=10**7), JOB, "host bandwidth"),
    ],
)
def test_what_binds_is_named(strategy, room, job, limit):
    assert ask(strategy, room, job).limit == limit


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_every_strategy_has_a_forecast(strategy):
    forecasted = ask(strategy)
    assert forecasted.rate > 0
    # Pipelining would not pay here: the host is too slow for so few device rows.
    assert (forecasted.host_share > 0) == (strategy not in ("device_only", "asymmetric_pipelining"))
    assert (forecasted.device_rows == 0) == (strategy == "full_offload")


def test_apex_is_never_behind():
    rates = {strategy: ask(strategy).rate for strategy in STRATEGIES}
    assert rates["apex"] >= 0.98 * max(rates.values())


def test_a_bound_on_the_host_s_time_per_token_counts():
    free = ask("apex")
    held = ask("apex", max_host_tpot_sec=free.host_tpot_sec / 3)
    assert held.rate < free.rate
    assert held.host_tpot_sec is None or held.host_tpot_sec <= free.host_tpot_sec / 3


def test_the_table_has_a_line_for_each():
    lines = describe([ask("device_only"), ask("apex")]).splitlines()
    assert [line.split()[0] for line in lines] == ["strategy", "device_only", "apex"]
    assert lines[1].endswith("device memory")
    assert " - " in lines[1]  # nobody on the host
    assert isinstance(ask("apex"), Forecast)
