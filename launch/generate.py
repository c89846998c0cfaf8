"""Run a batch of completion requests: a JSON-lines file in, a JSON-lines file out, resumable.

    python -m launch.generate --config=configs/NAME.py --input=IN.jsonl --output=OUT.jsonl

Any field of the config is a flag too, e.g. --config.sampling.max_tokens=100.

Exit status: 0 all requests have results; 1 the job is complete but some requests failed (see the
error lines); 2 refused, nothing was done; 3 stopped by a fault such as a full disk; 128 + the
signal's number when interrupted. After 3 and signals the same command goes on where it stopped.
"""

import contextlib
import os
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path

from absl import app, flags
from ml_collections import config_flags

from apex_jax.batch.job import EXIT_STOPPED, JobOptions, run_job
from apex_jax.batch.protocol import CreateEngine
from apex_jax.config import ConfigError
from launch import command_line
from launch.starting import create_engine

_CONFIG = config_flags.DEFINE_config_file(
    "config", help_string="Python file with get_config(); --config.FIELD=VALUE overrides a field."
)
_INPUT = flags.DEFINE_string("input", None, "Requests, one JSON object a line.")
_OUTPUT = flags.DEFINE_string(
    "output", None, "Results, one JSON object a line; an existing one is resumed."
)
_METRICS = flags.DEFINE_string("metrics", None, "File for the summary as JSON.")
_TRACE = flags.DEFINE_string(
    "trace", None, "File for the timeline; https://ui.perfetto.dev shows it."
)
_DECISIONS = flags.DEFINE_string(
    "decisions", None, "File for what a strategy that chooses decided in each sweep, JSON lines."
)
_ORDERED = flags.DEFINE_bool("ordered", False, "Write results in input order, not as they finish.")
_OVERWRITE = flags.DEFINE_bool(
    "overwrite", False, "Drop an existing output and start from nothing."
)
_PLAN_ONLY = flags.DEFINE_bool(
    "plan_only",
    False,
    "Say what fits where and what each strategy would yield, and do nothing; needs no --output.",
)
_DEVICE_PROFILE = flags.DEFINE_string(
    "device_profile", None, "For --plan_only: a described card, such as t4 (configs/hardware)."
)
_HOST_PROFILE = flags.DEFINE_string(
    "host_profile", None, "For --plan_only: a described host, such as paper_t4."
)
_RECALIBRATE = flags.DEFINE_bool(
    "recalibrate", False, "Measure stage times anew where the strategy predicts by them."
)
_RETRY_FAILED = flags.DEFINE_bool(
    "retry_failed", False, "Run the failed requests of an existing output again."
)


def parse_flags(argv: Sequence[str]) -> list[str]:
    """Parse the command line; whatever is wrong with it is one line on stderr and status 2."""
    rest = command_line.parse_flags(argv, _CONFIG, (_CONFIG, _INPUT))
    if _PLAN_ONLY.value:
        return rest
    if _OUTPUT.value is None:
        command_line.refuse("--output is missing")
    for flag in (_DEVICE_PROFILE, _HOST_PROFILE):
        if flag.value is not None:
            command_line.refuse(f"--{flag.name} is for --plan_only: a job runs on this machine")
    return rest


def main(argv: Sequence[str], create: CreateEngine = create_engine) -> int:
    """Run the job that the flags describe; return the exit status."""
    del argv  # parse_flags has read it
    if sys.stderr is None:  # started with 2>&-
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115 (for as long as the process lives)
    if _PLAN_ONLY.value:
        return _say_plan()
    source, output = _INPUT.value, _OUTPUT.value
    metrics, trace, decisions = _METRICS.value, _TRACE.value, _DECISIONS.value
    assert source is not None
    assert output is not None
    options = JobOptions(
        input=Path(source),
        output=Path(output),
        metrics=None if metrics is None else Path(metrics),
        trace=None if trace is None else Path(trace),
        decisions=None if decisions is None else Path(decisions),
        ordered=_ORDERED.value,
        overwrite=_OVERWRITE.value,
        retry_failed=_RETRY_FAILED.value,
    )
    config = _CONFIG.value
    config.profile.recalibrate |= _RECALIBRATE.value
    try:
        return run_job(config, options, create, sys.stderr)
    except Exception:
        with contextlib.suppress(OSError):  # whoever read stderr may be gone
            traceback.print_exc()
            print("error: the job stopped by a fault; what is written stays", file=sys.stderr)
        return EXIT_STOPPED


def _say_plan() -> int:
    from launch.plan_only import plan

    source = _INPUT.value
    assert source is not None  # parse_flags has seen to it
    try:
        print(plan(_CONFIG.value, Path(source), _DEVICE_PROFILE.value, _HOST_PROFILE.value))
    except ConfigError as error:
        command_line.refuse(str(error))
    return 0


if __name__ == "__main__":
    app.run(main, flags_parser=parse_flags)
