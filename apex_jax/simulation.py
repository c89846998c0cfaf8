"""The engine's loop on predicted hardware: the real scheduler and dispatch, a virtual clock.

Owns when requests arrive and what a steady state came to; requests are lengths, tokens are zeros.
Called by launch scripts and tests. Imports no jax.
"""

from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from apex_jax.backends.simulated import SimulatedBackend
from apex_jax.buckets import HostLimits, choose
from apex_jax.cost_model import Times
from apex_jax.decisions import DecisionRecord
from apex_jax.dispatch import Dispatch, DispatchStats
from apex_jax.monitor import StageMonitor
from apex_jax.policies import Policy
from apex_jax.request import Request, RequestOutput, SamplingParams
from apex_jax.scheduler import Scheduler
from apex_jax.steady_load import SteadyLoad
from apex_jax.sweep_loop import SweepLoop

# Of the host, in a look at a steady state: one more or less is a percent. As long as it may last.
NUM_JOBS, MAX_ROUNDS = 100, 20
WATCHDOG_SEC = 1e6  # nothing hangs on a virtual clock; a sweep may be described as slow


class Simulation:
    """The sweep loop on a virtual clock; `outputs` are the finished requests.

    max_model_len: tokens a request may reach. layers_per_program, noise, seed, on_span: as the
    simulated backend takes them. monitor: learns from what stages took.
    """

    def __init__(
        self,
        times: Times,
        policy: Policy,
        *,
        num_pages: int,
        num_host_pages: int = 0,
        max_requests: int = 64,
        max_host_requests: int = 512,
        max_model_len: int = 4096,
        max_prefill_tokens: int = 512,
        page_size: int = 16,
        layers_per_program: int = 4,
        noise: float = 0.0,
        seed: int = 0,
        on_span: Callable[..., None] | None = None,
        monitor: StageMonitor | None = None,
    ):
        has_host = policy.max_cohorts > 0
        pages_per_request = -(-max_model_len // page_size)
        host = HostLimits(max_host_requests, pages_per_request, pages_per_request)
        self.scheduler = Scheduler(
            buckets=choose(
                max_requests=max_requests,
                max_prefill_tokens=max_prefill_tokens,
                max_model_len=max_model_len,
                num_pages=num_pages,
                page_size=page_size,
                host=host if has_host else None,
            ),
            num_layers=times.num_layers,
            num_pages=num_pages,
            max_requests=max_requests,
            max_model_len=max_model_len,
            vocab_size=2,
            eos_token_ids=frozenset(),
            policy=policy,
            num_host_pages=num_host_pages if has_host else 0,
            max_host_requests=max_host_requests if has_host else 0,
        )
        self.backend = SimulatedBackend(
            times,
            layers_per_program=layers_per_program,
            page_size=page_size,
            noise=noise,
            seed=seed,
            on_span=None if monitor is None and on_span is None else self._span,
        )
        self._on_span, self._monitor = on_span, monitor
        self.dispatch = Dispatch(
            self.backend,
            policy,
            num_layers=times.num_layers,
            layers_per_program=layers_per_program,
            watchdog_sec=WATCHDOG_SEC,
        )
        decisions = DecisionRecord(policy, monitor)
        self._loop = SweepLoop(self.scheduler, self.dispatch, decisions, self.backend.now)
        self.outputs: list[RequestOutput] = []
        self._num_submitted = 0
        self._arrivals: deque[tuple[float, Request]] = deque()

    @property
    def is_idle(self) -> bool:
        return not self._loop.has_work and not self._arrivals

    def submit(self, prompt_tokens: int, max_tokens: int) -> None:
        """Queue a request of given lengths; RequestError if it could never run."""
        self.scheduler.submit(self._request(prompt_tokens, max_tokens), self.backend.now())

    def submit_at(self, arrival_sec: float, prompt_tokens: int, max_tokens: int) -> None:
        """Let a request arrive at a time to come, no sooner than those before it.

        It is queued as the first sweep after that is planned, which is when `step` or `run` raise
        RequestError if it could never run; its waiting counts from its arrival.
        """
        assert not self._arrivals or arrival_sec >= self._arrivals[-1][0]
        self._arrivals.append((arrival_sec, self._request(prompt_tokens, max_tokens)))

    def _request(self, prompt_tokens: int, max_tokens: int) -> Request:
        sampling = SamplingParams(max_tokens=max_tokens, ignore_eos=True)
        self._num_submitted += 1
        return Request(str(self._num_submitted - 1), (1,) * prompt_tokens, sampling)

    def _receive(self) -> None:
        """Queue who has arrived; with nothing else to do, wait for who is next."""
        if self._arrivals and not self._loop.has_work:
            self.backend.idle_until(self._arrivals[0][0])
        while self._arrivals and self._arrivals[0][0] <= self.backend.now():
            arrival_sec, request = self._arrivals.popleft()
            self.scheduler.submit(request, arrival_sec)

    def step(self) -> None:
        """Play a sweep."""
        self._receive()
        self.outputs += self._loop.step()

    def _span(
        self, lane: str, name: str, start_sec: float, end_sec: float, work: Any = None
    ) -> None:
        if self._monitor is not None and work is not None:
            self._monitor.ended(work, end_sec - start_sec)
        if self._on_span is not None:
            self._on_span(lane, name, start_sec, end_sec)

    def run(self) -> None:
        """Play until every request has ended, and see that nothing is lost."""
        while not self.is_idle:
            self.step()
        self.scheduler.check_ledger()


class Steady(NamedTuple):
    """What a simulation does once all requests decode. Rates: tokens per second."""

    device_rate: float
    host_rate: float
    sweep_sec: float
    stats: DispatchStats  # from the start on
    num_sweeps: int  # from the start on

    @property
    def rate(self) -> float:
        return self.device_rate + self.host_rate


def steady_state(
    times: Times,
    policy: Policy,
    *,
    device_rows: int,
    host_rows: int,
    context: int = 16,
    num_rounds: int = 4,
    layers_per_program: int = 4,
    noise: float = 0.0,
    seed: int = 0,
) -> Steady:
    """Let so many requests decode in each lane, and return what becomes of them.

    context: tokens of each prompt. num_rounds: how many times num_layers + 1 sweeps are measured,
    which is a token of the host lane under a policy that merges. A page holds a whole request, so
    the pools hold as many as there are rows. The host's progress is counted in layers, so that no
    token is cut in two by the window's ends.
    """
    num_sweeps = num_rounds * (times.num_layers + 1)
    max_model_len = context + 16 * num_sweeps
    simulation = Simulation(
        times,
        policy,
        num_pages=2 * max(device_rows, 1),  # a page must be left for each row that grows
        num_host_pages=2 * host_rows,
        page_size=max_model_len,
        max_model_len=max_model_len,
        max_requests=2 * max(device_rows, 1),
        max_host_requests=max(2 * host_rows, 1),
        layers_per_program=layers_per_program,
        noise=noise,
        seed=seed,
    )
    for _ in range(device_rows + host_rows):
        simulation.submit(context, max_model_len - context)
    scheduler, dispatched = simulation.scheduler, simulation.dispatch.stats
    num_device = device_rows if policy.uses_device_lane else 0
    sweeps_at_rest = 0
    last_prefilled = -1
    while sweeps_at_rest < 2 * (times.num_layers + 1):  # nobody is admitted any more
        simulation.step()
        planned = scheduler.stats
        prefilled = planned.num_prefilled_tokens + planned.num_host_prefilled_tokens
        sweeps_at_rest = sweeps_at_rest + 1 if prefilled == last_prefilled else 0
        last_prefilled = prefilled

    def reading() -> tuple[float, int, int]:
        device_tokens = scheduler.stats.num_output_tokens - scheduler.stats.num_host_tokens
        return simulation.backend.now(), device_tokens, dispatched.num_host_row_layers

    before = reading()
    first, first_job = scheduler.stats.num_sweeps, dispatched.num_host_jobs
    # A cohort that is far too large passes seldom, so some of its layers must be seen too.
    num_jobs = 2 * num_rounds * policy.max_cohorts
    most_sweeps = 8 * num_sweeps
    while (done := scheduler.stats.num_sweeps - first) < num_sweeps or (
        0 < dispatched.num_host_jobs - first_job < num_jobs and done < most_sweeps
    ):
        simulation.step()
    seconds, device_tokens, row_layers = (
        end - start for start, end in zip(before, reading(), strict=True)
    )
    assert num_device == 0 or device_tokens > 0
    return Steady(
        device_rate=device_tokens / seconds,
        host_rate=row_layers / times.num_layers / seconds,
        sweep_sec=seconds / (scheduler.stats.num_sweeps - first),
        stats=dispatched,
        num_sweeps=scheduler.stats.num_sweeps,
    )


def frozen_state(
    times: Times,
    policy: Policy,
    *,
    device_lengths: Sequence[int],
    host_lengths: Sequence[int],
    num_rounds: int = 2,
    layers_per_program: int = 4,
    noise: float = 0.0,
    seed: int = 0,
) -> Steady:
    """Let rows of given KV lengths decode that never grow, and return what becomes of them.

    The dispatch loop and the policy as they are, without scheduler, prompts and pages: many times
    as fast as `steady_state`, and every sweep costs the same under any strategy, so that rates can
    be compared closely. num_rounds: as there; one before them is not measured.
    """
    backend = SimulatedBackend(
        times, layers_per_program=layers_per_program, page_size=1, noise=noise, seed=seed
    )
    dispatch = Dispatch(
        backend,
        policy,
        num_layers=times.num_layers,
        layers_per_program=layers_per_program,
        watchdog_sec=WATCHDOG_SEC,
    )
    load = SteadyLoad(
        policy,
        device_lengths=device_lengths if policy.uses_device_lane else (),
        host_lengths=host_lengths if policy.max_cohorts else (),
        grows=False,
        max_cohort_rows=max(len(host_lengths), 1),
    )
    num_device = load.num_device_rows
    num_sweeps, previous = 0, None

    def play(until: Callable[[], bool]) -> None:
        nonlocal num_sweeps, previous
        while not until():
            launched = dispatch.launch(load.plan_sweep())
            load.note_launched(launched)
            if previous is not None:
                dispatch.read(previous)
            previous = launched
            num_sweeps += 1

    # A cohort that is far too large passes seldom: the look begins and ends as one does, and lasts
    # until one job more or less says little.
    round_sweeps, stats = times.num_layers + 1, dispatch.stats

    def play_on(least_sweeps: int, least_jobs: int = 0) -> None:
        first = num_sweeps
        end_job, last = stats.num_host_jobs + least_jobs, first + MAX_ROUNDS * round_sweeps
        play(lambda: num_sweeps - first >= least_sweeps)
        if stats.num_host_jobs:
            play(lambda: stats.num_host_jobs >= end_job or num_sweeps >= last)
            next_job, last = stats.num_host_jobs + 1, num_sweeps + 2 * round_sweeps
            play(lambda: stats.num_host_jobs >= next_job or num_sweeps >= last)

    play_on(round_sweeps)
    begin_sec, first_sweep, first_layers = backend.now(), num_sweeps, stats.num_host_row_layers
    play_on(num_rounds * round_sweeps, NUM_JOBS)
    seconds, done = backend.now() - begin_sec, num_sweeps - first_sweep
    row_layers = dispatch.stats.num_host_row_layers - first_layers
    return Steady(
        device_rate=num_device * done / seconds,
        host_rate=row_layers / times.num_layers / seconds,
        sweep_sec=seconds / done,
        stats=dispatch.stats,
        num_sweeps=num_sweeps,
    )
