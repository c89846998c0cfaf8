"""Other frameworks: fake ones of a few lines show that each kind of unfairness is caught."""

import dataclasses
import json
import math
import os
import pwd
import random
import sys
from pathlib import Path
from typing import Any

import pytest

from apex_jax.config import Config, ConfigError, LlamaConfig
from apex_jax.models.hf_config import read_model_folder
from apex_jax.models.safetensors_store import read_headers
from configs.default import get_config
from launch import compare as command
from launch.comparison.adapters import environments, external
from launch.comparison.adapters.agreement import agreement
from launch.comparison.adapters.children.run_apex_jax import read_config
from launch.comparison.adapters.environments import FRAMEWORKS, SetUpError, interpreter_of
from launch.comparison.adapters.jobs import Job, JobResult
from launch.comparison.adapters.processes import RunError, run_job
from launch.comparison.decode import FileError
from launch.comparison.workload_file import Workload, WorkloadRequest, write_workload
from launch.make_random_model import write_model

REQUESTS = tuple(
    WorkloadRequest(str(index), tuple(range(5, 9 + index)), 3 + index, 0.0) for index in range(3)
)
WORKLOAD = Workload.create(
    REQUESTS,
    name="three",
    description="",
    seed=None,
    max_model_len=None,
    share_dropped=0.0,
    vocab_size=64,
    arrivals="at once",
    source="a test",
)
THREADS = len(os.sched_getaffinity(0))
JOB = Job(
    model="nowhere",
    dtype="float32",
    device="cpu",
    threads=THREADS,
    max_requests=2,
    device_kv_bytes=1000,
    host_kv_bytes=0,
    requests=REQUESTS,
    settings=None,
)
# Does what is asked in no time; a line in its middle makes it unfair.
FAKE = """
import json, os, sys
job = json.load(open(sys.argv[1]))
cpus = len(os.sched_getaffinity(0))
done = [
    dict(id=one["id"], prompt_token_ids=one["prompt_token_ids"],
         output_token_ids=[7] * one["output_tokens"], first_token_sec=0.1, finish_sec=0.5)
    for one in job["requests"]
]
result = dict(
    version="1", dtype=job["dtype"], device="cpu", threads=cpus, num_cpus=cpus, max_requests=2,
    device_kv_bytes=900, host_kv_bytes=0, settings={}, warm_up="none", wall_sec=1.0, cpu_sec=1.0,
    requests=done,
)
CHANGE
json.dump(result, open(sys.argv[2], "w"))
"""


def run_fake(tmp_path: Path, change: str, timeout_sec: float = 30.0) -> JobResult:
    script = tmp_path / "fake.py"
    script.write_text(FAKE.replace("CHANGE", change))
    return run_job(sys.executable, script, JOB, timeout_sec)


def test_a_fair_framework_passes(tmp_path: Path) -> None:
    result = run_fake(tmp_path, "")
    assert [len(one.output_token_ids) for one in result.requests] == [3, 4, 5]
    assert [one.prompt_token_ids for one in result.requests] == [
        one.prompt_token_ids for one in REQUESTS
    ]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("done[1]['output_token_ids'].pop()", "has 12 output tokens and the system did 11"),
        (
            "done[0]['output_token_ids'].pop(); done[1]['output_token_ids'].append(7)",
            "request '0' has 4 prompt and 3 output tokens, and the system did 4 and 2",
        ),
        ("done.pop()", "has 3 requests and the system did 2"),
        ("done[0]['id'] = '2'", "3 requests were served, 2 of them with names of their own"),
        ("done[2]['prompt_token_ids'].insert(0, 1)", "15 prompt tokens and the system did 16"),
        (
            "done[2]['prompt_token_ids'][3] = 1",
            "request '2' was fed token 1 at position 3 of its prompt, where the workload has 8",
        ),
        ("result['dtype'] = 'bfloat16'", "in float32 and the system computed in bfloat16"),
        ("result['threads'] += 1", f"gives {THREADS} threads and the system computed with"),
        ("result['num_cpus'] += 1", f"with {THREADS}, on {THREADS + 1} CPUs"),
        ("result['max_requests'] = 3", "allows 2 requests in flight and the system took 3"),
        ("result['device_kv_bytes'] = 1001", "allows 1000 bytes of KV cache on the device"),
        ("result['host_kv_bytes'] = 1", "allows 0 bytes of KV cache on the host"),
        ("done[0]['finish_sec'] = 9.0", "its last at 9 s of a run of 1 s"),
        ("done[0]['first_token_sec'] = 0.0", "has its first token at 0 s"),
        ("del result['dtype']", "lacks the field 'dtype'"),
        ("sys.exit('no such model')", "failed with status 1: no such model"),
        ("os.kill(os.getpid(), 9)", r"ended by SIGKILL \(out of memory\?\)"),
        ("print('bye'); sys.exit(0)", "ended without a result; it said last: bye"),
    ],
)
def test_what_is_not_fair_is_a_failed_run(tmp_path: Path, change: str, message: str) -> None:
    with pytest.raises(RunError, match=message):
        run_fake(tmp_path, change)


def test_a_run_without_end_is_ended(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="had not ended after 1 s"):
        run_fake(tmp_path, "import time; time.sleep(60)", timeout_sec=1.0)


def test_an_interpreter_that_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="no-python does not start: No such file"):
        run_job(str(tmp_path / "no-python"), tmp_path / "fake.py", JOB, 1.0)
    framework = FRAMEWORKS["transformers"]
    with pytest.raises(SetUpError, match="gives transformers '/no/python', which does not run"):
        interpreter_of(framework, tmp_path, "/no/python", print)


def test_an_environment_that_cannot_be_made_says_what_pip_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(what: str, *command: str) -> None:
        commands.append(command)
        if what == "pip install":
            raise SetUpError("pip install ended with status 1: ERROR: no such version")

    commands: list[tuple[str, ...]] = []
    monkeypatch.setattr(environments, "_run", run)
    with pytest.raises(SetUpError, match=r"could not be made.*no such version; --python=llama.cpp"):
        interpreter_of(FRAMEWORKS["llama.cpp"], tmp_path, None, lambda line: None)
    monkeypatch.setattr(environments, "_run", lambda *command: (tmp_path / "llama").mkdir())
    assert commands[-1][-4:] == FRAMEWORKS["llama.cpp"].requirements
    assert interpreter_of(FRAMEWORKS["apex_jax"], tmp_path, None, print) == sys.executable


def test_orders_of_one_framework_share_its_environment(tmp_path: Path) -> None:
    by_output, by_prompt = FRAMEWORKS["transformers"], FRAMEWORKS["transformers_by_prompt"]
    (tmp_path / "file").touch()  # where a folder is wanted
    lines: list[str] = []
    for framework in (by_output, by_prompt):
        with pytest.raises(SetUpError, match=r"could not be made in .*transformers-[0-9a-f]{8}: "):
            interpreter_of(framework, tmp_path / "file" / "of", None, lines.append)
    assert lines[0] == lines[1]
    assert by_prompt.path.is_file()


def test_agreement_stops_at_a_first_difference(tmp_path: Path) -> None:
    reference = run_fake(tmp_path, "")
    first, *rest = reference.requests
    changed = dataclasses.replace(first, output_token_ids=(7, 8, 7))
    other = dataclasses.replace(reference, requests=(changed, *rest))
    assert agreement(other, reference) == {
        "equal_requests": 2 / 3,
        "tokens_before_a_difference": 10 / 12,
    }


# What the clients write of three requests, each field that they have: sglang.bench_serving of
# 0.5.16 with --output-details, and vllm bench serve of 0.33 with --save-result --save-detailed.
DETAILS = {
    "input_lens": [4, 5, 6],
    "output_lens": [3, 4, 5],
    "ttfts": [0.5, 0.25, 0.25],
    "itls": [[0.5, 0.5], [0.25, 0.25, 0.5], [0.25, 0.25, 0.25, 0.25]],
    "generated_texts": ["a", "b", "c"],
    "errors": ["", "", ""],
}
SUMS = {"duration": 2.0, "completed": 3, "total_input_tokens": 15, "total_output_tokens": 12}
MILLISECONDS = {
    f"{statistic}_{figure}_ms": 1.0
    for figure in ("e2e_latency", "ttft", "tpot", "itl")
    for statistic in ("mean", "median", "std", "p90", "p95", "p99")
}
CLIENTS: dict[str, dict[str, Any]] = {
    "sglang": {
        "tag": None,
        "backend": "sglang",
        "dataset_name": "autobench",
        "request_rate": math.inf,  # which json writes, and reads, as Infinity
        "max_concurrency": None,
        "sharegpt_output_len": None,
        "random_input_len": 1024,
        "random_output_len": 1024,
        "random_range_ratio": 0.0,
        "server_info": {"context_length": 13},
        **SUMS,
        "total_input_text_tokens": 15,
        "total_input_vision_tokens": 0,
        "total_output_tokens_retokenized": 11,
        "request_throughput": 1.5,
        "input_throughput": 7.5,
        "output_throughput": 6.0,
        "total_throughput": 13.5,
        **MILLISECONDS,
        "concurrency": 2.0,
        "accept_length": None,
        "max_output_tokens_per_s": 8.0,
        "max_concurrent_requests": 3,
        **DETAILS,
    },
    "vllm": {
        "date": "20261124-120000",
        "endpoint_type": "vllm",
        "backend": "vllm",
        "label": None,
        "model_id": "m",
        "tokenizer_id": "m",
        "num_prompts": 3,
        "request_rate": "inf",
        "burstiness": 1.0,
        "max_concurrency": None,
        **SUMS,
        "failed": 0,
        "request_throughput": 1.5,
        "request_goodput": None,
        "output_throughput": 6.0,
        "total_token_throughput": 13.5,
        **DETAILS,
        "start_times": [0.0, 0.0, 0.0],
        "max_output_tokens_per_s": 8.0,
        "max_concurrent_requests": 3,
        "mean_ttft_ms": 1.0,
    },
}


def result_line(name: str = "sglang", **changed: Any) -> str:
    return json.dumps(CLIENTS[name] | changed) + "\n"


@pytest.mark.parametrize("name", CLIENTS)
def test_a_clients_results_become_rows(tmp_path: Path, name: str) -> None:
    path = tmp_path / "result.jsonl"
    short = {"output_lens": [3, 0, 5], "errors": ["", "Bad Gateway", ""]}
    path.write_text(result_line(name) + result_line(name, **short))
    good, bad = external.read_rows(name, path, WORKLOAD)
    assert (good.status, good.output_tokens_per_sec, good.repeat) == ("ok", 6.0, 0)
    assert (good.wall_sec, good.output_tokens, good.prompt_tokens) == (2.0, 12, 15)
    assert good.ttft_sec is not None
    assert good.tpot_sec is not None
    assert good.itl_sec is not None
    assert (good.ttft_sec.p50, good.ttft_sec.p90) == (0.25, pytest.approx(0.45))
    assert good.tpot_sec.p50 == pytest.approx(1 / 3)
    assert good.itl_sec.p50 == 0.25
    assert good.by_lane is None
    assert bad.error == (
        "not comparable: the workload has 12 output tokens and the system did 8; the client says: "
        "Bad Gateway"
    )


def test_lengths_that_were_exchanged_are_caught(tmp_path: Path) -> None:
    path = tmp_path / "result.jsonl"
    path.write_text(result_line(output_lens=[4, 3, 5]))
    (row,) = external.read_rows("sglang", path, WORKLOAD)
    assert row.error is not None
    assert "request '0' has 4 prompt and 3 output tokens, and the system did 4 and 4" in row.error


def test_tokens_that_came_together_have_no_gaps_between_them(tmp_path: Path) -> None:
    path = tmp_path / "result.jsonl"
    path.write_text(result_line(itls=[[1.0], [1.0], [1.0]]))
    (row,) = external.read_rows("sglang", path, WORKLOAD)
    assert row.itl_sec is None
    assert row.tpot_sec is not None
    assert row.tpot_sec.p50 == pytest.approx(1 / 3)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty; the client appends a line for each run"),
        ("no json\n", "line 1 is not JSON"),
        (result_line(duration=None), "line 1 lacks the number 'duration'"),
        (result_line(ttfts=None), "line 1 lacks 'ttfts' of 3 requests; .* --output-details"),
        (result_line(itls=[[]]), "line 1 lacks 'itls' of 3 requests"),
    ],
)
def test_what_is_no_clients_result_is_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "sglang.jsonl"
    path.write_text(text)
    with pytest.raises(FileError, match=message):
        external.read_rows("sglang", path, WORKLOAD)
    with pytest.raises(FileError, match="cannot be read: No such file"):
        external.read_rows("sglang", tmp_path / "none", WORKLOAD)


def test_the_data_set_carries_token_ids_and_the_commands_the_limits(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    external.export(WORKLOAD, path)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [tuple(row["prompt"]) for row in rows] == [one.prompt_token_ids for one in REQUESTS]
    assert [row["output_len"] for row in rows] == [3, 4, 5]
    # What else stands in a row is sent to the server, unless the client knows its name.
    assert set(rows[0]) == {"prompt", "prompt_len", "output_len", "timestamp"}
    limits = {"dtype": "float16", "max_requests": 8, "max_model_len": 99, "num_requests": 3}
    for name, kv in (("vllm", "--num-gpu-blocks-override 4"), ("sglang", "--max-total-tokens 64")):
        server, client = external.commands(
            name, model="m", kv_tokens=64, data=path, result=tmp_path / "r", **limits
        )
        assert kv in server
        assert f"--backend {name}" in client
        assert str(path) in client
    assert "--context-length 101" in server  # SGLang keeps two of it to itself


def compare(tmp_path: Path, **values: Any) -> int:
    """Run the command on fake frameworks in this process."""

    write_workload(tmp_path / "three.jsonl", WORKLOAD)
    flags = {
        "workload": str(tmp_path / "three.jsonl"),
        "frameworks": ["transformers", "llama.cpp"],
        "baseline": None,
        "repeats": 2,
        "threads": None,
        "env_dir": str(tmp_path),
        "python": [f"transformers={sys.executable}", f"llama.cpp={sys.executable}"],
        "gguf": None,
        "import": [],
        "timeout_sec": 30.0,
        "budget_sec": 60.0,
        "output": str(tmp_path / "out.json"),
        **values,
    }

    config = get_config()
    config.model.path = "configs/demo_model"
    config.device.platform = "cpu"
    config.scheduler.strategy = "device_only"
    return command.run(flags, config)


def test_the_command_writes_a_row_for_each_run_failed_ones_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    scripts = {"transformers": "", "llama.cpp": "done[0]['output_token_ids'].pop()"}
    for name, change in scripts.items():
        (tmp_path / f"{name}.py").write_text(FAKE.replace("CHANGE", change))
        fake = dataclasses.replace(FRAMEWORKS[name], script=str(tmp_path / f"{name}.py"))
        monkeypatch.setitem(FRAMEWORKS, name, fake)
    assert compare(tmp_path, baseline="transformers") == 1
    content = json.loads((tmp_path / "out.json").read_text())
    runs = content["groups"]["runs"]
    order = [(run["system"], run["repeat"], run["status"]) for run in runs]
    assert order == [
        ("transformers", 0, "ok"),
        ("llama.cpp", 0, "failed"),
        ("transformers", 1, "ok"),
        ("llama.cpp", 1, "failed"),
    ]
    assert "12 output tokens and the system did 11" in runs[1]["error"]
    assert [one["version"] for one in content["groups"]["used"]] == ["1", "1"]
    assert "`transformers`" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"frameworks": ["vllm2"]}, "--frameworks has 'vllm2'; known are apex_jax"),
        ({"workload": None}, "--workload is missing"),
        ({"output": "x.txt"}, "must end in .json"),
        ({"baseline": "sglang"}, "--baseline is 'sglang'; it must be one of those compared"),
        ({"python": ["torch=x"]}, "--python is 'torch=x'; it must be NAME=..."),
        ({"import": ["vllm"]}, "--import is 'vllm'; it must be NAME=..."),
        ({"threads": 10_000}, "--threads is 10000; this process may use"),
    ],
)
def test_a_wrong_flag_is_refused(tmp_path: Path, values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        compare(tmp_path, **values)


SHAPE = {
    "num_layers": 2,
    "d_model": 32,
    "d_ffn": 48,
    "num_heads": 4,
    "num_kv_heads": 2,
    "vocab_size": 64,
    "seed": 0,
}


def test_a_random_model_is_a_model_folder(tmp_path: Path) -> None:
    num_parameters = write_model(tmp_path / "random", SHAPE)
    architecture = read_model_folder(tmp_path / "random").architecture
    assert num_parameters == architecture.num_parameters
    found = read_headers(tmp_path / "random")
    assert found["model.layers.1.self_attn.k_proj.weight"].shape == (16, 32)
    with pytest.raises(OSError, match="File exists"):
        write_model(tmp_path / "random", SHAPE)
    with pytest.raises(ValueError, match="--num_heads is 3; it must divide --d_model"):
        write_model(tmp_path / "odd", {**SHAPE, "num_heads": 3})


@pytest.mark.parity
@pytest.mark.parametrize("name", ["transformers", "transformers_by_prompt", "llama.cpp"])
def test_a_real_framework_is_fair_and_chooses_our_tokens(name: str) -> None:
    # Where launch.compare makes environments; HOME is the test session's own.
    folder = Path(pwd.getpwuid(os.getuid()).pw_dir, ".cache/apex_jax/frameworks")
    framework = FRAMEWORKS[name]
    if not list(folder.glob(f"{framework.environment}-*/installed")):
        pytest.skip(f"{folder} has no environment of {framework.environment}: run launch.compare")
    rng = random.Random(0)
    requests = tuple(
        WorkloadRequest(str(index), tuple(rng.choices(range(2, 4096), k=20 + index)), 12, 0.0)
        for index in range(12)
    )
    config = Config()
    config.model.path = str(Path("configs/demo_model").absolute())
    config.model.dtype, config.device.platform = "float32", "cpu"
    config.scheduler.strategy, config.scheduler.max_model_len = "device_only", 64
    config.scheduler.max_requests, config.cache.device_bytes = 8, 4 * 2**20
    job = dataclasses.replace(
        JOB, model=config.model.path, requests=requests, max_requests=8, device_kv_bytes=4 * 2**20
    )
    ours = dataclasses.replace(job, settings=dataclasses.asdict(config))
    reference = run_job(sys.executable, FRAMEWORKS["apex_jax"].path, ours, 600.0)
    result = run_job(interpreter_of(framework, folder, None, print), framework.path, job, 600.0)
    assert agreement(result, reference)["equal_requests"] >= 0.8


def test_settings_are_still_whole_after_a_turn():
    """They are what the next turn is given."""
    config = get_config()
    config.model.architecture = LlamaConfig(2, 64, 128, 4, 2, 16, 256, 1024)
    settings = json.loads(json.dumps(dataclasses.asdict(config)))
    assert [read_config(settings) for _ in range(2)] == [config] * 2
