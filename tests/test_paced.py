"""A described device beside the real host: an absolute schedule, order, failures, whole runs."""

import dataclasses

import numpy as np
import pytest

from apex_jax.backends.host_lane import HostLaneError
from apex_jax.backends.paced import DeviceStream, DummyOperands
from apex_jax.config import Config, ConfigError, LlamaConfig, ModelConfig, SchedulerConfig
from apex_jax.cost_model import StageTimes
from apex_jax.hardware import (
    Boundary,
    Embed,
    Export,
    Head,
    HostAttention,
    Layers,
    PreAttention,
    ReadPages,
    WritePages,
)
from apex_jax.memory import GIB
from apex_jax.paced_engine import PacedPlan
from apex_jax.plan import DecodeBatch, HeadBatch
from apex_jax.request import Request, SamplingParams
from apex_jax.stage_costs import StageCosts
from apex_jax.strategies import make_policy
from apex_jax.timeline import Timeline

MODEL = LlamaConfig(4, 64, 128, 4, 2, 16, 256, 512)
# Stages of milliseconds, so that the order of events does not hang on a busy machine.
TIMES = StageTimes(
    num_layers=4,
    linear_sec=2e-3,
    device_attention_sec=1e-3,
    host_attention_sec_per_token=1e-6,
    transfer_sec=1e-3,
    head_sec=1e-3,
)
QUICK = dataclasses.replace(
    TIMES, linear_sec=2e-4, device_attention_sec=1e-4, transfer_sec=5e-5, head_sec=1e-4
)
WAIT_SEC = 60.0


def ints(*values):
    return np.array(values, np.int32)


BATCH = DecodeBatch(ints(0, 1), ints(9, 19), ints([0, 1], [2, 3]))
HEAD = HeadBatch.of([0, 1], [0, 1], [10, 20], [SamplingParams()] * 2)


def make_config(strategy="async_overlap", **cache):
    config = Config(model=ModelConfig(weights="dummy", architecture=MODEL))
    config.cache.device_bytes = 96 * 16 * MODEL.kv_bytes_per_token(2)
    config.cache.host_bytes = cache.get("host_bytes", 64 * 16 * MODEL.kv_bytes_per_token(2))
    config.host.threads = 1
    config.scheduler = SchedulerConfig(
        strategy=strategy,
        max_requests=4,
        max_host_requests=4,
        max_model_len=200,
        max_prefill_tokens=64,
    )
    return config


@pytest.fixture
def make_backend():
    """Make backends that are closed after the test; their spans are in `spans`."""
    backends = []

    def make(config=None, times=TIMES, **others):
        plan = PacedPlan.create(config or make_config())
        costs = StageCosts(
            times, layers_per_program=plan.layers_per_program, page_size=plan.shapes.page_size
        )
        spans = []
        backend = plan.paced_backend(
            costs, lambda *span, **args: spans.append((*span, args)), **others
        )
        backends.append(backend)
        return plan, backend, spans

    yield make
    for backend in backends:
        backend.close()


def wait(backend, handle):
    assert backend.wait_any([handle], backend.now() + WAIT_SEC) is handle
    return handle


# The schedule


def test_a_queued_stage_starts_when_the_one_before_it_ended():
    stream = DeviceStream()
    assert stream.append(2.0, asked_sec=10.0, operands_sec=[]) == (10.0, 12.0)
    assert stream.append(3.0, asked_sec=10.5, operands_sec=[12.0]) == (12.0, 15.0)
    # Whoever asks late finds the device idle, and lets it idle no longer.
    assert stream.append(1.0, asked_sec=15.25, operands_sec=[15.0]) == (15.25, 16.25)
    # An operand that comes from the host is waited for.
    assert stream.append(1.0, asked_sec=15.5, operands_sec=[15.0, 20.0]) == (20.0, 21.0)
    assert stream.append(1.0, asked_sec=15.5, operands_sec=[]) == (21.0, 22.0)


def test_delays_of_waking_do_not_add_up():
    stream, late = DeviceStream(), 0.25
    _, end_sec = stream.append(1.0, asked_sec=0.0, operands_sec=[])
    for _ in range(100):  # asked for whenever the one before the last was seen, late, to end
        _, end_sec = stream.append(1.0, asked_sec=end_sec - 1.0 + late, operands_sec=[end_sec])
    assert end_sec == 101.0


def test_stages_run_in_order_for_as_long_as_they_cost(make_backend):
    _, backend, spans = make_backend(make_config("device_only"))
    (x,) = backend.enqueue(Embed(BATCH))
    (x,) = backend.enqueue(Layers(BATCH, 0), x)
    (head,) = backend.enqueue(Head((HEAD,)), x)
    assert head.ready_sec >= x.ready_sec + 1e-3
    assert head.read().tokens_b.tolist() == [0, 0]
    wait(backend, head)
    backend.close()  # all ends have been reported
    assert [span[1] for span in spans] == ["embed", "layers", "head"]
    for (_, _, start_sec, end_sec, args), seconds in zip(spans, (0, 4 * 3e-3, 1e-3), strict=True):
        assert end_sec - start_sec == pytest.approx(seconds, abs=1e-9)
        assert args["seen_sec"] >= 0
    ends = [span[3] for span in spans]
    assert all(span[2] >= end for span, end in zip(spans[1:], ends, strict=False))


def test_waiting_ends_with_the_deadline_or_with_what_is_ready_first(make_backend):
    _, backend, _ = make_backend(make_config("device_only"))
    (x,) = backend.enqueue(Embed(BATCH))
    (slow,) = backend.enqueue(Layers(BATCH, 0), x)
    wait(backend, x)
    assert backend.wait_any([slow], backend.now()) is None
    assert "device: " in backend.describe()
    assert backend.wait_any([slow, x], backend.now() + WAIT_SEC) is x


def test_starting_a_stage_takes_pythons_time(make_backend):
    times = dataclasses.replace(TIMES, dispatch_sec=2e-3)
    _, backend, _ = make_backend(make_config("device_only"), times)
    begin_sec = backend.now()
    (x,) = backend.enqueue(Embed(BATCH))
    assert x.ready_sec >= begin_sec + 2e-3


# Beside the host


def test_a_job_begins_when_its_operand_would_have_arrived(make_backend):
    _, backend, spans = make_backend()
    (x,) = backend.enqueue(Embed(BATCH))
    (entered,) = backend.enqueue(PreAttention(0), x)
    attended = wait(backend, backend.submit_host(HostAttention(0, 0, BATCH), entered))
    by_lane = {span[0]: span for span in spans if span[0] != "device"}
    assert by_lane["host"][1] == "host_attention"
    arrival_sec = entered.ready_sec + TIMES.transfer(num_rows=2)
    assert by_lane["to host"][2] >= entered.ready_sec
    assert by_lane["host"][2] >= by_lane["to host"][3] >= arrival_sec
    # Its result is of use to the device once it has travelled back.
    assert attended.ready_sec >= by_lane["host"][3] + TIMES.transfer(num_rows=2)
    (crossed,) = backend.enqueue(Boundary(1), attended)
    assert crossed.ready_sec >= attended.ready_sec + 2e-3
    with pytest.raises(TypeError, match="a host job yields no tokens"):
        attended.read()


def test_jobs_run_in_order_on_pages_of_the_real_size(make_backend):
    _, backend, spans = make_backend()
    pages = ints(3, 4, 5)
    (exported,) = backend.enqueue(Export(1, pages, from_staging=True))
    backend.submit_host(WritePages(1, pages), exported)
    wait(backend, backend.submit_host(ReadPages(1, pages)))
    jobs = [span for span in spans if span[0] == "host"]
    assert [(name, args["pages"]) for _, name, _, _, args in jobs] == [
        ("write_pages", 3),
        ("read_pages", 3),
    ]
    (moved,) = [args for lane, _, _, _, args in spans if lane == "to host"]
    page_bytes = 16 * MODEL.kv_bytes_per_token(2) // MODEL.num_layers
    assert moved["bytes"] % page_bytes == 0
    assert moved["bytes"] >= 3 * page_bytes


def test_what_travels_is_finite_and_in_the_shape_of_its_bucket():
    plan = PacedPlan.create(make_config())
    operands = DummyOperands(plan.model, plan.dtype, plan.shapes)
    qkv_bjh = operands.of(HostAttention(0, 0, BATCH))
    assert qkv_bjh.shape == (2, 4 + 2 * 2, 16)
    pages = operands.of(WritePages(0, np.arange(9, dtype=np.int32)))
    assert pages.shape[0] in plan.shapes.host.transit_pages
    assert pages.shape[1:] == (2, 2, 16, 16)
    for values in (qkv_bjh, pages):
        assert values.dtype == np.float16
        assert np.isfinite(values).all()
        assert len(np.unique(values)) > 100


def test_a_failure_of_the_host_reaches_whoever_waits(make_backend):
    def fail(job):
        raise OSError("the pool is gone")

    _, backend, _ = make_backend(before_job=fail)
    (x,) = backend.enqueue(Embed(BATCH))
    (entered,) = backend.enqueue(PreAttention(0), x)
    attended = backend.submit_host(HostAttention(0, 0, BATCH), entered)
    with pytest.raises(OSError, match="the pool is gone"):
        backend.wait_any([attended], backend.now() + WAIT_SEC)
    with pytest.raises(OSError, match="the pool is gone"):
        backend.enqueue(Boundary(1), attended)
    later = backend.submit_host(HostAttention(0, 1, BATCH), entered)
    with pytest.raises(HostLaneError, match="runs no more jobs"):
        backend.wait_any([later], backend.now() + WAIT_SEC)
    assert "the pool is gone" in backend.describe()


def test_a_failure_of_the_host_ends_the_loop(make_backend):
    def fail(job):
        raise OSError("no memory")

    plan, backend, _ = make_backend(make_config(), QUICK, before_job=fail)
    loop = plan.loop(backend, make_policy(SchedulerConfig(strategy="async_overlap")))
    for request in requests(8):
        loop.submit(request)
    with pytest.raises((OSError, HostLaneError), match="no memory"):
        loop.run()


# Whole runs


def requests(count, prompt_tokens=150, max_tokens=6):
    sampling = SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True)
    return [Request(str(one), (1,) * prompt_tokens, sampling) for one in range(count)]


def test_every_request_gets_its_full_length_under_every_strategy(make_backend):
    plan, backend, _ = make_backend(make_config(), QUICK)
    plan = dataclasses.replace(plan, num_pages=22)  # two requests' worth
    names = (
        "device_only",
        "async_overlap",
        "staggered",
        "asymmetric_pipelining",
        "full_offload",
        "apex",
    )
    for name in names:
        settings = SchedulerConfig(strategy=name, max_host_requests=4)
        loop = plan.loop(backend, make_policy(settings, QUICK))
        for request in requests(6):
            loop.submit(request)
        outputs = loop.run()  # which reconciles the ledger
        assert sorted(output.request.request_id for output in outputs) == list("012345")
        assert all(output.token_ids == (0,) * 6 for output in outputs)
        uses_host = loop.scheduler.stats.num_host_prefilled_tokens > 0
        assert uses_host == (name != "device_only") or name == "apex", name


def test_a_timeline_takes_its_spans(make_backend):
    timeline = Timeline()
    plan = PacedPlan.create(make_config("device_only"))
    costs = StageCosts(QUICK, layers_per_program=2, page_size=16)
    backend = plan.paced_backend(costs, timeline.span)
    (x,) = backend.enqueue(Embed(BATCH))
    wait(backend, backend.enqueue(Layers(BATCH, 0), x)[0])
    backend.close()
    assert timeline.figures().device_busy_sec == pytest.approx(2 * 3e-4)


# Sizes


def test_sizes_follow_from_budgets_and_from_what_requests_can_use():
    plan = PacedPlan.create(make_config())
    pages_per_request = -(-200 // 16)
    assert plan.num_pages == min(96, 4 * pages_per_request)
    assert plan.num_host_pages == min(64, 4 * pages_per_request)
    assert plan.max_model_len == 200
    assert plan.dtype == np.float16
    assert "52 (0.00 GiB) on the device, 52 (0.00 GiB) on the host" in plan.describe()
    everything = make_config()
    everything.cache.host_bytes = None
    assert PacedPlan.create(everything).num_host_pages == 4 * pages_per_request
    assert PacedPlan.create(make_config("device_only")).shapes.host is None


def test_what_cannot_be_had_is_refused():
    config = make_config()
    config.cache.device_bytes = None
    with pytest.raises(ConfigError, match=r"needs --config.model.architecture.*device_bytes"):
        PacedPlan.create(config)
    config = make_config()
    config.cache.device_bytes = 100
    with pytest.raises(ConfigError, match=r"device_bytes is 100; one page takes 8192 bytes"):
        PacedPlan.create(config)
    config = make_config()
    config.model.architecture = dataclasses.replace(
        MODEL, num_layers=100, num_kv_heads=64, num_heads=64, head_dim=128, d_model=8192
    )
    config.cache.device_bytes = GIB
    config.cache.host_bytes = None
    config.scheduler.max_host_requests = 4096
    with pytest.raises(ConfigError, match=r"host's KV cache would take .* 90% may be taken; lower"):
        PacedPlan.create(config).check_host_memory()
