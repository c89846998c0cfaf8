"""The dispatch loop: carries a sweep's plan out, stage by stage, over a backend's verbs.

Owns the order of stages and nothing else: what a stage computes is the backend's, what a sweep does
is the plan's. Every schedule is this loop with another policy, on every backend. Imports no jax.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Int32

from apex_jax.plan import DecodeBatch, HeadBatch, PrefillBatch, SweepPlan


@dataclass(frozen=True)
class Embed:
    """Start a batch: tokens to hidden states."""

    batch: DecodeBatch | PrefillBatch


@dataclass(frozen=True)
class Layers:
    """Carry a batch's hidden states through consecutive layers, attention on the device."""

    batch: DecodeBatch | PrefillBatch
    first_layer: int


@dataclass(frozen=True)
class Head:
    """Sample the next token of a batch's rows and leave it in the rows' slots."""

    batch: HeadBatch


Stage = Embed | Layers | Head


@runtime_checkable
class Handle(Protocol):
    """What a stage will yield; it may be given to the next stage long before it is ready."""

    def read(self) -> Int32[np.ndarray, "b"]:
        """Return the sampled tokens of a Head stage, in its batch's order; waits for them."""
        ...


@runtime_checkable
class Backend(Protocol):
    """Hardware as the loop sees it. Stages run in the order of their enqueueing."""

    def enqueue(self, stage: Stage, operand: Handle | None = None) -> Handle:
        """Start a stage without waiting; `operand` is the handle of the hidden states it takes."""
        ...

    def wait_any(self, handles: Sequence[Handle], deadline_sec: float) -> Handle | None:
        """Return the first handle that is ready, or None once now() passes the deadline."""
        ...

    def now(self) -> float:
        """Return seconds on the backend's own clock."""
        ...


class StuckError(RuntimeError):
    """A sweep did not complete within the watchdog's time."""


@dataclass(frozen=True)
class SweepHandle:
    """A sweep under way: its last stage, and the heads that sample its tokens."""

    sweep_id: int
    last: Handle
    heads: tuple[Handle, ...]


class Dispatch:
    """The loop over one backend.

    first_layers: where each program of consecutive layers begins. watchdog_sec: how long a sweep
    may take before the job is failed.
    """

    def __init__(self, backend: Backend, first_layers: Sequence[int], watchdog_sec: float):
        self._backend = backend
        self._first_layers = tuple(first_layers)
        self._watchdog_sec = watchdog_sec

    def launch(self, plan: SweepPlan) -> SweepHandle:
        """Enqueue every stage of the sweep, prefill first; returns before they have run."""
        heads: list[Handle] = []
        last: Handle | None = None
        for batch, head in plan.batches:
            last = self._backend.enqueue(Embed(batch))
            for first_layer in self._first_layers:
                last = self._backend.enqueue(Layers(batch, first_layer), last)
            if head is not None:
                last = self._backend.enqueue(Head(head), last)
                heads.append(last)
        if last is None:
            raise ValueError(f"sweep {plan.sweep_id} has neither prefill nor decode rows")
        return SweepHandle(plan.sweep_id, last, tuple(heads))

    def read(self, sweep: SweepHandle) -> Int32[np.ndarray, "b"]:
        """Wait for the sweep and return its sampled tokens, prefill rows first.

        Raises StuckError after the watchdog's time.
        """
        deadline_sec = self._backend.now() + self._watchdog_sec
        if self._backend.wait_any([sweep.last], deadline_sec) is None:
            raise StuckError(
                f"sweep {sweep.sweep_id} did not complete within {self._watchdog_sec:g} s"
            )
        tokens = [head.read() for head in sweep.heads]
        return np.concatenate(tokens) if tokens else np.zeros(0, np.int32)
