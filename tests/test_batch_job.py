"""A batch job that cannot run, or is stopped: early refusals, faults and signals."""

import dataclasses
import functools
import json
import os
import signal
import threading
from pathlib import Path

import pytest
from batch_files import (
    Job,
    make_config,
    read_output,
    without_time,
    write_byte_tokenizer,
    write_input,
    write_lines,
)
from fake_engine import FakeEngine

from apex_jax.batch.journal import Journal
from apex_jax.config import ConfigError


@pytest.fixture
def job(tmp_path):
    return Job(tmp_path)


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
