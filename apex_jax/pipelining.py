"""Asymmetric pipelining: NEO's schedule and its published rule of who rides where.

Owns that rule; the stage times that it predicts by are its argument. Imports no jax.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from apex_jax.cost_model import Times
from apex_jax.policies import Action, CohortView, Fixed, Load, split_evenly

ALONE, WITH_DEVICE = 0, 1  # the two cohorts


@dataclass(frozen=True)
class AsymmetricPipelining(Fixed):
    """NEO (Jiang et al., MLSys 2025): two sub-batches, the linear work of each layer done twice.

    One cohort rides with the device rows, the other alone between them; both advance through all
    layers in every sweep, and the device waits for them at every boundary. Who rides where, and
    whether to pipeline at all, follows the published scheduler: host rows are added as long as
    each sub-batch's host attention hides behind the device work of its turn, and the sweep is
    pipelined if that yields more tokens per predicted second. takes_all: not that rule, but all
    host rows: where few device rows are in the balance, waiting for the host may pay.
    """

    times: Times
    takes_all: bool = False
    max_cohorts: int = 2
    uses_device_lane: bool = True
    passes: int | None = None

    def form(self, load: Load) -> Mapping[int, Sequence[int]]:
        idle = [one for one in load.idle_cohorts if one < self.max_cohorts]
        if len(idle) < self.max_cohorts:
            return {}
        if not load.num_rows:  # nothing to hide behind
            return split_evenly(idle, len(load.lengths), 0, self.max_cohorts, load.max_rows)
        members = self._fill(load)
        if not members[ALONE]:
            return {}
        if self.takes_all:
            return {one: rows for one, rows in members.items() if rows}
        times, num_device = self.times, load.num_rows + load.num_prompt_tokens
        attention_sec = times.device_attention(load.num_rows, load.num_tokens)
        sequential_rate = load.num_rows / (times.linear(num_device) + attention_sec)
        pipelined_sec = (
            times.linear(num_device + len(members[WITH_DEVICE]))
            + attention_sec
            + times.linear(len(members[ALONE]))
        )
        num_rows = load.num_rows + len(members[ALONE]) + len(members[WITH_DEVICE])
        if num_rows / pipelined_sec <= sequential_rate:
            return {}
        return {one: rows for one, rows in members.items() if rows}

    def _fill(self, load: Load) -> dict[int, list[int]]:
        """Add rows, the oldest first, to whichever cohort has the more slack left."""
        members: dict[int, list[int]] = {ALONE: [], WITH_DEVICE: []}
        num_tokens = {ALONE: 0, WITH_DEVICE: 0}
        target, shortest_refused = ALONE, None
        for index, length in enumerate(load.lengths):
            if shortest_refused is not None and length >= shortest_refused:
                continue
            if len(members[target]) == load.max_rows:
                break
            members[target].append(index)
            num_tokens[target] += length
            slack = self._slack_sec(members, num_tokens, load)
            if min(slack.values()) < 0 and not self.takes_all:
                members[target].pop()
                num_tokens[target] -= length
                shortest_refused = length
                continue
            target = max(members, key=lambda one: (slack[one], one))
        return members

    def _slack_sec(
        self, members: Mapping[int, Sequence[int]], num_tokens: Mapping[int, int], load: Load
    ) -> dict[int, float]:
        """Return, for each cohort, the device time that hides its attention less that attention."""
        times = self.times
        num_alone, num_with_device = len(members[ALONE]), len(members[WITH_DEVICE])
        num_device = load.num_rows + load.num_prompt_tokens
        return {
            ALONE: times.linear(num_device + num_with_device)
            - times.host_attention(num_alone, num_tokens[ALONE]),
            WITH_DEVICE: times.linear(num_alone)
            + times.device_attention(load.num_rows, load.num_tokens)
            - times.host_attention(num_with_device, num_tokens[WITH_DEVICE]),
        }

    def at_boundary(self, boundary: int, cohort: CohortView) -> Action:
        if cohort.point > boundary:  # a sweep without device rows left it half-way
            return Action.SKIP
        if not cohort.is_ready:
            return Action.WAIT
        is_with_device = cohort.cohort_id == WITH_DEVICE or boundary == cohort.num_layers
        return Action.MERGE if is_with_device and cohort.can_merge else Action.EXTRA_PASS
