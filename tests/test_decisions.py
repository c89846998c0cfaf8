"""The record of decisions: pairing with what sweeps took, entries, errors."""

import numpy as np
import pytest

from apex_jax.adaptive import Apex
from apex_jax.cost_model import StageTimes
from apex_jax.decisions import DecisionRecord
from apex_jax.plan import DecodeBatch, SweepPlan
from apex_jax.policies import DeviceOnly, Load, Waiting

TIMES = StageTimes(num_layers=8, linear_sec=1.0, host_row_sec=0.1)
DECODE = DecodeBatch(*(np.zeros(1, np.int32) for _ in range(2)), np.zeros((1, 1), np.int32))


def play(record, ends_sec, **plan):
    for sweep_id, end_sec in enumerate(ends_sec):
        record.planned(SweepPlan(sweep_id, **plan))
        record.swept(end_sec)


@pytest.fixture
def policy():
    chosen = Apex(TIMES, 4)
    chosen.consider(
        Load(num_settled_rows=4, num_settled_tokens=400, lengths=[100] * 8, max_rows=64)
    )
    return chosen


def test_each_sweep_has_an_entry_and_only_a_new_decision_its_alternatives(policy):
    record, entries = DecisionRecord(policy, None), []
    record.on_decision = entries.append
    play(record, [1.0, 11.0, 22.0], decode=DECODE)
    assert [entry["sweep"] for entry in entries] == [1, 2]  # the first has none before it
    assert [entry["measured_sweep_sec"] for entry in entries] == [10.0, 11.0]
    assert ["alternatives" in entry for entry in entries] == [True, False]
    assert entries[0]["predicted_rate"] == policy.decision.best.rate


def test_the_error_is_that_of_plain_sweeps(policy):
    record = DecisionRecord(policy, None)
    sweep_sec = policy.decision.best.sweep_sec
    play(record, [0.0, 1.1 * sweep_sec], decode=DECODE)
    assert record.summary()["sweep_error"] == pytest.approx(0.1)


def test_a_decision_without_device_rows_has_no_error():
    policy = Apex(TIMES, 4)
    policy.consider(Load(waiting=Waiting(3)))
    assert policy.decision.best.sweep_sec == 0
    record = DecisionRecord(policy, None)
    play(record, [0.0, 5.0], decode=DECODE)
    assert record.summary() == {}


def test_a_pause_and_a_fixed_strategy_leave_nothing(policy):
    record = DecisionRecord(policy, None)
    play(record, [0.0], decode=DECODE)
    record.rested()
    play(record, [100.0], decode=DECODE)
    assert record.summary() == {}
    fixed = DecisionRecord(DeviceOnly(), None)
    play(fixed, [0.0, 1.0], decode=DECODE)
    assert fixed.summary() == {}
