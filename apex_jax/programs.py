"""The executables: every stage compiled ahead of time for every bucket.

Owns lowering, compiling in parallel, and the choice of the executable a batch runs in. Knows shapes
only, so it can work before any weight is loaded. Called by the xla backend.
"""

import concurrent.futures
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from apex_jax import kv_cache, stages
from apex_jax.buckets import PAGES_PER_BLOCK, Buckets
from apex_jax.config import ConfigError, LlamaConfig
from apex_jax.models import weights
from apex_jax.packing import DecodeArrays, PrefillArrays

MAX_LAYERS_PER_PROGRAM = 11  # compile time grows with it, dispatches per sweep shrink


@dataclass(frozen=True)
class ProgramKey:
    """A stage and the bucket it is compiled for."""

    stage: str
    shape: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.stage}[{'x'.join(map(str, self.shape))}]"


class Programs:
    """All executables of one model on one device.

    Attributes: compile_sec by program, temp_bytes (the most scratch memory any of them takes).
    """

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
    ):
        self.buckets = buckets
        self.first_layers = range(0, model.num_layers, num_layers)
        self.num_layers = num_layers
        self.compile_sec: dict[ProgramKey, float] = {}
        self._executables: dict[ProgramKey, Any] = {}
        self._model, self._dtype = model, dtype
        self._num_pages, self._num_slots = num_pages, num_slots
        self._sharding = jax.sharding.SingleDeviceSharding(device)
        self._precision = None if precision == "default" else precision

    def __getitem__(self, key: ProgramKey) -> Any:
        return self._executables[key]

    @property
    def temp_bytes(self) -> int:
        """The most scratch memory that any program takes."""
        analyses = (program.memory_analysis() for program in self._executables.values())
        return max((one.temp_size_in_bytes for one in analyses if one is not None), default=0)

    def hlo_text(self, key: ProgramKey) -> str:
        """Return the optimised HLO of a program."""
        return self._executables[key].as_text()

    def compile(self, num_threads: int, on_progress: Callable[[int, int, str], None]) -> None:
        """Compile everything; `on_progress(done, total, program)` follows each.

        An exception, a signal's among them, drops what has not begun to compile.
        """

        def build(key: ProgramKey, lowered: Any) -> tuple[ProgramKey, Any, float]:
            start_sec = time.perf_counter()
            executable = lowered.compile()
            return key, executable, time.perf_counter() - start_sec

        pool = concurrent.futures.ThreadPoolExecutor(num_threads)
        try:
            futures = [pool.submit(build, key, lowered) for key, lowered in self._lower()]
            for done, future in enumerate(concurrent.futures.as_completed(futures), start=1):
                key, executable, seconds = future.result()
                self._executables[key] = executable
                self.compile_sec[key] = seconds
                on_progress(done, len(futures), str(key))
        finally:
            pool.shutdown(wait=False, cancel_futures=True)

    def _lower(self) -> Iterator[tuple[ProgramKey, jax.stages.Lowered]]:
        """Trace each stage for each bucket."""
        model, buckets = self._model, self.buckets
        abstract = weights.abstract(model, self._dtype)
        layer_graph, norm_graph = weights.graphs(model, self._dtype)
        layers = abstract.layers[: self.num_layers]
        page_shapes = (model, self._num_pages, buckets.page_size, self._dtype)
        pages = (kv_cache.abstract_layer_pages(*page_shapes),) * self.num_layers
        tokens_by_slot = _ints(self._num_slots)
        output_vd = abstract.embedding if abstract.output is None else abstract.output

        embed_decode = jax.jit(stages.embed_decode)
        embed_prefill = jax.jit(stages.embed_prefill)
        layers_decode = jax.jit(partial(stages.layers_decode, layer_graph), donate_argnums=1)
        layers_prefill = {
            rows: jax.jit(
                partial(stages.layers_prefill, layer_graph, buckets.head_rows(rows)),
                donate_argnums=1,
            )
            for rows, _ in buckets.chunks
        }
        heads = {
            is_greedy: jax.jit(
                partial(stages.head, norm_graph, is_greedy=is_greedy), donate_argnums=2
            )
            for is_greedy in (True, False)
        }

        def lower(
            stage: str, shape: tuple[int, ...], function: Any, *arguments: Any
        ) -> tuple[ProgramKey, jax.stages.Lowered]:
            placed = jax.tree.map(
                lambda one: jax.ShapeDtypeStruct(one.shape, one.dtype, sharding=self._sharding),
                arguments,
            )
            with jax.default_matmul_precision(self._precision):
                return ProgramKey(stage, shape), function.lower(*placed)

        for rows, tokens in buckets.chunks:
            x_btd = jax.ShapeDtypeStruct((rows, tokens, model.d_model), self._dtype)
            tokens_bt = _ints(rows, tokens)
            yield lower(
                "embed_prefill", (rows, tokens), embed_prefill, abstract.embedding, tokens_bt
            )
            for context in buckets.context_pages:
                arrays = PrefillArrays(tokens_bt, _ints(rows, 2 + context))
                shape = (rows, tokens, context)
                yield lower(
                    "layers_prefill", shape, layers_prefill[rows], layers, pages, x_btd, arrays
                )
        for rows in buckets.rows:
            x_bd = jax.ShapeDtypeStruct((rows, model.d_model), self._dtype)
            for blocks in buckets.num_blocks[rows]:
                arrays = DecodeArrays(_ints(rows, 4), _ints(blocks, 2 + PAGES_PER_BLOCK))
                shape = (rows, blocks)
                yield lower("layers_decode", shape, layers_decode, layers, pages, x_bd, arrays)
            yield lower(
                "embed_decode",
                (rows,),
                embed_decode,
                abstract.embedding,
                tokens_by_slot,
                _ints(rows, 4),
            )
            for is_greedy, function in heads.items():
                yield lower(
                    "head_greedy" if is_greedy else "head_sample",
                    (rows,),
                    function,
                    abstract.norm,
                    output_vd,
                    tokens_by_slot,
                    x_bd,
                    _ints(rows, 8),
                )


def span_of_layers(num_layers: int, requested: int | None) -> int:
    """Return how many layers a program takes: the largest divisor of num_layers up to 11."""
    if requested is None:
        limit = MAX_LAYERS_PER_PROGRAM
        return max(span for span in range(1, limit + 1) if num_layers % span == 0)
    if num_layers % requested:
        raise ConfigError(
            f"--config.compile.layers_per_program is {requested}; it must divide the model's "
            f"{num_layers} layers"
        )
    return requested


def _ints(*shape: int) -> Any:  # it stands where arrays are annotated
    return jax.ShapeDtypeStruct(shape, jnp.int32)
