"""How well a profile predicts: points between those of its table, measured as well.

Owns which points are held out: numbers of rows that no bucket has, blocks and pages between two
buckets, lengths between two that were measured. Called by the profiler. Imports no jax.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from apex_jax.buckets import Buckets
from apex_jax.cost_model import PromptWork, Times
from apex_jax.profiling.batches import (
    Capacity,
    cohort_sizes,
    decode_batch,
    device_lengths,
    head_batch,
    host_lengths,
    prompt_batch,
    token_batch,
)
from apex_jax.profiling.cases import Name
from apex_jax.profiling.chains import Chain, StageChains


class HeldOut(NamedTuple):
    """A point between those of the table. predict: what a link of its chain should take."""

    name: Name
    chain: Chain
    predict: Callable[[Times], float]


def held_out(chains: StageChains, shapes: Buckets, capacity: Capacity) -> Iterator[HeldOut]:
    """Yield what to measure beside the table, where there is anything between its points."""
    yield from _decode_rows(chains, shapes, capacity)
    yield from _prompts(chains, shapes, capacity)
    yield from _heads(chains, shapes)
    yield from _cohorts(chains, shapes, capacity)
    yield from _moves(chains, shapes, capacity)


def _between(sizes: Sequence[int]) -> Iterator[int]:
    """Yield a size between each two, where there is one."""
    for left, right in itertools.pairwise(sizes):
        if right - left > 1:
            yield (left + right) // 2


def _decode_rows(chains: StageChains, shapes: Buckets, capacity: Capacity) -> Iterator[HeldOut]:
    for rows in _between(shapes.device_rows):
        bucket = min(bucket for bucket in shapes.device_rows if bucket >= rows)
        for blocks in _between(shapes.num_blocks[bucket]):
            lengths = device_lengths(rows, blocks, shapes, capacity)
            if lengths is None:
                continue
            # The last block of each row is half full: so it is on average, and so it is predicted.
            lengths = [max(1, length - shapes.block_tokens // 2) for length in lengths]
            batch = decode_batch(lengths, capacity.num_pages, shapes.page_size)
            shape = (rows, sum(lengths))

            def layers(times: Times, shape: tuple[int, int] = shape) -> float:
                return times.layers(capacity.span, *shape)

            def single_layer(times: Times, shape: tuple[int, int] = shape) -> float:
                return times.device_attention(*shape) + times.linear(shape[0])

            yield HeldOut(Name("layers", shape), chains.layers(batch), layers)
            name = Name("attention_and_boundary", shape)
            yield HeldOut(name, chains.attention_and_boundary(batch), single_layer)


def _prompts(chains: StageChains, shapes: Buckets, capacity: Capacity) -> Iterator[HeldOut]:
    for rows, tokens in shapes.chunks:
        for context in _between(shapes.context_pages):
            batch = prompt_batch((rows, tokens), context, capacity.num_pages, shapes.page_size)
            prompts = PromptWork.of(batch)

            def predict(times: Times, prompts: PromptWork = prompts) -> float:
                return times.prefill(capacity.span, prompts)

            yield HeldOut(
                Name("prefill", (rows * tokens, rows, context)), chains.layers(batch), predict
            )


def _heads(chains: StageChains, shapes: Buckets) -> Iterator[HeldOut]:
    for rows in _between(shapes.rows):
        chain = chains.head((token_batch(rows),), (head_batch(rows, is_greedy=False),))

        def predict(times: Times, rows: int = rows) -> float:
            return times.head(rows)

        yield HeldOut(Name("head_sample", (rows,)), chain, predict)


def _cohorts(chains: StageChains, shapes: Buckets, capacity: Capacity) -> Iterator[HeldOut]:
    for rows in _between(list(cohort_sizes(shapes, capacity).values())):
        lengths = host_lengths(rows, shapes, capacity)
        for length in _between(lengths):
            batch = decode_batch([length] * rows, capacity.num_host_pages, shapes.page_size)
            shape = (rows, rows * length)

            def attention(times: Times, shape: tuple[int, int] = shape) -> float:
                return times.host_attention(*shape)

            def trip(times: Times, shape: tuple[int, int] = shape) -> float:
                linear_sec, transfer_sec = times.linear(shape[0]), times.transfer(shape[0])
                return times.host_attention(*shape) + linear_sec + 2 * transfer_sec

            yield HeldOut(Name("host_attention", shape), chains.host_attention(batch), attention)
            yield HeldOut(Name("round_trip", shape), chains.round_trip(batch), trip)


def _moves(chains: StageChains, shapes: Buckets, capacity: Capacity) -> Iterator[HeldOut]:
    assert shapes.host is not None
    for pages in _between(shapes.host.move_pages):
        if pages > min(capacity.num_pages, capacity.num_host_pages):
            continue
        num_tokens = pages * shapes.page_size

        def move(times: Times, num_tokens: int = num_tokens) -> float:
            copies_sec = times.device_copy(num_tokens) + times.host_copy(num_tokens)
            return copies_sec + times.transfer(num_tokens=num_tokens)

        yield HeldOut(Name("moves", (pages,)), chains.moves(pages), move)
