"""The host lane of a paced run while nobody uses it: its memory filled, its jobs timed.

Owns a few jobs over a backend's verbs, and what they say of the host's times. What they leave in
the pools is finite, and overwritten before a request reads it. Called by bench_paced.
"""

import dataclasses
import statistics
import time
from collections.abc import Sequence

import numpy as np

from apex_jax.backends.paced import PacedBackend
from apex_jax.cost_model import StageTimes
from apex_jax.hardware import Embed, Export, Handle, HostAttention, PreAttention, WritePages
from apex_jax.paced_engine import PacedPlan
from apex_jax.plan import DecodeBatch

TIMEOUT_SEC = 120.0
JOBS_IN_A_ROW = 8  # each on another layer: what is timed lies in memory, not in a cache
NUM_REPEATS = 5


class HostMeter:
    """Times of the host's jobs on cohorts of some shapes.

    cohorts: (rows, tokens of each row), two shapes or more. Writes every page of the pools first,
    so that all that is read has been written.
    """

    def __init__(self, backend: PacedBackend, plan: PacedPlan, cohorts: Sequence[tuple[int, int]]):
        self._backend, self._plan = backend, plan
        self._samples_sec: dict[tuple[int, int], list[float]] = {one: [] for one in cohorts}
        self._rng = np.random.default_rng(0)
        self._copy_sec_per_token = self._write_all()

    def measure(self) -> None:
        """Time jobs once more; the machine may not be what it was."""
        for (rows, tokens), samples_sec in self._samples_sec.items():
            samples_sec.append(self._time_job(rows, tokens))

    def apply(self, times: StageTimes) -> StageTimes:
        """Return the times with those of the host as measured so far, medians of each shape."""
        num_tokens = [rows * tokens for rows, tokens in self._samples_sec]
        seconds = [statistics.median(samples) for samples in self._samples_sec.values()]
        token_sec, job_sec = np.polyfit(num_tokens, seconds, 1)
        return dataclasses.replace(
            times,
            host_attention_sec_per_token=float(token_sec),
            host_job_sec=max(0.0, float(job_sec)),
            host_copy_sec_per_token=self._copy_sec_per_token,
        )

    def _write_all(self) -> float:
        """Write every page of every layer; return the seconds a token and layer."""
        plan, backend = self._plan, self._backend
        assert plan.shapes.host is not None
        size = plan.shapes.host.transit_pages[-1]
        begin_sec = time.perf_counter()
        for layer in range(plan.model.num_layers):
            for first in range(0, plan.num_host_pages, size):
                pages_i = np.arange(first, min(first + size, plan.num_host_pages), dtype=np.int32)
                (exported,) = backend.enqueue(Export(layer, pages_i, from_staging=True))
                written = backend.submit_host(WritePages(layer, pages_i), exported)
                self._wait(written)
        num_tokens = plan.model.num_layers * plan.num_host_pages * plan.shapes.page_size
        return (time.perf_counter() - begin_sec) / num_tokens

    def _time_job(self, rows: int, tokens: int) -> float:
        """Return the median seconds of a layer's attention, one of several jobs in a row."""
        plan, backend = self._plan, self._backend
        pages_per_row = -(-tokens // plan.shapes.page_size)
        pages_i = self._rng.permutation(plan.num_host_pages)[: rows * pages_per_row]
        batch = DecodeBatch(
            slots_b=np.arange(rows, dtype=np.int32),
            positions_b=np.full(rows, tokens - 1, np.int32),
            block_table_bm=pages_i.reshape(rows, pages_per_row).astype(np.int32),
        )
        (x,) = backend.enqueue(Embed(batch))
        (entered,) = backend.enqueue(PreAttention(0), x)
        self._wait(entered)

        def run(first_layer: int) -> float:
            begin_sec = time.perf_counter()
            layers = [(first_layer + one) % plan.model.num_layers for one in range(JOBS_IN_A_ROW)]
            jobs = [HostAttention(0, layer, batch) for layer in layers]
            self._wait([backend.submit_host(job, entered) for job in jobs][-1])
            return (time.perf_counter() - begin_sec) / JOBS_IN_A_ROW

        return statistics.median(run(one * JOBS_IN_A_ROW) for one in range(NUM_REPEATS))

    def _wait(self, handle: Handle) -> None:
        backend = self._backend
        if backend.wait_any([handle], backend.now() + TIMEOUT_SEC) is None:
            raise TimeoutError(f"a job took more than {TIMEOUT_SEC:g} s: {backend.describe()}")
