"""The profiler: how long an engine's stages take, here and now.

Owns two ways to find out, both over a backend's verbs before there are requests: a profile, which
takes a minute, says how well it predicts, and is kept in a file; and a calibration, which takes
seconds. Called by the engine, and by launch/run_profiler.py. Imports no jax.
"""

import datetime
import statistics
import time
from collections.abc import Mapping
from typing import Any

from apex_jax.buckets import Buckets
from apex_jax.config import ProfileConfig
from apex_jax.hardware import Backend
from apex_jax.measured_times import MeasuredTimes
from apex_jax.plan import DecodeBatch
from apex_jax.profiling.batches import Capacity
from apex_jax.profiling.cases import Cases, Name, take_apart
from apex_jax.profiling.chains import StageChains
from apex_jax.profiling.check import held_out
from apex_jax.profiling.contention import measure_contention
from apex_jax.profiling.rounds import OnProgress, Timed, run_rounds
from apex_jax.profiling.table import (
    Errors,
    Measurements,
    Point,
    ProfileTable,
    find_kept,
)

PROFILE_SEC = 75.0  # after this no further round begins
MAX_ROUNDS = 21
CALIBRATION_SEC = 2.0
MAX_CALIBRATION_ROUNDS = 3
DISPATCHED_LINKS = 4  # before what is dispatched is waited for
DISPATCH_REPEATS = 7


class Profiler:
    """What can be measured of one engine. It has a host lane: without one nothing is predicted.

    key: what a profile of it holds for, as table.make_key has it.
    """

    def __init__(
        self, backend: Backend, shapes: Buckets, capacity: Capacity, key: Mapping[str, Any]
    ):
        self.key = key
        self._shapes, self._capacity = shapes, capacity
        self._chains = StageChains(backend, capacity)

    def times(self, config: ProfileConfig, on_progress: OnProgress) -> MeasuredTimes:
        """Return the times of a profile that was kept, or else calibrate; say which it is.

        A file that is no profile of this engine is reported, and not used.
        """
        table = None if config.recalibrate else self.kept(config, on_progress)
        if table is not None:
            on_progress(f"profile    measured {table.measured_at} on {table.key['device']}")
            return self.times_of(table.measurements)
        begin_sec = time.perf_counter()
        times = self.calibrate()
        on_progress(f"profile    calibrated now in {time.perf_counter() - begin_sec:.1f} s")
        return times

    def kept(self, config: ProfileConfig, on_progress: OnProgress) -> ProfileTable | None:
        """Return the profile that was kept of this engine, if there is one."""
        return find_kept(config.cache_dir, self.key, on_progress)

    def times_of(self, measurements: Measurements) -> MeasuredTimes:
        capacity = self._capacity
        return MeasuredTimes(
            measurements, self._shapes, num_layers=capacity.num_layers, span=capacity.span
        )

    def calibrate(self) -> MeasuredTimes:
        """Measure the first and the last bucket of each kind."""
        cases = Cases(self._chains, self._shapes, self._capacity, is_thorough=False)
        grid = {name: Timed(chain) for name, chain in cases.grid()}
        run_rounds([*grid.values()], MAX_CALIBRATION_ROUNDS, CALIBRATION_SEC, lambda _: None)
        return self.times_of(self._measurements(grid, cases))

    def profile(self, on_progress: OnProgress) -> ProfileTable:
        """Measure all buckets, and how well what lies between them is predicted."""
        begin_sec = time.perf_counter()
        cases = Cases(self._chains, self._shapes, self._capacity, is_thorough=True)
        grid = {name: Timed(chain) for name, chain in cases.grid()}
        points = held_out(self._chains, self._shapes, self._capacity)
        checks = [(point.predict, Timed(point.chain)) for point in points]
        everything = [*grid.values(), *(timed for _, timed in checks)]
        num_repeats = run_rounds(everything, MAX_ROUNDS, PROFILE_SEC, on_progress)
        measurements = self._measurements(grid, cases)
        times = self.times_of(measurements)
        return ProfileTable(
            key=self.key,
            measured_at=datetime.datetime.now().astimezone().isoformat(" ", "minutes"),
            took_sec=time.perf_counter() - begin_sec,
            num_repeats=num_repeats,
            measurements=measurements,
            prediction=Errors.of([predict(times) / timed.median for predict, timed in checks]),
            noise=Errors.of([timed.ratio_of_halves for timed in everything]),
        )

    def _measurements(self, grid: Mapping[Name, Timed], cases: Cases) -> Measurements:
        """Take the chains apart, and add what is not measured in rounds."""
        medians, low, high = (
            take_apart({name: timed.percentile(percent) for name, timed in grid.items()})
            for percent in (50, 10, 90)
        )
        stages = {
            stage: {
                shape: Point(sec, abs(high[stage][shape] - low[stage][shape]))
                for shape, sec in points.items()
            }
            for stage, points in medians.items()
        }
        on_device, on_host = cases.largest
        slowdowns = measure_contention(self._chains, on_device, on_host)
        return Measurements(stages, self._dispatch_sec(on_device), *slowdowns)

    def _dispatch_sec(self, batch: DecodeBatch) -> float:
        """Return Python's time for a stage, behind a device that is busy with large ones."""
        dispatch = self._chains.dispatches(batch)
        seconds = statistics.median(dispatch(DISPATCHED_LINKS) for _ in range(DISPATCH_REPEATS))
        return seconds / (2 * DISPATCHED_LINKS)
