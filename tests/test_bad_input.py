"""docs/bad_input.md, executed: every row's input, and the words that the row promises."""

import functools
import json
import pathlib
import shutil
import subprocess
import sys
import tracemalloc

import jax
import numpy as np
import pytest
from batch_files import Job, make_config, read_output, write_byte_tokenizer, write_lines
from fake_engine import FakeEngine
from paper_loop import Loop

from apex_jax.batch.lines import MAX_LINE_BYTES, read_lines
from apex_jax.models import weights
from apex_jax.models.hf_config import read_model_folder

ROOT = pathlib.Path(__file__).parents[1]
GOLDEN = ROOT / "tests/golden/mha_untied"
GOOD = {"custom_id": "good", "prompt": [1]}


def read_table(number):
    """The rows of one table of the page, by their first column."""
    text = (ROOT / "docs/bad_input.md").read_text().split("\n## ")[1 + number]
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")]
    assert rows[0][0] == "case"
    table = {row[0]: row[1:] for row in rows[1:]}
    assert len(table) == len(rows) - 1
    return table


LINES, JOBS = read_table(0), read_table(1)


class Limited(FakeEngine):
    """Refuses what the real scheduler refuses."""

    def submit(self, request):
        Loop(num_pages=8, max_requests=2).scheduler.submit(request, 0.0)
        super().submit(request)


def chat(*messages, **fields):
    return {"custom_id": "bad", "messages": list(messages), **fields}


USER = {"role": "user", "content": "hi"}
# What stands in the second line of the input, as JSON values or bytes.
BAD_LINES = {
    "malformed": b"hello\n",
    "encoding": b'{"custom_id": "\xff"}\n',
    "surrogate": {"prompt": "a\ud800"},
    "array": [1, 2],
    "nan": b'{"custom_id": "bad", "temperature": NaN}\n',
    "twice": b'{"custom_id": "bad", "seed": 1, "seed": 2}\n',
    "type": {"prompt": "x", "max_tokens": "5"},
    "range": {"prompt": "x", "top_p": 2.0},
    "choices": {"prompt": "x", "n": 0},
    "best_of": {"prompt": "x", "best_of": 3},
    "unknown": {"prompt": "x", "max_tokes": 5},
    "unserved": {"prompt": "x", "stream": True},
    "nameless": b'{"prompt": "x"}\n',
    "duplicate": {"custom_id": "good", "prompt": "x"},
    "empty": {"prompt": ""},
    "neither": {},
    "both": {"prompt": "x", "prompt_token_ids": [1]},
    "conflict": chat(USER, max_tokens=1, max_completion_tokens=2),
    "url": {"url": "/v1/embeddings", "body": {"prompt": "x"}},
    "method": {"method": "GET", "body": {"prompt": "x"}},
    "mixed": {"url": "/v1/completions", "body": {"messages": [USER]}},
    "part": chat({"role": "user", "content": [{"type": "image_url", "image_url": {}}]}),
    "role": chat({"role": "usr", "content": "hi"}),
    "roles": chat(USER),
    "untemplated": chat(USER),
    "untokenized": {"prompt": "x"},
    "stopless": {"prompt": [1], "stop": "x"},
    "context": {"prompt": [1] * 60},
    "vocabulary": {"prompt": [5000]},
    "model": {"prompt": [1], "model": "gpt-4o"},
}


@pytest.fixture
def job(tmp_path):
    return Job(tmp_path)


def prepare(case, folder):
    if case not in ("untokenized", "stopless"):
        write_byte_tokenizer(folder)
    if case == "roles":
        template = "{{ raise_exception('roles must alternate') }}"
        (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))


def test_every_row_has_a_case():
    assert LINES.keys() == {*BAD_LINES, "long"}
    assert JOBS.keys() == BAD_JOBS.keys()


@pytest.mark.parametrize("case", BAD_LINES)
def test_bad_lines(job, case):
    _, code, says = LINES[case]
    prepare(case, job.folder)
    line = BAD_LINES[case]
    if not isinstance(line, bytes):
        line = {"custom_id": "bad", **line} if isinstance(line, dict) else line
        line = json.dumps(line).encode() + b"\n"
    last = {"custom_id": "last", "prompt": [2]}
    job.input.write_bytes(b"".join([_encode(GOOD), line, _encode(last)]))
    is_error = case != "model"
    assert job.run(engine=Limited) == int(is_error)
    found = {item["apex"]["line"]: item for item in read_output(job.output)}
    assert sorted(found) == [1, 2, 3]
    assert found[1]["error"] is None
    assert found[3]["error"] is None
    if is_error:
        assert found[2]["response"] is None
        assert says in found[2]["error"]["message"]
        assert found[2]["error"]["code"] == code.strip("`")
    else:
        assert says in job.said
        assert found[2]["response"]["body"]["model"] == "fake"


def _encode(line):
    return json.dumps(line).encode() + b"\n"


def test_a_model_that_is_the_jobs_own_is_not_spoken_of(job):
    names = ("fake", "someone/fake", None)
    lines = [{"custom_id": str(name), "prompt": [1], "model": name} for name in names]
    write_lines(job.input, lines)
    assert job.run() == 0
    assert "names the model" not in job.said
    others = [{"custom_id": f"{n}", "prompt": [1], "model": f"other {n}"} for n in range(3)]
    write_lines(job.input, [*lines, *others])
    assert job.run() == 0
    assert job.said.count("names the model") == 1
    assert "note: line 4 names the model 'other 0'; every line runs with fake" in job.said


def test_a_long_line_is_not_held(job):
    _, code, says = LINES["long"]
    with open(job.input, "wb") as file:
        file.write(_encode(GOOD))
        for _ in range(100):
            file.write(b"x" * 999_999)
        file.write(b"x" * 99 + b"\n" + _encode({"custom_id": "last", "prompt": [2]}))
    with open(job.input, "rb") as file:
        tracemalloc.start()
        try:
            lines = list(read_lines(file))
            _, most_bytes = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
    assert len(lines) == 3
    assert most_bytes < 4 * MAX_LINE_BYTES
    assert job.run() == 1
    error = next(item["error"] for item in read_output(job.output) if item["error"])
    assert error["code"] == code.strip("`")
    assert says in error["message"]


# --- the job ---


def write_corrupt(name, data, job):
    (job.folder / name).write_bytes(data)
    return job.run()


def run_foreign(job):
    write_byte_tokenizer(job.folder)

    def small(config, timeline):
        engine = FakeEngine(config, timeline)
        engine.model.architecture = read_model_folder(GOLDEN).architecture
        return engine

    return job.run(engine=small)


def run_configless(job):
    return job.run(engine=lambda config, timeline: read_model_folder(config.model.path))


def run_truncated(num_bytes, job):
    """With what the engine does once it has compiled."""
    folder = shutil.copytree(GOLDEN, job.folder / "model")
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:num_bytes])

    def load(config, timeline):
        architecture = read_model_folder(folder).architecture
        return weights.load(folder, architecture, np.dtype("float32"), jax.devices("cpu")[0])

    return job.run(engine=load)


def run_other(job):
    job.output.write_text("someone's notes\n")
    status = job.run()
    assert job.output.read_text() == "someone's notes\n"
    return status


def run_command(job, *flags):
    paths = (f"--input={job.input}", f"--output={job.output}", f"--config.model.path={job.folder}")
    command = [sys.executable, "tests/fake_engine.py", "--config=configs/default.py", *paths]
    done = subprocess.run([*command, *flags], cwd=ROOT, capture_output=True, text=True)
    job.said = done.stderr
    return done.returncode


BAD_JOBS = {
    "flag": lambda job: run_command(job, "--config.scheduler.max_request=3"),
    "missing": lambda job: job.run(input=job.folder / "nothing"),
    "folder": lambda job: job.run(config=make_config(job.folder / "nothing")),
    "configless": run_configless,
    "weights": functools.partial(run_truncated, -100),
    "header": functools.partial(run_truncated, 100),
    "tokenizer": functools.partial(write_corrupt, "tokenizer.json", b"{"),
    "sentences": functools.partial(write_corrupt, "tokenizer.model", b"x"),
    "foreign": run_foreign,
    "settings": functools.partial(write_corrupt, "tokenizer_config.json", b"{"),
    "default": lambda job: job.run(config=make_config(job.folder, top_p=2.0)),
    "nowhere": lambda job: job.run(output=job.folder / "nothing/out.jsonl"),
    "directory": lambda job: job.run(output=job.folder),
    "unwritable": lambda job: job.run(output=pathlib.Path("/proc/version")),
    "other": run_other,
    "self": lambda job: job.run(output=job.input),
    "full": lambda job: job.run(output=pathlib.Path("/dev/full")),
}


@pytest.mark.parametrize("case", BAD_JOBS)
def test_bad_jobs(job, case):
    _, status, says = JOBS[case]
    write_lines(job.input, [GOOD])
    before = job.input.read_bytes()
    assert BAD_JOBS[case](job) == int(status)
    assert says in job.said
    assert job.input.read_bytes() == before
    if case != "other":
        assert not job.output.exists()
