"""The whole engine on real programs: tokens, memory, compilation, and what it says when it cannot.

With the device alone; test_hybrid_engine.py adds the host lane. Engines are built once each (four
shapes); small_engines.py says how pool size, rows and chunks vary over them.
"""

import dataclasses
import functools
import json
import pathlib
import re
import time

import choices
import jax
import near_tie
import numpy as np
import pytest
import reference
from small_engines import WIDE, compilations, make_config, run, with_limits

from apex_jax.buckets import Buckets
from apex_jax.config import (
    CacheConfig,
    CompileConfig,
    ConfigError,
    DeviceConfig,
    ModelConfig,
    SchedulerConfig,
)
from apex_jax.dispatch import StuckError
from apex_jax.engine import Engine
from apex_jax.engine_plan import EnginePlan
from apex_jax.lowering import ProgramKey
from apex_jax.models import weights
from apex_jax.models.hf_config import read_model_folder
from apex_jax.ops.native_library import usable_cpus
from apex_jax.placement import choose_dtype
from apex_jax.programs import Programs, span_of_layers
from apex_jax.request import Request, RequestError, SamplingParams

GOLDEN = pathlib.Path(__file__).parent / "golden"
CPU = jax.devices("cpu")[0]
WARM_UP_LINES = []


@functools.cache
def golden_engine(name):
    attention = "native" if name == "mqa_bfloat16" else "xla"
    config = make_config(attention, path=str(GOLDEN / name))
    if name == "rope_llama3":
        config.compile.layers_per_program = 1
    return Engine.create(config, WARM_UP_LINES.append)


@functools.cache
def wide_engine(attention="xla"):
    config = make_config(attention, weights="dummy", architecture=WIDE, seed=5)
    return Engine.create(config, WARM_UP_LINES.append)


@pytest.mark.parametrize(
    "name",
    [
        "gqa_tied_sharded",
        pytest.param("mqa_bfloat16", marks=pytest.mark.other_python),
        pytest.param("rope_llama3", marks=pytest.mark.main_python),
    ],
)
def test_greedy_tokens_are_those_of_transformers(name):
    with np.load(GOLDEN / name / "expected.npz") as file:
        expected = dict(file)
    requests, right, margins, stds = [], [], [], []
    for index, length in enumerate(expected["prompt_lengths"]):
        tokens = expected[f"tokens_{index}"].tolist()
        params = SamplingParams(max_tokens=64, temperature=0.0, ignore_eos=True)
        requests.append(Request(str(index), tuple(tokens[:length]), params))
        right.append(tokens[length:])
        margins.append(expected[f"margins_{index}"])
        stds.append(expected[f"stds_{index}"])
    got = run(golden_engine(name), requests)
    near_tie.assert_equal_but_for_ties(got, right, margins, stds)


def keep_chunks(*chunks):
    return lambda shapes: dataclasses.replace(shapes, chunks=chunks)


# How the same requests may be run: scheduler limits, and whether one after the other.
WAYS = {
    "together": {},
    "native": {},
    "alone": {"max_requests": 1},
    "tiny_chunks": {"change_shapes": keep_chunks((1, 4))},
    "three_rows": {"max_requests": 3, "change_shapes": keep_chunks((1, 16), (4, 4))},
    "preempted": {"num_pages": 12},
}


def draw_requests(seed):
    rng = np.random.default_rng(seed)
    requests = []
    for index in range(24):
        prompt = rng.integers(0, WIDE.vocab_size, rng.integers(1, 100)).tolist()
        greedy = index % 2 == 0
        params = SamplingParams(
            max_tokens=int(rng.integers(1, 48)),
            temperature=0.0 if greedy else float(rng.uniform(0.5, 1.5)),
            top_k=int(rng.choice([0, 5, 100])),
            top_p=float(rng.choice([1.0, 0.8])),
            seed=int(rng.integers(2**63)),
            ignore_eos=True,
        )
        requests.append(Request(str(index), tuple(prompt), params))
    return requests


@pytest.mark.parametrize("way", WAYS)
def test_tokens_do_not_depend_on_how_requests_are_run(way):
    requests = draw_requests(seed=11)
    base = wide_engine("native" if way == "native" else "xla")
    engine = with_limits(base, **WAYS[way])
    got = run(engine, requests)
    if way == "preempted":
        assert engine.metrics()["num_preemptions"] > 0
    tensors = reference.unfuse(WIDE, weights.dummy(WIDE, np.dtype("float32"), CPU, 5))
    choices.assert_reference_chooses(WIDE, tensors, requests, got)


def test_stop_tokens_end_the_output_and_stay_in_it():
    request = draw_requests(seed=3)[0]
    params = dataclasses.replace(request.sampling, max_tokens=40)
    [whole] = run(with_limits(wide_engine()), [dataclasses.replace(request, sampling=params)])
    stop = whole[7]
    expected = whole[: whole.index(stop) + 1]
    params = dataclasses.replace(params, stop_token_ids=(stop,))
    [stopped] = run(with_limits(wide_engine()), [dataclasses.replace(request, sampling=params)])
    assert stopped == expected
    params = dataclasses.replace(params, stop_token_ids=(), ignore_eos=False)
    engine = with_limits(wide_engine(), eos=frozenset({stop}))
    [ended] = run(engine, [dataclasses.replace(request, sampling=params)])
    assert ended == expected


def test_nothing_compiles_after_warm_up():
    engine = with_limits(wide_engine())
    run(engine, draw_requests(seed=1)[:2])
    with compilations() as compiled:
        run(engine, draw_requests(seed=2))
        run(with_limits(engine, max_requests=3), draw_requests(seed=4))
    assert compiled == []


@pytest.mark.parametrize(("attention", "page"), [("xla", (16,)), ("native", (2, 16))])
def test_pages_are_updated_in_place(attention, page):
    engine = wide_engine(attention)
    shape = (engine.memory.num_pages, WIDE.num_kv_heads, *page, WIDE.head_dim)
    pool = f"f32[{','.join(map(str, shape))}]"
    keys = [key for key in engine.programs.compile_sec if key.stage.startswith("layers")]
    assert {key.stage for key in keys} == {"layers_decode", "layers_prefill"}
    for key in keys:
        text = engine.programs.hlo_text(key)
        assert pool in text
        assert re.search(r"= " + re.escape(pool) + r"\S* copy\(", text) is None, key
        header = text.splitlines()[0]
        num_pools = 2 // len(page)  # of keys and of values, or of both
        num_aliases = header.count("may-alias") + header.count("must-alias")
        assert num_aliases == num_pools * WIDE.num_layers


def test_a_program_holds_no_second_pool():
    """A copy inside a fusion has no line of its own in the HLO, but it needs room."""
    num_pages = 4096
    shapes = Buckets((2,), {2: (2,)}, ((1, 16),), (1,), page_size=16)
    programs = Programs(
        WIDE,
        dtype=np.dtype("float32"),
        buckets=shapes,
        num_pages=num_pages,
        num_slots=2,
        num_layers=1,
        device=CPU,
        precision="default",
    )
    programs.compile(2, lambda *progress: None)
    pool_bytes = num_pages * WIDE.num_kv_heads * 16 * WIDE.head_dim * 4
    assert programs.temp_bytes < pool_bytes / 4


def test_an_interrupted_warm_up_drops_what_has_not_begun():
    engine = wide_engine()
    programs = Programs(
        WIDE,
        dtype=np.dtype("float32"),
        buckets=engine.programs.buckets,
        num_pages=engine.memory.num_pages,
        num_slots=4,
        num_layers=2,
        device=CPU,
        precision="default",
    )
    begun = []

    class SlowLowered:
        def compile(self):
            begun.append(1)
            time.sleep(0.05)

    programs._lower = lambda: ((ProgramKey("slow", (i,)), SlowLowered()) for i in range(50))

    def interrupt():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        programs.compile(2, lambda *progress: interrupt())
    time.sleep(0.3)
    assert len(begun) < 10


def test_the_plan_is_printed_first_and_the_metrics_are_json():
    engine = with_limits(wide_engine())
    plan = next(line for line in WARM_UP_LINES if "no folder, dummy weights" in line)
    assert WARM_UP_LINES.index(plan) < WARM_UP_LINES.index("making dummy weights")
    for part in ("device_only", "float32", "40 pages of 16", "4 requests at once", "1x16"):
        assert part in plan
    assert f"{engine.programs.buckets.num_executables} executables" in plan
    assert f"{engine.programs.buckets.num_executables} executables" in engine.describe()
    run(engine, draw_requests(seed=9))
    metrics = json.loads(json.dumps(engine.metrics()))
    assert metrics["num_executables"] == len(metrics["compile_sec_by_program"])
    assert metrics["planned_bytes"]["kv_cache"] == 40 * 16 * WIDE.kv_bytes_per_token(4)
    assert metrics["max_pages"] <= metrics["num_pages"] == 40
    assert metrics["num_sweeps"] > 0


def test_warm_up_shows_progress():
    golden_engine("gqa_tied_sharded")
    assert any(re.match(r"compiled \d+ of \d+ programs", line) for line in WARM_UP_LINES)
    assert any("loading weights from" in line for line in WARM_UP_LINES)


@pytest.mark.parametrize(
    "dtype",
    [
        pytest.param("bfloat16", marks=pytest.mark.other_python),
        pytest.param("float16", marks=pytest.mark.main_python),
    ],
)
def test_half_precision_follows_the_dense_model(dtype):
    folder = GOLDEN / "gqa_tied_sharded"
    config = make_config(path=str(folder), dtype=dtype)
    config.scheduler = SchedulerConfig(max_requests=2, max_prefill_tokens=16, max_model_len=64)
    engine = Engine.create(config, lambda line: None)
    assert engine.model.dtype == dtype
    model = read_model_folder(folder).architecture
    module = weights.to_module(model, weights.load(folder, model, np.dtype(dtype), CPU))
    rng = np.random.default_rng(0)
    requests = [
        Request(
            str(index),
            tuple(rng.integers(0, model.vocab_size, 20).tolist()),
            SamplingParams(max_tokens=12, temperature=0.0, ignore_eos=True),
        )
        for index in range(4)
    ]
    for request, tokens in zip(requests, run(engine, requests), strict=True):
        sequence = np.array([[*request.prompt_token_ids, *tokens[:-1]]])
        logits_tv = np.asarray(module(jax.numpy.asarray(sequence)))[0, 19:]
        chosen = logits_tv[np.arange(len(tokens)), tokens]
        # Eight bits of mantissa, a few layers: the chosen score is the best but for such noise.
        assert (logits_tv.max(-1) - chosen < 0.1 * logits_tv.std(-1)).all()


def test_a_request_that_can_never_run_is_refused():
    engine = with_limits(wide_engine())
    with pytest.raises(RequestError, match="prompt token id 200 is outside the vocabulary"):
        engine.submit(Request("bad", (200,), SamplingParams()))
    with pytest.raises(RequestError, match="the limit here is 160"):
        engine.submit(Request("bad", (1,) * 160, SamplingParams(max_tokens=1)))


def test_a_scheduler_that_cannot_go_on_is_reported():
    engine = with_limits(wide_engine())
    engine.submit(Request("0", (1, 2), SamplingParams()))
    engine._scheduler.plan_sweep = lambda: None
    with pytest.raises(StuckError, match=r"nothing can start\n0 in the device lane .*, 1 waiting"):
        engine.step()


def test_a_program_takes_fewer_layers_where_cohorts_stand_between_them():
    for num_layers, alone, beside_cohorts in ((32, 8, 4), (28, 7, 4), (22, 11, 2), (12, 6, 4)):
        assert span_of_layers(num_layers, None, has_host_lane=False) == alone
        assert span_of_layers(num_layers, None, has_host_lane=True) == beside_cohorts
        assert span_of_layers(num_layers, num_layers, has_host_lane=True) == num_layers


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"device": DeviceConfig(platform="tpu")}, "device.platform is 'tpu'; it must be one of"),
        ({"device": DeviceConfig(platform="gpu")}, "'gpu', and JAX sees only: cpu"),
        ({"device": DeviceConfig(attention="cuda")}, "attention is 'cuda'; it must be one of auto"),
        (
            {"compile": CompileConfig(layers_per_program=3)},
            "layers_per_program is 3; it must divide the model's 2 layers",
        ),
        ({"compile": CompileConfig(cache_dir="/dev/null/x")}, "cannot be made .Not a directory"),
        ({"scheduler": SchedulerConfig(strategy="warp")}, "strategy is 'warp'; it must be one of"),
        ({"cache": CacheConfig(page_size=12)}, "page_size is 12; it must be 8, 16"),
        (
            {"scheduler": SchedulerConfig(max_host_tpot_sec=0.0)},
            "max_host_tpot_sec is 0.0; it must be above 0",
        ),
        (
            {"scheduler": SchedulerConfig(max_device_tpot_sec=-1.0)},
            "max_device_tpot_sec is -1.0; it must be above 0",
        ),
        ({"model": ModelConfig()}, "model.path is None; it must be a model folder"),
        (
            {"model": ModelConfig(weights="dummy")},
            "it must be a model folder, whose config.json gives the shape",
        ),
        ({"model": ModelConfig(path="/nowhere")}, "'/nowhere'; there is no such folder"),
    ],
)
def test_settings_that_cannot_be_honoured_are_refused(change, message):
    config = make_config(weights="dummy", architecture=WIDE)
    config = dataclasses.replace(config, **change)
    with pytest.raises(ConfigError, match=message):
        Engine.create(config, lambda line: None)


def test_a_cpu_alone_attends_with_the_native_op_where_that_can_be():
    config = make_config("auto", weights="dummy", architecture=WIDE)
    op = EnginePlan.create(config).device_op
    assert op is not None
    assert op.num_threads == len(usable_cpus())
    assert f"device attention: {op.isa}, " in EnginePlan.create(config).describe()
    config.host.threads = 1
    assert EnginePlan.create(config).device_op.num_threads == 1
    config.model.architecture = dataclasses.replace(WIDE, head_dim=60)
    assert EnginePlan.create(config).device_op is None
    config.device.attention = "native"
    with pytest.raises(ConfigError, match="'native', but the engine has a head_dim of 60, no mult"):
        EnginePlan.create(config)


@pytest.mark.parametrize(
    ("requested", "published", "compute_capability", "expected"),
    [
        ("auto", "bfloat16", None, "float32"),
        ("bfloat16", "float16", None, "bfloat16"),
        ("auto", "bfloat16", "8.6", "bfloat16"),
        ("auto", "bfloat16", "7.5", "float16"),
        ("auto", "float32", "7.5", "float32"),
        ("auto", None, "8.0", "float16"),
    ],
)
def test_the_dtype_follows_the_checkpoint_and_the_device(
    requested, published, compute_capability, expected
):
    assert choose_dtype(requested, published, compute_capability).name == expected
