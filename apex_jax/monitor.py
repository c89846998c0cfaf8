"""What stages and jobs really took, set against what was predicted for them.

Owns the way from a stage that has ended to a sample of the correction: which rows it was for, which
of Times' methods it stands for. Fed by the threads that see stages and jobs end, read by the engine
once a sweep. Imports no jax.
"""

from collections import deque

from apex_jax.correction import CorrectedTimes, Correction
from apex_jax.cost_model import PromptWork, Times
from apex_jax.hardware import (
    Boundary,
    DeviceAttention,
    Head,
    HostAttention,
    Job,
    Layers,
    PostAttention,
    PreAttention,
    Stage,
    StagedLayer,
)
from apex_jax.plan import DecodeBatch, PrefillBatch
from apex_jax.stage_costs import Work, work_of


class StageMonitor:
    """Compares; `times` are predictions corrected by what was seen so far.

    layers_per_program: of the Layers stage. Stages of a cohort by itself are left out: a Boundary
    does not say whether it was shared.
    """

    def __init__(self, times: Times, layers_per_program: int):
        self._raw, self._span = times, layers_per_program
        self.correction = Correction()
        self.times: Times = CorrectedTimes(times, self.correction)
        self._samples: deque[tuple[str, float, float]] = deque()
        self._batch: DecodeBatch | None = None
        self._rows = Work()  # of the device's decode rows, as of their last stage with a batch
        self._host_busy = 0.0  # share of the last sweep

    def ended(self, work: Stage | Job, seconds: float) -> None:
        """Take a stage or job, of either kind in the order in which they end.

        seconds: of a job without waiting for its operand.
        """
        sample = self._predict(work)
        if sample is not None:
            self._samples.append((*sample, seconds))

    def end_sweep(self, sweep_sec: float) -> None:
        """Let the correction follow what has ended since the last call, so many seconds ago."""
        host_sec = 0.0
        while self._samples:
            name, predicted_sec, seconds = self._samples.popleft()
            if name == "host_attention":
                host_sec += seconds
                predicted_sec *= self._raw.host_slowdown
            else:
                predicted_sec *= 1 + (self._raw.device_slowdown - 1) * self._host_busy
            self.correction.add(name, predicted_sec, seconds)
        self._host_busy = min(1.0, host_sec / sweep_sec) if sweep_sec > 0 else 0.0
        self.correction.end_sweep()

    def _predict(self, work: Stage | Job) -> tuple[str, float] | None:
        """Return which of Times' methods a stage or job stands for, and what it says."""
        times = self._raw
        match work:
            case HostAttention(batch=batch):
                rows = work_of(batch)
                return "host_attention", times.host_attention(rows.rows, rows.tokens)
            case Layers(batch=PrefillBatch() as batch):
                return "prefill", times.prefill(self._span, PromptWork.of(batch))
            case Layers(batch=DecodeBatch() as batch):
                rows = self._work_of(batch)
                return "layers", times.layers(self._span, rows.rows, rows.tokens)
            case StagedLayer(batch=batch):
                return "staged_layer", times.staged_layer(PromptWork.of(batch))
            case DeviceAttention(batch=batch):
                rows = self._work_of(batch)
                return "device_attention", times.device_attention(rows.rows, rows.tokens)
            case Head(batches=batches):
                is_greedy = all(batch.is_greedy for batch in batches)
                num_rows = sum(len(batch.rows_b) for batch in batches)
                return "head", times.head(num_rows, is_greedy=is_greedy)
            case Boundary(cohort_id=None):
                return "linear", times.linear(self._rows.rows)
            case PreAttention(cohort_id=None):
                return "pre_attention", times.pre_attention(self._rows.rows)
            case PostAttention(cohort_id=None):
                return "post_attention", times.post_attention(self._rows.rows)
            case _:
                return None

    def _work_of(self, batch: DecodeBatch) -> Work:
        if batch is not self._batch:  # it is the same for all layers of a sweep
            self._batch, self._rows = batch, work_of(batch)
        return self._rows
