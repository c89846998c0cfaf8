"""Run a batch of completion requests: a JSON-lines file in, a JSON-lines file out, resumable.

    python -m launch.generate --config=configs/NAME.py --input=IN.jsonl --output=OUT.jsonl

Any field of the config is a flag too, e.g. --config.sampling.max_tokens=100.

Exit status: 0 all requests have results; 1 the job is complete but some requests failed (see the
error lines); 2 refused, nothing was done; 3 stopped by a fault such as a full disk; 128 + the
signal's number when interrupted. After 3 and signals the same command goes on where it stopped.
"""

import atexit
import contextlib
import dataclasses
import difflib
import logging
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

from absl import app, flags
from ml_collections import config_flags

from apex_jax.batch.job import EXIT_REFUSED, EXIT_STOPPED, JobOptions, run_job
from apex_jax.batch.protocol import BatchEngine, CreateEngine
from apex_jax.config import Config
from apex_jax.timeline import Timeline

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
_ORDERED = flags.DEFINE_bool("ordered", False, "Write results in input order, not as they finish.")
_OVERWRITE = flags.DEFINE_bool(
    "overwrite", False, "Drop an existing output and start from nothing."
)
_RETRY_FAILED = flags.DEFINE_bool(
    "retry_failed", False, "Run the failed requests of an existing output again."
)


def create_engine(
    config: Config, on_progress: Callable[[str], None], timeline: Timeline
) -> BatchEngine:
    """Load the real engine. Imported late: a misspelt flag should not wait for jax."""
    # JAX takes 75 % of a GPU, and what it does not take no KV cache can use.
    if "XLA_PYTHON_CLIENT_MEM_FRACTION" not in os.environ:
        os.environ.setdefault("XLA_CLIENT_MEM_FRACTION", "0.95")
    for library in ("jax", "absl", "orbax"):  # they tell what only their developers need
        logging.getLogger(library).setLevel(logging.WARNING)
    if config.device.platform == "cpu":
        import jax

        jax.config.update("jax_platforms", "cpu")  # else a GPU that is not wanted is set up too
    if config.scheduler.has_host_lane:
        import jax

        jax.config.update("jax_num_cpu_devices", 2)  # one may have to stand in for a GPU
    on_progress("starting JAX")
    from apex_jax.engine import Engine

    return Engine.create(config, on_progress, timeline)


def parse_flags(argv: Sequence[str]) -> list[str]:
    """Parse the command line; whatever is wrong with it is one line on stderr and status 2."""
    atexit.register(_settle_stderr)
    try:
        rest = flags.FLAGS(list(argv))
        if len(rest) > 1:
            _refuse(f"{rest[1]!r} is no flag; values are given as --name=value")
        for flag in (_CONFIG, _INPUT, _OUTPUT):
            if flag.value is None:
                _refuse(f"--{flag.name} is missing")
        config = _CONFIG.value
        if not isinstance(config, Config):
            # Where the file cannot be loaded this is an object that says so once it is touched.
            if type(config).__module__.startswith("ml_collections.config_flags"):
                config.model  # noqa: B018
            _refuse(
                f"get_config() of --config returns {type(config).__name__}, not apex_jax's Config"
            )
    except SystemExit:
        raise
    except Exception as error:  # what a config file or ml_collections raises
        _refuse(_explain(argv, error))
    return rest


def main(argv: Sequence[str], create: CreateEngine = create_engine) -> int:
    """Run the job that the flags describe; return the exit status."""
    del argv  # parse_flags has read it
    if sys.stderr is None:  # started with 2>&-
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115 (for as long as the process lives)
    source, output = _INPUT.value, _OUTPUT.value
    metrics, trace = _METRICS.value, _TRACE.value
    assert source is not None
    assert output is not None
    options = JobOptions(
        input=Path(source),
        output=Path(output),
        metrics=None if metrics is None else Path(metrics),
        trace=None if trace is None else Path(trace),
        ordered=_ORDERED.value,
        overwrite=_OVERWRITE.value,
        retry_failed=_RETRY_FAILED.value,
    )
    try:
        return run_job(_CONFIG.value, options, create, sys.stderr)
    except Exception:
        with contextlib.suppress(OSError):  # whoever read stderr may be gone
            traceback.print_exc()
            print("error: the job stopped by a fault; what is written stays", file=sys.stderr)
        return EXIT_STOPPED


def _settle_stderr() -> None:
    """Drop what a lost reader of stderr will not get: Python would exit with 120 because of it."""
    if sys.stderr is None:
        return
    try:
        sys.stderr.flush()
    except OSError:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, sys.stderr.fileno())
        os.close(null)


def _refuse(message: str) -> NoReturn:
    with contextlib.suppress(OSError):
        print(f"error: {message}", file=sys.stderr)
    sys.exit(EXIT_REFUSED)


def _explain(argv: Sequence[str], error: Exception) -> str:
    """Say in one line what is wrong with a command line or its config file."""
    known = list(_field_names(Config()))
    for argument in argv[1:]:
        match = re.match(r"--?(?:no)?config\.([\w.]+)", argument)
        if match is None or match[1] in known or match[1].startswith("model.architecture."):
            continue
        near = difflib.get_close_matches(match[1], known, n=1)
        hint = f"did you mean --config.{near[0]}?" if near else "known are " + ", ".join(known)
        return f"--config.{match[1]}: there is no such setting; {hint}"
    text = str(error).strip().splitlines()
    reason = f"{text[0]} ... {text[-1].strip()}" if len(text) > 1 else "".join(text)
    return reason if isinstance(error, flags.Error) else f"{type(error).__name__}: {reason}"


def _field_names(config: Any, prefix: str = "") -> Iterator[str]:
    """Yield the dotted names of a dataclass's fields."""
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        yield prefix + field.name
        if dataclasses.is_dataclass(value):
            yield from _field_names(value, f"{prefix}{field.name}.")


if __name__ == "__main__":
    app.run(main, flags_parser=parse_flags)
