"""Workload and result files: what is written is read again, and what is wrong is said by place."""

import dataclasses
import json
import random

import pytest

from launch.comparison.decode import FileError
from launch.comparison.result_file import ComparisonFile
from launch.comparison.results import (
    FORMAT,
    Budgets,
    ModelUsed,
    Quantiles,
    ResultHeader,
    RunRow,
    WorkloadUsed,
    read_result,
    summarize,
)
from launch.comparison.workload_file import (
    Workload,
    WorkloadRequest,
    read_workload,
    write_workload,
)
from launch.comparison.workload_sets import draw_arrivals, draw_set, draw_token_ids, middle_of

THREE = [WorkloadRequest(str(one), (5, 6 + one, 7), 4 + one, 0.5 * one) for one in range(3)]


def make_workload(requests=THREE):
    given = {
        "name": "three",
        "description": "three requests",
        "seed": 0,
        "max_model_len": 100,
        "share_dropped": 0.0,
        "vocab_size": 50,
        "arrivals": "every half second",
        "source": "this test",
    }
    return Workload.create(requests, **given)


def test_a_workload_is_read_as_it_was_written(tmp_path):
    workload = make_workload()
    write_workload(tmp_path / "new" / "w.jsonl", workload)
    assert read_workload(tmp_path / "new" / "w.jsonl") == workload
    assert workload.header.output_tokens == 4 + 5 + 6
    assert workload.header.prompt_tokens == 9
    assert workload.longest == 9


def change(line, **fields):
    """Return an edit of a file's line, which is JSON; a field of None goes."""

    def edit(lines):
        item = json.loads(lines[line]) | fields
        lines[line] = json.dumps({name: value for name, value in item.items() if value is not None})

    return edit


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (change(0, format="apex_jax.workload/9"), r"w.jsonl, line 1: format is .*reads"),
        (change(0, seed="x"), r'w.jsonl, line 1: seed is "x"; it must be a whole number'),
        (change(0, name=None), r"w.jsonl, line 1 lacks the field 'name'"),
        (change(0, colour="red"), r"line 1 has the field 'colour'; those known are format, name"),
        (change(0, share_dropped=1.5), r"line 1: share_dropped is 1.5; .* between 0 and 1"),
        (change(0, output_tokens=14), r"output_tokens is 14, but the lines after it come to 15"),
        (change(0, sha256="0"), r"line 1: sha256 is 0, but .* changed or cut short"),
        (lambda lines: lines.pop(), r"line 1: num_requests is 3, but .* come to 2"),
        (change(2, id="0"), r"w.jsonl, line 3: id '0' is that of line 2 too"),
        (change(2, prompt_token_ids=[]), r"line 3: prompt_token_ids is empty"),
        (change(2, prompt_token_ids=[1, 1.5]), r"line 3: prompt_token_ids\[1\] is 1.5; .* whole"),
        (change(2, prompt_token_ids=7), r"line 3: prompt_token_ids is 7; it must be a list"),
        (change(2, prompt_token_ids=[50]), r"line 3: token id 50 is not within the vocabulary"),
        (change(2, prompt_token_ids=[-1]), r"line 3: token id -1 is not within"),
        (change(2, output_tokens=0), r"line 3: output_tokens is 0; it must be at least 1"),
        (change(2, output_tokens=98), r"line 3: the request has 101 tokens, more than .* 100"),
        (change(2, arrival_sec=-1.0), r"line 3: arrival_sec is -1.0; it must be at least 0"),
        (change(2, arrival_sec=9), r"line 4: arrival_sec is 1.0, before the 9.0 of the line above"),
        (lambda lines: lines.__setitem__(1, "nonsense"), r"w.jsonl, line 2 is not JSON"),
        (lambda lines: lines.__setitem__(1, "[]"), r"w.jsonl, line 2 is \[\]; it must be an obj"),
        (lambda lines: lines.clear(), r"w.jsonl is empty; python -m launch.make_workload"),
        (lambda lines: lines.__delitem__(slice(1, None)), r"w.jsonl has no requests"),
    ],
)
def test_a_workload_that_is_not_what_it_says_is_refused_by_its_line(tmp_path, edit, message):
    path = tmp_path / "w.jsonl"
    write_workload(path, make_workload())
    lines = path.read_text().splitlines()
    edit(lines)
    path.write_text("".join(f"{line}\n" for line in lines))
    with pytest.raises(FileError, match=message):
        read_workload(path)


def test_a_seed_draws_the_same_on_every_python():
    rng = random.Random(0)
    lengths = draw_set("osc", None, 20, 4096, rng).drawn.requests
    prompts = draw_token_ids([one.prompt_tokens for one in lengths], middle_of(32_000), rng)
    arrivals = draw_arrivals("poisson", 20, 2.0, 8, rng).times_sec
    requests = [
        WorkloadRequest(str(one), prompts[one], lengths[one].output_tokens, round(arrivals[one], 6))
        for one in range(20)
    ]
    assert (
        make_workload(requests).header.sha256
        == "f044ddfaa8bbd60774eb84a4e4256676be980c1259a212a6a5c6e805c7d50ca3"
    )


def test_a_workload_that_is_not_there_is_said_so(tmp_path):
    with pytest.raises(FileError, match=r"w.jsonl cannot be read: No such file"):
        read_workload(tmp_path / "w.jsonl")


# Results


def make_run(system, repeat, rate, **others):
    given = {"framework": "apex_jax", "request_rate": None, "status": "ok", "wall_sec": 2.0}
    return RunRow(system=system, repeat=repeat, output_tokens_per_sec=rate, **(given | others))


FAILED = RunRow("passes", "apex_jax", None, 0, "failed", error="out of memory | of the card")
RUNS = [
    make_run("device_only", 0, 10.0, ttft_sec=Quantiles(1.0, 1.0, 1.0, 1.0)),
    make_run("apex", 0, 15.0, host_share=0.25),
    FAILED,
    make_run("device_only", 1, 20.0, ttft_sec=Quantiles(3.0, 3.0, 3.0, 5.0)),
    make_run("apex", 1, 24.0, host_share=0.35),
]


def make_header(**others):
    given = {
        "format": FORMAT,
        "what": "two strategies",
        "environment": {
            "command": ["run_benchmark.py", "--workload=a file"],
            "cpu": {"model": "a CPU", "num_usable_cores": 2},
            "git": {"commit": "abc", "is_dirty": True},
            "date": "today",
        },
        "workload": WorkloadUsed("w.jsonl", make_workload().header),
        "model": ModelUsed("small", "float32", None),
        "backend": "simulated",
        "device_profile": "t4",
        "host_profile": None,
        "budgets": Budgets(2**20, None),
        "settings": {"seed": 0},
        "baseline": "device_only",
        "warm_up": "None was needed.",
        "formulas": {"wall_sec": "from here to there"},
    }
    return ResultHeader(**(given | others))


def write_results(folder, runs=RUNS, budget_sec=100.0):
    file = ComparisonFile(folder / "r.json", make_header(), budget_sec)
    file.measure(lambda: iter(runs))
    file.finish()
    return file


def test_percentiles_lie_between_samples():
    assert Quantiles.of([4.0, 1.0, 2.0]) == Quantiles(
        pytest.approx(7 / 3), 2.0, pytest.approx(3.6), pytest.approx(3.96)
    )
    assert Quantiles.of([]) is None


def test_ratios_are_paired_within_a_repeat():
    device_only, apex, failed = summarize(RUNS, "device_only")
    assert dataclasses.astuple(device_only.ratio) == (1.0, 1.0, 1.0)
    assert dataclasses.astuple(apex.ratio) == pytest.approx((1.35, 1.2, 1.5))
    assert apex.host_share == pytest.approx(0.3)
    assert device_only.ttft_sec == Quantiles(2.0, 2.0, 2.0, 3.0)
    assert (failed.num_ok, failed.num_failed, failed.ratio) == (0, 1, None)
    assert failed.error == FAILED.error


def test_rates_are_not_mixed():
    rows = summarize(
        [make_run("device_only", 0, 10.0), make_run("apex", 0, 5.0, request_rate=2.0)],
        "device_only",
    )
    assert [row.request_rate for row in rows] == [None, 2.0]
    assert rows[1].ratio is None


def test_results_are_read_as_they_were_written(tmp_path, capsys):
    write_results(tmp_path)
    result = read_result(tmp_path / "r.json")
    assert result.header == make_header()
    assert result.runs == tuple(RUNS)
    assert [row.system for row in result.summary] == ["device_only", "apex", "passes"]
    assert "passes                   repeat 0  failed: out of memory" in capsys.readouterr().out


def test_tables_lie_beside_the_results(tmp_path):
    write_results(tmp_path)
    first, *_ = lines = (tmp_path / "r.csv").read_text().splitlines()
    assert len(lines) == 1 + len(RUNS)
    assert "ttft_sec.p50" in first.split(",")
    text = (tmp_path / "r.md").read_text()
    assert "| `apex` | 19.5 (15 to 24) | 1.35 (1.2 to 1.5) |" in text
    assert "1: out of memory / of the card" in text
    assert "    python -m launch.run_benchmark '--workload=a file'" in text
    assert "Commit abc with changes" in text
    assert "requests/s" not in text  # nobody was offered at a rate


def test_what_was_above_and_below_one_is_not_distinguishable(tmp_path):
    runs = [make_run("device_only", repeat, 10.0) for repeat in range(2)]
    runs += [make_run("apex", repeat, 9.0 + 2 * repeat) for repeat in range(2)]
    write_results(tmp_path, runs)
    text = (tmp_path / "r.md").read_text()
    assert "| `device_only` | 10 | 1 |" in text
    assert "| `apex` | 10 (9 to 11) | 1 (0.9 to 1.1), not distinguishable |" in text


def test_a_part_of_a_comparison_is_a_whole_file(tmp_path):
    """Whoever ends it between two runs has the summary of those before."""

    def some():
        yield from RUNS[:2]
        raise KeyboardInterrupt

    file = ComparisonFile(tmp_path / "r.json", make_header(), 100.0)
    with pytest.raises(KeyboardInterrupt):
        file.measure(some)
    result = read_result(tmp_path / "r.json")
    assert [row.system for row in result.summary] == ["device_only", "apex"]
    assert result.runs == tuple(RUNS[:2])
    assert "`apex`" in (tmp_path / "r.md").read_text()


def test_a_budget_that_is_spent_is_said(tmp_path):
    write_results(tmp_path, budget_sec=0.0)
    assert "Cut short: the time budget was spent." in (tmp_path / "r.md").read_text()
    assert read_result(tmp_path / "r.json").runs == ()


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda item: item.pop("groups"), r"r.json has no groups of rows"),
        (lambda item: item.update(format="x"), r"r.json: format is 'x'; this version reads"),
        (lambda item: item["groups"].update(runs={}), r"r.json: groups.runs must be a list"),
        (
            lambda item: item["groups"]["runs"][1].update(wall_sec="long"),
            r'r.json: runs\[1\]: wall_sec is "long"; it must be a number',
        ),
        (
            lambda item: item["groups"]["runs"][1].update(status="good"),
            r'runs\[1\]: status is "good"; it must be one of ok, failed',
        ),
        (
            lambda item: item["groups"]["runs"][1].update(wall_sec=None),
            r"runs\[1\]: status is ok without wall_sec",
        ),
        (
            lambda item: item["groups"]["runs"][1].update(error="fault"),
            r"runs\[1\]: status is ok and there is an error",
        ),
        (
            lambda item: item["groups"]["runs"][2].update(error=""),
            r"runs\[2\]: status is failed and error is empty",
        ),
        (
            lambda item: item["groups"]["runs"][0]["ttft_sec"].pop("p50"),
            r"runs\[0\]: ttft_sec lacks the field 'p50'",
        ),
        (
            lambda item: item["groups"]["runs"][0].update(by_lane=[]),
            r"runs\[0\]: by_lane is \[\]; it must be an object",
        ),
    ],
)
def test_results_that_do_not_follow_the_format_are_refused_by_place(tmp_path, edit, message):
    write_results(tmp_path)
    item = json.loads((tmp_path / "r.json").read_text())
    edit(item)
    (tmp_path / "r.json").write_text(json.dumps(item))
    with pytest.raises(FileError, match=message):
        read_result(tmp_path / "r.json")


def test_results_that_are_not_there_are_said_so(tmp_path):
    with pytest.raises(FileError, match=r"r.json cannot be read: No such file"):
        read_result(tmp_path / "r.json")
