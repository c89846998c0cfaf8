"""What a measurement was taken on: the block that every result file of a benchmark carries.

    python -m launch.environment        # prints it

Owns the reading of hardware, versions and source state; refuses nothing: what cannot be read is
null. Does not start JAX, unless a device is given, so that a process which must leave the GPU alone
can use it.
"""

import datetime
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = (
    *("jax", "jaxlib", "jax-cuda13-plugin", "jax-cuda12-plugin", "flax", "numpy", "ml_dtypes"),
    *("nvidia-cudnn-cu13", "nvidia-cudnn-cu12", "nvidia-cublas", "torch", "transformers"),
    *("triton", "safetensors", "tokenizers", "orbax-checkpoint", "jaxtyping", "beartype"),
    *("ml_collections", "absl-py", "pytest", "hypothesis"),
)
_RELEVANT_VARIABLES = ("XLA_FLAGS", "XLA_PYTHON_CLIENT_", "JAX_", "CUDA_VISIBLE_", "OMP_NUM_")


def environment(device: jax.Device | None = None) -> dict[str, Any]:
    """Return hardware, versions, source and command line as JSON values; sizes are in bytes."""
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
        "git": _git(),
        "device": None if device is None else _jax_device(device),
        "nvidia_gpus": _nvidia_gpus(),
        "cpu": _cpu(),
        "memory_bytes": _memory_bytes(),
        "os": platform.platform(),
        "python": platform.python_version(),
        "packages": _versions(),
        "variables": {
            name: value
            for name, value in sorted(os.environ.items())
            if name.startswith(_RELEVANT_VARIABLES)
        },
    }


def _output_of(*command: str) -> str | None:
    """Return what a program prints, or None where it is missing or fails."""
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _git() -> dict[str, Any]:
    """Return the commit, and whether tracked files differ from it.

    A copy of the tree without its history may be told its commit in APEX_JAX_COMMIT.
    """
    commit = _output_of("git", "rev-parse", "HEAD")
    if commit is None:
        return {"commit": os.environ.get("APEX_JAX_COMMIT"), "is_dirty": None}
    changed = _output_of("git", "status", "--porcelain", "--untracked-files=no")
    return {"commit": commit, "is_dirty": None if changed is None else bool(changed)}


def _jax_device(device: jax.Device) -> dict[str, Any]:
    stats = device.memory_stats() or {}
    return {
        "platform": device.platform,
        "kind": device.device_kind,
        "compute_capability": getattr(device, "compute_capability", None),
        "platform_version": device.client.platform_version,
        "memory_limit_bytes": stats.get("bytes_limit"),
        "memory_kinds": sorted(memory.kind for memory in device.addressable_memories()),
    }


def _nvidia_gpus() -> list[dict[str, str]]:
    """Return what the driver says of each GPU: units are nvidia-smi's, part of the values."""
    fields = (
        *("name", "driver_version", "memory.total", "power.limit", "clocks.max.sm"),
        *("clocks.max.memory", "pcie.link.gen.max", "pcie.link.width.max"),
    )
    text = _output_of("nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader")
    lines = text.splitlines() if text else []
    return [dict(zip(fields, map(str.strip, line.split(",")), strict=False)) for line in lines]


def _cpu() -> dict[str, Any]:
    """Return the model's name and the cores there are, and those this process may use."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    quota = Path("/sys/fs/cgroup/cpu.max")
    return {
        "model": names[0] if names else platform.processor(),
        "num_cores": os.cpu_count(),
        "num_usable_cores": len(os.sched_getaffinity(0)),
        "cgroup_quota": quota.read_text().strip() if quota.exists() else None,
    }


def _memory_bytes() -> int | None:
    names = ("SC_PAGE_SIZE", "SC_PHYS_PAGES")
    if any(name not in os.sysconf_names for name in names):
        return None
    return os.sysconf(names[0]) * os.sysconf(names[1])


def _versions() -> dict[str, str | None]:
    versions: dict[str, str | None] = {}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    return versions


if __name__ == "__main__":
    print(json.dumps(environment(jax.devices()[0]), indent=1))
