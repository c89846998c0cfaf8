"""What a batch job says: plan, progress, summary, metrics, trace and decisions."""

import dataclasses
import errno
import io
import itertools
import json
import os
from pathlib import Path

import pytest
from batch_files import (
    Job,
    make_config,
    read_output,
    write_input,
)
from fake_engine import FakeEngine

from apex_jax.batch.decision_log import DecisionLog
from apex_jax.batch.progress import Progress, format_progress
from apex_jax.batch.statistics import Statistics, format_bytes, format_duration, summarize
from apex_jax.overlap import Figures
from apex_jax.request import FinishReason, Request, RequestOutput, SamplingParams


@pytest.fixture
def job(tmp_path):
    return Job(tmp_path)


def test_plan_comes_before_work_and_summary_after(job):
    write_input(job)
    assert job.run(metrics=job.folder / "metrics.json") == 0
    lines = job.said.splitlines()
    assert lines[0] == "loading"
    assert lines[1] == "strategy   fake"
    assert lines[3].startswith(f"input      {job.input}, ")
    assert lines[4] == f"output     {job.output}, as they finish; 0 lines finished before"
    assert lines[5] == "requests   30 finished, 0 failed, 0 finished before"
    assert "1.50 s of it compiling" in lines[6]
    assert "prompt tokens/s" in lines[7]
    assert lines[8].startswith("TTFT       p50 0.1, p90 0.1, p99 0.1 ms")
    assert lines[9].startswith("TPOT       p50 ")
    assert lines[10] == "peak bytes device 3.00 GiB, host 5.00 MiB"
    metrics = json.loads((job.folder / "metrics.json").read_text())
    assert metrics["complete"] is True
    assert metrics["exit_status"] == 0
    assert metrics["requests"] == {"finished": 30, "failed": 0, "finished_before": 0}
    assert metrics["prompt_tokens"] == 90
    outputs = read_output(job.output)
    assert metrics["output_tokens"] == sum(
        item["response"]["body"]["usage"]["completion_tokens"] for item in outputs
    )
    assert metrics["compile_sec"] == 1.5
    assert metrics["peak_bytes"]["device"] == 3 * 2**30
    assert metrics["ttft_sec"]["p50"] == pytest.approx(1e-4)
    assert metrics["engine"]["sweeps"] > 0
    assert metrics["job"]["model"]["fingerprint"] == "f00d"


def test_the_summary_of_an_engine_with_a_host_lane(job):
    figures = Figures(10.0, 9.5, 5.0, 4.0, 7, 0.25)

    class Hybrid(FakeEngine):
        def step(self):
            # All tokens of every second request come from the host, a few of the others'.
            return [
                dataclasses.replace(output, num_host_tokens=len(output.token_ids) // share)
                for output, share in zip(super().step(), itertools.cycle((4, 1)), strict=False)
            ]

        def metrics(self):
            counts = {"num_merges": 30, "num_extra_passes": 4, "num_late": 2}
            return {**super().metrics(), "hybrid": {**counts, **figures.to_json()}}

    write_input(job)
    assert job.run(engine=Hybrid, metrics=job.folder / "metrics.json") == 0
    metrics = json.loads((job.folder / "metrics.json").read_text())
    lanes = metrics["output_tokens_by_lane"]
    num_tokens = metrics["output_tokens"]
    assert lanes["device"] + lanes["host"] == num_tokens
    assert lanes["host"] > 0
    assert metrics["hybrid"]["overlap_percent"] == 80.0
    summary = job.said[job.said.index("host lane") :].splitlines()
    assert summary[0] == (
        f"host lane  {lanes['host']} of {num_tokens} output tokens "
        f"({100 * lanes['host'] / num_tokens:.1f} %); 30 merges, 4 extra passes, 2 late cohorts"
    )
    assert summary[1].startswith("  device   TPOT p50 ")
    assert summary[2].startswith("  host     TPOT p50 ")
    assert summary[3] == (
        "busy       device 95.0 %, host 50.0 %, 80.0 % of the host's time overlaps the device's; "
        "7 bubbles, 0.250 s in all"
    )


def test_the_summary_of_an_engine_that_reuses_prefixes(job):
    class Reusing(FakeEngine):
        def metrics(self):
            reuse = {"admitted_tokens": 400, "reused_tokens": 100, "hit_rate": 0.25}
            return {**super().metrics(), "prefix_reuse": reuse}

    write_input(job, 3)
    assert job.run(engine=Reusing, metrics=job.folder / "metrics.json") == 0
    assert "prefixes   100 of 400 prompt tokens reused (25.0 %)\n" in job.said
    metrics = json.loads((job.folder / "metrics.json").read_text())
    assert metrics["prefix_reuse"]["hit_rate"] == 0.25


def test_tpot_by_lane_goes_by_where_most_tokens_came_from():
    statistics = Statistics(None)
    for num_tokens, num_host_tokens, tpot_sec in ((4, 2, 1.0), (4, 3, 3.0), (1, 1, 0.0)):
        request = Request("a", (1, 2), SamplingParams())
        tokens = tuple(range(num_tokens))
        finish_sec = 1.0 + tpot_sec * (num_tokens - 1)
        output = RequestOutput(
            request, tokens, FinishReason.STOP, 0.0, 1.0, finish_sec, 0, num_host_tokens
        )
        statistics.add_result((output,), 10)
    found = statistics.to_json(wall_sec=1.0)
    assert found["output_tokens_by_lane"] == {"device": 3, "host": 6}
    assert found["tpot_sec_by_lane"]["device"]["mean"] == 1.0
    assert found["tpot_sec_by_lane"]["host"]["mean"] == 3.0
    assert found["tpot_sec"]["mean"] == 2.0


def test_a_trace_is_written_and_said(job):
    write_input(job)
    trace = job.folder / "trace.json"
    assert job.run(trace=trace) == 0
    sweeps = [event for event in json.loads(trace.read_text()) if event["name"] == "sweep"]
    assert len(sweeps) == job.engine.num_sweeps
    shown = {name for event in sweeps for name in event["args"]["requests"]}
    assert shown == {f"r{number}" for number in range(30)}
    assert job.said.splitlines()[-1] == f"trace      {len(sweeps)} events in {trace}"


def choosing(folder):
    config = make_config(folder)
    config.scheduler.strategy = "apex"
    return config


def test_decisions_are_written_and_said(job):
    class Choosing(FakeEngine):
        def step(self):
            self.on_decision({"sweep": self.num_sweeps})
            return super().step()

    write_input(job)
    decisions = job.folder / "decisions.jsonl"
    assert job.run(config=choosing(job.folder), engine=Choosing, decisions=decisions) == 0
    logged = [json.loads(line)["sweep"] for line in decisions.read_text().splitlines()]
    assert logged == list(range(len(logged)))
    assert job.said.splitlines()[-1] == f"decisions  of {len(logged)} sweeps in {decisions}"


def test_a_disk_that_fills_ends_the_decisions_and_not_the_job():
    log = DecisionLog(Path("/dev/full"))
    for _ in range(3):
        log.write({"reason": "x" * 100_000})
    log.close()
    assert log.describe().startswith("error: cannot write /dev/full: No space left on device")


def test_a_strategy_that_chooses_nothing_has_no_decisions(job):
    write_input(job, 2)
    assert job.run(decisions=job.folder / "decisions.jsonl") == 2
    assert "strategy 'device_only' decides nothing; use --config.scheduler" in job.said


def test_a_trace_of_a_job_that_fails_is_whole(job):
    class Failing(FakeEngine):
        def step(self):
            if self.num_sweeps == 3:
                raise RuntimeError("a fault")
            return super().step()

    write_input(job)
    trace = job.folder / "trace.json"
    with pytest.raises(RuntimeError, match="a fault"):
        job.run(engine=Failing, trace=trace)
    assert [event["name"] for event in json.loads(trace.read_text())].count("sweep") == 3


def test_progress_on_a_terminal_and_elsewhere():
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    statistics = Statistics(1000)
    output = RequestOutput(
        Request("a", (1, 2), SamplingParams()), (1, 2, 3), FinishReason.STOP, 0.0, 1.0, 2.0, 0, 0
    )
    statistics.add_result((output,), 200)
    statistics.add_failure(50)
    statistics.add_skipped(500)
    expected = (
        "2 done of about 4 (50.0%), 3 in work, 1 failed, 1 before, 7 output tokens/s, 0:00:02 left"
    )
    assert format_progress(statistics, 3, 14, 2.0) == expected
    for stream in (Terminal(), io.StringIO()):
        progress = Progress(stream, log_interval_sec=0.0)
        progress.update(statistics, num_running=3, num_output_tokens=14, elapsed_sec=2.0)
        progress.message("hello")
        progress.finish()
        text = stream.getvalue()
        assert text.endswith("hello\n")
        if stream.isatty():
            assert text == f"\r\x1b[K{expected[:79]}\r\x1b[Khello\n"
        else:
            assert text == f"{expected}\nhello\n"


def test_progress_waits_for_its_interval():
    stream = io.StringIO()
    progress = Progress(stream, log_interval_sec=100.0)
    progress.start()
    progress.update(Statistics(None), num_running=0, num_output_tokens=0, elapsed_sec=1.0)
    assert stream.getvalue() == ""
    assert "left" not in format_progress(Statistics(None), 0, 0, 0.0)


def test_progress_gives_up_a_stream_that_fails():
    class Closing(io.StringIO):
        num_writes = 0

        def write(self, text):
            self.num_writes += 1
            raise BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE))

    stream = Closing()
    progress = Progress(stream)
    progress.message("hello")
    progress.message("is anyone there?")
    progress.finish()
    assert stream.num_writes == 1


def test_numbers_as_text():
    assert format_duration(3725.4) == "1:02:05"
    assert [format_bytes(size) for size in (5, 2048, 3 * 2**20, 2**45)] == [
        "5 B",
        "2.00 KiB",
        "3.00 MiB",
        "32.00 TiB",
    ]
    from array import array

    assert summarize(array("d")) is None
    values = array("d", range(1, 101))
    assert summarize(values) == {"mean": 50.5, "p50": 50.0, "p90": 90.0, "p99": 99.0, "max": 100.0}
