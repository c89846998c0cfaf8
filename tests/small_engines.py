"""Small engines for tests, built once each, and other limits over the arrays of one that is there.

Pool sizes, rows and chunks are logical caps of a fresh scheduler, the strategy is another policy:
so hundreds of settings run on the few shapes that were compiled. Called by the tests of the engine.
"""

import dataclasses
from collections.abc import Callable

from apex_jax.buckets import Buckets
from apex_jax.config import Config, DeviceConfig, LlamaConfig, ModelConfig, SchedulerConfig
from apex_jax.dispatch import Dispatch
from apex_jax.engine import Engine
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


def make_config(**model: object) -> Config:
    return Config(
        model=ModelConfig(**model),
        scheduler=SchedulerConfig(max_requests=4, max_prefill_tokens=16, max_model_len=160),
        device=DeviceConfig(platform="cpu"),
    )


def with_limits(
    engine: Engine,
    *,
    policy: Policy | None = None,
    num_pages: int | None = None,
    num_host_pages: int | None = None,
    max_requests: int = 4,
    max_host_requests: int = 0,
    change_shapes: Callable[[Buckets], Buckets] = lambda shapes: shapes,
    eos: frozenset[int] = frozenset(),
    watchdog_sec: float = 60.0,
) -> Engine:
    """Return an engine on the same arrays, programs and threads with other limits and policy.

    One that was created with a host lane may be given none. change_shapes: leaves some of the
    shapes out.
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
        max_requests=max_requests,
        max_model_len=memory.max_model_len,
        vocab_size=engine.model.architecture.vocab_size,
        eos_token_ids=eos,
        policy=policy,
        num_host_pages=(num_host_pages or memory.num_host_pages) if has_host else 0,
        max_host_requests=max_host_requests if has_host else 0,
    )
    dispatch = Dispatch(
        engine._dispatch._backend,
        policy,
        num_layers=engine.model.architecture.num_layers,
        layers_per_program=engine.programs.num_layers,
        watchdog_sec=watchdog_sec,
    )
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
    )


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
