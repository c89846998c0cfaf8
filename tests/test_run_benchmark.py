"""Benchmarks on described hardware: runs repeat exactly, what fails is a row with its reason."""

import dataclasses
import json
import os
import pathlib
import subprocess
import sys
from types import SimpleNamespace

import pytest

from apex_jax.config import CacheConfig, Config, ConfigError, LlamaConfig, ModelConfig
from apex_jax.cost_model import StageTimes
from apex_jax.paced_engine import PacedPlan
from configs import demo
from launch import run_benchmark
from launch.comparison.results import read_result
from launch.comparison.runs import Benchmark, Turns, serve
from launch.comparison.runs_described import SimulatedHardware
from launch.comparison.workload_file import Workload, WorkloadRequest, write_workload
from launch.strategy_names import settings_of

pytestmark = [
    pytest.mark.usefixtures("without_annotations_checked"),
    pytest.mark.main_python,
]

ROOT = pathlib.Path(__file__).parents[1]
MODEL = LlamaConfig(4, 64, 128, 4, 2, 16, 256, 4096)
PAGE_BYTES = 16 * MODEL.kv_bytes_per_token(2)
HOST_BANDWIDTH = run_benchmark.host_bandwidth
TIMES = StageTimes(num_layers=4, linear_sec=1.0, device_attention_sec=0.5, host_row_sec=0.1)


@pytest.fixture(autouse=True)
def _bandwidth_is_not_measured(monkeypatch):
    monkeypatch.setattr(run_benchmark, "host_bandwidth", lambda: 1e10)


def make_workload(lengths=((40, 6),) * 12, gap_sec=0.0, vocab_size=256):
    requests = [
        WorkloadRequest(str(number), tuple(range(prompt)), output, gap_sec * number)
        for number, (prompt, output) in enumerate(lengths)
    ]
    return Workload.create(
        requests,
        name="test",
        description="of a test",
        seed=3,
        max_model_len=None,
        share_dropped=0.0,
        vocab_size=vocab_size,
        arrivals="as they are",
        source="a test",
    )


def make_config(num_pages=12):
    """Return settings whose device holds three requests of 46 tokens, and a page to grow."""
    config = Config(
        model=ModelConfig(architecture=MODEL),
        cache=CacheConfig(device_bytes=num_pages * PAGE_BYTES, host_bytes=60 * PAGE_BYTES),
    )
    config.scheduler.max_host_requests = 16
    return config


def values(folder, **others):
    given = {
        "workload": str(folder / "w.jsonl"),
        "requests": None,
        "strategies": ["device_only", "async_overlap", "apex"],
        "backend": "simulated",
        "device_profile": "t4",
        "host_profile": "paper_t4",
        "request_rates": ["own"],
        "ttft_sec": None,
        "tpot_sec": None,
        "repeats": None,
        "warm_up_requests": 2,
        "budget_sec": 100.0,
        "output": str(folder / "r.json"),
        "page": None,
    }
    return SimpleNamespace(**(given | others))


def run(folder, made=None, config=None, **others):
    """Return the exit status and what the result file holds."""
    write_workload(folder / "w.jsonl", made or make_workload())
    given = values(folder, **others)
    status = run_benchmark.run(given, config or make_config(), "tiny")
    return status, read_result(pathlib.Path(given.output))


# Simulated runs


def test_simulated_results_are_reproduced_exactly(tmp_path):
    given = {"request_rates": ["own", "1e4"], "ttft_sec": 1e-3, "tpot_sec": 1e-3, "repeats": 2}
    contents = []
    for name in ("first", "second"):
        folder = tmp_path / name
        folder.mkdir()
        status, result = run(folder, **given)
        assert status == 0
        contents.append((result.runs, result.summary, (folder / "r.csv").read_bytes()))
    assert contents[0] == contents[1]
    runs = contents[0][0]
    assert [(one.system, one.request_rate, one.repeat) for one in runs] == [
        (system, rate, repeat)
        for repeat in range(2)
        for rate in (None, 1e4)
        for system in ("device_only", "async_overlap", "apex")
    ]
    for one in runs:
        assert (one.num_requests, one.prompt_tokens, one.output_tokens) == (12, 480, 72)
        assert one.ttft_sec.p99 <= one.e2e_sec.p99
        assert one.goodput_requests_per_sec <= one.num_requests / one.wall_sec
    device_only, async_overlap = runs[:2]
    assert device_only.host_share == 0
    assert async_overlap.host_share > 0.2
    assert device_only.by_lane["host"].num_requests == 0
    assert async_overlap.by_lane["host"].num_requests > 0


def test_the_file_says_what_was_compared(tmp_path):
    _, result = run(tmp_path)
    header = result.header
    assert (header.backend, header.device_profile, header.baseline) == (
        "simulated",
        "t4",
        "device_only",
    )
    assert header.budgets.device_kv_bytes == 12 * PAGE_BYTES
    assert header.budgets.host_kv_bytes <= 60 * PAGE_BYTES
    assert header.settings["max_model_len"] == 46
    assert header.settings["stage_times"]["num_layers"] == 4
    assert header.workload.header == make_workload().header
    assert header.environment["measured"] == {"host_bytes_per_sec_of_one_thread": 1e10}
    assert set(header.environment["git"]) == {"commit", "is_dirty"}
    assert result.summary[0].ratio.median == 1.0


def test_it_is_said_where_no_request_has_to_wait(tmp_path, capsys):
    """Then strategies have nothing to differ in."""
    run(tmp_path, config=make_config(num_pages=100))
    said = capsys.readouterr()
    assert "note: Every request fits on the device at once" in said.err
    assert "Lower --config.cache.device_bytes" in said.err
    assert "**Every request fits" in said.out
    run(tmp_path)
    assert "Every request fits" not in "".join(capsys.readouterr())


def test_the_hosts_bandwidth_is_measured():
    assert 1e8 < HOST_BANDWIDTH(2**22) < 1e14


def test_a_request_that_a_strategy_cannot_hold_is_its_row_and_not_the_others(tmp_path):
    lengths = ((40, 6), (250, 6), (40, 6))  # more than the device's 192 tokens
    status, result = run(tmp_path, make_workload(lengths))
    assert status == 1
    device_only, async_overlap, _ = result.runs
    assert device_only.status == "failed"
    assert "request '1' has 256 tokens, prompt and output, and the KV cache" in device_only.error
    assert "holds 192 here" in device_only.error
    assert async_overlap.status == "ok"
    assert result.summary[1].ratio is None
    assert "1: ValueError: request '1' has 256" in (tmp_path / "r.md").read_text()


def test_prompts_of_a_batch_job_are_compared_in_one_command(tmp_path):
    lines = (ROOT / "configs" / "demo_requests.jsonl").read_text().splitlines()[:4]
    (tmp_path / "mine.jsonl").write_text("\n".join(lines))
    prompts = {"workload": None, "requests": str(tmp_path / "mine.jsonl")}
    page = tmp_path / "page"
    status, result = run(tmp_path, config=demo.get_config(), page=str(page), **prompts)
    assert status == 0
    assert "<svg" in (page / "index.html").read_text()
    assert list(page.glob("*.svg"))
    assert result.header.workload.file == str(tmp_path / "r.workload.jsonl")
    items = map(json.loads, lines)
    asked = [item.get("body", item)["max_tokens"] for item in items]
    assert result.runs[0].output_tokens == sum(asked)


def test_prefixes_are_shared_by_all_strategies_or_by_none(tmp_path):
    seconds = []
    for is_shared in (True, False):
        config = make_config()
        config.cache.prefix_reuse = is_shared
        config.scheduler.max_prefill_tokens = 16  # a prompt takes ten sweeps, or one
        alike = make_workload([(160, 2)] * 6)
        _, result = run(tmp_path, alike, config, strategies=["device_only", "staggered_2"])
        assert result.header.settings["prefix_reuse"] is is_shared
        seconds.append(result.runs[0].wall_sec)
    assert seconds[0] < 0.7 * seconds[1]


# The loop


def make_hardware(kind=SimulatedHardware):
    config = make_config()
    config.model.weights = "dummy"
    config.scheduler.strategy = "async_overlap"
    config.scheduler.max_model_len = 160
    return kind(PacedPlan.create(config), TIMES, "tiny")


def test_requests_are_submitted_when_they_are_due():
    hardware = make_hardware()
    requests = make_workload([(40, 3)] * 3, gap_sec=1000.0).requests
    started = hardware.start(settings_of("device_only", make_config().scheduler))
    served = serve(started, requests)
    assert [one.arrival_sec for one in served] == [0.0, 1000.0, 2000.0]
    # Nobody waits for another: a prompt is a sweep, and each of two more tokens is one of 4 layers.
    for one in served:
        assert one.ttft_sec == pytest.approx(served[0].ttft_sec)
        assert one.token_sec == pytest.approx(
            [one.first_token_sec + 6.0 * number for number in range(3)]
        )


def test_waiting_counts_from_when_a_request_was_due():
    requests = make_workload([(40, 60), (40, 3)], gap_sec=7.0).requests
    settings = settings_of("device_only", make_config().scheduler)
    served = {one.id: one for one in serve(make_hardware().start(settings), requests)}
    assert served["1"].arrival_sec == 7.0  # in the midst of a sweep
    assert served["1"].first_token_sec > 7.0


class FailingHardware(SimulatedHardware):
    """Real in that a fault outlasts the turn; its loops stop in the third sweep of `failing`."""

    is_virtual = False
    failing = "async_overlap"

    def start(self, settings):
        started = super().start(settings)
        if settings.strategy != self.failing:
            return started
        loop, plan_sweep = started.loop, started.loop.scheduler.plan_sweep
        num_sweeps = iter(range(100))

        def fail_in_the_third():
            if next(num_sweeps) == 2:
                raise RuntimeError("RESOURCE_EXHAUSTED: out of\nmemory")
            return plan_sweep()

        loop.scheduler.plan_sweep = fail_in_the_third
        return started


def take_turns(hardware, names, **others):
    given = {"num_repeats": 1, "num_warm_up": 0, "bounds": None, "request_rates": [None]}
    systems = {name: settings_of(name, make_config().scheduler) for name in names}
    turns = Turns(systems, **(given | others))
    return list(Benchmark(hardware, make_workload(), turns).run())


def test_a_fault_is_a_row_and_so_is_what_could_not_run_after_it():
    hardware = make_hardware(FailingHardware)
    rows = take_turns(hardware, ["device_only", "async_overlap", "apex"])
    assert [one.status for one in rows] == ["ok", "failed", "failed"]
    assert rows[1].error == "RuntimeError: RESOURCE_EXHAUSTED: out of memory"
    assert rows[2].error == (
        "not run: async_overlap had stopped the engine before "
        "(RuntimeError: RESOURCE_EXHAUSTED: out of memory)"
    )


def test_a_strategy_that_cannot_start_stops_nobody_else():
    hardware = make_hardware(FailingHardware)
    hardware.failing = None
    start = hardware.start

    def refuse(settings):
        if settings.strategy == "apex":
            raise ValueError("no such lane")
        return start(settings)

    hardware.start = refuse
    rows = take_turns(hardware, ["apex", "device_only"])
    assert [one.error for one in rows] == ["ValueError: no such lane", None]


def test_what_is_measured_is_predicted_too_and_warm_up_is_in_no_row():
    hardware = make_hardware(FailingHardware)
    hardware.failing = None
    started = []
    start = hardware.start
    hardware.start = lambda settings: started.append(settings.strategy) or start(settings)
    hardware.predict = start
    rows = take_turns(hardware, ["device_only", "apex"], num_repeats=2, num_warm_up=3)
    assert started == ["device_only", "apex"] * 3
    for one in rows:
        assert one.predicted_output_tokens_per_sec == pytest.approx(one.output_tokens_per_sec)
    assert len(rows) == 4


def test_a_system_that_stops_early_is_caught():
    class Impatient(SimulatedHardware):
        def start(self, settings):
            started = super().start(settings)
            submit = started.loop.scheduler.submit

            def shorten(request, now_sec):
                sampling = dataclasses.replace(request.sampling, max_tokens=5)
                submit(dataclasses.replace(request, sampling=sampling), now_sec)

            started.loop.scheduler.submit = shorten
            return started

    (row,) = take_turns(make_hardware(Impatient), ["device_only"])
    assert row.error == "the workload has 72 output tokens and the system did 60"


def test_a_device_without_memory_for_anything_fails_every_run(tmp_path, monkeypatch):
    def fail(*_):
        raise RuntimeError("RESOURCE_EXHAUSTED: out of memory")

    monkeypatch.setattr(run_benchmark, "simulated", fail)
    status, result = run(tmp_path, request_rates=["own", "2"])
    assert status == 1
    assert len(result.runs) == 6
    assert {one.error for one in result.runs} == {"RuntimeError: RESOURCE_EXHAUSTED: out of memory"}
    assert result.header.warm_up == "Nothing ran."


def test_a_paced_device_keeps_real_time(tmp_path):
    given = {"backend": "paced", "host_profile": None, "strategies": ["device_only"]}
    status, result = run(tmp_path, request_rates=["200"], repeats=1, **given)
    assert status == 0
    (row,) = result.runs
    assert row.output_tokens == 72
    assert row.wall_sec >= 12 / 200 / 2  # Poisson's arrivals; slept, not skipped
    assert row.predicted_output_tokens_per_sec > 0
    assert result.header.budgets.host_kv_bytes is None


# What is refused


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"output": "r.csv"}, r"--output is 'r.csv'; its name must end in .json"),
        ({"strategies": ["vllm"]}, r"no strategy is called 'vllm'; there are apex, "),
        ({"strategies": []}, r"--strategies is empty; name one, or better two"),
        ({"ttft_sec": 1.0}, r"--ttft_sec and --tpot_sec go together"),
        ({"request_rates": ["0"]}, r"--request_rates has '0'; rates are above 0, or 'own'"),
        ({"request_rates": ["fast"]}, r"--request_rates has 'fast'; rates are above 0"),
        ({"requests": "x"}, r"give either --workload, or --requests with prompts"),
        ({"workload": None}, r"give either --workload, or --requests with prompts"),
        ({"host_profile": None}, r"--backend=simulated takes --device_profile and --host_profile"),
        ({"backend": "paced"}, r"--backend=paced takes --device_profile"),
        ({"backend": "xla"}, r"--backend=xla takes no profile"),
        ({"device_profile": "t5"}, r"no device is called 't5'; there are t4, a10"),
        ({"host_profile": "mine"}, r"no host is called 'mine'; there are epyc_1_thread"),
    ],
)
def test_flags_that_mean_nothing_are_refused(tmp_path, given, message):
    with pytest.raises(ConfigError, match=message):
        run(tmp_path, **given)


def with_cache(**budgets):
    config = make_config()
    config.cache = CacheConfig(**budgets)
    return config


def without_model():
    config = make_config()
    config.model.architecture = None
    return config


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            with_cache(device_bytes=2**40),
            r"device_bytes is 1099511627776; NVIDIA T4 has \d+ beside",
        ),
        (
            with_cache(device_bytes=2**20, host_bytes=2**50),
            r"host_bytes is 1125899906842624; two Intel Xeon Gold 6130, beside a T4 has \d+ bytes",
        ),
        (without_model(), r"--config names no model: give --config.model.path"),
    ],
)
def test_budgets_that_no_hardware_has_are_refused(tmp_path, config, message):
    with pytest.raises(ConfigError, match=message):
        run(tmp_path, config=config)


def test_a_budget_that_is_not_given_is_what_the_card_leaves(tmp_path):
    _, result = run(tmp_path, config=with_cache())
    assert result.header.budgets.device_kv_bytes == 64 * 3 * PAGE_BYTES  # max_requests can use
    assert result.header.budgets.host_kv_bytes == 16 * 3 * PAGE_BYTES  # likewise


def test_tokens_that_the_model_does_not_have_are_refused(tmp_path):
    with pytest.raises(
        ConfigError, match=r"token ids below 300, and the model's vocabulary has 256"
    ):
        run(tmp_path, make_workload(vocab_size=300))


# Whole commands


def command(*arguments, status=0):
    done = subprocess.run(
        [sys.executable, "-m", "launch.run_benchmark", *arguments],
        cwd=ROOT,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == status, done.stdout + done.stderr
    return done


def test_a_wrong_command_line_is_one_line():
    done = command("--config=configs/demo.py", "--workload=/nowhere", status=2)
    assert done.stderr == "error: /nowhere cannot be read: No such file or directory\n"


@pytest.mark.slow
def test_strategies_are_compared_on_the_real_engine(tmp_path):
    done = command(
        "--config=configs/demo.py",
        "--config.device.platform=cpu",
        f"--config.cache.device_bytes={2**22}",
        "--requests=configs/demo_requests.jsonl",
        "--strategies=device_only,asymmetric_pipelining,apex",
        "--request_rates=own,20",
        "--repeats=1",
        f"--output={tmp_path / 'r.json'}",
    )
    result = read_result(tmp_path / "r.json")
    assert [one.status for one in result.runs] == ["ok"] * 6
    assert result.header.model.name == "demo_model"
    assert result.header.environment["device"]["platform"] == "cpu"
    assert result.runs[1].host_share > 0
    assert all(one.predicted_output_tokens_per_sec > 0 for one in result.runs)
    assert "| `apex` | 20 |" in done.stdout


@pytest.mark.slow
def test_strategies_are_compared_on_a_paced_card(tmp_path):
    given = {"backend": "paced", "host_profile": None, "repeats": 1}
    status, result = run(tmp_path, **given)
    assert status == 0
    assert result.runs[1].host_share > 0
    assert result.header.settings["stage_times"]["host_attention_sec_per_token"] > 0
