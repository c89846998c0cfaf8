"""The loop of a batch job: keep the engine's queue short but never empty, write what finishes.

Owns the requests in flight and the order of output lines. Knows nothing of files to open, of what
may be resumed or of messages: job.py sets that up.
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass

from apex_jax.batch.flow import Finished, RequestFlow
from apex_jax.batch.id_index import IdIndex, id_key
from apex_jax.batch.interruption import Interruption
from apex_jax.batch.journal import Journal
from apex_jax.batch.lines import BadLine, BatchRequest, RawLine, parse_line
from apex_jax.batch.logprobs import TokenTexts, logprob_fields
from apex_jax.batch.progress import Progress
from apex_jax.batch.protocol import BatchEngine
from apex_jax.batch.reorder import ReorderBuffer
from apex_jax.batch.results import (
    DUPLICATE,
    encode_bad_line,
    encode_failed_request,
    encode_result,
)
from apex_jax.batch.resume import check_line
from apex_jax.batch.statistics import Statistics
from apex_jax.config import Config
from apex_jax.request import RequestError
from apex_jax.text.chat import Chat
from apex_jax.text.model_text import ModelText

# Lines handled between two sweeps: a stretch of finished or bad lines must not starve the engine.
MAX_LINES_PER_SWEEP = 256
# Results an ordered job may hold back per request that can run, while an earlier one is not done.
REORDER_FACTOR = 16
MIN_REORDER = 1024


@dataclass(frozen=True)
class _Asked:
    """A submitted line. ticket: its place in the output. num_bytes: of its line."""

    request: BatchRequest
    ticket: int
    num_bytes: int


class JobLoop:
    """One run over the input; `run` does it all."""

    def __init__(
        self,
        config: Config,
        engine: BatchEngine,
        text: ModelText,
        lines: Iterator[RawLine],
        journal: Journal,
        index: IdIndex,
        statistics: Statistics,
        progress: Progress,
        interruption: Interruption,
        *,
        job_sha256: str,
        ordered: bool,
    ) -> None:
        self._config = config
        self._engine = engine
        decode = None if text.tokenizer is None else text.decode_within
        self._token_texts = TokenTexts(decode)
        self._lines = lines
        self._journal = journal
        self._index = index
        self._statistics = statistics
        self._progress = progress
        self._interruption = interruption
        self._job_sha256 = job_sha256
        num_running = config.scheduler.max_running
        self._flow: RequestFlow[_Asked] = RequestFlow(engine, text, num_running)
        self._reorder = (
            ReorderBuffer(max(MIN_REORDER, REORDER_FACTOR * num_running)) if ordered else None
        )
        self._at_end = False
        self._has_named_model = False
        self._started_sec = time.monotonic()

    @property
    def elapsed_sec(self) -> float:
        return time.monotonic() - self._started_sec

    def run(self) -> bool:
        """Work until all is done; False if interrupted. Whatever is complete is then written.

        Raises OutputError where the output cannot be written, JobRefusedError where a line that
        has a result asks for something else now, and whatever the engine raises.
        """
        self._started_sec = time.monotonic()
        self._progress.start()
        try:
            while self._interruption.signal_number is None:
                self._feed()
                if self._engine.num_unfinished:
                    for finished in self._flow.step():
                        self._deliver(finished)
                elif self._at_end:
                    return True
                self._progress.update(
                    self._statistics,
                    num_running=self._flow.num_in_flight,
                    num_output_tokens=self._engine.num_output_tokens,
                    elapsed_sec=self.elapsed_sec,
                )
            return False
        finally:
            if self._reorder is not None:
                for line in self._reorder.drain():
                    self._journal.append(line)

    def _feed(self) -> None:
        """Submit lines until the queue is long enough, the reorder window full, or the time up."""
        for _ in range(MAX_LINES_PER_SWEEP):
            if self._at_end or not self._flow.has_room:
                return
            if self._reorder is not None and self._reorder.is_full:
                return
            raw = next(self._lines, None)
            if raw is None:
                self._at_end = True
                return
            self._accept(raw)

    def _accept(self, raw: RawLine) -> None:
        """Answer one line at once (skip, error) or submit it."""
        entry = parse_line(raw, self._config.sampling)
        earlier: int | None = None
        if entry.custom_id is not None:
            earlier = self._index.see(id_key(entry.custom_id), raw.number)
        if check_line(raw, entry, earlier is not None, self._journal, self._index):
            self._statistics.add_skipped(raw.num_bytes)
            return
        if earlier is not None:
            message = f"custom_id is that of line {earlier} already; every line needs its own"
            entry = BadLine(entry.custom_id, raw.number, DUPLICATE, message, raw.sha256)
        ticket = 0 if self._reorder is None else self._reorder.take_ticket()
        if isinstance(entry, BadLine):
            self._fail(ticket, encode_bad_line(entry, self._job_sha256), raw)
            return
        self._compare_model(entry)
        asked = _Asked(entry, ticket, raw.num_bytes)
        try:
            self._flow.submit(entry.custom_id, entry.prompt, entry.sampling, asked)
        except RequestError as error:
            self._fail(ticket, encode_failed_request(entry, str(error), self._job_sha256), raw)

    def _compare_model(self, entry: BatchRequest) -> None:
        """Say once where lines name another model than the one that runs.

        No error: files are written for a served name, which no folder of weights knows.
        """
        own = self._engine.model.name
        if entry.model is None or self._has_named_model or entry.model.split("/")[-1] == own:
            return
        self._has_named_model = True
        self._progress.message(
            f"note: line {entry.line} names the model {entry.model[:100]!r}; every line runs with "
            f"{own}"
        )

    def _deliver(self, finished: Finished[_Asked]) -> None:
        """Write the line of a finished request."""
        asked = finished.tag
        is_chat = isinstance(asked.request.prompt, Chat)
        outputs = [choice.output for choice in finished.choices]
        logprobs = [
            logprob_fields(output, self._token_texts, is_chat=is_chat) for output in outputs
        ]
        line = encode_result(
            asked.request,
            finished,
            logprobs,
            self._engine.model.name,
            self._job_sha256,
            time.time(),
        )
        self._write(asked.ticket, line)
        self._statistics.add_result(outputs, asked.num_bytes)

    def _fail(self, ticket: int, line: bytes, raw: RawLine) -> None:
        self._write(ticket, line)
        self._statistics.add_failure(raw.num_bytes)

    def _write(self, ticket: int, line: bytes) -> None:
        released = [line] if self._reorder is None else self._reorder.put(ticket, line)
        for one in released:
            self._journal.append(one)
