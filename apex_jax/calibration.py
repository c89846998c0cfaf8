"""Times of the stages that a predicting strategy needs, measured when the engine starts.

Owns a few timed runs of what is compiled anyway, over a backend's verbs, before there are requests:
what they leave in pages and slots is overwritten before it is read. Called by the engine. Imports
no jax.
"""

import statistics
from collections.abc import Callable

import numpy as np

from apex_jax.buckets import Buckets
from apex_jax.cost_model import StageTimes
from apex_jax.hardware import (
    Backend,
    DeviceAttention,
    Embed,
    Handle,
    HostAttention,
    PostAttention,
    PreAttention,
)
from apex_jax.plan import DecodeBatch

NUM_REPEATS = 5
NUM_IN_A_ROW = 4  # stages in a queue, so that Python's time for one hides behind the one before
TIMEOUT_SEC = 60.0


def calibrate(
    backend: Backend, shapes: Buckets, *, num_layers: int, num_pages: int, num_host_pages: int
) -> StageTimes:
    """Return times of a layer's linear work and attention, at few and at many rows and tokens.

    Heads, transfers and Python's own time are left at zero: a job repeated on the same operand
    waits for no transfer. num_pages, num_host_pages: of the two pools.
    """
    assert shapes.host is not None
    few = _batch(shapes.device_rows[0], 1, num_pages, shapes.page_size)
    many = _batch(shapes.device_rows[-1], num_pages, num_pages, shapes.page_size)
    pre_sec, post_sec, attention_sec = _device_times(backend, few)
    many_pre_sec, many_post_sec, many_attention_sec = _device_times(backend, many)
    token_sec = _slope(attention_sec, many_attention_sec, _num_tokens(many) - _num_tokens(few))

    cohort_rows = shapes.host.cohort_rows
    shallow = _batch(cohort_rows[0], 1, num_host_pages, shapes.page_size)
    deep = _batch(cohort_rows[-1], num_host_pages, num_host_pages, shapes.page_size)
    job_sec, deep_job_sec = (_host_time(backend, batch) for batch in (shallow, deep))
    host_token_sec = _slope(job_sec, deep_job_sec, _num_tokens(deep) - _num_tokens(shallow))
    return StageTimes(
        num_layers=num_layers,
        linear_sec=pre_sec + post_sec,
        linear_sec_per_row=(many_pre_sec + many_post_sec) / len(many.slots_b),
        pre_share=pre_sec / (pre_sec + post_sec),
        device_attention_sec=max(0.0, attention_sec - token_sec * _num_tokens(few)),
        device_attention_sec_per_token=token_sec,
        host_attention_sec_per_token=host_token_sec,
        host_job_sec=max(0.0, job_sec - host_token_sec * _num_tokens(shallow)),
    )


def _slope(few_sec: float, many_sec: float, num_tokens: int) -> float:
    """Return seconds a token; 0 where more tokens took no longer, or there were no more."""
    return max(0.0, many_sec - few_sec) / num_tokens if num_tokens > 0 else 0.0


def _batch(rows: int, max_pages: int, num_pages: int, page_size: int) -> DecodeBatch:
    """Return rows over pages of their own where there are enough, at most max_pages in all."""
    rows = min(rows, num_pages)
    pages_per_row = max(1, max_pages // rows)
    table_bm = np.arange(rows * pages_per_row, dtype=np.int32).reshape(rows, pages_per_row)
    positions_b = np.full(rows, pages_per_row * page_size - 1, np.int32)
    return DecodeBatch(np.arange(rows, dtype=np.int32), positions_b, table_bm)


def _num_tokens(batch: DecodeBatch) -> int:
    return int((batch.positions_b + 1).sum())


def _device_times(backend: Backend, batch: DecodeBatch) -> tuple[float, float, float]:
    """Return seconds of what comes before attention, behind it, and of itself, in one layer."""
    (hidden,) = backend.enqueue(Embed(batch))
    (entered,) = backend.enqueue(PreAttention(0), hidden)
    (attended,) = backend.enqueue(DeviceAttention(batch, 0), entered)
    return (
        _time(backend, lambda: backend.enqueue(PreAttention(0), hidden)[0]),
        _time(backend, lambda: backend.enqueue(PostAttention(0), attended)[0]),
        _time(backend, lambda: backend.enqueue(DeviceAttention(batch, 0), entered)[0]),
    )


def _host_time(backend: Backend, batch: DecodeBatch) -> float:
    """Return seconds of a host job over a cohort, its transfers included."""
    (hidden,) = backend.enqueue(Embed(batch))
    (entered,) = backend.enqueue(PreAttention(0), hidden)
    job = HostAttention(cohort_id=0, layer=0, batch=batch)
    return _time(backend, lambda: backend.submit_host(job, entered))


def _time(backend: Backend, start: Callable[[], Handle]) -> float:
    """Return the median seconds of a stage or job among several of its kind."""

    def run() -> float:
        begin_sec = backend.now()
        last = [start() for _ in range(NUM_IN_A_ROW)][-1]
        if backend.wait_any([last], begin_sec + TIMEOUT_SEC) is None:
            raise TimeoutError(f"a stage took more than {TIMEOUT_SEC:g} s when it was measured")
        return (backend.now() - begin_sec) / NUM_IN_A_ROW

    run()  # what is touched for the first time takes longer
    return statistics.median(run() for _ in range(NUM_REPEATS))
