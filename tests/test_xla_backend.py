"""The xla backend, stage by stage: a layer taken apart is the layer, and pages survive their moves.

One backend over a model wide enough that XLA runs its programs on other threads, beside the real
host lane; each test fills the pages it reads.
"""

import dataclasses
import re
from concurrent.futures import Future

import choices
import jax
import numpy as np
import pytest
import reference

from apex_jax import buckets, kv_cache, packing
from apex_jax.backends.completions import Completions
from apex_jax.backends.handles import AttendedHandle, DeviceAttendedHandle, HiddenHandle
from apex_jax.backends.host_lane import HostLane
from apex_jax.backends.host_programs import HostPrograms
from apex_jax.backends.xla import XlaBackend
from apex_jax.buckets import HostLimits
from apex_jax.config import LlamaConfig
from apex_jax.hardware import (
    Boundary,
    DeviceAttention,
    Embed,
    Export,
    Head,
    HostAttention,
    Import,
    Layers,
    PostAttention,
    PreAttention,
    ReadPages,
    StagedLayer,
    WritePages,
)
from apex_jax.models import weights
from apex_jax.ops import native_library
from apex_jax.packing import DecodeArrays
from apex_jax.plan import DecodeBatch, HeadBatch, PrefillBatch
from apex_jax.programs import Programs
from apex_jax.request import Request, SamplingParams

F32 = np.dtype("float32")
CPU, HOST = jax.devices("cpu")
MODEL = LlamaConfig(
    num_layers=4,
    d_model=256,
    d_ffn=320,
    num_heads=4,
    num_kv_heads=2,
    head_dim=64,
    vocab_size=200,
    max_position_embeddings=64,
)
SPAN, LAST = 2, MODEL.num_layers - 1
PAGE_SIZE, NUM_USED_PAGES, NUM_SLOTS, CHUNK = 8, 40, 16, 16
# Larger than any use of them: a program that copies one is seen by the room it takes.
NUM_PAGES, NUM_STAGING_PAGES = 2048, 2000
# No shape set of a job, but the fewest that have two sizes of everything that has sizes.
SHAPES = buckets.choose(
    max_requests=4,
    max_prefill_tokens=CHUNK,
    max_model_len=64,
    num_pages=NUM_USED_PAGES,
    page_size=PAGE_SIZE,
    host=HostLimits(max_cohort_rows=4, num_staging_pages=NUM_STAGING_PAGES, max_move_pages=8),
)
assert SHAPES.host is not None
SHAPES = dataclasses.replace(
    SHAPES,
    chunks=((1, CHUNK),),
    context_pages=(8,),
    host=dataclasses.replace(SHAPES.host, staging_pages=(3, 10), move_pages=(3, 10)),
)
GREEDY = SamplingParams(max_tokens=1, temperature=0.0)
HOST_STAGES = (
    ("pre_attention", 0),
    ("device_attention", 2),  # arrays that are updated in place
    ("post_attention", 0),
    ("boundary", 0),
    ("place", 1),
    ("staged_layer", 3),
    ("export", 0),
    ("export_staging", 0),
    ("import", 2),
)


def ints(values):
    return np.array(values, np.int32)


class RecordingCompletions(Completions):
    """Keeps the handles of all stages."""

    def __init__(self):
        super().__init__(lambda *span, **args: None)
        self.handles = []

    def enqueued(self, handle, stage, start_sec=None):
        self.handles.append(handle)
        super().enqueued(handle, stage, start_sec)


@pytest.fixture(scope="module")
def programs():
    compiled = Programs(
        MODEL,
        dtype=F32,
        buckets=SHAPES,
        num_pages=NUM_PAGES,
        num_slots=NUM_SLOTS,
        num_layers=SPAN,
        device=CPU,
        precision="default",
    )
    compiled.compile(2, lambda *progress: None)
    return compiled


@pytest.fixture(scope="module")
def tensors():
    return weights.dummy(MODEL, F32, CPU, 5)


@pytest.fixture(scope="module")
def backend(programs, tensors):
    completions = RecordingCompletions()
    native_library.load(num_threads=1)
    host_programs = HostPrograms(
        MODEL,
        dtype=F32,
        num_pages=NUM_USED_PAGES,
        page_size=PAGE_SIZE,
        max_sequence_pages=8,
        rows=SHAPES.host.cohort_rows,
        written_pages={*SHAPES.host.staging_pages, *SHAPES.host.move_pages},
        read_pages=SHAPES.host.transit_pages,
        device=HOST,
    )
    lane = HostLane(host_programs, CPU, on_span=lambda *span, **args: None)
    yield XlaBackend(
        programs,
        tensors,
        kv_cache.allocate(MODEL, NUM_PAGES, PAGE_SIZE, F32, CPU),
        NUM_SLOTS,
        CPU,
        completions=completions,
        host_lane=lane,
        staging=kv_cache.allocate_layer(MODEL, NUM_STAGING_PAGES, PAGE_SIZE, F32, CPU),
    )
    lane.close()
    completions.close()


class Text:
    """A request under way. pages: of its lane's pool."""

    def __init__(self, request, slot, pages):
        self.request, self.slot, self.pages = request, slot, pages
        self.tokens = []

    @property
    def position(self):
        return len(self.request.prompt_token_ids) + len(self.tokens) - 1

    @property
    def num_pages(self):
        """Pages that hold something."""
        return -(-self.position // PAGE_SIZE)


def draw_texts(rng, count, *, first_slot=0, first_page=0, temperature=0.0, max_tokens=8):
    texts = []
    for index in range(count):
        prompt = rng.integers(0, MODEL.vocab_size, rng.integers(5, 45)).tolist()
        params = SamplingParams(
            max_tokens=max_tokens,
            temperature=temperature if index % 2 else 0.0,
            top_k=int(rng.choice([0, 5])),
            seed=int(rng.integers(2**63)),
            ignore_eos=True,
        )
        pages = range(first_page + 8 * index, first_page + 8 * (index + 1))
        request = Request(f"{first_page}-{index}", tuple(prompt), params)
        texts.append(Text(request, first_slot + index, list(pages)))
    return texts


def decode_batch(texts):
    return DecodeBatch(
        slots_b=ints([text.slot for text in texts]),
        positions_b=ints([text.position for text in texts]),
        block_table_bm=ints([text.pages for text in texts]),
    )


def head_of(texts, rows=None):
    return HeadBatch.of(
        range(len(texts)) if rows is None else rows,
        [text.slot for text in texts],
        [text.position + 1 for text in texts],
        [text.request.sampling for text in texts],
    )


def chunks_of(text, pages):
    """The prompt of a text, cut along its tokens."""
    prompt = text.request.prompt_token_ids
    for start in range(0, len(prompt), CHUNK):
        tokens = prompt[start : start + CHUNK]
        padded = [*tokens, *[7] * (CHUNK - len(tokens))]
        yield PrefillBatch(ints([padded]), ints([start]), ints([len(tokens)]), ints([pages]))


def take(texts, *handles):
    """Read the sampled tokens of texts, in order."""
    tokens = np.concatenate([handle.read().tokens_b for handle in handles])
    for text, token in zip(texts, tokens.tolist(), strict=True):
        text.tokens.append(token)


def through_spans(backend, batch):
    (x,) = backend.enqueue(Embed(batch))
    for layer in range(0, MODEL.num_layers, SPAN):
        (x,) = backend.enqueue(Layers(batch, layer), x)
    return x


def prefill_on_device(backend, text):
    for chunk in chunks_of(text, text.pages):
        x = through_spans(backend, chunk)
    take([text], *backend.enqueue(Head((head_of([text], [0]),)), x))


def prefill_staged(backend, text, pages, on_layer):
    """Layer-major: `on_layer` once a layer's KV is complete in the staging plane."""
    chunks = list(chunks_of(text, pages))
    xs = [backend.enqueue(Embed(chunk))[0] for chunk in chunks]
    for layer in range(MODEL.num_layers):
        for index, chunk in enumerate(chunks):
            (xs[index],) = backend.enqueue(StagedLayer(chunk, layer), xs[index])
        on_layer(layer)
    take([text], *backend.enqueue(Head((head_of([text], [0]),)), xs[-1]))


def to_host(backend, text, layer, pages_i, host_pages_i, *, from_staging):
    (exported,) = backend.enqueue(Export(layer, ints(pages_i), from_staging=from_staging))
    backend.submit_host(WritePages(layer, ints(host_pages_i)), exported)


def exported(backend, layer, pages_i, *, from_staging=False):
    (handle,) = backend.enqueue(Export(layer, ints(pages_i), from_staging=from_staging))
    return np.asarray(handle.pages_ik2zh)[: len(pages_i)]


def ready(backend, handle):
    assert backend.wait_any([handle], backend.now() + 60) is handle
    return handle


# A layer taken apart


def test_layer_by_layer_is_the_whole_span(backend):
    texts = draw_texts(np.random.default_rng(0), 3)
    for text in texts:
        prefill_on_device(backend, text)
    batch = decode_batch(texts)
    whole = np.asarray(through_spans(backend, batch).x)[:3]
    kv = [exported(backend, layer, texts[2].pages) for layer in range(MODEL.num_layers)]

    (x,) = backend.enqueue(Embed(batch))
    (entered,) = backend.enqueue(PreAttention(0), x)
    for layer in range(1, MODEL.num_layers):
        (attended,) = backend.enqueue(DeviceAttention(batch, layer - 1), entered)
        (entered,) = backend.enqueue(Boundary(layer), attended)
    (attended,) = backend.enqueue(DeviceAttention(batch, LAST), entered)
    (x,) = backend.enqueue(PostAttention(LAST), attended)
    np.testing.assert_allclose(np.asarray(x.x)[:3], whole, rtol=0, atol=1e-6 * whole.std())
    assert np.array_equal(x.x, x.x_bd)
    for layer, before in enumerate(kv):
        after = exported(backend, layer, texts[2].pages)
        np.testing.assert_allclose(after, before, rtol=0, atol=1e-6)


def attended_rows(backend, rng, rows):
    """Rows at a boundary, as if attended to by the device."""
    positions = ints(rng.integers(0, 64, rows))
    batch = DecodeBatch(ints(range(rows)), positions, np.zeros((rows, 8), np.int32))
    rows_b4 = packing.pack_rows(batch, rows=rows, page_size=PAGE_SIZE)
    x_bd = rng.normal(size=(rows, MODEL.d_model)).astype(F32)
    attended_bnh = rng.normal(size=(rows, MODEL.num_heads, MODEL.head_dim)).astype(F32)
    put = lambda array: jax.device_put(array, CPU)  # noqa: E731
    return DeviceAttendedHandle(put(x_bd), DecodeArrays(put(rows_b4)), put(attended_bnh))


def by_host(group):
    """The same rows as if attended to by the host."""
    future = Future()
    future.set_result(group.attended_bnh)
    return AttendedHandle(group.x, group.arrays, future)


@pytest.mark.parametrize("cohort_rows", [2, 4])
@pytest.mark.parametrize("device_rows", [2, 4])
def test_a_merged_boundary_is_two_boundaries_to_the_bit(backend, device_rows, cohort_rows):
    rng = np.random.default_rng(device_rows * 8 + cohort_rows)
    device = attended_rows(backend, rng, device_rows)
    cohort = by_host(attended_rows(backend, rng, cohort_rows))
    merged = backend.enqueue(Boundary(2), device, cohort)
    for group, together in zip((device, cohort), merged, strict=True):
        (alone,) = backend.enqueue(Boundary(2), group)
        assert np.array_equal(alone.x, together.x)
        assert np.array_equal(alone.qkv_bjh, together.qkv_bjh)
        assert together.arrays is group.arrays
        # And both are leaving the layer, then entering the next.
        (x,) = backend.enqueue(PostAttention(1), group)
        (entered,) = backend.enqueue(PreAttention(2), x)
        np.testing.assert_allclose(together.x, x.x, rtol=0, atol=1e-6)
        np.testing.assert_allclose(together.qkv_bjh, entered.qkv_bjh, rtol=0, atol=1e-6)


def test_what_the_host_failed_at_is_raised_where_its_rows_go_on(backend):
    group = attended_rows(backend, np.random.default_rng(1), 2)
    future = Future()
    future.set_exception(RuntimeError("page 9 does not exist"))
    failed = AttendedHandle(group.x, group.arrays, future)
    with pytest.raises(RuntimeError, match="page 9 does not exist"):
        backend.enqueue(Boundary(1), failed)


# Pages


def test_a_staged_prompt_has_the_kv_of_one_on_the_device(backend):
    [text] = draw_texts(np.random.default_rng(2), 1)
    prompt = tuple(np.random.default_rng(3).integers(0, MODEL.vocab_size, 37).tolist())
    text.request = dataclasses.replace(text.request, prompt_token_ids=prompt)
    staging_pages = [9, 2, 5, 0, 7, 1, 3, 4]
    staged = []
    prefill_staged(
        backend,
        text,
        staging_pages,
        lambda layer: staged.append(exported(backend, layer, staging_pages, from_staging=True)),
    )
    [by_staging] = text.tokens
    text.tokens.clear()
    prefill_on_device(backend, text)
    assert text.tokens == [by_staging]
    for layer, pages_ik2zh in enumerate(staged):
        of_pool = exported(backend, layer, text.pages)
        both = [
            pages.transpose(2, 1, 0, 3, 4).reshape(2, MODEL.num_kv_heads, -1, MODEL.head_dim)
            for pages in (pages_ik2zh, of_pool)
        ]
        used = [kv[:, :, : len(prompt)] for kv in both]
        np.testing.assert_allclose(*used, rtol=0, atol=1e-6)
        assert (used[0] != 0).any(-1).all()


@pytest.mark.parametrize("pages_i", [[5, 0], [4, 1, 6], [7, 3, 2, 1, 0, 6]])
def test_pages_come_back_to_the_bit(backend, pages_i):
    """Out of the pool, into the host's, and back into other pages of the device's."""
    [text] = draw_texts(np.random.default_rng(4), 1)
    text.request = dataclasses.replace(text.request, prompt_token_ids=tuple(range(60)))
    prefill_on_device(backend, text)
    others_i = list(range(20, 20 + len(pages_i)))
    untouched_i = [10, 39]
    for layer in (0, LAST):
        before = exported(backend, layer, pages_i)
        untouched = exported(backend, layer, untouched_i)
        assert (before != 0).any((1, 2, 4)).sum() > PAGE_SIZE
        to_host(backend, text, layer, pages_i, others_i, from_staging=False)
        read = backend.submit_host(ReadPages(layer, ints(others_i)))
        (end,) = backend.enqueue(Import(layer, ints(others_i)), read)
        assert np.array_equal(exported(backend, layer, others_i), before)
        assert np.array_equal(exported(backend, layer, pages_i), before)
        assert np.array_equal(exported(backend, layer, untouched_i), untouched)
        ready(backend, end)  # the pages it wrote have been passed on since; its marker has not


# Heads


def hidden(rng, rows):
    x_bd = jax.device_put(rng.normal(size=(rows, MODEL.d_model)).astype(F32), CPU)
    return HiddenHandle(x_bd, x_bd, DecodeArrays(jax.device_put(np.zeros((rows, 4), np.int32))))


@pytest.mark.parametrize("temperature", [0.0, 1.5])
@pytest.mark.parametrize(
    "groups",
    [
        [(2, [0, 1]), (4, [0, 1, 2])],  # 5 rows
        [(4, [3, 1]), (2, []), (2, [1])],  # rows that are not sampled, in any order
        [(4, [0, 1, 2, 3])] * 3,  # 12 rows are more than a head holds
    ],
)
def test_a_joint_head_samples_what_each_would_alone(backend, groups, temperature):
    rng = np.random.default_rng(6)
    handles, batches, num_rows = [], [], 0
    for rows, sampled in groups:
        texts = draw_texts(rng, len(sampled), first_slot=num_rows, temperature=temperature)
        handles.append(hidden(rng, rows))
        batches.append(head_of(texts, sampled))
        num_rows += len(sampled)
    alone = [
        backend.enqueue(Head((batch,)), handle)[0].read().tokens_b
        for batch, handle in zip(batches, handles, strict=True)
    ]
    in_slots = np.asarray(backend._tokens_by_slot)[:num_rows]
    assert np.array_equal(in_slots, np.concatenate(alone))
    backend._tokens_by_slot = backend._tokens_by_slot * 0
    joint = backend.enqueue(Head(tuple(batches)), *handles)
    assert len(joint) == len(groups)
    for tokens, one in zip(alone, joint, strict=True):
        assert np.array_equal(one.read().tokens_b, tokens)
    assert np.array_equal(np.asarray(backend._tokens_by_slot)[:num_rows], in_slots)


def test_only_a_head_has_tokens(backend):
    (x,) = backend.enqueue(Embed(decode_batch(draw_texts(np.random.default_rng(0), 1))))
    with pytest.raises(TypeError, match="HiddenHandle holds no tokens; read a Head stage's"):
        x.read()


# All together


def decode_merged(backend, device, cohort, spans_first):
    """A token of every row: the cohort passes alone up to layer 3, where the device takes it in."""
    batch, host_batch = decode_batch(device), decode_batch(cohort)

    def attend_on_host(layer, entered):
        return ready(backend, backend.submit_host(HostAttention(0, layer, host_batch), entered))

    (x,) = backend.enqueue(Embed(host_batch))
    (entered,) = backend.enqueue(PreAttention(0), x)
    for layer in range(1, LAST):
        (entered,) = backend.enqueue(Boundary(layer), attend_on_host(layer - 1, entered))
    attended = attend_on_host(LAST - 1, entered)

    (x,) = backend.enqueue(Embed(batch))
    if spans_first:
        (x,) = backend.enqueue(Layers(batch, 0), x)
        (device_entered,) = backend.enqueue(PreAttention(SPAN), x)
    else:
        (device_entered,) = backend.enqueue(PreAttention(0), x)
        for layer in range(1, LAST):
            (of_device,) = backend.enqueue(DeviceAttention(batch, layer - 1), device_entered)
            (device_entered,) = backend.enqueue(Boundary(layer), of_device)
    (of_device,) = backend.enqueue(DeviceAttention(batch, LAST - 1), device_entered)
    device_entered, entered = backend.enqueue(Boundary(LAST), of_device, attended)
    attended = attend_on_host(LAST, entered)
    (of_device,) = backend.enqueue(DeviceAttention(batch, LAST), device_entered)
    (x,) = backend.enqueue(PostAttention(LAST), of_device)
    (host_x,) = backend.enqueue(PostAttention(LAST), attended)
    heads = backend.enqueue(Head((head_of(device), head_of(cohort))), x, host_x)
    take([*device, *cohort], *heads)


def change_lanes(backend, device_text, host_text):
    """Swap the lanes of two texts, by way of free pages."""
    device_pages, host_pages = list(range(32, 40)), list(range(32, 40))
    for layer in range(MODEL.num_layers):
        num_pages = device_text.num_pages
        written_i = host_pages[:num_pages]
        to_host(
            backend,
            device_text,
            layer,
            device_text.pages[:num_pages],
            written_i,
            from_staging=False,
        )
        num_pages = host_text.num_pages
        read = backend.submit_host(ReadPages(layer, ints(host_text.pages[:num_pages])))
        ready(backend, read)
        backend.enqueue(Import(layer, ints(device_pages[:num_pages])), read)
    device_text.pages, host_text.pages = host_pages, device_pages


def run_texts(backend, device, cohort):
    """Prefill both lanes, decode with merges, let a pair change lanes, go on."""
    for text in device:
        prefill_on_device(backend, text)
    for text in cohort:
        pages = list(range(8))
        prefill_staged(
            backend,
            text,
            pages,
            lambda layer, text=text: to_host(
                backend,
                text,
                layer,
                range(text.num_pages),
                text.pages[: text.num_pages],
                from_staging=True,
            ),
        )
    for index in range(3):
        decode_merged(backend, device, cohort, spans_first=index % 2 == 0)
    change_lanes(backend, device[0], cohort[0])
    device[0], cohort[0] = cohort[0], device[0]
    for index in range(4):
        decode_merged(backend, device, cohort, spans_first=index % 2 == 0)


def test_both_lanes_choose_what_the_reference_does_and_nothing_compiles(backend, tensors):
    rng = np.random.default_rng(8)
    device = draw_texts(rng, 3, temperature=1.0)
    cohort = draw_texts(rng, 2, first_slot=8, temperature=1.0)
    everybody = [*device, *cohort]
    compiled = []

    def listen(event, duration_sec, **kwargs):
        if "backend_compile" in event or "jaxpr_trace" in event:
            compiled.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        jax.jit(lambda x: x + 5)(np.float32(1))
        assert compiled, "the listener hears nothing"
        compiled.clear()
        run_texts(backend, device, cohort)
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    assert compiled == []
    for handle in backend._completions.handles:
        handle.marker.block_until_ready()  # no later stage has overwritten it
    requests, got = [text.request for text in everybody], [text.tokens for text in everybody]
    choices.assert_reference_chooses(MODEL, reference.unfuse(MODEL, tensors), requests, got)


# Programs


def test_there_are_as_many_programs_as_buckets_say(programs):
    assert len(programs.compile_sec) == SHAPES.num_executables
    assert {key.stage for key in programs.compile_sec} == {
        "embed_decode",
        "embed_prefill",
        "layers_decode",
        "layers_prefill",
        "head_greedy",
        "head_sample",
        *dict(HOST_STAGES),
    }


@pytest.mark.parametrize(("stage", "num_in_place"), HOST_STAGES)
def test_pages_are_updated_in_place_and_what_the_host_reads_is_left_alone(
    programs, stage, num_in_place
):
    keys = [key for key in programs.compile_sec if key.stage == stage]
    assert keys
    for key in keys:
        text = programs.hlo_text(key)
        header = text.splitlines()[0]
        assert header.count("may-alias") + header.count("must-alias") == num_in_place
        for num_pages in (NUM_PAGES, NUM_STAGING_PAGES):
            pool = f"f32[{num_pages},{MODEL.num_kv_heads},{PAGE_SIZE},{MODEL.head_dim}]"
            assert re.search(r"= " + re.escape(pool) + r"\S* copy\(", text) is None, key


def test_no_program_holds_a_second_pool(programs):
    """A copy inside a fusion has no line of its own in the HLO, but it needs room."""
    pool_bytes = NUM_STAGING_PAGES * MODEL.num_kv_heads * PAGE_SIZE * MODEL.head_dim * 4
    assert programs.temp_bytes < pool_bytes / 4
