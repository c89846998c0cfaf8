"""The strategies by name: which policy carries each out.

Owns what SchedulerConfig's fields mean to a policy. Called by the engine. Imports no jax.
"""

from apex_jax.adaptive import Apex, ApexPaper
from apex_jax.candidates import TpotBounds
from apex_jax.config import SchedulerConfig
from apex_jax.cost_model import Times
from apex_jax.pipelining import AsymmetricPipelining
from apex_jax.policies import DeviceOnly, Merging, Policy


def cohort_rows(config: SchedulerConfig) -> int:
    """Return the most rows that a cohort of the strategy may have."""
    match config.strategy:
        case "full_offload":
            num_cohorts = 2
        case "staggered" | "passes":
            num_cohorts = config.cohorts
        case _:
            num_cohorts = 1  # or more of which one may have almost all
    return -(-config.max_host_requests // num_cohorts)


def tpot_bounds(config: SchedulerConfig) -> TpotBounds:
    return TpotBounds(config.max_host_tpot_sec, config.max_device_tpot_sec)


def make_policy(
    config: SchedulerConfig, times: Times | None = None, layers_per_program: int = 1
) -> Policy:
    """Return the policy of a strategy.

    times: for a strategy that predicts. layers_per_program: of the Layers stage.
    """
    match config.strategy:
        case "apex":
            assert times is not None
            return Apex(times, layers_per_program, tpot_bounds(config))
        case "apex_paper":
            assert times is not None
            return ApexPaper(times, layers_per_program)
        case "device_only":
            return DeviceOnly()
        case "full_offload":
            return Merging(max_cohorts=2, uses_device_lane=False)
        case "async_overlap":
            return Merging(max_cohorts=1)
        case "staggered":
            return Merging(max_cohorts=config.cohorts, is_spread=True)
        case "passes":
            return Merging(max_cohorts=config.cohorts, passes=config.passes)
        case "asymmetric_pipelining":
            assert times is not None
            return AsymmetricPipelining(times)
        case _:
            raise ValueError(f"strategy is {config.strategy!r}; config.py names those there are")
