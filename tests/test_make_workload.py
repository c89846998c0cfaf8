"""Workloads: sets are what they say, imports keep what files hold, what is wrong is one line."""

import json
import pathlib
import statistics
import subprocess
import sys
from types import SimpleNamespace

import pytest

from apex_jax.config import ConfigError, SamplingDefaults
from apex_jax.text.model_text import load_text
from launch.comparison.decode import FileError
from launch.comparison.workload_file import read_workload
from launch.comparison.workload_rate import offered_at
from launch.comparison.workload_sets import NAMES, middle_of
from launch.make_workload import import_batch, main, make

ROOT = pathlib.Path(__file__).parents[1]
DEMO = ROOT / "configs" / "demo_model"
SPECIAL_IDS = {0, 1}  # of the demo model

pytestmark = pytest.mark.main_python


def values(**others):
    given = {
        "set": None,
        "azure_csv": None,
        "sharegpt_json": None,
        "requests": None,
        "model": None,
        "vocab_size": 32_000,
        "num_requests": None,
        "prompt_tokens": None,
        "output_tokens": None,
        "max_model_len": None,
        "arrivals": None,
        "request_rate": None,
        "burst_size": 8,
        "seed": 0,
        "name": None,
    }
    return SimpleNamespace(**(given | others))


def lengths_of(workload):
    return [(len(one.prompt_token_ids), one.output_tokens) for one in workload.requests]


def arrivals_of(workload):
    return [one.arrival_sec for one in workload.requests]


def mean(numbers):
    return statistics.fmean(numbers)


# Named sets


@pytest.mark.parametrize("name", NAMES)
def test_every_set_can_be_drawn(name):
    workload = make(values(set=name, num_requests=3, prompt_tokens=20, output_tokens=5))
    assert len(workload.requests) == workload.header.num_requests == 3
    assert workload.header.name == name
    assert workload.header.source
    assert {one.arrival_sec for one in workload.requests} == {0.0}
    assert all(one in middle_of(32_000) for one in workload.requests[0].prompt_token_ids)


def test_lengths_are_as_the_set_says():
    neo = lengths_of(make(values(set="neo_400", num_requests=50)))
    assert all(900 <= prompt <= 1100 and 360 <= output <= 440 for prompt, output in neo)
    assert len({prompt for prompt, _ in neo}) > 20
    short = lengths_of(make(values(set="short_long_256_2048", num_requests=2)))
    assert short == [(256, 2048)] * 2
    constant = values(set="constant", num_requests=2, prompt_tokens=7, output_tokens=9)
    assert lengths_of(make(constant)) == [(7, 9)] * 2


@pytest.mark.parametrize(("name", "means"), [("sharegpt", (161, 338)), ("lmsys", (69.5, 214.5))])
def test_twins_have_the_published_means(name, means):
    workload = make(values(set=name, num_requests=3000))
    for column, expected in zip(zip(*lengths_of(workload), strict=True), means, strict=True):
        assert mean(column) == pytest.approx(expected, rel=0.08)  # four standard errors
        assert statistics.stdev(column) == pytest.approx(mean(column), rel=0.25)
    assert "which is assumed" in workload.header.description


def test_what_is_longer_is_left_out_and_said():
    workload = make(values(set="azure_conv", num_requests=50, max_model_len=1000))
    assert max(map(sum, lengths_of(workload))) <= 1000
    assert 0.3 < workload.header.share_dropped < 0.7
    assert workload.header.max_model_len == 1000


def test_a_models_special_tokens_are_never_drawn():
    workload = make(values(set="osc", num_requests=40, model=str(DEMO)))
    drawn = {token for one in workload.requests for token in one.prompt_token_ids}
    assert len(drawn) > 3500  # nearly all of the 4,096
    assert not drawn & SPECIAL_IDS
    assert workload.header.vocab_size == 4096
    assert "not special" in workload.header.description


# Arrivals


def test_arrivals():
    given = {"set": "constant", "prompt_tokens": 1, "output_tokens": 1, "num_requests": 400}
    poisson = arrivals_of(make(values(**given, arrivals="poisson", request_rate=4.0)))
    assert poisson == sorted(poisson)
    assert poisson[-1] == pytest.approx(100, rel=0.2)
    burst = arrivals_of(make(values(**given, arrivals="burst", request_rate=4.0, burst_size=100)))
    assert [burst.count(second) for second in (0.0, 25.0, 50.0, 75.0)] == [100] * 4


def test_a_rate_stretches_arrivals_and_makes_poissons_of_none():
    given = {"set": "constant", "prompt_tokens": 1, "output_tokens": 1, "num_requests": 8}
    burst = make(values(**given, arrivals="burst", request_rate=4.0, burst_size=4))
    assert arrivals_of(burst)[3:5] == [0.0, 1.0]
    assert [one.arrival_sec for one in offered_at(burst, 2.0)][3:5] == [0.0, 4.0]
    assert offered_at(burst, None) == burst.requests
    at_once = make(values(**given))
    offered = [one.arrival_sec for one in offered_at(at_once, 2.0)]
    assert offered == [one.arrival_sec for one in offered_at(at_once, 2.0)]
    assert offered == sorted(offered)
    assert [2 * second for second in offered] == pytest.approx(
        [4 * one.arrival_sec for one in offered_at(at_once, 4.0)]
    )


# Imports

AZURE = """TIMESTAMP,ContextTokens,GeneratedTokens
2023-11-16 18:17:05.9799600,30,5
2023-11-16 18:17:03.9799600,20,4
2023-11-16 18:17:07.4799600,4000,4
2023-11-16 18:17:08.4799600,10,0
2023-11-16 18:17:09.9799600,40,6
"""


def test_a_trace_keeps_its_lengths_and_times(tmp_path):
    path = tmp_path / "trace.csv"
    path.write_text(AZURE)
    workload = make(values(azure_csv=str(path), max_model_len=100))
    assert lengths_of(workload) == [(20, 4), (30, 5), (40, 6)]
    assert arrivals_of(workload) == pytest.approx([0.0, 2.0, 6.0])
    assert workload.header.share_dropped == 2 / 5
    assert workload.header.name == "trace"
    assert workload.header.arrivals == "as in the trace, 0.5 a second on average"
    at_once = make(values(azure_csv=str(path), num_requests=1, arrivals="at_once"))
    assert arrivals_of(at_once) == [0.0]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"trace.csv, line 1 is .* begins with TIMESTAMP,ContextTokens,GeneratedTokens"),
        ("a,b,c\n", r'trace.csv, line 1 is "a,b,c"; a trace as Azure'),
        (AZURE.splitlines()[0], r"trace.csv has no requests after its first line"),
        (AZURE + "2023-11-16 18:17:09,x,6\n", r"line 7: ContextTokens is 'x'; .* count"),
        (AZURE + "2023-11-16 18:17:09,4\n", r"line 7: GeneratedTokens is None; .* count"),
        (AZURE + "noon,4,4\n", r"line 7: TIMESTAMP is 'noon'; it must be like 2023"),
    ],
)
def test_a_trace_that_is_none_is_refused_by_its_line(tmp_path, text, message):
    path = tmp_path / "trace.csv"
    path.write_text(text)
    with pytest.raises(FileError, match=message):
        make(values(azure_csv=str(path)))


def conversation(*texts):
    return {"id": "x", "conversations": [{"from": "human", "value": text} for text in texts]}


def test_conversations_give_the_first_question_and_its_answers_length(tmp_path):
    path = tmp_path / "sharegpt.json"
    path.write_text(
        json.dumps([conversation("Return a list", "of the words", "more"), conversation("alone")])
    )
    workload = make(values(sharegpt_json=str(path), model=str(DEMO)))
    (request,) = workload.requests
    tokenizer = load_text(DEMO).tokenizer
    assert request.prompt_token_ids == tokenizer.encode("Return a list", add_special_tokens=True)
    answer = tokenizer.encode("of the words", add_special_tokens=True)
    assert request.output_tokens == len(answer)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", r"sharegpt.json is not JSON"),
        ("{}", r"sharegpt.json holds \{\}; it must be a list of conversations"),
        ("[1]", r"sharegpt.json, entry 0 has no list of conversations"),
        ('[{"conversations": [{"value": 1}]}]', r"entry 0: a turn has no text as its value"),
    ],
)
def test_conversations_that_are_none_are_refused_by_entry(tmp_path, content, message):
    path = tmp_path / "sharegpt.json"
    path.write_text(content)
    with pytest.raises(FileError, match=message):
        make(values(sharegpt_json=str(path), model=str(DEMO)))


def write_batch(folder, *lines):
    path = folder / "mine.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_a_batch_jobs_input_is_a_workload(tmp_path):
    path = write_batch(
        tmp_path,
        {"custom_id": "a", "prompt": "Return a list", "max_tokens": 9},
        {"custom_id": "b", "prompt_token_ids": [5, 6]},
    )
    text = load_text(DEMO)
    workload = import_batch(path, SamplingDefaults(max_tokens=3), text, 4096)
    first, second = workload.requests
    assert first.prompt_token_ids == text.encode("Return a list")
    assert (first.id, first.output_tokens, second.output_tokens) == ("a", 9, 3)
    assert second.prompt_token_ids == (5, 6)
    made = make(values(requests=str(path), model=str(DEMO), max_model_len=17))
    assert [one.id for one in made.requests] == ["a"]  # 16 tokens of output are the default
    assert made.header.share_dropped == 0.5


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([{"custom_id": "a"}], r"mine.jsonl, line 1: .*prompt"),
        ([{"custom_id": "a", "prompt": "x"}] * 2, r"line 2: custom_id 'a' is line 1's too"),
        ([{"custom_id": "a", "messages": [{"role": "user", "content": "x"}]}], r"line 1: messages"),
        ([], r"mine.jsonl has no requests"),
    ],
)
def test_a_batch_line_that_cannot_run_is_refused(tmp_path, lines, message):
    with pytest.raises(FileError, match=message):
        import_batch(write_batch(tmp_path, *lines), SamplingDefaults(), load_text(DEMO), 4096)


# What is refused


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, r"exactly one of --set, --azure_csv, --sharegpt_json, --requests; given: none"),
        ({"set": "osc", "requests": "x"}, r"exactly one of .*; given: set, requests"),
        ({"set": "uniform"}, r"--set=uniform needs --prompt_tokens and --output_tokens"),
        ({"set": "osc", "arrivals": "poisson"}, r"--arrivals=poisson needs --request_rate"),
        ({"set": "osc", "arrivals": "trace"}, r"--arrivals=trace are those of a trace: give"),
        ({"set": "neo_50", "max_model_len": 100}, r"hardly any request .* at most 100 tokens"),
        ({"sharegpt_json": "mine.json"}, r"--model must name its folder"),
        ({"set": "osc", "model": "/nowhere"}, r"/nowhere.*no such folder"),
    ],
)
def test_flags_that_make_no_workload_are_refused(given, message):
    with pytest.raises(ConfigError, match=message):
        make(values(**given))


def test_limits_that_nothing_keeps_are_refused(tmp_path):
    path = tmp_path / "trace.csv"
    path.write_text(AZURE)
    with pytest.raises(ConfigError, match="none of the requests has at most --max_model_len=3"):
        make(values(azure_csv=str(path), max_model_len=3))
    with pytest.raises(ConfigError, match="--request_rate is for --arrivals=poisson and burst"):
        make(values(azure_csv=str(path), request_rate=1.0))


@pytest.mark.parametrize(("name", "reader"), [("azure_csv", "csv"), ("sharegpt_json", "json")])
def test_a_file_that_is_not_there_is_named(name, reader):
    with pytest.raises(FileError, match=f"/nowhere.{reader} cannot be read: No such file"):
        make(values(**{name: f"/nowhere.{reader}"}, model=str(DEMO)))


def test_the_command_writes_a_file_and_says_what_it_is(tmp_path):
    path = tmp_path / "new" / "w.jsonl"
    done = subprocess.run(
        [
            *(sys.executable, "-m", "launch.make_workload"),
            *("--set=neo_50", "--num_requests=2", f"--output={path}"),
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    assert "neo_50, 2 requests" in done.stdout
    assert len(read_workload(path).requests) == 2


@pytest.mark.parametrize(
    ("output", "rest", "message"),
    [
        (None, [], "--output is missing"),
        ("/proc/none/w", [], "cannot write --output=/proc/none/w: No such file"),
        ("w.jsonl", ["y"], "'y' is no flag; values are given as --name=value"),
    ],
)
def test_a_command_that_cannot_be_carried_out_is_refused(capsys, output, rest, message):
    given = values(set="neo_50", num_requests=1, output=output)
    assert main(["make_workload", *rest], given) == 2
    assert capsys.readouterr().err.startswith(f"error: {message}")


def test_requests_of_token_ids_need_no_tokenizer(tmp_path):
    source = tmp_path / "ids.jsonl"
    source.write_text('{"custom_id": "a", "prompt_token_ids": [5, 6], "max_tokens": 3}\n')
    (request,) = make(values(requests=str(source))).requests
    assert request.prompt_token_ids == (5, 6)
    source.write_text('{"custom_id": "a", "prompt": "text", "max_tokens": 3}\n')
    with pytest.raises(FileError, match="line 1: prompt is text, and there is no tokenizer"):
        make(values(requests=str(source)))
