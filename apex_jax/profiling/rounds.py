"""Repeats of many measurements, in rounds.

Owns how often and in what order: one repeat of each a round, so that a machine that becomes faster
or slower meanwhile does so for all of them. Where time is short there are fewer rounds, never fewer
measurements. Called by the profiler. Imports no jax.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from apex_jax.profiling.chains import Chain

# A chain is so long that enqueueing its first stage and waking up after its last hardly count, but
# no longer than what XLA's CPU client takes without blocking.
CHAIN_SEC = 0.01
MAX_LINKS = 24
REPORT_SEC = 5.0

OnProgress = Callable[[str], None]


@dataclass
class Timed:
    """A chain that is repeated. num_links: of a repeat. seconds: of a link, in each repeat."""

    chain: Chain
    num_links: int = 1
    seconds: list[float] = field(default_factory=list[float])

    def warm_up(self) -> None:
        """Run it untimed, and choose how long a repeat is."""
        link_sec = self.chain(1)
        if link_sec < CHAIN_SEC:  # else one link is enough, and takes long
            link_sec = self.chain(2) / 2
        self.num_links = max(1, min(MAX_LINKS, round(CHAIN_SEC / max(link_sec, 1e-9))))

    def repeat(self) -> None:
        self.seconds.append(self.chain(self.num_links) / self.num_links)

    @property
    def median(self) -> float:
        return float(np.median(self.seconds))

    def percentile(self, percent: int) -> float:
        return float(np.percentile(self.seconds, percent))

    @property
    def ratio_of_halves(self) -> float:
        """The median of every other repeat over that of the rest; 1 where there is no rest."""
        if len(self.seconds) < 2:
            return 1.0
        return float(np.median(self.seconds[::2]) / np.median(self.seconds[1::2]))


def run_rounds(
    measurements: Sequence[Timed], max_rounds: int, budget_sec: float, on_progress: OnProgress
) -> int:
    """Warm up, then repeat each once a round; return how many repeats all of them have.

    After budget_sec (of the real clock) only what has not been measured at all still is.
    """
    begin_sec = report_sec = time.perf_counter()

    def report(text: str) -> None:
        nonlocal report_sec
        if time.perf_counter() >= report_sec + REPORT_SEC:
            report_sec = time.perf_counter()
            on_progress(f"profile    {text}")

    for index, one in enumerate(measurements, start=1):
        one.warm_up()
        report(f"warmed up {index} of {len(measurements)} points")
    for round_index in range(max_rounds):
        for one in measurements:
            if round_index and time.perf_counter() >= begin_sec + budget_sec:
                return round_index
            one.repeat()
            report(f"{len(measurements)} points, round {round_index + 1} of up to {max_rounds}")
    return max_rounds
