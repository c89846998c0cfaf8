"""The executables: every stage compiled ahead of time for every bucket.

Owns compiling in parallel and the executables; lowering.py says what there is to compile. Knows
shapes only, so it can work before any weight is loaded. What modifies scores or reports logprobs is
compiled when a request first needs it, since most jobs never do. Called by the xla backend.
"""

import concurrent.futures
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

from apex_jax.buckets import Buckets
from apex_jax.config import ConfigError, LlamaConfig
from apex_jax.lowering import Lowering, ProgramKey

MAX_LAYERS_PER_PROGRAM = 11  # compile time grows with it, dispatches per sweep shrink
# With a host lane the rows leave and enter single layers around each cohort's place, the more of
# them the longer the programs. Of 32 layers 4 take the fewest stages a sweep, with one cohort 24
# (8 layers take 27), with two 28 (35), with four 36 (57).
MAX_LAYERS_BESIDE_COHORTS = 5


class Programs:
    """All executables of one model on one device.

    Attributes: compile_sec by program, temp_bytes (the most scratch memory any of them takes).
    on_late: gets a line for each program that is compiled when it is first needed.
    """

    def __init__(
        self,
        model: LlamaConfig,
        *,
        dtype: np.dtype,
        buckets: Buckets,
        num_pages: int,
        num_slots: int,
        num_layers: int,
        device: jax.Device,
        precision: str,
        has_native_pages: bool = False,
        on_late: Callable[[str], None] = lambda line: None,
    ):
        self.buckets = buckets
        self._on_late = on_late
        self.num_layers = num_layers
        self.compile_sec: dict[ProgramKey, float] = {}
        self._executables: dict[ProgramKey, Any] = {}
        self._lowering = Lowering(
            model,
            dtype=dtype,
            buckets=buckets,
            num_pages=num_pages,
            num_slots=num_slots,
            num_layers=num_layers,
            device=device,
            precision=precision,
            has_native_pages=has_native_pages,
        )

    def __getitem__(self, key: ProgramKey) -> Any:
        return self._executables[key]

    def late(self, key: ProgramKey) -> Any:
        """Return a program of Lowering.late; the first time it is compiled, which waits."""
        executable = self._executables.get(key)
        if executable is None:
            start_sec = time.perf_counter()
            executable = self._executables[key] = self._lowering.late(key).compile()
            self.compile_sec[key] = time.perf_counter() - start_sec
            self._on_late(f"compiled {key}, which no request before needed")
        return executable

    @property
    def temp_bytes(self) -> int:
        """The most scratch memory that any program takes."""
        analyses = (program.memory_analysis() for program in self._executables.values())
        return max((one.temp_size_in_bytes for one in analyses if one is not None), default=0)

    def hlo_text(self, key: ProgramKey) -> str:
        """Return the optimised HLO of a program."""
        return self._executables[key].as_text()

    def compile(self, num_threads: int, on_progress: Callable[[int, int, str], None]) -> None:
        """Compile everything; `on_progress(done, total, program)` follows each.

        An exception, a signal's among them, drops what has not begun to compile.
        """

        def build(key: ProgramKey, lowered: Any) -> tuple[ProgramKey, Any, float]:
            start_sec = time.perf_counter()
            executable = lowered.compile()
            return key, executable, time.perf_counter() - start_sec

        pool = concurrent.futures.ThreadPoolExecutor(num_threads)
        try:
            futures = [pool.submit(build, key, lowered) for key, lowered in self._lower()]
            for done, future in enumerate(concurrent.futures.as_completed(futures), start=1):
                key, executable, seconds = future.result()
                self._executables[key] = executable
                self.compile_sec[key] = seconds
                on_progress(done, len(futures), str(key))
        finally:
            pool.shutdown(wait=False, cancel_futures=True)

    def _lower(self) -> Iterator[tuple[ProgramKey, jax.stages.Lowered]]:
        """Trace each stage for each bucket."""
        return self._lowering.all_stages()


def span_of_layers(num_layers: int, requested: int | None, *, has_host_lane: bool) -> int:
    """Return how many layers a program takes: the largest divisor of num_layers up to a limit."""
    if requested is None:
        limit = MAX_LAYERS_BESIDE_COHORTS if has_host_lane else MAX_LAYERS_PER_PROGRAM
        return max(span for span in range(1, limit + 1) if num_layers % span == 0)
    if num_layers % requested:
        raise ConfigError(
            f"--config.compile.layers_per_program is {requested}; it must divide the model's "
            f"{num_layers} layers"
        )
    return requested
