"""Batch jobs in one process with an engine that needs no model: results, resuming, refusals."""

import dataclasses
import errno
import functools
import io
import itertools
import json
import os
import random
import signal
import threading
from pathlib import Path

import pytest
from batch_files import (
    Job,
    make_config,
    read_output,
    request_line,
    without_time,
    write_byte_tokenizer,
    write_lines,
)
from fake_engine import FakeEngine, fake_tokens

from apex_jax.batch.decision_log import DecisionLog
from apex_jax.batch.identity import differences
from apex_jax.batch.journal import Journal
from apex_jax.batch.lines import RawLine, parse_line
from apex_jax.batch.progress import Progress, format_progress
from apex_jax.batch.statistics import Statistics, format_bytes, format_duration, summarize
from apex_jax.config import ConfigError, SamplingDefaults
from apex_jax.overlap import Figures
from apex_jax.request import FinishReason, Request, RequestOutput, SamplingParams
from apex_jax.text.tokenizer import JsonTokenizer

BAD_LINES = [
    "not json\n",
    {"custom_id": "bad", "prompt_token_ids": [1], "best_of": 2},
    {"prompt_token_ids": [1]},
    {"custom_id": "long", "prompt_token_ids": [1] * 500},
    {"custom_id": "r3", "prompt_token_ids": [1]},
    {"custom_id": "text", "prompt": "no tokenizer here"},
]


@pytest.fixture
def job(tmp_path):
    return Job(tmp_path)


def write_input(job, count=30, extra=()) -> None:
    lines = [request_line(number) for number in range(count)]
    write_lines(job.input, [*lines, *extra])


# --- what comes out ---


def test_result_line(job):
    write_byte_tokenizer(job.folder)
    item = {"custom_id": "a", "prompt": "hi", "max_tokens": 9, "temperature": 0, "seed": 4}
    write_lines(job.input, [item])
    assert job.run() == 0
    (line,) = read_output(job.output)
    (submitted,) = job.engine.submitted
    body = line["response"]["body"]
    choice = body["choices"][0]
    prompt = (256, 71, 72)  # <bos>, h, i
    sampling = SamplingParams(max_tokens=9, temperature=0.0, seed=4)
    tokens = fake_tokens(Request("a", prompt, sampling))
    assert line["custom_id"] == submitted == "a"
    assert line["error"] is None
    assert line["response"]["status_code"] == 200
    assert line["response"]["request_id"].startswith("req-")
    assert body["id"].startswith("cmpl-")
    assert (body["object"], body["model"]) == ("text_completion", "fake")
    assert choice["token_ids"] == list(tokens)
    assert choice["finish_reason"] == ("stop" if len(tokens) < 9 else "length")
    assert isinstance(choice["text"], str)
    assert (choice["index"], choice["logprobs"]) == (0, None)
    assert body["usage"] == {
        "prompt_tokens": 3,
        "completion_tokens": len(tokens),
        "total_tokens": 3 + len(tokens),
    }
    origin = line["apex"]
    assert origin["line"] == 1
    assert origin["sampling"] == json.loads(json.dumps(dataclasses.asdict(sampling)))
    raw = RawLine(1, json.dumps(item).encode(), 0, "")
    assert origin["request_sha256"] == parse_line(raw, SamplingDefaults()).sha256


def test_several_choices_of_a_line(job):
    write_byte_tokenizer(job.folder)
    asked = {"max_tokens": 20, "seed": 4, "prompt_logprobs": None}
    message = {"role": "user", "content": "ho"}
    write_template(job.folder, "{{ messages[0].content }}")
    lines = [
        {"custom_id": "alone", "prompt": "hi", **asked},
        {"custom_id": "a", "prompt": "hi", "n": 5, **asked},
        {"custom_id": "a#1", "prompt": "hi", **asked},  # what a choice of its would be called
        {"custom_id": "chat", "messages": [message], "n": 2, **asked},
    ]
    write_lines(job.input, lines)
    assert job.run(ordered=True) == 0
    alone, several, other, chat = (item["response"]["body"] for item in read_output(job.output))
    assert [choice["index"] for choice in several["choices"]] == list(range(5))
    assert several["choices"][0] == alone["choices"][0] == other["choices"][0]
    texts = [tuple(choice["token_ids"]) for choice in several["choices"]]
    assert len(set(texts)) == 5
    assert several["usage"] == {
        "prompt_tokens": alone["usage"]["prompt_tokens"],
        "completion_tokens": sum(map(len, texts)),
        "total_tokens": alone["usage"]["prompt_tokens"] + sum(map(len, texts)),
    }
    assert [choice["message"]["role"] for choice in chat["choices"]] == ["assistant"] * 2
    assert len(job.engine.submitted) == len(set(job.engine.submitted)) == 9
    assert "4 finished, 0 failed" in job.said
    assert job.run() == 0
    assert job.engine.submitted == []


def test_a_group_without_room_is_refused_as_one(job):
    write_lines(job.input, [{"custom_id": "a", "prompt_token_ids": [1] * 500, "n": 3}])
    assert job.run() == 1
    (line,) = read_output(job.output)
    assert line["error"]["message"] == "516 tokens, and the limit is 200"
    assert job.engine.submitted == []


def test_stop_token_is_in_token_ids_but_not_in_text(job):
    write_byte_tokenizer(job.folder)

    class Stopping(FakeEngine):
        def step(self):
            return [
                RequestOutput(request, (65, 66, 67), FinishReason.STOP, 0.0, 1.0, 2.0, 0, 0)
                for request in [self.waiting.pop()]
            ]

    write_lines(job.input, [{"custom_id": "a", "prompt": "x", "stop_token_ids": [67]}])
    assert job.run(engine=Stopping) == 0
    (line,) = read_output(job.output)
    choice = line["response"]["body"]["choices"][0]
    assert choice["token_ids"] == [65, 66, 67]
    assert choice["text"] == "bc"
    assert choice["stop_reason"] == 67


def test_stop_strings_end_outputs(job):
    tokenizer = JsonTokenizer(write_byte_tokenizer(job.folder))

    class Speaking(FakeEngine):
        def step(self):
            outputs = []
            for request in self.waiting:
                tokens = tokenizer.encode("one two three", add_special_tokens=False)
                count = next((i for i, one in enumerate(tokens, 1) if request.is_last(one)), None)
                reason = FinishReason.LENGTH if count is None else FinishReason.STOP
                times = (0.0, 1.0, 2.0)
                outputs.append(RequestOutput(request, tokens[:count], reason, *times, 0, 0))
            self.waiting.clear()
            return outputs

    stops = {
        "a": {"stop": " t"},
        "b": {"stop": ["?", " two"], "include_stop_str_in_output": True},
        "c": {"stop": "four"},
    }
    lines = [{"custom_id": name, "prompt": "x", **stop} for name, stop in stops.items()]
    write_lines(job.input, lines)
    assert job.run(engine=Speaking) == 0
    items = read_output(job.output)
    choices = [item["response"]["body"]["choices"][0] for item in items]
    assert [choice["text"] for choice in choices] == ["one", "one two", "one two three"]
    assert [choice["stop_reason"] for choice in choices] == [" t", " two", None]
    assert [choice["finish_reason"] for choice in choices] == ["stop", "stop", "length"]
    assert [len(choice["token_ids"]) for choice in choices] == [5, 7, 13]
    assert items[0]["response"]["body"]["usage"]["completion_tokens"] == 5

    job.output.write_bytes(job.output.read_bytes()[:20])
    assert job.run(engine=Speaking) == 0
    assert without_time(read_output(job.output)) == without_time(items)


def test_stop_strings_need_a_tokenizer(job):
    write_lines(job.input, [{"custom_id": "a", "prompt": [1], "stop": "x"}])
    assert job.run() == 1
    (line,) = read_output(job.output)
    assert line["error"]["message"] == (
        f"stop is text, and there is no {job.folder}/tokenizer.json or tokenizer.model: give "
        "stop_token_ids"
    )


def write_template(folder, template):
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps({"chat_template": template, "bos_token": "<bos>"}))


def test_chat_line(job):
    write_byte_tokenizer(job.folder)
    write_template(job.folder, "{{ bos_token }}{{ messages[0].content }}:")
    body = {"model": "m", "messages": [{"role": "user", "content": "hi"}], "temperature": 0}
    write_lines(job.input, [{"custom_id": "a", "url": "/v1/chat/completions", "body": body}])
    assert job.run() == 0
    (line,) = read_output(job.output)
    body = line["response"]["body"]
    (choice,) = body["choices"]
    assert body["id"].startswith("chatcmpl-")
    assert body["object"] == "chat.completion"
    assert set(choice["message"]) == {"role", "content"}
    assert choice["message"]["role"] == "assistant"
    assert isinstance(choice["message"]["content"], str)
    assert "text" not in choice
    assert body["usage"]["prompt_tokens"] == 4  # <bos>, h, i, :

    write_template(job.folder, "other")
    assert job.run() == 2
    assert "belongs to another job: chat_template_sha256 was" in job.said


def test_a_resumed_job_tells_chats_the_time_of_its_first_start(job):
    write_byte_tokenizer(job.folder)
    write_template(job.folder, "{{ strftime_now('%f') }}")
    prompts = []

    class Listening(FakeEngine):
        def submit(self, request):
            prompts.append(request.prompt_token_ids)
            super().submit(request)

    line = {"custom_id": "a", "messages": [{"role": "user", "content": "hi"}], "temperature": 0}
    write_lines(job.input, [line])
    assert job.run(engine=Listening) == 0
    whole = job.output.read_bytes()
    write_lines(job.input, [line, {**line, "custom_id": "b"}])
    assert job.run(engine=Listening) == 0
    assert job.output.read_bytes().startswith(whole)
    assert prompts[0] == prompts[1]
    assert job.run(engine=Listening, overwrite=True) == 0
    assert prompts[2] == prompts[3] != prompts[1]


def test_every_line_is_answered_once_and_bad_ones_say_why(job):
    write_input(job, 30, BAD_LINES)
    assert job.run() == 1
    found = without_time(read_output(job.output))
    assert len(found) == 36
    errors = {item["apex"]["line"]: item for item in found.values() if item["error"]}
    said = {line: item["error"]["message"] for line, item in errors.items()}
    assert said == {
        31: "line 31: not JSON: Expecting value at character 0",
        32: "line 32: best_of is 2, which this version does not do: n gives all of them",
        33: "line 33: custom_id is missing: it is what finds the result, and what resumes",
        34: "516 tokens, and the limit is 200",
        35: "line 35: custom_id is that of line 4 already; every line needs its own",
        36: f"prompt is text, and there is no {job.folder}/tokenizer.json or tokenizer.model: give "
        "prompt_token_ids",
    }
    assert [errors[line]["custom_id"] for line in (31, 32, 33, 34, 35)] == [
        None,
        "bad",
        None,
        "long",
        "r3",
    ]
    assert all(item["response"] is None for item in errors.values())
    codes = [errors[line]["error"]["code"] for line in (31, 32, 35)]
    assert codes == ["invalid_json", "invalid_request", "duplicate_custom_id"]
    assert "30 finished, 6 failed" in job.said


def test_tilde_in_the_model_path(job, monkeypatch):
    monkeypatch.setenv("HOME", str(job.folder.parent))
    config = make_config(f"~/{job.folder.name}")
    write_lines(job.input, [{"custom_id": "a", "prompt": "hi"}])
    assert job.run(config=config) == 1
    (line,) = read_output(job.output)
    assert f"there is no {job.folder}/tokenizer.json" in line["error"]["message"]
    write_byte_tokenizer(job.folder)
    assert job.run(config=config, overwrite=True) == 0
    assert f"tokenizer  {job.folder}/tokenizer.json" in job.said


def test_results_without_a_tokenizer_have_no_text(job):
    write_input(job, 1)
    assert job.run() == 0
    assert read_output(job.output)[0]["response"]["body"]["choices"][0]["text"] is None
    assert "tokenizer  none: token-id prompts only" in job.said


def test_ordered_and_unordered(job):
    write_input(job, 60, BAD_LINES)
    job.run()
    first = [item["apex"]["line"] for item in read_output(job.output)]
    assert first != sorted(first)
    other = job.folder / "ordered.jsonl"
    assert job.run(output=other, ordered=True) == 1
    assert [item["apex"]["line"] for item in read_output(other)] == list(range(1, 67))
    assert without_time(read_output(other)) == without_time(read_output(job.output))


def test_input_is_read_as_the_engine_needs_it(job):
    write_input(job, 400)
    job.run()
    assert job.engine.most_waiting <= 8  # twice max_requests


def test_ordered_window_is_bounded(job, monkeypatch):
    """One slow request at the head: the job reads only so far ahead of it."""
    monkeypatch.setattr("apex_jax.batch.loop.MIN_REORDER", 12)
    monkeypatch.setattr("apex_jax.batch.loop.REORDER_FACTOR", 1)

    class SlowHead(FakeEngine):
        def step(self):
            if "r0" in self.running and self.num_sweeps < 60:
                request, _, arrival = self.running["r0"]
                self.running["r0"] = (request, 61, arrival)
                assert len(self.submitted) <= 12
            return super().step()

    write_input(job, 100)
    assert job.run(engine=SlowHead, ordered=True) == 0
    assert [item["custom_id"] for item in read_output(job.output)] == [
        f"r{number}" for number in range(100)
    ]


def test_empty_input(job):
    write_lines(job.input, ["\n", "   \n"])
    assert job.run() == 0
    assert read_output(job.output) == []


def test_input_from_a_pipe(job):
    path = job.folder / "pipe"
    os.mkfifo(path)

    def write():
        write_lines(path, [request_line(number) for number in range(20)])

    for _ in range(2):
        thread = threading.Thread(target=write)
        thread.start()
        assert job.run(input=path) == 0
        thread.join()
        assert len(read_output(job.output)) == 20
    assert "size unknown" in job.said
    assert "20 finished before" in job.said


# --- what is said ---


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


# --- resuming ---


@pytest.mark.parametrize("ordered", [False, True])
def test_resume_completes_the_rest(job, ordered):
    write_input(job, 40, BAD_LINES)
    assert job.run(ordered=ordered) == 1
    whole = job.output.read_bytes()
    expected = without_time(read_output(job.output))
    lines = whole.splitlines(keepends=True)
    random.seed(0)
    for keep in (0, 1, 17, len(lines)):
        kept = lines[:keep] if ordered else random.sample(lines, keep)
        job.output.write_bytes(b"".join(kept) + b'{"custom_id": "r1')
        assert job.run(ordered=ordered) == 1
        assert without_time(read_output(job.output)) == expected
        assert job.output.read_bytes().startswith(b"".join(kept))
        assert len(job.engine.submitted) <= 46 - keep
        if ordered:
            found = [item["apex"]["line"] for item in read_output(job.output)]
            assert found == sorted(found)
        assert f"{keep} lines finished before" in job.said


def test_ordered_run_puts_an_unordered_output_in_order(job):
    write_input(job, 40)
    job.run()
    lines = job.output.read_bytes().splitlines(keepends=True)
    job.output.write_bytes(b"".join(reversed(lines[:25])))
    assert job.run(ordered=True) == 0
    assert [item["apex"]["line"] for item in read_output(job.output)] == list(range(1, 41))


def test_retry_failed(job):
    write_input(job, 10, BAD_LINES)
    assert job.run() == 1
    before = without_time(read_output(job.output))
    assert job.run(retry_failed=True) == 1
    assert without_time(read_output(job.output)) == before
    write_byte_tokenizer(job.folder)
    assert job.run(retry_failed=True) == 2
    assert "tokenizer_sha256 was null, now" in job.said
    (job.folder / "tokenizer.json").unlink()
    repaired = ["", *[{"custom_id": f"new{i}", "prompt_token_ids": [i]} for i in range(6)]]
    write_input(job, 10, repaired)
    assert job.run() == 2
    assert "line 11: it failed as a line that could not run, and now it could" in job.said
    assert "--retry_failed runs failed lines again" in job.said
    assert without_time(read_output(job.output)) == before
    assert job.run(retry_failed=True, ordered=True) == 0
    found = read_output(job.output)
    assert [item["apex"]["line"] for item in found] == list(range(1, 17))
    assert job.engine.submitted == [f"new{i}" for i in range(6)]


def test_failed_lines_stay_failed_without_retry(job):
    write_input(job, 4, BAD_LINES)
    job.run()
    before = job.output.read_bytes()
    assert job.run() == 1
    assert job.output.read_bytes() == before
    assert job.engine.submitted == []
    assert "10 lines finished before, 6 of them failed" in job.said


def test_appended_input_is_more_work_and_removed_lines_are_noted(job):
    write_input(job, 5)
    job.run()
    write_input(job, 8)
    assert job.run() == 0
    assert len(read_output(job.output)) == 8
    write_input(job, 6)
    assert job.run() == 0
    assert "note: 2 results in" in job.said


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"max_tokens": 3}, "'r1' (line 2): max_tokens was 6, now 3;"),
        ({"top_p": 0.5, "top_k": 2}, "top_k was 0, now 2; top_p was 1.0, now 0.5;"),
        ({"stop_token_ids": [4]}, "stop_token_ids was [], now [4];"),
        ({"prompt_token_ids": [9, 9]}, "'r1' (line 2): the prompt;"),
        ({"n": 2}, "'r1' (line 2): n was 1, now 2;"),
        ({"n": 0}, "'r1' (line 2): the line cannot run now (n is 0"),
    ],
)
@pytest.mark.parametrize("pipe", [False, True])
def test_changed_request_stops_the_job(job, change, message, pipe):
    write_input(job, 5)
    job.run()
    before = job.output.read_bytes()
    lines = [request_line(number) for number in range(5)]
    lines[1] = request_line(1, **change)
    write_lines(job.input, lines)
    if pipe:  # an input that can be read only once is compared on the way
        data, path = job.input.read_bytes(), job.folder / "pipe"
        os.mkfifo(path)
        thread = threading.Thread(target=path.write_bytes, args=(data,))
        thread.start()
        assert job.run(input=path) == 3
        thread.join()
    else:
        assert job.run() == 2
        assert job.engine is None, "refused before the model loads"
    assert message in job.said
    assert "go back to what it was, name another --output, or drop all results" in job.said
    assert job.output.read_bytes() == before
    num_choices = change.get("n", 1)
    assert job.run(overwrite=True) == (0 if num_choices else 1)
    assert len(read_output(job.output)) == 5
    assert len(job.engine.submitted) == 4 + num_choices


def test_repaired_request_is_refused_until_retried(job):
    write_input(job, 2, [{"custom_id": "x", "prompt_token_ids": [1], "n": 0}])
    assert job.run() == 1
    write_input(job, 2, [{"custom_id": "x", "prompt_token_ids": [1]}])
    assert job.run() == 2
    assert "'x' (line 3): the line could not run before, and now it could" in job.said
    assert job.run(retry_failed=True) == 0


def test_changed_bad_line_is_refused(job):
    write_lines(job.input, ["nonsense\n"])
    assert job.run() == 1
    write_lines(job.input, ["other nonsense\n"])
    assert job.run() == 2
    assert "answered line 1: its text" in job.said


@pytest.mark.parametrize(
    ("sampling", "fingerprint", "message"),
    [
        ({}, "beef", 'model.fingerprint was "f00d", now "beef"; go back'),
        ({"temperature": 0.5}, "f00d", "defaults.temperature was 1.0, now 0.5; go back"),
        ({"seed": 1}, "f00d", "defaults.seed was 0, now 1; go back"),
    ],
)
@pytest.mark.parametrize("sidecar", [True, False])
def test_other_model_or_defaults_stop_the_job(job, sampling, fingerprint, message, sidecar):
    explicit = {"temperature": 0, "seed": 1, "top_p": 1, "top_k": 0}
    write_lines(job.input, [request_line(number, **explicit) for number in range(4)])
    job.run()
    before = job.output.read_bytes()
    if not sidecar:
        job.sidecar.write_text("[torn")
        message = "out.jsonl.job.json, which could say what differs, is lost or does not match"

    def engine(config, timeline):
        return FakeEngine(config, timeline, fingerprint=fingerprint)

    config = make_config(job.folder, **sampling)
    assert job.run(config=config, engine=engine) == 2
    assert f"{job.output} belongs to another job" in job.said
    assert message in job.said
    assert job.output.read_bytes() == before
    assert job.run(config=config, engine=engine, overwrite=True) == 0
    assert job.run(config=config, engine=engine) == 0
    assert job.engine.submitted == []


def test_lost_sidecar_of_the_same_job_is_written_again(job):
    write_input(job, 3)
    job.run()
    identity = json.loads(job.sidecar.read_text())
    job.sidecar.unlink()
    assert job.run() == 0
    assert json.loads(job.sidecar.read_text()) == identity


def test_differences_of_identities():
    old = {"model": {"dtype": "float32", "gone": 1}, "format": 1}
    new = {"model": {"dtype": "float16"}, "format": 1, "more": None}
    assert differences(old, new) == [
        'model.dtype was "float32", now "float16"',
        "more was null, now null",
    ]


# --- refusals before anything happens ---


def test_refused_paths(job):
    write_input(job, 2)
    folder = job.folder
    for options, message in (
        ({"input": folder / "no.jsonl"}, f"cannot read --input={folder}/no.jsonl: No such file"),
        ({"input": folder}, f"cannot read --input={folder}: Is a directory"),
        ({"output": job.input}, f"--output is the input, {job.input}"),
        ({"metrics": job.input}, "--metrics is the input"),
        ({"metrics": job.output}, "--metrics is the output"),
        ({"output": folder}, "is a folder; name a file"),
        ({"output": folder / "no" / "out"}, f"there is no folder {folder}/no"),
        ({"metrics": folder / "no" / "m"}, f"there is no folder {folder}/no"),
        ({"trace": job.input}, "--trace is the input"),
        ({"trace": job.output}, "--trace is the output"),
        ({"metrics": folder / "x", "trace": folder / "x"}, f"--trace is the metrics, {folder}/x"),
        ({"trace": folder}, f"--trace={folder} is a folder; name a file"),
        ({"trace": folder / "no" / "t"}, f"--trace={folder}/no/t: there is no folder {folder}/no"),
        ({"trace": Path("/proc/trace")}, "error: cannot write --trace=/proc/trace: No such file"),
        ({"overwrite": True, "retry_failed": True}, "--retry_failed has no meaning"),
    ):
        assert job.run(**options) == 2
        assert message in job.said
        assert job.engine is None
        assert sorted(os.listdir(folder)) == ["in.jsonl"]


@pytest.mark.parametrize("name", ["metrics", "trace"])
def test_a_device_is_not_replaced(job, name):
    """A fifo stands for /dev/null, which root would lose."""
    write_input(job, 2)
    pipe = job.folder / "pipe"
    os.mkfifo(pipe)
    assert job.run(**{name: pipe}) == 2
    assert f"--{name}={pipe} is no regular file, and would be replaced" in job.said
    assert pipe.is_fifo()
    assert not job.output.exists()


def test_refused_config_and_tokenizer(job):
    write_input(job, 2)
    config = make_config(job.folder)
    config.model.dtype = "float8"
    assert job.run(config=config) == 2
    assert job.said.startswith("error: --config.model.dtype is 'float8'; it must be one of")

    assert job.run(config=make_config(job.folder, top_p=2.0)) == 2
    assert job.said == ("error: --config.sampling.top_p is 2.0; it must be above 0 and at most 1\n")
    assert job.engine is None

    def failing(config, timeline):
        raise ConfigError("no room for the weights")

    assert job.run(engine=failing, trace=job.folder / "trace.json") == 2
    assert "error: no room for the weights" in job.said
    assert not (job.folder / "trace.json").exists()
    (job.folder / "tokenizer.json").write_text("{")
    assert job.run() == 2
    assert "tokenizer.json is not a tokenizer.json that loads" in job.said
    write_byte_tokenizer(job.folder)

    def small(config, timeline):
        engine = FakeEngine(config, timeline)
        engine.model.architecture = dataclasses.replace(engine.model.architecture, vocab_size=20)
        return engine

    assert job.run(engine=small) == 2
    assert "vocabulary has 20: they do not belong together" in job.said
    assert not job.output.exists()


def test_foreign_output_is_refused_and_overwritten_on_demand(job):
    write_input(job, 2)
    job.output.write_text("my diary\n")
    assert job.run() == 2
    assert "is not the output of a batch job: line 1" in job.said
    assert job.output.read_text() == "my diary\n"

    def failing(config, timeline):
        raise ConfigError("no room")

    assert job.run(overwrite=True, engine=failing) == 2
    assert job.output.read_text() == "my diary\n", "kept until the job really starts"
    assert job.run(overwrite=True) == 0
    assert len(read_output(job.output)) == 2


# --- faults and signals ---


def test_full_disk_stops_and_resumes(job, monkeypatch):
    write_input(job, 20)
    assert job.run(output=job.folder / "whole.jsonl") == 0
    expected = without_time(read_output(job.folder / "whole.jsonl"))
    real = os.write

    def write(descriptor, data):
        if os.fstat(descriptor).st_size > 3000:
            real(descriptor, data[:50])
            raise OSError(28, os.strerror(28))
        return real(descriptor, data)

    monkeypatch.setattr("apex_jax.batch.job.Journal", functools.partial(Journal, write=write))
    assert job.run(metrics=job.folder / "m.json") == 3
    assert "out.jsonl: No space left on device; the " in job.said
    assert json.loads((job.folder / "m.json").read_text())["complete"] is False
    kept = read_output(job.output)
    assert 0 < len(kept) < 20
    monkeypatch.undo()
    assert job.run() == 0
    assert without_time(read_output(job.output)) == expected
    assert len(job.engine.submitted) == 20 - len(kept)


@pytest.mark.parametrize("output", ["out.jsonl", "/dev/full"])
def test_metrics_that_cannot_be_written(job, output):
    """Their error is said; the job keeps its own status and, last, its own error."""
    metrics = job.folder / "gone" / "m.json"
    metrics.parent.mkdir()
    write_input(job, 20)

    class Vanishing(FakeEngine):
        def step(self):
            if metrics.parent.exists():
                metrics.parent.rmdir()
            return super().step()

    status = job.run(engine=Vanishing, output=job.folder / output, metrics=metrics)
    error = f"error: cannot write {metrics}: No such file or directory; the results are not"
    assert error in job.said
    last = job.said.splitlines()[-1]
    if output == "/dev/full":
        assert status == 3
        assert last.startswith("error: cannot write /dev/full: No space left on device; the ")
    else:
        assert status == 0
        assert last.startswith(error)
        assert len(read_output(job.output)) == 20


def test_engine_fault_keeps_what_is_written(job):
    class Breaking(FakeEngine):
        def step(self):
            if self.num_sweeps == 6:
                raise RuntimeError("device lost")
            return super().step()

    write_input(job, 40)
    with pytest.raises(RuntimeError, match="device lost"):
        job.run(engine=Breaking, ordered=True)
    kept = len(read_output(job.output))
    assert kept > 0
    assert job.run(ordered=True) == 0
    assert len(job.engine.submitted) == 40 - kept
    assert [item["apex"]["line"] for item in read_output(job.output)] == list(range(1, 41))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("ordered", [False, True])
def test_signal_writes_what_is_complete(job, number, ordered):
    delivered: list[str] = []

    class Signalled(FakeEngine):
        def step(self):
            outputs = super().step()
            delivered.extend(output.request.request_id for output in outputs)
            if self.num_sweeps == 8:
                os.kill(os.getpid(), number)
            assert self.num_sweeps <= 8
            return outputs

    write_input(job, 40)
    handler = signal.getsignal(number)
    assert job.run(engine=Signalled, ordered=ordered) == 128 + number
    assert signal.getsignal(number) is handler
    assert f"interrupted by {signal.Signals(number).name}: what is complete is in" in job.said
    assert "start the same command again to go on" in job.said
    assert {item["custom_id"] for item in read_output(job.output)} == set(delivered)
    assert job.run(ordered=ordered) == 0
    found = [item["apex"]["line"] for item in read_output(job.output)]
    assert sorted(found) == list(range(1, 41))
    assert not ordered or found == sorted(found)


def test_signal_while_loading_changes_nothing(job):
    write_input(job, 3)

    def loading(config, timeline):
        os.kill(os.getpid(), signal.SIGTERM)
        raise AssertionError("not reached")

    assert job.run(engine=loading) == 128 + signal.SIGTERM
    assert "interrupted by SIGTERM before the work began" in job.said
    assert not job.output.exists()


def test_job_runs_in_a_thread(job):
    """Handlers belong to the main thread; elsewhere the job runs without."""
    write_input(job, 3)
    status: list[int] = []
    thread = threading.Thread(target=lambda: status.append(job.run()))
    thread.start()
    thread.join()
    assert status == [0]


def test_a_misspelt_model_folder_is_not_taken_for_another_job(job):
    write_lines(job.input, [{"custom_id": "a", "prompt": [1]}])
    assert job.run() == 0
    assert job.run(config=make_config("/nowhere")) == 2
    assert "--config.model.path is '/nowhere'; there is no such folder" in job.said
    assert "belongs to another job" not in job.said


def test_failed_lines_are_pointed_at(job):
    write_lines(job.input, [{"custom_id": "a", "prompt": [1]}, {"custom_id": "b"}])
    assert job.run() == 1
    assert f"note: 1 lines failed; each has a line in {job.output} whose" in job.said
