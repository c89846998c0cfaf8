"""What a strategy decided, sweep by sweep, and what came of it.

Owns the pairing of each sweep's decision with the time that it then took, and the log's entries;
feeds the monitor once a sweep. Called by the sweep loop. Imports no jax.
"""

import math
import statistics
from collections import deque
from collections.abc import Callable
from typing import Any

from apex_jax.adaptive import Adaptive, Decision
from apex_jax.monitor import StageMonitor
from apex_jax.plan import SweepPlan
from apex_jax.policies import Policy
from apex_jax.prediction import Prediction

NUM_ERRORS = 1000  # sweeps whose prediction is remembered, for the median error


class DecisionRecord:
    """The decisions of one engine.

    policy: of which those that choose have decisions. monitor: where stage times are predicted.
    on_decision: gets an entry for each sweep, a JSON object.
    """

    def __init__(self, policy: Policy, monitor: StageMonitor | None):
        self._policy = policy if isinstance(policy, Adaptive) else None
        self._monitor = monitor
        self.on_decision: Callable[[dict[str, Any]], None] | None = None
        self._planned: deque[tuple[SweepPlan, Decision | None]] = deque()
        self._told: Decision | None = None
        self._end_sec: float | None = None
        self._errors: deque[float] = deque(maxlen=NUM_ERRORS)

    def planned(self, plan: SweepPlan) -> None:
        """Note what is in force for a sweep that is about to be launched."""
        decision = self._policy.decision if self._policy is not None else None
        self._planned.append((plan, decision))

    def rested(self) -> None:
        """Note that there was nothing to do: the next sweep has none before it."""
        self._end_sec = None

    def swept(self, now_sec: float) -> None:
        """Take the end of the oldest sweep planned."""
        plan, decision = self._planned.popleft()
        sweep_sec = None if self._end_sec is None else now_sec - self._end_sec
        self._end_sec = now_sec
        if sweep_sec is None:
            return
        if self._monitor is not None:
            self._monitor.end_sweep(sweep_sec)
        if decision is None:
            return
        has_prompts = plan.prefill is not None or plan.host_prefill is not None
        is_plain = plan.decode is not None and not has_prompts
        if is_plain and sweep_sec > 0 and decision.best.sweep_sec > 0:  # 0 without device rows
            self._errors.append(abs(math.log(decision.best.sweep_sec / sweep_sec)))
        if self.on_decision is not None:
            self.on_decision(self._entry(plan, decision, sweep_sec))

    def summary(self) -> dict[str, Any]:
        """Return how good predictions were: of stages before and after correction, of sweeps."""
        summary: dict[str, Any] = {}
        if self._monitor is not None:
            summary["stages"] = self._monitor.correction.summary()
        if self._errors:
            summary["sweep_error"] = math.expm1(statistics.median(self._errors))
        return summary

    def _entry(self, plan: SweepPlan, decision: Decision, sweep_sec: float) -> dict[str, Any]:
        """Return a sweep's line of the log; alternatives where the decision is new."""
        demand = decision.demand
        entry: dict[str, Any] = {
            "sweep": plan.sweep_id,
            **_entry_of(decision.best),
            "reason": decision.reason,
            "device_only_rate": decision.device_only.rate,
            "device_rows": demand.device_rows,
            "host_rows": demand.host_rows,
            "has_prompts": plan.prefill is not None or plan.host_prefill is not None,
            "measured_sweep_sec": sweep_sec,
        }
        if decision is not self._told:
            self._told = decision
            entry["alternatives"] = [_entry_of(one) for one in decision.alternatives]
        return entry


def _entry_of(prediction: Prediction) -> dict[str, Any]:
    return {
        **prediction.choice._asdict(),
        "predicted_rate": prediction.rate,
        "predicted_host_rate": prediction.host_rate,
        "predicted_sweep_sec": prediction.sweep_sec,
    }
