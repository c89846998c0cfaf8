"""A backend that computes nothing but notices everything: KV pages hold token ids.

Its "model" writes each token into the pages of every layer, reads the sequence back from each
layer's own pages, insists that all layers saw the same, and hashes it into the next token. So a
page written twice, freed too early, listed in the wrong order, copied from another layer or fed to
a stage out of turn shows as a failed assertion or a wrong token. Imports no jax.
"""

import hashlib
import random
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum, auto

import numpy as np

from apex_jax.hardware import (
    Boundary,
    DeviceAttention,
    Embed,
    Export,
    Head,
    HostAttention,
    Import,
    Job,
    Layers,
    PostAttention,
    PreAttention,
    ReadPages,
    Stage,
    StagedLayer,
    WritePages,
)
from apex_jax.plan import DecodeBatch, HeadBatch, PrefillBatch, Sampled

VOCAB_SIZE = 50
NOTHING = -1
LIKELIHOODS = (0.03, 0.3, 0.8)  # of one more step before a wait looks, drawn for each side


def next_token(token_ids: Sequence[int]) -> int:
    digest = hashlib.blake2b(np.array(token_ids, np.int64).tobytes(), digest_size=4).digest()
    return int.from_bytes(digest, "little") % VOCAB_SIZE


def expected_output(prompt: Sequence[int], max_tokens: int, stops: frozenset[int]) -> list[int]:
    token_ids = list(prompt)
    while len(token_ids) < len(prompt) + max_tokens:
        token_ids.append(next_token(token_ids))
        if token_ids[-1] in stops:
            break
    return token_ids[len(prompt) :]


class Pace(Enum):
    """How far the two sides have come when somebody looks.

    EAGER: whatever can run has run. LATE: nothing runs before it is waited for, and the host only
    once the device has nothing left. RANDOM: both come a random way before each wait, one side
    often much further than the other.
    """

    EAGER = auto()
    LATE = auto()
    RANDOM = auto()


class Place(Enum):
    """Where rows stand in `layer`: before its norm, behind its projections, behind attention."""

    BEFORE = auto()
    ENTERED = auto()
    ATTENDED = auto()


@dataclass(frozen=True)
class Rows:
    """Rows on their way: their new tokens, and the sequences that every layer so far has read.

    starts_b, ends_b: positions of the new tokens. Rows of tokens and sequences are padded with
    NOTHING.
    """

    starts_b: np.ndarray
    ends_b: np.ndarray
    tokens_bt: np.ndarray
    layer: int = 0
    place: Place = Place.BEFORE
    sequences_bs: np.ndarray | None = None


@dataclass(eq=False)
class PaperHandle:
    """value: rows, pages or sampled tokens, once done. An operand is donated: taken only once."""

    backend: "PaperBackend"
    value: Rows | np.ndarray | None = None
    error: Exception | None = None
    is_done: bool = False
    is_taken: bool = False

    def read(self) -> Sampled:
        assert self.backend.wait_any([self], np.inf) is self, "nothing will ever make it ready"
        assert isinstance(self.value, np.ndarray), "only a head has tokens"
        return Sampled(self.value)


@dataclass(frozen=True)
class Task:
    work: Stage | Job
    operands: tuple[PaperHandle, ...]
    handles: tuple[PaperHandle, ...]


class PaperBackend:
    """One device and one host, each with pages and a queue of tasks that run in order.

    stages, jobs: all that was enqueued and submitted. device_hangs, host_hangs: that side runs
    nothing any more. fail_with: the error that a stage or job ends with, or None; a failed job
    takes those after it along, since they may read what it did not write.
    """

    def __init__(
        self,
        *,
        num_layers: int,
        layers_per_program: int,
        page_size: int,
        num_pages: int,
        num_slots: int,
        num_host_pages: int = 0,
        num_staging_pages: int = 0,
        pace: Pace = Pace.LATE,
        seed: int = 0,
    ):
        self.device_pages = np.full((num_layers, num_pages, page_size), NOTHING)
        self.host_pages = np.full((num_layers, num_host_pages, page_size), NOTHING)
        self.staging_pages = np.full((num_staging_pages, page_size), NOTHING)
        self.tokens_by_slot = np.full(num_slots, NOTHING)
        self.stages: list[Stage] = []
        self.jobs: list[Job] = []
        self.device_hangs = self.host_hangs = False
        self.fail_with: Callable[[Stage | Job], Exception | None] = lambda work: None
        self._num_layers, self._span, self._page_size = num_layers, layers_per_program, page_size
        self._pace, self._random = pace, random.Random(seed)
        self._device: deque[Task] = deque()
        self._host: deque[Task] = deque()
        self._likelihoods = [
            (side, self._random.choice(LIKELIHOODS)) for side in (self._device, self._host)
        ]
        self._host_error: Exception | None = None
        self._now_sec = 0.0

    # The four verbs

    def enqueue(self, stage: Stage, *operands: PaperHandle) -> tuple[PaperHandle, ...]:
        self.stages.append(stage)
        num_handles = len(operands) if isinstance(stage, Boundary | Head) else 1
        return self._add(self._device, stage, operands, num_handles)

    def submit_host(self, job: Job, operand: PaperHandle | None = None) -> PaperHandle:
        self.jobs.append(job)
        [handle] = self._add(self._host, job, (operand,) if operand is not None else (), 1)
        return handle

    def wait_any(self, handles: Sequence[PaperHandle], deadline_sec: float) -> PaperHandle | None:
        assert handles, "a wait for nothing"
        if self._pace is Pace.RANDOM:
            for side, likelihood in self._likelihoods:
                while self._random.random() < likelihood and self._step(side):
                    pass
        while True:
            for handle in handles:
                if handle.error is not None:
                    raise handle.error
                if handle.is_done:
                    return handle
            if deadline_sec <= self._now_sec:
                return None
            if not self._step_either():
                self._now_sec = deadline_sec
                return None

    def now(self) -> float:
        return self._now_sec

    # Queues

    def _add(
        self,
        queue: deque[Task],
        work: Stage | Job,
        operands: tuple[PaperHandle, ...],
        num_handles: int,
    ) -> tuple[PaperHandle, ...]:
        self._now_sec += 1.0
        for operand in operands:
            assert not operand.is_taken, f"{work} takes an operand that was donated before"
            operand.is_taken = True
        handles = tuple(PaperHandle(self) for _ in range(num_handles))
        queue.append(Task(work, operands, handles))
        while self._pace is Pace.EAGER and self._step_either():
            pass
        return handles

    def _step_either(self) -> bool:
        """Take a step on one of the sides; whether any could."""
        sides = [self._device, self._host]
        if self._pace is Pace.RANDOM:
            self._random.shuffle(sides)
        return any(self._step(side) for side in sides)

    def _step(self, queue: deque[Task]) -> bool:
        """Run the side's next task; whether it could."""
        hangs = self.device_hangs if queue is self._device else self.host_hangs
        if hangs or not queue or not all(one.is_done for one in queue[0].operands):
            return False
        task = queue.popleft()
        errors = [one.error for one in task.operands if one.error is not None]
        if queue is self._host and self._host_error is not None:
            errors.append(self._host_error)
        error = errors[0] if errors else self.fail_with(task.work)
        if queue is self._host:
            self._host_error = error
        values = [None] * len(task.handles)
        if error is None:
            values = self._run(task.work, [one.value for one in task.operands])
        for handle, value in zip(task.handles, values, strict=True):
            handle.value, handle.error, handle.is_done = value, error, True
        return True

    # What stages and jobs do

    def _run(self, work: Stage | Job, values: list) -> list[Rows | np.ndarray]:
        match work:
            case Embed(batch):
                assert not values
                return [self._embed(batch)]
            case Layers(batch, first_layer):
                [rows] = values
                assert first_layer + self._span <= self._num_layers, "no such layers"
                for layer in range(first_layer, first_layer + self._span):
                    rows = self._whole_layer(self.device_pages[layer], layer, batch, rows)
                return [rows]
            case PreAttention(layer):
                [rows] = values
                return [_move(rows, (layer, Place.BEFORE), (layer, Place.ENTERED))]
            case DeviceAttention(batch, layer) | HostAttention(_, layer, batch):
                [rows] = values
                pages = self.device_pages if isinstance(work, DeviceAttention) else self.host_pages
                read = self._attend(pages[layer], layer, batch, rows)
                return [_move(rows, (layer, Place.ENTERED), (layer, Place.ATTENDED), read)]
            case PostAttention(layer):
                [rows] = values
                return [_move(rows, (layer, Place.ATTENDED), (layer + 1, Place.BEFORE))]
            case Boundary(layer):
                assert len(values) in (1, 2), "one or two groups share a boundary"
                came, goes = (layer - 1, Place.ATTENDED), (layer, Place.ENTERED)
                return [_move(rows, came, goes) for rows in values]
            case StagedLayer(batch, layer):
                [rows] = values
                return [self._whole_layer(self.staging_pages, layer, batch, rows)]
            case Head(batches):
                return [
                    self._sample(head, rows) for head, rows in zip(batches, values, strict=True)
                ]
            case Export(layer, pages_i, from_staging):
                pages = self.staging_pages if from_staging else self.device_pages[layer]
                return [pages[_checked(pages_i, pages)]]
            case ReadPages(layer, pages_i):
                return [self.host_pages[layer][_checked(pages_i, self.host_pages[layer])]]
            case WritePages(layer, pages_i):
                pages = self.host_pages[layer]
            case Import(layer, pages_i, to_staging):
                pages = self.staging_pages if to_staging else self.device_pages[layer]
        [moved] = values
        assert len(moved) == len(pages_i), "another number of pages arrives than set out"
        pages[_checked(pages_i, pages)] = moved
        return [moved]

    def _embed(self, batch: DecodeBatch | PrefillBatch) -> Rows:
        if isinstance(batch, DecodeBatch):
            tokens_bt = self.tokens_by_slot[batch.slots_b][:, None]
            assert (tokens_bt != NOTHING).all(), "a row's slot holds no token"
            return Rows(batch.positions_b, batch.positions_b + 1, tokens_bt)
        is_real_bt = np.arange(batch.token_ids_bt.shape[1]) < batch.lengths_b[:, None]
        tokens_bt = np.where(is_real_bt, batch.token_ids_bt, NOTHING)
        return Rows(batch.starts_b, batch.starts_b + batch.lengths_b, tokens_bt)

    def _whole_layer(
        self, pages: np.ndarray, layer: int, batch: DecodeBatch | PrefillBatch, rows: Rows
    ) -> Rows:
        came, goes = (layer, Place.BEFORE), (layer + 1, Place.BEFORE)
        return _move(rows, came, goes, self._attend(pages, layer, batch, rows))

    def _attend(
        self, pages: np.ndarray, layer: int, batch: DecodeBatch | PrefillBatch, rows: Rows
    ) -> np.ndarray:
        """Append the rows' tokens to a layer's pages, and read their whole sequences back."""
        starts_b = batch.positions_b if isinstance(batch, DecodeBatch) else batch.starts_b
        assert np.array_equal(rows.starts_b, starts_b), "other rows attend than were embedded"
        rows_i, new_i = np.nonzero(rows.tokens_bt != NOTHING)
        entry_i, offset_i = np.divmod(starts_b[rows_i] + new_i, self._page_size)
        written_i = _checked(batch.block_table_bm[rows_i, entry_i], pages)
        # A token's entry names its layer too: one layer's pages never pass as another's.
        pages[written_i, offset_i] = layer * VOCAB_SIZE + rows.tokens_bt[rows_i, new_i]

        entry_s, offset_s = np.divmod(np.arange(rows.ends_b.max()), self._page_size)
        is_real_bs = np.arange(len(entry_s)) < rows.ends_b[:, None]
        pages_bs = np.where(is_real_bs, batch.block_table_bm[:, entry_s], 0)
        layers_bs, tokens_bs = np.divmod(pages[_checked(pages_bs, pages), offset_s], VOCAB_SIZE)
        layers = set(layers_bs[is_real_bs].tolist())
        assert layers == {layer}, f"layer {layer} reads the KV of layers {layers}"
        sequences_bs = np.where(is_real_bs, tokens_bs, NOTHING)
        before_bs = sequences_bs if rows.sequences_bs is None else rows.sequences_bs
        assert np.array_equal(before_bs, sequences_bs), f"layer {layer} reads other sequences"
        return sequences_bs

    def _sample(self, head: HeadBatch, rows: Rows) -> np.ndarray:
        stood = (rows.layer, rows.place)
        assert stood == (self._num_layers, Place.BEFORE), f"sampled at {stood}"
        assert rows.sequences_bs is not None
        ends_b = rows.ends_b[head.rows_b]
        assert np.array_equal(ends_b, head.positions_b), "not the positions that come next"
        tokens_b = np.array(
            [
                next_token(rows.sequences_bs[row, :end].tolist())
                for row, end in zip(head.rows_b, ends_b, strict=True)
            ],
            np.int32,
        )
        self.tokens_by_slot[head.slots_b] = tokens_b
        return tokens_b


def _move(
    rows: Rows, came: tuple[int, Place], goes: tuple[int, Place], read: np.ndarray | None = None
) -> Rows:
    """Let rows go on, from where they must have come; `read` is what attention read."""
    assert (rows.layer, rows.place) == came, f"rows at {rows.layer}, {rows.place}; not {came}"
    sequences_bs = rows.sequences_bs if read is None else read
    return Rows(rows.starts_b, rows.ends_b, rows.tokens_bt, *goes, sequences_bs)


def _checked(page_ids: np.ndarray, pages: np.ndarray) -> np.ndarray:
    """Return page ids that are in the pool: numpy would take negative ones for the last."""
    is_there = (page_ids >= 0) & (page_ids < len(pages))
    assert is_there.all(), f"page ids {page_ids[~is_there]} of {len(pages)}"
    return page_ids
