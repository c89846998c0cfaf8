"""Small engines for tests, built once each, and other limits over the arrays of one that is there.

Pool sizes, rows and chunks are logical caps of a fresh scheduler, the strategy is another policy:
so hundreds of settings run on the few shapes that were compiled. Called by the tests of the engine.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator

import jax
import numpy as np

from apex_jax.backends.host_lane import HostLane
from apex_jax.buckets import Buckets
from apex_jax.config import (
    CacheConfig,
    CompileConfig,
    Config,
    DeviceConfig,
    LlamaConfig,
    ModelConfig,
    SchedulerConfig,
)
from apex_jax.decisions import DecisionRecord
from apex_jax.dispatch import Dispatch
from apex_jax.engine import Engine
from apex_jax.hardware import Job
from apex_jax.policies import DeviceOnly, Policy
from apex_jax.request import Request
from apex_jax.scheduler import Scheduler

# Wide enough that XLA runs its programs on other threads: smaller ones never show asynchrony.
WIDE = LlamaConfig(
    num_layers=2,
    d_model=256,
    d_ffn=320,
    num_heads=4,
    num_kv_heads=2,
    head_dim=64,
    vocab_size=200,
    max_position_embeddings=160,
)


MODELS = {
    # Several queries a key, more layers than a program has, and wide as well.
    "gqa": LlamaConfig(
        num_layers=4,
        d_model=256,
        d_ffn=320,
        num_heads=8,
        num_kv_heads=2,
        head_dim=32,
        vocab_size=200,
        max_position_embeddings=64,
    ),
    "mha": LlamaConfig(
        num_layers=3,
        d_model=64,
        d_ffn=96,
        num_heads=4,
        num_kv_heads=4,
        head_dim=16,
        vocab_size=120,
        max_position_embeddings=64,
    ),
}
# Requests at once on the device and on the host; the second has the fewest shapes.
MAX_REQUESTS = {"gqa": (4, 8), "mha": (2, 4)}
NUM_PAGES, NUM_HOST_PAGES = 32, 48  # enough for so many of the longest request, or nearly
SEED = 5  # of the dummy weights
WARM_UP_LINES: list[str] = []


def make_config(attention: str = "xla", **model: object) -> Config:
    """attention: what a GPU has, unless a test is about a CPU that is the whole device."""
    return Config(
        model=ModelConfig(**model),
        scheduler=SchedulerConfig(
            strategy="device_only", max_requests=4, max_prefill_tokens=16, max_model_len=160
        ),
        device=DeviceConfig(platform="cpu", attention=attention),
    )


def make_hybrid_config(name: str, strategy: str = "full_offload") -> Config:
    """Return settings whose shapes serve every strategy; full_offload's cohorts are half a lane."""
    model = MODELS[name]
    max_requests, max_host_requests = MAX_REQUESTS[name]
    page_bytes = 8 * model.kv_bytes_per_token(4)
    return Config(
        model=ModelConfig(weights="dummy", architecture=model, seed=SEED),
        cache=CacheConfig(
            device_bytes=NUM_PAGES * page_bytes,
            host_bytes=NUM_HOST_PAGES * page_bytes,
            page_size=8,
        ),
        scheduler=SchedulerConfig(
            strategy=strategy,
            max_requests=max_requests,
            max_host_requests=max_host_requests,
            max_prefill_tokens=16,
        ),
        device=DeviceConfig(platform="cpu"),
        compile=CompileConfig(layers_per_program=2 if name == "gqa" else None),
    )


@functools.cache
def hybrid_engine(name: str) -> Engine:
    return Engine.create(make_hybrid_config(name), WARM_UP_LINES.append)


def with_limits(
    engine: Engine,
    *,
    policy: Policy | None = None,
    num_pages: int | None = None,
    num_host_pages: int | None = None,
    max_requests: int | None = None,
    max_host_requests: int = 0,
    change_shapes: Callable[[Buckets], Buckets] = lambda shapes: shapes,
    eos: frozenset[int] = frozenset(),
    before_job: Callable[[Job], None] | None = None,
    watchdog_sec: float = 60.0,
    reuses_prefixes: bool = False,
) -> Engine:
    """Return an engine on the same arrays and programs with other limits and policy.

    Only one that was created with a host lane may have one; it gets a new lane with pools of its
    own, and those before it are of no use any more. change_shapes: leaves some of them out.
    """
    policy = DeviceOnly() if policy is None else policy
    has_host = policy.max_cohorts > 0
    memory, shapes = engine.memory, change_shapes(engine.programs.buckets)
    if not has_host:
        shapes = dataclasses.replace(shapes, host=None)
    scheduler = Scheduler(
        buckets=shapes,
        num_layers=engine.model.architecture.num_layers,
        num_pages=num_pages or memory.num_pages,
        max_requests=max_requests or shapes.device_rows[-1],
        max_model_len=memory.max_model_len,
        vocab_size=engine.model.architecture.vocab_size,
        eos_token_ids=eos,
        policy=policy,
        num_host_pages=(num_host_pages or memory.num_host_pages) if has_host else 0,
        max_host_requests=max_host_requests if has_host else 0,
        reuses_prefixes=reuses_prefixes,
    )
    dispatch = Dispatch(
        engine._dispatch._backend,
        policy,
        num_layers=engine.model.architecture.num_layers,
        layers_per_program=engine.programs.num_layers,
        watchdog_sec=watchdog_sec,
    )
    if has_host:
        _renew_host_lane(engine, before_job)
    return Engine(
        engine.model,
        scheduler,
        dispatch,
        engine.programs,
        memory,
        engine._device,
        engine._timeline,
        engine._workers,
        engine._setup_sec,
        DecisionRecord(policy, None),
    )


def _renew_host_lane(engine: Engine, before_job: Callable[[Job], None] | None) -> None:
    old = engine._workers.host_lane
    assert old is not None
    old.close()
    lane = HostLane(
        old._programs, engine._device, on_span=engine._timeline.span, before_job=before_job
    )
    engine._workers = dataclasses.replace(engine._workers, host_lane=lane)
    engine._dispatch._backend._host_lane = lane


def run(engine: Engine, requests: list[Request]) -> list[list[int]]:
    """Return each request's tokens."""
    for request in requests:
        engine.submit(request)
    outputs = {}
    while engine.num_unfinished:
        for output in engine.step():
            outputs[output.request.request_id] = output
    assert len(outputs) == len(requests)
    return [list(outputs[request.request_id].token_ids) for request in requests]


@contextlib.contextmanager
def compilations() -> Iterator[list[str]]:
    """Collect what is traced or compiled meanwhile."""
    compiled: list[str] = []

    def listen(event: str, duration_sec: float, **named: object) -> None:
        if "backend_compile" in event or "jaxpr_trace" in event:
            compiled.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        jax.jit(lambda x: x + 3)(np.float32(1))
        assert compiled, "the listener hears nothing"
        compiled.clear()
        yield compiled
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
