"""The product's backend: stages as XLA programs on a real device, jobs on the host lane's thread.

Owns the arrays on the device: weights, pages, the staging plane, the last token of each slot. Pads
and packs each batch for its bucket. Who waits for what is the completions' business, the host's
pool the host lane's. Called by the dispatch loop; knows nothing of requests.
"""

import dataclasses
import itertools
import time
from collections.abc import Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int32

from apex_jax import packing
from apex_jax.backends.completions import Completions
from apex_jax.backends.handles import (
    AttendedHandle,
    DeviceAttendedHandle,
    DeviceHandle,
    EnteredHandle,
    HiddenHandle,
    HostHandle,
    ImportedHandle,
    MovedHandle,
    PagesHandle,
    PromptHandle,
    TokensHandle,
)
from apex_jax.backends.host_lane import HostLane
from apex_jax.buckets import entry_bucket, smallest_that_holds
from apex_jax.hardware import (
    Boundary,
    DeviceAttention,
    Embed,
    Export,
    Handle,
    Head,
    HostAttention,
    Import,
    Job,
    Layers,
    PostAttention,
    PreAttention,
    Stage,
    StagedLayer,
    WritePages,
)
from apex_jax.kv_cache import LayerPages
from apex_jax.lowering import ProgramKey
from apex_jax.models.llama import LlamaWeights
from apex_jax.packing import DecodeArrays, PrefillArrays
from apex_jax.plan import DecodeBatch, HeadBatch, PrefillBatch
from apex_jax.programs import Programs
from apex_jax.stages import BoundaryRows


class XlaBackend:
    """Stages as asynchronous calls of compiled programs.

    pages: of every layer. staging: the plane of one layer through which prompts go to the host;
    None, like host_lane, where there is no host lane.
    """

    def __init__(
        self,
        programs: Programs,
        weights: LlamaWeights,
        pages: list[LayerPages],
        num_slots: int,
        device: jax.Device,
        *,
        completions: Completions,
        host_lane: HostLane | None = None,
        staging: LayerPages | None = None,
    ):
        self._programs, self._buckets = programs, programs.buckets
        self._device = device
        self._weights = weights
        self._flat_layers = [tuple(jax.tree.leaves(layer)) for layer in weights.layers]
        span = programs.num_layers
        self._spans = [  # by their first layer
            tuple(itertools.chain(*self._flat_layers[first : first + span]))
            for first in range(len(self._flat_layers) - span + 1)
        ]
        self._output_vd = weights.embedding if weights.output is None else weights.output
        self._pages, self._staging = pages, staging
        self._tokens_by_slot = jnp.zeros(num_slots, jnp.int32, device=device)
        self._completions, self._host_lane = completions, host_lane
        host, like = self._buckets.host, weights.embedding
        # Filled group by group for a joint head; what a round leaves in them does no harm.
        self._head_rows_bd = {
            rows: jnp.zeros((rows, like.shape[1]), like.dtype, device=device)
            for rows in (() if host is None else host.head_rows)
        }

    def now(self) -> float:
        return time.perf_counter()

    def wait_any(self, handles: Sequence[Handle], deadline_sec: float) -> Handle | None:
        own = cast(Sequence[DeviceHandle | HostHandle], handles)
        return self._completions.wait_any(own, deadline_sec)

    def submit_host(self, job: Job, operand: Handle | None = None) -> HostHandle:
        assert self._host_lane is not None
        if isinstance(job, HostAttention):
            assert isinstance(operand, EnteredHandle)
            operand.qkv_bjh.copy_to_host_async()
            result = self._host_lane.submit(job, operand.qkv_bjh)
            handle = AttendedHandle(operand.x, operand.arrays, result)
        elif isinstance(job, WritePages):
            assert isinstance(operand, PagesHandle)
            handle = MovedHandle(self._host_lane.submit(job, operand.pages_ik2zh))
        else:
            handle = MovedHandle(self._host_lane.submit(job))
        self._completions.submitted(handle)
        return handle

    def enqueue(self, stage: Stage, *operands: Handle) -> tuple[DeviceHandle, ...]:
        start_sec = time.perf_counter()
        handles = self._start(stage, operands)
        self._completions.enqueued(handles[-1], stage, start_sec)  # they become ready together
        return handles

    def _start(self, stage: Stage, operands: tuple[Handle, ...]) -> tuple[DeviceHandle, ...]:
        # A few isinstance tests cost less than a microsecond; the order follows hardware.py.
        if isinstance(stage, Embed):
            if isinstance(stage.batch, DecodeBatch):
                return (self._embed_decode(stage.batch),)
            return (self._embed_prefill(stage.batch),)
        if isinstance(stage, Layers):
            return (self._layers(stage, *operands),)
        if isinstance(stage, PreAttention):
            return (self._pre_attention(stage, *operands),)
        if isinstance(stage, DeviceAttention):
            return (self._device_attention(stage, *operands),)
        if isinstance(stage, PostAttention):
            return (self._post_attention(stage, *operands),)
        if isinstance(stage, Boundary):
            return self._boundary(stage, operands)
        if isinstance(stage, Head):
            return self._head(stage.batches, operands)
        if isinstance(stage, StagedLayer):
            return (self._staged_layer(stage, *operands),)
        if isinstance(stage, Export):
            return (self._export(stage),)
        return (self._import(stage, *operands),)

    # Into the layers, and through whole spans of them

    def _embed_decode(self, batch: DecodeBatch) -> HiddenHandle:
        rows = smallest_that_holds(self._buckets.rows, len(batch.slots_b))
        # As numpy: what travels with a call costs far less than a transfer of its own.
        packed_b4 = packing.pack_rows(batch, rows=rows, page_size=self._buckets.page_size)
        program = self._programs[ProgramKey("embed_decode", (rows,))]
        x_bd, rows_b4 = program(self._weights.embedding, self._tokens_by_slot, packed_b4)
        return HiddenHandle(x_bd, x_bd, DecodeArrays(rows_b4))

    def _embed_prefill(self, batch: PrefillBatch) -> HiddenHandle:
        num_rows, num_tokens = batch.token_ids_bt.shape
        rows = next(
            rows
            for rows, tokens in self._buckets.chunks
            if tokens == num_tokens and rows >= num_rows
        )
        context_pages = smallest_that_holds(
            self._buckets.context_pages, batch.block_table_bm.shape[1]
        )
        packed = packing.pack_prefill(batch, rows=rows, context_pages=context_pages)
        arrays = PrefillArrays(*jax.device_put(packed, self._device))
        return HiddenHandle(self._look_up(arrays), None, arrays)

    def _look_up(self, arrays: PrefillArrays) -> Array:
        program = self._programs[ProgramKey("embed_prefill", arrays.tokens_bt.shape)]
        return program(self._weights.embedding, arrays.tokens_bt)

    def _layers(self, stage: Layers, hidden: Handle) -> HiddenHandle:
        assert isinstance(hidden, HiddenHandle)
        span = slice(stage.first_layer, stage.first_layer + self._programs.num_layers)
        state = (self._spans[stage.first_layer], tuple(self._pages[span]), hidden.x)
        if isinstance(stage.batch, DecodeBatch):
            is_whole_sweep = self._programs.num_layers == len(self._flat_layers)
            arrays = self._with_blocks(hidden.arrays, stage.batch, is_wanted_once=is_whole_sweep)
            key = _decode_key("layers_decode", arrays)
            x, pages = self._programs[key](*state, arrays)
            x_bd = x
        else:
            arrays = hidden.arrays
            key = _prefill_key("layers_prefill", arrays)
            x, x_bd, pages = self._programs[key](*state, arrays)
        self._pages[span] = pages
        return HiddenHandle(x, x_bd, arrays)

    def _with_blocks(
        self,
        arrays: DecodeArrays | PrefillArrays,
        batch: DecodeBatch,
        *,
        is_wanted_once: bool = False,
    ) -> DecodeArrays:
        """Return what the device's attention needs; packed once, when it is first wanted.

        is_wanted_once: by one call, with which it travels.
        """
        assert isinstance(arrays, DecodeArrays)
        if arrays.blocks_ci is not None:
            return arrays
        rows = len(arrays.rows_b4)
        num_blocks = packing.num_blocks(batch, self._buckets.block_tokens)
        blocks = smallest_that_holds(self._buckets.num_blocks[rows], num_blocks)
        packed_ci = packing.pack_blocks(
            batch, rows=rows, blocks=blocks, page_size=self._buckets.page_size
        )
        if is_wanted_once:
            return arrays._replace(blocks_ci=packed_ci)
        return arrays._replace(blocks_ci=jax.device_put(packed_ci, self._device))

    # Layer by layer

    def _pre_attention(self, stage: PreAttention, hidden: Handle) -> EnteredHandle:
        assert isinstance(hidden, HiddenHandle)
        assert isinstance(hidden.arrays, DecodeArrays)
        program = self._programs[ProgramKey("pre_attention", (len(hidden.x),))]
        state = self._flat_layers[stage.layer]
        qkv_bjh = program(state, hidden.x, hidden.arrays.rows_b4)
        return EnteredHandle(hidden.x, qkv_bjh, hidden.arrays)

    def _device_attention(self, stage: DeviceAttention, entered: Handle) -> DeviceAttendedHandle:
        assert isinstance(entered, EnteredHandle)
        arrays = self._with_blocks(entered.arrays, stage.batch)
        program = self._programs[_decode_key("device_attention", arrays)]
        attended_bnh, self._pages[stage.layer] = program(
            self._pages[stage.layer], entered.qkv_bjh, arrays
        )
        return DeviceAttendedHandle(entered.x, arrays, attended_bnh)

    def _post_attention(self, stage: PostAttention, attended: Handle) -> HiddenHandle:
        assert isinstance(attended, DeviceAttendedHandle | AttendedHandle)
        program = self._programs[ProgramKey("post_attention", (len(attended.x),))]
        state = self._flat_layers[stage.layer]
        x_bd = program(state, attended.x, attended.attended_bnh)
        return HiddenHandle(x_bd, x_bd, attended.arrays)

    def _boundary(self, stage: Boundary, groups: tuple[Handle, ...]) -> tuple[EnteredHandle, ...]:
        rows: list[BoundaryRows] = []
        arrays: list[DecodeArrays] = []
        for group in groups:
            assert isinstance(group, DeviceAttendedHandle | AttendedHandle)
            rows.append(BoundaryRows(group.x, group.attended_bnh, group.arrays.rows_b4))
            arrays.append(group.arrays)
        key = ProgramKey("boundary", tuple(len(group.x_bd) for group in rows))
        left, entered = self._flat_layers[stage.layer - 1 : stage.layer + 1]
        crossed = self._programs[key](left, entered, tuple(rows))
        return tuple(
            EnteredHandle(x_bd, qkv_bjh, of_group)
            for (x_bd, qkv_bjh), of_group in zip(crossed, arrays, strict=True)
        )

    # Heads

    def _head(
        self, batches: tuple[HeadBatch, ...], groups: tuple[Handle, ...]
    ) -> tuple[TokensHandle, ...]:
        """Sample groups together; where they are too many for one head, half of them at a time."""
        groups_bd: list[Array] = []
        for group in groups:
            assert isinstance(group, HiddenHandle)
            assert group.x_bd is not None
            groups_bd.append(group.x_bd)
        if len(groups) == 1:
            return (self._head_of_one(batches[0], groups[0]),)
        assert self._buckets.host is not None
        joint, firsts, num_rows = packing.join_heads(batches)
        head_sizes = self._buckets.host.head_rows
        if num_rows > head_sizes[-1]:
            half = len(groups) // 2
            first_half = self._head(batches[:half], groups[:half])
            return first_half + self._head(batches[half:], groups[half:])
        most_rows = max(map(len, groups_bd))
        rows = smallest_that_holds(head_sizes, max(num_rows, most_rows + 1))
        for x_bd, first in zip(groups_bd, firsts, strict=True):
            program = self._programs[ProgramKey("place", (len(x_bd), rows))]
            self._head_rows_bd[rows] = program(self._head_rows_bd[rows], x_bd, np.int32(first))
        sampled = self._sample(joint, self._head_rows_bd[rows], rows)
        return tuple(
            dataclasses.replace(sampled, rows_i=batch.rows_b + np.int32(first))
            for batch, first in zip(batches, firsts, strict=True)
        )

    def _head_of_one(self, batch: HeadBatch, group: Handle) -> TokensHandle:
        """Sample a group by itself, and score its prompts' tokens where that is wanted."""
        assert isinstance(group, HiddenHandle)
        assert group.x_bd is not None
        if batch.prompt is None:
            return self._sample(batch, group.x_bd, len(group.x_bd))
        next_ids_bt = np.zeros(group.x.shape[:2], np.int32)
        next_ids_bt[: len(batch.prompt.next_ids_bt)] = batch.prompt.next_ids_bt
        program = self._programs.late(ProgramKey("prompt_logprobs", next_ids_bt.shape))
        packed_btc = program(self._weights.norm, self._output_vd, group.x, next_ids_bt)
        packed_btc.copy_to_host_async()
        sampled = self._sample(batch, group.x_bd, len(group.x_bd))
        return dataclasses.replace(sampled, prompt=PromptHandle(packed_btc, batch.prompt))

    def _sample(self, batch: HeadBatch, x_bd: Array, rows: int) -> TokensHandle:
        packed_b9 = packing.pack_head(batch, rows=rows)
        operands = (self._weights.norm, self._output_vd, self._tokens_by_slot, x_bd, packed_b9)
        if batch.modifiers is not None or batch.wants_logprobs:
            return self._sample_modified(batch, operands, rows)
        name = "head_greedy" if batch.is_greedy else "head_sample"
        tokens_b, self._tokens_by_slot = self._programs[ProgramKey(name, (rows,))](*operands)
        tokens_b.copy_to_host_async()
        return TokensHandle(tokens_b, batch.rows_b)

    def _sample_modified(
        self, batch: HeadBatch, operands: tuple[Any, ...], rows: int
    ) -> TokensHandle:
        """Sample rows of which some have their scores modified, or their logprobs reported."""
        num_entries = 0 if batch.modifiers is None else len(batch.modifiers.entries_e)
        name = "head_logprobs" if batch.wants_logprobs else "head_modified"
        key = ProgramKey(name, (rows, entry_bucket(num_entries)))
        modifiers = packing.pack_modifiers(batch, rows=rows, num_entries=key.shape[1])
        program = self._programs.late(key)
        tokens_b, logprobs_bc, self._tokens_by_slot = program(*operands, modifiers)
        for array in (tokens_b, logprobs_bc):
            if array is not None:
                array.copy_to_host_async()
        return TokensHandle(tokens_b, batch.rows_b, logprobs_bc)

    # Prompts bound for the host, and pages that change lanes

    def _staged_layer(self, stage: StagedLayer, hidden: Handle) -> HiddenHandle:
        assert isinstance(hidden, HiddenHandle)
        assert isinstance(hidden.arrays, PrefillArrays)
        assert self._staging is not None
        # The program overwrites its hidden states, or those of a whole sweep's layers would be kept
        # by their handles. Those of the Embed stage are its marker, so layer 0 looks up its own.
        x_btd = hidden.x if stage.layer else self._look_up(hidden.arrays)
        program = self._programs[_prefill_key("staged_layer", hidden.arrays)]
        layer = self._flat_layers[stage.layer]
        x_btd, last_bd, (self._staging,) = program(layer, (self._staging,), x_btd, hidden.arrays)
        return HiddenHandle(x_btd, last_bd, hidden.arrays)

    def _export(self, stage: Export) -> PagesHandle:
        assert self._buckets.host is not None
        host = self._buckets.host
        if stage.from_staging:
            name, sizes, pages = "export_staging", host.staging_pages, self._staging
        else:
            name, sizes, pages = "export", host.move_pages, self._pages[stage.layer]
        page_ids_i = self._page_ids(stage.pages_i, sizes)
        pages_ik2zh = self._programs[ProgramKey(name, page_ids_i.shape)](pages, page_ids_i)
        pages_ik2zh.copy_to_host_async()
        return PagesHandle(pages_ik2zh)

    def _import(self, stage: Import, read: Handle) -> ImportedHandle:
        assert self._buckets.host is not None
        assert isinstance(read, MovedHandle)
        host, pages_ik2zh = self._buckets.host, read.result.result()
        if stage.to_staging:
            page_ids_i = self._page_ids(stage.pages_i, host.staging_pages)
            program = self._programs.late(ProgramKey("import_staging", page_ids_i.shape))
            marker, self._staging = program(self._staging, pages_ik2zh, page_ids_i)
        else:
            page_ids_i = self._page_ids(stage.pages_i, host.move_pages)
            program = self._programs[ProgramKey("import", page_ids_i.shape)]
            marker, self._pages[stage.layer] = program(
                self._pages[stage.layer], pages_ik2zh, page_ids_i
            )
        return ImportedHandle(marker)

    def _page_ids(
        self, pages_i: Int32[np.ndarray, "i"], sizes: tuple[int, ...]
    ) -> Int32[np.ndarray, "j"]:
        return packing.pack_page_ids(pages_i, size=smallest_that_holds(sizes, len(pages_i)))


def _decode_key(stage: str, arrays: DecodeArrays) -> ProgramKey:
    assert arrays.blocks_ci is not None
    return ProgramKey(stage, (len(arrays.rows_b4), len(arrays.blocks_ci)))


def _prefill_key(stage: str, arrays: DecodeArrays | PrefillArrays) -> ProgramKey:
    assert isinstance(arrays, PrefillArrays)
    return ProgramKey(stage, (*arrays.tokens_bt.shape, arrays.rows_bi.shape[1] - 2))
