"""What a comparison came to: a header, a row for each run, a row for each system's repeats.

Owns the result format (docs/benchmarks.md), its reader and the summary over repeats. Refuses a file
that does not follow it, by its place. Written by launch/comparison/result_file.py; read by whoever
reports. Imports no jax.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median
from typing import Any, Literal

from launch.comparison.decode import FileError, decode, load_object
from launch.comparison.workload_file import WorkloadHeader

FORMAT = "apex_jax.benchmark/1"
UNCLEAR = "not distinguishable"  # a ratio that was above 1 in one repeat and below it in another
NOT_HEADER = ("groups", "failed", "left_out", "seconds")  # what else such a file holds


@dataclass(frozen=True)
class Quantiles:
    """Of one figure over requests (or, for ITL, over gaps between tokens); seconds."""

    mean: float
    p50: float
    p90: float
    p99: float

    @classmethod
    def of(cls, samples: Sequence[float]) -> "Quantiles | None":
        """Return mean and percentiles, None of no samples; between two samples they are linear."""
        if not samples:
            return None
        ascending = sorted(samples)

        def at(share: float) -> float:
            place = share * (len(ascending) - 1)
            low = int(place)
            high = min(low + 1, len(ascending) - 1)
            return ascending[low] + (ascending[high] - ascending[low]) * (place - low)

        return cls(fmean(ascending), at(0.5), at(0.9), at(0.99))


@dataclass(frozen=True)
class Spread:
    """Of one figure over repeats."""

    median: float
    min: float
    max: float

    @property
    def crosses_one(self) -> bool:
        """Say whether a ratio was above 1 in one repeat and below it in another."""
        return self.min < 1 < self.max

    @classmethod
    def of(cls, samples: Sequence[float]) -> "Spread | None":
        return cls(median(samples), min(samples), max(samples)) if samples else None


@dataclass(frozen=True)
class LaneLatency:
    """Of the requests that decoded most of their tokens in one lane."""

    num_requests: int
    tpot_sec: Quantiles | None
    ttft_sec: Quantiles | None = None


@dataclass(frozen=True)
class RunRow:
    """One system's turn at one request rate.

    system: a strategy, or another framework's name. request_rate: None where the workload's own
    arrival times hold. num_requests, prompt_tokens, output_tokens: as the system did them. What was
    not measured is None; a failed run has `error` and may have nothing else. Formulas of the
    figures: docs/benchmarks.md.
    """

    system: str
    framework: str
    request_rate: float | None
    repeat: int
    status: Literal["ok", "failed"]
    error: str | None = None
    num_requests: int | None = None
    prompt_tokens: int | None = None
    output_tokens: int | None = None
    wall_sec: float | None = None
    output_tokens_per_sec: float | None = None
    steady_output_tokens_per_sec: float | None = None
    host_share: float | None = None
    predicted_output_tokens_per_sec: float | None = None
    ttft_sec: Quantiles | None = None
    tpot_sec: Quantiles | None = None
    itl_sec: Quantiles | None = None
    e2e_sec: Quantiles | None = None
    normalized_sec: Quantiles | None = None
    by_lane: dict[str, LaneLatency] | None = None
    goodput_requests_per_sec: float | None = None
    version: str | None = None

    def __post_init__(self) -> None:
        if self.status == "failed" and not self.error:
            raise ValueError("status is failed and error is empty; it must say why")
        if self.status == "ok":
            if self.error is not None:
                raise ValueError("status is ok and there is an error")
            if not self.wall_sec or not self.output_tokens_per_sec:
                raise ValueError("status is ok without wall_sec and output_tokens_per_sec above 0")


@dataclass(frozen=True)
class SummaryRow:
    """One system at one request rate, over its repeats.

    ratio: of output_tokens_per_sec to the baseline's of the same repeat. Latencies: of each figure
    the median over repeats, by_lane too. error: of the first run that failed.
    """

    system: str
    framework: str
    request_rate: float | None
    num_ok: int
    num_failed: int
    output_tokens_per_sec: Spread | None
    ratio: Spread | None
    steady_output_tokens_per_sec: Spread | None
    steady_ratio: Spread | None
    predicted_output_tokens_per_sec: float | None
    host_share: float | None
    goodput_requests_per_sec: Spread | None
    ttft_sec: Quantiles | None
    tpot_sec: Quantiles | None
    itl_sec: Quantiles | None
    e2e_sec: Quantiles | None
    normalized_sec: Quantiles | None
    error: str | None
    by_lane: dict[str, LaneLatency] | None = None


@dataclass(frozen=True)
class WorkloadUsed:
    """file: as the command named it. header: its first line."""

    file: str
    header: WorkloadHeader


@dataclass(frozen=True)
class ModelUsed:
    """weights: a fingerprint, `dummy-SEED`, or None where there are none."""

    name: str
    dtype: str
    weights: str | None


@dataclass(frozen=True)
class Budgets:
    """Bytes of KV cache that every system may use; None where there is no such lane."""

    device_kv_bytes: int | None
    host_kv_bytes: int | None


@dataclass(frozen=True)
class ResultHeader:
    """What all rows of a file have in common.

    environment: as launch.environment has it. device_profile, host_profile: names of described
    hardware. settings: flags that matter. baseline: the system that ratios refer to. warm_up: what
    came before and is in no figure. formulas: of each figure, in a sentence.
    """

    format: str
    what: str
    environment: dict[str, Any]
    workload: WorkloadUsed
    model: ModelUsed
    backend: Literal["xla", "paced", "simulated", "external"]
    device_profile: str | None
    host_profile: str | None
    budgets: Budgets
    settings: dict[str, Any]
    baseline: str | None
    warm_up: str
    formulas: dict[str, str]

    def __post_init__(self) -> None:
        if self.format != FORMAT:
            raise ValueError(f"format is {self.format!r}; this version reads {FORMAT!r}")


@dataclass(frozen=True)
class Result:
    """A result file. path: where it was read from."""

    path: Path
    header: ResultHeader
    runs: tuple[RunRow, ...]
    summary: tuple[SummaryRow, ...]


def read_result(path: Path) -> Result:
    """Read a result file; FileError where it is none."""
    try:
        content = load_object(path.read_bytes(), str(path))
    except OSError as error:
        raise FileError(f"{path} cannot be read: {error.strerror}") from None
    groups = content.get("groups")
    if not isinstance(groups, dict):
        raise FileError(f"{path} has no groups of rows; a benchmark's result file has runs in them")
    header = {name: value for name, value in content.items() if name not in NOT_HEADER}
    return Result(
        path,
        decode(ResultHeader, header, str(path)),
        _rows(RunRow, groups, "runs", path),
        _rows(SummaryRow, groups, "summary", path),
    )


def summarize(runs: Sequence[RunRow], baseline: str | None) -> list[SummaryRow]:
    """Return a row for each system and request rate, in the order of their first runs."""
    keys = dict.fromkeys((run.system, run.framework, run.request_rate) for run in runs)
    base = {
        (run.request_rate, run.repeat): run
        for run in runs
        if run.system == baseline and run.status == "ok"
    }
    return [_summary(*key, [run for run in runs if _key(run) == key], base) for key in keys]


def _key(run: RunRow) -> tuple[str, str, float | None]:
    return run.system, run.framework, run.request_rate


def _summary(
    system: str,
    framework: str,
    request_rate: float | None,
    own: Sequence[RunRow],
    base: dict[tuple[float | None, int], RunRow],
) -> SummaryRow:
    ok = [run for run in own if run.status == "ok"]

    def known(name: str) -> list[Any]:
        return [value for run in ok if (value := getattr(run, name)) is not None]

    def ratios(name: str) -> list[float]:
        pairs = ((run, base.get((run.request_rate, run.repeat))) for run in ok)
        found = ((getattr(run, name), getattr(other, name)) for run, other in pairs if other)
        return [value / reference for value, reference in found if value and reference]

    return SummaryRow(
        system=system,
        framework=framework,
        request_rate=request_rate,
        num_ok=len(ok),
        num_failed=len(own) - len(ok),
        output_tokens_per_sec=Spread.of(known("output_tokens_per_sec")),
        ratio=Spread.of(ratios("output_tokens_per_sec")),
        steady_output_tokens_per_sec=Spread.of(known("steady_output_tokens_per_sec")),
        steady_ratio=Spread.of(ratios("steady_output_tokens_per_sec")),
        predicted_output_tokens_per_sec=_median(known("predicted_output_tokens_per_sec")),
        host_share=_median(known("host_share")),
        goodput_requests_per_sec=Spread.of(known("goodput_requests_per_sec")),
        ttft_sec=_middle(known("ttft_sec")),
        tpot_sec=_middle(known("tpot_sec")),
        itl_sec=_middle(known("itl_sec")),
        e2e_sec=_middle(known("e2e_sec")),
        normalized_sec=_middle(known("normalized_sec")),
        error=next((run.error for run in own if run.error), None),
        by_lane=_lanes(known("by_lane")),
    )


def _median(values: Sequence[float]) -> float | None:
    return median(values) if values else None


def _middle(figures: Iterable[Quantiles]) -> Quantiles | None:
    """Return the median of each figure over repeats."""
    columns = list(zip(*((one.mean, one.p50, one.p90, one.p99) for one in figures), strict=True))
    return Quantiles(*map(median, columns)) if columns else None


def _lanes(runs: Sequence[dict[str, LaneLatency]]) -> dict[str, LaneLatency] | None:
    """Return each lane's medians over repeats."""
    lanes: dict[str, LaneLatency] = {}
    for name in dict.fromkeys(name for lanes_of_run in runs for name in lanes_of_run):
        own = [lanes_of_run[name] for lanes_of_run in runs if name in lanes_of_run]
        lanes[name] = LaneLatency(
            round(median(one.num_requests for one in own)),
            _middle(one.tpot_sec for one in own if one.tpot_sec is not None),
            _middle(one.ttft_sec for one in own if one.ttft_sec is not None),
        )
    return lanes or None


def _rows(cls: Any, groups: dict[str, Any], name: str, path: Path) -> tuple[Any, ...]:
    rows = groups.get(name, [])
    if not isinstance(rows, list):
        raise FileError(f"{path}: groups.{name} must be a list of rows")
    return tuple(decode(cls, row, f"{path}: {name}[{place}]") for place, row in enumerate(rows))
