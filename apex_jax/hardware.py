"""The hardware as the dispatch loop sees it: stages of the device, jobs of the host, four verbs.

Owns the names of what can be asked for, not how it is done (a backend's business) nor when (the
dispatch loop's). Imports no jax.
"""

import functools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Int32

from apex_jax.plan import DecodeBatch, HeadBatch, PrefillBatch, Sampled

# Device stages; `cohort_id` names the cohort that a stage serves, alone or beside the device's rows


@dataclass(frozen=True)
class Embed:
    """Tokens to hidden states."""

    batch: DecodeBatch | PrefillBatch


@dataclass(frozen=True)
class Layers:
    """Hidden states through a whole program of consecutive layers, attention on the device."""

    batch: DecodeBatch | PrefillBatch
    first_layer: int


@dataclass(frozen=True)
class PreAttention:
    """Hidden states into a layer: norm, queries, keys and values."""

    layer: int
    cohort_id: int | None = None


@dataclass(frozen=True)
class DeviceAttention:
    """Append and attend on the device: what the host's attention is to a cohort."""

    batch: DecodeBatch
    layer: int


@dataclass(frozen=True)
class PostAttention:
    """Attended rows out of a layer, to hidden states."""

    layer: int
    cohort_id: int | None = None


@dataclass(frozen=True)
class Boundary:
    """Attended rows out of layer `layer` - 1 and into `layer`; one or two groups share it."""

    layer: int
    cohort_id: int | None = None


@dataclass(frozen=True)
class Head:
    """Sample the next token of each group's rows and leave it in the rows' slots."""

    batches: tuple[HeadBatch, ...]


@dataclass(frozen=True)
class StagedLayer:
    """A chunk of prompt through one layer, its KV into the staging plane."""

    batch: PrefillBatch
    layer: int


@dataclass(frozen=True)
class Export:
    """Pages of a layer, of the device's pool or the staging plane, on their way to the host."""

    layer: int
    pages_i: Int32[np.ndarray, "i"]
    from_staging: bool


@dataclass(frozen=True)
class Import:
    """Pages of a layer, which the host has read, into the device's pool or the staging plane."""

    layer: int
    pages_i: Int32[np.ndarray, "i"]
    to_staging: bool = False


Stage = (
    Embed
    | Layers
    | PreAttention
    | DeviceAttention
    | PostAttention
    | Boundary
    | Head
    | StagedLayer
    | Export
    | Import
)

# Host jobs


@dataclass(frozen=True)
class HostAttention:
    """Append and attend one layer of a cohort; its operand comes from PreAttention or Boundary."""

    cohort_id: int
    layer: int
    batch: DecodeBatch


@dataclass(frozen=True)
class WritePages:
    """Exported pages into the host's pool."""

    layer: int
    pages_i: Int32[np.ndarray, "i"]


@dataclass(frozen=True)
class ReadPages:
    """Pages of the host's pool, on their way to the device."""

    layer: int
    pages_i: Int32[np.ndarray, "i"]


Job = HostAttention | WritePages | ReadPages


def name_of(work: Stage | Job) -> str:
    """Return the one name of a stage or job, on the timeline and in reports: `host_attention`."""
    return _name_of_kind(type(work))


@functools.cache
def _name_of_kind(kind: type) -> str:
    return re.sub(r"(?<!^)(?=[A-Z])", "_", kind.__name__).lower()


@runtime_checkable
class Handle(Protocol):
    """What a stage or job will yield; it may be an operand long before it is ready."""

    def read(self) -> Sampled:
        """Return what a Head stage chose, in its batch's order; waits for it."""
        ...


@runtime_checkable
class Backend(Protocol):
    """Hardware as the loop sees it.

    Stages run in the order of their enqueueing, jobs in the order of their submission. The pages of
    a finished sequence may therefore be handed out again as soon as its last stage is enqueued, or
    its last job submitted. A job that fails makes all later ones fail.
    """

    def enqueue(self, stage: Stage, *operands: Handle) -> tuple[Handle, ...]:
        """Start a stage without waiting; returns a handle for each group of rows."""
        ...

    def submit_host(self, job: Job, operand: Handle | None = None) -> Handle:
        """Queue a job for the host without waiting."""
        ...

    def wait_any(self, handles: Sequence[Handle], deadline_sec: float) -> Handle | None:
        """Return the first handle that is ready, or None once now() passes the deadline.

        Raises what made a handle's job fail.
        """
        ...

    def now(self) -> float:
        """Return seconds on the backend's own clock."""
        ...
