"""What a profile measures: chains for an engine's own buckets, and what they come to by stage.

Owns which chains there are, and the arithmetic that takes them apart: a boundary is timed together
with the attention that its rows need, a transfer together with the rest of a round trip. Called by
the profiler. Imports no jax.
"""

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from apex_jax.buckets import Buckets
from apex_jax.hardware import Handle
from apex_jax.plan import DecodeBatch
from apex_jax.profiling.batches import (
    Capacity,
    cohort_sizes,
    decode_batch,
    fullest,
    head_batch,
    host_lengths,
    prompt_batch,
    token_batch,
)
from apex_jax.profiling.chains import Chain, StageChains
from apex_jax.profiling.table import Shape

# Chains whose links are one stage or job, under its name in measured_times.py.
_PLAIN = (
    *("embed", "layers", "prefill", "staged_layer", "head_greedy", "head_sample", "device_copy"),
    *("host_attention", "host_copy"),
)


class Name(NamedTuple):
    """What a link of a chain is, and for which buckets."""

    link: str
    shape: Shape


class Cases:
    """The chains of one engine.

    is_thorough: for all buckets, and not just the first and the last of each kind, or of prompts
    the smallest.
    """

    def __init__(
        self, chains: StageChains, shapes: Buckets, capacity: Capacity, *, is_thorough: bool
    ):
        self._chains, self._shapes, self._capacity = chains, shapes, capacity
        assert shapes.host is not None
        self._host, self._is_thorough = shapes.host, is_thorough

    def grid(self) -> Iterator[tuple[Name, Chain]]:
        """Yield the chains that a table rests on."""
        yield from self._embeds_and_heads()
        yield from self._decode_rows()
        yield from self._prompts()
        yield from self._cohorts()
        yield from self._pages()

    @property
    def largest(self) -> tuple[DecodeBatch, DecodeBatch]:
        """The device's largest batch, and the host's."""
        on_device = [batch for _, batch in self._device_batches()][-1]
        rows, length = [*self._host_points()][-1]
        return on_device, self._on_host([length] * rows)

    def _pick(self, sizes: Sequence[int]) -> Sequence[int]:
        return sizes if self._is_thorough else sorted({sizes[0], sizes[-1]})

    def _embeds_and_heads(self) -> Iterator[tuple[Name, Chain]]:
        for rows in self._pick(self._shapes.rows):
            yield Name("embed", (rows,)), self._chains.embed(token_batch(rows))
            yield from self._heads(rows, (rows,))
        groups = (self._shapes.device_rows[-1], self._host.cohort_rows[-1])
        yield from self._heads(self._host.head_rows[-1], groups)

    def _heads(self, rows: int, groups: tuple[int, ...]) -> Iterator[tuple[Name, Chain]]:
        batches = tuple(token_batch(count) for count in groups)
        for link, is_greedy in (("head_greedy", True), ("head_sample", False)):
            heads = tuple(head_batch(count, is_greedy=is_greedy) for count in groups)
            yield Name(link, (rows,)), self._chains.head(batches, heads)

    def _device_batches(self) -> Iterator[tuple[tuple[int, int], DecodeBatch]]:
        """Yield (rows, blocks) buckets that a batch can have, and the fullest such batch."""
        shapes, capacity = self._shapes, self._capacity
        for rows in self._pick(shapes.device_rows):
            for blocks in self._pick(shapes.num_blocks[rows]):
                lengths = fullest(rows, blocks, shapes, capacity)
                if lengths is not None:
                    batch = decode_batch(lengths, capacity.num_pages, shapes.page_size)
                    yield (rows, blocks), batch

    def _decode_rows(self) -> Iterator[tuple[Name, Chain]]:
        chains, smallest = self._chains, dict[int, DecodeBatch]()
        for shape, batch in self._device_batches():
            yield Name("layers", shape), chains.layers(batch)
            yield Name("attention_and_boundary", shape), chains.attention_and_boundary(batch)
            smallest.setdefault(shape[0], batch)
        for rows, batch in smallest.items():
            yield Name("attention", (rows,)), chains.attention(batch)
            name = Name("into_and_out_of_layers", (rows,))
            yield name, chains.into_and_out_of_layers(batch)
            yield from self._lone_stages(rows, batch, chains.attend(batch))
            for cohort, lengths in self._shallow_cohorts():
                riding = chains.attend_on_host(self._on_host(lengths))
                name = Name("attention_and_merge", (rows, cohort))
                yield name, chains.attention_and_boundary(batch, riding)

    def _lone_stages(
        self, rows: int, batch: DecodeBatch, attended: Handle
    ) -> Iterator[tuple[Name, Chain]]:
        chains = self._chains
        yield Name("lone_boundaries", (rows,)), chains.lone_boundaries(attended)
        yield Name("lone_entries", (rows,)), chains.lone_entries(batch)
        yield Name("lone_exits", (rows,)), chains.lone_exits(attended)

    def _prompts(self) -> Iterator[tuple[Name, Chain]]:
        chains, capacity, page_size = self._chains, self._capacity, self._shapes.page_size
        chunks = sorted(self._shapes.chunks, key=math.prod)
        # The largest take long, and are little more than so many of the smaller ones.
        for rows, tokens in chunks if self._is_thorough else chunks[:2]:
            for context in self._pick(self._shapes.context_pages):
                on_device, staged = (
                    prompt_batch((rows, tokens), context, num_pages, page_size)
                    for num_pages in (capacity.num_pages, self._host.num_staging_pages)
                )
                shape = (rows * tokens, rows, context)
                yield Name("prefill", shape), chains.layers(on_device)
                yield Name("staged_layer", shape), chains.staged_layer(staged)
            first = (self._shapes.context_pages[0], capacity.num_pages, page_size)
            chain = chains.embed(prompt_batch((rows, tokens), *first))
            yield Name("embed", (rows * tokens,)), chain

    def _cohorts(self) -> Iterator[tuple[Name, Chain]]:
        chains, on_device = self._chains, self._pick(self._shapes.device_rows)
        for cohort, lengths in self._shallow_cohorts():
            batch = self._on_host(lengths)
            yield Name("round_trip", (cohort, len(lengths), lengths[0])), chains.round_trip(batch)
            if cohort not in on_device:
                yield from self._lone_stages(cohort, batch, chains.attend_on_host(batch))
        for rows, length in self._host_points():
            batch = self._on_host([length] * rows)
            yield Name("host_attention", (rows, length)), chains.host_attention(batch)

    def _host_points(self) -> Iterator[tuple[int, int]]:
        for rows in sorted({1, *(len(lengths) for _, lengths in self._shallow_cohorts())}):
            for length in self._pick(host_lengths(rows, self._shapes, self._capacity)):
                yield rows, length

    def _shallow_cohorts(self) -> Iterator[tuple[int, list[int]]]:
        """Yield cohort buckets, and short lengths of rows that fill them."""
        sizes = cohort_sizes(self._shapes, self._capacity)
        for cohort in self._pick(list(sizes)):
            rows = sizes[cohort]
            yield cohort, [host_lengths(rows, self._shapes, self._capacity)[0]] * rows

    def _on_host(self, lengths: Sequence[int]) -> DecodeBatch:
        return decode_batch(lengths, self._capacity.num_host_pages, self._shapes.page_size)

    def _pages(self) -> Iterator[tuple[Name, Chain]]:
        most = min(self._capacity.num_pages, self._capacity.num_host_pages)
        for size in self._pick(self._host.move_pages):
            yield Name("device_copy", (size,)), self._chains.device_copy(min(size, most))
            yield Name("host_copy", (size,)), self._chains.host_copy(min(size, most))
            yield Name("moves", (size,)), self._chains.moves(min(size, most))


def take_apart(links: Mapping[Name, float]) -> dict[str, dict[Shape, float]]:
    """Return seconds by stage and bucket from the seconds of each chain's links.

    Stages of their own: what measured_times.MeasuredTimes looks up.
    """
    stages: dict[str, dict[Shape, float]] = defaultdict(dict)
    by_link: dict[str, dict[Shape, float]] = defaultdict(dict)
    for name, seconds in links.items():
        by_link[name.link][name.shape] = seconds
        if name.link in _PLAIN:
            stages[name.link][name.shape] = seconds
    waiting_sec = _take_layers_apart(by_link, stages)
    for (rows,), lone_sec in by_link["lone_boundaries"].items():
        if (rows,) not in stages["boundary"]:
            stages["boundary"][rows,] = max(lone_sec - waiting_sec, 0.0)
            for stage, link in (
                ("pre_attention", "lone_entries"),
                ("post_attention", "lone_exits"),
            ):
                stages[stage][rows,] = max(by_link[link][rows,] - waiting_sec, 0.0)
    for (cohort, rows, length), trip_sec in by_link["round_trip"].items():
        here_sec = stages["boundary"][cohort,] + stages["host_attention"][rows, length]
        stages["transfer_rows"][cohort,] = max((trip_sec - here_sec) / 2, 0.0)
    for shape, move_sec in by_link["moves"].items():
        copies_sec = stages["device_copy"][shape] + stages["host_copy"][shape]
        stages["transfer_pages"][shape] = max(move_sec - copies_sec - waiting_sec, 0.0)
    return {stage: points for stage, points in stages.items() if points}


def _take_layers_apart(
    by_link: Mapping[str, Mapping[Shape, float]], stages: Mapping[str, dict[Shape, float]]
) -> float:
    """Fill in the stages of the device's own rows; return what waiting for a lone stage costs."""
    waiting_sec = 0.0
    for (rows,), attention_sec in by_link["attention"].items():
        layers = {
            shape: seconds
            for shape, seconds in by_link["attention_and_boundary"].items()
            if shape[0] == rows
        }
        boundary_sec = max(layers[min(layers)] - attention_sec, 0.0)
        stages["boundary"][rows,] = boundary_sec
        for shape, seconds in layers.items():
            stages["device_attention"][shape] = max(seconds - boundary_sec, 0.0)
        for shape, seconds in by_link["attention_and_merge"].items():
            if shape[0] == rows:
                stages["merged_boundary"][shape] = max(seconds - attention_sec, 0.0)
        waiting_sec = max(by_link["lone_boundaries"][rows,] - boundary_sec, 0.0)
        entry_sec, exit_sec = (
            max(by_link[link][rows,] - waiting_sec, 1e-9) for link in ("lone_entries", "lone_exits")
        )
        both_sec = max(by_link["into_and_out_of_layers"][rows,] - attention_sec, 0.0)
        stages["pre_attention"][rows,] = both_sec * entry_sec / (entry_sec + exit_sec)
        stages["post_attention"][rows,] = both_sec * exit_sec / (entry_sec + exit_sec)
    return waiting_sec
