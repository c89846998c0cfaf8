"""The dispatch loop on paper: the order of stages, what cohorts do, moves, and what goes wrong."""

from dataclasses import dataclass, field, replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from paper_backend import VOCAB_SIZE, Pace, PaperBackend, expected_output

from apex_jax.cost_model import StageTimes
from apex_jax.dispatch import Dispatch, StuckError
from apex_jax.hardware import (
    Boundary,
    DeviceAttention,
    Embed,
    Export,
    Head,
    HostAttention,
    Import,
    Layers,
    PostAttention,
    PreAttention,
    ReadPages,
    StagedLayer,
    WritePages,
)
from apex_jax.pipelining import AsymmetricPipelining
from apex_jax.plan import (
    CohortBatch,
    DecodeBatch,
    Direction,
    HeadBatch,
    HostPrefillBatch,
    Move,
    PrefillBatch,
    SweepPlan,
)
from apex_jax.policies import Action, DeviceOnly, Fixed, Merging
from apex_jax.steady_load import GREEDY, SteadyLoad

NUM_LAYERS, SPAN, PAGE_SIZE, PAGES_PER_ROW = 6, 2, 4, 16


def ints(*values):
    return np.array(values, np.int32)


@dataclass
class Scripted(Fixed):
    """A policy that a test dictates; `views` are what it was asked about."""

    decide: object
    max_cohorts: int = 1
    uses_device_lane: bool = True
    passes: int | None = None
    entry_spacing: int = 0
    max_cohort_rows: int | None = None
    views: list = field(default_factory=list)

    form = Merging.form

    def may_enter(self, points, num_layers):
        return all(point >= self.entry_spacing for point in points)

    def at_boundary(self, boundary, cohort):
        self.views.append((boundary, cohort))
        return self.decide(boundary, cohort)


def merge_when_ready(boundary, cohort):
    return Action.MERGE if cohort.can_merge and cohort.is_ready else Action.SKIP


class Play:
    """A backend on paper, a loop, and rows that decode for ever from one token each."""

    def __init__(
        self, policy, *, device_rows=1, host_rows=0, pace=Pace.EAGER, seed=0, max_transit_pages=256
    ):
        num_rows = device_rows + host_rows
        self.backend = PaperBackend(
            num_layers=NUM_LAYERS,
            layers_per_program=SPAN,
            page_size=PAGE_SIZE,
            num_pages=max(device_rows, 1) * PAGES_PER_ROW,
            num_host_pages=max(host_rows, 1) * PAGES_PER_ROW,
            num_staging_pages=8,
            num_slots=max(num_rows, 4),
            pace=pace,
            seed=seed,
        )
        self.load = SteadyLoad(
            policy,
            device_lengths=[0] * device_rows,
            host_lengths=[0] * host_rows,
            pages_per_row=PAGES_PER_ROW,
        )
        self.dispatch = Dispatch(
            self.backend,
            policy,
            num_layers=NUM_LAYERS,
            layers_per_program=SPAN,
            watchdog_sec=2.5,
            max_transit_pages=max_transit_pages,
        )
        self.sequences = [[7 * row % VOCAB_SIZE] for row in range(num_rows)]
        self.backend.tokens_by_slot[:num_rows] = [tokens[0] for tokens in self.sequences]

    def sweep(self):
        """Play a sweep; returns the stages it enqueued and the cohorts that sampled."""
        num_stages = len(self.backend.stages)
        handle = self.dispatch.launch(self.load.plan_sweep())
        rows = self.load.note_launched(handle)
        for row, token in zip(rows, self.dispatch.read(handle).tokens_b.tolist(), strict=True):
            self.sequences[row].append(token)
        return self.backend.stages[num_stages:], handle.sampled_cohorts

    def sweeps(self, count, **parts_of_first):
        """Play sweeps, with more in the first than the steady load."""
        for sweep in range(count):
            plan = self.load.plan_sweep()
            handle = self.dispatch.launch(replace(plan, **parts_of_first) if sweep == 0 else plan)
            self.load.note_launched(handle)
            self.dispatch.read(handle)

    def check(self):
        for first, *output in self.sequences:
            assert output == expected_output([first], len(output), frozenset())

    def launch(self, **parts):
        return self.dispatch.launch(SweepPlan(sweep_id=7, **parts))


def head(*, row, slot, position):
    return HeadBatch.of([row], [slot], [position], [GREEDY])


def names(stages):
    return [type(stage) for stage in stages]


# Device rows


def prefill_plan(tokens, *, first_page=8, slot=3, ends_prompt=True):
    num_pages = -(-len(tokens) // PAGE_SIZE)
    pages = np.arange(first_page, first_page + num_pages, dtype=np.int32)
    batch = PrefillBatch(np.array([tokens], np.int32), ints(0), ints(len(tokens)), pages[None])
    last = head(row=0, slot=slot, position=len(tokens)) if ends_prompt else None
    return {"prefill": batch, "prefill_head": last}


def test_prefill_goes_first_then_decode_each_with_its_head():
    play = Play(DeviceOnly())
    decode = play.load.plan_sweep()
    prompt = [5, 6, 7, 8, 9]
    handle = play.launch(
        **prefill_plan(prompt), decode=decode.decode, decode_head=decode.decode_head
    )
    programs = [Layers] * (NUM_LAYERS // SPAN)
    stages = play.backend.stages
    assert names(stages) == [Embed, *programs, Head, Embed, *programs, Head]
    assert [stage.first_layer for stage in stages if isinstance(stage, Layers)] == [0, 2, 4] * 2
    assert stages[5].batch is decode.decode
    tokens = play.dispatch.read(handle).tokens_b.tolist()
    assert tokens[:1] == expected_output(prompt, 1, frozenset())
    assert tokens[1:] == expected_output(play.sequences[0], 1, frozenset())


def test_a_chunk_in_mid_prompt_samples_nothing():
    play = Play(DeviceOnly())
    handle = play.launch(**prefill_plan([5, 6, 7], ends_prompt=False))
    assert names(play.backend.stages) == [Embed, Layers, Layers, Layers]
    assert play.dispatch.read(handle).tokens_b.tolist() == []


# Cohorts


def test_a_cohort_rides_one_layer_a_sweep_and_samples_with_the_device_rows():
    play = Play(Merging(), host_rows=2)
    stages, sampled = play.sweep()
    assert names(stages[:3]) == [Embed, PreAttention, Embed], "it enters ahead of the device's rows"
    assert not sampled
    for layer in range(1, NUM_LAYERS):
        stages, sampled = play.sweep()
        assert [stage.layer for stage in stages if isinstance(stage, Boundary)].count(layer) == 1
        assert play.dispatch.stats.num_merges == layer
        assert not sampled
    stages, sampled = play.sweep()
    assert names(stages[-3:]) == [PostAttention, PostAttention, Head]
    assert len(stages[-1].batches) == 2
    assert sampled == (0,)
    assert [job.layer for job in play.backend.jobs] == list(range(NUM_LAYERS))
    stats = play.dispatch.stats
    assert (stats.num_merges, stats.num_joint_heads) == (NUM_LAYERS - 1, 1)
    assert (stats.num_extra_passes, stats.num_head_passes) == (0, 0)
    play.check()


@pytest.mark.parametrize("merge_layer", [1, 5])
def test_far_from_the_cohort_the_device_runs_whole_programs(merge_layer):
    play = Play(Merging(), host_rows=1)
    for _ in range(1 + merge_layer):
        stages, _ = play.sweep()
    assert Boundary(merge_layer, cohort_id=0) in stages
    assert Layers in names(stages)
    assert names(stages).count(DeviceAttention) < NUM_LAYERS
    play.check()


def test_a_late_cohort_is_skipped_and_loses_a_sweep():
    play = Play(Merging(), host_rows=1)
    play.sweep()
    play.backend.host_hangs = True
    play.sweep()  # merges what was ready, and its next attention hangs
    num_merges = play.dispatch.stats.num_merges
    num_late = play.dispatch.stats.num_late
    play.sweep()
    assert play.dispatch.stats.num_merges == num_merges
    assert play.dispatch.stats.num_late == num_late + 1
    play.backend.host_hangs = False
    sampled = [play.sweep()[1] for _ in range(NUM_LAYERS)]
    assert sampled.index((0,)) == 4, "layers 2 to 5, then the head"
    play.check()


def test_the_loop_waits_for_a_result_until_the_device_has_one_stage_left():
    def decide(boundary, cohort):
        if cohort.is_ready or not cohort.can_merge:
            return merge_when_ready(boundary, cohort)
        return Action.WAIT if cohort.queue_depth > 1 else Action.SKIP

    policy = Scripted(decide)
    play = Play(policy, host_rows=1, pace=Pace.LATE)
    for _ in range(3):
        play.sweep()
    depths = [view.queue_depth for boundary, view in policy.views if view.point == boundary]
    assert min(depths[::2]) > 1
    assert depths[1::2] == [1] * 3
    assert play.dispatch.stats.num_late == 2, "in its first sweep it had only just entered"


def test_a_policy_may_wait_for_the_result_however_late():
    policy = Scripted(
        lambda boundary, cohort: (
            Action.WAIT
            if cohort.can_merge and not cohort.is_ready
            else merge_when_ready(boundary, cohort)
        )
    )
    play = Play(policy, host_rows=2, pace=Pace.LATE)
    _, sampled = play.sweep()
    assert sampled == (0,), "through all layers in one sweep"
    assert play.dispatch.stats.num_merges == NUM_LAYERS - 1
    play.check()


@pytest.mark.parametrize("ends_with", [Action.MERGE, Action.EXTRA_PASS])
def test_extra_passes_carry_a_cohort_through_in_one_sweep(ends_with):
    policy = Scripted(
        lambda boundary, cohort: ends_with if boundary == NUM_LAYERS else Action.EXTRA_PASS
    )
    play = Play(policy, host_rows=2)
    stages, sampled = play.sweep()
    assert sampled == (0,)
    boundaries = [stage.layer for stage in stages if isinstance(stage, Boundary)]
    assert sorted(boundaries) == sorted([*range(1, NUM_LAYERS)] * 2), "each layer's work twice"
    stats = play.dispatch.stats
    assert stats.num_extra_passes == NUM_LAYERS - 1
    assert stats.num_joint_heads == (ends_with is Action.MERGE)
    assert stats.num_head_passes == (ends_with is Action.EXTRA_PASS)
    assert names(stages).count(Head) == 1 + stats.num_head_passes
    play.check()


def test_an_extra_pass_needs_no_place_beside_the_device():
    policy = Scripted(lambda boundary, cohort: Action.EXTRA_PASS if boundary == 5 else Action.SKIP)
    play = Play(policy, host_rows=1)
    for layer in range(1, NUM_LAYERS):
        stages, _ = play.sweep()
        boundaries = [stage.layer for stage in stages if isinstance(stage, Boundary)]
        assert boundaries[4:] == [layer, 5] if layer < 5 else [5, 5]
    _, sampled = play.sweep()
    assert sampled == (0,)
    assert play.dispatch.stats.num_head_passes == 1
    play.check()


def test_two_cohorts_at_one_place_share_the_head_but_no_boundary():
    policy = Scripted(merge_when_ready, max_cohorts=2)
    play = Play(policy, host_rows=2)
    _, sampled = play.sweep()
    assert sampled == (0,), "the second found each boundary taken"
    assert play.dispatch.stats.num_merges == NUM_LAYERS - 1
    for _ in range(4):
        play.sweep()
    heads = [len(stage.batches) for stage in play.backend.stages if isinstance(stage, Head)]
    assert max(heads) <= 3
    play.check()


def test_all_cohorts_that_stand_at_the_head_share_it():
    policy = Scripted(
        lambda boundary, cohort: Action.MERGE if boundary == NUM_LAYERS else Action.EXTRA_PASS,
        max_cohorts=3,
    )
    play = Play(policy, device_rows=2, host_rows=3)
    stages, sampled = play.sweep()
    assert sampled == (0, 1, 2)
    assert [len(stage.batches) for stage in stages if isinstance(stage, Head)] == [4]
    assert play.dispatch.stats.num_joint_heads == 3
    play.check()


def test_cohorts_keep_the_distance_that_the_policy_asks_for():
    policy = Scripted(merge_when_ready, max_cohorts=2, passes=1, entry_spacing=3)
    play = Play(policy, host_rows=2)
    entered = []
    for sweep in range(5):
        play.sweep()
        entered += [sweep] * (len({job.cohort_id for job in play.backend.jobs}) - len(entered))
    assert entered == [0, 3], "the second enters where the first has passed points 0 to 2"
    play.check()


def test_a_dropped_cohort_is_forgotten_and_its_number_free():
    play = Play(Merging(), host_rows=1)
    for _ in range(3):
        play.sweep()
    assert "cohort 0 (1 rows) at point 3 of 6" in play.dispatch.describe()
    play.launch(dropped_cohorts=(0,))
    assert "no cohorts" in play.dispatch.describe()
    decode = DecodeBatch(ints(1), ints(0), np.arange(4, dtype=np.int32)[None])
    again = CohortBatch(0, decode, head(row=0, slot=1, position=1))
    play.launch(cohorts=(again,))
    assert play.dispatch.stats.num_head_passes == 1


def test_without_device_rows_the_sweeps_are_the_cohorts_own():
    play = Play(Merging(max_cohorts=2, uses_device_lane=False), device_rows=0, host_rows=4)
    sampled = [play.sweep()[1] for _ in range(6)]
    assert sampled == [(0,), (1,)] * 3
    assert play.dispatch.stats.num_head_passes == 6
    play.check()


@settings(max_examples=60)
@given(
    st.sampled_from(
        [
            DeviceOnly(),
            Merging(),
            Merging(max_cohorts=3, is_spread=True),
            Merging(max_cohorts=2, passes=3),
            Merging(max_cohorts=2, passes=None),
            Merging(max_cohorts=2, uses_device_lane=False),
            AsymmetricPipelining(StageTimes(num_layers=NUM_LAYERS, linear_sec=1.0)),
        ]
    ),
    st.integers(1, 4),
    st.integers(0, 6),
    st.sampled_from(Pace),
    st.integers(0, 2**32),
)
def test_tokens_do_not_depend_on_the_schedule(policy, device_rows, host_rows, pace, seed):
    """Whatever the policy and however far each side has come."""
    if not policy.uses_device_lane:
        device_rows, host_rows = 0, host_rows + 1
    host_rows = host_rows if policy.max_cohorts else 0
    play = Play(policy, device_rows=device_rows, host_rows=host_rows, pace=pace, seed=seed)
    for _ in range(12):
        play.sweep()
    play.check()
    assert play.load.counts[:device_rows].tolist() == [12] * device_rows


# Prompts bound for the host

PROMPT = [int(token) for token in np.random.default_rng(0).integers(0, VOCAB_SIZE, 10)]


def host_prefill_parts(prompt, *, chunk_tokens, units_per_part, slot, host_pages):
    """Return the parts of one prompt's prefill; its staging pages are the plane's first."""
    num_pages = -(-len(prompt) // PAGE_SIZE)
    staging = np.arange(num_pages, dtype=np.int32)
    chunks = []
    for start in range(0, len(prompt), chunk_tokens):
        tokens = prompt[start : start + chunk_tokens]
        padded = [*tokens, *[0] * (chunk_tokens - len(tokens))]
        chunks.append(
            PrefillBatch(
                np.array([padded], np.int32), ints(start), ints(len(tokens)), staging[None]
            )
        )
    num_units = len(chunks) * NUM_LAYERS
    ends = [*range(units_per_part, num_units, units_per_part), num_units]
    return [
        HostPrefillBatch(
            chunks=tuple(chunks),
            first_unit=first,
            end_unit=end,
            staging_pages_i=staging,
            host_pages_i=np.array(host_pages[:num_pages], np.int32),
            heads=((len(chunks) - 1, head(row=0, slot=slot, position=len(prompt))),)
            if end == num_units
            else (),
        )
        for first, end in zip([0, *ends[:-1]], ends, strict=True)
    ]


@pytest.mark.parametrize("pace", Pace)
@pytest.mark.parametrize("units_per_part", [1, 5, 100])
@pytest.mark.parametrize("max_transit_pages", [256, 1])
def test_a_prompt_prefills_layer_by_layer_into_the_host(pace, units_per_part, max_transit_pages):
    play = Play(Merging(), host_rows=1, pace=pace, seed=3, max_transit_pages=max_transit_pages)
    pages = [11, 2, 7, 4]
    parts = host_prefill_parts(
        PROMPT, chunk_tokens=4, units_per_part=units_per_part, slot=2, host_pages=pages
    )
    sequence = list(PROMPT)
    for part in parts:
        sequence += play.dispatch.read(play.launch(host_prefill=part)).tokens_b.tolist()
    units = [stage for stage in play.backend.stages if isinstance(stage, StagedLayer)]
    assert [unit.layer for unit in units] == [
        layer for layer in range(NUM_LAYERS) for _ in range(3)
    ]
    while len(sequence) < 15:
        position = len(sequence) - 1
        decode = DecodeBatch(ints(2), ints(position), np.array([pages], np.int32))
        cohort = CohortBatch(0, decode, head(row=0, slot=2, position=position + 1))
        sequence += play.dispatch.read(play.launch(cohorts=(cohort,))).tokens_b.tolist()
    assert sequence == PROMPT + expected_output(PROMPT, 5, frozenset())


def test_a_host_prompt_goes_on_beside_device_rows_and_a_cohort():
    play = Play(Merging(), host_rows=1, pace=Pace.RANDOM, seed=1)
    parts = host_prefill_parts(
        PROMPT, chunk_tokens=8, units_per_part=2, slot=2, host_pages=[11, 2, 7]
    )
    for part in parts:
        planned = play.load.plan_sweep()
        handle = play.launch(
            decode=planned.decode,
            decode_head=planned.decode_head,
            cohorts=planned.cohorts,
            host_prefill=part,
        )
        rows = play.load.note_launched(handle)
        tokens = play.dispatch.read(handle).tokens_b.tolist()
        if part.heads:
            assert [tokens.pop(0)] == expected_output(PROMPT, 1, frozenset())
        for row, token in zip(rows, tokens, strict=True):
            play.sequences[row].append(token)
    assert play.dispatch.stats.num_host_jobs > 0
    play.check()


# Moves


@pytest.mark.parametrize("pace", Pace)
@pytest.mark.parametrize("max_transit_pages", [256, 6, 1])
def test_a_sequence_goes_to_the_host_and_comes_back(pace, max_transit_pages):
    play = Play(Merging(), host_rows=1, pace=pace, seed=2, max_transit_pages=max_transit_pages)
    handle = play.launch(**prefill_plan(PROMPT, first_page=8, slot=3))
    sequence = PROMPT + play.dispatch.read(handle).tokens_b.tolist()
    device_pages, host_pages = ints(8, 9, 10), ints(4, 1, 5)

    def carry(move):
        handle = play.launch(moves=(move,))
        for _ in range(4 * NUM_LAYERS):
            if not handle.finished_moves:
                handle = play.launch()
        assert handle.finished_moves == (move.move_id,)

    def decode(pages):
        batch = DecodeBatch(ints(3), ints(len(sequence) - 1), pages[None])
        return batch, head(row=0, slot=3, position=len(sequence))

    carry(Move(0, Direction.DEMOTION, device_pages, host_pages))
    cohort = CohortBatch(0, *decode(host_pages))
    sequence.extend(play.dispatch.read(play.launch(cohorts=(cohort,))).tokens_b.tolist())
    play.backend.device_pages[:] = -1
    carry(Move(1, Direction.PROMOTION, ints(6, 3, 0), host_pages))
    batch, last = decode(ints(6, 3, 0))
    handle = play.launch(decode=batch, decode_head=last)
    sequence.extend(play.dispatch.read(handle).tokens_b.tolist())
    assert sequence == PROMPT + expected_output(PROMPT, 3, frozenset())
    assert play.dispatch.stats.num_moves == {Direction.DEMOTION: 1, Direction.PROMOTION: 1}


def test_no_more_pages_are_under_way_than_allowed():
    play = Play(Merging(), host_rows=1, pace=Pace.LATE, max_transit_pages=6)
    move = Move(0, Direction.DEMOTION, ints(8, 9, 10), ints(4, 1, 5))
    play.launch(moves=(move,))
    assert names(play.backend.stages) == [Export] * 2
    play.launch()  # has nothing else to do, and waits for a layer to arrive
    play.launch()
    assert names(play.backend.stages) == [Export] * 3


def test_a_move_overlaps_with_the_device_rows():
    play = Play(Merging(), host_rows=1, pace=Pace.EAGER, max_transit_pages=3)
    planned = play.load.plan_sweep()
    move = Move(0, Direction.PROMOTION, ints(8, 9, 10), ints(4, 1, 5))
    play.launch(moves=(move,), decode=planned.decode, decode_head=planned.decode_head)
    for _ in range(2 * NUM_LAYERS):
        play.launch()
    stages = names(play.backend.stages)
    assert stages.count(Import) == NUM_LAYERS
    assert play.dispatch.stats.num_moves == {Direction.PROMOTION: 1}


# What goes wrong


def test_a_hanging_device_is_reported():
    play = Play(DeviceOnly())
    play.backend.device_hangs = True
    with pytest.raises(
        StuckError, match=r"sweep 1 did not complete within 2.5 s; 5 device stages not seen to end"
    ):
        play.sweep()


def test_a_hanging_host_is_reported_where_the_policy_waits_for_it():
    policy = Scripted(lambda boundary, cohort: Action.MERGE if cohort.is_ready else Action.WAIT)
    play = Play(policy, host_rows=2)
    play.backend.host_hangs = True
    with pytest.raises(
        StuckError, match=r"nothing moved for 2.5 s: .*cohort 0 \(2 rows\) at point 1 of 6"
    ):
        play.sweep()


def test_a_hanging_host_is_reported_where_cohorts_are_alone():
    play = Play(Merging(max_cohorts=2, uses_device_lane=False), device_rows=0, host_rows=2)
    play.backend.host_hangs = True
    with pytest.raises(StuckError, match=r"cohort 0 \(1 rows\) at point 1 of 6, cohort 1"):
        play.sweep()


def test_a_hanging_host_is_reported_where_a_move_waits_for_it():
    play = Play(Merging(), device_rows=0, max_transit_pages=3)
    play.backend.host_hangs = True
    move = Move(5, Direction.PROMOTION, ints(8, 9, 10), ints(4, 1, 5))
    with pytest.raises(StuckError, match=r"promotion 5 at layer 1 with 1 under way"):
        play.launch(moves=(move,))


def failing(kind):
    return lambda work: OSError(f"no {kind.__name__} today") if isinstance(work, kind) else None


@pytest.mark.parametrize("pace", [Pace.EAGER, Pace.RANDOM])
@pytest.mark.parametrize("kind", [Embed, Boundary, Head, HostAttention, DeviceAttention])
def test_a_failure_is_raised_with_its_own_message(kind, pace):
    play = Play(Merging(), host_rows=1, pace=pace)
    play.backend.fail_with = failing(kind)
    with pytest.raises(OSError, match=f"no {kind.__name__} today"):
        play.sweeps(4 * NUM_LAYERS)


@pytest.mark.parametrize("pace", Pace)
@pytest.mark.parametrize(
    ("kind", "direction"),
    [
        (Export, Direction.DEMOTION),
        (WritePages, Direction.DEMOTION),
        (ReadPages, Direction.PROMOTION),
        (Import, Direction.PROMOTION),
    ],
)
def test_a_failed_transfer_is_raised_with_its_own_message(kind, direction, pace):
    play = Play(Merging(), device_rows=0, host_rows=1, pace=pace)
    play.backend.fail_with = failing(kind)
    move = Move(0, direction, ints(8, 9, 10), ints(4, 1, 5))
    with pytest.raises(OSError, match=f"no {kind.__name__} today"):
        play.sweeps(2 * NUM_LAYERS, moves=(move,))
