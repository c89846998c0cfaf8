"""A look at a steady state: both lanes full, nobody ends, nobody moves.

Owns how a loop is brought there and between which moments it is looked at, over any backend and on
its clock, so that what is measured and what is predicted are looked at alike.
"""

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence

from apex_jax.dispatch import DispatchStats
from apex_jax.policies import Action, CohortView, Load, Policy
from apex_jax.request import Request
from apex_jax.sweep_loop import SweepLoop

MAX_IDLE_SWEEPS = 16  # without a prompt's progress, before filling is given up


class Steered:
    """A policy that may be told to send newcomers to the host lane, whatever room the device has.

    Filling goes by it: the device's lane is given as many rows as it has pages for at their full
    length, so that nobody is driven out later, and only a lack of pages sends to the host.
    cohort_rows: of each cohort, when it last began a token.
    """

    def __init__(self, policy: Policy):
        self._policy = policy
        self.fills_host = False
        self.cohort_rows: dict[int, int] = {}

    @property
    def uses_device_lane(self) -> bool:
        return self._policy.uses_device_lane and not self.fills_host

    @property
    def max_cohorts(self) -> int:
        return self._policy.max_cohorts

    @property
    def passes(self) -> int | None:
        return self._policy.passes

    @property
    def max_host_rows(self) -> int | None:
        return self._policy.max_host_rows

    @property
    def device_prompts_first(self) -> bool:
        return self._policy.device_prompts_first

    @property
    def drops_tokens(self) -> bool:
        return self._policy.drops_tokens

    @property
    def keeps_host_rows(self) -> bool:
        return self._policy.keeps_host_rows

    def consider(self, load: Load) -> None:
        self._policy.consider(load)

    def form(self, load: Load) -> Mapping[int, Sequence[int]]:
        members = self._policy.form(load)
        self.cohort_rows |= {cohort_id: len(rows) for cohort_id, rows in members.items()}
        return members

    def may_enter(self, points: Sequence[int], num_layers: int) -> bool:
        return self._policy.may_enter(points, num_layers)

    def at_boundary(self, boundary: int, cohort: CohortView) -> Action:
        return self._policy.at_boundary(boundary, cohort)


@dataclasses.dataclass(frozen=True)
class Mark:
    """What was counted at a moment. python_sec: CPU time of the thread that runs the loop."""

    now_sec: float
    python_sec: float
    num_sweeps: int
    num_tokens: int
    num_host_tokens: int
    num_preemptions: int
    dispatched: DispatchStats


@dataclasses.dataclass(frozen=True)
class Look:
    """A steady state from one moment to another.

    device_rows, host_rows: in each lane. The host's progress is counted in layers, because its
    tokens come in bursts.
    """

    begin: Mark
    end: Mark
    device_rows: int
    host_rows: int
    num_layers: int

    @property
    def seconds(self) -> float:
        return self.end.now_sec - self.begin.now_sec

    @property
    def num_sweeps(self) -> int:
        return self.end.num_sweeps - self.begin.num_sweeps

    def lengths(self, prompt_tokens: int) -> tuple[float, float]:
        """Return the mean tokens of a device row and of a host row half-way through."""
        host_tokens = (self.begin.num_host_tokens + self.end.num_host_tokens) / 2
        tokens = (self.begin.num_tokens + self.end.num_tokens) / 2
        # The first token of everybody comes from the device, which prefills.
        device_tokens = tokens - host_tokens - self.host_rows
        return (
            prompt_tokens + device_tokens / max(1, self.device_rows),
            prompt_tokens + 1 + host_tokens / max(1, self.host_rows),
        )

    def rates(self) -> dict[str, float]:
        """Return tokens per second, and per sweep seconds and counts."""
        begin, end, num_sweeps = self.begin, self.end, self.num_sweeps
        device_rate, host_rate = (
            (after - before) / self.seconds
            for before, after in zip(self._progress(begin), self._progress(end), strict=True)
        )
        before, after = vars(begin.dispatched), vars(end.dispatched)
        counts = ("num_merges", "num_extra_passes", "num_late", "num_host_jobs")
        return {
            "tokens_per_sec": device_rate + host_rate,
            "device_tokens_per_sec": device_rate,
            "host_tokens_per_sec": host_rate,
            "device_rows": self.device_rows,
            "host_rows": self.host_rows,
            "looked_sec": self.seconds,
            "sweep_sec": self.seconds / num_sweeps,
            "python_sec_per_sweep": (end.python_sec - begin.python_sec) / num_sweeps,
            "preemptions": end.num_preemptions - begin.num_preemptions,
            **{
                f"{name.removeprefix('num_')}_per_sweep": (after[name] - before[name]) / num_sweeps
                for name in counts
            },
        }

    def _progress(self, mark: Mark) -> tuple[float, float]:
        """Return the tokens of device and host so far, parts of the host's included."""
        device_tokens = mark.num_tokens - mark.num_host_tokens
        return device_tokens, mark.dispatched.num_host_row_layers / self.num_layers


class SteadyRun:
    """One strategy's turn: fill both lanes, settle, look.

    policy: the one that the loop follows. now: the clock of its backend.
    """

    def __init__(self, loop: SweepLoop, policy: Steered, now: Callable[[], float], num_layers: int):
        self._loop, self._policy, self._now = loop, policy, now
        self._num_layers = num_layers

    def fill(
        self, device: Sequence[Request], host: Sequence[Request], num_settling_sweeps: int
    ) -> None:
        """Let requests into either lane, then go on for so many sweeps."""
        self._admit(device)
        self._policy.fills_host = True
        self._admit(host)
        self._policy.fills_host = False
        for _ in range(num_settling_sweeps):
            self._loop.step()

    def look(self, seconds: float) -> Look:
        """Go on for so long, and return what was seen; ValueError where a request ends before."""
        begin = end = self._count()
        while end.now_sec < begin.now_sec + seconds:
            if self._loop.step():
                raise ValueError("a request ended while it was looked at: let them be longer")
            end = self._count()
        stats = self._loop.scheduler.stats
        return Look(begin, end, stats.max_running, stats.max_host_running, self._num_layers)

    def _admit(self, requests: Sequence[Request]) -> None:
        """Let requests in, as many as find room."""
        for request in requests:
            self._loop.submit(request)
        stats, seen, num_idle = self._loop.scheduler.stats, 0, 0
        while self._loop.scheduler.num_waiting and num_idle < MAX_IDLE_SWEEPS:
            self._loop.step()
            now = stats.num_prefilled_tokens + stats.num_host_prefilled_tokens
            num_idle = num_idle + 1 if now == seen else 0
            seen = now

    def _count(self) -> Mark:
        stats = self._loop.scheduler.stats
        return Mark(
            now_sec=self._now(),
            python_sec=time.thread_time(),
            num_sweeps=stats.num_sweeps,
            num_tokens=stats.num_output_tokens,
            num_host_tokens=stats.num_host_tokens,
            num_preemptions=stats.num_preemptions,
            dispatched=dataclasses.replace(self._loop.dispatch.stats),
        )
