"""The engine's loop by itself, over any backend: plan a sweep, launch it, commit the one before.

Owns the one sweep of lag between launching and reading. Where weights, memory and programs come
from is an engine's business. Imports no jax.
"""

import dataclasses

from apex_jax.buckets import Buckets
from apex_jax.dispatch import Dispatch, StuckError, SweepHandle
from apex_jax.hardware import Backend
from apex_jax.policies import Policy
from apex_jax.request import Request, RequestOutput
from apex_jax.scheduler import Scheduler


class SweepLoop:
    """Continuous batching over a backend.

    scheduler, dispatch: of this loop alone, to be asked what they did.
    """

    def __init__(self, backend: Backend, scheduler: Scheduler, dispatch: Dispatch):
        self.scheduler, self.dispatch = scheduler, dispatch
        self._backend = backend
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
    ) -> "SweepLoop":
        """Return a loop of one strategy; what concerns the host counts where the policy has one.

        shapes: with those of a host lane, if any policy has one.
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
        )
        dispatch = Dispatch(
            backend,
            policy,
            num_layers=num_layers,
            layers_per_program=layers_per_program,
            watchdog_sec=watchdog_sec,
            transit_sizes=shapes.host.transit_pages if shapes.host else (),
        )
        return cls(backend, scheduler, dispatch)

    @property
    def has_work(self) -> bool:
        return self._previous is not None or not self.scheduler.is_idle

    def submit(self, request: Request) -> None:
        """Queue a request; RequestError if it could never run."""
        self.scheduler.submit(request, self._backend.now())

    def step(self) -> list[RequestOutput]:
        """Start the next sweep, and return what the one before it finished.

        Raises StuckError where nothing can move, and what made a host job fail.
        """
        plan = self.scheduler.plan_sweep()
        launched = None
        if plan is not None:
            launched = self.dispatch.launch(plan)
            self.scheduler.launched(launched.sampled_cohorts, launched.finished_moves)
        elif self._previous is None and not self.scheduler.is_idle:
            raise StuckError(f"nothing runs and nothing can start: {self.scheduler.describe()}")
        outputs: list[RequestOutput] = []
        if self._previous is not None:
            sampled = self.dispatch.read(self._previous)
            outputs = self.scheduler.commit(sampled, self._backend.now())
        self._previous = launched
        return outputs

    def run(self) -> list[RequestOutput]:
        """Carry everything to its end, see that nothing is lost, and return who finished."""
        outputs: list[RequestOutput] = []
        while self.has_work:
            outputs += self.step()
        self.scheduler.check_ledger()
        return outputs
