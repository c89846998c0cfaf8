"""The long job: what its samples say, and the script on few requests."""

import json
import pathlib
import subprocess
import sys

import pytest

from launch import long_job
from launch.long_job import MAX_GROWTH_BYTES, NUM_PARTS, Sample, parts, summarize

ROOT = pathlib.Path(__file__).parents[1]


def samples(rate_of_part=lambda part: 10.0, bytes_of_part=lambda part: 0, num_sent=20):
    """A thousand requests, seen fifty times."""
    seen, sec = [Sample(0.0, 1, num_sent, 10**9, 0.0)], 0.0
    for num_results in range(20, 1001, 20):
        part = (num_results - 1) * NUM_PARTS // 1000
        sec += 20 / rate_of_part(part)
        memory_bytes = 10**9 + bytes_of_part(part)
        seen.append(Sample(sec, num_results, 1000, memory_bytes, num_results / 1000))
    return seen


def test_each_tenth_has_its_rate_memory_and_cpu_time():
    rows = parts(samples(lambda part: 10.0 + part, lambda part: part), 1000)
    assert [row["num_results"] for row in rows] == [99, *[100] * 9]
    assert [row["requests_per_sec"] for row in rows[1:]] == pytest.approx(range(11, 20))
    assert [row["memory_bytes"] - 10**9 for row in rows] == list(range(10))
    assert [row["cpu_sec_per_request"] for row in rows[1:]] == pytest.approx([0.001] * 9)


@pytest.mark.parametrize(
    ("seen", "broken"),
    [
        (samples(), []),
        # What the first tenth does is warm-up.
        (samples(lambda part: part + 1 if part < 1 else 10.0), []),
        (samples(bytes_of_part=lambda part: MAX_GROWTH_BYTES * part // 10), []),
        (samples(bytes_of_part=lambda part: MAX_GROWTH_BYTES * (part == 5)), ["memory grows"]),
        (samples(lambda part: 7.9 if part == 9 else 10.0), ["every later tenth"]),
        (samples(num_sent=1000), ["the first result"]),
    ],
)
def test_proofs(seen, broken):
    proofs = summarize(seen, 1000)["proofs"]
    assert len(proofs) == 3
    failed = [text for text, holds in proofs.items() if not holds]
    assert len(failed) == len(broken)
    assert all(text.startswith(start) for text, start in zip(failed, broken, strict=True))


@pytest.mark.parametrize("seen", [[], samples()[:5]])
def test_too_few_looks_are_refused(seen):
    with pytest.raises(ValueError, match=r"\d looks tell no tenths apart: the job needs more"):
        summarize(seen, 1000)


def test_requests_are_short_reproducible_and_within_the_vocabulary():
    lines = list(long_job.request_lines(200, seed=1))
    assert lines == list(long_job.request_lines(200, seed=1))
    assert lines != list(long_job.request_lines(200, seed=2))
    requests = [json.loads(line) for line in lines]
    assert len({request["custom_id"] for request in requests}) == 200
    for request in requests:
        assert 4 <= len(request["prompt_token_ids"]) <= 12
        assert 4 <= request["max_tokens"] <= 8
        assert max(request["prompt_token_ids"]) < 4096


def test_a_job_that_fails_is_told_with_its_status(monkeypatch):
    ends = [sys.executable, "-c", "import sys; sys.stdin.readline(); sys.exit(3)"]
    monkeypatch.setattr(long_job, "job_command", lambda *_: ends)
    with pytest.raises(RuntimeError, match="status 3 and 0 results of 5000 requests"):
        long_job.run(5000, "device_only", 4, seed=0)


@pytest.mark.slow
def test_the_script(tmp_path):
    """Too few requests for a flat rate on a busy machine; everything else holds."""
    path = tmp_path / "long_job.json"
    done = subprocess.run(
        [sys.executable, "-m", "launch.long_job", "--num_requests=2000", f"--output={path}"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=600,
    )
    content = json.loads(path.read_text())
    assert len(content["groups"]["parts"]) == NUM_PARTS
    assert content["groups"]["samples"][-1]["num_results"] <= 2000
    assert 0 < content["first_result"]["num_sent"] < 2000
    memory, rate, first = content["proofs"].values()
    assert memory
    assert first
    assert done.returncode == (0 if rate else 1), done.stderr
