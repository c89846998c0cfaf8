"""What a stage or a job costs: the times of a model's stages applied to the loop's vocabulary.

Owns which work each group of rows stands for, and how many seconds of which resource a stage or a
job takes; the arithmetic of each is cost_model's. What waits for what is a backend's business.
Called by the backends that predict. Imports no jax.
"""

from collections.abc import Callable
from typing import Generic, NamedTuple, TypeVar

from apex_jax.cost_model import PromptWork, Times
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
)
from apex_jax.plan import DecodeBatch, PrefillBatch

MAX_RECENT = 64  # batches: more than are under way
Batch = TypeVar("Batch")
Answer = TypeVar("Answer")


class Work(NamedTuple):
    """What the times of a group of rows rest on.

    rows: of a prompt its tokens, padding included. tokens: of KV that attention reads.
    """

    rows: int = 0
    tokens: int = 0


class JobCost(NamedTuple):
    """What a host job takes.

    work: of the rows that go on with its result. seconds: of the host. moving_sec: of its operand's
    way to the host. back_sec: of its result's way to the device; 0 where nothing travels.
    """

    work: Work
    seconds: float
    moving_sec: float
    back_sec: float


def work_of(batch: DecodeBatch | PrefillBatch) -> Work:
    """Return the work that a batch stands for in one layer."""
    if isinstance(batch, DecodeBatch):
        num_rows = len(batch.positions_b)
        return Work(num_rows, int(batch.positions_b.sum()) + num_rows)
    prompts = PromptWork.of(batch)
    return Work(prompts.num_rows * prompts.num_tokens, prompts.num_kv_tokens)


class _Recent(Generic[Batch, Answer]):
    """A function of a batch, asked once for each: the loop comes with it for every layer."""

    def __init__(self, ask: Callable[[Batch], Answer]):
        self._ask = ask
        self._answers: dict[int, tuple[Batch, Answer]] = {}  # by id, which the batch keeps its own

    def __call__(self, batch: Batch) -> Answer:
        known = self._answers.get(id(batch))
        if known is None:
            if len(self._answers) == MAX_RECENT:
                self._answers.clear()
            known = self._answers[id(batch)] = (batch, self._ask(batch))
        return known[1]


class StageCosts:
    """Seconds of stages and jobs for one model on one device and one host.

    layers_per_program: of the Layers stage. page_size: of the pages that move between the lanes.
    """

    def __init__(self, times: Times, *, layers_per_program: int, page_size: int):
        self.times = times
        self._span, self._page_size = layers_per_program, page_size
        self._work_of, self._prompts_of = _Recent(work_of), _Recent(PromptWork.of)

    def of_stage(self, stage: Stage, works: list[Work]) -> tuple[list[Work], float]:
        """Return the work that each group goes on with, and the device's seconds.

        works: of the stage's operands. A Head's groups end, so it returns none.
        """
        times = self.times
        num_rows = sum(work.rows for work in works)
        match stage:
            case Embed():
                work = self._work_of(stage.batch)
                return [work], times.embed(work.rows)
            case Boundary():
                return works, times.linear(*(work.rows for work in works))
            case DeviceAttention():
                return works, times.device_attention(num_rows, works[0].tokens)
            case Layers(batch=PrefillBatch() as batch):
                return works, times.prefill(self._span, self._prompts_of(batch))
            case Layers():
                return works, times.layers(self._span, num_rows, works[0].tokens)
            case PreAttention():
                return works, times.pre_attention(num_rows)
            case PostAttention():
                return works, times.post_attention(num_rows)
            case StagedLayer():
                return works, times.staged_layer(self._prompts_of(stage.batch))
            case Head():
                num_sampled = sum(len(batch.rows_b) for batch in stage.batches)
                is_greedy = all(batch.is_greedy for batch in stage.batches)
                return [], times.head(num_sampled, is_greedy=is_greedy)
            case Export() | Import():
                return [Work()], times.device_copy(len(stage.pages_i) * self._page_size)

    def of_job(self, job: Job) -> JobCost:
        """Return what a job takes of the host and of the link."""
        times = self.times
        if isinstance(job, HostAttention):
            work = self._work_of(job.batch)
            transfer_sec = times.transfer(num_rows=work.rows)
            host_sec = times.host_attention(work.rows, work.tokens)
            return JobCost(work, host_sec, transfer_sec, transfer_sec)
        num_tokens = len(job.pages_i) * self._page_size
        transfer_sec = times.transfer(num_tokens=num_tokens)
        back_sec = transfer_sec if isinstance(job, ReadPages) else 0.0
        return JobCost(Work(), times.host_copy(num_tokens), transfer_sec, back_sec)
