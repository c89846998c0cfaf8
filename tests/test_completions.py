"""Completions: device stages and host jobs are waited for in one place, however they end."""

import re
import threading
import time
import weakref
from concurrent.futures import Future
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from apex_jax.backends.completions import Completions, is_ready
from apex_jax.hardware import Boundary, Head, Layers
from apex_jax.ops import host_attention, native_library
from apex_jax.plan import DecodeBatch

WAIT_SEC = 60.0
BATCH = DecodeBatch(*(np.zeros(1, np.int32),) * 2, np.zeros((1, 1), np.int32))


class Handle(NamedTuple):
    marker: Any


class Stage:
    """A marker that ends when it is told to; an array's own end cannot be arranged."""

    def __init__(self):
        self.ended, self.error = threading.Event(), None

    def is_ready(self):
        return self.ended.is_set()

    def block_until_ready(self):
        assert self.ended.wait(WAIT_SEC)
        if self.error is not None:
            raise self.error
        return self

    def end(self, error=None):
        self.error = error
        self.ended.set()


@pytest.fixture
def spans():
    return []


@pytest.fixture
def completions(spans):
    made = Completions(lambda *span, **args: spans.append((*span, args)))
    yield made
    made.close()


def soon():
    return time.perf_counter() + WAIT_SEC


def enqueue(completions, num_stages):
    handles = [Handle(Stage()) for _ in range(num_stages)]
    for layer, handle in enumerate(handles):
        completions.enqueued(handle, Boundary(layer))
    return handles


def submit(completions):
    handle = Handle(Future())
    completions.submitted(handle)
    return handle


def in_thread(function):
    """Run a wait that will be woken from here."""
    outcome = Future()

    def run():
        try:
            outcome.set_result(function())
        except RuntimeError as error:
            outcome.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return outcome


def wait_until(holds):
    deadline_sec = soon()
    while not holds():
        assert time.perf_counter() < deadline_sec
        time.sleep(0.001)


def test_the_first_in_the_given_order_is_returned(completions):
    first, second = enqueue(completions, 2)
    job = submit(completions)
    assert completions.wait_any([first, second, job], time.perf_counter()) is None
    job.marker.set_result(None)
    assert completions.wait_any([first, second, job], soon()) is job
    first.marker.end()
    assert completions.wait_any([second, first, job], soon()) is first
    assert completions.wait_any([second, job, first], soon()) is job
    assert [is_ready(one) for one in (first, second, job)] == [True, False, True]
    second.marker.end()
    assert completions.wait_any([second, job, first], 0.0) is second


def test_a_wait_is_woken_by_a_stage_or_a_job(completions):
    (stage,), job = enqueue(completions, 1), submit(completions)
    waits = [in_thread(lambda: completions.wait_any([stage, job], soon())) for _ in range(2)]
    stage.marker.end()
    assert [one.result(WAIT_SEC) for one in waits] == [stage, stage]
    (late,) = enqueue(completions, 1)
    waits = [in_thread(lambda: completions.wait_any([late, job], soon())) for _ in range(2)]
    job.marker.set_result(3)
    assert [one.result(WAIT_SEC) for one in waits] == [job, job]
    late.marker.end()


def test_a_deadline_passes(completions):
    handles = [*enqueue(completions, 1), submit(completions)]
    start_sec = time.perf_counter()
    assert completions.wait_any(handles, start_sec + 0.05) is None
    assert time.perf_counter() >= start_sec + 0.05
    assert completions.wait_any(handles, start_sec) is None
    handles[0].marker.end()


def test_a_failure_reaches_who_waits_for_it(completions):
    bad, good = enqueue(completions, 2)
    job = submit(completions)
    waiting = in_thread(lambda: completions.wait_any([bad], soon()))
    bad.marker.end(RuntimeError("the device caught fire"))
    with pytest.raises(RuntimeError, match="caught fire"):
        waiting.result(WAIT_SEC)
    good.marker.end()
    assert completions.wait_any([good, bad], soon()) is good
    job.marker.set_exception(OSError("the op failed"))
    with pytest.raises(OSError, match="the op failed"):
        completions.wait_any([job], soon())
    assert completions.wait_any([good, job], soon()) is good


def test_spans_follow_one_another(completions, spans):
    before_sec = time.perf_counter()
    handles = [Handle(Stage()) for _ in range(3)]
    stages = (Boundary(7, cohort_id=1), Layers(BATCH, 2), Head(()))
    for handle, stage in zip(handles, stages, strict=True):
        completions.enqueued(handle, stage)
    enqueued_sec = time.perf_counter()
    for handle in handles:
        handle.marker.end()
    (late,) = enqueue(completions, 1)
    late.marker.end()
    completions.close()
    assert [(lane, name, args) for lane, name, _, _, args in spans] == [
        ("device", "boundary", {"work": stages[0], "layer": 7, "cohort": 1}),
        ("device", "layers", {"work": stages[1], "layer": 2}),
        ("device", "head", {"work": stages[2]}),
        ("device", "boundary", {"work": Boundary(0), "layer": 0}),
    ]
    starts, ends = [span[2] for span in spans], [span[3] for span in spans]
    assert before_sec <= starts[0] <= enqueued_sec <= ends[0]
    assert starts[1:3] == ends[:2]  # they were queued
    assert starts[3] >= ends[2]
    assert ends == sorted(ends)


def test_a_stage_may_begin_before_it_is_reported(completions, spans):
    (handle,) = [Handle(Stage())]
    handle.marker.end()
    start_sec = time.perf_counter() - 5
    completions.enqueued(handle, Boundary(0), start_sec)
    completions.close()
    assert spans[0][2] == start_sec


def test_nothing_is_kept_of_a_stage_that_has_ended(completions):
    (handle,) = enqueue(completions, 1)
    handle.marker.end()
    wait_until(lambda: completions.describe() == "device: idle")
    marker = weakref.ref(handle.marker)
    del handle
    wait_until(lambda: marker() is None)


def test_they_say_what_the_device_does(completions):
    assert completions.describe() == "device: idle"
    handles = enqueue(completions, 3)
    wait_until(lambda: completions.describe().startswith("device: boundary"))
    message = r"device: boundary enqueued \d+\.\d s ago; 2 stages queued behind it"
    assert re.fullmatch(message, completions.describe())
    for handle in handles:
        handle.marker.end()
    wait_until(lambda: completions.describe() == "device: idle")


def test_real_stages_and_their_errors(completions):
    """XLA's own arrays: asynchronous work, and an op that refuses its arguments after it."""
    native_library.load(num_threads=2)
    work = jax.jit(lambda x: jax.lax.fori_loop(0, 20, lambda _, x: x @ x / 256, x))
    stages = [Handle(work(jnp.ones((256, 256)))) for _ in range(8)]
    for layer, stage in enumerate(stages):
        completions.enqueued(stage, Boundary(layer))
    assert completions.wait_any(stages[-1:], soon()) is stages[-1]
    assert all(is_ready(one) for one in stages)

    pool = host_attention.allocate_pool(2, 1, 8, 8, "float32")
    wrong = jax.jit(
        lambda x: host_attention.read_pages(pool, work(x).astype(jnp.int32).ravel()[:1] + 7)
    )

    def run_wrong_stage():  # raises where it runs inside the call, otherwise in the wait
        failed = Handle(wrong(jnp.ones((256, 256))))
        completions.enqueued(failed, Boundary(0))
        completions.wait_any([failed], soon())

    with pytest.raises((ValueError, jax.errors.JaxRuntimeError), match=r"page_ids\[0\] = 8"):
        run_wrong_stage()


def test_closing_wakes_who_waits_and_ends_the_thread():
    num_threads = threading.active_count()
    for _ in range(3):
        completions = Completions(lambda *_, **__: None)
        (stage,), job = enqueue(completions, 1), submit(completions)
        waiting = in_thread(lambda one=completions, job=job: one.wait_any([job], soon()))
        stage.marker.end()
        completions.close()
        with pytest.raises(RuntimeError, match="the completions are closed"):
            waiting.result(WAIT_SEC)
        with pytest.raises(RuntimeError, match="the completions are closed"):
            completions.wait_any([job], soon())
        assert completions.wait_any([job, stage], soon()) is stage
    wait_until(lambda: threading.active_count() <= num_threads)  # those of `in_thread` too


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_recorder_that_fails_does_not_leave_anyone_waiting():
    def on_span(*_, **__):
        raise OSError("disk full")

    completions = Completions(on_span)
    (stage,), job = enqueue(completions, 1), submit(completions)
    stage.marker.end()
    with pytest.raises(RuntimeError, match="the completions' thread failed: disk full"):
        completions.wait_any([job], soon())
    completions.close()
