"""A schedule of cohorts played ahead, with nothing but the times of its stages and jobs.

Owns what the dispatch loop would do beside the device's rows under a policy that merges: who is
ready when, who rides, who passes alone, who waits. A few hundred host jobs, by arithmetic alone, so
that a schedule is tried before it is chosen. Called by prediction.py. Imports no jax.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

from apex_jax.policies import spacing

SETTLING_TOKENS, NUM_TOKENS = 1, 2  # of the cohorts, before and while they are looked at
MAX_SWEEPS = 100  # of a look, where the host takes many for a layer


class CohortTimes(NamedTuple):
    """Seconds of a cohort's rows.

    merge: what they add to the boundary of the device's rows. alone: a boundary of theirs. enter,
    leave: into the first layer, and out of the last and to a token. host: the attention of a layer.
    way: to the host, or back.
    """

    rows: int
    merge: float
    alone: float
    enter: float
    leave: float
    host: float
    way: float


class DeviceTimes(NamedTuple):
    """Seconds of the device's rows.

    begin, end: of a sweep, outside its layers. enter, leave: into the first layer, out of the last.
    linear, attention: of a layer by itself. program: of `span` layers as one. slowdown: while a
    host job runs. dispatch: Python's, for a stage.
    """

    num_layers: int
    span: int
    begin: float
    enter: float
    linear: float
    attention: float
    leave: float
    end: float
    program: float
    slowdown: float
    dispatch: float


class Look(NamedTuple):
    """What was seen. row_layers: of the host, each a row in a layer. host_sec: that it attended."""

    seconds: float
    num_sweeps: int
    row_layers: int
    host_sec: float


class _Cohort:
    """A cohort's token on its way, as in dispatch.py; ready_sec: None before its first layer."""

    __slots__ = ("num_extra_passes", "num_passes", "num_tokens", "point", "ready_sec", "times")

    def __init__(self, times: CohortTimes):
        self.times, self.num_tokens = times, 0
        self.begin()

    def begin(self) -> None:
        self.point, self.num_extra_passes, self.num_passes = 0, 0, 0
        self.ready_sec: float | None = None


class Rehearsal:
    """One schedule. passes: as of Merging; with one, the cohorts keep apart."""

    def __init__(self, device: DeviceTimes, cohorts: Sequence[CohortTimes], passes: int | None):
        self._device, self._passes = device, passes
        is_spread = passes == 1 and len(cohorts) > 1
        self._spacing = spacing(device.num_layers, len(cohorts)) if is_spread else 0
        self._cohorts = [_Cohort(times) for times in cohorts]
        self._now_sec = 0.0  # Python's clock
        self._before_last_sec = self._device_free_sec = self._host_free_sec = 0.0
        self._first = self._cohorts[0]
        self._row_layers = 0
        self._is_asking = False  # at each layer, about who is not ready yet
        # Where each decision waits for the device's attention before the next stage is enqueued.
        self._layer_sec = max(
            max(device.attention, device.dispatch) + device.linear, 2 * device.dispatch
        )
        self._host_sec = 0.0

    def look(self) -> Look:
        """Play until the cohorts are in step, and then on for a few tokens of one of them."""
        self._play(SETTLING_TOKENS)
        begin_sec, row_layers, host_sec = self._device_free_sec, self._row_layers, self._host_sec
        num_sweeps = self._play(NUM_TOKENS)
        return Look(
            self._device_free_sec - begin_sec,
            num_sweeps,
            self._row_layers - row_layers,
            self._host_sec - host_sec,
        )

    def _play(self, num_tokens: int) -> int:
        """Play until a cohort has sampled so often, or for as long as a look lasts.

        Returns the sweeps; in the last of them the host was given something.
        """
        first = self._first
        end, num_sweeps = first.num_tokens + num_tokens, 0
        while first.num_tokens < end:
            row_layers = self._row_layers
            self._sweep()
            num_sweeps += 1
            if num_sweeps >= MAX_SWEEPS and (
                self._row_layers > row_layers or num_sweeps >= 2 * MAX_SWEEPS
            ):
                break
        return num_sweeps

    def _sweep(self) -> None:
        device = self._device
        for cohort in self._cohorts:
            cohort.num_passes = 0
        self._enter()
        self._enqueue(device.begin)
        layer, first_sec, is_inside = 0, device.enter, False
        while (stop := self._next_stop(layer)) is not None:
            self._carry(stop - layer, first_sec, is_inside=is_inside, is_stop=True)
            layer, first_sec = stop, device.linear
            merging = self._decide(layer)
            is_inside = layer < device.num_layers and bool(merging)
            if is_inside:
                [cohort] = merging
                self._enqueue(device.linear + cohort.times.merge)
                cohort.num_extra_passes = 0
                self._attend(cohort)
            elif merging:
                self._sample(merging)
        self._carry(device.num_layers - layer, device.linear, is_inside=is_inside, is_stop=False)
        self._enqueue(device.end if layer == 0 else device.leave + device.end)

    def _enter(self) -> None:
        for cohort in self._cohorts:
            entered = [one for one in self._cohorts if one.ready_sec is not None]
            if cohort.ready_sec is None and all(one.point >= self._spacing for one in entered):
                self._enqueue(cohort.times.enter)
                self._attend(cohort)

    def _next_stop(self, layer: int) -> int | None:
        """Return the next boundary at which a cohort may do something."""
        device, passes = self._device, self._passes
        points: list[int] = []
        soonest_sec = math.inf
        for cohort in self._cohorts:
            if cohort.ready_sec is None or (passes == 1 and cohort.num_passes):
                continue
            if cohort.point > layer:
                points.append(cohort.point)
            if cohort.point < device.num_layers and not self._is_spent(cohort):
                soonest_sec = min(soonest_sec, cohort.ready_sec)
        stop = min(points, default=None)
        self._is_asking = passes != 1 and soonest_sec < math.inf
        if not self._is_asking or layer == device.num_layers:
            return stop
        num_in_vain = int(max(0.0, soonest_sec - self._device_free_sec) / self._layer_sec)
        return min(layer + 1 + num_in_vain, stop or device.num_layers)

    def _is_spent(self, cohort: _Cohort) -> bool:
        return self._passes is not None and cohort.num_extra_passes >= self._passes - 1

    def _carry(self, num_layers: int, first_sec: float, *, is_inside: bool, is_stop: bool) -> None:
        """Bring device rows through layers; to a stop, behind the attention of the last of them."""
        device = self._device
        if is_inside:
            self._enqueue(device.attention)
            num_layers -= 1
            first_sec = device.linear
        if not num_layers:
            return
        if self._passes == 1 or not is_stop:
            num_programs, num_layers = divmod(num_layers - is_stop, device.span)
            num_layers += is_stop
            for _ in range(num_programs):
                self._enqueue(device.program)
        elif num_layers > 1 and self._is_asking:
            # Each decision waits until the device is at its attention, and is to skip.
            waited_sec = (num_layers - 1) * self._layer_sec
            self._now_sec = max(self._now_sec, self._before_last_sec) + waited_sec
            self._before_last_sec += waited_sec
            self._device_free_sec += waited_sec
            num_layers = 1
        for _ in range(num_layers):
            self._enqueue(first_sec)
            self._enqueue(device.attention)
            first_sec = device.linear

    def _decide(self, boundary: int) -> list[_Cohort]:
        """Give extra passes as Merging does; return who merges."""
        num_layers = self._device.num_layers
        merging: list[_Cohort] = []
        for cohort in self._cohorts:
            ready_sec = cohort.ready_sec
            if ready_sec is None or (self._passes == 1 and cohort.num_passes):
                continue
            can_merge = cohort.point == boundary and (not merging or boundary == num_layers)
            if not can_merge and (cohort.point == num_layers or self._is_spent(cohort)):
                continue
            until_sec = max(self._now_sec, self._before_last_sec)
            if ready_sec > until_sec:
                self._now_sec = until_sec
                if can_merge:
                    cohort.num_extra_passes = 0
                continue
            self._now_sec = max(self._now_sec, ready_sec)
            if can_merge:
                merging.append(cohort)
            else:
                self._enqueue(cohort.times.alone)
                cohort.num_extra_passes += 1
                self._attend(cohort)
        return merging

    def _sample(self, cohorts: Sequence[_Cohort]) -> None:
        for cohort in cohorts:
            self._enqueue(cohort.times.leave)
            cohort.num_tokens += 1
            cohort.begin()
            self._cohorts.remove(cohort)
            self._cohorts.append(cohort)

    def _attend(self, cohort: _Cohort) -> None:
        """Hand a cohort to the host, as the device's last stage ends."""
        times = cohort.times
        self._now_sec += self._device.dispatch
        arrival_sec = max(self._now_sec, self._device_free_sec + times.way)
        self._host_free_sec = max(arrival_sec, self._host_free_sec) + times.host
        cohort.ready_sec = self._host_free_sec + times.way
        cohort.point += 1
        cohort.num_passes += 1
        self._row_layers += times.rows
        self._host_sec += times.host

    def _enqueue(self, seconds: float) -> None:
        device = self._device
        self._now_sec += device.dispatch
        self._before_last_sec = self._device_free_sec
        start_sec = max(self._now_sec, self._device_free_sec)
        if start_sec < self._host_free_sec:
            seconds *= device.slowdown
        self._device_free_sec = start_sec + seconds
