"""The engine on a GPU: what differs there from the CPU that every other test runs on.

Each test also runs on the CPU, with the same code, so that it is known to work before a GPU is
rented.
"""

import functools
import pathlib
import re

import jax
import jax.numpy as jnp
import near_tie
import numpy as np
import pytest

from apex_jax import sampling
from apex_jax.config import (
    STRATEGIES,
    CacheConfig,
    Config,
    DeviceConfig,
    ModelConfig,
    SchedulerConfig,
)
from apex_jax.engine import Engine
from apex_jax.models import weights
from apex_jax.models.hf_config import read_model_folder
from apex_jax.request import Request, SamplingParams
from launch.shared_engine import SharedEngine, WatchedBackend

GOLDEN = pathlib.Path(__file__).parent / "golden"
NAME = "gqa_tied_sharded"
HALF = {"bfloat16": "bf16", "float16": "f16"}


ON_GPU = pytest.param("gpu", marks=pytest.mark.gpu)
STAND_IN = pytest.param("cpu", marks=pytest.mark.other_python)


def choose_platform(request):
    if request.param == "gpu" and not any(one.platform == "gpu" for one in jax.devices()):
        pytest.fail(f"JAX sees no GPU, only: {jax.devices()}")
    return request.param


platform = pytest.fixture(choose_platform, params=[STAND_IN, ON_GPU], name="platform")
slow_platform = pytest.fixture(
    choose_platform,
    params=[pytest.param("cpu", marks=pytest.mark.slow), ON_GPU],
    name="slow_platform",
)


@functools.cache
def make_engine(platform, dtype):
    config = Config(
        model=ModelConfig(path=str(GOLDEN / NAME), dtype=dtype, precision="highest"),
        scheduler=SchedulerConfig(max_requests=4, max_prefill_tokens=16, max_model_len=160),
        device=DeviceConfig(platform=platform),
    )
    return Engine.create(config, lambda line: None)


def golden_requests():
    """Return requests, and for each the expected tokens, their margins and standard deviations."""
    with np.load(GOLDEN / NAME / "expected.npz") as file:
        expected = dict(file)
    params = SamplingParams(max_tokens=64, temperature=0.0, ignore_eos=True)
    requests, right, margins, stds = [], [], [], []
    for index, length in enumerate(expected["prompt_lengths"]):
        tokens = expected[f"tokens_{index}"].tolist()
        requests.append(Request(str(index), tuple(tokens[:length]), params))
        right.append(tokens[length:])
        margins.append(expected[f"margins_{index}"])
        stds.append(expected[f"stds_{index}"])
    return requests, right, margins, stds


def run(engine, requests):
    """Return each request's tokens."""
    outputs = {}
    for request in requests:
        engine.submit(request)
    while engine.num_unfinished:
        for output in engine.step():
            outputs[output.request.request_id] = list(output.token_ids)
    return [outputs[request.request_id] for request in requests]


def pools(engine):
    """Return the arrays of all layers' pages."""
    return jax.tree.leaves(engine._dispatch._backend._pages)


def test_tokens_are_those_of_transformers(platform):
    requests, right, margins, stds = golden_requests()
    engine = make_engine(platform, "float32")
    assert {array.device.platform for array in pools(engine)} == {platform}
    near_tie.assert_equal_but_for_ties(run(engine, requests), right, margins, stds)


def test_scores_are_those_of_the_cpu(platform):
    """Teacher-forced and in full float32: TF32 would miss this bound a hundredfold."""
    model = read_model_folder(GOLDEN / NAME).architecture
    tokens_bt = np.arange(64, dtype=np.int32).reshape(2, 32) % model.vocab_size
    scores = []
    for device in (jax.devices("cpu")[0], jax.devices(platform)[0]):
        loaded = weights.load(GOLDEN / NAME, model, np.dtype("float32"), device)
        score = jax.jit(weights.to_module(model, loaded))
        with jax.default_matmul_precision("highest"):
            scores.append(np.asarray(score(jax.device_put(tokens_bt, device))))
    right, got = scores
    assert np.abs(got - right).max() < near_tie.TAU * right.std()


@functools.cache
def shared_engine(platform):
    """Return what engines of all strategies share."""
    config = Config(
        model=ModelConfig(path=str(GOLDEN / NAME), dtype="float32", precision="highest"),
        cache=CacheConfig(host_bytes=2**18),
        scheduler=SchedulerConfig(
            strategy="async_overlap",
            max_requests=8,
            max_host_requests=8,
            max_prefill_tokens=16,
            max_model_len=160,
        ),
        device=DeviceConfig(platform=platform),
    )
    return SharedEngine(
        config,
        lambda line: None,
        lambda inner, shapes, device: WatchedBackend(inner, shapes, computes_prompts=True),
    )


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_every_strategy_gives_the_tokens_of_transformers(slow_platform, strategy):
    """With room for two or three of the ten requests on the device, in full float32."""
    requests, right, margins, stds = golden_requests()
    shared = shared_engine(slow_platform)
    settings = SchedulerConfig(strategy=strategy, max_host_requests=8)
    started = shared.start(shared.make_policy(settings), num_pages=24)
    near_tie.assert_equal_but_for_ties(run(started.engine, requests), right, margins, stds)
    stats = started.scheduler.stats
    assert stats.num_output_tokens == sum(map(len, right))
    if not settings.predicts:  # who predicts may find that a host does not pay
        assert (stats.num_host_tokens > 0) == (strategy != "device_only")


def check_in_place(engine, element_type):
    """No layer program copies a pool, and a run leaves every pool where it was."""
    shape = ",".join(map(str, pools(engine)[0].shape))
    pool = f"{element_type}[{shape}]"
    keys = [key for key in engine.programs.compile_sec if key.stage.startswith("layers")]
    assert len(keys) > 4
    for key in keys:
        text = engine.programs.hlo_text(key)
        assert pool in text
        assert re.search(re.escape(pool) + r"\S* (copy|copy-start)\(", text) is None, key
        aliases = re.findall("may-alias|must-alias", text.splitlines()[0])
        assert len(aliases) == len(pools(engine)), key
    before = [array.unsafe_buffer_pointer() for array in pools(engine)]
    requests, *_ = golden_requests()
    run(engine, requests[:4])
    assert [array.unsafe_buffer_pointer() for array in pools(engine)] == before


def test_pages_are_updated_in_place(platform):
    check_in_place(make_engine(platform, "float32"), "f32")


@pytest.mark.parametrize("dtype", HALF)
def test_half_precision_runs_in_place_and_stays_finite(slow_platform, dtype):
    engine = make_engine(slow_platform, dtype)
    requests, *_ = golden_requests()
    tokens = run(engine, requests)
    vocab_size = engine.model.architecture.vocab_size
    assert all(len(row) == 64 and 0 <= min(row) <= max(row) < vocab_size for row in tokens)
    for array in pools(engine):
        assert array.dtype.name == dtype
        assert np.isfinite(np.asarray(array).astype(np.float32)).all()
    if slow_platform == "gpu":  # XLA's CPU widens half precision, and copies
        check_in_place(engine, HALF[dtype])


def test_nothing_compiles_after_warm_up(platform):
    engine = make_engine(platform, "float32")
    requests, *_ = golden_requests()
    run(engine, requests[:2])
    compiled = []

    def listen(event, duration_sec, **kwargs):
        if "backend_compile" in event:
            compiled.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        jax.jit(lambda x: x + 3)(np.float32(1))
        assert compiled, "the listener hears nothing"
        compiled.clear()
        run(engine, requests)
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    assert compiled == []


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"),
    [(0.0, 0, 1.0), (0.7, 40, 1.0), (1.0, 0, 1.0), (1.0, 0, 0.9), (1.0, 1000, 0.8)],
)
def test_sampling_is_that_of_the_cpu(platform, temperature, top_k, top_p):
    """The same scores and seeds give the same tokens, by each way of searching the vocabulary.

    Logarithms differ in the last bit between devices; of 64 rows none has two candidates that
    close.
    """
    num_rows, vocab_size = 64, 8192
    rng = np.random.default_rng(0)
    logits_bv = (2 * rng.standard_normal((num_rows, vocab_size))).astype(np.float32)
    rows = sampling.SamplingRows(
        temperatures_b=np.full(num_rows, temperature, np.float32),
        top_ks_b=np.full(num_rows, top_k, np.int32),
        top_ps_b=np.full(num_rows, top_p, np.float32),
        min_ps_b=np.zeros(num_rows, np.float32),
        seeds_b2=rng.integers(0, 2**32, (num_rows, 2), dtype=np.uint32),
        sample_indices_b=np.zeros(num_rows, np.int32),
        positions_b=np.arange(num_rows, dtype=np.int32),
    )
    tokens = []
    for device in (jax.devices("cpu")[0], jax.devices(platform)[0]):
        placed = jax.device_put((logits_bv, rows), device)
        tokens.append(np.asarray(jax.jit(sampling.sample)(*placed)))
        assert tokens[-1].dtype == jnp.int32
    np.testing.assert_array_equal(*tokens)


def test_modified_scores_are_those_of_the_cpu(platform):
    """Scatters with entries that are masks, padding, or name the last token, on either device."""
    num_rows, vocab_size, num_entries = 16, 8192, 1024
    rng = np.random.default_rng(1)
    logits_bv = (4 * rng.standard_normal((num_rows, vocab_size))).astype(np.float32)
    last_tokens_b = rng.integers(0, vocab_size, num_rows, dtype=np.int32)
    rows_e = np.sort(rng.integers(0, num_rows, num_entries)).astype(np.int32)
    is_mask_e = np.arange(num_entries) % 5 == 0
    entries = sampling.ModifierEntries(
        rows_e=np.where(np.arange(num_entries) < 1000, rows_e, np.iinfo(np.int32).max),
        token_ids_e=np.concatenate(
            [rng.permutation(vocab_size)[: num_entries - num_rows], last_tokens_b]
        ).astype(np.int32),
        counts_e=rng.integers(0, 4, num_entries, dtype=np.int32),
        is_seen_e=rng.random(num_entries) < 0.5,
        biases_e=np.where(is_mask_e, -np.inf, rng.uniform(-2, 2, num_entries)).astype(np.float32),
        afters_e=np.where(np.arange(num_entries) % 2, np.iinfo(np.int32).max, 7).astype(np.int32),
    )
    rows = sampling.ModifierRows(
        presence_penalties_b=rng.uniform(-2, 2, num_rows).astype(np.float32),
        frequency_penalties_b=rng.uniform(-2, 2, num_rows).astype(np.float32),
        repetition_penalties_b=rng.uniform(0.5, 2, num_rows).astype(np.float32),
        is_counting_b=np.arange(num_rows) % 3 != 0,
    )
    results = []
    for device in (jax.devices("cpu")[0], jax.devices(platform)[0]):
        placed = jax.device_put((logits_bv, last_tokens_b, rows, entries), device)
        modified_bv = jax.jit(sampling.modify)(*placed)
        logprobs = jax.jit(sampling.logprobs)(placed[0], sampling.greedy(modified_bv))
        results.append(jax.tree.map(np.asarray, (modified_bv, *logprobs)))
    for one, other in zip(*results, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)
    assert np.isneginf(results[0][0]).sum() > 50
    assert (np.isfinite(results[0][0]) & (results[0][0] != logits_bv)).sum() > 500
