"""Every stage traced for every bucket: what there is to compile.

Owns the shapes of the stages' arguments and which of them a program may overwrite. A host lane adds
the stages that enter and leave one layer, stage prompts and move pages; without one none of those
exists. Called by programs.py.
"""

from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from apex_jax import kv_cache, stages
from apex_jax.buckets import PAGES_PER_BLOCK, Buckets, HostBuckets
from apex_jax.config import LlamaConfig
from apex_jax.models import weights
from apex_jax.packing import DecodeArrays, ModifierArrays, PrefillArrays


class ProgramKey(NamedTuple):
    """A stage and the bucket it is compiled for; a dataclass takes ten times as long to look up."""

    stage: str
    shape: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.stage}[{'x'.join(map(str, self.shape))}]"


Traced = tuple[ProgramKey, jax.stages.Lowered]


class Lowering:
    """The stages of one model on one device; num_layers are those of a `layers` program."""

    def __init__(
        self,
        model: LlamaConfig,
        *,
        dtype: np.dtype,
        buckets: Buckets,
        num_pages: int,
        num_slots: int,
        num_layers: int,
        device: jax.Device,
        precision: str,
        has_native_pages: bool = False,
    ):
        self._has_native_pages = has_native_pages
        self._model, self._dtype, self._buckets = model, dtype, buckets
        self._num_layers = num_layers
        self._sharding = jax.sharding.SingleDeviceSharding(device)
        self._precision = None if precision == "default" else precision
        self._weights = weights.abstract(model, dtype)
        _, self._norm_graph = weights.graphs(model, dtype)
        self._make_layer = weights.layer_maker(model, dtype)
        self._layer = tuple(jax.tree.leaves(self._weights.layers[0]))
        self._pages = self._abstract_pages(num_pages)
        self._tokens_by_slot = _ints(num_slots)

    def all_stages(self) -> Iterator[Traced]:
        """Trace each stage for each bucket."""
        yield from self._embed()
        yield from self._layers()
        yield from self._heads()
        if self._buckets.host is not None:
            yield from self._single_layers()
            yield from self._joint_heads()
            yield from self._staged_layers(self._buckets.host)
            yield from self._moves(self._buckets.host)

    def _embed(self) -> Iterator[Traced]:
        embed_prefill = jax.jit(stages.embed_prefill)
        embed_decode = jax.jit(stages.embed_decode)
        embedding_vd = self._weights.embedding
        for chunk in self._buckets.chunks:
            yield self._trace("embed_prefill", chunk, embed_prefill, embedding_vd, _ints(*chunk))
        for rows in self._buckets.rows:
            arguments = (embedding_vd, self._tokens_by_slot, _ints(rows, 4))
            yield self._trace("embed_decode", (rows,), embed_decode, *arguments)

    def _layers(self) -> Iterator[Traced]:
        layers = self._layer * self._num_layers
        pages = (self._pages,) * self._num_layers
        decode = jax.jit(partial(stages.layers_decode, self._make_layer), donate_argnums=1)
        for rows, blocks, arrays in self._decode_batches():
            arguments = (layers, pages, self._floats(rows, self._model.d_model), arrays)
            yield self._trace("layers_decode", (rows, blocks), decode, *arguments)
        for shape, prefill, x_btd, arrays in self._prefill_batches(donated=(1,)):
            yield self._trace("layers_prefill", shape, prefill, layers, pages, x_btd, arrays)

    def _heads(self) -> Iterator[Traced]:
        for rows in self._buckets.rows:
            yield from self._head(rows)

    def _head(self, rows: int) -> Iterator[Traced]:
        for name, is_greedy in (("head_greedy", True), ("head_sample", False)):
            function = jax.jit(
                partial(stages.head, self._norm_graph, is_greedy=is_greedy), donate_argnums=2
            )
            yield self._trace(name, (rows,), function, *self._head_arguments(rows))

    def late(self, key: ProgramKey) -> jax.stages.Lowered:
        """Trace a stage that few jobs need.

        head_modified, head_logprobs: by rows and entries. prompt_logprobs: by the chunk's shape.
        import_staging: by pages.
        """
        if key.stage == "import_staging":
            assert self._buckets.host is not None
            plane = self._abstract_pages(self._buckets.host.num_staging_pages)
            return self._import(key.stage, key.shape[0], plane)[1]
        if key.stage == "prompt_logprobs":
            return self._prompt_logprobs(key)
        rows, num_entries = key.shape
        function = jax.jit(
            partial(
                stages.modified_head,
                self._norm_graph,
                with_logprobs=key.stage == "head_logprobs",
            ),
            donate_argnums=2,
        )
        modifiers = ModifierArrays(_ints(rows, 4), _ints(num_entries, 6))
        arguments = (*self._head_arguments(rows), modifiers)
        return self._trace(key.stage, key.shape, function, *arguments)[1]

    def _prompt_logprobs(self, key: ProgramKey) -> jax.stages.Lowered:
        # As many tokens at once as the largest head has rows: no more scratch than that takes.
        score = partial(stages.prompt_logprobs, self._norm_graph, self._buckets.rows[-1])
        norm, output_vd, *_ = self._head_arguments(self._buckets.rows[0])
        x_btd, next_ids_bt = self._floats(*key.shape, self._model.d_model), _ints(*key.shape)
        arguments = (norm, output_vd, x_btd, next_ids_bt)
        return self._trace(key.stage, key.shape, jax.jit(score), *arguments)[1]

    def _head_arguments(self, rows: int) -> tuple[Any, ...]:
        own = self._weights.output
        output_vd = self._weights.embedding if own is None else own
        x_bd, packed_b9 = self._floats(rows, self._model.d_model), _ints(rows, 9)
        return self._weights.norm, output_vd, self._tokens_by_slot, x_bd, packed_b9

    # With a host lane

    def _single_layers(self) -> Iterator[Traced]:
        """Into a layer, attention on the device, out of it, and out of one and into the next."""
        layer = self._layer
        enter = jax.jit(partial(stages.pre_attention, self._make_layer))
        leave = jax.jit(partial(stages.post_attention, self._make_layer))
        for rows in self._buckets.rows:
            x_bd, attended_bnh, rows_b4 = self._boundary_rows(rows)
            yield self._trace("pre_attention", (rows,), enter, layer, x_bd, rows_b4)
            yield self._trace("post_attention", (rows,), leave, layer, x_bd, attended_bnh)
        attend = jax.jit(stages.device_attention, donate_argnums=0)
        for rows, blocks, arrays in self._decode_batches():
            heads = self._model.num_heads + 2 * self._model.num_kv_heads
            qkv_bjh = self._floats(rows, heads, self._model.head_dim)
            arguments = (self._pages, qkv_bjh, arrays)
            yield self._trace("device_attention", (rows, blocks), attend, *arguments)
        cross = jax.jit(partial(stages.boundary, self._make_layer))
        for shape in self._buckets.boundaries:
            groups = tuple(self._boundary_rows(rows) for rows in shape)
            yield self._trace("boundary", shape, cross, layer, layer, groups)

    def _joint_heads(self) -> Iterator[Traced]:
        place = jax.jit(stages.place, donate_argnums=0)
        for rows, head_rows in self._buckets.placements:
            width = self._model.d_model
            arguments = (self._floats(head_rows, width), self._floats(rows, width), _ints())
            yield self._trace("place", (rows, head_rows), place, *arguments)
        assert self._buckets.host is not None
        for rows in set(self._buckets.host.head_rows) - set(self._buckets.rows):
            yield from self._head(rows)

    def _staged_layers(self, host: HostBuckets) -> Iterator[Traced]:
        """A layer of prefill over the staging plane; hidden states are updated in place too."""
        layer, plane = self._layer, (self._abstract_pages(host.num_staging_pages),)
        for shape, prefill, x_btd, arrays in self._prefill_batches(donated=(1, 2)):
            yield self._trace("staged_layer", shape, prefill, layer, plane, x_btd, arrays)

    def _moves(self, host: HostBuckets) -> Iterator[Traced]:
        export = jax.jit(stages.export_pages)
        plane = self._abstract_pages(host.num_staging_pages)
        for size in host.staging_pages:
            yield self._trace("export_staging", (size,), export, plane, _ints(size))
        for size in host.move_pages:
            yield self._trace("export", (size,), export, self._pages, _ints(size))
            yield self._import("import", size, self._pages)

    def _import(self, stage: str, size: int, pages: kv_cache.LayerPages) -> Traced:
        _, kv_heads, page_size = pages.shape
        pages_ik2zh = self._floats(size, kv_heads, 2, page_size, self._model.head_dim)
        import_ = jax.jit(stages.import_pages, donate_argnums=0)
        return self._trace(stage, (size,), import_, pages, pages_ik2zh, _ints(size))

    # Shapes

    def _decode_batches(self) -> Iterator[tuple[int, int, DecodeArrays]]:
        for rows, sizes in self._buckets.num_blocks.items():
            for blocks in sizes:
                arrays = DecodeArrays(_ints(rows, 4), _ints(blocks, 2 + PAGES_PER_BLOCK))
                yield rows, blocks, arrays

    def _prefill_batches(
        self, donated: tuple[int, ...]
    ) -> Iterator[tuple[tuple[int, int, int], Any, Any, PrefillArrays]]:
        """Each shape of a prefill: its function, hidden states and arrays."""
        for rows, tokens in self._buckets.chunks:
            head_rows = self._buckets.head_rows(rows)
            prefill = jax.jit(
                partial(stages.layers_prefill, self._make_layer, head_rows), donate_argnums=donated
            )
            x_btd = self._floats(rows, tokens, self._model.d_model)
            for context in self._buckets.context_pages:
                arrays = PrefillArrays(_ints(rows, tokens), _ints(rows, 2 + context))
                yield (rows, tokens, context), prefill, x_btd, arrays

    def _boundary_rows(self, rows: int) -> stages.BoundaryRows:
        model = self._model
        return stages.BoundaryRows(
            self._floats(rows, model.d_model),
            self._floats(rows, model.num_heads, model.head_dim),
            _ints(rows, 4),
        )

    def _abstract_pages(self, num_pages: int) -> kv_cache.LayerPages:
        page_size = self._buckets.page_size
        return kv_cache.abstract_layer_pages(
            self._model, num_pages, page_size, self._dtype, is_native=self._has_native_pages
        )

    def _floats(self, *shape: int) -> Any:  # it stands where arrays are annotated
        return jax.ShapeDtypeStruct(shape, self._dtype)

    def _trace(self, stage: str, shape: tuple[int, ...], function: Any, *arguments: Any) -> Traced:
        placed = jax.tree.map(
            lambda one: jax.ShapeDtypeStruct(one.shape, one.dtype, sharding=self._sharding),
            arguments,
        )
        with jax.default_matmul_precision(self._precision):
            return ProgramKey(stage, shape), function.lower(*placed)


def _ints(*shape: int) -> Any:
    return jax.ShapeDtypeStruct(shape, jnp.int32)
