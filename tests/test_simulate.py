"""The simulate scripts: tiny runs, what they refuse, drawn workloads, and arrivals."""

import csv
import json
import random
import statistics
from types import SimpleNamespace

import pytest

from apex_jax.config import ConfigError
from apex_jax.cost_model import StageTimes
from apex_jax.policies import DeviceOnly
from apex_jax.request import RequestError
from apex_jax.simulation import Simulation, frozen_state, steady_state
from launch import simulate, simulate_grid, simulate_jobs, simulate_paper
from launch.conditions import (
    ALL_STRATEGIES,
    Condition,
    architecture,
    device_profile,
    host_profile,
    place,
    play_job,
    policy_of,
    settings_of,
)
from launch.plot_rates import draw_rates
from launch.workloads import Lengths, draw_trace, draw_uniform, poisson_arrivals, traces

pytestmark = [
    pytest.mark.usefixtures("without_annotations_checked"),
    pytest.mark.main_python,
]

TIMES = StageTimes(num_layers=4, linear_sec=1.0, device_attention_sec=0.5, host_row_sec=0.1)
T4 = Condition("t4", "paper_t4", "llama_2_7b", prompt_tokens=200, output_tokens=20)


def values(**others):
    given = {
        "device": ["t4"],
        "host": ["paper_t4"],
        "model": ["llama_2_7b"],
        "kv_gib": [],
        "kv_tokens": [],
        "host_gib": [],
        "host_bandwidth_scale": ["1"],
        "prompt_tokens": [],
        "output_tokens": [],
        "workload": "uniform",
        "strategies": ["device_only", "apex"],
        "num_requests": None,
        "request_rate": None,
        "max_prefill_tokens": 512,
        "seed": 0,
    }
    return SimpleNamespace(**(given | others))


def rows_of(given):
    return [row for one in simulate.conditions(given) for row in simulate.play(one, given)]


# Arrivals


def make(num_pages=64):
    return Simulation(TIMES, DeviceOnly(), num_pages=num_pages, layers_per_program=2)


def test_the_clock_idles_until_somebody_arrives():
    simulation = make()
    simulation.submit_at(100.0, 8, 2)
    simulation.submit_at(1000.0, 8, 2)
    assert not simulation.is_idle
    simulation.run()
    first, second = simulation.outputs
    assert (first.arrival_sec, second.arrival_sec) == (100.0, 1000.0)
    assert first.ttft_sec == pytest.approx(second.ttft_sec)
    assert 100 < first.finish_sec < 200 < 1000 < second.finish_sec


def test_who_arrives_during_a_sweep_waits_from_then_on():
    simulation = make()
    simulation.submit_at(0.0, 8, 20)
    simulation.submit_at(1.0, 8, 2)
    simulation.run()
    late = next(one for one in simulation.outputs if one.request.request_id == "1")
    assert late.arrival_sec == 1.0
    assert late.ttft_sec > 5  # the sweep under way, and its own


def test_who_could_never_run_is_refused_on_arrival():
    simulation = make(num_pages=2)
    simulation.submit_at(5.0, 100, 2)
    with pytest.raises(RequestError, match=r"prompt \(100 tokens\) plus max_tokens \(2\)"):
        simulation.step()


def test_a_frozen_load_yields_what_the_scheduler_fills_the_lanes_with():
    for name in ("device_only", "async_overlap", "staggered_2", "asymmetric_pipelining"):
        policy = policy_of(name, TIMES)
        host_rows = 8 if policy.max_cohorts else 0
        played = steady_state(TIMES, policy, device_rows=4, host_rows=host_rows, num_rounds=4)
        frozen = frozen_state(
            TIMES, policy_of(name, TIMES), device_lengths=[16] * 4, host_lengths=[16] * 8
        )
        assert frozen.rate == pytest.approx(played.rate, rel=0.02), name


# Workloads


@pytest.mark.parametrize("name", ["azure_conv", "azure_code", "osc"])
def test_drawn_lengths_have_the_means_that_were_published(name):
    trace = traces()[name]
    drawn = draw_trace(name, 20_000, 10**6, random.Random(0))
    prompts, outputs = zip(*drawn.requests, strict=True)
    assert statistics.fmean(prompts) == pytest.approx(trace["mean_prompt_tokens"], rel=0.03)
    assert statistics.fmean(outputs) == pytest.approx(trace["mean_output_tokens"], rel=0.05)
    assert statistics.median(prompts) == pytest.approx(trace["prompt_tokens"][50], rel=0.03)
    assert drawn.share_dropped == 0
    assert ("CC-BY" in trace["source"]) == name.startswith("azure")


def test_published_means_are_those_that_this_project_goes_by():
    means = {
        name: (trace["mean_prompt_tokens"], trace["mean_output_tokens"])
        for name, trace in traces().items()
    }
    assert means == {
        "azure_conv": (1154.7, 211.1),
        "azure_code": (2047.8, 27.9),
        "osc": (372.5, 45.3),
    }


def test_uniform_lengths_lie_within_a_tenth():
    drawn = draw_uniform(Lengths(1000, 50), 500, 10_000, random.Random(0))
    prompts, outputs = zip(*drawn.requests, strict=True)
    assert 900 <= min(prompts) < 920
    assert 1080 < max(prompts) <= 1100
    assert {min(outputs), max(outputs)} == {45, 55}


def test_who_is_too_long_is_left_out_and_counted():
    drawn = draw_trace("azure_conv", 200, 1000, random.Random(0))
    assert len(drawn.requests) == 200
    assert max(map(sum, drawn.requests)) <= 1000
    assert 0.4 < drawn.share_dropped < 0.7
    with pytest.raises(ConfigError, match="hardly any request of the workload has at most 10 "):
        draw_uniform(Lengths(1000, 50), 5, 10, random.Random(0))


def test_arrivals_have_the_rate_that_was_asked_for():
    arrivals_sec = poisson_arrivals(5000, 2.0, random.Random(0))
    assert arrivals_sec == sorted(arrivals_sec)
    assert arrivals_sec[-1] == pytest.approx(2500, rel=0.05)


# Names, and what cannot be


def test_unknown_names_get_one_message():
    with pytest.raises(ConfigError, match="no device is called 't5'; there are t4, a10, "):
        device_profile("t5")
    with pytest.raises(ConfigError, match="no host is called 'mine'; there are epyc_1_thread, "):
        host_profile("mine")
    with pytest.raises(ConfigError, match="no model is called 'llama_9'; there are llama_2_7b, "):
        architecture("llama_9")
    with pytest.raises(ConfigError, match="no strategy is called 'apex_3'; there are apex, "):
        settings_of("apex_3")
    with pytest.raises(ConfigError, match="no workload is called 'mine'; there are uniform, azure"):
        draw_trace("mine", 1, 100, random.Random(0))
    assert settings_of("passes_4").passes == 4
    assert settings_of("staggered_3").cohorts == 3


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"model": "llama_3_1_8b"}, "NVIDIA T4 .* cannot hold 14.96 GiB of weights"),
        ({"kv_bytes": 2**33}, "has 0.95 GiB for KV cache beside llama_2_7b, fewer than the 8.00"),
        ({"host_bytes": 2**40}, "paper_t4 has 180 GiB of memory, fewer than the 1024 GiB"),
        ({"prompt_tokens": 9000}, "llama_2_7b reaches 4096 tokens, fewer than a request's 9020"),
        ({"kv_bytes": 2**26}, "0.06 GiB of KV cache on NVIDIA T4 hold 128 tokens"),
    ],
)
def test_a_condition_that_cannot_be_says_why(changed, message):
    with pytest.raises(ConfigError, match=message):
        place(Condition(**{**vars(T4), **changed}))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"kv_gib": ["1"], "kv_tokens": ["500"]}, "--kv_gib and --kv_tokens both say"),
        ({"kv_gib": ["x"]}, "--kv_gib: 'x' is no number"),
        ({"host_bandwidth_scale": ["0"]}, "--host_bandwidth_scale: 0 must be above 0"),
        ({"workload": "osc"}, "a published --workload is a whole job: give --num_requests"),
        (
            {"workload": "osc", "num_requests": 2, "prompt_tokens": ["9"]},
            "--prompt_tokens and --output_tokens are those of --workload=uniform",
        ),
    ],
)
def test_flags_that_contradict_each_other_are_refused(given, message):
    with pytest.raises(ConfigError, match=message):
        simulate.conditions(values(**given))


# Runs


def test_every_combination_is_a_condition():
    given = values(device=["t4", "a10"], kv_tokens=["500", "600"], output_tokens=["20", "40"])
    conditions = simulate.conditions(given)
    assert len(set(conditions)) == len(conditions) == 8


def test_a_steady_run_is_a_table_and_says_what_cannot_be(tmp_path):
    rows = rows_of(values(model=["llama_2_7b", "llama_3_1_8b"], host_gib=["20"]))
    path = tmp_path / "there" / "run.csv"
    simulate.write(path, rows)
    read = list(csv.DictReader(path.read_text().splitlines()))
    assert tuple(read[0]) == simulate.COLUMNS
    assert [row["strategy"] for row in read] == ["device_only", "apex", ""]
    assert float(read[1]["to_device_only"]) > 1.5
    assert float(read[1]["host_share"]) > 0.3
    assert read[1]["choice"]
    assert "cannot hold" in read[2]["reason"]
    assert "cannot hold" in simulate.table(rows)
    assert json.loads(path.with_suffix(".json").read_text())["environment"]["command"]
    picture = draw_rates(rows)
    assert picture.count("<rect") == 3  # the background, and a bar for each strategy
    assert "cannot hold" in picture


def test_a_job_is_the_same_again_and_another_with_another_seed():
    given = {"workload": "osc", "num_requests": 8, "request_rate": 0.5, "kv_tokens": ["864"]}
    first, again, other = (rows_of(values(**given, seed=seed)) for seed in (3, 3, 4))
    assert first == again
    assert [row["rate"] for row in first] != [row["rate"] for row in other]
    assert all(row["ttft_sec"] > 0 and row["share_dropped"] == 0 for row in first)


def test_every_strategy_ends_a_job():
    found = place(T4)
    requests = [Lengths(200, 20)] * 12
    for name in ALL_STRATEGIES:
        job = play_job(found, policy_of(name, found.times), requests)
        assert job.rate * job.seconds == pytest.approx(12 * 20), name
        if name != "apex":  # which need not use the host for so few
            assert (job.host_share > 0) == (name != "device_only"), name


def test_the_grid_is_drawn_by_seed_and_summarized():
    conditions = simulate_grid.draw(500, seed=0)
    assert len(set(conditions)) == 500
    assert simulate_grid.draw(500, seed=0) == conditions != simulate_grid.draw(500, seed=1)
    small = [one for one in conditions if one.model == "llama_3_2_3b" and one.prompt_tokens > 4000]
    rows = [simulate_grid.play(condition)[0] for condition in small[:2]]
    assert simulate_grid.play(small[0])[0] == rows[0]
    summary = simulate_grid.summarize(rows)
    assert summary["to_device_only"]["min"] == min(row["to_device_only"] for row in rows)
    assert "2 conditions" in simulate_grid.describe(summary, rows)
    assert simulate_grid.draw_grid(rows).count("<rect") >= 3


# The worst of many: a slow host and long prompts, few rows at once, short outputs, everybody nearly
# fits. Each was below 0.9 when a host lane's moves and prompts counted for nothing.
@pytest.mark.parametrize(
    ("device", "model", "kv_gib", "scale", "prompt", "output", "num_requests"),
    [
        ("a10", "llama_3_1_8b", 3.22, 0.02, 1000, 100, 100),
        ("h100", "llama_3_1_8b", 2.0, 0.1, 4000, 50, 60),
        ("rtx_4090", "llama_3_1_8b", 1.0, 0.05, 2500, 50, 60),
        ("a100_40gb", "llama_3_1_8b", 4.0, 1.0, 300, 50, 100),
    ],
)
def test_whole_jobs_are_not_below_device_only(
    device, model, kv_gib, scale, prompt, output, num_requests
):
    where = Condition(
        device,
        simulate_jobs.HOST,
        model,
        prompt,
        output,
        kv_bytes=int(kv_gib * 2**30),
        host_bandwidth_scale=scale,
    )
    row = simulate_jobs.play(simulate_jobs.JobCondition(where, num_requests))
    assert row["to_device_only"] >= 0.98


def test_jobs_are_drawn_by_seed_and_summarized():
    conditions = simulate_jobs.draw(200, seed=0)
    assert len(set(conditions)) == 200
    assert simulate_jobs.draw(200, seed=0) == conditions != simulate_jobs.draw(200, seed=1)
    shortest = min(conditions, key=lambda one: one.num_requests * one.where.output_tokens)
    rows = [simulate_jobs.play(shortest)]
    summary = simulate_jobs.summarize(rows)
    assert summary["min"] == summary["max"] == rows[0]["to_device_only"]
    assert f"{shortest.num_requests} requests" in simulate_jobs.describe(summary, rows)


def test_the_bandwidth_for_a_gain_is_found_where_there_is_one():
    found = simulate_paper.find_scale(lambda scale: 1 + scale, 1.25)
    assert found == pytest.approx(0.25, rel=0.05)
    assert simulate_paper.find_scale(lambda scale: 1 + scale, 9.0) is None
    assert simulate_paper.find_scale(lambda scale: 2 + scale, 1.5) is None


def test_the_papers_page_says_what_the_host_could_supply():
    case = simulate_paper.cases()[0]
    row = {
        "title": case.title,
        "published": case.published,
        "gains": dict.fromkeys(simulate_paper.STRATEGIES, 3.0),
        "host_gb_per_sec": 200.0,
        "host_gb_per_sec_that_reproduces": [10.0, 20.0],
    }
    page = simulate_paper.page([row], 5)
    assert "yes: at most 10% of what the op would reach there" in page
    assert f"the gain is above the published one: {case.title}." in page
    missing = {**row, "host_gb_per_sec_that_reproduces": [None, 300.0]}
    assert "not all" in simulate_paper.verdict(missing)
    assert "the lower end is not reproduced at any" in simulate_paper.verdict(missing)
    neither = {**row, "host_gb_per_sec_that_reproduces": [None, None]}
    assert simulate_paper.verdict(neither) == "no bandwidth reproduces them"
