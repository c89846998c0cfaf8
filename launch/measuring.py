"""How benchmarks time, budget and record: shared by the scripts named bench_*.

Owns the clock, the summary of samples and the result file, which is rewritten after every group of
rows, so that a run cut short keeps what it had. Refuses nothing: a group that fails is recorded and
the next begins.
"""

import importlib
import json
import time
import traceback
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from apex_jax.config import LlamaConfig, RopeConfig

Row = dict[str, Any]

_LLAMA_31 = RopeConfig(theta=500_000.0, scaling="llama3", factor=8.0)
_SHAPES = {
    "llama_3_1_8b": LlamaConfig(32, 4096, 14336, 32, 8, 128, 128_256, 131_072, rope=_LLAMA_31),
    "llama_2_7b": LlamaConfig(32, 4096, 11008, 32, 32, 128, 32_000, 4096),
    "smoke": LlamaConfig(4, 64, 128, 4, 2, 16, 512, 4096),
}
now = time.perf_counter


def spread(samples_sec: Sequence[float], name: str = "") -> Row:
    """Return median, 10th and 90th percentile in seconds; keys begin with `name`."""
    p10, median, p90 = np.percentile(samples_sec, (10, 50, 90))
    prefix = f"{name}_" if name else ""
    values = {"sec": median, "p10_sec": p10, "p90_sec": p90}
    return {f"{prefix}{key}": float(f"{value:.4g}") for key, value in values.items()}


def time_chain(
    step: Callable[[Any], Any], state: Any, *, num_steps: int, num_repeats: int
) -> list[float]:
    """Return seconds per step, one sample a repeat, of `state = step(state)` asynchronously.

    Each repeat enqueues all its steps and waits once, so that dispatch hides behind the device
    wherever it can, as it does in the engine. One repeat before them warms up.
    """
    samples: list[float] = []
    for _ in range(num_repeats + 1):
        jax.block_until_ready(state)
        start = now()
        for _ in range(num_steps):
            state = step(state)
        jax.block_until_ready(state)
        samples.append((now() - start) / num_steps)
    return samples[1:]


def reason(error: BaseException) -> str:
    """Return an exception in one short line."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300]}"


def architecture(name: str) -> LlamaConfig:
    """Return a model's shape: that of configs/NAME.py where it states one, else ours."""
    try:
        stated = importlib.import_module(f"configs.{name}").get_config().model.architecture
    except ModuleNotFoundError:
        stated = None
    if stated is None and name not in _SHAPES:
        raise ValueError(f"no shape is known for {name!r}; known: {', '.join(_SHAPES)}")
    return stated or _SHAPES[name]


def measure_bandwidth(device: jax.Device, *, smoke: bool) -> tuple[list[Row], float]:
    """Measure device memory by reading (a sum) and by copying; return rows and the best bytes/s.

    Shares of bandwidth elsewhere refer to the better of the two: the less flattering choice.
    """
    num_bytes = 2**22 if smoke else 2**31
    x = jnp.ones(num_bytes // 4, jnp.float32, device=device)
    total = jax.jit(lambda so_far, x: so_far + x.sum())
    add_one = jax.jit(lambda x: x + 1, donate_argnums=0)
    zero = jnp.zeros((), jnp.float32, device=device)
    timing = {"num_steps": 10, "num_repeats": 3 if smoke else 10}
    samples = {
        "read": (num_bytes, time_chain(lambda so_far: total(so_far, x), zero, **timing)),
        "read_and_write": (2 * num_bytes, time_chain(add_one, jnp.copy(x), **timing)),
    }
    rows = [
        {"access": name, "bytes": moved, **spread(sec), "gb_per_sec": moved / np.median(sec) / 1e9}
        for name, (moved, sec) in samples.items()
    ]
    return rows, max(row["gb_per_sec"] for row in rows) * 1e9


class BusyDevice:
    """A device, the host beside it, and work to keep the device busy with.

    queue_step: a program of about `step_sec`; a queue is `queue_steps` of them, each taking the
    result of the one before. add_one: a program that does next to nothing.
    """

    def __init__(self, device: jax.Device, *, smoke: bool):
        self.device, self.host = device, jax.devices("cpu")[0]
        self.on_device = jax.sharding.SingleDeviceSharding(device)
        self.on_host = jax.sharding.SingleDeviceSharding(self.host)
        self.pinned = jax.sharding.SingleDeviceSharding(device, memory_kind="pinned_host")
        self.num_samples = 3 if smoke else 30
        self.num_busy_samples = 2 if smoke else 10
        self.queue_steps = 3 if smoke else 10
        self.add_one = jax.jit(lambda x: x + jnp.ones((), x.dtype))
        size = 64 if smoke else 4096
        self._start_queue = jnp.ones((size, size), jnp.bfloat16, device=device)
        self._num_matmuls = 1
        one_sec = self._step_sec()
        self._num_matmuls = 9
        matmul_sec = max((self._step_sec() - one_sec) / 8, 1e-6)
        # Unrolled, with a count known at compile time: XLA may ask the host about a loop's end.
        self._num_matmuls = max(1, min(64, round((0.5e-3 if smoke else 2e-3) / matmul_sec)))
        self.step_sec = self._step_sec()

    def queue_step(self, x: jax.Array | None = None) -> jax.Array:
        return _matmuls(self._start_queue if x is None else x, self._num_matmuls)

    def start_queue(self) -> jax.Array:
        """Enqueue all steps of a queue; return the last result."""
        last = self.queue_step()
        for _ in range(self.queue_steps - 1):
            last = self.queue_step(last)
        return last

    def _step_sec(self) -> float:
        step = lambda x: _matmuls(x, self._num_matmuls)  # noqa: E731
        samples = time_chain(step, self._start_queue, num_steps=4, num_repeats=5)
        return float(np.median(samples))


@partial(jax.jit, static_argnums=1)
def _matmuls(x: jax.Array, num_matmuls: int) -> jax.Array:
    y = x
    for _ in range(num_matmuls):
        y = (y @ x) * jnp.asarray(1 / x.shape[0], x.dtype)
    return y


class ResultFile:
    """One JSON file of named groups of rows.

    path: where it lies; its folder is made. budget_sec: after this time no further group begins;
    those are listed as left out. line: what is printed of a row.
    """

    def __init__(
        self, path: Path, header: Row, budget_sec: float, line: Callable[[Row], str] | None = None
    ):
        self.path, self._start, self._line = path, now(), line or _line
        self._deadline = self._start + budget_sec
        groups: dict[str, Any] = {}
        self.content = {**header, "groups": groups, "failed": {}, "left_out": {}, "seconds": {}}
        path.parent.mkdir(parents=True, exist_ok=True)
        self._write()

    @property
    def left_sec(self) -> float:
        return self._deadline - now()

    def leave_out(self, group: str, why: str) -> None:
        """Record a group that is not measured."""
        self.content["left_out"][group] = why
        self._write()

    def measure(self, group: str, rows: Callable[[], Iterable[Row]]) -> None:
        """Append each row as it is measured; note a failure or a budget spent, and go on."""
        content, start = self.content, now()
        if self.left_sec <= 0:
            self.leave_out(group, "the time budget was spent")
            return
        print(f"== {group}", flush=True)
        kept = content["groups"].setdefault(group, [])
        try:
            for row in rows():
                kept.append(_plain(row))
                print("  " + self._line(row), flush=True)
                self._write()
                if self.left_sec <= 0:
                    content["left_out"][group] = f"the time budget was spent after {len(kept)} rows"
                    break
        except Exception as error:
            content["failed"][group] = reason(error)
            traceback.print_exc()
        content["seconds"][group] = round(now() - start, 2)
        self._write()

    def record(self, group: str, rows: Iterable[Row]) -> None:
        """Write rows that follow from others, whatever the budget."""
        self.content["groups"][group] = [_plain(row) for row in rows]
        self._write()

    def _write(self) -> None:
        """Replace the file in one step: whoever reads it finds a whole one. A row is one line."""
        groups = ",\n".join(
            f"{json.dumps(name)}: [\n" + ",\n".join(f"  {json.dumps(row)}" for row in rows) + "\n ]"
            for name, rows in self.content["groups"].items()
        )
        rest = {name: value for name, value in self.content.items() if name != "groups"}
        text = json.dumps(rest, indent=1).removesuffix("\n}")
        partly = self.path.with_suffix(".partial")
        partly.write_text(f'{text},\n"groups": {{\n{groups}\n}}\n}}\n')
        partly.replace(self.path)


def _plain(value: Any) -> Any:
    """Return a value as JSON has it, numpy's scalars included; six digits of a float are plenty."""
    if isinstance(value, dict):
        return {key: _plain(one) for key, one in value.items()}
    if isinstance(value, np.generic):
        value = value.item()
    return float(f"{value:.6g}") if isinstance(value, float) else value


def _line(row: Row) -> str:
    return "  ".join(f"{key}={_short(value)}" for key, value in row.items())


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
