"""The paper backend notices what it is there to notice."""

import numpy as np
import pytest
from paper_backend import PaperBackend

from apex_jax.hardware import (
    Boundary,
    DeviceAttention,
    Embed,
    Export,
    Head,
    HostAttention,
    Layers,
    PostAttention,
    PreAttention,
    WritePages,
)
from apex_jax.plan import DecodeBatch, HeadBatch
from apex_jax.request import SamplingParams


def ints(*values):
    return np.array(values, np.int32)


def decode(page, position=1, slot=0):
    return DecodeBatch(ints(slot), ints(position), ints([page]))


def sample(position):
    return Head((HeadBatch.of([0], [0], [position], [SamplingParams()]),))


@pytest.fixture
def backend():
    """Two layers; page 1 of the device holds a token in both."""
    backend = PaperBackend(
        num_layers=2,
        layers_per_program=2,
        page_size=4,
        num_pages=3,
        num_slots=2,
        num_host_pages=3,
    )
    backend.tokens_by_slot[0] = 5
    play(backend, decode(1, position=0), sample(1))
    return backend


def play(backend, batch, head):
    (x,) = backend.enqueue(Embed(batch))
    (x,) = backend.enqueue(Layers(batch, 0), x)
    (x,) = backend.enqueue(head, x)
    return x.read().tokens_b


def test_what_is_right_passes(backend):
    assert len(play(backend, decode(1), sample(2))) == 1


@pytest.mark.parametrize(
    ("batch", "head", "message"),
    [
        (decode(2), sample(2), r"layer 0 reads the KV of layers {0, -1}"),
        (decode(3), sample(2), r"page ids .* of 3"),
        (decode(-1), sample(2), r"page ids .* of 3"),
        (decode(1, slot=1), sample(2), "a row's slot holds no token"),
        (decode(1), sample(3), "not the positions that come next"),
    ],
)
def test_wrong_pages_slots_and_positions_are_noticed(backend, batch, head, message):
    with pytest.raises(AssertionError, match=message):
        play(backend, batch, head)


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ([Layers(decode(1), 1)], "no such layers"),
        ([PreAttention(1)], "rows at 0, Place.BEFORE"),
        ([PreAttention(0), PostAttention(0)], "rows at 0, Place.ENTERED"),
        ([PreAttention(0), DeviceAttention(decode(1), 1)], "layer 1 reads|rows at 0"),
        ([PreAttention(0), DeviceAttention(decode(1, position=2), 0)], "other rows attend"),
        ([PreAttention(0), DeviceAttention(decode(1), 0), Boundary(0)], "rows at 0, Place.ATT"),
        ([sample(2)], "sampled at"),
    ],
)
def test_stages_out_of_turn_are_noticed(backend, stages, message):
    (x,) = backend.enqueue(Embed(decode(1)))
    for stage in stages:
        (x,) = backend.enqueue(stage, x)
    with pytest.raises(AssertionError, match=message):
        backend.wait_any([x], np.inf)


def test_a_layer_in_anothers_place_is_noticed(backend):
    for layer in range(2):
        (exported,) = backend.enqueue(Export(0, ints(1), from_staging=False))
        backend.submit_host(WritePages(layer, ints(0)), exported)
    batch = decode(0)
    (x,) = backend.enqueue(Embed(batch))
    (entered,) = backend.enqueue(PreAttention(0), x)
    attended = backend.submit_host(HostAttention(0, 0, batch), entered)
    (entered,) = backend.enqueue(Boundary(1), attended)
    attended = backend.submit_host(HostAttention(0, 1, batch), entered)
    with pytest.raises(AssertionError, match=r"layer 1 reads the KV of layers {0, 1}"):
        backend.wait_any([attended], np.inf)


def test_an_operand_is_donated_once(backend):
    (x,) = backend.enqueue(Embed(decode(1)))
    backend.enqueue(PreAttention(0), x)
    with pytest.raises(AssertionError, match="an operand that was donated before"):
        backend.enqueue(PreAttention(0), x)
