"""The order of stages, and what happens when the device hangs."""

import numpy as np
import pytest
from paper_backend import PaperBackend

from apex_jax.dispatch import Dispatch, Embed, Head, Layers, StuckError
from apex_jax.plan import DecodeBatch, HeadBatch, PrefillBatch, SweepPlan
from apex_jax.request import SamplingParams


def head(rows):
    count = len(rows)
    return HeadBatch.of(rows, list(range(count)), [4] * count, [SamplingParams()] * count)


def plan(*, decode=True, prefill=True, ends_prompt=True):
    ints = lambda *values: np.array(values, np.int32)  # noqa: E731
    return SweepPlan(
        sweep_id=7,
        prefill=PrefillBatch(ints([1, 2, 3, 9]), ints(0), ints(4), ints([2])) if prefill else None,
        prefill_head=head([0]) if prefill and ends_prompt else None,
        decode=DecodeBatch(ints(1), ints(3), ints([1])) if decode else None,
        decode_head=head([0]) if decode else None,
    )


@pytest.fixture
def backend():
    return PaperBackend(num_pages=4, page_size=8, num_slots=4, runs_late=True)


def test_prefill_goes_first_then_decode_each_with_its_head(backend):
    dispatch = Dispatch(backend, first_layers=[0, 2, 4], watchdog_sec=1.0)
    sweep = plan()
    handle = dispatch.launch(sweep)
    spans = [Layers, Layers, Layers]
    assert [type(stage) for stage in backend.stages] == [Embed, *spans, Head, Embed, *spans, Head]
    assert [stage.first_layer for stage in backend.stages if isinstance(stage, Layers)] == [
        0, 2, 4, 0, 2, 4,
    ]  # fmt: skip
    assert backend.stages[0].batch is sweep.prefill
    assert backend.stages[5].batch is sweep.decode
    assert len(dispatch.read(handle)) == 2


def test_a_chunk_in_mid_prompt_samples_nothing(backend):
    dispatch = Dispatch(backend, first_layers=[0], watchdog_sec=1.0)
    handle = dispatch.launch(plan(decode=False, ends_prompt=False))
    assert [type(stage) for stage in backend.stages] == [Embed, Layers]
    assert dispatch.read(handle).tolist() == []


def test_an_empty_plan_is_refused(backend):
    dispatch = Dispatch(backend, first_layers=[0], watchdog_sec=1.0)
    with pytest.raises(ValueError, match="sweep 7 has neither prefill nor decode rows"):
        dispatch.launch(plan(decode=False, prefill=False))


def test_a_hanging_device_is_reported(backend):
    backend.wait_any = lambda handles, deadline_sec: None
    dispatch = Dispatch(backend, first_layers=[0], watchdog_sec=2.5)
    handle = dispatch.launch(plan())
    with pytest.raises(StuckError, match=r"sweep 7 did not complete within 2.5 s"):
        dispatch.read(handle)
