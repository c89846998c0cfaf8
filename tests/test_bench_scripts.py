"""The benchmarks run, in tiny sizes on the CPU, and their files hold what later work reads."""

import importlib.util
import json
import os
import pathlib
import subprocess
import sys
import threading

import pytest

from launch import host_attention_table
from launch.measuring import ResultFile, architecture, spread
from launch.stopwatch import Stopwatch

ROOT = pathlib.Path(__file__).parents[1]
TIMES = ("sec", "p10_sec", "p90_sec")


def run(*command, status=0, **variables):
    done = subprocess.run(
        command,
        cwd=ROOT,
        env={**os.environ, "JAX_PLATFORMS": "cpu", **variables},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == status, done.stdout + done.stderr
    return done.stdout


def smoke(script, path, *arguments, status=0):
    """Run a benchmark and return its file, checked for what all of them have in common."""
    module = f"launch.{script}"
    run(sys.executable, "-m", module, "--smoke", f"--output={path}", *arguments, status=status)
    content = json.loads(path.read_text())
    block = content["environment"]
    assert block["cpu"]["num_cores"] >= block["cpu"]["num_usable_cores"] >= 1
    assert block["memory_bytes"] > 2**30
    assert block["packages"]["jax"]
    assert set(block["git"]) == {"commit", "is_dirty"}
    assert "--smoke" in block["command"]
    assert content["smoke"]
    assert content["failed"] == {}
    return content


def check_times(rows):
    for row in rows:
        assert 0 < row["p10_sec"] <= row["sec"] <= row["p90_sec"] < 60, row


def test_transfers(tmp_path):
    groups = smoke("bench_transfers", tmp_path / "transfers.json")["groups"]
    assert set(groups) == {"idle", "busy", "zero_copy"}
    for group in ("idle", "busy"):
        rows = [row for row in groups[group] if "error" not in row]
        check_times(rows)
        assert {row["direction"] for row in rows} == {"to_host", "to_device"}
        routes = {row["route"] for row in rows}
        assert {"asarray", "copy_to_host_async", "jit_to_pinned", "jit_from_pinned"} <= routes
    one = next(row for row in groups["idle"] if row["rows"] == 2)
    assert one["bytes"] == 2 * (32 + 2 * 8) * 128 * 2
    assert one["gb_per_sec"] == pytest.approx(one["bytes"] / one["sec"] / 1e9, abs=2e-3)
    assert {row["begins"] for row in groups["busy"]} == {"before_queue", "after_queue"}
    for row in groups["zero_copy"]:
        assert row["works"] or row["error"]
    views = {row["view"]: row for row in groups["zero_copy"] if row["dtype"] == "bfloat16"}
    assert views["np.asarray(cpu array)"]["in_place"]


def test_dispatch(tmp_path):
    groups = smoke("bench_dispatch", tmp_path / "dispatch.json")["groups"]
    for rows in groups.values():
        check_times(rows)
    assert {row["arrays"] for row in groups["dispatch"]} == {1, 20, 100}
    assert {row["beside"] for row in groups["dispatch_beside_waiter"]} >= {"nothing", "waiter"}
    observers = {row["observer"] for row in groups["ready_to_seen"]}
    assert {"poll", "block_until_ready", "waiter_thread"} <= observers
    assert min(row["lag_sec"] for row in groups["ready_to_seen"]) == 0
    assert {row["program"] for row in groups["control_flow"]} >= {"plain", "conditional"}


@pytest.mark.main_python
def test_device(tmp_path):
    content = smoke("bench_device", tmp_path / "device.json")
    groups, model = content["groups"], content["model"]
    assert len(groups["bandwidth"]) == 2
    best = max(row["gb_per_sec"] for row in groups["bandwidth"]) * 1e9
    sweeps = [group for group in groups if group.startswith("decode_")]
    assert len(sweeps) == 2
    for group in sweeps:
        compiled, *rows = groups[group]
        assert compiled["compile"]["programs"] == len(compiled["compile"]["program_sec"]) > 4
        check_times(rows)
        assert rows[-1]["sampling"] == "top_p_0.9"
        for row in rows:
            per_token = 2 * model["num_layers"] * model["num_kv_heads"] * model["head_dim"] * 4
            assert row["kv_bytes"] == row["rows"] * row["context"] * per_token
            assert row["kv_bytes"] == pytest.approx(row["cap_gib"] * 2**30, rel=1e-3)
            assert row["read_bytes"] == row["kv_bytes"] + content["sweep_weight_bytes"]
            share = row["read_bytes"] / row["sec"] / best
            assert row["share_of_bandwidth"] == pytest.approx(share, rel=1e-2)
            assert set(row["enqueue_sec"]) == {"embed", "layers", "head"}
            assert sum(row["enqueue_sec"].values()) < 2 * row["launch_sec"]
    check_times(groups["head"])
    assert {row["sampling"] for row in groups["head"]} >= {"greedy", "top_k_40", "top_p_0.9"}
    check_times(groups["prefill"][1:])
    assert groups["cached_compile"][0]["compile"]["programs"] > 4


@pytest.mark.main_python
def test_layers(tmp_path):
    path = tmp_path / "layers.json"
    groups = smoke("bench_layers", path, "--model_shapes=llama_2_7b")["groups"]
    check_times(groups["linear"])
    engine = groups["attention_llama_2_7b"]
    check_times(engine)
    assert {row["kernel"] for row in engine} == {"engine"}
    others = {row["kernel"]: row for row in groups["other_attention_llama_2_7b"]}
    assert others["xla_contiguous"]["max_error"] < 1e-5  # the kernels compute the same
    assert "error" in others["cudnn_contiguous"]  # there is none here, and that fails nothing


@pytest.mark.main_python
def test_host_attention(tmp_path):
    arguments = ["--rounds=1", "--threads=2", "--dtypes=bfloat16", "--cells=128x1,100x2"]
    content = smoke("bench_host_attention", tmp_path / "host.json", *arguments)
    groups = content["groups"]
    microseconds = {row["call"]: row["microseconds"] for row in groups["call_overhead"]}
    assert set(microseconds) == {"jit", "compiled", "in_one_program"}
    assert min(microseconds.values()) > 0
    assert len(groups["cells"]) == 2 * 2
    has_torch = importlib.util.find_spec("torch") is not None
    assert has_torch or content["left_out"] == {"torch_sdpa": "torch is not installed"}
    contestants = {"jit", "compiled", "jnp"} | ({"torch_sdpa"} if has_torch else set())
    for row in groups["cells"]:
        assert row["isa"] == content["isas"][0]
        assert {name for name, value in row.items() if isinstance(value, dict)} == contestants
        for name in contestants:
            one = row[name]
            assert 0 < one["least_of_read"] <= one["of_read"] <= one["most_of_read"]
            assert one["of_read"] == pytest.approx(one["gb_per_sec"] / row["read_gb_per_sec"], 0.01)
    with pytest.raises(AssertionError, match="--shapes=gpt: known are"):
        smoke("bench_host_attention", tmp_path / "no.json", "--shapes=gpt")


def test_host_attention_table_is_medians_and_worst_of_large_cells():
    def row(context, kernel, **others):
        key = {"shape": "gqa", "dtype": "bfloat16", "isa": "avx2", "threads": 1}
        shares = {"kernel": {"of_read": kernel}} | {
            name: {"of_read": share} for name, share in others.items()
        }
        return key | {"context": context, "batch": 2} | shares

    rows = [row(64, 0.1), row(4096, 0.5), row(8192, 0.75, jnp=0.25), row(16384, 0.625)]
    assert host_attention_table.table("file", rows) == [
        "| file | gqa | bfloat16 | avx2 | 1 | 0.62 (0.50) |  |  |  |  |  | 0.25 (0.25) |"
    ]


def test_reference_says_why_it_is_skipped(tmp_path):
    """Without torch there is no comparison: status 77, and the file says so."""
    code = "import sys, importlib.util as util; find = util.find_spec; "
    code += "util.find_spec = lambda name, *rest: None if name == 'torch' else find(name, *rest); "
    code += "from absl import app; from launch import bench_reference; "
    code += "app.run(bench_reference.main)"
    path = tmp_path / "reference.json"
    run(sys.executable, "-c", code, "--smoke", f"--output={path}", status=77)
    content = json.loads(path.read_text())
    assert content["left_out"] == {"decode": "torch is not installed"}


def test_paced(tmp_path):
    """Every strategy is run, predicted and held to the arithmetic."""
    path = tmp_path / "paced.json"
    content = smoke("bench_paced", path, f"--traces={tmp_path}")
    names = ["device_only", "async_overlap", "staggered", "asymmetric_pipelining", "full_offload"]
    for group in ("turns", "predictions", "medians"):
        assert [row["strategy"] for row in content["groups"][group]] == names
    assert content["device"]["source"].startswith("https://")
    for row in content["groups"]["medians"]:
        assert row["tokens_per_sec_min"] == row["tokens_per_sec"] > 0
        assert row["over_predicted"] > 0
        assert row["over_arithmetic"] > 0
        assert row["device_rows"] + row["host_rows"] > 0
        assert (tmp_path / f"{row['strategy']}.json").is_file()
    (times,) = content["groups"]["times"]
    assert times["host_job_sec"] + times["host_attention_sec_per_token"] > 0


def test_paced_refuses_what_the_card_cannot_hold(tmp_path):
    arguments = ("--config=configs/llama_3_1_8b.py", f"--output={tmp_path / 'paced.json'}")
    done = subprocess.run(
        [sys.executable, "-m", "launch.bench_paced", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 2
    assert "error: NVIDIA T4 has 15.00 GiB of memory, which cannot hold" in done.stderr


@pytest.mark.slow
def test_strategies(tmp_path):
    """In a steady state that is much too short and small for figures that mean anything."""
    path = tmp_path / "strategies.json"
    content = smoke("bench_strategies", path, f"--traces={tmp_path}")
    (turns, rows), (medians, summary) = content["groups"].items()
    assert turns.startswith("turns_")
    assert medians.startswith("medians_")
    names = [row["strategy"] for row in rows]
    assert names == [row["strategy"] for row in summary]
    assert names[0] == "device_only"
    assert len(names) > 6
    for row in rows:
        both = row["device_tokens_per_sec"] + row["host_tokens_per_sec"]
        assert row["tokens_per_sec"] == pytest.approx(both, rel=1e-4)
        assert (row["device_rows"] > 0) == (row["strategy"] != "full_offload")
        assert (row["host_rows"] > 0) == (row["strategy"] != "device_only")
        assert 0 <= row["overlap_percent"] <= 100
        assert 0 < row["device_busy_percent"] <= 100
        assert 0 < row["python_sec_per_sweep"] < 1
        assert row.get("arithmetic_tokens_per_sec", 1) > 0
        spans = json.loads((tmp_path / f"{row['strategy']}.json").read_text())
        assert any(span["name"] == "head" for span in spans)
    assert summary[0]["ratio"] == 1


@pytest.mark.slow
def test_python_time(tmp_path):
    content = smoke("bench_python", tmp_path / "python.json")
    scheduling, (device_only, passes) = content["groups"].values()
    loads = {row["load"]: row for row in scheduling}
    assert loads["steady"]["tokens"] == loads["steady"]["requests"] == 20
    assert 0 < loads["most_on_host"]["tokens"] < 20
    assert all(0 < row["commit_sec"] < row["scheduling_sec"] < 1 for row in scheduling)
    for row in (device_only, passes):
        parts = [
            value for key, value in row.items() if key.endswith("_sec") and key != "python_sec"
        ]
        assert sum(parts) == pytest.approx(row["python_sec"], rel=1e-4)
        assert 0 < row["python_sec"] < 1
        assert row["device_rows"] == 2
    assert device_only["num_stages"] == 32 / 8 + 2, "embed, the layers, head"
    assert device_only["tokens"] == 2
    assert device_only["num_jobs"] == device_only["host_rows"] == 0
    assert passes["host_rows"] == 4
    assert passes["num_jobs"] > 2
    assert passes["num_stages"] > 64


def test_a_stopwatch_splits_time_into_what_each_part_took_itself():
    now_sec = 0.0

    def spend(seconds):
        nonlocal now_sec
        now_sec += seconds

    stopwatch = Stopwatch(lambda: now_sec)
    inner = stopwatch.wrap("inner", spend)

    def outer_work():
        spend(2)
        inner(3)
        inner(4)

    outer = stopwatch.wrap("outer", outer_work)
    spend(1)
    outer()
    assert stopwatch.take() == {"rest": 1, "outer": 2, "inner": 7}
    with pytest.raises(TypeError):
        inner("no time")
    spend(5)
    assert stopwatch.take() == {"rest": 5, "inner": 0}, "an exception ends a part too"


def test_a_stopwatch_leaves_out_what_other_threads_do_and_what_it_takes_itself():
    now_sec = 0.0

    def clock():
        nonlocal now_sec
        now_sec += 0.5  # each reading
        return now_sec

    stopwatch = Stopwatch(clock)
    nothing = stopwatch.wrap("nothing", lambda: None)
    stopwatch.take()
    thread = threading.Thread(target=nothing)
    thread.start()
    thread.join()
    nothing()
    assert stopwatch.take() == pytest.approx({"rest": 0.5, "nothing": 0}, abs=1e-3)


@pytest.mark.slow
def test_prefix_reuse(tmp_path):
    groups = smoke("bench_prefix", tmp_path / "prefix.json", "--n=3")["groups"]
    [outputs] = groups["outputs"]
    assert outputs["equal_percent"] == 100
    for name, num_outputs in (("questions", 6), ("n", 3)):
        reusing, computing = groups[name]
        assert (reusing["prefix_reuse"], computing["prefix_reuse"]) == (True, False)
        assert reusing["outputs"] == computing["outputs"] == num_outputs
        assert reusing["prefilled_tokens"] < computing["prefilled_tokens"]
        [ratio] = groups[f"{name}_speed_up"]
        assert ratio["least"] == ratio["most"] > 0


@pytest.mark.slow
def test_parity_report(tmp_path):
    path = tmp_path / "parity.json"
    content = smoke("parity_report", path)
    [rows] = content["groups"].values()
    assert len(rows) == 5
    for row in rows:
        assert row["host_token_percent"] > 0, row["strategy"]
        assert row["tokens"] == 12 * row["requests"]
        # Float32 differs by rounding only, and texts part only where two scores nearly tie.
        assert 0 < row["max_score_difference_stds"] < 5e-5
        assert all(margin < 1e-4 for margin in row["margins_there_stds"])
        share = 1 - len(row["first_differences"]) / row["requests"]
        assert row["equal_percent"] == pytest.approx(100 * share, rel=1e-4)
    table = path.with_suffix(".md").read_text().splitlines()
    assert len(table) == 2 + len(rows)
    assert len({line.count("|") for line in table}) == 1


@pytest.mark.slow
def test_gpu_check_runs_on_any_machine(tmp_path):
    printed = run(
        "bash", "launch/gpu_check.sh", "--smoke", OUT=str(tmp_path), PYTHON=sys.executable
    )
    summary = json.loads((tmp_path / "summary.json").read_text())
    states = {part["part"]: part["state"] for part in summary["parts"]}
    expected = ["build", "environment", "gpu_tests", "strategies", "transfers", "dispatch"]
    expected += ["device_bfloat16", "layers", "parity", "device_float16", "reference"]
    assert list(states) == expected
    assert states.pop("reference") in ("ok", "skipped")
    assert set(states.values()) == {"ok"}
    assert all(name in printed for name in expected)


def test_gpu_check_goes_on_after_a_failure(tmp_path):
    """An interpreter that fails all modules: each part is recorded, and the status tells."""
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\n[ "$1" = -c ] && exit 0\nexit 3\n')
    python.chmod(0o755)
    out = tmp_path / "out"
    printed = run("bash", "launch/gpu_check.sh", status=1, OUT=str(out), PYTHON=str(python))
    parts = json.loads((out / "summary.json").read_text())["parts"]
    assert [part["state"] for part in parts] == ["ok", *["failed"] * 10]
    assert "exit status 3" in printed
    run("bash", "launch/gpu_check.sh", "--fast", status=2)


class TestResultFile:
    def test_keeps_the_rows_before_a_failure(self, tmp_path):
        def rows():
            yield {"one": 1.23456789}
            raise ValueError("no more")

        results = ResultFile(tmp_path / "sub" / "file.json", {"what": "test"}, budget_sec=60)
        results.measure("breaks", rows)
        results.measure("goes_on", lambda: [{"two": 2}])
        content = json.loads(results.path.read_text())
        assert content["groups"] == {"breaks": [{"one": 1.23457}], "goes_on": [{"two": 2}]}
        assert content["failed"] == {"breaks": "ValueError: no more"}

    def test_stops_at_its_budget_and_says_what_it_left_out(self, tmp_path):
        results = ResultFile(tmp_path / "file.json", {}, budget_sec=-1)
        results.measure("late", lambda: [{"one": 1}])
        content = json.loads(results.path.read_text())
        assert content["left_out"] == {"late": "the time budget was spent"}
        assert content["groups"] == {}


def test_spread_is_the_median_and_percentiles():
    assert tuple(spread(range(101)).values()) == (50, 10, 90)
    assert set(spread([1], "queue")) == {f"queue_{name}" for name in TIMES}


def test_shapes_come_from_the_configs():
    assert architecture("llama_3_1_8b").num_parameters == 8_030_261_248
    assert architecture("smoke").num_layers == 4
    with pytest.raises(ValueError, match="no shape is known for 'gpt'"):
        architecture("gpt")
