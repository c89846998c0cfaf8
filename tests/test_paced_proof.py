"""Bounds on described cards: what is judged to be kept, and by which numbers."""

import json
from types import SimpleNamespace

import pytest

from launch import paced_proof
from launch.paced_proof import judge

BASE = {"device_rows": 7, "host_rows": 48, "host_busy_percent": 50.0, "device_idle_percent": 1.0}


def turn(strategy, repeat, rate, sweep_sec=1.0, **others):
    return BASE | {
        "strategy": strategy,
        "repeat": repeat,
        "tokens_per_sec": rate,
        "sweep_sec": sweep_sec,
        **others,
    }


def played(strategy, rate, arithmetic):
    return {
        "strategy": strategy,
        "tokens_per_sec": rate,
        "arithmetic_tokens_per_sec": arithmetic,
    }


def test_medians_are_held_to_the_bounds():
    turns = [turn("device_only", repeat, 96.0 + repeat, 1.0 + repeat) for repeat in range(3)]
    turns += [turn("staggered", repeat, 120.0, 1.02 * (1 + repeat)) for repeat in range(3)]
    predictions = [played("device_only", 100.0, 100.0), played("staggered", 121.0, 126.0)]
    device_only, staggered = judge("t4", turns, predictions)
    assert device_only["tokens_per_sec"] == {"median": 97.0, "min": 96.0, "max": 98.0}
    assert device_only["kept"] == {
        "predicted": True,
        "arithmetic": None,
        "idle": None,
        "sweep": None,
    }
    # Of each turn the sweep of the same turn's device_only.
    assert staggered["sweep_over_device_only"]["median"] == pytest.approx(1.02)
    assert staggered["over_arithmetic"]["median"] == pytest.approx(120 / 126)
    assert staggered["kept"] == dict.fromkeys(("predicted", "arithmetic", "idle", "sweep"), True)


@pytest.mark.parametrize(
    ("changed", "missed"),
    [
        ({"rate": 94.0}, {"predicted", "arithmetic"}),
        ({"rate": 106.0}, {"predicted"}),
        ({"rate": 97.0, "device_idle_percent": 2.5}, {"idle"}),
        ({"rate": 97.0, "sweep_sec": 1.04}, {"sweep"}),
        ({"rate": 97.0, "repeat": 1}, {"sweep"}),  # device_only has no such turn
    ],
)
def test_each_bound_can_be_missed(changed, missed):
    own = turn(**({"strategy": "async_overlap", "repeat": 0} | changed))
    predictions = [played("async_overlap", 100.0, 100.0)]
    (row,) = judge("t4", [turn("device_only", 0, 1.0), own], predictions)
    assert {name for name, one in row["kept"].items() if not one} == missed


def test_who_chooses_is_held_to_the_best_of_the_others():
    predictions = [played("device_only", 80.0, 100.0), played("apex", 90.0, None)]
    (row,) = judge("t4", [turn("apex", 0, 90.0)], predictions)
    assert row["arithmetic_tokens_per_sec"] == 100.0
    assert row["kept"]["arithmetic"] is False


def test_a_card_that_fails_leaves_the_others(tmp_path, monkeypatch):
    def measure(card, path, smoke):
        if card == "t4":
            raise RuntimeError("launch.bench_paced ended with status -9 and no file")
        path.touch()
        facts = {"device": {"name": card}, "model": {}, "sizes": "", "failed": {}, "left_out": {}}
        turns = [turn(name, 0, 100.0) for name in paced_proof.STRATEGIES]
        predictions = [played(name, 100.0, 100.0) for name in paced_proof.STRATEGIES]
        return facts | {"groups": {"turns": turns, "predictions": predictions}}

    monkeypatch.setattr(paced_proof, "measure", measure)
    path = tmp_path / "proof.json"
    values = SimpleNamespace(output=str(path), smoke=False, card=["t4", "a10"])
    monkeypatch.setattr(paced_proof, "flags", SimpleNamespace(FLAGS=values))
    assert paced_proof.main([]) == 1
    content = json.loads(path.read_text())
    assert content["failed"] == {
        "bounds_t4": "RuntimeError: launch.bench_paced ended with status -9 and no file"
    }
    names = [row["strategy"] for row in content["groups"]["bounds_a10"]]
    assert names == list(paced_proof.STRATEGIES)
    assert content["groups"]["bounds_t4"] == []
    assert list(tmp_path.iterdir()) == [path]
    values.card = ["a10"]
    assert paced_proof.main([]) == 0
