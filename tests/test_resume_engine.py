"""SIGKILL at random points of a job with the real engine: each request once, the right tokens.

What a kill does to files is tested many times over with an engine without a model
(test_batch_commands.py); here what counts is that a resumed engine decodes the right tokens.
"""

import json
import pathlib
import random
import signal
import subprocess
import sys
import time

import choices
import pytest
import reference

from apex_jax.models.hf_config import read_model_folder
from apex_jax.request import Request, SamplingParams

ROOT = pathlib.Path(__file__).parents[1]
MODEL = ROOT / "tests/golden/gqa_tied_sharded"
NUM_KILLS = 10


def draw_requests():
    rng = random.Random(5)
    return [
        Request(
            f"r{index}",
            tuple(rng.randrange(128) for _ in range(rng.randrange(1, 40))),
            SamplingParams(
                max_tokens=rng.randrange(20, 100),
                temperature=float(index % 2),
                seed=rng.randrange(2**64),
                ignore_eos=True,
            ),
        )
        for index in range(100)
    ]


@pytest.fixture
def command(tmp_path):
    with open(tmp_path / "in.jsonl", "w") as file:
        for request in draw_requests():
            line = {
                "custom_id": request.request_id,
                "prompt_token_ids": request.prompt_token_ids,
                "max_tokens": request.sampling.max_tokens,
                "temperature": request.sampling.temperature,
                "seed": request.sampling.seed,
                "ignore_eos": True,
            }
            file.write(json.dumps(line) + "\n")
    return [
        sys.executable,
        "-m",
        "launch.generate",
        "--config=configs/default.py",
        f"--config.model.path={MODEL}",
        "--config.scheduler.max_requests=4",
        "--config.scheduler.max_prefill_tokens=16",
        "--config.scheduler.max_model_len=160",
        "--config.cache.device_bytes=150000",  # a few requests' worth: the newest is pre-empted
        f"--input={tmp_path}/in.jsonl",
        f"--output={tmp_path}/out.jsonl",
    ]


def count_lines(path):
    return path.read_bytes().count(b"\n") if path.exists() else 0


def kill_after(command, output, num_more, delay_sec):
    """Start the job, kill it some results and a part of a sweep later; say if it was alive."""
    before = count_lines(output)
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    while count_lines(output) < before + num_more and process.poll() is None:
        time.sleep(0.002)
    time.sleep(delay_sec)
    was_alive = process.poll() is None
    process.send_signal(signal.SIGKILL)
    process.wait()
    return was_alive


def test_a_killed_job_goes_on_with_the_right_tokens(command, tmp_path):
    output = tmp_path / "out.jsonl"
    rng = random.Random(time.time_ns())
    num_kills = sum(
        kill_after(command, output, num_more=rng.randrange(5), delay_sec=rng.uniform(0, 0.02))
        for _ in range(NUM_KILLS)
    )
    assert num_kills == NUM_KILLS
    assert 0 < count_lines(output) < 100
    done = subprocess.run(command, cwd=ROOT, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()

    results = [json.loads(line) for line in output.read_text().splitlines()]
    assert all(result["error"] is None for result in results)
    tokens = {
        result["custom_id"]: result["response"]["body"]["choices"][0]["token_ids"]
        for result in results
    }
    requests = draw_requests()
    assert sorted(tokens) == sorted(request.request_id for request in requests)
    assert len(results) == len(requests)
    choices.assert_reference_chooses(
        read_model_folder(MODEL).architecture,
        reference.load_tensors(MODEL),
        requests,
        [tokens[request.request_id] for request in requests],
    )
