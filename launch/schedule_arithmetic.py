"""What arithmetic says of a strategy's rate, with stage times put in that were measured.

Owns the formulas: smooth flows, nobody waits in vain. Stage times go by label, as the shared
engine's backend gives them: a name and the rows of its groups. Called by bench_strategies.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from apex_jax.config import SchedulerConfig


@dataclass(frozen=True)
class Load:
    """A steady state.

    device_rows, cohort_rows: rows that compute, of all device rows and of each cohort.
    device_bucket, cohort_bucket: what they are padded to. num_cohorts: with tokens under way.
    """

    num_layers: int
    layers_per_program: int
    device_rows: int
    device_bucket: int
    num_cohorts: int
    cohort_rows: float
    cohort_bucket: int

    @property
    def host_rows(self) -> float:
        return self.num_cohorts * self.cohort_rows


class NoClosedFormError(ValueError):
    """The arithmetic says nothing of a strategy."""


def expected_rate(
    settings: SchedulerConfig, load: Load, stage_sec: Mapping[str, float], host_job_sec: float
) -> float:
    """Return tokens per second of both lanes.

    Raises KeyError where a stage was not measured, NoClosedFormError for a strategy that chooses.

    stage_sec: of each device stage. host_job_sec: of a cohort's attention in one layer.
    """
    if settings.chooses:
        raise NoClosedFormError(f"{settings.strategy} chooses among schedules")
    layers, rows, cohort = load.num_layers, load.device_bucket, load.cohort_bucket
    if settings.strategy == "full_offload":
        alone = stage_sec[f"boundary {cohort}"]
        # Both halves use the device in turn, and the host in turn; a half uses them one by one.
        layer_sec = max(2 * alone, 2 * host_job_sec, alone + host_job_sec)
        return load.host_rows / (layers * layer_sec + 2 * _ends_sec(cohort, stage_sec))
    if settings.strategy == "device_only":
        layer_sec = stage_sec[f"layers {rows}"] / load.layers_per_program
        return load.device_rows / (layers * layer_sec + _ends_sec(rows, stage_sec))

    attention_sec = stage_sec[f"device_attention {rows}"]
    merged_sec = stage_sec[f"boundary {rows}+{cohort}"]
    if settings.strategy == "asymmetric_pipelining":
        alone = stage_sec[f"boundary {cohort}"]
        layer_sec = max(merged_sec + attention_sec + alone, 2 * host_job_sec)
        sweep_sec = layers * layer_sec + _ends_sec(rows, stage_sec)
        return (load.device_rows + load.host_rows) / sweep_sec

    linear_sec = stage_sec[f"boundary {rows}"]
    num_passes = settings.passes if settings.strategy == "passes" else 1
    sweep_sec = layers * (linear_sec + attention_sec) + _ends_sec(rows, stage_sec)
    sweep_sec += load.num_cohorts * (merged_sec - linear_sec)
    alone = 0.0
    if num_passes > 1:
        alone = stage_sec[f"boundary {cohort}"]
        sweep_sec += load.num_cohorts * (num_passes - 1) * alone
    # A cohort needs the host for each point, and the host serves one cohort at a time.
    steps = min(
        num_passes,
        sweep_sec / (load.num_cohorts * host_job_sec),
        sweep_sec / (host_job_sec + alone),
    )
    if load.num_cohorts == 1 and steps < 1:
        steps = 1 / math.ceil(1 / steps)  # who misses a window waits for the next
    return (load.device_rows + load.host_rows * steps / (layers + 1)) / sweep_sec


def published_ratio(settings: SchedulerConfig, load: Load) -> float | None:
    """Return merging's rate over device_only's by the table: no head, no cost of a merge."""
    if settings.strategy not in ("async_overlap", "staggered"):
        return None
    return 1 + load.host_rows / ((load.num_layers + 1) * load.device_rows)


def _ends_sec(rows: int, stage_sec: Mapping[str, float]) -> float:
    """Return the time of what a sweep does before and behind its layers."""
    heads = [sec for label, sec in stage_sec.items() if label.startswith(f"head {rows}")]
    return min(heads)
