"""The dispatch loop: carries a sweep's plan out, stage by stage, over a backend's verbs.

Owns the order of stages and where each cohort stands; pages that change lanes are the page
traffic's. What a stage computes
is the backend's, what a sweep does is the plan's, and what happens where a cohort stands at a
boundary is the policy's: every schedule is this loop with another policy, on every backend.

Points: a token of a cohort passes points 0 to L. Point 0 embeds it and enters layer 0; point p
(1 to L - 1) is boundary(p), out of layer p - 1 and into layer p; point L leaves the last layer and
samples. Between two points lies the host's attention of one layer. Imports no jax.
"""

import functools
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from enum import Enum, auto

from apex_jax.hardware import (
    Backend,
    Boundary,
    DeviceAttention,
    Embed,
    Handle,
    Head,
    HostAttention,
    Layers,
    PostAttention,
    PreAttention,
    StagedLayer,
)
from apex_jax.page_traffic import PageTraffic
from apex_jax.plan import (
    CohortBatch,
    DecodeBatch,
    Direction,
    HeadBatch,
    HostPrefillBatch,
    Move,
    PrefillBatch,
    Sampled,
    SweepPlan,
    join_sampled,
)
from apex_jax.policies import Action, CohortView, Policy
from apex_jax.work import StuckError, Work


@dataclass(frozen=True)
class SweepHandle:
    """A sweep under way.

    last: its last device stage; None where it had none. heads: what samples its tokens, in the
    order prefill, host prefill, decode, then `sampled_cohorts`. finished_moves: ids.
    """

    sweep_id: int
    last: Handle | None
    heads: tuple[Handle, ...]
    sampled_cohorts: tuple[int, ...]
    finished_moves: tuple[int, ...]


@dataclass
class DispatchStats:
    """Counts of what was decided at boundaries.

    num_host_row_layers: rows of all host jobs together; a token of a row takes num_layers of them.
    """

    num_merges: int = 0
    num_extra_passes: int = 0
    num_joint_heads: int = 0
    num_head_passes: int = 0
    num_late: int = 0  # the device met a cohort that had a whole sweep's time and was not ready
    num_host_jobs: int = 0
    num_host_row_layers: int = 0
    num_moves: Counter[Direction] = field(default_factory=Counter)


class _Place(Enum):
    """Where rows stand: before a layer, inside it (with queries), or behind the attention of the
    one before.
    """

    BEFORE = auto()
    INSIDE = auto()
    BEHIND = auto()


@dataclass
class _Cohort:
    """A cohort's token on its way. handle: attended rows of layer point - 1; None at point 0."""

    batch: CohortBatch
    point: int = 0
    handle: Handle | None = None
    num_passes: int = 0  # in this sweep, entering layer 0 included
    num_extra_passes: int = 0  # since the device's rows last were where it stood


@dataclass
class _Sweep:
    """What a launch gathers for its SweepHandle."""

    heads: list[Handle] = field(default_factory=list)
    sampled: list[tuple[int, Handle]] = field(default_factory=list)
    finished_moves: list[int] = field(default_factory=list)


class Dispatch:
    """The loop over one backend.

    layers_per_program: of the Layers stage; it divides num_layers. watchdog_sec: how long anything
    may take before the job is failed. max_transit_pages, transit_sizes: of the page traffic.
    """

    def __init__(
        self,
        backend: Backend,
        policy: Policy,
        *,
        num_layers: int,
        layers_per_program: int,
        watchdog_sec: float,
        max_transit_pages: int = 256,
        transit_sizes: Sequence[int] = (),
    ):
        self.stats = DispatchStats()
        self._backend, self._policy = backend, policy
        self._num_layers, self._span = num_layers, layers_per_program
        self._cohorts: dict[int, _Cohort] = {}
        self._work = Work(backend, watchdog_sec)
        self._traffic = PageTraffic(self._work, num_layers, max_transit_pages, transit_sizes)
        self._host_prefill: list[Handle] = []  # the group's hidden states, a handle a chunk

    # The two verbs of the engine

    def launch(self, plan: SweepPlan) -> SweepHandle:
        """Run ahead through the sweep: prefill, then decode rows with the cohorts.

        Returns when its last stage is enqueued: long before that has run, where no cohort is on
        its way. Raises StuckError after the watchdog's time, and what made a host job fail.
        """
        try:
            return self._launch(plan)
        except StuckError as error:
            raise StuckError(f"{error}: {self.describe()}") from None

    def _launch(self, plan: SweepPlan) -> SweepHandle:
        sweep, work = _Sweep(), self._work
        work.begin_sweep()
        for cohort_id in plan.dropped_cohorts:
            del self._cohorts[cohort_id]
        for batch in plan.cohorts:
            assert batch.cohort_id not in self._cohorts, f"cohort {batch.cohort_id} is under way"
            self._cohorts[batch.cohort_id] = _Cohort(batch)
        for cohort in self._cohorts.values():
            cohort.num_passes = 0
        self._traffic.add(plan.moves)
        self._carry_moves(sweep)
        self._enter()
        if plan.prefill is not None:
            self._prefill(plan.prefill, plan.prefill_head, sweep)
        if plan.host_prefill is not None:
            self._prefill_for_host(plan.host_prefill, sweep)
        if plan.decode is not None:
            assert plan.decode_head is not None
            self._decode(plan.decode, plan.decode_head, sweep)
        elif self._cohorts:
            is_prefilling = plan.prefill is not None or plan.host_prefill is not None
            self._advance_alone(sweep, [work.last] if is_prefilling and work.last else [])
        elif work.last is None:
            self._traffic.await_any()
        return SweepHandle(
            plan.sweep_id,
            work.last,
            (*sweep.heads, *(handle for _, handle in sweep.sampled)),
            tuple(cohort_id for cohort_id, _ in sweep.sampled),
            tuple(sweep.finished_moves),
        )

    def read(self, sweep: SweepHandle) -> Sampled:
        """Wait for the sweep and return what it sampled, in the order of its heads.

        Raises StuckError after the watchdog's time.
        """
        if sweep.last is not None:
            try:
                self._work.wait([sweep.last])
            except StuckError:
                raise StuckError(
                    f"sweep {sweep.sweep_id} did not complete within "
                    f"{self._work.watchdog_sec:g} s; {self.describe()}"
                ) from None
        return join_sampled([head.read() for head in sweep.heads])

    def describe(self) -> str:
        """Return where everything stands, in a line, for error messages."""
        cohorts = ", ".join(
            f"cohort {one.batch.cohort_id} ({len(one.batch.decode.slots_b)} rows) at point "
            f"{one.point} of {self._num_layers}"
            for one in self._cohorts.values()
        )
        return (
            f"{len(self._work.stages)} device stages not seen to end; "
            f"{cohorts or 'no cohorts'}; {self._traffic.describe()}"
        )

    # Device rows

    def _prefill(self, batch: PrefillBatch, head: HeadBatch | None, sweep: _Sweep) -> None:
        (x,) = self._work.enqueue(Embed(batch))
        for first_layer in range(0, self._num_layers, self._span):
            (x,) = self._work.enqueue(Layers(batch, first_layer), x)
            self._keep_moving(sweep)
        if head is not None:
            sweep.heads += self._work.enqueue(Head((head,)), x)

    def _decode(self, batch: DecodeBatch, head: HeadBatch, sweep: _Sweep) -> None:
        """Carry the device rows through all layers; cohorts join or pass at decision points."""
        (x,) = self._work.enqueue(Embed(batch))
        layer, place, merging = 0, _Place.BEFORE, list[_Cohort]()
        while (stop := self._next_decision(layer)) is not None:
            x = self._carry(batch, x, layer, place, stop, sweep)
            layer, place = stop, _Place.BEHIND
            merging = self._decide(stop, sweep)
            if merging and stop < self._num_layers:
                [cohort] = merging
                assert cohort.handle is not None
                boundary = Boundary(layer, cohort.batch.cohort_id)
                x, entered = self._work.enqueue(boundary, x, cohort.handle)
                place, merging = _Place.INSIDE, []
                self.stats.num_merges += 1
                cohort.num_extra_passes = 0
                self._attend_on_host(cohort, entered)
        x = self._carry(batch, x, layer, place, None, sweep)
        self._sample(sweep, merging, (head, x))

    def _carry(
        self,
        batch: DecodeBatch,
        x: Handle,
        layer: int,
        place: _Place,
        stop: int | None,
        sweep: _Sweep,
    ) -> Handle:
        """Bring device rows behind the attention of layer stop - 1, or (None) through all layers.

        By whole programs of layers as far as they reach.
        """
        end = self._num_layers if stop is None else stop
        # A program of layers ends outside a layer, and a stop lies inside one.
        reach = self._span + (stop is not None)
        while True:
            left = end - layer
            if place is _Place.INSIDE:
                (x,) = self._work.enqueue(DeviceAttention(batch, layer), x)
                layer, place = layer + 1, _Place.BEHIND
            elif place is _Place.BEHIND:
                if left == 0 and stop is not None:
                    return x
                if left == 0 or left >= reach:
                    (x,) = self._work.enqueue(PostAttention(layer - 1), x)
                    place = _Place.BEFORE
                else:
                    (x,) = self._work.enqueue(Boundary(layer), x)
                    place = _Place.INSIDE
            elif left == 0:
                return x
            elif left >= reach:
                (x,) = self._work.enqueue(Layers(batch, layer), x)
                layer += self._span
                self._keep_moving(sweep)
            else:
                (x,) = self._work.enqueue(PreAttention(layer), x)
                place = _Place.INSIDE

    def _next_decision(self, layer: int) -> int | None:
        """Return the next boundary behind `layer` at which a cohort may do something."""
        points = [one.point for one in self._cohorts.values() if self._may_pass(one)]
        if points and self._policy.passes != 1 and layer < self._num_layers:
            return layer + 1
        return min((point for point in points if point > layer), default=None)

    def _may_pass(self, cohort: _Cohort) -> bool:
        passes = self._policy.passes
        return cohort.handle is not None and (passes != 1 or cohort.num_passes == 0)

    # Cohorts

    def _decide(self, boundary: int, sweep: _Sweep) -> list[_Cohort]:
        """Ask the policy about each cohort; give extra passes, return who merges."""
        self._carry_moves(sweep)
        merging: list[_Cohort] = []
        for cohort in list(self._cohorts.values()):
            if not self._may_pass(cohort):
                continue
            # A boundary is shared by two groups at most, a head by any number.
            can_merge = cohort.point == boundary and (not merging or boundary == self._num_layers)
            action = self._ask(boundary, cohort, can_merge=can_merge)
            if action is Action.MERGE:
                merging.append(cohort)
            elif action is Action.EXTRA_PASS:
                self._pass_alone(cohort, sweep)
            elif can_merge:
                cohort.num_extra_passes = 0
                self.stats.num_late += cohort.num_passes == 0
        return merging

    def _ask(self, boundary: int, cohort: _Cohort, *, can_merge: bool) -> Action:
        """Decide late: wait for the attention, or for the device to run out of stages."""
        assert cohort.handle is not None
        while True:
            view = CohortView(
                cohort_id=cohort.batch.cohort_id,
                point=cohort.point,
                num_layers=self._num_layers,
                num_extra_passes=cohort.num_extra_passes,
                can_merge=can_merge,
                ask_ready=functools.partial(self._work.is_ready, cohort.handle),
                count_stages=self._work.stages.depth,
            )
            action = self._policy.at_boundary(boundary, view)
            if action is not Action.WAIT:
                assert action is Action.SKIP or view.is_ready
                assert can_merge or action is not Action.MERGE
                return action
            # Who did not look at the queue will not decide otherwise when it is shorter.
            stages = self._work.stages.all_but_one() if view.has_counted else ()
            self._work.wait([cohort.handle, *stages])

    def _enter(self) -> None:
        """Let cohorts begin their token: embed it and enter layer 0."""
        for cohort in self._cohorts.values():
            points = [one.point for one in self._cohorts.values() if one.handle is not None]
            if cohort.handle is None and self._policy.may_enter(points, self._num_layers):
                (x,) = self._work.enqueue(Embed(cohort.batch.decode))
                (entered,) = self._work.enqueue(PreAttention(0, cohort.batch.cohort_id), x)
                self._attend_on_host(cohort, entered)

    def _pass_alone(self, cohort: _Cohort, sweep: _Sweep) -> None:
        """Carry a cohort past its point out of the device's turn."""
        assert cohort.handle is not None
        if cohort.point == self._num_layers:
            self._sample(sweep, [cohort], None)
            return
        boundary = Boundary(cohort.point, cohort.batch.cohort_id)
        (entered,) = self._work.enqueue(boundary, cohort.handle)
        cohort.num_extra_passes += 1
        self.stats.num_extra_passes += 1
        self._attend_on_host(cohort, entered)

    def _attend_on_host(self, cohort: _Cohort, entered: Handle) -> None:
        """Hand rows that have entered the layer of the cohort's point to the host."""
        job = HostAttention(cohort.batch.cohort_id, cohort.point, cohort.batch.decode)
        cohort.handle = self._work.submit_host(job, entered)
        cohort.point += 1
        cohort.num_passes += 1
        self.stats.num_host_jobs += 1
        self.stats.num_host_row_layers += len(cohort.batch.decode.slots_b)

    def _sample(
        self, sweep: _Sweep, cohorts: list[_Cohort], device: tuple[HeadBatch, Handle] | None
    ) -> None:
        """Sample device rows and cohorts in one head; their tokens are then complete."""
        last_layer = self._num_layers - 1
        batches, groups = ([device[0]], [device[1]]) if device else ([], [])
        for cohort in cohorts:
            assert cohort.handle is not None
            batches.append(cohort.batch.head)
            leaving = PostAttention(last_layer, cohort.batch.cohort_id)
            groups += self._work.enqueue(leaving, cohort.handle)
            del self._cohorts[cohort.batch.cohort_id]
        heads = self._work.enqueue(Head(tuple(batches)), *groups)
        if device:
            sweep.heads.append(heads[0])
            self.stats.num_joint_heads += len(cohorts)
        else:
            self.stats.num_head_passes += len(cohorts)
        ids = [cohort.batch.cohort_id for cohort in cohorts]
        sweep.sampled += zip(ids, heads[len(heads) - len(ids) :], strict=True)

    def _advance_alone(self, sweep: _Sweep, prefilled: Sequence[Handle]) -> None:
        """Without device rows: pass whichever cohort is ready until one of them has sampled.

        Ends sooner where the device has `prefilled` what this sweep had to, and wants the next.
        """
        while not sweep.sampled:
            self._enter()
            under_way = [one for one in self._cohorts.values() if one.handle is not None]
            handles = [one.handle for one in under_way if one.handle is not None]
            ready = self._work.wait([*handles, *prefilled])
            self._carry_moves(sweep)
            for cohort in under_way:
                if cohort.handle is ready:
                    self._pass_alone(cohort, sweep)
                    break
            else:
                return

    # Prompts bound for the host, and moves between the lanes

    def _prefill_for_host(self, part: HostPrefillBatch, sweep: _Sweep) -> None:
        num_chunks = len(part.chunks)
        for unit in range(part.first_unit, part.end_unit):
            layer, index = divmod(unit, num_chunks)
            chunk = part.chunks[index]
            if index == 0 and part.prefix is not None:
                self._traffic.stage_prefix(part.prefix, layer)
            if layer == 0:
                self._host_prefill += self._work.enqueue(Embed(chunk))
            (x,) = self._work.enqueue(StagedLayer(chunk, layer), self._host_prefill[index])
            self._host_prefill[index] = x
            if index == num_chunks - 1:
                self._traffic.unstage(layer, part.staging_pages_i, part.host_pages_i)
        for index, head in part.heads:
            sweep.heads += self._work.enqueue(Head((head,)), self._host_prefill[index])
        if part.heads:
            self._host_prefill = []

    def _carry_moves(self, sweep: _Sweep) -> None:
        """Take moves as far as they can go without waiting."""
        self._note_moved(self._traffic.carry(), sweep)

    def _keep_moving(self, sweep: _Sweep) -> None:
        """Let moves go on beside the device's rows, until it runs out of stages."""
        self._note_moved(self._traffic.keep_moving(), sweep)

    def _note_moved(self, finished: Iterable[Move], sweep: _Sweep) -> None:
        for move in finished:
            sweep.finished_moves.append(move.move_id)
            self.stats.num_moves[move.direction] += 1
