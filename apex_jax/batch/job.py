"""A batch job from its files to its exit status.

Owns the order of things: what can be refused early is refused before the engine loads, nothing of
an existing output changes before the job is known to be the same, and what is written stays.
"""

import contextlib
import io
import itertools
import os
import signal
import stat
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from apex_jax.batch.decision_log import DecisionLog
from apex_jax.batch.id_index import IdIndex
from apex_jax.batch.identity import (
    chat_time,
    hash_identity,
    identify,
    known_before_loading,
    write_json,
    write_sidecar,
)
from apex_jax.batch.interruption import Interrupted, Interruption
from apex_jax.batch.journal import Journal, OutputError
from apex_jax.batch.lines import check_defaults, read_lines
from apex_jax.batch.loop import JobLoop
from apex_jax.batch.progress import Progress, TextStream
from apex_jax.batch.protocol import BatchEngine, CreateEngine
from apex_jax.batch.resume import (
    JobRefusedError,
    Progressed,
    check_identity,
    check_input,
    is_known_to_be_same,
    keep_successes,
    put_in_order,
    read_finished,
)
from apex_jax.batch.statistics import Statistics, format_bytes, format_summary
from apex_jax.config import Config, ConfigError, validate
from apex_jax.text.model_text import ModelText, load_text
from apex_jax.timeline import Timeline
from apex_jax.trace import TraceFile

# Exit statuses; an interrupted job adds the signal's number to 128, as shells do.
EXIT_OK = 0
EXIT_SOME_FAILED = 1  # the job is complete, and its output has error lines
EXIT_REFUSED = 2  # nothing was done
EXIT_STOPPED = 3  # full disk or the like: what is written stays, the same command goes on


@dataclass(frozen=True)
class JobOptions:
    """The files of a job, and how to treat an output that exists.

    trace: of what ran when. decisions: of a strategy that chooses. ordered: output lines in input
    order. overwrite: drop an existing output. retry_failed: run the failed lines of an existing
    output again.
    """

    input: Path
    output: Path
    metrics: Path | None = None
    trace: Path | None = None
    decisions: Path | None = None
    ordered: bool = False
    overwrite: bool = False
    retry_failed: bool = False


def run_job(
    config: Config, options: JobOptions, create_engine: CreateEngine, stream: TextStream
) -> int:
    """Run a batch job and return its exit status; everything for people goes to `stream`."""
    progress = Progress(stream)
    with Interruption() as interruption:
        job = _Job(config, options, progress, interruption)
        try:
            return job.run(create_engine)
        except Interrupted as interrupt:
            progress.message(f"interrupted by {interrupt} before the work began")
            return 128 + interrupt.signal_number
        except (ConfigError, JobRefusedError, OutputError) as error:
            progress.finish()
            progress.message(f"error: {error}")
            return EXIT_STOPPED if job.has_begun else EXIT_REFUSED


class _Job:
    """has_begun: the output may have changed."""

    def __init__(
        self, config: Config, options: JobOptions, progress: Progress, interruption: Interruption
    ) -> None:
        self._config = config
        self._options = options
        self._progress = progress
        self._interruption = interruption
        self._index = IdIndex()
        self.has_begun = False

    def run(self, create_engine: CreateEngine) -> int:
        options = self._options
        validate(self._config)
        check_defaults(self._config.sampling)
        self._check_paths()
        with contextlib.ExitStack() as stack:
            source = stack.enter_context(_open_input(options.input))
            journal = Journal(options.output)
            stack.callback(journal.close)
            text = self._load_text(journal)
            known = known_before_loading(self._config, text)
            jobs, progressed = self._read_output(journal, known)
            if progressed is not None and progressed.num_left == 0:
                return self._close_finished(journal, progressed)
            trace = self._open_trace(stack)
            decisions = self._open_decisions(stack)
            started_sec = time.monotonic()
            engine = create_engine(self._config, self._progress.message, Timeline(trace))
            stack.callback(engine.close)
            startup_sec = time.monotonic() - started_sec
            if decisions is not None:
                engine.log_decisions(decisions.write)
            if text.tokenizer is not None:
                text.tokenizer.check_vocabulary(engine.model.architecture.vocab_size)
            identity = identify(self._config, text, engine.model)
            check_identity(journal.path, jobs, identity, whole=True)
            self._progress.message(engine.describe())
            self._progress.message(self._describe(engine, text, source))

            self._interruption.defer()
            self.has_begun = True
            self._prepare_output(journal, identity)
            statistics = Statistics(_size(source))
            loop = JobLoop(
                self._config,
                engine,
                text,
                read_lines(source),
                journal,
                self._index,
                statistics,
                self._progress,
                self._interruption,
                job_sha256=hash_identity(identity),
                ordered=options.ordered,
            )
            status = EXIT_STOPPED
            try:
                complete = loop.run()
                status = self._close(journal, statistics, complete=complete)
            finally:
                wall_sec = loop.elapsed_sec
                self._progress.finish()
                self._report(
                    engine, statistics, identity, status, wall_sec=wall_sec, startup_sec=startup_sec
                )
                if trace is not None:
                    trace.close()
                    self._progress.message(trace.describe())
                if decisions is not None:
                    decisions.close()
                    self._progress.message(decisions.describe())
            return status

    def _check_paths(self) -> None:
        """Refuse paths that would cost results or show their fault only at the end."""
        options = self._options
        if options.overwrite and options.retry_failed:
            raise JobRefusedError("--overwrite drops all results: --retry_failed has no meaning")
        if options.decisions is not None and not self._config.scheduler.chooses:
            raise JobRefusedError(
                f"--decisions={options.decisions}: strategy {self._config.scheduler.strategy!r} "
                "decides nothing; use --config.scheduler.strategy=apex, or leave --decisions out"
            )
        asked = (
            ("output", options.output),
            ("metrics", options.metrics),
            ("trace", options.trace),
            ("decisions", options.decisions),
        )
        paths = [(name, path) for name, path in asked if path is not None]
        for name, path in paths:
            if path.exists() and options.input.exists() and path.samefile(options.input):
                raise JobRefusedError(f"--{name} is the input, {path}")
            if path.is_dir():
                raise JobRefusedError(f"--{name}={path} is a folder; name a file")
            if name != "output" and path.exists() and not path.is_file():
                raise JobRefusedError(f"--{name}={path} is no regular file, and would be replaced")
            if not path.absolute().parent.is_dir():
                raise JobRefusedError(f"--{name}={path}: there is no folder {path.parent}")
        for (other, first), (name, second) in itertools.combinations(paths, 2):
            if first.absolute() == second.absolute():
                raise JobRefusedError(f"--{name} is the {other}, {second}")
        metrics = options.metrics
        if metrics is not None and not os.access(metrics.absolute().parent, os.W_OK):
            raise JobRefusedError(f"--metrics={metrics}: the folder cannot be written")

    def _open_trace(self, stack: contextlib.ExitStack) -> TraceFile | None:
        path = self._options.trace
        if path is None:
            return None
        try:
            trace = TraceFile(path, origin_sec=time.perf_counter())
        except OSError as error:
            raise JobRefusedError(f"cannot write --trace={path}: {error.strerror}") from error
        stack.callback(trace.close)
        return trace

    def _open_decisions(self, stack: contextlib.ExitStack) -> DecisionLog | None:
        path = self._options.decisions
        if path is None:
            return None
        try:
            log = DecisionLog(path)
        except OSError as error:
            raise JobRefusedError(f"cannot write --decisions={path}: {error.strerror}") from error
        stack.callback(log.close)
        return log

    def _load_text(self, journal: Journal) -> ModelText:
        path = self._config.model.path
        folder = None if path is None else Path(path).expanduser()
        # Said before the folder is compared with an existing output's, which would hide a typo.
        if folder is not None and not folder.is_dir():
            raise ConfigError(f"--config.model.path is {path!r}; there is no such folder")
        return load_text(folder, None if self._options.overwrite else chat_time(journal.path))

    def _read_output(
        self, journal: Journal, known: Mapping[str, Any]
    ) -> tuple[set[str], Progressed | None]:
        """Learn what is finished; refuse what the input alone shows.

        Returns the job hashes, and how far the job is where that is certain before loading.
        """
        options = self._options
        if options.overwrite:
            return set(), None
        jobs = read_finished(journal, self._index, drop_failed=options.retry_failed)
        check_identity(journal.path, jobs, known, whole=False)
        if not jobs or not stat.S_ISREG(options.input.stat().st_mode):
            return jobs, None
        with _open_input(options.input) as file:
            progressed = check_input(read_lines(file), self._config.sampling, journal, self._index)
        return jobs, progressed if is_known_to_be_same(journal.path, jobs, known) else None

    def _prepare_output(self, journal: Journal, identity: Mapping[str, Any]) -> None:
        """Drop what must go, and say beside the output whose it is."""
        if self._options.overwrite:
            journal.num_bytes = 0
        elif self._options.retry_failed:
            keep_successes(journal)
        journal.start_appending()
        if journal.is_regular:
            write_sidecar(journal.path, identity)

    def _describe(self, engine: BatchEngine, text: ModelText, source: io.BufferedReader) -> str:
        """Say what the job adds to the engine's plan."""
        options, vocab_size = self._options, engine.model.architecture.vocab_size
        size = _size(source)
        shown = "size unknown" if size is None else format_bytes(size)
        tokenizer = text.tokenizer
        read_by = "none: token-id prompts only"
        if tokenizer is not None:
            read_by = f"{tokenizer.path}, {tokenizer.num_tokens} tokens (model: {vocab_size})"
        finished = f"{self._index.num_finished} lines finished before"
        if self._index.num_failed:
            finished += f", {self._index.num_failed} of them failed"
        order = "input order" if options.ordered else "as they finish"
        return (
            f"tokenizer  {read_by}\n"
            f"input      {options.input}, {shown}\n"
            f"output     {options.output}, {order}; {finished}"
        )

    def _close(self, journal: Journal, statistics: Statistics, *, complete: bool) -> int:
        """Bring the output into its final state and return the exit status."""
        number = self._interruption.signal_number
        journal.sync()
        if not complete:
            assert number is not None
            self._progress.message(
                f"interrupted by {signal.Signals(number).name}: what is complete is in "
                f"{journal.path}; start the same command again to go on"
            )
            return 128 + number
        if self._options.ordered and self._index.num_finished:
            put_in_order(journal, self._index)
        return self._conclude(
            journal, statistics.num_skipped, statistics.num_failed + self._index.num_failed
        )

    def _close_finished(self, journal: Journal, progressed: Progressed) -> int:
        """Do what a job whose lines are all answered needs, which is no engine."""
        self._interruption.defer()
        self.has_begun = True
        if self._options.retry_failed:
            keep_successes(journal)
        journal.start_appending()
        if self._options.ordered:
            put_in_order(journal, progressed.seen)
        self._progress.message(
            f"all {progressed.num_finished} requests are finished: the model is not loaded; the "
            f"results are in {journal.path}"
        )
        return self._conclude(journal, progressed.num_finished, self._index.num_failed)

    def _conclude(self, journal: Journal, num_skipped: int, num_failed: int) -> int:
        """Say what else there is to know of a complete output; return the exit status.

        num_skipped: lines of the input that were answered before. num_failed: error lines.
        """
        num_stale = self._index.num_finished - num_skipped
        if num_stale:
            self._progress.message(
                f"note: {num_stale} results in {journal.path} belong to no line of the input"
            )
        if num_failed:
            self._progress.message(
                f"note: {num_failed} lines failed; each has a line in {journal.path} whose "
                '"error" says why (--retry_failed runs them again)'
            )
        return EXIT_SOME_FAILED if num_failed else EXIT_OK

    def _report(
        self,
        engine: BatchEngine,
        statistics: Statistics,
        identity: Mapping[str, Any],
        status: int,
        *,
        wall_sec: float,
        startup_sec: float,
    ) -> None:
        """Print the summary and write the metrics file.

        A metrics file that cannot be written is said, and changes neither the status (that tells
        whether the results are there) nor the error that ended the job.
        """
        measured = engine.metrics()
        metrics = {
            "complete": status in (EXIT_OK, EXIT_SOME_FAILED),
            "exit_status": status,
            **statistics.to_json(wall_sec),
            "startup_sec": startup_sec,
            "compile_sec": measured.get("compile_sec"),
            "peak_bytes": measured.get("peak_bytes"),
            "prefix_reuse": measured.get("prefix_reuse"),
            "hybrid": measured.get("hybrid"),
            "engine": measured,
            "job": {"model_name": engine.model.name, **identity},
        }
        self._progress.message(format_summary(metrics))
        if self._options.metrics is not None:
            try:
                write_json(self._options.metrics, metrics)
            except OutputError as error:
                self._progress.message(f"error: {error}; the results are not affected")


def _open_input(path: Path) -> io.BufferedReader:
    try:
        return open(path, "rb")
    except OSError as error:
        raise JobRefusedError(f"cannot read --input={path}: {error.strerror}") from error


def _size(file: io.BufferedReader) -> int | None:
    """Return the bytes of a regular file, None for a pipe."""
    status = os.fstat(file.fileno())
    return status.st_size if stat.S_ISREG(status.st_mode) else None
