"""What a batch job writes, with an engine that needs no model: results, errors, their order."""

import dataclasses
import json
import os
import threading

import pytest
from batch_files import (
    BAD_LINES,
    Job,
    make_config,
    read_output,
    request_line,
    without_time,
    write_byte_tokenizer,
    write_input,
    write_lines,
)
from fake_engine import FakeEngine, fake_tokens

from apex_jax.batch.lines import RawLine, parse_line
from apex_jax.config import SamplingDefaults
from apex_jax.request import FinishReason, Request, RequestOutput, SamplingParams
from apex_jax.text.tokenizer import JsonTokenizer


@pytest.fixture
def job(tmp_path):
    return Job(tmp_path)


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
