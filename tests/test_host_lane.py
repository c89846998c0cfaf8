"""The host lane: right results in order, pages back to the bit, failures that are told."""

import os
import re
import threading
import weakref
from unittest import mock

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

from apex_jax.backends.host_lane import HostLane, HostLaneError, load_host_op
from apex_jax.backends.host_programs import HostPrograms, choose_host_device
from apex_jax.config import ConfigError, HostConfig, LlamaConfig
from apex_jax.hardware import HostAttention, ReadPages, WritePages
from apex_jax.plan import DecodeBatch

MODEL = LlamaConfig(
    num_layers=2,
    d_model=64,
    d_ffn=128,
    num_heads=6,
    num_kv_heads=2,
    head_dim=16,
    vocab_size=100,
    max_position_embeddings=512,
)
NUM_PAGES, PAGE_SIZE, MAX_SEQUENCE_PAGES = 40, 8, 7
PAGE_SHAPE = (MODEL.num_kv_heads, 2, PAGE_SIZE, MODEL.head_dim)
CALL_ERRORS = (ValueError, jax.errors.JaxRuntimeError)  # inside the calling thread, or not
WAIT_SEC = 60.0


@pytest.fixture(scope="module")
def programs():
    load_host_op(HostConfig(threads=2))
    return HostPrograms(
        MODEL,
        dtype=np.dtype("float32"),
        num_pages=NUM_PAGES,
        page_size=PAGE_SIZE,
        max_sequence_pages=MAX_SEQUENCE_PAGES,
        rows=(2, 4),
        written_pages=(2, 8),
        read_pages=(2, 8),
        device=choose_host_device(jax.devices()[0]),
    )


@pytest.fixture
def make_lane(programs):
    """Make lanes that are closed after the test."""
    lanes = []

    def make(**arguments):
        arguments.setdefault("on_span", lambda *_, **__: None)
        lanes.append(HostLane(programs, jax.devices()[0], **arguments))
        return lanes[-1]

    yield make
    for lane in lanes:
        lane.close()


def decode_batch(positions, tables):
    positions = np.asarray(positions, np.int32)
    return DecodeBatch(
        slots_b=np.arange(len(positions), dtype=np.int32),
        positions_b=positions,
        block_table_bm=np.asarray(tables, np.int32),
    )


def attention(positions, tables, layer=0, cohort_id=0):
    return HostAttention(cohort_id, layer, decode_batch(positions, tables))


def on_device(values):
    """Return an array on its way to the host, as a stage leaves it."""
    array = jnp.asarray(values, jnp.float32, device=jax.devices()[0])
    array.copy_to_host_async()
    return array


def qkv_of(rng, rows):
    return rng.normal(size=(rows, MODEL.num_heads + 2 * MODEL.num_kv_heads, MODEL.head_dim))


def result_of(future):
    return future.result(WAIT_SEC)


class Twin:
    """Keys and values of every sequence as lists, attended to in float64."""

    def __init__(self):
        self.kv = {}

    def attend(self, sequence_ids, qkv_bjh):
        n, k = MODEL.num_heads, MODEL.num_kv_heads
        out = np.zeros((len(sequence_ids), n, MODEL.head_dim))
        for row, sequence_id in enumerate(sequence_ids):
            q_nh, kv_2kh = qkv_bjh[row, :n], qkv_bjh[row, n:].reshape(2, k, -1)
            self.kv.setdefault(sequence_id, []).append(kv_2kh)
            for head in range(n):
                k_sh, v_sh = np.stack(self.kv[sequence_id])[:, :, head // (n // k)].swapaxes(0, 1)
                scores = MODEL.head_dim**-0.5 * (k_sh @ q_nh[head])
                weights = np.exp(scores - scores.max())
                out[row, head] = weights @ v_sh / weights.sum()
        return out


@hypothesis.settings(
    max_examples=30, suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture]
)
@hypothesis.given(data=st.data(), seed=st.integers(0, 2**32 - 1))
def test_cohorts_decode_as_in_float64(make_lane, data, seed):
    """Cohorts of 1 to 4 rows in buckets of 2 and 4, each layer a pool, a token at a time."""
    rng = np.random.default_rng(seed)
    lane = make_lane()
    pages = rng.permutation(NUM_PAGES)[:35].reshape(5, MAX_SEQUENCE_PAGES)
    twins, lengths, found = [Twin(), Twin()], np.zeros(5, int), []
    cohorts = st.lists(st.integers(0, 4), unique=True, min_size=1, max_size=4)
    for sequence_ids in data.draw(st.lists(cohorts, min_size=1, max_size=25)):
        num_rows = len(sequence_ids)
        rows = 2 if num_rows <= 2 else 4
        used_pages = lengths[sequence_ids].max() // PAGE_SIZE + 1
        tables = pages[sequence_ids, : rng.integers(used_pages, MAX_SEQUENCE_PAGES + 1)]
        for layer in range(MODEL.num_layers):
            qkv = qkv_of(rng, rows).astype(np.float32)
            qkv[num_rows:] = np.nan
            job = attention(lengths[sequence_ids], tables, layer)
            future = lane.submit(job, on_device(qkv))
            found.append((future, twins[layer].attend(sequence_ids, qkv.astype(np.float64)), rows))
        lengths[sequence_ids] += 1
    for future, expected, rows in found:
        out = result_of(future)
        assert out.devices() == {jax.devices()[0]}
        assert out.shape == (rows, MODEL.num_heads, MODEL.head_dim)
        np.testing.assert_allclose(out[: len(expected)], expected, rtol=0, atol=4e-6)
        assert not np.asarray(out)[len(expected) :].any()
    lane.close()


@pytest.mark.parametrize("num_pages", [1, 2, 3, 8])
def test_pages_read_are_pages_written(make_lane, num_pages):
    rng = np.random.default_rng(num_pages)
    lane, bucket = make_lane(), 2 if num_pages <= 2 else 8
    written = rng.normal(size=(bucket, *PAGE_SHAPE)).astype(np.float32)
    ids = rng.permutation(NUM_PAGES)[:num_pages].astype(np.int32)
    assert result_of(lane.submit(WritePages(1, ids), on_device(written))) is None
    read = result_of(lane.submit(ReadPages(1, ids)))
    assert read.devices() == {jax.devices()[0]}
    np.testing.assert_array_equal(read[:num_pages], written[:num_pages])
    assert read.shape == written.shape
    assert not np.asarray(read)[num_pages:].any()
    assert not np.asarray(result_of(lane.submit(ReadPages(0, ids)))).any()  # another layer


def test_jobs_run_in_order(make_lane):
    """A page written, read, written again and read again, all queued at once."""
    gate = threading.Event()
    lane = make_lane(before_job=lambda _: gate.wait(WAIT_SEC))
    ids = np.asarray([3, 30], np.int32)
    reads = []
    for value in range(8):
        lane.submit(WritePages(0, ids), on_device(np.full((2, *PAGE_SHAPE), value)))
        reads.append(lane.submit(ReadPages(0, ids)))
    assert not any(read.done() for read in reads)
    gate.set()
    for value, read in enumerate(reads):
        assert (np.asarray(result_of(read)) == value).all()


def test_nothing_is_kept_of_a_job_that_has_ended(make_lane):
    """Operands and results are device memory that the plan counts once."""
    lane = make_lane()
    operand = on_device(np.zeros((2, *PAGE_SHAPE)))
    written = lane.submit(WritePages(0, np.asarray([1, 2], np.int32)), operand)
    read = lane.submit(ReadPages(0, np.asarray([1, 2], np.int32)))
    kept = [weakref.ref(operand), weakref.ref(result_of(read))]
    del operand, written, read
    result_of(lane.submit(ReadPages(0, np.asarray([0], np.int32))))  # the worker is past them
    assert [one() for one in kept] == [None, None]


def test_nothing_compiles_after_set_up(make_lane):
    lane = make_lane()
    compiled = []
    listener = lambda name, *_, **__: compiled.append(name)  # noqa: E731
    operands = {rows: on_device(qkv_of(np.random.default_rng(0), rows)) for rows in (2, 4)}
    pages = on_device(np.ones((8, *PAGE_SHAPE)))
    jax.monitoring.register_event_duration_secs_listener(listener)
    try:
        for rows, positions in ((2, [0]), (2, [0, 9]), (4, [3, 1, 50])):
            tables = np.arange(len(positions) * MAX_SEQUENCE_PAGES).reshape(len(positions), -1)
            result_of(lane.submit(attention(positions, tables), operands[rows]))
        result_of(lane.submit(WritePages(0, np.arange(5, dtype=np.int32)), pages))
        result_of(lane.submit(ReadPages(0, np.arange(7, dtype=np.int32))))
    finally:
        jax.monitoring.unregister_event_duration_listener(listener)
    assert compiled == []


def test_spans_tell_what_a_job_did(make_lane):
    spans = []
    lane = make_lane(on_span=lambda *span, **args: spans.append((*span, args)))
    operand = on_device(qkv_of(np.random.default_rng(0), 2))
    result_of(lane.submit(attention([4], [[7]], layer=1, cohort_id=5), operand))
    lanes, names, starts, ends, args = zip(*spans, strict=True)
    assert lanes == ("to host", "host", "to device")
    assert set(names) == {"host_attention"}
    assert args[1].pop("work") == attention([4], [[7]], layer=1, cohort_id=5)
    assert args[1] == {"layer": 1, "rows": 1, "cohort": 5}
    assert [one["bytes"] for one in args[::2]] == [2 * 10 * 16 * 4, 2 * 6 * 16 * 4]
    times = [time for span in zip(starts, ends, strict=True) for time in span]
    assert times == sorted(times)


def test_the_lane_says_what_it_does(make_lane):
    begun, gate = threading.Event(), threading.Event()

    def block(job):
        begun.set()
        gate.wait(WAIT_SEC)

    lane = make_lane(before_job=block)
    assert lane.describe() == "host lane: idle; 0 jobs queued"
    futures = [lane.submit(ReadPages(1, np.asarray([0], np.int32))) for _ in range(3)]
    begun.wait(WAIT_SEC)
    message = r"host lane: read_pages of layer 1 for \d+\.\d s; 2 jobs queued"
    assert re.fullmatch(message, lane.describe())
    gate.set()
    result_of(futures[-1])
    lane.close()
    assert lane.describe() == "host lane: ended: it was closed; 0 jobs queued"


# Failures


def assert_fails_for_good(lane, message):
    """Every later job is refused with the first failure's message."""
    for job, operand in (
        (attention([0], [[0]]), on_device(np.zeros((2, 10, 16)))),
        (ReadPages(1, np.asarray([0], np.int32)), None),
    ):
        with pytest.raises(HostLaneError, match="the host lane runs no more jobs: .*" + message):
            result_of(lane.submit(job, operand))


@pytest.mark.parametrize(
    ("job", "operand_shape", "message"),
    [
        (attention([8], [[0, 99]]), (2, 10, 16), r"block_tables\[0, 1\] = 99: must be in"),
        (attention([-1], [[0]]), (2, 10, 16), r"lengths\[0\] = 0: must be from 1"),
        (attention([0] * 3, [[0], [1], [0]]), (4, 10, 16), "two rows append to slot 0 of page 0"),
        (WritePages(0, np.asarray([4, 4], np.int32)), (2, *PAGE_SHAPE), "page 4 is named twice"),
        (WritePages(0, np.asarray([-1], np.int32)), (2, *PAGE_SHAPE), r"page_ids\[0\] = -1"),
    ],
)
def test_an_error_of_the_op_fails_this_job_and_all_later_ones(
    make_lane, job, operand_shape, message
):
    lane = make_lane()
    with pytest.raises(CALL_ERRORS, match=message):
        result_of(lane.submit(job, on_device(np.zeros(operand_shape))))
    assert_fails_for_good(lane, message)


def test_a_failed_transfer_fails_the_job_and_all_later_ones(make_lane):
    lane, operand = make_lane(), on_device(np.zeros((2, 10, 16)))
    operand.delete()
    with pytest.raises(RuntimeError, match="deleted"):
        result_of(lane.submit(attention([0], [[0]]), operand))
    assert_fails_for_good(lane, "deleted")


def test_jobs_queued_behind_a_failure_fail_as_well(make_lane):
    gate = threading.Event()

    def fail(job):
        gate.wait(WAIT_SEC)
        raise OSError("the wire is cut")

    lane = make_lane(before_job=fail)
    first, *later = [lane.submit(ReadPages(0, np.asarray([0], np.int32))) for _ in range(3)]
    gate.set()
    with pytest.raises(OSError, match="the wire is cut"):
        result_of(first)
    for future in later:
        with pytest.raises(HostLaneError, match="runs no more jobs: the wire is cut"):
            result_of(future)


def test_closing_fails_what_has_not_begun(make_lane):
    begun, gate = threading.Event(), threading.Event()

    def block(job):
        begun.set()
        gate.wait(WAIT_SEC)

    lane = make_lane(before_job=block)
    running, *pending = [lane.submit(ReadPages(0, np.asarray([0], np.int32))) for _ in range(3)]
    begun.wait(WAIT_SEC)
    for future in pending:  # as soon as it is closed, though the running job goes on
        future.add_done_callback(lambda _: gate.set())
    lane.close()
    assert result_of(running).shape == (2, *PAGE_SHAPE)
    for future in [*pending, lane.submit(ReadPages(0, np.asarray([0], np.int32)))]:
        with pytest.raises(HostLaneError, match="runs no more jobs: it was closed"):
            result_of(future)


def test_closing_ends_the_thread_and_frees_the_pools(make_lane):
    shape = (NUM_PAGES, *PAGE_SHAPE)
    count = lambda: sum(one.shape == shape for one in jax.live_arrays())  # noqa: E731
    num_threads, num_pools = threading.active_count(), count()
    lane = make_lane()
    assert threading.active_count() == num_threads + 1
    assert count() == num_pools + MODEL.num_layers
    lane.close()
    assert threading.active_count() == num_threads
    assert count() == num_pools


# Set-up


def test_pools_that_cannot_be_had_are_told_to_who_makes_the_lane(programs, make_lane):
    with (
        mock.patch.object(programs, "allocate", side_effect=MemoryError("4096 GiB")),
        pytest.raises(MemoryError, match="4096 GiB"),
    ):
        make_lane()


def test_a_cpu_stands_in_beside_another_one():
    device, host = jax.devices("cpu")[:2]
    assert choose_host_device(device) == host
    with (
        mock.patch.object(jax, "devices", return_value=[device]),
        pytest.raises(ConfigError, match=r"needs two CPU devices: .*jax_num_cpu_devices"),
    ):
        choose_host_device(device)
    with (
        mock.patch.object(jax, "devices", side_effect=RuntimeError("no such platform")),
        pytest.raises(ConfigError, match="JAX_PLATFORMS=cuda,cpu, or leave JAX_PLATFORMS unset"),
    ):
        choose_host_device(device)


def test_the_worker_runs_on_the_first_of_its_cpus(make_lane):
    cpu = max(os.sched_getaffinity(0))
    found = []
    lane = make_lane(cpus=[cpu], before_job=lambda _: found.append(os.sched_getaffinity(0)))
    result_of(lane.submit(ReadPages(0, np.asarray([0], np.int32))))
    assert found == [{cpu}]


def test_settings_reach_the_op():
    cpus = sorted(os.sched_getaffinity(0))
    try:
        op = load_host_op(HostConfig(threads=1, cpus=",".join(map(str, cpus)), isa="portable"))
        assert (op.num_threads, op.isa, op.cpus) == (1, "portable", tuple(cpus))
        assert load_host_op(HostConfig()).num_threads == max(1, len(cpus) - 1)
        with pytest.raises(ConfigError, match=r"--config\.host .*: cpus: 99999 is not one of"):
            load_host_op(HostConfig(cpus="99999"))
    finally:
        load_host_op(HostConfig(threads=2))
