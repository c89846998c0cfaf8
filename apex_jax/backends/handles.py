"""What the xla backend's stages and jobs yield: arrays on the device, or futures of them.

Owns which array tells that a stage has ended: each handle's `marker` is one that no later stage
overwrites (donates), so it can be asked for as long as the handle lives; a host job's is its
future. Called by the backend; for everybody else handles are opaque.
"""

from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Array, Float, Int, Int32

from apex_jax.packing import DecodeArrays, PrefillArrays, unpack_logprobs
from apex_jax.plan import PromptTargets, Sampled
from apex_jax.request import TokenLogprobs


class _WithoutTokens:
    """A handle that no Head stage yielded."""

    def read(self) -> Sampled:
        raise TypeError(f"{type(self).__name__} holds no tokens; read a Head stage's")


@dataclass(frozen=True)
class HiddenHandle(_WithoutTokens):
    """Hidden states between stages, with the packed batch that every layer needs.

    x: of a prompt's chunk it may be overwritten by the next StagedLayer. x_bd: the rows that a head
    may sample; for a chunk its last tokens, None before the first layer.
    """

    x: Float[Array, "*batch d"]
    x_bd: Float[Array, "b d"] | None
    arrays: DecodeArrays | PrefillArrays

    @property
    def marker(self) -> Any:  # an Array; `is_ready` is missing from its stub
        return self.x if self.x_bd is None else self.x_bd


@dataclass(frozen=True)
class EnteredHandle(_WithoutTokens):
    """Rows that have entered a layer, in want of attention.

    qkv_bjh: queries, keys and values as ops.host_attention takes them.
    """

    x: Float[Array, "b d"]
    qkv_bjh: Float[Array, "b j h"]
    arrays: DecodeArrays

    @property
    def marker(self) -> Any:
        return self.qkv_bjh


@dataclass(frozen=True)
class DeviceAttendedHandle(_WithoutTokens):
    """Rows that the device has attended to, about to leave their layer."""

    x: Float[Array, "b d"]
    arrays: DecodeArrays
    attended_bnh: Float[Array, "b n h"]

    @property
    def marker(self) -> Any:
        return self.attended_bnh


@dataclass(frozen=True)
class AttendedHandle(_WithoutTokens):
    """Rows of a cohort, about to leave their layer once the host has attended to them.

    result: yields attended rows [b, n, h] on the device.
    """

    x: Float[Array, "b d"]
    arrays: DecodeArrays
    result: Future[Any]

    @property
    def marker(self) -> Future[Any]:
        return self.result

    @property
    def attended_bnh(self) -> Float[Array, "b n h"]:
        """The result; waits for it, and raises what made the job fail."""
        return self.result.result()


@dataclass(frozen=True)
class PagesHandle(_WithoutTokens):
    """Exported pages on their way to the host; those after the stage's own are padding."""

    pages_ik2zh: Float[Array, "i k 2 z h"]

    @property
    def marker(self) -> Any:
        return self.pages_ik2zh


@dataclass(frozen=True)
class ImportedHandle(_WithoutTokens):
    """The end of an Import, whose pages are in the device's pool."""

    marker: Any


@dataclass(frozen=True)
class MovedHandle(_WithoutTokens):
    """Pages that the host writes, or reads; of the latter `result` yields [i, k, 2, z, h]."""

    result: Future[Any]

    @property
    def marker(self) -> Future[Any]:
        return self.result


@dataclass(frozen=True)
class PromptHandle:
    """Packed logprobs of the tokens of a chunk, on their way to the host."""

    packed_btc: Int[Array, "b t c"]
    targets: PromptTargets

    def read(self) -> tuple[tuple[TokenLogprobs, ...], ...]:
        packed_btc = np.asarray(self.packed_btc)
        return tuple(
            unpack_logprobs(packed_btc[row, :length])
            for row, length in zip(self.targets.rows_i, self.targets.lengths_i, strict=True)
        )


@dataclass(frozen=True)
class TokensHandle:
    """Tokens sampled by a head, on their way to the host, and the rows of them that count.

    logprobs_bc: packed, where the head computes them. prompt: of a chunk, likewise.
    """

    tokens_b: Int[Array, "b"]
    rows_i: Int32[np.ndarray, "i"]
    logprobs_bc: Int[Array, "b c"] | None = None
    prompt: PromptHandle | None = None

    @property
    def marker(self) -> Any:
        return self.tokens_b

    def read(self) -> Sampled:
        tokens_i = np.asarray(self.tokens_b)[self.rows_i]
        logprobs = prompts = ()
        if self.logprobs_bc is not None:
            logprobs = unpack_logprobs(np.asarray(self.logprobs_bc)[self.rows_i])
        if self.prompt is not None:
            prompts = self.prompt.read()
        return Sampled(tokens_i, logprobs, prompts)


DeviceHandle = (
    HiddenHandle
    | EnteredHandle
    | DeviceAttendedHandle
    | PagesHandle
    | ImportedHandle
    | TokensHandle
)
HostHandle = AttendedHandle | MovedHandle
