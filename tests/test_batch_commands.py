"""launch.generate in processes of its own: flags, exit statuses, kills, signals, full disks."""

import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import time

import pytest
from batch_files import read_output, request_line, without_time, write_lines

ROOT = pathlib.Path(__file__).parents[1]
CONFIG = """
from apex_jax.config import Config

def get_config():
    config = Config()
    config.model.path = {folder!r}
    config.scheduler.max_requests = 4
    return config
"""


class Command:
    """launch.generate with the fake engine, over the files of one folder."""

    def __init__(self, folder: pathlib.Path) -> None:
        self.folder = folder
        self.input = folder / "in.jsonl"
        self.output = folder / "out.jsonl"
        self.config = folder / "config.py"
        self.config.write_text(CONFIG.format(folder=str(folder)))

    def arguments(self, *extra: str) -> list[str]:
        return [
            sys.executable,
            str(ROOT / "tests" / "fake_engine.py"),
            f"--config={self.config}",
            f"--input={self.input}",
            f"--output={self.output}",
            *extra,
        ]

    def environment(self, **more: str) -> dict[str, str]:
        # What a user's Python keeps in buffers is lost, or told of at its exit, in its own way.
        inherited = {name: os.environ[name] for name in os.environ if name != "PYTHONUNBUFFERED"}
        return {**inherited, "PYTHONPATH": str(ROOT), **more}

    def run(self, *extra: str, arguments: list[str] | None = None, **more: str):
        return subprocess.run(
            arguments or self.arguments(*extra),
            env=self.environment(**more),
            capture_output=True,
            text=True,
            timeout=60,
        )

    def start(self, *extra: str, **more: str) -> subprocess.Popen:
        return subprocess.Popen(
            self.arguments(*extra),
            env=self.environment(**more),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )

    def wait_for_bytes(self, process: subprocess.Popen, num_bytes: int) -> None:
        """Return once the output is larger than that, or the process has ended."""
        deadline = time.monotonic() + 30
        while process.poll() is None and time.monotonic() < deadline:
            if self.output.exists() and self.output.stat().st_size > num_bytes:
                return
            time.sleep(0.002)


@pytest.fixture
def command(tmp_path):
    return Command(tmp_path)


def write_input(command, count) -> None:
    write_lines(command.input, [request_line(number) for number in range(count)])


def test_killed_at_ten_points_each_request_has_one_result(command):
    write_input(command, 150)
    whole = Command(command.folder)
    whole.output = command.folder / "whole.jsonl"
    assert whole.run().returncode == 0
    expected = without_time(read_output(whole.output))
    size = whole.output.stat().st_size
    dice = random.Random(1)
    num_killed = 0
    for point in sorted(dice.sample(range(size * 9 // 10), 10)):
        process = command.start(FAKE_STEP_SEC="0.004")
        assert process.stderr is not None
        command.wait_for_bytes(process, point)
        time.sleep(dice.random() * 0.004)
        num_killed += process.poll() is None
        process.kill()
        process.communicate()
    assert num_killed >= 8
    done = command.run()
    assert done.returncode == 0, done.stderr
    assert without_time(read_output(command.output)) == expected


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_and_resumed(command, number):
    write_input(command, 60)
    trace = command.folder / "trace.json"
    process = command.start(f"--trace={trace}", FAKE_STEP_SEC="0.01")
    command.wait_for_bytes(process, 2000)
    process.send_signal(number)
    _, said = process.communicate(timeout=30)
    assert process.returncode == 128 + number
    assert f"events in {trace}" in said
    assert "sweep" in [event["name"] for event in json.loads(trace.read_text())]
    assert "start the same command again to go on" in said
    kept = read_output(command.output)
    assert 0 < len(kept) < 60
    assert command.run().returncode == 0
    assert len(without_time(read_output(command.output))) == 60


def test_two_jobs_cannot_write_one_output(command):
    write_input(command, 100)
    process = command.start(FAKE_STEP_SEC="0.02")
    command.wait_for_bytes(process, 100)
    second = command.run()
    assert second.returncode == 2
    assert f"error: {command.output} is being written by another job" in second.stderr
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=30)


def test_file_size_limit_is_a_full_disk(command):
    write_input(command, 60)

    limited = ["bash", "-c", 'ulimit -f 6 && exec "$@"', "bash"]  # 6 KiB
    done = command.run(arguments=[*limited, *command.arguments()])
    assert done.returncode == 3
    assert f"error: cannot write {command.output}: File too large; the " in done.stderr
    assert "Traceback" not in done.stderr
    assert 5000 < command.output.stat().st_size <= 6144
    assert len(read_output(command.output)) > 0
    assert command.run().returncode == 0
    assert len(without_time(read_output(command.output))) == 60


def test_full_device_and_output_to_a_pipe(command):
    write_input(command, 3)
    command.output = pathlib.Path("/dev/full")
    done = command.run()
    assert done.returncode == 3
    assert "error: cannot write /dev/full: No space left on device" in done.stderr
    command.output = pathlib.Path("/dev/stdout")
    done = command.run()
    assert done.returncode == 0
    assert len([json.loads(line) for line in done.stdout.splitlines()]) == 3


def test_statuses_overrides_and_metrics(command):
    plain = {"custom_id": "a", "prompt_token_ids": [1, 2]}
    write_lines(command.input, [plain, {**plain, "custom_id": "b", "top_k": -1}])
    metrics = command.folder / "metrics.json"
    done = command.run(
        "--config.sampling.max_tokens=3",
        "--config.sampling.temperature=0.5",
        "--config.cache.device_bytes=1.5KiB",
        f"--metrics={metrics}",
        "--ordered",
    )
    assert done.returncode == 1, done.stderr
    assert done.stdout == ""
    good, bad = read_output(command.output)
    assert good["apex"]["sampling"]["max_tokens"] == 3
    assert good["apex"]["sampling"]["temperature"] == 0.5
    assert bad["error"]["message"] == "line 2: top_k is -1; it must be at least 0 (0 is off)"
    assert json.loads(metrics.read_text())["exit_status"] == 1
    changed = command.run("--config.sampling.max_tokens=4", "--config.sampling.temperature=0.5")
    assert changed.returncode == 2
    assert "defaults.max_tokens was 3, now 4" in changed.stderr
    model = command.run(
        "--config.sampling.max_tokens=3",
        "--config.sampling.temperature=0.5",
        "--overwrite",
        "--noordered",
        FAKE_FINGERPRINT="beef",
    )
    assert model.returncode == 1


def test_engine_fault_has_its_own_status(command):
    write_input(command, 3)
    done = command.run(FAKE_STEP_SEC="-1")  # sleeping a negative time raises
    assert done.returncode == 3
    assert "ValueError: sleep length must be non-negative" in done.stderr
    assert "error: the job stopped by a fault; what is written stays" in done.stderr


@pytest.mark.parametrize("close", ["2>&1 | head -c 1", "2>&-", "2>/dev/full"])
def test_job_outlives_its_stderr(command, close):
    """Nobody reads what it says: its results and its status are as ever."""
    write_input(command, 60)
    script = f'{{ "$@"; echo $? >{command.folder}/status; }} {close}'
    for extra, environment, status in (
        ((), {"FAKE_STEP_SEC": "0.01"}, 0),
        (("--overwrite",), {"FAKE_STEP_SEC": "-1"}, 3),
        (("--nonsense",), {}, 2),
    ):
        arguments = ["bash", "-c", script, "bash", *command.arguments(*extra)]
        command.run(arguments=arguments, **environment)
        assert int((command.folder / "status").read_text()) == status
        if status == 0:
            assert len(without_time(read_output(command.output))) == 60


def test_flags_that_are_wrong(command):
    """One start of Python for all: each case is parsed in a process forked from it."""
    write_input(command, 1)
    files = [f"--config={command.config}", f"--input={command.input}", "--output=out"]
    broken = {
        "syntax.py": "def get_config(:\n",
        "raises.py": "def get_config():\n    raise ValueError('no such thing')\n",
        "other.py": "def get_config():\n    return {'a': 1}\n",
        "nothing.py": "x = 1\n",
    }
    for name, text in broken.items():
        (command.folder / name).write_text(text)
    configs = {name: f"--config={command.folder / name}" for name in (*broken, "missing.py")}
    cases = [
        ([*files, "--config.sampling.temprature=1"], "did you mean --config.sampling.temperature?"),
        ([*files, "--config.modle.path=1"], "did you mean --config.model.path?"),
        ([*files, "--config.zzz=1"], "--config.zzz: there is no such setting; known are model"),
        ([*files, "--config.sampling.max_tokens=abc"], "--config.sampling.max_tokens=abc: invalid"),
        ([*files, "--config.sampling=3"], 'Unable to parse value "3"'),
        ([*files, "--config.cache.device_bytes=3G"], "--config.cache.device_bytes is '3G'; it"),
        ([*files, "-config.cache.host_bytes", "much"], "--config.cache.host_bytes is 'much'; it"),
        ([*files, "--config.model.architecture.num_layers=3"], '"architecture" is None'),
        ([*files, "--overwrit"], "Unknown command line flag 'overwrit'. Did you mean: overwrite"),
        ([*files, "extra"], "'extra' is no flag"),
        ([*files, "--ordered=maybe"], "Non-boolean argument"),
        (files[1:], "--config is missing"),
        ([files[0], files[2]], "--input is missing"),
        (files[:2], "--output is missing"),
        ([configs["missing.py"], *files[1:]], "No such file or directory"),
        ([configs["syntax.py"], *files[1:]], "SyntaxError"),
        ([configs["raises.py"], *files[1:]], "no such thing"),
        ([configs["other.py"], *files[1:]], "returns dict, not apex_jax's Config"),
        ([configs["nothing.py"], *files[1:]], "has no attribute 'get_config'"),
    ]
    code = f"""
import json, os, sys
from launch import generate

for arguments in json.loads({json.dumps(json.dumps([arguments for arguments, _ in cases]))}):
    sys.stderr.flush()
    if os.fork() == 0:
        sys.argv = ["generate", *arguments]
        generate.parse_flags(sys.argv)
        print("accepted", file=sys.stderr)
        os._exit(0)
    print("status", os.waitstatus_to_exitcode(os.wait()[1]), file=sys.stderr)
"""
    done = command.run(arguments=[sys.executable, "-W", "ignore", "-c", code])
    said = done.stderr.splitlines()
    assert len(said) == 2 * len(cases), done.stderr
    for (_, message), line, status in zip(cases, said[::2], said[1::2], strict=True):
        assert line.startswith("error: ")
        assert message in line
        assert status == "status 2"


def test_help_names_the_flags(command):
    done = command.run(
        arguments=[sys.executable, str(ROOT / "tests" / "fake_engine.py"), "--helpfull"]
    )
    assert "--[no]retry_failed" in done.stdout
