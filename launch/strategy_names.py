"""Strategies by a name and perhaps a number: `staggered_4` has 4 cohorts, `passes_3` may pass 3.

Called by the scripts that compare strategies. Imports no jax.
"""

import dataclasses
import re

from apex_jax.config import STRATEGIES, ConfigError, SchedulerConfig

NUMBERED = {"staggered": "cohorts", "passes": "passes"}


def settings_of(name: str, base: SchedulerConfig) -> SchedulerConfig:
    """Return settings with the strategy that a name stands for; ConfigError where there is none."""
    match = re.fullmatch(r"(.*?)(?:_(\d+))?", name)
    assert match is not None
    strategy, number = match[1], match[2]
    if strategy not in STRATEGIES or (number is not None and strategy not in NUMBERED):
        raise ConfigError(
            f"no strategy is called {name!r}; there are {', '.join(STRATEGIES)}, "
            "staggered_N with N cohorts and passes_N with N passes"
        )
    given = {} if number is None else {NUMBERED[strategy]: int(number)}
    return dataclasses.replace(base, strategy=strategy, **given)
