"""What a stage or a job costs: the times of a model's stages applied to the loop's vocabulary.

Owns which work each group of rows stands for, and how many seconds of which resource a stage or a
job takes; StageTimes owns the arithmetic of each. What waits for what is a backend's business.
Called by the backends that predict. Imports no jax.
"""

from typing import NamedTuple

import numpy as np

from apex_jax.cost_model import StageTimes
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


class Work(NamedTuple):
    """What the times of a group of rows rest on.

    rows: of linear work, a prompt's padding included. tokens: of KV that attention reads. pairs:
    of prompt tokens and tokens that they attend to.
    """

    rows: int = 0
    tokens: int = 0
    pairs: int = 0


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
    # Token i of a chunk attends to all before the chunk and to i + 1 of its own.
    lengths_b, starts_b = batch.lengths_b.astype(np.int64), batch.starts_b.astype(np.int64)
    pairs_b = lengths_b * starts_b + lengths_b * (lengths_b + 1) // 2
    return Work(batch.token_ids_bt.size, int((starts_b + lengths_b).sum()), int(pairs_b.sum()))


class StageCosts:
    """Seconds of stages and jobs for one model on one device and one host.

    layers_per_program: of the Layers stage. page_size: of the pages that move between the lanes.
    """

    def __init__(self, times: StageTimes, *, layers_per_program: int, page_size: int):
        self.times = times
        self._span, self._page_size = layers_per_program, page_size

    def of_stage(self, stage: Stage, works: list[Work]) -> tuple[list[Work], float]:
        """Return the work that each group goes on with, and the device's seconds.

        works: of the stage's operands. A Head's groups end, so it returns none.
        """
        after, seconds = self._of_stage(stage, works)
        return after, self.times.stage_sec + seconds

    def of_job(self, job: Job) -> JobCost:
        """Return what a job takes of the host and of the link."""
        times = self.times
        if isinstance(job, HostAttention):
            work = work_of(job.batch)
            transfer_sec = times.transfer(num_rows=work.rows)
            host_sec = times.host_attention(work.rows, work.tokens)
            return JobCost(work, host_sec, transfer_sec, transfer_sec)
        num_tokens = len(job.pages_i) * self._page_size
        transfer_sec = times.transfer(num_tokens=num_tokens)
        back_sec = transfer_sec if isinstance(job, ReadPages) else 0.0
        return JobCost(Work(), times.host_copy(num_tokens), transfer_sec, back_sec)

    def _of_stage(self, stage: Stage, works: list[Work]) -> tuple[list[Work], float]:
        times = self.times
        num_rows = sum(work.rows for work in works)
        match stage:
            case Embed():
                return [work_of(stage.batch)], 0.0
            case Boundary():
                return works, times.linear(num_rows)
            case DeviceAttention():
                return works, self._attention(works)
            case Layers():
                return works, self._span * (times.linear(num_rows) + self._attention(works))
            case PreAttention():
                return works, times.pre_share * times.linear(num_rows)
            case PostAttention():
                return works, (1 - times.pre_share) * times.linear(num_rows)
            case StagedLayer():
                return works, times.linear(num_rows) + self._attention(works)
            case Head():
                return [], times.head_sec
            case Export() | Import():
                # A copy within the device's memory: KV is read, and written.
                num_tokens = len(stage.pages_i) * self._page_size
                return [Work()], 2 * times.device_attention_sec_per_token * num_tokens

    def _attention(self, works: list[Work]) -> float:
        return sum(self.times.device_attention(work.tokens, work.pairs) for work in works)
