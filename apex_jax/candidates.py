"""The schedules that can be had with a host lane, and what each would yield.

Owns which kinds and sizes are looked at, the bounds on time per token, and how closely each is
predicted: by arithmetic, and where several come close by playing them ahead. Called by adaptive.py.
Imports no jax.
"""

from typing import NamedTuple

from apex_jax.cost_model import Times
from apex_jax.prediction import Choice, Demand, Prediction, Predictor

MAX_COHORTS = 3  # more of them only take smaller turns
MAX_PASSING_COHORTS = 2  # with extra passes more of them mostly wait for each other
PASSES = (None, 4, 2, 1)  # more only differ where the host would wait, and then take all there are
MARGIN = 0.02  # of a window, for the noise of stage times: who misses one loses a sweep
# By arithmetic passes come out up to 6 % too high or too low, and what is this much below the best
# was never better when played.
DOUBT = 0.08
# Looks at a load for which a rehearsal holds: it says how far the arithmetic is off, which changes
# far more slowly than what it comes to.
MAX_LOOKS = 8


class TpotBounds(NamedTuple):
    """The longest time per output token that a schedule may have in a lane; None for no bound."""

    host_sec: float | None = None
    device_sec: float | None = None

    def allow(self, prediction: Prediction) -> bool:
        tpot_sec = prediction.host_tpot_sec
        if self.host_sec is not None and (tpot_sec is None or tpot_sec > self.host_sec):
            return False
        if self.device_sec is not None and prediction.device_rate:
            return prediction.sweep_sec <= self.device_sec
        return True


UNBOUND = TpotBounds()


class Candidates:
    """What Apex chooses from."""

    def __init__(self, times: Times, predictor: Predictor, bounds: TpotBounds):
        self._times, self._predictor, self._bounds = times, predictor, bounds
        # By kind, and whether all rows ride: rates when rehearsed over those by arithmetic.
        self._errors: dict[tuple[object, ...], tuple[float, float]] = {}
        self._num_looks = 0

    def forget(self) -> None:
        """Rehearse anew at the next look: the load is another one."""
        self._errors.clear()
        self._num_looks = 0

    def estimate(self, demand: Demand, max_rows: int) -> list[Prediction]:
        """Return what the allowed schedules come to by arithmetic."""
        return [one for one in self._all(demand, max_rows) if self._bounds.allow(one)]

    def rehearse(self, demand: Demand, max_rows: int) -> list[Prediction]:
        """Return likewise, those near the best as they turn out when played ahead."""
        if self._num_looks == MAX_LOOKS:
            self.forget()
        self._num_looks += 1
        estimates = self._all(demand, max_rows)
        if not demand.device_rows:  # then there is nobody to ride with, and the arithmetic holds
            return [one for one in estimates if self._bounds.allow(one)]
        allowed = [one.rate for one in estimates if self._bounds.allow(one)]
        least = (1 - DOUBT) * max(allowed, default=0.0)
        found = [
            self._played(demand, one) if one.choice.name == "merging" and one.rate > least else one
            for one in estimates
        ]
        return [one for one in found if self._bounds.allow(one)]

    def _played(self, demand: Demand, estimate: Prediction) -> Prediction:
        choice = estimate.choice
        kind = (choice.cohorts, choice.passes, estimate.host_rows == demand.host_rows)
        if kind not in self._errors:
            played = self._predictor.rehearsed(demand, choice)
            self._errors[kind] = (
                played.device_rate / estimate.device_rate,
                played.host_rate / estimate.host_rate,
            )
        of_device, of_host = self._errors[kind]
        return estimate._replace(
            sweep_sec=estimate.sweep_sec / of_device,
            device_rate=estimate.device_rate * of_device,
            host_rate=estimate.host_rate * of_host,
            host_busy=min(1.0, estimate.host_busy * of_host),
        )

    def _all(self, demand: Demand, max_rows: int) -> list[Prediction]:
        if not demand.host_rows:
            return []
        found = [
            self._predictor.pipelining(demand, max_rows, takes_all=takes_all)
            for takes_all in (False, True)
        ]
        found = [one for one in found if one.host_rows]
        for cohorts in range(1, min(MAX_COHORTS, demand.host_rows) + 1):
            found += self._of_cohorts(cohorts, demand, max_rows)
        return found

    def _of_cohorts(self, cohorts: int, demand: Demand, max_rows: int) -> list[Prediction]:
        """Return predictions for so many cohorts: merging alone, and with more and more passes.

        Either with as many rows as do not miss their window, or with all there are: then the host
        is busy, and the cohort passes seldom.
        """
        all_rows = min(max_rows, -(-demand.host_rows // cohorts))
        fitting = min(all_rows, self._most_rows(cohorts, demand))
        choices = [Choice("merging", cohorts, 1, fitting)]
        if cohorts <= MAX_PASSING_COHORTS:
            choices = [
                Choice("merging", cohorts, passes, rows)
                for rows in sorted({fitting, all_rows})
                for passes in PASSES
            ]
        return [self._predictor.merging(demand, choice) for choice in choices]

    def _most_rows(self, cohorts: int, demand: Demand) -> int:
        """Return the rows of a cohort that the host attends to between two turns of it."""
        if not demand.device_rows:
            return -(-demand.host_rows // cohorts)
        window_sec = (1 - MARGIN) * self._predictor.device_only(demand).sweep_sec
        trip_sec = 2 * self._times.transfer(num_rows=-(-demand.host_rows // cohorts))
        seconds = min(window_sec / cohorts, window_sec - trip_sec)
        return max(1, self._predictor.rows_within(seconds, demand))
