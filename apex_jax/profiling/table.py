"""The table that a profile leaves: what was measured, on what, how well it predicts; its file.

Owns the format, and which file belongs to which machine, model and settings. Refuses files of
another version or machine and damaged ones with a message; a missing one is no error. Called by the
profiler. Imports no jax.
"""

import hashlib
import importlib.metadata
import json
import math
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

from apex_jax.buckets import Buckets
from apex_jax.config import LlamaConfig
from apex_jax.profiling.batches import Capacity

FORMAT = 1  # of the file; another one is not read
PACKAGES = ("apex-jax", "jax", "jaxlib")

Shape = tuple[int, ...]
# What a profile has points of; measured_times.py says what their shapes are.
STAGES = (
    *("embed", "layers", "prefill", "staged_layer", "pre_attention", "device_attention"),
    *("post_attention", "boundary", "merged_boundary", "head_greedy", "head_sample"),
    *("device_copy", "host_attention", "host_copy", "transfer_rows", "transfer_pages"),
)


class ProfileError(ValueError):
    """A file that is no profile of this machine, model and settings."""


@dataclass(frozen=True)
class Point:
    """sec: median. spread_sec: from the 10th to the 90th percentile of its repeats."""

    sec: float
    spread_sec: float


@dataclass(frozen=True)
class Measurements:
    """Seconds of stages and jobs at the shapes that were measured.

    stages: those of STAGES, by name and shape; `layers` and `prefill` are of whole
    programs, the rest of one layer or none. The others are as cost_model.Times has them.
    """

    stages: Mapping[str, Mapping[Shape, Point]]
    dispatch_sec: float
    device_slowdown: float
    host_slowdown: float


@dataclass(frozen=True)
class Errors:
    """Ratios less 1, whichever way, over so many comparisons."""

    median: float
    percentile_95: float
    num_points: int

    @classmethod
    def of(cls, ratios: list[float]) -> "Errors":
        """Take ratios of two times of the same."""
        errors = sorted(math.expm1(abs(math.log(ratio))) for ratio in ratios)
        if not errors:
            return cls(0.0, 0.0, 0)
        median, percentile_95 = (
            errors[math.ceil(share * len(errors)) - 1] for share in (0.5, 0.95)
        )
        return cls(median, percentile_95, len(errors))


@dataclass(frozen=True)
class ProfileTable:
    """A profile.

    key: what it holds for. measured_at: ISO date and time. took_sec: to measure. num_repeats: of
    each point. prediction: of points held out, against what they took. noise: of points against
    themselves, measured twice.
    """

    key: Mapping[str, Any]
    measured_at: str
    took_sec: float
    num_repeats: int
    measurements: Measurements
    prediction: Errors
    noise: Errors


def make_key(
    *,
    device: str,
    model: LlamaConfig,
    dtype: str,
    precision: str,
    isa: str,
    num_threads: int,
    cpus: Sequence[int],
    shapes: Buckets,
    capacity: Capacity,
) -> dict[str, Any]:
    """Return what a profile holds for: what times depend on, by name.

    device: its kind. isa, num_threads, cpus: of the host's op.
    """
    return {
        "device": device,
        "cpu": cpu_model(),
        "model": asdict(model),
        "dtype": dtype,
        "precision": precision,
        "isa": isa,
        "num_threads": num_threads,
        "cpus": list(cpus),
        "shapes": {**asdict(shapes), "num_blocks": [*shapes.num_blocks.items()]},
        "capacity": asdict(capacity),
        "versions": {name: importlib.metadata.version(name) for name in PACKAGES},
    }


def path_of(folder: Path, key: Mapping[str, Any]) -> Path:
    """Return where the profile for a key lies."""
    digest = hashlib.sha256(_canonical(key).encode()).hexdigest()
    return folder / f"profile-{digest[:16]}.json"


def find_kept(
    cache_dir: str, key: Mapping[str, Any], on_progress: Callable[[str], None]
) -> ProfileTable | None:
    """Return the profile that was kept for a key, if there is one; say why one is not used.

    cache_dir: empty for nowhere.
    """
    if not cache_dir:
        return None
    try:
        return load(path_of(Path(cache_dir).expanduser(), key), key)
    except ProfileError as error:
        on_progress(f"profile    not used: {error}")
        return None


def save(path: Path, table: ProfileTable) -> None:
    """Write a profile in one atomic step; makes its folder. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(_to_json(table), indent=1) + "\n"
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".partial")
    try:
        with os.fdopen(handle, "w") as file:
            file.write(text)
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def load(path: Path, key: Mapping[str, Any]) -> ProfileTable | None:
    """Return a profile, None where there is none; ProfileError says what is wrong with the file."""
    try:
        text = path.read_text()
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as error:
        raise ProfileError(f"{path} cannot be read ({error})") from None
    try:
        found = json.loads(text)
    except ValueError as error:
        raise ProfileError(f"{path} is damaged ({error})") from None
    item = cast(dict[str, Any], found) if isinstance(found, dict) else {}
    if item.get("format") != FORMAT:
        raise ProfileError(
            f"{path} has format {item.get('format')!r}, not {FORMAT}: it is of another version"
        )
    if item.get("key") != json.loads(_canonical(key)):
        raise ProfileError(f"{path} is of another machine, model or settings")
    try:
        return _from_json(item)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        problem = f"{type(error).__name__}: {error}"
        raise ProfileError(f"{path} is damaged ({problem})") from None


def cpu_model(root: Path = Path("/")) -> str:
    """Return the CPU's name and how many of them this process may use. root: for tests."""
    info = root / "proc/cpuinfo"
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else 'unknown'}, {len(os.sched_getaffinity(0))} usable"


def _canonical(key: Mapping[str, Any]) -> str:
    return json.dumps(key, sort_keys=True)


def measurements_to_json(measurements: Measurements) -> dict[str, Any]:
    """Return measurements as they stand in a file."""
    stages = {
        name: [{"shape": list(shape), **asdict(point)} for shape, point in points.items()]
        for name, points in measurements.stages.items()
    }
    return {
        "dispatch_sec": measurements.dispatch_sec,
        "device_slowdown": measurements.device_slowdown,
        "host_slowdown": measurements.host_slowdown,
        "stages": stages,
    }


def _to_json(table: ProfileTable) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "key": dict(table.key),
        "measured_at": table.measured_at,
        "took_sec": table.took_sec,
        "num_repeats": table.num_repeats,
        "prediction": asdict(table.prediction),
        "noise": asdict(table.noise),
        **measurements_to_json(table.measurements),
    }


def _from_json(item: Mapping[str, Any]) -> ProfileTable:
    stages = {
        name: {
            tuple(int(size) for size in point["shape"]): Point(
                _seconds(point["sec"]), _seconds(point["spread_sec"])
            )
            for point in item["stages"][name]
        }
        for name in STAGES
    }
    if empty := [name for name, points in stages.items() if not points]:
        raise ValueError(f"no points of {', '.join(empty)}")
    return ProfileTable(
        key=item["key"],
        measured_at=str(item["measured_at"]),
        took_sec=_seconds(item["took_sec"]),
        num_repeats=int(item["num_repeats"]),
        measurements=Measurements(
            stages,
            _seconds(item["dispatch_sec"]),
            _seconds(item["device_slowdown"]),
            _seconds(item["host_slowdown"]),
        ),
        prediction=_errors(item["prediction"]),
        noise=_errors(item["noise"]),
    )


def _errors(item: Mapping[str, Any]) -> Errors:
    median, percentile_95 = (_seconds(item[name]) for name in ("median", "percentile_95"))
    return Errors(median, percentile_95, int(item["num_points"]))


def _seconds(value: Any) -> float:
    """Return a number as it may stand in a profile."""
    number = float(value)
    if not 0 <= number < math.inf:
        raise ValueError(f"{value!r} is out of range")
    return number
