"""Chains of stages or jobs that are run to be timed, over a backend's verbs.

Owns what has to follow what so that a chain's time is that of its links. Each link takes the result
of the one before where it can, because a CPU that stands in for a device runs independent programs
side by side; where it cannot, it is waited for. Layers take turns, so that weights and KV come from
memory as in a sweep. Called by the profiler. Imports no jax.
"""

from collections.abc import Callable

import numpy as np

from apex_jax.hardware import (
    Backend,
    Boundary,
    DeviceAttention,
    Embed,
    Export,
    Handle,
    Head,
    HostAttention,
    Import,
    Layers,
    PostAttention,
    PreAttention,
    ReadPages,
    StagedLayer,
    WritePages,
)
from apex_jax.plan import DecodeBatch, HeadBatch, PrefillBatch
from apex_jax.profiling.batches import Capacity

TIMEOUT_SEC = 120.0

Chain = Callable[[int], float]  # runs so many links, and returns the seconds of all
# Link i, from what the chain began with and what the link before it yielded.
Link = Callable[[int, Handle, Handle], Handle]


class StageChains:
    """Chains over one backend."""

    def __init__(self, backend: Backend, capacity: Capacity):
        self._backend = backend
        self._num_layers = capacity.num_layers
        self._first_layers = range(0, capacity.num_layers, capacity.span)

    def wait(self, handle: Handle) -> Handle:
        """Return a handle once it is ready; TimeoutError where that takes too long."""
        if self._backend.wait_any([handle], self._backend.now() + TIMEOUT_SEC) is None:
            raise TimeoutError(f"a stage took more than {TIMEOUT_SEC:g} s when it was measured")
        return handle

    def now(self) -> float:
        """Return seconds on the backend's clock."""
        return self._backend.now()

    # What chains begin with

    def embedded(self, batch: DecodeBatch | PrefillBatch) -> Handle:
        """Return hidden states before layer 0."""
        return self._backend.enqueue(Embed(batch))[0]

    def enter(self, batch: DecodeBatch) -> Handle:
        """Return rows that have entered layer 0."""
        return self.wait(self._backend.enqueue(PreAttention(0), self.embedded(batch))[0])

    def attend(self, batch: DecodeBatch) -> Handle:
        """Return rows that the device has attended to."""
        return self.wait(self._backend.enqueue(DeviceAttention(batch, 0), self.enter(batch))[0])

    def attend_on_host(self, batch: DecodeBatch) -> Handle:
        """Return rows that the host has attended to."""
        return self.wait(self.start_job(batch, 0, self.enter(batch)))

    def start_program(
        self, batch: DecodeBatch | PrefillBatch, index: int, hidden: Handle
    ) -> Handle:
        """Start one of the programs for whole layers, in turn."""
        first_layer = self._first_layers[index % len(self._first_layers)]
        return self._backend.enqueue(Layers(batch, first_layer), hidden)[0]

    def start_job(self, batch: DecodeBatch, index: int, entered: Handle) -> Handle:
        """Start the host's attention of one of the layers, in turn."""
        job = HostAttention(cohort_id=0, layer=index % self._num_layers, batch=batch)
        return self._backend.submit_host(job, entered)

    # Device stages

    def embed(self, batch: DecodeBatch | PrefillBatch) -> Chain:
        return self._chain(
            lambda: self.embedded(batch), lambda _index, _first, _previous: self.embedded(batch)
        )

    def layers(self, batch: DecodeBatch | PrefillBatch) -> Chain:
        return self._chain(
            lambda: self.embedded(batch),
            lambda index, _, hidden: self.start_program(batch, index, hidden),
        )

    def staged_layer(self, batch: PrefillBatch) -> Chain:
        """Layers of a prompt bound for the host, behind layer 0, which also looks up its tokens."""
        num_others = self._num_layers - 1

        def link(index: int, _: Handle, hidden: Handle) -> Handle:
            layer = 1 + index % num_others if num_others else 0
            return self._backend.enqueue(StagedLayer(batch, layer), hidden)[0]

        return self._chain(
            lambda: self._backend.enqueue(StagedLayer(batch, 0), self.embedded(batch))[0], link
        )

    def attention(self, batch: DecodeBatch) -> Chain:
        """Attention alone, in one layer: each link updates the pages of the one before."""
        return self._chain(
            lambda: self.enter(batch),
            lambda _, entered, __: self._backend.enqueue(DeviceAttention(batch, 0), entered)[0],
        )

    def attention_and_boundary(self, batch: DecodeBatch, *riding: Handle) -> Chain:
        """A layer of decode rows. riding: a cohort's attended rows, in the same boundary.

        It ends with attention: of two groups' rows only the last are sure to be waited for soon.
        """
        return self._chain(
            lambda: self.attend(batch),
            lambda index, _, attended: self._layer_of_rows(batch, index, attended, *riding),
        )

    def into_and_out_of_layers(self, batch: DecodeBatch) -> Chain:
        """A layer in three stages: into it, attention, out of it."""

        def link(index: int, _: Handle, hidden: Handle) -> Handle:
            layer = index % self._num_layers
            (entered,) = self._backend.enqueue(PreAttention(layer), hidden)
            (attended,) = self._backend.enqueue(DeviceAttention(batch, layer), entered)
            return self._backend.enqueue(PostAttention(layer), attended)[0]

        return self._chain(lambda: self.embedded(batch), link)

    def lone_boundaries(self, attended: Handle) -> Chain:
        """Boundaries of the same rows, waited for one by one."""
        return self._chain(
            lambda: attended,
            lambda index, _first, _previous: self.wait(
                self._cross(self._layer(index) + 1, attended)
            ),
        )

    def lone_entries(self, batch: DecodeBatch) -> Chain:
        """The same rows into layers, waited for one by one."""

        def link(index: int, hidden: Handle, _: Handle) -> Handle:
            layer = index % self._num_layers
            return self.wait(self._backend.enqueue(PreAttention(layer), hidden)[0])

        return self._chain(lambda: self.embedded(batch), link)

    def lone_exits(self, attended: Handle) -> Chain:
        """The same rows out of layers, waited for one by one."""

        def link(index: int, *_: Handle) -> Handle:
            layer = index % self._num_layers
            return self.wait(self._backend.enqueue(PostAttention(layer), attended)[0])

        return self._chain(lambda: attended, link)

    def head(self, batches: tuple[DecodeBatch, ...], heads: tuple[HeadBatch, ...]) -> Chain:
        """Heads of the same rows: each link updates the tokens of the one before."""
        hidden = [self.embedded(batch) for batch in batches]
        return self._chain(
            lambda: hidden[-1],
            lambda _index, _first, _previous: self._backend.enqueue(Head(heads), *hidden)[-1],
        )

    def device_copy(self, num_pages: int) -> Chain:
        """Imports of the same pages into one layer, which they update."""
        ids = np.arange(num_pages, dtype=np.int32)
        return self._chain(
            lambda: self._backend.submit_host(ReadPages(0, ids)),
            lambda _, read, __: self._backend.enqueue(Import(0, ids), read)[0],
        )

    # The host, and the ways there and back

    def host_attention(self, batch: DecodeBatch) -> Chain:
        """Jobs on the same operand, which has arrived; their results go on their way."""
        entered = self.enter(batch)
        return self._chain(
            lambda: self.start_job(batch, 0, entered),
            lambda index, _first, _previous: self.start_job(batch, index, entered),
        )

    def round_trip(self, batch: DecodeBatch) -> Chain:
        """A cohort's layer: to the host, attention there, and back into a boundary of its own."""

        def link(index: int, _: Handle, entered: Handle) -> Handle:
            layer = self._layer(index)
            return self._cross(layer + 1, self.start_job(batch, layer, entered))

        return self._chain(lambda: self.enter(batch), link)

    def host_copy(self, num_pages: int) -> Chain:
        """Pages written, out of the same operand, and read in turn."""
        ids = np.arange(num_pages, dtype=np.int32)

        def link(index: int, exported: Handle, _: Handle) -> Handle:
            layer = index // 2 % self._num_layers
            if index % 2:
                return self._backend.submit_host(ReadPages(layer, ids))
            return self._backend.submit_host(WritePages(layer, ids), exported)

        def start() -> Handle:
            (exported,) = self._backend.enqueue(Export(0, ids, from_staging=False))
            self.wait(self._backend.submit_host(WritePages(0, ids), exported))
            return exported

        return self._chain(start, link)

    def moves(self, num_pages: int) -> Chain:
        """A layer's pages out of the device's pool into the host's, waited for one by one."""
        ids = np.arange(num_pages, dtype=np.int32)

        def move(index: int) -> Handle:
            layer = index % self._num_layers
            (exported,) = self._backend.enqueue(Export(layer, ids, from_staging=False))
            return self.wait(self._backend.submit_host(WritePages(layer, ids), exported))

        return self._chain(lambda: move(0), lambda index, _first, _previous: move(index))

    def dispatches(self, batch: DecodeBatch) -> Chain:
        """Python's time for two stages a link; the device works on behind."""

        def run(num_links: int) -> float:
            handle = self.attend(batch)
            begin_sec = self._backend.now()
            for index in range(num_links):
                handle = self._layer_of_rows(batch, index, handle)
            seconds = self._backend.now() - begin_sec
            self.wait(handle)
            return seconds

        return run

    def _chain(self, start: Callable[[], Handle], link: Link) -> Chain:
        def run(num_links: int) -> float:
            first = handle = self.wait(start())
            begin_sec = self._backend.now()
            for index in range(num_links):
                handle = link(index, first, handle)
            self.wait(handle)
            return self._backend.now() - begin_sec

        return run

    def _layer(self, index: int) -> int:
        """Return a layer with one behind it, in turn; a single layer has none."""
        return index % max(1, self._num_layers - 1)

    def _layer_of_rows(
        self, batch: DecodeBatch, index: int, attended: Handle, *riding: Handle
    ) -> Handle:
        layer = self._layer(index) + 1
        entered = self._cross(layer, attended, *riding)
        return self._backend.enqueue(DeviceAttention(batch, layer % self._num_layers), entered)[0]

    def _cross(self, layer: int, *attended: Handle) -> Handle:
        """Return the first group's rows behind a boundary."""
        if layer < self._num_layers:
            return self._backend.enqueue(Boundary(layer), *attended)[0]
        (hidden,) = self._backend.enqueue(PostAttention(0), attended[0])
        return self._backend.enqueue(PreAttention(0), hidden)[0]
