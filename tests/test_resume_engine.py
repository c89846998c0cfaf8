"""SIGKILL at random points of a job with the real engine: each request once, the right tokens.

What a kill does to files is tested many times over with an engine without a model
(test_batch_commands.py); here what counts is that a resumed engine decodes the right tokens, with
the device alone and with a host lane, where a job first stops by a fault of its worker.
"""

import json
import pathlib
import random
import re
import signal
import subprocess
import sys
import time

import choices
import pytest
import reference

from apex_jax.batch.job import EXIT_STOPPED
from apex_jax.models.hf_config import read_model_folder
from apex_jax.request import Request, SamplingParams

ROOT = pathlib.Path(__file__).parents[1]
MODEL = ROOT / "tests/golden/gqa_tied_sharded"
NUM_REQUESTS = 60
DEVICE = (
    "--config.scheduler.strategy=device_only",
    "--config.scheduler.max_requests=4",
    "--config.cache.device_bytes=150000",  # a few requests' worth: the newest is pre-empted
)
# The fewest shapes, since a start should cost little; the device holds one of the longest requests.
BOTH_LANES = (
    "--config.scheduler.strategy=staggered",
    "--config.scheduler.max_requests=2",
    "--config.scheduler.max_host_requests=4",
    "--config.cache.device_bytes=41000",
    "--config.cache.host_bytes=200000",
)


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
                # What scores depend on is lost with the process, and must come again.
                presence_penalty=0.5 if index % 10 == 0 else 0.0,
                bad_words=((5,), (7, 9)) if index % 10 == 5 else (),
            ),
        )
        for index in range(NUM_REQUESTS)
    ]


def make_command(folder, flags, program=("-m", "launch.generate")):
    """Write the input, and return the command that runs it."""
    with open(folder / "in.jsonl", "w") as file:
        for request in draw_requests():
            line = {
                "custom_id": request.request_id,
                "prompt_token_ids": request.prompt_token_ids,
                "max_tokens": request.sampling.max_tokens,
                "temperature": request.sampling.temperature,
                "seed": request.sampling.seed,
                "ignore_eos": True,
                "presence_penalty": request.sampling.presence_penalty,
                "bad_words": request.sampling.bad_words,
            }
            file.write(json.dumps(line) + "\n")
    return [
        sys.executable,
        *program,
        "--config=configs/default.py",
        f"--config.model.path={MODEL}",
        "--config.device.platform=cpu",
        "--config.scheduler.max_prefill_tokens=16",
        "--config.scheduler.max_model_len=160",
        f"--input={folder}/in.jsonl",
        f"--output={folder}/out.jsonl",
        f"--metrics={folder}/metrics.json",
        *flags,
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


@pytest.mark.other_python
@pytest.mark.parametrize(
    ("flags", "num_kills"),
    [(DEVICE, 2), (BOTH_LANES, 4), pytest.param(BOTH_LANES, 10, marks=pytest.mark.slow)],
)
def test_a_killed_job_goes_on_with_the_right_tokens(tmp_path, flags, num_kills):
    command, output = make_command(tmp_path, flags), tmp_path / "out.jsonl"
    if flags is BOTH_LANES:
        assert_stops_by_a_fault(make_command(tmp_path, flags, ["tests/faulty_engine.py"]))
        assert 0 < count_lines(output) < NUM_REQUESTS
    rng = random.Random(time.time_ns())
    num_killed = sum(
        kill_after(command, output, num_more=rng.randrange(5), delay_sec=rng.uniform(0, 0.02))
        for _ in range(num_kills)
    )
    assert num_killed == num_kills
    assert 0 < count_lines(output) < NUM_REQUESTS
    done = subprocess.run(command, cwd=ROOT, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()
    if flags is BOTH_LANES:
        hybrid = json.loads((tmp_path / "metrics.json").read_text())["engine"]["hybrid"]
        assert hybrid["num_host_tokens"] > 0

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


def assert_stops_by_a_fault(command):
    """Run a job whose worker fails: it says so, with a status of its own."""
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == EXIT_STOPPED, done.stderr
    assert re.search("Error: (.*: )?the wire is cut", done.stderr), done.stderr
    assert "error: the job stopped by a fault; what is written stays" in done.stderr
