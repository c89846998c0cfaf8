"""The scheduler and the dispatch loop, played on paper: tokens, pages and order, without jax."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from paper_backend import VOCAB_SIZE, Pace, expected_output
from paper_loop import EOS, SHARED, Loop, check, make_request, make_watched_request

from apex_jax.request import FinishReason, RequestError, SamplingParams

pytestmark = pytest.mark.usefixtures("without_annotations_checked")
requests = st.builds(
    lambda num_shared, rest, *others: (SHARED[:num_shared] + rest, *others),
    st.sampled_from([0, 0, 15, 16, 24]),
    st.lists(st.integers(0, VOCAB_SIZE - 1), min_size=1, max_size=24),
    st.integers(1, 24),
    st.booleans(),
    st.lists(st.integers(0, VOCAB_SIZE - 1), max_size=2),
)


@pytest.mark.main_python
@settings(max_examples=150)
@given(
    st.lists(requests, min_size=1, max_size=12),
    st.integers(8, 24),
    st.integers(1, 9),
    st.sampled_from([16, 64]),
    st.booleans(),
    st.sampled_from(Pace),
)
def test_tokens_do_not_depend_on_pool_rows_or_chunks(
    drawn, num_pages, max_requests, max_prefill_tokens, reuses_prefixes, pace
):
    loop = Loop(
        num_pages=num_pages,
        max_requests=max_requests,
        max_prefill_tokens=max_prefill_tokens,
        reuses_prefixes=reuses_prefixes,
        pace=pace,
    )
    for index, (prompt, max_tokens, ignore_eos, stops) in enumerate(drawn):
        loop.submit(
            make_request(
                str(index),
                prompt,
                max_tokens,
                ignore_eos=ignore_eos,
                stop_token_ids=tuple(stops),
            )
        )
    loop.run()
    assert len(loop.outputs) == len(drawn)
    for output in loop.outputs.values():
        check(output)


class SchedulerMachine(RuleBasedStateMachine):
    """Requests arrive at any time; nothing is lost, owned twice or over budget."""

    @initialize(
        num_pages=st.integers(4, 12), max_requests=st.integers(1, 6), reuses_prefixes=st.booleans()
    )
    def start(self, num_pages, max_requests, reuses_prefixes):
        self.loop = Loop(
            num_pages=num_pages, max_requests=max_requests, reuses_prefixes=reuses_prefixes
        )
        self.names = []

    @rule(drawn=requests)
    def submit(self, drawn):
        prompt, max_tokens, ignore_eos, stops = drawn
        name = str(len(self.names))
        request = make_request(
            name, prompt, max_tokens, ignore_eos=ignore_eos, stop_token_ids=tuple(stops)
        )
        if len(prompt) + max_tokens > self.loop.scheduler.max_model_len:
            with pytest.raises(RequestError, match="the limit here is"):
                self.loop.submit(request)
        else:
            self.loop.submit(request)
            self.names.append(name)

    @precondition(lambda self: self.names)
    @rule(num_steps=st.integers(1, 5))
    def step(self, num_steps):
        for _ in range(num_steps):
            self.loop.step()

    @invariant()
    def plans_are_within_budget(self):
        if not hasattr(self, "loop"):
            return
        for plan in self.loop.plans[-5:]:
            assert plan.prefill is not None or plan.decode is not None
            if plan.decode is not None:
                assert len(set(plan.decode.slots_b.tolist())) == len(plan.decode.slots_b)
                assert len(plan.decode.slots_b) <= self.loop.scheduler.num_slots
            if plan.prefill is not None:
                assert plan.prefill.token_ids_bt.size <= 16
                assert (plan.prefill.lengths_b > 0).all()

    def teardown(self):
        if hasattr(self, "loop"):
            self.loop.run()
            assert sorted(self.loop.outputs) == sorted(self.names)
            for output in self.loop.outputs.values():
                check(output)


TestScheduler = pytest.mark.main_python(SchedulerMachine.TestCase)
TestScheduler.settings = settings(max_examples=60, stateful_step_count=30)


def test_a_small_pool_preempts_the_newest_and_recomputes_it():
    loop = Loop(num_pages=8, max_requests=4)
    for index in range(4):
        loop.submit(make_request(str(index), [index + 5] * 8, 24, ignore_eos=True))
    loop.run()
    assert loop.scheduler.stats.num_preemptions > 0
    assert loop.outputs["0"].num_preemptions == 0, "the oldest is never pre-empted"
    for output in loop.outputs.values():
        check(output)


@settings(max_examples=25)
@given(
    st.lists(st.tuples(st.integers(1, 24), st.booleans()), min_size=4, max_size=8),
    st.sampled_from(Pace),
)
def test_an_output_ends_where_its_watcher_says(drawn, pace):
    loop = Loop(num_pages=8, max_requests=4, pace=pace)
    for index, (num_tokens, ignore_eos) in enumerate(drawn):
        loop.submit(
            make_watched_request(str(index), [index + 5] * 8, 23, num_tokens, ignore_eos=ignore_eos)
        )
    loop.run()
    assert len(loop.outputs) == len(drawn)
    for output in loop.outputs.values():
        check(output)


def test_a_preempted_output_ends_where_its_watcher_says():
    loop = Loop(num_pages=8, max_requests=4)
    for index in range(4):
        loop.submit(make_watched_request(str(index), [index + 5] * 8, 24, 20, ignore_eos=True))
    loop.run()
    assert loop.scheduler.stats.num_preemptions > 0
    for output in loop.outputs.values():
        assert len(output.token_ids) == 20
        check(output)


def test_stop_strings_need_a_watcher():
    loop = Loop(num_pages=8, max_requests=4)
    with pytest.raises(RequestError, match="stop is given, and the request has no is_last"):
        loop.submit(make_request("0", [5], 4, stop=("x",)))


def test_one_request_has_one_output():
    loop = Loop(num_pages=8, max_requests=4)
    with pytest.raises(RequestError, match="n is 2: the engine takes one request for each output"):
        loop.submit(make_request("0", [5], 4, n=2))


def test_requests_finish_first_come_first_served():
    loop = Loop(num_pages=16, max_requests=2)
    for index in range(6):
        loop.submit(make_request(str(index), [index + 5] * 4, 8, ignore_eos=True))
    loop.run()
    finished = sorted(loop.outputs.values(), key=lambda output: output.finish_sec)
    assert [int(output.request.request_id) // 2 for output in finished] == [0, 0, 1, 1, 2, 2]


def test_a_long_prompt_does_not_stall_the_others():
    loop = Loop(num_pages=32, max_requests=4)
    loop.submit(make_request("short", [5] * 4, 20, ignore_eos=True))
    for _ in range(4):
        loop.step()
    loop.submit(make_request("long", [6] * 128, 4, ignore_eos=True))
    num_plans = len(loop.plans)
    loop.run()
    during = [plan for plan in loop.plans[num_plans:] if plan.prefill is not None]
    assert len(during) == 128 // 16
    assert all(plan.decode is not None for plan in during)


@pytest.mark.parametrize(("max_requests", "mean_rows"), [(1, 1.0), (16, 15.0), (256, 180.0)])
def test_short_requests_fill_the_rows(max_requests, mean_rows):
    loop = Loop(num_pages=2000, max_requests=max_requests, max_prefill_tokens=512)
    for index in range(4 * max_requests):
        loop.submit(make_request(str(index), [5] * 8, 32, ignore_eos=True))
    loop.run()
    rows = [len(plan.decode.slots_b) for plan in loop.plans if plan.decode is not None]
    assert np.mean(rows) >= mean_rows * 0.9


def test_no_request_is_preempted_for_pages_that_another_is_about_to_leave():
    loop = Loop(num_pages=4, max_requests=2)
    loop.submit(make_request("0", [5] * 7, 20, ignore_eos=True))
    loop.submit(make_request("1", [6] * 7, 9, ignore_eos=True))
    loop.run()
    assert loop.scheduler.stats.num_preemptions == 0


def test_a_waiting_request_is_admitted_while_others_decode():
    loop = Loop(num_pages=32, max_requests=2)
    loop.submit(make_request("0", [5] * 4, 40, ignore_eos=True))
    for _ in range(5):
        loop.step()
    loop.submit(make_request("1", [6] * 4, 2, ignore_eos=True))
    loop.run()
    assert loop.outputs["1"].finish_sec < loop.outputs["0"].finish_sec


def test_the_surplus_sweep_after_a_stop_token_leaves_nothing_behind():
    prompt = next(
        [token] for token in range(VOCAB_SIZE) if expected_output([token], 9, EOS)[-1] in EOS
    )
    loop = Loop(num_pages=4, max_requests=1)
    loop.submit(make_request("stops", prompt, 9))
    loop.submit(make_request("next", prompt, 9))
    loop.run()
    for output in loop.outputs.values():
        check(output)
        assert output.finish_reason == FinishReason.STOP


@pytest.mark.parametrize(
    ("prompt", "max_tokens", "message"),
    [
        ([], 1, "the prompt is empty"),
        (
            [1, VOCAB_SIZE],
            1,
            rf"prompt token id {VOCAB_SIZE} is outside the vocabulary \(0 to 49\)",
        ),
        ([1, -1], 1, "prompt token id -1 is outside"),
        ([1] * 30, 3, r"prompt \(30 tokens\) plus max_tokens \(3\) is 33; the limit here is 32"),
    ],
)
def test_a_request_that_can_never_run_is_refused(prompt, max_tokens, message):
    loop = Loop(num_pages=4, max_requests=2)
    with pytest.raises(RequestError, match=message):
        loop.submit(make_request("bad", prompt, max_tokens))
    assert loop.scheduler.num_unfinished == 0


def test_a_request_that_fills_the_whole_pool_runs():
    loop = Loop(num_pages=4, max_requests=2)
    loop.submit(make_request("full", [5] * 30, 2, ignore_eos=True))
    loop.submit(make_request("other", [6] * 30, 2, ignore_eos=True))
    loop.run()
    for output in loop.outputs.values():
        check(output)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("max_tokens", 0, "max_tokens is 0; it must be at least 1"),
        ("temperature", -0.5, "temperature is -0.5; it must be between 0 and 100"),
        ("temperature", float("nan"), "temperature is nan"),
        ("top_k", -1, "top_k is -1; it must be at least 0"),
        ("top_p", 0.0, "top_p is 0.0; it must be above 0 and at most 1"),
        ("seed", 2**64, "it must be a 64-bit integer"),
        ("stop", ("x", ""), "it must be a tuple of strings that are not empty"),
    ],
)
def test_sampling_parameters_are_held_to_their_ranges(name, value, message):
    with pytest.raises(RequestError, match=message):
        SamplingParams(**{name: value})


def test_one_stop_string_alone_is_not_taken_for_its_characters():
    params = SamplingParams()
    object.__setattr__(params, "stop", "no")  # what the annotation check of the tests would stop
    with pytest.raises(RequestError, match="stop is 'no'; it must be a tuple of strings"):
        params.__post_init__()


def test_the_ledger_notices_a_lost_page():
    loop = Loop(num_pages=8, max_requests=2)
    loop.submit(make_request("0", [5] * 4, 20, ignore_eos=True))
    loop.step()
    loop.scheduler._residency.device.pool.allocate(1)
    with pytest.raises(RuntimeError, match="device pages in use"):
        loop.scheduler.check_ledger()


def test_the_ledger_notices_a_lost_slot():
    loop = Loop(num_pages=8, max_requests=2)
    loop.scheduler._residency._free_slots.pop()
    with pytest.raises(RuntimeError, match="slots in use"):
        loop.scheduler.check_ledger()


def test_the_ledger_notices_a_lost_row():
    loop = Loop(num_pages=8, max_requests=2)
    loop.submit(make_request("0", [5] * 4, 20, ignore_eos=True))
    loop.step()
    device = loop.scheduler._residency.device
    device.decoding.discard(device.sequences[0].slot)
    with pytest.raises(RuntimeError, match=r"device rows \[\], ready \[0\]"):
        loop.scheduler.check_ledger()


def test_plans_keep_their_numbers_after_the_scheduler_moves_on():
    loop = Loop(num_pages=8, max_requests=2)
    loop.submit(make_request("0", [5] * 4, 20, ignore_eos=True))
    for _ in range(3):
        loop.step()
    plan = loop.plans[-1]
    before = {
        name: array.copy()
        for name, array in dataclasses.asdict(plan.decode).items()
        if isinstance(array, np.ndarray)
    }
    loop.run()
    for name, array in before.items():
        np.testing.assert_array_equal(getattr(plan.decode, name), array)
