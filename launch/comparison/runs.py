"""One system's turn at a workload: requests when they are due, a row of what came of them.

Owns the loop that serves a workload over any backend, the order of turns, and what becomes of a
turn that fails: a row with the reason. Called by run_benchmark. Imports no jax.
"""

import itertools
import sys
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import apex_jax
from apex_jax.config import SchedulerConfig
from apex_jax.cost_model import Times
from apex_jax.request import Request, RequestOutput, SamplingParams
from apex_jax.sweep_loop import SweepLoop
from launch.comparison.latency import Bounds, Served, fault_of, figures
from launch.comparison.results import Budgets, ModelUsed, RunRow
from launch.comparison.workload_file import Workload, WorkloadRequest
from launch.comparison.workload_rate import offered_at

WARM_UP_TOKENS = 16  # of output, of each request that warms up


class Started(NamedTuple):
    """A loop of one strategy, and the clock that its tokens are timed by."""

    loop: SweepLoop
    now: Callable[[], float]
    idle_until: Callable[[float], None]


class Hardware(Protocol):
    """What strategies take turns on: one model, one memory plan, one backend.

    warm_up: what is done before the first turn, in a sentence. is_virtual: a run is itself what is
    predicted, the first is like the later ones, and one that fails leaves nothing behind.
    """

    warm_up: str
    is_virtual: bool

    @property
    def times(self) -> Times:
        """Return the stage times that strategies go by."""
        ...

    @property
    def layers_per_program(self) -> int: ...

    @property
    def model(self) -> ModelUsed: ...

    @property
    def budgets(self) -> Budgets: ...

    def describe(self) -> str: ...

    def described_times(self) -> dict[str, Any]:
        """Return the stage times as JSON values."""
        ...

    def start(self, settings: SchedulerConfig) -> Started:
        """Return a loop of a strategy; no other is used until it has no work left."""
        ...

    def predict(self, settings: SchedulerConfig) -> Started:
        """Return the same loop on the simulated backend, with the times as they are now."""
        ...

    def prepare_turn(self) -> None:
        """Measure again what may have changed since the last turn."""
        ...

    def close(self) -> None: ...


def serve(started: Started, requests: Sequence[WorkloadRequest]) -> list[Served]:
    """Serve requests, each submitted when it is due, and return when their tokens came.

    Raises ValueError before anything starts where one could never run, and whatever stops the loop.
    """
    loop, now, idle_until = started
    longest = loop.scheduler.max_model_len
    for request in requests:
        if request.num_tokens > longest:
            raise ValueError(
                f"request {request.id!r} has {request.num_tokens} tokens, prompt and output, and "
                f"the KV cache (or the model) holds {longest} here: a larger "
                "--config.cache.device_bytes, or a workload with a --max_model_len"
            )
    token_sec: dict[str, list[float]] = {request.id: [] for request in requests}
    waiting, outputs = deque(requests), list[RequestOutput]()
    start_sec = now()
    while waiting or loop.has_work:
        if not loop.has_work:
            loop.decisions.rested()
            idle_until(start_sec + waiting[0].arrival_sec)
        while waiting and start_sec + waiting[0].arrival_sec <= now():
            request = waiting.popleft()
            recorded = _recorded(request, token_sec[request.id], now)
            # Due then, even where a sweep under way kept it from being submitted at once.
            loop.scheduler.submit(recorded, start_sec + request.arrival_sec)
        outputs += loop.step()
    loop.scheduler.check_ledger()
    return [_served(output, tuple(token_sec[output.request.request_id])) for output in outputs]


def _recorded(
    request: WorkloadRequest, token_sec: list[float], now: Callable[[], float]
) -> Request:
    """Return the request as the engine takes it; it notes when each of its tokens is read."""

    def note(token: int) -> bool:
        del token
        token_sec.append(now())
        return False

    sampling = SamplingParams(max_tokens=request.output_tokens, temperature=0.0, ignore_eos=True)
    return Request(request.id, request.prompt_token_ids, sampling, note)


def _served(output: RequestOutput, token_sec: tuple[float, ...]) -> Served:
    return Served(
        id=output.request.request_id,
        prompt_tokens=len(output.request.prompt_token_ids),
        output_tokens=len(output.token_ids),
        arrival_sec=output.arrival_sec,
        first_token_sec=token_sec[0],
        finish_sec=token_sec[-1],
        token_sec=token_sec,
        num_host_tokens=output.num_host_tokens,
    )


@dataclass(frozen=True)
class Turns:
    """Strategies that take turns: A B A B, at each request rate.

    systems: settings by name. request_rates: None for the workload's own arrivals. num_warm_up:
    requests that every strategy serves before the first turn, in no figure.
    """

    systems: dict[str, SchedulerConfig]
    request_rates: Sequence[float | None]
    num_repeats: int
    num_warm_up: int
    bounds: Bounds | None

    def __iter__(self) -> Iterator[tuple[int, float | None, str]]:
        return itertools.product(range(self.num_repeats), self.request_rates, self.systems)

    def all_failed(self, reason: str) -> Iterator[RunRow]:
        """Yield a row for each turn, where there is nothing to take them on."""
        for repeat, rate, name in self:
            yield _row(name, rate, repeat, status="failed", error=reason)


class Benchmark:
    """Takes the turns on some hardware."""

    def __init__(self, hardware: Hardware, workload: Workload, turns: Turns):
        self._hardware, self._workload, self._turns = hardware, workload, turns
        self._stopped: str | None = None  # by whom, and why: an engine is of no use after that
        self._predicted: dict[tuple[str, float | None], tuple[Times, float]] = {}

    def run(self) -> Iterator[RunRow]:
        """Yield a row for each turn as it ends."""
        if not self._hardware.is_virtual:
            for name in self._turns.systems:
                self._warm_up(name)
        for repeat, rate, name in self._turns:
            self._hardware.prepare_turn()
            yield self._turn(name, rate, repeat)

    def _warm_up(self, name: str) -> None:
        requests = [
            WorkloadRequest(
                one.id, one.prompt_token_ids, min(one.output_tokens, WARM_UP_TOKENS), 0.0
            )
            for one in self._workload.requests[: self._turns.num_warm_up]
        ]
        served = self._attempt(name, requests)
        print(f"  {name:24} warmed up" if isinstance(served, list) else f"  {name:24} {served}")

    def _turn(self, name: str, rate: float | None, repeat: int) -> RunRow:
        requests = offered_at(self._workload, rate)
        served = self._attempt(name, requests)
        if isinstance(served, str):
            return _row(name, rate, repeat, status="failed", error=served)
        if fault := fault_of(requests, served):
            return _row(name, rate, repeat, status="failed", error=fault)
        predicted = None if self._hardware.is_virtual else self._predict(name, rate, requests)
        return _row(
            name,
            rate,
            repeat,
            status="ok",
            **figures(served, self._turns.bounds),
            predicted_output_tokens_per_sec=predicted,
        )

    def _attempt(self, name: str, requests: Sequence[WorkloadRequest]) -> list[Served] | str:
        """Return what was served, or why it was not."""
        if self._stopped is not None:
            return self._stopped
        started: Started | None = None
        try:
            started = self._hardware.start(self._turns.systems[name])
            return serve(started, requests)
        except Exception as error:  # whatever it is, it is a row
            why = reason(error)
            if started is not None and started.loop.has_work and not self._hardware.is_virtual:
                traceback.print_exc(file=sys.stderr)
                self._stopped = f"not run: {name} had stopped the engine before ({why})"
            return why

    def _predict(
        self, name: str, rate: float | None, requests: Sequence[WorkloadRequest]
    ) -> float | None:
        """Return the simulated tokens per second; once, unless the times have changed."""
        times = self._hardware.times
        kept = self._predicted.get((name, rate))
        if kept is None or kept[0] is not times:
            served = serve(self._hardware.predict(self._turns.systems[name]), requests)
            kept = times, figures(served, None)["output_tokens_per_sec"]
            self._predicted[name, rate] = kept
        return kept[1]


def reason(error: BaseException) -> str:
    """Return an exception in one short line."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300]}"


def _row(name: str, rate: float | None, repeat: int, **measured: Any) -> RunRow:
    return RunRow(name, "apex_jax", rate, repeat, version=apex_jax.__version__, **measured)
