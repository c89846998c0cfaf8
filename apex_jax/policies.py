"""What a strategy decides: who rides in a cohort, and what a cohort does at a boundary.

A strategy is a policy of the one scheduler and the one dispatch loop, and no more. The policies
here are fixed: everything a decision rests on is its argument. Those that predict are in
pipelining.py and adaptive.py. `consider` and `form` are called by the scheduler, `may_enter` and
`at_boundary` by the dispatch loop. Imports no jax.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum, auto
from typing import NamedTuple, Protocol, runtime_checkable


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
    and nobody has taken it. ask_ready, count_stages: tell what the properties do. Asking costs, and
    many decisions need neither, so it is done when a policy looks, and once.
    """

    cohort_id: int
    point: int
    num_layers: int
    num_extra_passes: int
    can_merge: bool
    ask_ready: Callable[[], bool]
    count_stages: Callable[[], int]

    @functools.cached_property
    def is_ready(self) -> bool:
        """Whether its attention is done."""
        return self.ask_ready()

    @functools.cached_property
    def queue_depth(self) -> int:
        """Stages that the device has left to end."""
        return self.count_stages()

    @property
    def has_counted(self) -> bool:
        """Whether the policy looked at the queue's depth."""
        return "queue_depth" in vars(self)


class Waiting(NamedTuple):
    """Requests in neither lane.

    prompt_tokens, output_tokens: of one, on average, the latter at most. padded_tokens: of the
    chunks in which a prompt for the host prefills, each counted for one prompt.
    """

    num_requests: int = 0
    prompt_tokens: float = 0.0
    output_tokens: float = 1.0
    padded_tokens: float = 0.0


NOBODY = Waiting()


@dataclass(frozen=True)
class Load:
    """What there is to do as a sweep is planned.

    num_rows, num_tokens: device rows that decode in it, and tokens of their KV.
    num_prompt_tokens: that it prefills for the device, padding included.
    num_settled_rows, num_settled_tokens: the device lane, those with prompts under way included.
    waiting: requests in neither lane. num_homing: host-lane rows for which the device has room,
    where nobody waits for it.
    num_homeless: host-lane rows that the device can never hold.
    lengths: tokens of KV of each host-lane row without a token under way, oldest first.
    num_under_way, num_tokens_under_way: the other host-lane rows in cohorts, and their KV.
    idle_cohorts: those that may begin a token (ids). max_rows: of a cohort.
    """

    num_rows: int = 0
    num_tokens: int = 0
    num_prompt_tokens: int = 0
    num_settled_rows: int = 0
    num_settled_tokens: int = 0
    waiting: Waiting = NOBODY
    num_homing: int = 0
    num_homeless: int = 0
    lengths: Sequence[int] = ()
    num_under_way: int = 0
    num_tokens_under_way: int = 0
    idle_cohorts: Sequence[int] = ()
    max_rows: int = 1


@runtime_checkable
class Policy(Protocol):
    """One strategy.

    max_cohorts: with tokens under way at once; 0 for no host lane. uses_device_lane: whether any
    KV lives on the device. passes: points a cohort may pass per sweep, counted from the device's
    coming by to the next; None for all. With 1 the loop runs ahead from one cohort's place to the
    next. max_host_rows: requests worth having in the host lane, besides those that the device can
    never hold; None for all it has room for.
    device_prompts_first: whether prompts for the host wait while the device prefills its own.
    drops_tokens: whether tokens under way are given up, so that their rows may change lanes at
    once. keeps_host_rows: whether room on the device is for those who wait rather than for rows of
    the host.
    """

    @property
    def max_cohorts(self) -> int: ...
    @property
    def uses_device_lane(self) -> bool: ...
    @property
    def passes(self) -> int | None: ...
    @property
    def max_host_rows(self) -> int | None: ...
    @property
    def device_prompts_first(self) -> bool: ...
    @property
    def drops_tokens(self) -> bool: ...
    @property
    def keeps_host_rows(self) -> bool: ...

    def consider(self, load: Load) -> None:
        """Look at the sweep that is being planned, before `form`; who chooses chooses here."""
        ...

    def form(self, load: Load) -> Mapping[int, Sequence[int]]:
        """Return who begins a token: for some idle cohorts (ids), indices into `load.lengths`."""
        ...

    def may_enter(self, points: Sequence[int], num_layers: int) -> bool:
        """Return whether a cohort may begin its token while others stand at `points`."""
        ...

    def at_boundary(self, boundary: int, cohort: CohortView) -> Action:
        """Return what a cohort does when the device's rows are at a boundary (1 to num_layers)."""
        ...


class Fixed:
    """What policies share that choose nothing: the host lane takes whoever it has room for."""

    max_host_rows: int | None = None
    device_prompts_first = False
    drops_tokens = False
    keeps_host_rows = False

    def consider(self, load: Load) -> None:
        pass

    def may_enter(self, points: Sequence[int], num_layers: int) -> bool:
        return True


@dataclass(frozen=True)
class DeviceOnly(Fixed):
    """Requests that do not fit wait."""

    max_cohorts: int = 0
    uses_device_lane: bool = True
    passes: int | None = 0

    def form(self, load: Load) -> Mapping[int, Sequence[int]]:
        return {}

    def at_boundary(self, boundary: int, cohort: CohortView) -> Action:
        return Action.SKIP


@dataclass(frozen=True)
class Merging(Fixed):
    """Asynchronous overlap: cohorts advance in the device's own boundaries; it never waits for one.

    One cohort is APEX as published. passes: all beyond the one that merges are extra passes.
    is_spread: whether cohorts keep apart, so that they take their turns on the host evenly.
    max_cohort_rows: of a cohort, where more would miss its window; None for no such bound.
    """

    max_cohorts: int = 1
    passes: int | None = 1
    is_spread: bool = False
    uses_device_lane: bool = True
    max_cohort_rows: int | None = None

    def form(self, load: Load) -> Mapping[int, Sequence[int]]:
        idle = [one for one in load.idle_cohorts if one < self.max_cohorts]
        max_rows = min(load.max_rows, self.max_cohort_rows or load.max_rows)
        return split_evenly(idle, len(load.lengths), load.num_under_way, self.max_cohorts, max_rows)

    def may_enter(self, points: Sequence[int], num_layers: int) -> bool:
        least = spacing(num_layers, self.max_cohorts) if self.is_spread else 0
        return all(point >= least for point in points)

    def at_boundary(self, boundary: int, cohort: CohortView) -> Action:
        if not cohort.can_merge:
            waits_for_head = cohort.point == cohort.num_layers
            is_spent = self.passes is not None and cohort.num_extra_passes >= self.passes - 1
            if waits_for_head or is_spent:
                return Action.SKIP
        if not cohort.is_ready:
            return Action.WAIT if cohort.queue_depth > 1 else Action.SKIP
        return Action.MERGE if cohort.can_merge else Action.EXTRA_PASS


def spacing(num_layers: int, num_cohorts: int) -> int:
    """Return how many layers cohorts keep apart that are spread.

    Two layers of slack: a cohort that once missed its window need not hold up the next.
    """
    return (num_layers + 1) // num_cohorts - 2


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
