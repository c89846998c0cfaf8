"""A framework's run as a process of its own: a job in, a result that was checked out.

Owns what the process inherits, its end, however it comes, and the message about it. Imports no jax.
"""

import os
import signal
import subprocess
import tempfile
from pathlib import Path

from launch.comparison.adapters.fairness import fault_in
from launch.comparison.adapters.jobs import Job, JobResult, read_result
from launch.comparison.decode import FileError

MAX_SHOWN = 300  # characters of what a program said last
# Would make our packages, or another number of threads, a framework's.
FOREIGN = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV", "OMP_NUM_THREADS", "MKL_NUM_THREADS")


class RunError(RuntimeError):
    """A run that did not come to a fair end; the message says why."""


def run_job(python: str, script: Path, job: Job, timeout_sec: float) -> JobResult:
    """Run a program on a job; RunError for a crash, a timeout, or a result that is not fair.

    The caller binds itself to the job's CPUs before, which the process inherits.
    """
    with tempfile.TemporaryDirectory(prefix="apex-jax-compare-") as folder:
        job_path, result_path = Path(folder, "job.json"), Path(folder, "result.json")
        job.write(job_path)
        variables = {name: value for name, value in os.environ.items() if name not in FOREIGN}
        variables["OMP_NUM_THREADS"] = str(job.threads)
        said = _run([python, str(script), str(job_path), str(result_path)], variables, timeout_sec)
        if not result_path.exists():
            raise RunError(f"the program ended without a result; it said last: {said}")
        try:
            result = read_result(result_path, f"the result of {script.name}")
        except FileError as error:
            raise RunError(str(error)) from None
    fault = fault_in(job, result)
    if fault is not None:
        raise RunError(f"not comparable: {fault}")
    return result


def _run(command: list[str], variables: dict[str, str], timeout_sec: float) -> str:
    """Run to the end; return what was said last. What is said goes to a file: a pipe may fill."""
    with tempfile.TemporaryFile("w+", errors="replace") as output:
        try:
            ended = subprocess.run(
                command,
                env=variables,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                timeout=timeout_sec,
            )
        except subprocess.TimeoutExpired:
            raise RunError(f"it had not ended after {timeout_sec:.0f} s") from None
        except OSError as error:
            raise RunError(f"{command[0]} does not start: {error.strerror}") from None
        output.seek(0)
        lines = [line.strip() for line in output if line.strip()]
    said = " ".join(" ".join(lines[-1:]).split())[-MAX_SHOWN:]
    if ended.returncode < 0:
        name = signal.Signals(-ended.returncode).name
        hint = " (out of memory?)" if name == "SIGKILL" else ""
        raise RunError(f"it was ended by {name}{hint}; it said last: {said}")
    if ended.returncode:
        raise RunError(f"it failed with status {ended.returncode}: {said}")
    return said
