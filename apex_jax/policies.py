"""The strategies: who rides in a cohort, and what a cohort does at a boundary.

A strategy is a policy of the one scheduler and the one dispatch loop, and no more. Owns decisions
and no state of theirs: everything a decision rests on is its argument. `form` is called by the
scheduler, the rest by the dispatch loop. Imports no jax.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum, auto
from typing import Protocol, runtime_checkable

from apex_jax.config import SchedulerConfig
from apex_jax.cost_model import Times


class Action(Enum):
    """What a cohort does where the device's rows are at a boundary.

    MERGE: it rides in the device's own boundary. EXTRA_PASS: it passes its own point alone. WAIT:
    ask again once its attention is ready or the device's queue has fallen to one stage. SKIP: no
    step here.
    """

    MERGE = auto()
    EXTRA_PASS = auto()
    WAIT = auto()
    SKIP = auto()


@dataclass(frozen=True)
class CohortView:
    """A cohort as a policy sees it.

    point: what it is to pass next (dispatch.py says what points are). num_extra_passes: given
    since the device's rows last were where it stood. can_merge: the device is at this very point
    and nobody has taken it. is_ready: its attention is done. queue_depth: stages the device has
    left to end; not counted (0) where the cohort is ready anyway.
    """

    cohort_id: int
    point: int
    num_layers: int
    num_extra_passes: int
    can_merge: bool
    is_ready: bool
    queue_depth: int


@dataclass(frozen=True)
class DeviceLoad:
    """What the device does in a sweep: decode rows, tokens of their KV, prompt tokens."""

    num_rows: int
    num_tokens: int
    num_prompt_tokens: int


@runtime_checkable
class Policy(Protocol):
    """One strategy.

    max_cohorts: with tokens under way at once; 0 for no host lane. uses_device_lane: whether any
    KV lives on the device. passes: points a cohort may pass per sweep, counted from the device's
    coming by to the next; None for all. With 1 the loop runs ahead from one cohort's place to the
    next.
    """

    @property
    def max_cohorts(self) -> int: ...
    @property
    def uses_device_lane(self) -> bool: ...
    @property
    def passes(self) -> int | None: ...

    def form(
        self,
        idle_cohorts: Sequence[int],
        lengths: Sequence[int],
        num_under_way: int,
        max_rows: int,
        load: DeviceLoad,
    ) -> Mapping[int, Sequence[int]]:
        """Return who begins a token: for some idle cohorts (ids), indices into `lengths`.

        lengths: tokens of KV of each host-lane row without a token under way, oldest first.
        num_under_way: rows of the other cohorts. max_rows: of a cohort.
        """
        ...

    def may_enter(self, points: Sequence[int], num_layers: int) -> bool:
        """Return whether a cohort may begin its token while others stand at `points`."""
        ...

    def at_boundary(self, boundary: int, cohort: CohortView) -> Action:
        """Return what a cohort does when the device's rows are at a boundary (1 to num_layers)."""
        ...


@dataclass(frozen=True)
class DeviceOnly:
    """Requests that do not fit wait."""

    max_cohorts: int = 0
    uses_device_lane: bool = True
    passes: int | None = 0

    def form(
        self,
        idle_cohorts: Sequence[int],
        lengths: Sequence[int],
        num_under_way: int,
        max_rows: int,
        load: DeviceLoad,
    ) -> Mapping[int, Sequence[int]]:
        return {}

    def may_enter(self, points: Sequence[int], num_layers: int) -> bool:
        return True

    def at_boundary(self, boundary: int, cohort: CohortView) -> Action:
        return Action.SKIP


@dataclass(frozen=True)
class Merging:
    """Asynchronous overlap: cohorts advance in the device's own boundaries; it never waits for one.

    One cohort is APEX as published. passes: all beyond the one that merges are extra passes.
    is_spread: whether cohorts keep apart, so that they take their turns on the host evenly.
    """

    max_cohorts: int = 1
    passes: int | None = 1
    is_spread: bool = False
    uses_device_lane: bool = True

    def form(
        self,
        idle_cohorts: Sequence[int],
        lengths: Sequence[int],
        num_under_way: int,
        max_rows: int,
        load: DeviceLoad,
    ) -> Mapping[int, Sequence[int]]:
        return split_evenly(idle_cohorts, len(lengths), num_under_way, self.max_cohorts, max_rows)

    def may_enter(self, points: Sequence[int], num_layers: int) -> bool:
        # Two layers of slack: a cohort that once missed its window need not hold up the next.
        spacing = (num_layers + 1) // self.max_cohorts - 2 if self.is_spread else 0
        return all(point >= spacing for point in points)

    def at_boundary(self, boundary: int, cohort: CohortView) -> Action:
        if not cohort.can_merge:
            waits_for_head = cohort.point == cohort.num_layers
            is_spent = self.passes is not None and cohort.num_extra_passes >= self.passes - 1
            if waits_for_head or is_spent:
                return Action.SKIP
        if not cohort.is_ready:
            return Action.WAIT if cohort.queue_depth > 1 else Action.SKIP
        return Action.MERGE if cohort.can_merge else Action.EXTRA_PASS


ALONE, WITH_DEVICE = 0, 1  # the two cohorts of asymmetric pipelining


@dataclass(frozen=True)
class AsymmetricPipelining:
    """NEO (Jiang et al., MLSys 2025): two sub-batches, the linear work of each layer done twice.

    One cohort rides with the device rows, the other alone between them; both advance through all
    layers in every sweep, and the device waits for them at every boundary. Who rides where, and
    whether to pipeline at all, follows the published scheduler: host rows are added as long as
    each sub-batch's host attention hides behind the device work of its turn, and the sweep is
    pipelined if that yields more tokens per predicted second.
    """

    times: Times
    max_cohorts: int = 2
    uses_device_lane: bool = True
    passes: int | None = None

    def form(
        self,
        idle_cohorts: Sequence[int],
        lengths: Sequence[int],
        num_under_way: int,
        max_rows: int,
        load: DeviceLoad,
    ) -> Mapping[int, Sequence[int]]:
        if len(idle_cohorts) < self.max_cohorts:
            return {}
        if not load.num_rows:  # nothing to hide behind
            return split_evenly(idle_cohorts, len(lengths), 0, self.max_cohorts, max_rows)
        members: dict[int, list[int]] = {ALONE: [], WITH_DEVICE: []}
        target, shortest_refused = ALONE, None
        for index, length in enumerate(lengths):
            if shortest_refused is not None and length >= shortest_refused:
                continue
            if len(members[target]) == max_rows:
                break
            members[target].append(index)
            slack = self._slack_sec(members, lengths, load)
            if min(slack.values()) < 0:
                members[target].pop()
                shortest_refused = length
                continue
            target = max(members, key=lambda one: (slack[one], one))
        if not members[ALONE]:
            return {}
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

    def _slack_sec(
        self, members: Mapping[int, Sequence[int]], lengths: Sequence[int], load: DeviceLoad
    ) -> dict[int, float]:
        """Return, for each cohort, the device time that hides its attention less that attention."""
        times = self.times
        num_device = load.num_rows + load.num_prompt_tokens
        host_sec = {
            one: times.host_attention(len(rows), sum(lengths[index] for index in rows))
            for one, rows in members.items()
        }
        return {
            ALONE: times.linear(num_device + len(members[WITH_DEVICE])) - host_sec[ALONE],
            WITH_DEVICE: times.linear(len(members[ALONE]))
            + times.device_attention(load.num_rows, load.num_tokens)
            - host_sec[WITH_DEVICE],
        }

    def may_enter(self, points: Sequence[int], num_layers: int) -> bool:
        return True

    def at_boundary(self, boundary: int, cohort: CohortView) -> Action:
        if cohort.point > boundary:  # a sweep without device rows left it half-way
            return Action.SKIP
        if not cohort.is_ready:
            return Action.WAIT
        is_with_device = cohort.cohort_id == WITH_DEVICE or boundary == cohort.num_layers
        return Action.MERGE if is_with_device and cohort.can_merge else Action.EXTRA_PASS


def split_evenly(
    idle_cohorts: Sequence[int],
    num_waiting: int,
    num_under_way: int,
    max_cohorts: int,
    max_rows: int,
) -> dict[int, range]:
    """Deal waiting rows out to idle cohorts so that all cohorts become equally large."""
    share = min(max_rows, -(-(num_waiting + num_under_way) // max_cohorts))
    members: dict[int, range] = {}
    first = 0
    for cohort_id in idle_cohorts:
        end = min(first + share, num_waiting)
        if end > first:
            members[cohort_id] = range(first, end)
        first = end
    return members


def cohort_rows(config: SchedulerConfig) -> int:
    """Return the most rows that a cohort of the strategy may have."""
    match config.strategy:
        case "full_offload":
            num_cohorts = 2
        case "staggered" | "passes":
            num_cohorts = config.cohorts
        case _:
            num_cohorts = 1  # or two of which one may have almost all
    return -(-config.max_host_requests // num_cohorts)


def make_policy(config: SchedulerConfig, measure: Callable[[], Times]) -> Policy:
    """Return the policy of a strategy; `measure` is called where it predicts."""
    match config.strategy:
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
            return AsymmetricPipelining(measure())
        case _:
            raise ValueError(f"strategy is {config.strategy!r}; config.py names those there are")
