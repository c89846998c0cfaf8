"""What goes wrong on the host while requests run: a clear error in bounded time, never a hang.

Faults are injected from the worker's thread, before one of its jobs. The watchdog, and what a leak
comes to, are here too.
"""

import queue
import random
import re
import threading
from collections.abc import Callable

import jax
import pytest
from small_engines import hybrid_engine, make_hybrid_config, run, with_limits

from apex_jax.backends.host_lane import HostLaneError
from apex_jax.dispatch import StuckError
from apex_jax.engine import Engine
from apex_jax.hardware import HostAttention, Job
from apex_jax.policies import Merging
from apex_jax.request import Request, SamplingParams

CALL_ERRORS = (ValueError, jax.errors.JaxRuntimeError)  # inside the calling thread, or not
# Of the job that failed, or of one behind it, whose message ends with the first one's.
CUT_ERRORS = (OSError, HostLaneError)
BOUND_SEC = 60.0  # of what must end at all: generous, since the machine may be busy
OVERLAP = Merging(max_cohorts=2, is_spread=True)


def draw_requests(count: int = 6) -> list[Request]:
    rng = random.Random(3)
    params = SamplingParams(max_tokens=8, temperature=0.0, ignore_eos=True)
    return [
        Request(str(index), tuple(rng.randrange(120) for _ in range(20)), params)
        for index in range(count)
    ]


def small_engine(before_job: Callable[[Job], None] | None = None, **limits: float) -> Engine:
    """Return one whose device holds a request or two, so that the others go to the host."""
    return with_limits(
        hybrid_engine("mha"),
        policy=OVERLAP,
        num_pages=6,
        max_requests=2,
        max_host_requests=4,
        before_job=before_job,
        **limits,
    )


def within_bound(act: Callable[[], object]) -> object:
    """Return or raise what `act` does; AssertionError where it does not end."""
    outcome: queue.SimpleQueue[tuple[object, BaseException | None]] = queue.SimpleQueue()

    def work() -> None:
        try:
            outcome.put((act(), None))
        except BaseException as error:
            outcome.put((None, error))

    threading.Thread(target=work, daemon=True).start()
    try:
        value, error = outcome.get(timeout=BOUND_SEC)
    except queue.Empty:
        raise AssertionError(f"nothing came of it in {BOUND_SEC:g} s") from None
    if error is not None:
        raise error
    return value


class OnJob:
    """Does something before the given host attention job, counted from 0, and only then."""

    def __init__(self, number: int, act: Callable[[HostAttention], None]):
        self._number, self._act = number, act
        self._num_seen = 0

    def __call__(self, job: Job) -> None:
        if isinstance(job, HostAttention):
            self._num_seen += 1
            if self._num_seen == self._number + 1:
                self._act(job)


@pytest.mark.parametrize("number", [0, 7])
def test_an_exception_in_the_worker_is_the_steps_own(number):
    def fail(job: Job) -> None:
        raise OSError("the wire is cut")

    engine = small_engine(OnJob(number, fail))
    with pytest.raises(CUT_ERRORS, match="the wire is cut"):
        within_bound(lambda: run(engine, draw_requests()))


def test_an_error_of_the_op_is_the_steps_own():
    def name_a_page_that_is_not_there(job: HostAttention) -> None:
        job.batch.block_table_bm[0, 0] = 9999

    engine = small_engine(OnJob(5, name_a_page_that_is_not_there))
    with pytest.raises(
        (*CALL_ERRORS, HostLaneError), match=r"block_tables\[0, 0\] = 9999: must be in"
    ):
        within_bound(lambda: run(engine, draw_requests()))


def test_a_transfer_that_fails_is_the_steps_own(monkeypatch):
    device_put = jax.device_put

    def cut_off(*arguments: object, **named: object) -> object:
        if threading.current_thread().name == "apex-host":
            raise RuntimeError("the link to the device is down")
        return device_put(*arguments, **named)

    monkeypatch.setattr(jax, "device_put", cut_off)
    engine = small_engine()
    with pytest.raises(RuntimeError, match="the link to the device is down"):
        within_bound(lambda: run(engine, draw_requests()))


def test_the_watchdog_says_where_everything_stands():
    gate = threading.Event()
    engine = small_engine(OnJob(3, lambda job: gate.wait(BOUND_SEC)), watchdog_sec=1.0)
    try:
        with pytest.raises(StuckError, match="nothing moved for 1 s") as caught:
            within_bound(lambda: run(engine, draw_requests()))
    finally:
        gate.set()
    message = str(caught.value)
    for pattern in (
        r"cohort \d \(\d rows?\) at point \d of 3",
        r"\d in the device lane \(\d of 6 pages free\)",
        r"\d in the host lane \(\d+ of 32 pages free\), \d waiting",
        r"\d+ of 6 slots free",
        r"host lane: host_attention of layer \d for \d\.\d s; \d+ jobs queued",
        r"thread apex-host:\n(.*\n)*.*gate\.wait",
        "thread MainThread:",
    ):
        assert re.search(pattern, message), f"{pattern} is not in {message}"


@pytest.mark.other_python
def test_after_a_fault_the_engine_closes_and_another_one_works():
    requests = draw_requests()
    right = run(with_limits(hybrid_engine("mha")), requests)
    config = make_hybrid_config("mha")
    engine = Engine.create(config, lambda line: None)

    def fail(job: Job) -> None:
        raise OSError("the wire is cut")

    engine._workers.host_lane._before_job = OnJob(4, fail)
    with pytest.raises(CUT_ERRORS, match="the wire is cut"):
        within_bound(lambda: run(engine, requests))
    within_bound(engine.close)
    assert not engine._workers.host_lane._worker.is_alive()
    assert not engine._workers.completions._waiter.is_alive()
    engine = Engine.create(config, lambda line: None)
    assert within_bound(lambda: run(engine, requests)) == right
    engine.close()


@pytest.mark.parametrize("lane", ["device", "host"])
def test_a_page_that_nobody_gives_back_is_an_error(lane):
    engine = small_engine()
    [room] = [one for one in engine._scheduler._residency.rooms if one.lane == lane]
    room.pool.allocate(1)
    with pytest.raises(RuntimeError, match=f"{lane} pages in use .*, accounted for Counter"):
        within_bound(lambda: run(engine, draw_requests()))


def test_a_slot_that_nobody_gives_back_is_an_error():
    engine = small_engine()
    engine._scheduler._residency._free_slots.pop()
    with pytest.raises(RuntimeError, match=r"slots in use \[\], free \[1, 2, 3, 4, 5\]"):
        within_bound(lambda: run(engine, draw_requests()))
