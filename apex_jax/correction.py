"""How far predicted times are off while a job runs, and times corrected by it.

Owns a factor for each stage, which follows what the last sweeps measured: another process takes a
core, clocks drop, lengths change. One odd sweep moves nothing, and noise is not followed. Fed once
a sweep. Imports no jax.
"""

import math
import statistics
from collections import deque
from dataclasses import dataclass, field

from apex_jax.cost_model import PromptWork, Times

NUM_SWEEPS = 15  # that a factor rests on: a lasting change is the majority after eight
MIN_SWEEPS = 9  # before a factor is anything but 1: of five, three may well be odd ones
MAX_STEP = math.log(1.5)  # a sweep: three times as slow is followed in three steps
DEAD_BAND = math.log(1.05)  # the least error that is worth a step
# A median's standard error is 1.25 sigma / sqrt(n), and sigma 1.48 times the median deviation.
# Twice that is noise: where samples scatter, the dead band is that wide.
_BAND_PER_DEVIATION = 2 * 1.25 * 1.48


@dataclass(slots=True)
class _Stage:
    """logs: of measured over predicted time, one a sweep. log_factor: what is applied.

    sweep: the logs of the sweep under way. before, after: absolute logs without and with the
    factor that was applied when they were measured.
    """

    logs: deque[float] = field(default_factory=lambda: deque(maxlen=NUM_SWEEPS))
    log_factor: float = 0.0
    sweep: list[float] = field(default_factory=list[float])
    before: deque[float] = field(default_factory=lambda: deque(maxlen=1000))
    after: deque[float] = field(default_factory=lambda: deque(maxlen=1000))

    def end_sweep(self) -> None:
        if not self.sweep:
            return
        log = statistics.median(self.sweep)
        self.sweep.clear()
        self.before.append(abs(log))
        self.after.append(abs(log - self.log_factor))
        self.logs.append(log)
        if len(self.logs) < MIN_SWEEPS:
            return
        middle = statistics.median(self.logs)
        deviation = statistics.median(abs(one - middle) for one in self.logs)
        noise = _BAND_PER_DEVIATION * deviation / math.sqrt(len(self.logs))
        step = middle - self.log_factor
        if abs(step) > max(DEAD_BAND, noise):
            self.log_factor += max(-MAX_STEP, min(MAX_STEP, step))


class Correction:
    """A factor for each stage, by which its uncorrected prediction is to be multiplied.

    Stages have the names of Times' methods; dispatch_sec is called `dispatch`.
    """

    def __init__(self) -> None:
        self._stages: dict[str, _Stage] = {}

    def add(self, stage: str, predicted_sec: float, measured_sec: float) -> None:
        """Take a sample of the sweep under way; predicted_sec is what Times says uncorrected.

        Where either is not above 0 there is nothing to compare.
        """
        if predicted_sec > 0 and measured_sec > 0:
            if stage not in self._stages:
                self._stages[stage] = _Stage()
            self._stages[stage].sweep.append(math.log(measured_sec / predicted_sec))

    def end_sweep(self) -> None:
        """Let the factors follow; the median of a stage's samples counts as one."""
        for stage in self._stages.values():
            stage.end_sweep()

    def factor(self, stage: str) -> float:
        """Return 1 for a stage of which too little is known."""
        known = self._stages.get(stage)
        return 1.0 if known is None else math.exp(known.log_factor)

    def summary(self) -> dict[str, dict[str, float | int]]:
        """Return each stage's factor, and the median error of its last 1,000 sweeps.

        Errors are ratios less 1, whichever way: 0.1 is a tenth too long or too short.
        """
        return {
            name: {
                "num_sweeps": len(stage.before),
                "factor": math.exp(stage.log_factor),
                "error_before": math.expm1(statistics.median(stage.before)),
                "error_after": math.expm1(statistics.median(stage.after)),
            }
            for name, stage in self._stages.items()
            if stage.before
        }


class CorrectedTimes:
    """Times with a correction applied, as it stands when they are asked for."""

    def __init__(self, times: Times, correction: Correction):
        self._times, self._factor = times, correction.factor

    @property
    def num_layers(self) -> int:
        return self._times.num_layers

    @property
    def dispatch_sec(self) -> float:
        return self._factor("dispatch") * self._times.dispatch_sec

    @property
    def device_slowdown(self) -> float:
        return self._times.device_slowdown

    @property
    def host_slowdown(self) -> float:
        return self._times.host_slowdown

    def embed(self, num_rows: int) -> float:
        return self._factor("embed") * self._times.embed(num_rows)

    def layers(self, num_layers: int, num_rows: int, num_tokens: int) -> float:
        return self._factor("layers") * self._times.layers(num_layers, num_rows, num_tokens)

    def prefill(self, num_layers: int, prompts: PromptWork) -> float:
        return self._factor("prefill") * self._times.prefill(num_layers, prompts)

    def staged_layer(self, prompts: PromptWork) -> float:
        return self._factor("staged_layer") * self._times.staged_layer(prompts)

    def pre_attention(self, num_rows: int) -> float:
        return self._factor("pre_attention") * self._times.pre_attention(num_rows)

    def device_attention(self, num_rows: int, num_tokens: int) -> float:
        factor = self._factor("device_attention")
        return factor * self._times.device_attention(num_rows, num_tokens)

    def post_attention(self, num_rows: int) -> float:
        return self._factor("post_attention") * self._times.post_attention(num_rows)

    def linear(self, num_rows: int, num_cohort_rows: int = 0) -> float:
        return self._factor("linear") * self._times.linear(num_rows, num_cohort_rows)

    def head(self, num_rows: int, *, is_greedy: bool = False) -> float:
        return self._factor("head") * self._times.head(num_rows, is_greedy=is_greedy)

    def device_copy(self, num_tokens: int) -> float:
        return self._factor("device_copy") * self._times.device_copy(num_tokens)

    def host_attention(self, num_rows: int, num_tokens: int) -> float:
        return self._factor("host_attention") * self._times.host_attention(num_rows, num_tokens)

    def host_copy(self, num_tokens: int) -> float:
        return self._factor("host_copy") * self._times.host_copy(num_tokens)

    def transfer(self, num_rows: int = 0, num_tokens: int = 0) -> float:
        return self._factor("transfer") * self._times.transfer(num_rows, num_tokens)
