"""Measure what it costs Python to start work on the device, and how soon it sees that work end.

    python -m launch.bench_dispatch --output=dispatch.json

Every figure is a median in seconds, with 10th and 90th percentiles. The cost of the engine's own
stages is in bench_device.py's results, where the engine's programs are.
"""

import itertools
import queue
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

from launch.environment import environment
from launch.measuring import BusyDevice, ResultFile, Row, now, reason, spread

_OUTPUT = flags.DEFINE_string("output", "docs/results/gpu_check/dispatch.json", "Result file.")
_BUDGET = flags.DEFINE_float("budget_sec", 40.0, "After this time no further group begins.")
_SMOKE = flags.DEFINE_bool("smoke", False, "Tiny sizes: shows that the script runs, no more.")

POLL_SEC = 50e-6  # how the engine's backend polls


def measure_seen(bench: BusyDevice) -> Iterator[Row]:
    """Time from a call to when its result is seen, by observer; `lag_sec` is behind the quickest.

    The program always takes the same time, so differences between observers are differences in
    seeing. `round_trip` is the same for a program that does next to nothing: it bounds lag plus
    launch from above.
    """
    ready: queue.SimpleQueue[float] = queue.SimpleQueue()
    watched: queue.SimpleQueue[jax.Array | None] = queue.SimpleQueue()

    def wait_in_thread() -> None:
        while (x := watched.get()) is not None:
            x.block_until_ready()
            ready.put(now())

    def poll(x: Any, pause_sec: float | None) -> float:
        while not x.is_ready():
            if pause_sec is not None:
                time.sleep(pause_sec)
        return now()

    def block(x: jax.Array) -> float:
        x.block_until_ready()
        return now()

    def by_thread(x: jax.Array) -> float:
        watched.put(x)
        return ready.get()

    def by_thread_then_main(x: jax.Array) -> float:
        by_thread(x)
        return now()

    observers: dict[str, Callable[[jax.Array], float]] = {
        "block_until_ready": block,
        "poll": lambda x: poll(x, None),
        "poll_50us": lambda x: poll(x, POLL_SEC),
        "waiter_thread": by_thread,
        "waiter_thread_to_main": by_thread_then_main,
    }
    waiter = threading.Thread(target=wait_in_thread, daemon=True)
    waiter.start()
    tiny = jax.device_put(np.ones(8, np.float32), bench.device)
    programs = {"queue_step": bench.queue_step, "round_trip": lambda: bench.add_one(tiny)}
    for program, call in programs.items():
        samples: dict[str, list[float]] = {name: [] for name in observers}
        for _ in range(bench.num_samples + 2):  # in turns: clocks drift alike for all
            for name, seen_at in observers.items():
                start = now()
                samples[name].append(seen_at(call()) - start)
        kept = {name: values[2:] for name, values in samples.items()}
        quickest = min(float(np.median(values)) for values in kept.values())
        for name, values in kept.items():
            lag = float(np.median(values)) - quickest
            yield {"program": program, "observer": name, **spread(values), "lag_sec": lag}
    watched.put(None)
    waiter.join()


def many_arguments(
    bench: BusyDevice, num_arrays: int, is_donated: bool
) -> tuple[Any, tuple, jax.Array]:
    """Return a compiled call shaped like a span of layers, its many arrays, and x."""

    def body(arrays: tuple[jax.Array, ...], x: jax.Array):
        for one in arrays:
            x = x + one
        return x, tuple(one + x for one in arrays) if is_donated else ()

    make = jax.jit(lambda: jnp.ones(8), out_shardings=bench.on_device)
    arrays = tuple(make() for _ in range(num_arrays))
    x = make()
    donated = (0,) if is_donated else ()
    return jax.jit(body, donate_argnums=donated), arrays, x


def burst(call: Any, arrays: tuple, x: jax.Array, num_calls: int) -> tuple[list[float], tuple]:
    """Return Python's seconds of each of several calls in a row, and the arrays to go on with."""
    seconds: list[float] = []
    for _ in range(num_calls):
        start = now()
        x, new_arrays = call(arrays, x)
        seconds.append(now() - start)
        arrays = new_arrays or arrays
    jax.block_until_ready(x)
    return seconds, arrays


def measure_dispatch(bench: BusyDevice) -> Iterator[Row]:
    """Time Python's share of a compiled call, by number of array arguments.

    aot: lowered and compiled beforehand, as the engine does; jit: through jax.jit's own cache.
    donated: every array is donated and returned.
    """
    for num_arrays, is_donated in itertools.product((1, 20, 100), (False, True)):
        jitted, arrays, x = many_arguments(bench, num_arrays, is_donated)
        calls = {"aot": jitted.lower(arrays, x).compile(), "jit": jitted}
        for kind, call in calls.items():
            samples: list[float] = []
            for _ in range(bench.num_samples):
                seconds, arrays = burst(call, arrays, x, 16)
                samples += seconds
            samples = samples[16:]
            yield {"arrays": num_arrays, "call": kind, "donated": is_donated, **spread(samples)}


def measure_dispatch_beside_waiter(bench: BusyDevice) -> Iterator[Row]:
    """Time a compiled call of 20 arrays behind a long queue, with and without a second thread.

    beside waiter: the thread blocks in block_until_ready on the queue's end; beside poller: it asks
    is_ready() every 50 us. deep_queue: 300 calls in one burst, to see where dispatch blocks.
    """
    jitted, arrays, x = many_arguments(bench, 20, False)
    call = jitted.lower(arrays, x).compile()

    def poll(last: Any) -> None:
        while not last.is_ready():
            time.sleep(POLL_SEC)

    watchers: dict[str, Callable[[jax.Array], Any] | None] = {
        "nothing": None,
        "waiter": jax.block_until_ready,
        "poller": poll,
    }
    for beside, watch in watchers.items():
        samples: list[float] = []
        for _ in range(bench.num_busy_samples + 1):
            last = bench.start_queue()
            thread = threading.Thread(target=watch or (lambda _: None), args=(last,))
            thread.start()
            seconds, _ = burst(call, arrays, x, 16)
            samples += seconds
            thread.join()
            last.block_until_ready()
        yield {"beside": beside, "calls": 16, **spread(samples[16:])}
    last = bench.start_queue()
    seconds, _ = burst(call, arrays, x, 300)
    last.block_until_ready()
    slow = [index for index, one in enumerate(seconds) if one > 10 * np.median(seconds)]
    first = slow[0] if slow else None
    longest = {"max_sec": max(seconds), "first_call_10_times_slower": first}
    yield {"beside": "deep_queue", "calls": 300, **spread(seconds), **longest}


def measure_control_flow(bench: BusyDevice) -> Iterator[Row]:
    """Time the call of a program behind a long queue, by the control flow it contains.

    XLA may read a condition on the host. Then the call, or the next one, lasts as long as the
    queue, and whatever Python wanted to do meanwhile waits: such a program must not stand in a
    sweep.
    """

    def plain(x: jax.Array) -> jax.Array:
        return x + 1

    def conditional(x: jax.Array) -> jax.Array:
        return jax.lax.switch(x[0].astype(jnp.int32) % 2, (lambda: x + 1, lambda: x * 2))

    def known_loop(x: jax.Array) -> jax.Array:
        return jax.lax.fori_loop(0, 32, lambda _, y: jnp.sin(y), x)

    def unknown_loop(x: jax.Array) -> jax.Array:
        return jax.lax.while_loop(lambda y: y[0] < 8, plain, x)

    def top_k(x: jax.Array) -> jax.Array:
        return jax.lax.top_k(x, 4)[0]

    x = jax.device_put(np.zeros(8, np.float32), bench.device)
    for function in (plain, conditional, known_loop, unknown_loop, top_k):
        row: Row = {"program": function.__name__}
        try:
            calls = [jax.jit(one).lower(x).compile() for one in (function, plain)]
            samples: list[tuple[float, float, float]] = []
            for _ in range(bench.num_busy_samples + 1):
                start = now()
                last = bench.start_queue()
                times = [now()]
                for call in calls:
                    call(x)
                    times.append(now())
                last.block_until_ready()
                samples.append((times[1] - times[0], times[2] - times[1], now() - start))
            called, next_called, queued = zip(*samples[1:], strict=True)
            following = spread(next_called, "next_call")
            yield {**row, **spread(called), **following, **spread(queued, "queue")}
        except Exception as error:
            yield {**row, "error": reason(error)}


def main(argv: Sequence[str]) -> int:
    del argv
    bench = BusyDevice(jax.devices()[0], smoke=_SMOKE.value)
    header = {
        "what": "dispatch and wake-ups; seconds",
        "smoke": _SMOKE.value,
        "queue": {"steps": bench.queue_steps, "step_sec": bench.step_sec},
        "environment": environment(bench.device),
    }
    results = ResultFile(Path(_OUTPUT.value), header, _BUDGET.value)
    for name, measure in (
        ("ready_to_seen", measure_seen),
        ("dispatch", measure_dispatch),
        ("dispatch_beside_waiter", measure_dispatch_beside_waiter),
        ("control_flow", measure_control_flow),
    ):
        results.measure(name, lambda m=measure: m(bench))
    print(f"results in {results.path}")
    return 1 if results.content["failed"] else 0


if __name__ == "__main__":
    sys.exit(app.run(main))
