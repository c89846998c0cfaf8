"""What a schedule would yield in a steady state, from stage times.

Owns the composition of stages into sweeps as the dispatch loop plays them: the device's queue and
the host's side by side, transfers on the way, a cohort that comes late waits. Smooth flows: nothing
is simulated, and tests hold the result to what the simulated backend does. Called by adaptive.py
and by plans. Imports no jax.
"""

import math
from typing import NamedTuple

from apex_jax.cost_model import Times
from apex_jax.rehearsal import CohortTimes, DeviceTimes, Rehearsal

NUM_ITERATIONS = 6  # of a sweep's time and what fits in it, which depend on each other


class Demand(NamedTuple):
    """What there is to decode.

    device_tokens: of KV of all device rows. host_row_tokens: of a host row, on average.
    prompt_sec: device time of prompts per sweep.
    """

    device_rows: int
    device_tokens: int
    host_rows: int = 0
    host_row_tokens: float = 0.0
    prompt_sec: float = 0.0


class Choice(NamedTuple):
    """A schedule with its numbers.

    name: device_only, merging, pipelining, (with takes_all) pipelining_all, or homing, in which no
    token begins. cohorts: with tokens under way. passes: points that each may pass per sweep; None
    for all. cohort_rows: the most rows of one.
    """

    name: str
    cohorts: int = 0
    passes: int | None = 0
    cohort_rows: int = 0


class Prediction(NamedTuple):
    """What a choice comes to.

    sweep_sec: from one sweep to the next. device_rate, host_rate: tokens per second of each lane.
    host_rows: with tokens under way. host_busy: share of the time in which the host attends.
    """

    choice: Choice
    sweep_sec: float
    device_rate: float
    host_rate: float = 0.0
    host_rows: int = 0
    host_busy: float = 0.0

    @property
    def rate(self) -> float:
        return self.device_rate + self.host_rate

    def cohort_job_sec(self, num_layers: int) -> float:
        """Return how long the host attends in a layer to one cohort."""
        if not self.host_rate:
            return 0.0
        rows = self.host_rows / self.choice.cohorts
        return rows * self.host_busy / (num_layers * self.host_rate)

    @property
    def host_tpot_sec(self) -> float | None:
        """Time per output token of a host row that always rides; None where none does."""
        return self.host_rows / self.host_rate if self.host_rate else None


DEVICE_ONLY = Choice("device_only")


class Predictor:
    """Predictions over one set of stage times; layers_per_program: of the Layers stage."""

    def __init__(self, times: Times, layers_per_program: int):
        self._times, self._span = times, layers_per_program
        self._num_layers = times.num_layers

    def device_only(self, demand: Demand) -> Prediction:
        if not demand.device_rows:
            return Prediction(DEVICE_ONLY, demand.prompt_sec, 0.0)
        sweep_sec = self._device_sweep_sec(demand, 0)
        return Prediction(DEVICE_ONLY, sweep_sec, demand.device_rows / sweep_sec)

    def merging(self, demand: Demand, choice: Choice) -> Prediction:
        """Cohorts that advance with the device's rows and, with more passes, between them."""
        times, num_layers = self._times, self._num_layers
        rows = min(choice.cohort_rows, -(-demand.host_rows // choice.cohorts))
        cohorts = min(choice.cohorts, -(-demand.host_rows // rows))
        host_rows = min(cohorts * rows, demand.host_rows)
        if not demand.device_rows:
            return self._alone(demand, choice, rows, cohorts)
        host_sec, trip_sec = self._host_trip(rows, demand)
        alone_sec = times.linear(rows)
        # Into its first layer and out of its last a cohort goes alone, once a token.
        ends_sec = times.embed(rows) + times.pre_attention(rows) + times.post_attention(rows)
        merge_sec = times.linear(demand.device_rows, rows) - times.linear(demand.device_rows)
        num_single = num_layers if choice.passes != 1 else min(num_layers, cohorts * self._span)
        base_sec = self._device_sweep_sec(demand, num_single)
        if choice.passes != 1:
            # Decisions are put off until the device is at its attention: a short one ends before
            # Python has dispatched what follows.
            attention_sec = times.device_attention(demand.device_rows, demand.device_tokens)
            base_sec += num_layers * max(0.0, times.dispatch_sec - attention_sec)
        with_all_sec = base_sec + cohorts * merge_sec
        sweep_sec, num_sweeps, host_busy = with_all_sec, float(num_layers), 0.0
        for _ in range(NUM_ITERATIONS):
            # Cohorts queue for the host: a quarter of another's turn, as often as it is busy.
            queue_sec = (cohorts - 1) * host_sec * host_busy / 4 if choice.passes != 1 else 0.0
            fewest_sweeps = self._fewest_sweeps(
                choice.passes, trip_sec + queue_sec, base_sec, demand
            )
            host_sweeps = num_layers * cohorts * host_sec / sweep_sec
            num_sweeps = max(fewest_sweeps, host_sweeps)
            if choice.passes != 1:
                # Where the device's turns and the host are about as tight, both hinder at times.
                num_sweeps = math.hypot(fewest_sweeps**6, host_sweeps**6) ** (1 / 6)
            if choice.passes == 1 and not self._is_flooded(cohorts, host_sec, trip_sec, sweep_sec):
                turn_sec = max(trip_sec, cohorts * host_sec)
                num_sweeps = max(num_sweeps, num_layers * -(-turn_sec // sweep_sec) + 1)
            num_alone = 0.0
            if choice.passes != 1:
                # Who waits for the device rides with it; who waits for the host mostly does not.
                num_merges = max(0.0, 1 - 5 * (num_sweeps / fewest_sweeps - 1))
                num_merges *= 1 - 1 / num_sweeps  # but not in the sweep it samples with
                num_alone = max(0.0, num_layers / num_sweeps - num_merges)
            host_busy = min(1.0, cohorts * num_layers / num_sweeps * host_sec / sweep_sec)
            num_merged = min(1.0, num_layers / num_sweeps - num_alone)
            riding_sec = num_merged * merge_sec + num_alone * alone_sec + ends_sec / num_sweeps
            sweep_sec = base_sec + cohorts * riding_sec
            sweep_sec *= 1 + (times.device_slowdown - 1) * host_busy
        return Prediction(
            choice,
            sweep_sec,
            demand.device_rows / sweep_sec,
            host_rows / num_sweeps / sweep_sec,
            host_rows,
            host_busy,
        )

    def rehearsed(self, demand: Demand, choice: Choice) -> Prediction:
        """Likewise, beside rows of the device, by playing a few of their tokens ahead.

        Closer, and a hundred times as dear.
        """
        times, span, rows = self._times, self._span, demand.device_rows
        linear_sec, head_sec = times.linear(rows), times.head(rows)
        device = DeviceTimes(
            num_layers=self._num_layers,
            span=span,
            begin=times.embed(rows) + demand.prompt_sec,
            enter=times.pre_attention(rows),
            linear=linear_sec,
            attention=times.device_attention(rows, demand.device_tokens),
            leave=times.post_attention(rows),
            end=head_sec,
            program=times.layers(span, rows, demand.device_tokens),
            slowdown=times.device_slowdown,
            dispatch=times.dispatch_sec,
        )
        most = min(choice.cohort_rows, -(-demand.host_rows // choice.cohorts))
        firsts = range(0, min(demand.host_rows, choice.cohorts * most), most)
        cohorts = [
            CohortTimes(
                rows=size,
                merge=times.linear(rows, size) - linear_sec,
                alone=times.linear(size),
                enter=times.embed(size) + times.pre_attention(size),
                leave=times.post_attention(size) + times.head(rows + size) - head_sec,
                host=self._host_sec(size, demand),
                way=times.transfer(num_rows=size),
            )
            for size in (min(most, demand.host_rows - first) for first in firsts)
        ]
        seen = Rehearsal(device, cohorts, choice.passes).look()
        return Prediction(
            choice,
            seen.seconds / seen.num_sweeps,
            rows * seen.num_sweeps / seen.seconds,
            seen.row_layers / self._num_layers / seen.seconds,
            sum(one.rows for one in cohorts),
            min(1.0, seen.host_sec / seen.seconds),
        )

    def pipelining(self, demand: Demand, max_rows: int, *, takes_all: bool = False) -> Prediction:
        """Two cohorts, one with the device's rows and one between them; the device waits.

        As AsymmetricPipelining fills them: each cohort's attention hides behind the device's work
        for the other, device_only where that yields no more; or (takes_all) with all host rows.
        """
        times = self._times
        if not demand.device_rows:
            return self.device_only(demand)
        attention_sec = times.device_attention(demand.device_rows, demand.device_tokens)
        linear_sec = times.linear(demand.device_rows)
        most_alone, most_together = self.rows_within(linear_sec, demand), 0
        for _ in range(NUM_ITERATIONS):  # the more rows ride, the more hide behind them
            most_together = self.rows_within(
                times.linear(max(most_alone, 1)) + attention_sec, demand
            )
            riding = min(most_together, max(0, demand.host_rows - most_alone), max_rows)
            most_alone = self.rows_within(times.linear(demand.device_rows, riding), demand)
        total = min(most_alone + most_together, demand.host_rows)
        if takes_all:
            most_alone, total = max(1, most_alone), min(2 * max_rows, demand.host_rows)
        if not most_alone or not total:
            return self.device_only(demand)
        alone = min(max_rows, max(1, self._share_alone(total, attention_sec, demand)))
        together = min(max_rows, total - alone)
        alone_sec, together_sec = times.linear(alone), times.linear(demand.device_rows, together)
        work_sec = together_sec + attention_sec + alone_sec
        pipelined_rate = (demand.device_rows + alone + together) / work_sec
        if not takes_all and pipelined_rate <= demand.device_rows / (linear_sec + attention_sec):
            return self.device_only(demand)
        host_alone_sec, trip_alone_sec = self._host_trip(alone, demand)
        host_together_sec, trip_together_sec = self._host_trip(together, demand)
        host_sec = host_alone_sec + host_together_sec
        layer_sec = max(
            work_sec, host_sec, alone_sec + trip_alone_sec, together_sec + trip_together_sec
        )
        layer_sec *= 1 + (times.device_slowdown - 1) * min(1.0, host_sec / layer_sec)
        # Both cohorts' ways in and out, and the first turn, of which little is hidden.
        first_sec = max(0.0, trip_alone_sec - times.pre_attention(demand.device_rows))
        ends_sec = times.pre_attention(alone) + times.post_attention(alone) + first_sec
        sweep_sec = self._num_layers * layer_sec + ends_sec + demand.prompt_sec
        sweep_sec += 2 * times.embed(1) + times.head(demand.device_rows + alone + together)
        sweep_sec = max(sweep_sec, 6 * self._num_layers * times.dispatch_sec)
        return Prediction(
            Choice("pipelining_all" if takes_all else "pipelining", 2, None, max(alone, together)),
            sweep_sec,
            demand.device_rows / sweep_sec,
            (alone + together) / sweep_sec,
            alone + together,
            min(1.0, self._num_layers * host_sec / sweep_sec),
        )

    def _share_alone(self, total: int, attention_sec: float, demand: Demand) -> int:
        """Return how many of so many rows ride alone: as many as leave both the same slack."""
        times = self._times
        low, high = 0, total
        while high - low > 1:
            alone = (low + high) // 2
            together = total - alone
            slack_alone_sec = times.linear(demand.device_rows, together)
            slack_alone_sec -= self._host_sec(alone, demand)
            slack_together_sec = times.linear(alone) + attention_sec
            slack_together_sec -= self._host_sec(together, demand)
            low, high = (alone, high) if slack_alone_sec >= slack_together_sec else (low, alone)
        return high

    def rows_within(self, seconds: float, demand: Demand) -> int:
        """Return how many of the host rows the host attends to in so many seconds a layer."""
        low, high = 0, 1
        while high <= demand.host_rows and self._host_sec(high, demand) <= seconds:
            low, high = high, 2 * high
        high = min(high, demand.host_rows + 1)
        while high - low > 1:
            middle = (low + high) // 2
            if self._host_sec(middle, demand) <= seconds:
                low = middle
            else:
                high = middle
        return low

    def _alone(self, demand: Demand, choice: Choice, rows: int, cohorts: int) -> Prediction:
        """Cohorts without device rows: each side serves one of them at a time."""
        times = self._times
        host_sec, trip_sec = self._host_trip(rows, demand)
        alone_sec = times.linear(rows)
        layer_sec = max(cohorts * alone_sec, cohorts * host_sec, alone_sec + trip_sec)
        ends_sec = times.pre_attention(rows) + times.post_attention(rows) - alone_sec
        ends_sec += times.embed(rows) + times.head(rows)
        token_sec = self._num_layers * layer_sec + cohorts * ends_sec
        host_rows = min(cohorts * rows, demand.host_rows)
        return Prediction(
            choice,
            token_sec / cohorts + demand.prompt_sec,  # a sweep ends when a cohort has sampled
            0.0,
            host_rows / (token_sec + cohorts * demand.prompt_sec),
            host_rows,
            min(1.0, self._num_layers * cohorts * host_sec / token_sec),
        )

    @staticmethod
    def _is_flooded(cohorts: int, host_sec: float, trip_sec: float, sweep_sec: float) -> bool:
        """Whether the host is with other cohorts all the time that one waits for the next sweep."""
        return (cohorts - 1) * host_sec >= sweep_sec + trip_sec - host_sec

    def _fewest_sweeps(
        self, passes: int | None, trip_sec: float, base_sec: float, demand: Demand
    ) -> float:
        """Return the sweeps that a token takes where the host is not the limit.

        A cohort enters as a sweep begins and samples as one ends. In between it passes where the
        device is at a boundary, if its result is there when the attention before it begins.
        """
        times, num_layers = self._times, self._num_layers
        layer_sec = base_sec / num_layers
        # What has a head start: its first pass, one by itself, one with the device's rows.
        head_starts_sec = (
            times.pre_attention(demand.device_rows),
            times.linear(demand.device_rows),
            0.0,
        )
        first, alone, merged = (
            1 + -(-max(0.0, trip_sec - head_start_sec) // layer_sec)
            for head_start_sec in head_starts_sec
        )
        fewest = -(-(first + alone * (num_layers - 2) + merged) // num_layers)
        return fewest if passes is None else max(fewest, 1.0 - (-num_layers // passes))

    def _device_sweep_sec(self, demand: Demand, num_single: int) -> float:
        """Return the time of a sweep of the device's own rows: Python's where that is more.

        num_single: layers that do not run in whole programs, because a cohort may stand there.
        """
        times, rows, tokens = self._times, demand.device_rows, demand.device_tokens
        num_programs = (self._num_layers - num_single) / self._span
        device_sec = times.embed(rows) + times.head(rows) + demand.prompt_sec
        device_sec += num_programs * times.layers(self._span, rows, tokens)
        device_sec += num_single * (times.linear(rows) + times.device_attention(rows, tokens))
        return max(device_sec, (2 + num_programs + 2 * num_single) * times.dispatch_sec)

    def _host_sec(self, rows: int, demand: Demand) -> float:
        seconds = self._times.host_attention(rows, round(rows * demand.host_row_tokens))
        return seconds * self._times.host_slowdown

    def _host_trip(self, rows: int, demand: Demand) -> tuple[float, float]:
        """Return the host's time for a cohort's layer, and that with the way there and back."""
        host_sec = self._host_sec(rows, demand)
        return host_sec, host_sec + 2 * self._times.transfer(num_rows=rows)
