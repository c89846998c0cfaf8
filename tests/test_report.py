"""The report: its page stands alone, its numbers are its files', and unknown files are named."""

import csv
import functools
import itertools
import json
import pathlib
import shutil
import statistics
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from dataclasses import asdict
from types import SimpleNamespace

import pytest
from absl import flags
from result_page import Page, shown_value

from launch.comparison.decode import FileError
from launch.comparison.page_values import Found, number, percent, short, spread
from launch.comparison.results import (
    Budgets,
    LaneLatency,
    ModelUsed,
    Quantiles,
    ResultHeader,
    RunRow,
    WorkloadUsed,
    summarize,
)
from launch.comparison.workload_file import FORMAT as WORKLOAD_FORMAT
from launch.comparison.workload_file import WorkloadHeader
from launch.drawing import log_ticks, ticks
from launch.long_job import Sample, parts
from launch.long_job import summarize as summarize_job
from launch.paced_proof import judge
from launch.report import main, report

ROOT = pathlib.Path(__file__).parents[1]
RESULTS = ROOT / "docs" / "results"
REMAKE = "python -m launch.report docs/results --output=docs/results/page"
ENVIRONMENT = {
    "date": "2026-11-24T12:00:00+00:00",
    "command": ["run_benchmark.py", "--workload=a <b>.jsonl"],
    "git": {"commit": "0123456789abcdef", "is_dirty": True},
    "device": None,
    "nvidia_gpus": [{"name": "NVIDIA T4"}],
    "cpu": {"model": "a CPU", "num_usable_cores": 2},
    "python": "3.11.7",
    "packages": {"jax": "0.10.2"},
}
RATES = {"device_only": 100.0, "apex": 150.0, "transformers": 40.0}


def runs():
    """Three systems, all at once and at two rates; one of them always fails at the higher rate."""
    for (system, rate), request_rate, repeat in itertools.product(
        RATES.items(), (None, 1.0, 2.5), range(3)
    ):
        own = system if system == "transformers" else "apex_jax"
        if system == "transformers" and request_rate == 2.5:
            error = "out of memory: 5 & 6 < 7"
            yield RunRow(system, own, request_rate, repeat, "failed", error)
            continue
        per_sec = rate * (1 + repeat / 100) / (request_rate or 1)
        latency = Quantiles(1 / per_sec, 1 / per_sec, 2 / per_sec, 3 / per_sec)
        yield RunRow(
            *(system, own, request_rate, repeat, "ok"),
            wall_sec=10.0,
            output_tokens_per_sec=per_sec,
            steady_output_tokens_per_sec=2 * per_sec if system == "apex" else None,
            host_share=None if own == system else 0.25 if system == "apex" else 0.0,
            predicted_output_tokens_per_sec=rate * 1.02 if system == "apex" else None,
            ttft_sec=latency,
            tpot_sec=latency,
            normalized_sec=latency,
            by_lane=None if own == system else lanes(latency, 5 if system == "apex" else 0),
            goodput_requests_per_sec=request_rate and request_rate / 2,
        )


def lanes(latency, num_host):
    """As latency.figures has them: a lane without requests has no latencies."""
    host = LaneLatency(num_host, latency, latency) if num_host else LaneLatency(0, None, None)
    return {"device": LaneLatency(10 - num_host, latency, latency), "host": host}


def write_benchmark(path, rows, note=None):
    workload = WorkloadHeader(
        WORKLOAD_FORMAT,
        "mine",
        "drawn",
        0,
        10,
        1000,
        200,
        None,
        0.0,
        32000,
        "both",
        "a trace",
        "0" * 64,
    )
    header = ResultHeader(
        format="apex_jax.benchmark/1",
        what="strategies, compared",
        environment=ENVIRONMENT,
        workload=WorkloadUsed("mine.jsonl", workload),
        model=ModelUsed("demo_model", "float32", None),
        backend="xla",
        device_profile=None,
        host_profile=None,
        budgets=Budgets(2**30, None),
        settings={"note": note},
        baseline="device_only",
        warm_up="One request before is in no figure.",
        formulas={},
    )
    groups = {
        "runs": [asdict(row) for row in rows],
        "summary": [asdict(row) for row in summarize(rows, "device_only")],
    }
    path.write_text(json.dumps({**asdict(header), "groups": groups}))
    return path


def write_paced(path):
    """As launch.paced_proof writes it, with one card of two and one bound of five not kept."""
    shared = {"device_rows": 7, "host_rows": 48, "repeat": 0, "host_busy_percent": 50.0}
    turns = [
        shared | {"strategy": name, "tokens_per_sec": rate, "sweep_sec": 1.0} | idle
        for name, rate, idle in (
            ("device_only", 100.0, {"device_idle_percent": 0.0}),
            ("staggered", 126.0, {"device_idle_percent": 2.5}),
        )
    ]
    predictions = [
        {"strategy": "device_only", "tokens_per_sec": 101.0, "arithmetic_tokens_per_sec": 102.0},
        {"strategy": "staggered", "tokens_per_sec": 125.0, "arithmetic_tokens_per_sec": 126.0},
    ]
    facts = {"device": {"name": "NVIDIA T4"}, "sizes": "KV cache", "failed": {"apex": "ended"}}
    content = {
        "prompt_tokens": 1000,
        "bounds": {
            "from_predicted": 0.05,
            "of_arithmetic": 0.95,
            "idle_percent": 2.0,
            "sweep_longer": 1.03,
            "held": ["staggered"],
        },
        "cards": {"t4": facts},
        "environment": {**ENVIRONMENT, "command": ["paced_proof.py"]},
        "failed": {"bounds_a10": "no memory"},
        "groups": {"turns_t4": turns, "bounds_t4": list(judge("t4", turns, predictions))},
    }
    path.write_text(json.dumps(content))
    return path


def write_job_grid(path):
    """As launch.simulate_jobs writes it."""
    rows = [
        {"output_tokens": tokens, "host_bandwidth_scale": scale, "to_device_only": ratio}
        for tokens, scale, ratio in (
            (50, 0.1, 0.5),
            (50, 0.1, 1.5),
            (50, 0.1, 1.0),
            (400, 1.0, 4.0),
        )
    ]
    content = {
        "summary": {"num_conditions": 4, "geometric_mean": 1.5},
        "environment": {**ENVIRONMENT, "command": ["simulate_jobs.py"]},
        "rows": rows,
    }
    path.write_text(json.dumps(content))
    return path


def write_long_job(path):
    samples = [Sample(float(n), n * 10, 10**9, 5 * 10**8 + n, float(n)) for n in range(1, 101)]
    content = {
        "num_requests": 1000,
        "prompt_tokens": (4, 12),
        "output_tokens": (4, 8),
        **summarize_job(samples, 1000),
        "environment": {**ENVIRONMENT, "command": ["long_job.py"], "nvidia_gpus": []},
        "groups": {"parts": parts(samples, 1000), "samples": [asdict(one) for one in samples]},
    }
    path.write_text(json.dumps(content))
    return path


@functools.cache
def values_of(path):
    if path.suffix == ".csv":
        with path.open() as file:
            return list(csv.DictReader(file))
    return json.loads(path.read_text())


def at(page, place):
    """Return what stands at a place, as the page names it."""
    name, _, keys = place.partition("#/")
    value = values_of((page.path.parent / name).resolve())
    for key in keys.split("/"):
        value = value[int(key) if isinstance(value, list) else key]
    return float(value) if isinstance(value, str) else value


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A page of results that are not published: a comparison with failures, and a long job."""
    folder = tmp_path_factory.mktemp("made")
    files = [
        write_benchmark(folder / "mine.json", list(runs())),
        write_long_job(folder / "job.json"),
    ]
    files += [write_job_grid(folder / "job_grid.json"), write_paced(folder / "paced.json")]
    report(files, folder / "page")
    return Page(folder / "page" / "index.html")


@pytest.fixture(scope="module")
def published():
    return Page(RESULTS / "page" / "index.html")


@pytest.fixture(params=["made", "published"])
def page(request):
    return request.getfixturevalue(request.param)


def test_the_published_page_is_that_of_the_published_results(tmp_path):
    copy = tmp_path / "results"
    shutil.copytree(RESULTS, copy, ignore=shutil.ignore_patterns("page"))
    # Sources are read where they are, so that the page links to them as the published one does.
    written, _ = report([copy], copy / "page")
    published = {path.name: path.read_text() for path in (RESULTS / "page").iterdir()}
    now = {path.name: path.read_text() for path in written}
    assert sorted(published) == sorted(now), f"not up to date; run: {REMAKE}"
    different = [name for name in now if now[name] != published[name]]
    assert not different, f"not up to date; run: {REMAKE}"


def test_a_page_stands_alone(page):
    """Whatever it links to is on it or beside it; Page has refused what would be loaded."""
    assert len(page.ids) == len(set(page.ids))
    assert set(page.references) <= set(page.ids)
    for link in page.links:
        if link.startswith("#"):
            assert link[1:] in page.ids
        else:
            assert (page.path.parent / link).is_file(), link
    assert len(page.pictures) == len(page.tables) > 5
    assert all(role == "img" and title for role, title in page.pictures)
    assert page.headings.count("What it cannot") == page.headings.count("What this can show") > 1


def test_pictures_stand_alone_too(page):
    files = sorted(page.path.parent.glob("*.svg"))
    assert len(files) == len(page.pictures)
    titles = set()
    for path in files:
        root = ElementTree.fromstring(path.read_text())
        titles.add(root.findtext("{http://www.w3.org/2000/svg}title"))
        names = {name for element in root.iter() for name in element.attrib}
        assert not any("href" in name or name == "src" for name in names)
    assert titles == {title for _, title in page.pictures}


def test_every_number_is_that_of_its_file(page):
    found = [one for table in page.tables for one in table.numbers]
    assert len(found) > 50
    for one in found:
        assert shown_value(one.text) == pytest.approx(one.value, rel=0.005, abs=1e-12), one
        if one.place is not None:
            assert at(page, one.place) == one.value, one
    assert sum(one.place is not None for one in found) > len(found) / 2


def test_tables_are_whole_and_have_no_other_numbers(page):
    for table in page.tables:
        assert len(table.rows) > 1
        assert {len(row) for row in table.rows} == {len(table.rows[0])}
        assert not any(character.isdigit() for text in table.bare for character in text), table.bare


def table_beneath(page, title):
    (index,) = (i for i, (_, name) in enumerate(page.pictures) if name.startswith(title))
    return page.tables[index]


def test_the_losing_region_is_counted_from_the_conditions(published):
    rows = values_of(RESULTS / "simulated_grid.json")["rows"]
    cells = {}
    for row in rows:
        rates = row["rates"]
        fixed = [rates[name] for name in rates if name not in ("device_only", "apex", "apex_paper")]
        key = row["prompt_tokens"] + row["output_tokens"], row["host_bandwidth_scale"]
        cells.setdefault(key, []).append((min(fixed) < rates["device_only"], rates))
    expected = [statistics.mean(loses for loses, _ in cells[key]) for key in sorted(cells)]
    table = table_beneath(published, "The losing region of the hybrid")
    assert [one.value for one in table.numbers] == pytest.approx(expected)
    gains = [
        statistics.median(rates["apex"] / rates["device_only"] for _, rates in cells[key])
        for key in sorted(cells)
    ]
    table = table_beneath(published, "Median rate of apex over device_only")
    assert [one.value for one in table.numbers] == pytest.approx(gains)
    table = table_beneath(published, "Predicted against played")
    assert sum(one.value for one in table.numbers) == len(rows)


def test_whole_jobs_are_medians_by_output_length_and_host(made):
    table = table_beneath(made, "Median rate of apex over device_only in whole jobs")
    assert table.rows == [
        ["output", "host x0.1", "host x1"],
        ["50", "1.00", ""],
        ["400", "", "4.00"],
    ]
    table = table_beneath(made, "Jobs by the rate of apex over device_only")
    assert [row[1] for row in table.rows[1:]] == ["1", "0", "0", "1", "0", "0", "1", "0", "1"]


def test_a_comparison_shows_medians_spread_and_failures(made):
    table = table_beneath(made, "Output tokens per second, by system")
    head, device_only, apex, transformers = table.rows
    assert head[:3] == ["system", "tokens/s", "over device_only"]
    assert device_only[1] == "101 (100 to 102)"
    assert apex[:5] == ["apex", "152 (150 to 153)", "1.50", "303 (300 to 306)", ""]
    assert apex[5:] == ["25.0\N{NO-BREAK SPACE}%", "3", ""]
    assert transformers[0] == "transformers"
    latency = table_beneath(made, "Normalised latency by request rate")
    assert latency.rows[0] == ["requests/s", "device_only", "apex", "transformers"]
    assert latency.rows[2][3] == "failed: out of memory: 5 & 6 < 7"
    predicted = table_beneath(made, "Predicted against measured")
    assert [row[0] for row in predicted.rows] == ["system", "apex"]
    text = made.path.read_text()
    command = "python -m launch.run_benchmark &#x27;--workload=a &lt;b&gt;.jsonl&#x27;"
    assert f"<code>{command}</code>" in text
    assert (
        "NVIDIA T4 · a CPU, 2 cores · Python 3.11.7, jax 0.10.2 · commit 01234567 with changes"
        in text
    )


def test_latencies_are_shown_by_lane(made):
    table = table_beneath(made, "Time per output token by lane")
    assert table.rows[0][:4] == ["system", "TTFT, s", "TPOT, s", "requests, device lane"]
    device_only, apex, transformers = table.rows[1:]
    assert device_only[3:] == ["10", *["0.00990 (0.0297)"] * 2, "0", "", ""]
    assert apex[6:] == ["5", *["0.00660 (0.0198)"] * 2]
    assert transformers[3:] == [""] * 6
    assert table_beneath(made, "Time per output token in the host lane by request rate")


def test_cards_are_held_to_bounds(made):
    table = table_beneath(made, "Tokens per second in a steady state on a described T4")
    head, device_only, staggered = table.rows
    assert head[-2:] == ["bounds", "turns"]
    assert device_only[-2:] == ["kept", "1"]
    assert staggered[-2:] == ["not kept: idle", "1"]
    text = made.path.read_text()
    assert "4 of 5 bounds are kept. Not measured: bounds_a10 (no memory)." in text
    assert "Not measured: t4: apex (ended)." in text


def test_what_cannot_be_told_apart_is_said(tmp_path):
    """In one repeat apex is above the baseline, in the other below."""
    rows = [
        RunRow(
            *(system, "apex_jax", None, repeat, "ok"),
            wall_sec=1.0,
            output_tokens_per_sec=10.0 + (system == "apex") * (repeat - 0.5),
        )
        for repeat in range(2)
        for system in ("device_only", "apex")
    ]
    note = "Every request fits on the device at once."
    report([write_benchmark(tmp_path / "mine.json", rows, note)], tmp_path / "page")
    page = Page(tmp_path / "page" / "index.html")
    (table,) = page.tables
    assert [row[2] for row in table.rows[1:]] == [
        "1.00",
        "1.00 (0.950 to 1.05) not distinguishable",
    ]
    assert f"{note}</p>" in page.path.read_text()


def test_a_system_that_only_fails_is_a_row(tmp_path):
    failed = [RunRow("vllm", "vllm", None, repeat, "failed", "no GPU") for repeat in range(2)]
    ok = [row for row in runs() if row.request_rate is None]
    path = write_benchmark(tmp_path / "mine.json", [*ok, *failed])
    report([path], tmp_path / "page")
    page = Page(tmp_path / "page" / "index.html")
    table = table_beneath(page, "Output tokens per second, by system")
    assert table.rows[-1] == ["vllm", *[""] * 5, "0", "2: no GPU"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "a.json",
            '{"rows": []}',
            r"a.json is no result file .*; readable are launch.run_benchmark",
        ),
        ("b.json", "[]", r"b.json is \[\]; it must be an object"),
        ("c.json", "{", r"c.json is not JSON"),
        (
            "d.json",
            '{"memory_growth_bytes": 1, "environment": {}}',
            r"d.json looks like a file of launch.long_job, but its rows .*KeyError: 'cpu'",
        ),
        (
            "e.json",
            '{"format": "apex_jax.benchmark/1", "groups": {}, "environment": '
            + json.dumps(ENVIRONMENT)
            + "}",
            r"e.json lacks the field 'what'",
        ),
        (
            "f.json",
            '{"what": "strategies on simulated hardware", "environment": '
            + json.dumps(ENVIRONMENT)
            + "}",
            "f.json looks like .* which lie in f.csv",
        ),
    ],
)
def test_files_that_are_none_are_refused_by_name(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(FileError, match=message):
        report([tmp_path / name], tmp_path / "page")
    assert not (tmp_path / "page").exists()


def test_folders_are_looked_through_and_what_cannot_be_shown_is_named(tmp_path):
    (tmp_path / "sub").mkdir()
    write_long_job(tmp_path / "sub" / "job.json")
    other = tmp_path / "other.json"
    other.write_text("{}")
    written, left_out = report([tmp_path], tmp_path / "page")
    assert left_out == [other]
    assert written[0].is_file()
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileError, match=r"no result files in .*empty"):
        report([tmp_path / "empty"], tmp_path / "page")
    with pytest.raises(FileError, match=r"there is no file or folder .*missing"):
        report([tmp_path / "missing"], tmp_path / "page")


@pytest.mark.main_python
def test_the_command(tmp_path):
    write_long_job(tmp_path / "job.json")
    (tmp_path / "other.json").write_text("{}")
    done = subprocess.run(
        [sys.executable, "-m", "launch.report", str(tmp_path), f"--output={tmp_path / 'page'}"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{tmp_path / 'page' / 'index.html'} and 2 pictures\n"
    assert done.stderr == f"note: {tmp_path / 'other.json'} is no result file that is known here\n"


def test_refusals_are_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(flags, "FLAGS", SimpleNamespace(output=str(tmp_path)))
    assert main(["report"]) == 2
    assert capsys.readouterr().err == "error: name result files, or folders of them\n"
    assert main(["report", "missing.json"]) == 2
    assert capsys.readouterr().err == "error: there is no file or folder missing.json\n"


def test_numbers_are_short_and_point_to_their_place():
    row = Found({"spread": {"median": 2.0, "min": 1.5, "max": 2.5}, "share": 0.123456}, "f.json#")
    assert (
        number(row["share"]).to_html()
        == '<data value="0.123456" data-at="f.json#/share">0.123</data>'
    )
    assert percent(row["share"]).text == "12.3\N{NO-BREAK SPACE}%"
    assert row.get("missing") is None
    assert (
        percent(0.5).to_html()
        == '<data value="0.5" class="computed">50.0\N{NO-BREAK SPACE}%</data>'
    )
    texts = [part if isinstance(part, str) else part.text for part in spread(row["spread"])]
    assert "".join(texts) == "2.00 (1.50 to 2.50)"
    shown = [short(value) for value in (0, 3, 12345, 0.5, 99.96, 123.4, 12345.6, 9.5e-6)]
    assert shown == ["0", "3", "12,345", "0.500", "100", "123", "12,346", "9.5e-06"]


def test_ticks_are_round():
    assert ticks(0, 1) == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1])
    assert ticks(3, 47) == [10, 20, 30, 40]
    assert log_ticks(0.9, 25) == pytest.approx([1, 2, 5, 10, 20])
    assert log_ticks(1, 1e4) == pytest.approx([1, 10, 100, 1000, 10_000])
    assert log_ticks(0.9, 2) == ticks(0.9, 2)
