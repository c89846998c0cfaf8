"""The product's backend: stages as XLA programs on a real device.

Owns the arrays on the device: weights, pages, the last token of each slot. Pads and packs each
batch for its bucket. Called by the dispatch loop; knows nothing of requests.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Int32

from apex_jax import packing
from apex_jax.buckets import smallest_that_holds
from apex_jax.dispatch import Embed, Handle, Head, Layers, Stage
from apex_jax.kv_cache import LayerPages
from apex_jax.models.llama import LlamaWeights
from apex_jax.packing import DecodeArrays, PrefillArrays
from apex_jax.plan import DecodeBatch, PrefillBatch
from apex_jax.programs import ProgramKey, Programs

POLL_SEC = 50e-6  # a sweep takes milliseconds, and its tokens are wanted one sweep later


@dataclass(frozen=True)
class HiddenHandle:
    """Hidden states between stages, with the packed batch that every span of layers needs.

    x_bd: the rows that a head may sample; for a chunk its last tokens, None before the first layer.
    """

    x: Float[Array, "*batch d"]
    x_bd: Float[Array, "b d"] | None
    arrays: DecodeArrays | PrefillArrays

    @property
    def marker(self) -> Any:  # an Array; `is_ready` is missing from its stub
        return self.x

    def read(self) -> Int32[np.ndarray, "b"]:
        raise TypeError("hidden states hold no tokens; read a Head stage")


@dataclass(frozen=True)
class TokensHandle:
    """Tokens sampled by a head, on their way to the host, and the rows of them that count."""

    tokens_b: Int[Array, "b"]
    rows_i: Int32[np.ndarray, "i"]

    @property
    def marker(self) -> Any:
        return self.tokens_b

    def read(self) -> Int32[np.ndarray, "i"]:
        return np.asarray(self.tokens_b)[self.rows_i]


class XlaBackend:
    """Stages as asynchronous calls of compiled programs."""

    def __init__(
        self,
        programs: Programs,
        weights: LlamaWeights,
        pages: list[LayerPages],
        num_slots: int,
        device: jax.Device,
    ):
        self._programs, self._buckets = programs, programs.buckets
        self._device = device
        self._weights = weights
        self._output_vd = weights.embedding if weights.output is None else weights.output
        self._pages = pages
        self._tokens_by_slot = jnp.zeros(num_slots, jnp.int32, device=device)

    def now(self) -> float:
        return time.perf_counter()

    def wait_any(self, handles: Sequence[Handle], deadline_sec: float) -> Handle | None:
        while True:
            for handle in handles:
                assert isinstance(handle, HiddenHandle | TokensHandle)
                if handle.marker.is_ready():
                    return handle
            if self.now() > deadline_sec:
                return None
            time.sleep(POLL_SEC)

    def enqueue(self, stage: Stage, operand: Handle | None = None) -> HiddenHandle | TokensHandle:
        if isinstance(stage, Embed):
            if isinstance(stage.batch, DecodeBatch):
                return self._embed_decode(stage.batch)
            return self._embed_prefill(stage.batch)
        assert isinstance(operand, HiddenHandle)
        if isinstance(stage, Layers):
            return self._layers(stage.first_layer, operand)
        return self._head(stage, operand)

    def _embed_decode(self, batch: DecodeBatch) -> HiddenHandle:
        buckets = self._buckets
        rows = smallest_that_holds(buckets.rows, len(batch.slots_b))
        num_blocks = packing.num_blocks(batch, buckets.block_tokens)
        blocks = smallest_that_holds(buckets.num_blocks[rows], num_blocks)
        packed = packing.pack_decode(batch, rows=rows, blocks=blocks, page_size=buckets.page_size)
        arrays = DecodeArrays(*jax.device_put(packed, self._device))
        program = self._programs[ProgramKey("embed_decode", (rows,))]
        x_bd = program(self._weights.embedding, self._tokens_by_slot, arrays.rows_b4)
        return HiddenHandle(x_bd, x_bd, arrays)

    def _embed_prefill(self, batch: PrefillBatch) -> HiddenHandle:
        num_rows, num_tokens = batch.token_ids_bt.shape
        rows, tokens = next(
            (rows, tokens)
            for rows, tokens in self._buckets.chunks
            if tokens == num_tokens and rows >= num_rows
        )
        context_pages = smallest_that_holds(
            self._buckets.context_pages, batch.block_table_bm.shape[1]
        )
        packed = packing.pack_prefill(batch, rows=rows, context_pages=context_pages)
        arrays = PrefillArrays(*jax.device_put(packed, self._device))
        program = self._programs[ProgramKey("embed_prefill", (rows, tokens))]
        return HiddenHandle(program(self._weights.embedding, arrays.tokens_bt), None, arrays)

    def _layers(self, first_layer: int, hidden: HiddenHandle) -> HiddenHandle:
        span = slice(first_layer, first_layer + self._programs.num_layers)
        arguments = (self._weights.layers[span], tuple(self._pages[span]), hidden.x, hidden.arrays)
        if isinstance(hidden.arrays, DecodeArrays):
            shape = (len(hidden.arrays.rows_b4), len(hidden.arrays.blocks_ci))
            x, pages = self._programs[ProgramKey("layers_decode", shape)](*arguments)
            x_bd = x
        else:
            context_pages = hidden.arrays.rows_bi.shape[1] - 2
            shape = (*hidden.arrays.tokens_bt.shape, context_pages)
            x, x_bd, pages = self._programs[ProgramKey("layers_prefill", shape)](*arguments)
        self._pages[span] = pages
        return HiddenHandle(x, x_bd, hidden.arrays)

    def _head(self, stage: Head, hidden: HiddenHandle) -> TokensHandle:
        assert hidden.x_bd is not None
        rows = len(hidden.x_bd)
        packed_b8 = jax.device_put(packing.pack_head(stage.batch, rows=rows), self._device)
        name = "head_greedy" if stage.batch.is_greedy else "head_sample"
        tokens_b, self._tokens_by_slot = self._programs[ProgramKey(name, (rows,))](
            self._weights.norm, self._output_vd, self._tokens_by_slot, hidden.x_bd, packed_b8
        )
        tokens_b.copy_to_host_async()
        return TokensHandle(tokens_b, stage.batch.rows_b)
