"""The engine's loop on predicted hardware: real scheduler and dispatch, virtual clock, no jax."""

from typing import NamedTuple

from apex_jax.backends.simulated import SimulatedBackend
from apex_jax.buckets import HostLimits, choose
from apex_jax.dispatch import Dispatch
from apex_jax.request import Request, SamplingParams
from apex_jax.scheduler import Scheduler

MAX_MODEL_LEN = 4096


class SimulatedLoop:
    """Plan, launch, and commit the sweep before; `outputs` are the finished requests."""

    def __init__(
        self,
        times,
        policy,
        *,
        num_pages,
        num_host_pages=0,
        max_requests=64,
        max_host_requests=512,
        page_size=16,
        layers_per_program=4,
        **backend,
    ):
        has_host = policy.max_cohorts > 0
        pages_per_request = MAX_MODEL_LEN // page_size
        buckets = choose(
            max_requests=max_requests,
            max_prefill_tokens=512,
            max_model_len=MAX_MODEL_LEN,
            num_pages=num_pages,
            page_size=page_size,
            host=HostLimits(256, pages_per_request, pages_per_request) if has_host else None,
        )
        self.scheduler = Scheduler(
            buckets=buckets,
            num_layers=times.num_layers,
            num_pages=num_pages,
            max_requests=max_requests,
            max_model_len=MAX_MODEL_LEN,
            vocab_size=100,
            eos_token_ids=frozenset(),
            policy=policy,
            num_host_pages=num_host_pages if has_host else 0,
            max_host_requests=max_host_requests if has_host else 0,
        )
        self.backend = SimulatedBackend(
            times, layers_per_program=layers_per_program, page_size=page_size, **backend
        )
        self.dispatch = Dispatch(
            self.backend,
            policy,
            num_layers=times.num_layers,
            layers_per_program=layers_per_program,
            watchdog_sec=1e6,
        )
        self.outputs = []
        self._previous = None
        self._num_submitted = 0

    def submit(self, prompt_tokens, max_tokens):
        sampling = SamplingParams(max_tokens=max_tokens, ignore_eos=True)
        request = Request(str(self._num_submitted), (1,) * prompt_tokens, sampling)
        self.scheduler.submit(request, self.backend.now())
        self._num_submitted += 1

    def step(self):
        """Play a sweep; returns the cohorts that sampled in it."""
        plan = self.scheduler.plan_sweep()
        launched = self.dispatch.launch(plan) if plan is not None else None
        if launched is not None:
            self.scheduler.launched(launched.sampled_cohorts, launched.finished_moves)
        assert plan is not None or self._previous is not None, self.scheduler.describe()
        if self._previous is not None:
            tokens = self.dispatch.read(self._previous)
            self.outputs += self.scheduler.commit(tokens, self.backend.now())
        self._previous = launched
        return launched.sampled_cohorts if launched is not None else ()

    def run(self):
        while not self.scheduler.is_idle or self._previous is not None:
            self.step()
        self.scheduler.check_ledger()


class Steady(NamedTuple):
    """What a loop does once all requests decode. rate: tokens per second, both lanes."""

    rate: float
    device_rate: float
    host_rate: float
    sweep_sec: float
    stats: object  # of the dispatch loop, from the start on


def measure(times, policy, device_rows, host_rows, *, num_tokens=12, **backend):
    """Let so many requests decode in each lane, and see what becomes of them in steady state.

    num_tokens: that the first cohort samples (or, without a host lane, sweeps / 10) meanwhile. A
    page holds a whole request, so that the pools hold as many as there are rows.
    """
    loop = SimulatedLoop(
        times,
        policy,
        num_pages=2 * max(device_rows, 1),  # a page must be left for each row that grows
        num_host_pages=2 * host_rows,
        page_size=MAX_MODEL_LEN,
        max_requests=2 * max(device_rows, 1),
        **backend,
    )
    for _ in range(device_rows + host_rows):
        loop.submit(16, MAX_MODEL_LEN - 16)
    marks = []
    settled = None
    num_sweeps = 0
    while len(marks) < (10 * num_tokens if not host_rows else num_tokens) + 1:
        sampled = loop.step()
        num_sweeps += 1
        assert num_sweeps < 4000, loop.dispatch.describe()
        stats = loop.scheduler.stats
        is_filled = stats.num_prefilled_tokens + stats.num_host_prefilled_tokens == 16 * (
            device_rows + host_rows
        )
        if settled is None and is_filled:
            settled = num_sweeps + 3 * (times.num_layers + 1)
        if settled is not None and num_sweeps > settled and (0 in sampled or not host_rows):
            counts = (stats.num_output_tokens, stats.num_host_tokens, num_sweeps)
            marks.append((loop.backend.now(), *counts))
    start, end = marks[0], marks[-1]
    seconds, tokens, host_tokens, sweeps = (b - a for a, b in zip(start, end, strict=True))
    return Steady(
        tokens / seconds,
        (tokens - host_tokens) / seconds,
        host_tokens / seconds,
        seconds / sweeps,
        loop.dispatch.stats,
    )
