"""SIGKILL at random points of a job with the real engine: each request once, tokens unchanged.

What a kill does to files is tested many times over with an engine without a model
(test_batch_commands.py); here what counts is that a resumed engine decodes the same tokens.
"""

import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import time

import near_tie
import pytest

ROOT = pathlib.Path(__file__).parents[1]
NUM_KILLS = 10


@pytest.fixture
def command(tmp_path):
    rng = random.Random(5)
    with open(tmp_path / "in.jsonl", "w") as file:
        for index in range(60):
            prompt = [rng.randrange(128) for _ in range(rng.randrange(1, 40))]
            line = {"custom_id": f"r{index}", "prompt_token_ids": prompt, "ignore_eos": True}
            line |= {"max_tokens": rng.randrange(20, 100), "temperature": index % 2}
            file.write(json.dumps(line) + "\n")
    return [
        sys.executable,
        "-m",
        "launch.generate",
        "--config=configs/default.py",
        f"--config.model.path={ROOT}/tests/golden/gqa_tied_sharded",
        "--config.scheduler.max_requests=4",
        "--config.scheduler.max_prefill_tokens=16",
        "--config.scheduler.max_model_len=160",
        "--config.cache.device_bytes=150000",  # a few requests' worth: the newest is pre-empted
        f"--input={tmp_path}/in.jsonl",
    ]


def read_tokens(path):
    """Return the token ids by request; a request with two results is an error."""
    tokens = {}
    for line in path.read_text().splitlines():
        result = json.loads(line)
        assert result["error"] is None
        assert result["custom_id"] not in tokens
        tokens[result["custom_id"]] = result["response"]["body"]["choices"][0]["token_ids"]
    return tokens


def count_lines(path):
    return path.read_bytes().count(b"\n") if path.exists() else 0


def test_a_killed_job_goes_on_with_the_same_tokens(command, tmp_path):
    whole, output = tmp_path / "whole.jsonl", tmp_path / "out.jsonl"
    subprocess.run([*command, f"--output={whole}"], cwd=ROOT, check=True, capture_output=True)
    rng = random.Random(time.time_ns())
    num_kills = 0
    while num_kills < NUM_KILLS:
        before = count_lines(output)
        process = subprocess.Popen(
            [*command, f"--output={output}"],
            cwd=ROOT,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"},
        )
        # Sometimes while it starts, mostly a few results and a part of a sweep later.
        num_more = rng.randrange(5)
        while count_lines(output) < before + num_more and process.poll() is None:
            time.sleep(0.002)
        time.sleep(rng.uniform(0, 0.02))
        process.send_signal(signal.SIGKILL)
        process.wait()
        num_kills += 1
    done = subprocess.run([*command, f"--output={output}"], cwd=ROOT, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()
    resumed, expected = read_tokens(output), read_tokens(whole)
    assert resumed.keys() == expected.keys()
    # A resumed request shares its batch with others: at a near tie it may take another turn.
    differing = [name for name in expected if resumed[name] != expected[name]]
    assert len(differing) <= near_tie.MAX_STOPPED_SHARE * len(expected), differing
