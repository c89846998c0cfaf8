"""Measure transfers between device and host, by each route that JAX offers.

    python -m launch.bench_transfers --output=transfers.json

Moves the qkv rows of Llama-3.1-8B on an idle device and beside a long queue of other work, and says
what the host can read in place. Every figure is a median in seconds, with 10th and 90th
percentiles.
"""

import itertools
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

from launch.environment import environment
from launch.measuring import BusyDevice, ResultFile, Row, now, reason, spread

_OUTPUT = flags.DEFINE_string("output", "docs/results/gpu_check/transfers.json", "Result file.")
_BUDGET = flags.DEFINE_float("budget_sec", 80.0, "After this time no further group begins.")
_SMOKE = flags.DEFINE_bool("smoke", False, "Tiny sizes: shows that the script runs, no more.")

QKV_WIDTH = (32 + 2 * 8) * 128  # heads of q, k and v of Llama-3.1-8B, 128 wide
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 8192)  # the last: what moving a request's KV costs
BUSY_ROWS = (1, 16, 256)

Begin = Callable[[jax.Array], Any]
Finish = Callable[[Any], Any]


class Bench(BusyDevice):
    """A device that can be kept busy, and the sizes to measure."""

    def __init__(self, device: jax.Device, *, smoke: bool):
        super().__init__(device, smoke=smoke)
        self.rows = ROWS[:2] if smoke else ROWS
        self.busy_rows = BUSY_ROWS[:1] if smoke else BUSY_ROWS

    def qkv(self, rows: int) -> jax.Array:
        """Return a fresh array, ready on the device: no route may profit from a copy kept."""
        zeros = np.zeros((rows, QKV_WIDTH), jnp.bfloat16)
        return self.add_one(jax.device_put(zeros, self.device)).block_until_ready()


def routes_to_host(bench: Bench) -> dict[str, tuple[Begin, Finish]]:
    """Return how each route begins (returning at once where it can), and how it ends in numpy."""

    def copy_async(x: jax.Array) -> jax.Array:
        x.copy_to_host_async()
        return x

    return {
        "asarray": (lambda x: x, np.asarray),
        "copy_to_host_async": (copy_async, np.asarray),
        "device_put_to_cpu": (lambda x: jax.device_put(x, bench.host), np.asarray),
        "device_put_to_pinned": (lambda x: jax.device_put(x, bench.pinned), np.asarray),
        # Ready is enough for whoever reads the pinned memory in place; see the group zero_copy.
        "jit_to_pinned_until_ready": (
            jax.jit(lambda x: x, out_shardings=bench.pinned),
            jax.block_until_ready,
        ),
        "jit_to_pinned": (jax.jit(lambda x: x, out_shardings=bench.pinned), np.asarray),
    }


def routes_to_device(bench: Bench, rows: int) -> dict[str, Callable[[], Callable[[], jax.Array]]]:
    """Return makers of transfers to the device; a maker prepares the source, untimed."""

    def fresh() -> np.ndarray:
        return np.ones((rows, QKV_WIDTH), jnp.bfloat16)

    def of_numpy() -> Callable[[], jax.Array]:
        source = fresh()
        return lambda: jax.device_put(source, bench.device)

    def of_cpu_array() -> Callable[[], jax.Array]:
        source = jax.device_put(fresh(), bench.host).block_until_ready()
        return lambda: jax.device_put(source, bench.device)

    def of_pinned_by_put() -> Callable[[], jax.Array]:
        source = jax.device_put(fresh(), bench.pinned).block_until_ready()
        return lambda: jax.device_put(source, bench.on_device)

    to_device = jax.jit(lambda x: x, out_shardings=bench.on_device)

    def of_pinned_by_jit() -> Callable[[], jax.Array]:
        source = jax.device_put(fresh(), bench.pinned).block_until_ready()
        return lambda: to_device(source)

    return {
        "device_put_numpy": of_numpy,
        "device_put_cpu_array": of_cpu_array,
        "device_put_pinned": of_pinned_by_put,
        "jit_from_pinned": of_pinned_by_jit,
    }


def measure_idle(bench: Bench) -> Iterator[Row]:
    """Time each route on an idle device; `begin_sec` is what its start keeps Python for."""

    def row(route: str, direction: str, rows: int, samples: list[tuple[float, float]]) -> Row:
        num_bytes = rows * QKV_WIDTH * 2
        total = spread([total for _, total in samples])
        begin = float(np.median([begin for begin, _ in samples]))
        gb_per_sec = num_bytes / total["sec"] / 1e9
        head: Row = {"route": route, "direction": direction, "rows": rows, "bytes": num_bytes}
        return {**head, **total, "begin_sec": begin, "gb_per_sec": round(gb_per_sec, 3)}

    for rows in bench.rows:
        for route, (begin, finish) in routes_to_host(bench).items():
            samples: list[tuple[float, float]] = []
            try:
                for _ in range(bench.num_samples + 2):
                    x = bench.qkv(rows)
                    start = now()
                    pending = begin(x)
                    begun = now()
                    finish(pending)
                    samples.append((begun - start, now() - start))
            except Exception as error:
                yield {"route": route, "direction": "to_host", "rows": rows, "error": reason(error)}
                continue
            yield row(route, "to_host", rows, samples[2:])
        for route, make in routes_to_device(bench, rows).items():
            samples = []
            try:
                for _ in range(bench.num_samples + 2):
                    transfer = make()
                    start = now()
                    pending = transfer()
                    begun = now()
                    pending.block_until_ready()
                    samples.append((begun - start, now() - start))
            except Exception as error:
                yield {
                    "route": route,
                    "direction": "to_device",
                    "rows": rows,
                    "error": reason(error),
                }
                continue
            yield row(route, "to_device", rows, samples[2:])


def measure_busy(bench: Bench) -> Iterator[Row]:
    """Time each route while a queue of matmuls runs that has nothing to do with the data.

    to_host: a producer, then the queue; the transfer begins before or after the queue was enqueued.
    If it waits for its producer only, `sec` is far below `queue_sec`. Both count from the
    producer's enqueueing.
    """
    keys = ("route", "direction", "begins", "rows")

    def sample(rows: int, begin: Begin, finish: Finish, is_begun_first: bool):
        x = bench.qkv(rows)
        start = now()
        produced = bench.add_one(x)
        pending = begin(produced) if is_begun_first else None
        last = bench.start_queue()
        if not is_begun_first:
            pending = begin(produced)
        finish(pending)
        arrived = now()
        last.block_until_ready()
        return arrived - start, now() - start

    def sample_back(make: Callable[[], Callable[[], jax.Array]]):
        transfer = make()
        start = now()
        last = bench.start_queue()
        transfer().block_until_ready()
        arrived = now()
        last.block_until_ready()
        return arrived - start, now() - start

    def row(head: tuple, take: Callable[[], tuple[float, float]]) -> Row:
        named: Row = dict(zip(keys, head, strict=True))
        try:
            samples = [take() for _ in range(bench.num_busy_samples + 1)][1:]
        except Exception as error:
            return {**named, "error": reason(error)}
        arrived, queued = zip(*samples, strict=True)
        share = float(np.median(np.array(arrived) / np.array(queued)))
        waits = {"waits_for_queue": share > 0.5}
        return {**named, **spread(arrived), **spread(queued, "queue"), **waits}

    for rows in bench.busy_rows:
        for (route, steps), is_first in itertools.product(
            routes_to_host(bench).items(), (True, False)
        ):
            head = (route, "to_host", "before_queue" if is_first else "after_queue", rows)
            yield row(head, lambda s=steps, r=rows, f=is_first: sample(r, *s, f))
        for route, make in routes_to_device(bench, rows).items():
            yield row((route, "to_device", "after_queue", rows), lambda m=make: sample_back(m))


def measure_zero_copy(bench: Bench) -> Iterator[Row]:
    """Say whether the host sees an array in place: same address, right values.

    A numpy array cannot carry bfloat16 through DLPack, so uint16 is tried too.
    """
    to_pinned = jax.jit(lambda x: x, out_shardings=bench.pinned)
    total = jax.jit(lambda x: x.astype(jnp.float32).sum(), out_shardings=bench.on_host)

    def address(x: Any) -> int:
        return x.ctypes.data if isinstance(x, np.ndarray) else x.unsafe_buffer_pointer()

    views: dict[str, Callable[[Any, Any], Any]] = {
        "np.asarray(pinned)": lambda pinned, _: np.asarray(pinned),
        "np.from_dlpack(pinned)": lambda pinned, _: np.from_dlpack(pinned),
        "jnp.from_dlpack(pinned, cpu)": lambda pinned, _: jax.dlpack.from_dlpack(
            pinned, device=bench.host
        ),
        "device_put(pinned, cpu)": lambda pinned, _: jax.device_put(pinned, bench.host),
        "jit on cpu of pinned": lambda pinned, _: total(pinned),
        "np.asarray(cpu array)": lambda _, on_cpu: np.asarray(on_cpu),
        "device_put(np.asarray(cpu array), cpu)": lambda _, on_cpu: jax.device_put(
            np.asarray(on_cpu), bench.host
        ),
    }
    for dtype, (name, view) in itertools.product((jnp.bfloat16, jnp.uint16), views.items()):
        expected = np.arange(128).reshape(2, 64).astype(dtype)
        x = bench.add_one(jax.device_put(expected - expected.dtype.type(1), bench.device))
        pinned, on_cpu = to_pinned(x), jax.device_put(x, bench.host)
        jax.block_until_ready((pinned, on_cpu))
        row: Row = {"view": name, "dtype": jnp.dtype(dtype).name}
        try:
            seen = view(pinned, on_cpu)
            if getattr(seen, "shape", None) == ():
                yield {**row, "works": float(seen) == expected.astype(np.float32).sum()}
                continue
            works = bool((np.asarray(seen) == expected).all())
            source = on_cpu if "cpu array" in name else pinned
            yield {**row, "works": works, "in_place": address(seen) == address(source)}
        except Exception as error:
            yield {**row, "works": False, "error": reason(error)}


def main(argv: Sequence[str]) -> int:
    del argv
    device = jax.devices()[0]
    bench = Bench(device, smoke=_SMOKE.value)
    header = {
        "what": "transfers between device and host; seconds",
        "smoke": _SMOKE.value,
        "qkv_width": QKV_WIDTH,
        "dtype": "bfloat16",
        "queue": {"steps": bench.queue_steps, "step_sec": bench.step_sec},
        "environment": environment(device),
    }
    results = ResultFile(Path(_OUTPUT.value), header, _BUDGET.value)
    for name, measure in (
        ("idle", measure_idle),
        ("busy", measure_busy),
        ("zero_copy", measure_zero_copy),
    ):
        results.measure(name, lambda m=measure: m(bench))
    print(f"results in {results.path}")
    return 1 if results.content["failed"] else 0


if __name__ == "__main__":
    sys.exit(app.run(main))
