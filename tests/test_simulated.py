"""The simulated backend by itself: order, overlap, transfers and the virtual clock."""

import subprocess
import sys

import numpy as np
import pytest

from apex_jax.backends.simulated import SimulatedBackend
from apex_jax.cost_model import StageTimes
from apex_jax.hardware import (
    Boundary,
    DeviceAttention,
    Embed,
    Export,
    Head,
    HostAttention,
    Import,
    Layers,
    PreAttention,
    ReadPages,
    StagedLayer,
    WritePages,
)
from apex_jax.plan import DecodeBatch, HeadBatch, PrefillBatch
from apex_jax.request import SamplingParams

TIMES = StageTimes(
    num_layers=4,
    linear_sec=1.0,
    linear_sec_per_row=0.1,
    device_attention_sec_per_token=0.01,
    prefill_attention_sec_per_pair=0.002,
    host_attention_sec_per_token=0.05,
    host_job_sec=0.4,
    host_copy_sec_per_token=0.03,
    transfer_sec=0.2,
    transfer_sec_per_row=0.05,
    transfer_sec_per_token=0.01,
    head_sec=2.0,
)


def ints(*values):
    return np.array(values, np.int32)


DECODE = DecodeBatch(ints(0, 1), ints(9, 19), ints([0], [1]))  # 2 rows, 30 tokens of KV
PREFILL = PrefillBatch(np.zeros((1, 20), np.int32), ints(10), ints(16), ints([2]))
HEAD = HeadBatch.of([0, 1], [0, 1], [10, 20], [SamplingParams()] * 2)
PAGES = Export(0, ints(3, 4), from_staging=True)  # 2 pages of 8 tokens


def make(times=TIMES, **others):
    return SimulatedBackend(times, layers_per_program=2, page_size=8, **others)


def play(backend):
    """A cohort through one layer beside device rows; returns the handle of its attention."""
    (x,) = backend.enqueue(Embed(DECODE))
    (entered,) = backend.enqueue(PreAttention(0), x)
    attended = backend.submit_host(HostAttention(0, 0, DECODE), entered)
    (x,) = backend.enqueue(Embed(DECODE))
    (x,) = backend.enqueue(Layers(DECODE, 0), x)
    return x, attended


def test_stages_take_the_predicted_time_one_after_another():
    backend = make()
    (x,) = backend.enqueue(Embed(DECODE))
    (x,) = backend.enqueue(Layers(DECODE, 0), x)
    assert x.ready_sec == pytest.approx(2 * (1.0 + 0.3))
    (x,) = backend.enqueue(PreAttention(2), x)
    (x,) = backend.enqueue(DeviceAttention(DECODE, 2), x)
    assert x.ready_sec == pytest.approx(2.6 + 0.25 + 0.3)
    (x,) = backend.enqueue(Head((HEAD,)), x)
    assert x.read().tokens_b.tolist() == [0, 0]
    assert backend.now() == pytest.approx(3.15 + 2.0)


def test_a_prompt_costs_its_padded_rows_and_the_pairs_it_attends_to():
    backend = make()
    (x,) = backend.enqueue(Embed(PREFILL))
    (x,) = backend.enqueue(StagedLayer(PREFILL, 0), x)
    pairs = 16 * 10 + 16 * 17 // 2
    assert x.ready_sec == pytest.approx(0.1 * 20 + 0.002 * pairs)


def test_the_host_overlaps_with_the_device_behind_a_transfer():
    backend = make()
    x, attended = play(backend)
    assert x.ready_sec == pytest.approx(0.25 + 2.6)
    transfer, attention = 0.2 + 2 * 0.05, 0.4 + 0.05 * 30
    assert attended.ready_sec == pytest.approx(0.25 + transfer + attention + transfer)
    out, _ = backend.enqueue(Boundary(1), x, attended)
    assert out.ready_sec == pytest.approx(max(x.ready_sec, attended.ready_sec) + 1.0)


def test_a_boundary_shared_by_many_rows_is_bound_by_arithmetic():
    backend = make()
    many = DecodeBatch(np.zeros(30, np.int32), np.zeros(30, np.int32), np.zeros((30, 1), np.int32))
    (x,) = backend.enqueue(Embed(many))
    (y,) = backend.enqueue(Embed(DECODE))
    x, y = backend.enqueue(Boundary(1), x, y)
    assert x.ready_sec == y.ready_sec == pytest.approx(0.1 * 32)


def test_pages_travel_both_ways():
    backend = make()
    (exported,) = backend.enqueue(PAGES)
    assert exported.ready_sec == pytest.approx(2 * 0.01 * 16)
    written = backend.submit_host(WritePages(0, PAGES.pages_i), exported)
    transfer, copy = 0.2 + 0.01 * 16, 0.4 + 0.03 * 16
    assert written.ready_sec == pytest.approx(0.32 + transfer + copy)
    was_read = backend.submit_host(ReadPages(0, PAGES.pages_i))
    assert was_read.ready_sec == pytest.approx(written.ready_sec + copy + transfer)
    (imported,) = backend.enqueue(Import(0, PAGES.pages_i), was_read)
    assert imported.ready_sec == pytest.approx(was_read.ready_sec + 0.32)


def test_waiting_moves_the_clock_to_what_is_ready_first_or_to_the_deadline():
    backend = make()
    x, attended = play(backend)
    assert backend.wait_any([x, attended], backend.now()) is None
    assert backend.now() == 0
    assert backend.wait_any([x, attended], 1.0) is None
    assert backend.now() == 1.0
    assert attended.ready_sec < x.ready_sec
    assert backend.wait_any([x, attended], 100.0) is attended
    assert backend.now() == attended.ready_sec
    assert backend.wait_any([x], 0.5) is None
    assert backend.now() == attended.ready_sec, "it never goes back"


def test_dispatching_takes_pythons_time():
    times = StageTimes(num_layers=4, linear_sec=0.001, dispatch_sec=0.5)
    backend = make(times)
    x, _ = play(backend)
    assert backend.now() == 2.5
    assert x.ready_sec == pytest.approx(2.5 + 0.002), "a stage cannot start before it is asked for"


def test_spans_show_what_ran_where_and_no_lane_does_two_things_at_once():
    spans = []
    backend = make(on_span=lambda *span, work=None: spans.append(span))
    x, attended = play(backend)
    backend.enqueue(Boundary(1), x, attended)
    by_lane = {}
    for lane, name, start_sec, end_sec in spans:
        by_lane.setdefault(lane, []).append((start_sec, end_sec, name))
    assert [name for _, _, name in by_lane["device"]] == [
        "embed",
        "pre_attention",
        "embed",
        "layers",
        "boundary",
    ]
    assert [name for lane in ("to host", "host", "to device") for *_, name in by_lane[lane]] == [
        "host_attention"
    ] * 3
    for lane in ("device", "host"):
        ends = [0.0, *(end for _, end, _ in by_lane[lane])]
        assert all(start >= end for (start, *_), end in zip(by_lane[lane], ends, strict=False))


def test_noise_is_the_seeds():
    ready = [play(make(noise=0.1, seed=seed))[1].ready_sec for seed in (1, 1, 2)]
    assert ready[0] == ready[1] != ready[2]
    assert ready[0] != play(make())[1].ready_sec


def test_it_needs_no_jax():
    code = "import sys; import apex_jax.backends.simulated; sys.exit('jax' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
