"""The loop of every engine, over any backend: plan a sweep, launch it, commit the one before.

Owns the one sweep of lag between launching and reading. Where weights, memory and programs come
from is an engine's business, and so is when requests arrive. Imports no jax.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

from apex_jax.buckets import Buckets
from apex_jax.decisions import DecisionRecord
from apex_jax.dispatch import Dispatch, StuckError, SweepHandle
from apex_jax.hardware import Backend
from apex_jax.monitor import StageMonitor
from apex_jax.policies import Policy
from apex_jax.request import Request, RequestOutput
from apex_jax.scheduler import Scheduler
from apex_jax.timeline import Timeline


class SweepLoop:
    """Continuous batching over a backend.

    scheduler, dispatch: of this loop alone, to be asked what they did. decisions: told of each
    sweep. now: the backend's clock. timeline: shows planning, launching and committing.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        dispatch: Dispatch,
        decisions: DecisionRecord,
        now: Callable[[], float],
        timeline: Timeline | None = None,
    ):
        self.scheduler, self.dispatch, self.decisions = scheduler, dispatch, decisions
        self._now = now
        self._timeline = Timeline() if timeline is None else timeline
        self._previous: SweepHandle | None = None

    @classmethod
    def create(
        cls,
        backend: Backend,
        policy: Policy,
        shapes: Buckets,
        *,
        num_layers: int,
        layers_per_program: int,
        num_pages: int,
        num_host_pages: int,
        max_requests: int,
        max_host_requests: int,
        max_model_len: int,
        vocab_size: int,
        watchdog_sec: float,
        reuses_prefixes: bool = False,
        monitor: StageMonitor | None = None,
    ) -> "SweepLoop":
        """Return a loop of one strategy; what concerns the host counts where the policy has one.

        shapes: with those of a host lane, if any policy has one. monitor: learns from what sweeps
        took; whoever gives it reports the stages to it. reuses_prefixes: as the scheduler has it.
        """
        has_host = policy.max_cohorts > 0
        scheduler = Scheduler(
            buckets=shapes if has_host else dataclasses.replace(shapes, host=None),
            num_layers=num_layers,
            num_pages=num_pages,
            max_requests=max_requests,
            max_model_len=max_model_len,
            vocab_size=vocab_size,
            eos_token_ids=frozenset(),
            policy=policy,
            num_host_pages=num_host_pages if has_host else 0,
            max_host_requests=max_host_requests if has_host else 0,
            reuses_prefixes=reuses_prefixes,
        )
        dispatch = Dispatch(
            backend,
            policy,
            num_layers=num_layers,
            layers_per_program=layers_per_program,
            watchdog_sec=watchdog_sec,
            transit_sizes=shapes.host.transit_pages if shapes.host else (),
        )
        return cls(scheduler, dispatch, DecisionRecord(policy, monitor), backend.now)

    @property
    def has_work(self) -> bool:
        return self._previous is not None or not self.scheduler.is_idle

    def submit(self, request: Request) -> None:
        """Queue a request; RequestError if it could never run."""
        self.scheduler.submit(request, self._now())

    def step(self) -> list[RequestOutput]:
        """Start the next sweep, and return what the one before it finished.

        Raises StuckError where nothing can move, and what made a host job fail.
        """
        try:
            launched = self._launch_next()
            outputs = self._commit_previous()
        except StuckError as error:
            raise StuckError(f"{error}\n{self.scheduler.describe()}") from None
        self._previous = launched
        return outputs

    def run(self) -> list[RequestOutput]:
        """Carry everything to its end, see that nothing is lost, and return who finished."""
        outputs: list[RequestOutput] = []
        while self.has_work:
            outputs += self.step()
        self.scheduler.check_ledger()
        self.decisions.rested()
        return outputs

    def _launch_next(self) -> SweepHandle | None:
        begin_sec = self._now()
        plan = self.scheduler.plan_sweep()
        planned_sec = self._now()
        if plan is None:
            if self._previous is None and not self.scheduler.is_idle:
                raise StuckError("nothing runs and nothing can start")
            return None
        args: dict[str, Any] = {"sweep": plan.sweep_id}
        if self._timeline.is_tracing:
            args["requests"] = self.scheduler.requests_by_group()
        self._timeline.span("scheduler", "plan", begin_sec, planned_sec, **args)
        self.decisions.planned(plan)
        launched = self.dispatch.launch(plan)
        self.scheduler.launched(launched.sampled_cohorts, launched.finished_moves)
        self._timeline.span("dispatch", "launch", planned_sec, self._now(), **args)
        return launched

    def _commit_previous(self) -> list[RequestOutput]:
        if self._previous is None:
            return []
        sampled = self.dispatch.read(self._previous)
        start_sec = self._now()
        outputs = self.scheduler.commit(sampled, start_sec)
        self.decisions.swept(start_sec)
        self._timeline.span("scheduler", "commit", start_sec, self._now())
        return outputs
