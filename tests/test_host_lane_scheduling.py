"""Both lanes on paper: every strategy gives the tokens of one lane, whatever comes late."""

import random
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from paper_backend import VOCAB_SIZE, Pace
from paper_loop import PAGE_SIZE, SHARED, Loop, check, make_request, make_watched_request

from apex_jax.buckets import HostLimits, choose
from apex_jax.cost_model import StageTimes
from apex_jax.hardware import HostAttention
from apex_jax.pipelining import AsymmetricPipelining
from apex_jax.plan import Direction
from apex_jax.policies import Merging
from apex_jax.scheduler import Scheduler

pytestmark = [
    pytest.mark.usefixtures("without_annotations_checked"),
    pytest.mark.main_python,
]
TIMES = StageTimes(num_layers=6, linear_sec=1.0, host_attention_sec_per_token=0.01)
POLICIES = {
    "full_offload": Merging(max_cohorts=2, uses_device_lane=False),
    "async_overlap": Merging(),
    "staggered": Merging(max_cohorts=2, is_spread=True),
    "staggered_3": Merging(max_cohorts=3, is_spread=True),
    "passes_2": Merging(max_cohorts=2, passes=2),
    "passes_4": Merging(max_cohorts=1, passes=4),
    "passes_all": Merging(max_cohorts=2, passes=None),
    "asymmetric_pipelining": AsymmetricPipelining(TIMES),
    "asymmetric_slow_host": AsymmetricPipelining(replace(TIMES, host_attention_sec_per_token=0.1)),
}

requests = st.tuples(
    st.builds(
        lambda num_shared, rest: SHARED[:num_shared] + rest,
        st.sampled_from([0, 0, 15, 16, 24]),
        st.lists(st.integers(0, VOCAB_SIZE - 1), min_size=1, max_size=24),
    ),
    st.integers(1, 24),
    st.booleans(),
)


def submit(loop, drawn):
    """Every third ends where its watcher says, if it gets so far."""
    for index, (prompt, max_tokens, ignore_eos) in enumerate(drawn):
        arguments = (str(index), prompt, max_tokens)
        if index % 3 == 2:
            loop.submit(make_watched_request(*arguments, 1 + index % 7, ignore_eos=ignore_eos))
        else:
            loop.submit(make_request(*arguments, ignore_eos=ignore_eos))


@settings(max_examples=80, deadline=None)
@given(
    st.sampled_from(sorted(POLICIES)),
    st.lists(requests, min_size=1, max_size=14),
    st.integers(2, 16),
    st.integers(9, 30),
    st.integers(1, 5),
    st.integers(1, 9),
    st.integers(1, 6),
    st.booleans(),
    st.sampled_from(Pace),
    st.integers(0, 2**32),
)
def test_tokens_do_not_depend_on_strategy_or_pace(
    name,
    drawn,
    num_pages,
    num_host_pages,
    max_requests,
    max_host_requests,
    rows,
    reuses_prefixes,
    pace,
    seed,
):
    loop = Loop(
        num_pages=num_pages,
        num_host_pages=num_host_pages,
        max_requests=max_requests,
        max_host_requests=max_host_requests,
        max_cohort_rows=rows,
        policy=POLICIES[name],
        reuses_prefixes=reuses_prefixes,
        pace=pace,
        seed=seed,
    )
    submit(loop, drawn)
    loop.run()
    assert len(loop.outputs) == len(drawn)
    for output in loop.outputs.values():
        check(output)


class TwoLanes(RuleBasedStateMachine):
    """Requests come, go and are cancelled at any time; nothing is lost or owned twice."""

    @initialize(
        name=st.sampled_from(sorted(POLICIES)),
        num_pages=st.integers(2, 12),
        num_host_pages=st.integers(4, 20),
        max_requests=st.integers(1, 4),
        max_host_requests=st.integers(1, 6),
        reuses_prefixes=st.booleans(),
        pace=st.sampled_from(Pace),
        seed=st.integers(0, 2**32),
    )
    def start(
        self,
        name,
        num_pages,
        num_host_pages,
        max_requests,
        max_host_requests,
        reuses_prefixes,
        pace,
        seed,
    ):
        self.max_requests, self.max_host_requests = max_requests, max_host_requests
        self.loop = Loop(
            num_pages=num_pages,
            num_host_pages=num_host_pages,
            max_requests=max_requests,
            max_host_requests=max_host_requests,
            policy=POLICIES[name],
            reuses_prefixes=reuses_prefixes,
            pace=pace,
            seed=seed,
        )
        self.num_submitted = 0
        self.expected = set()

    @rule(drawn=requests)
    def submit(self, drawn):
        prompt, max_tokens, ignore_eos = drawn
        if len(prompt) + max_tokens <= self.loop.scheduler.max_model_len:
            name = str(self.num_submitted)
            self.loop.submit(make_request(name, prompt, max_tokens, ignore_eos=ignore_eos))
            self.num_submitted += 1
            self.expected.add(name)

    @precondition(lambda self: self.num_submitted)
    @rule(num_steps=st.integers(1, 8))
    def step(self, num_steps):
        for _ in range(num_steps):
            self.loop.step()

    @precondition(lambda self: self.num_submitted)
    @rule(data=st.data())
    def cancel(self, data):
        name = str(data.draw(st.integers(0, self.num_submitted - 1)))
        is_live = name in self.expected - set(self.loop.outputs)
        assert self.loop.scheduler.cancel(name) == is_live
        if is_live:
            self.expected.discard(name)
        self.loop.scheduler.check_ledger()

    @invariant()
    def plans_are_within_budget(self):
        for plan in self.loop.plans[-8:] if hasattr(self, "loop") else ():
            slots = [] if plan.decode is None else plan.decode.slots_b.tolist()
            assert len(slots) <= self.max_requests
            for cohort in plan.cohorts:
                assert len(cohort.decode.slots_b) <= min(4, self.max_host_requests)
                slots += cohort.decode.slots_b.tolist()
            assert len(set(slots)) == len(slots), "a row in two batches"
            if plan.prefill is not None:
                assert plan.prefill.token_ids_bt.size <= 16

    def teardown(self):
        if hasattr(self, "loop"):
            self.loop.run()
            assert set(self.loop.outputs) == self.expected
            for output in self.loop.outputs.values():
                check(output)
            assert self.loop.scheduler._residency.device.num_used == 0
            assert self.loop.scheduler._residency.host.num_used == 0


TestTwoLanes = TwoLanes.TestCase
TestTwoLanes.settings = settings(max_examples=40, stateful_step_count=25, deadline=None)


def run_many(policy, seeds, **limits):
    """Return how often things happened in many random jobs."""
    counts = Counter()
    for seed in seeds:
        draw = random.Random(seed)
        pace, max_prefill_tokens = draw.choice(list(Pace)), draw.choice([16, 64])
        loop = Loop(
            policy=policy,
            pace=pace,
            max_prefill_tokens=max_prefill_tokens,
            seed=seed,
            **limits,
        )
        for index in range(12):
            prompt = [draw.randrange(VOCAB_SIZE) for _ in range(draw.randint(1, 40))]
            loop.submit(make_request(str(index), prompt, draw.randint(1, 24)))
        loop.run()
        for output in loop.outputs.values():
            check(output)
        stats = loop.dispatch.stats
        counts.update(
            merges=stats.num_merges,
            extra_passes=stats.num_extra_passes,
            late=stats.num_late,
            joint_heads=stats.num_joint_heads,
            preemptions=loop.scheduler.stats.num_preemptions,
            promotions=stats.num_moves[Direction.PROMOTION],
            demotions=stats.num_moves[Direction.DEMOTION],
            several_prompts=sum(
                plan.host_prefill is not None and len(plan.host_prefill.chunks[0].lengths_b) > 1
                for plan in loop.plans
            ),
            several_chunks=sum(
                plan.host_prefill is not None and len(plan.host_prefill.chunks) > 1
                for plan in loop.plans
            ),
        )
    return counts


def test_all_that_can_happen_happens():
    limits = {"num_pages": 10, "num_host_pages": 14, "max_requests": 4, "max_host_requests": 6}
    counts = run_many(Merging(max_cohorts=2, passes=2), range(12), **limits)
    assert min(counts.values()) > 0, counts


def test_the_device_alone_serves_what_fits_it():
    loop = Loop(
        num_pages=64, num_host_pages=64, max_requests=2, max_host_requests=4, policy=Merging()
    )
    for index in range(6):
        loop.submit(make_request(str(index), [index + 5] * 10, 8, ignore_eos=True))
    loop.run()
    assert not loop.backend.jobs, "rows were short, memory was not"


def test_a_request_too_long_for_the_device_lives_on_the_host():
    loop = Loop(
        num_pages=3, num_host_pages=12, max_requests=2, max_host_requests=2, policy=Merging()
    )
    assert loop.scheduler.max_model_len == 12 * PAGE_SIZE
    loop.submit(make_request("long", [7] * 60, 20, ignore_eos=True))
    loop.submit(make_request("short", [8] * 4, 8, ignore_eos=True))
    loop.run()
    for output in loop.outputs.values():
        check(output)
    assert loop.outputs["long"].num_host_tokens == 19, "all but the one that prefill yields"
    assert loop.outputs["short"].num_host_tokens == 0


def test_the_host_lane_drains_to_the_device_at_the_end():
    loop = Loop(
        num_pages=8, num_host_pages=32, max_requests=8, max_host_requests=8, policy=Merging()
    )
    for index in range(6):
        loop.submit(make_request(str(index), [index + 5] * 12, 30, ignore_eos=True))
    loop.run()
    assert loop.dispatch.stats.num_moves[Direction.PROMOTION] > 0
    last = max(loop.outputs.values(), key=lambda output: output.finish_sec)
    assert last.num_host_tokens < len(last.token_ids) - 1, "its last tokens came from the device"


def test_a_full_device_demotes_instead_of_computing_again():
    loop = Loop(
        num_pages=8, num_host_pages=64, max_requests=4, max_host_requests=8, policy=Merging()
    )
    for index in range(4):
        loop.submit(make_request(str(index), [index + 5] * 8, 24, ignore_eos=True))
    loop.run()
    assert loop.dispatch.stats.num_moves[Direction.DEMOTION] > 0
    assert loop.scheduler.stats.num_preemptions == 0


def test_a_long_prompt_for_the_host_stalls_neither_lane():
    loop = Loop(
        num_pages=6,
        num_host_pages=64,
        max_requests=4,
        max_host_requests=8,
        policy=Merging(),
        pace=Pace.EAGER,
    )
    for name, prompt_length in (("device", 8), ("host", 40)):
        loop.submit(make_request(name, [5] * prompt_length, 30, ignore_eos=True))
    for _ in range(8):
        loop.step()
    loop.submit(make_request("long", [6] * 200, 4, ignore_eos=True))
    num_plans, num_jobs = len(loop.plans), len(loop.backend.jobs)
    while "device" not in loop.outputs:
        loop.step()
    during = [plan for plan in loop.plans[num_plans:] if plan.host_prefill is not None]
    assert len(during) > 4
    assert all(plan.decode is not None for plan in during)
    attended = [job for job in loop.backend.jobs[num_jobs:] if isinstance(job, HostAttention)]
    assert len(attended) >= len(during) - 1, "the host went on, a layer a sweep"
    loop.run()
    for output in loop.outputs.values():
        check(output)


def test_a_policy_that_gives_a_request_no_tokens_does_not_starve_it():
    """On a host too slow to pay, only the device can serve it: room is kept once it has waited."""
    slow = AsymmetricPipelining(replace(TIMES, host_attention_sec_per_token=1e3))
    loop = Loop(num_pages=16, num_host_pages=64, max_requests=4, max_host_requests=8, policy=slow)
    for index in range(3):
        loop.submit(make_request(str(index), [index] * 12, 20, ignore_eos=True))
    loop.submit(make_request("long", [7] * 92, 20, ignore_eos=True))
    for index in range(150):
        loop.submit(make_request(f"later {index}", [9] * 12, 20, ignore_eos=True))
    loop.run()
    by_end = sorted(loop.outputs.values(), key=lambda output: output.finish_sec)
    place = [output.request.request_id for output in by_end].index("long")
    assert place < 80, f"it ended as number {place} of {len(by_end)}"


def test_exported_pages_are_let_go_once_they_have_arrived():
    loop = Loop(
        num_pages=2,
        num_host_pages=64,
        max_requests=2,
        max_host_requests=4,
        policy=Merging(),
        pace=Pace.EAGER,
        num_layers=24,
    )
    loop.submit(make_request("0", [7] * 24, 4, ignore_eos=True))
    most = 0
    while not loop.outputs:
        loop.step()
        exports = [one for one in loop.dispatch._work.stages if isinstance(one.value, np.ndarray)]
        most = max(most, sum(one.value.size for one in exports if one.value.ndim == 2))
    assert most <= (3 + 3) * PAGE_SIZE, "max_transit_pages, and the last stage's"


def test_a_policy_and_buckets_that_disagree_are_refused():
    host = HostLimits(max_cohort_rows=4, num_staging_pages=4, max_move_pages=4)
    shapes = {"max_requests": 2, "max_prefill_tokens": 16, "max_model_len": 32, "num_pages": 4}
    limits = {"num_layers": 2, "num_pages": 4, "max_requests": 2, "max_model_len": 32}
    for of_host, policy in ((None, Merging()), (host, None)):
        buckets = choose(**shapes, page_size=PAGE_SIZE, host=of_host)
        with pytest.raises(ValueError, match="host pages"):
            Scheduler(
                buckets=buckets,
                vocab_size=VOCAB_SIZE,
                eos_token_ids=frozenset(),
                policy=policy,
                **limits,
            )
