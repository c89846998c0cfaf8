"""Prompts that begin alike, on paper: computed once, shared, kept until others need the room."""

from collections import Counter

import pytest
from paper_backend import Pace
from paper_loop import PAGE_SIZE, SHARED, Loop, check, make_request

from apex_jax.plan import Direction
from apex_jax.policies import Merging
from apex_jax.prefix_cache import PrefixCache

pytestmark = pytest.mark.usefixtures("without_annotations_checked")
NUM_SHARED = len(SHARED)


def make_loop(**others):
    limits = {"num_pages": 40, "max_requests": 8, "max_prefill_tokens": 64}
    return Loop(reuses_prefixes=True, **{**limits, **others})


def request(name, rest, max_tokens=4, **sampling):
    return make_request(name, SHARED + rest, max_tokens, ignore_eos=True, **sampling)


def run(loop, *requests):
    """Run requests to their end; return how many of their tokens were computed, and reused."""
    before = loop.scheduler.stats.num_prefilled_tokens, loop.scheduler.stats.num_reused_tokens
    for one in requests:
        loop.submit(one)
    loop.run()
    for output in loop.outputs.values():
        check(output)
    after = loop.scheduler.stats.num_prefilled_tokens, loop.scheduler.stats.num_reused_tokens
    return after[0] - before[0], after[1] - before[1]


# The tree of known pages


def test_a_page_is_found_behind_the_same_tokens_only():
    known = PrefixCache(page_size=2)
    first = known.add(known.root, [1, 2, 3, 4, 5], [10, 11, 12], 2)
    known.add(known.root, [9, 9, 3, 4], [20, 21], 2)
    assert [node.page for node in known.find([1, 2, 3, 4], 2)] == [10, 11]
    assert [node.page for node in known.find([9, 9, 3, 4], 2)] == [20, 21]
    assert [node.page for node in known.find([1, 2, 3, 5], 2)] == [10]
    assert known.find([3, 4], 1) == []
    assert known.find([1, 2, 3, 4], 1)[-1] is first.parent


def test_of_two_pages_with_the_same_tokens_one_is_known():
    known = PrefixCache(page_size=2)
    one = known.add(known.root, [1, 2, 3, 4], [10, 11], 2)
    other = known.add(known.root, [1, 2, 3, 4, 5, 6], [20, 21, 22], 3)
    assert other.parent is one
    assert [page in known for page in (10, 11, 20, 21, 22)] == [True, True, False, False, True]


def test_behind_a_forgotten_page_nothing_is_found():
    known = PrefixCache(page_size=1)
    old = known.add(known.root, [1, 2, 3], [10, 11, 12], 2)
    known.forget(10)
    assert known.find([1, 2, 3], 3) == []
    known.add(old, [1, 2, 3], [10, 11, 12], 3)  # by a sequence that still has its pages
    known.add(known.root, [1, 2], [20, 21], 2)
    assert [node.page for node in known.find([1, 2, 3], 3)] == [20, 21]
    for page in (11, 12, 20, 21):
        known.forget(page)
    assert len(known) == 0
    assert known.find([1], 1) == []


# One lane


@pytest.mark.parametrize("pace", Pace)
def test_a_later_request_computes_only_what_is_new(pace):
    loop = make_loop(pace=pace)
    assert run(loop, request("0", [5] * 4)) == (NUM_SHARED + 4, 0)
    assert run(loop, request("1", [6] * 4), request("2", [7])) == (5, 2 * NUM_SHARED)
    assert loop.scheduler.stats.num_admitted_tokens == 3 * NUM_SHARED + 9


@pytest.mark.parametrize("max_prefill_tokens", [16, 64])
def test_of_requests_that_arrive_together_one_computes_what_they_share(max_prefill_tokens):
    loop = make_loop(max_prefill_tokens=max_prefill_tokens)
    rest = [[number] * number for number in range(1, 7)]
    requests = [request(str(number), one) for number, one in enumerate(rest)]
    assert run(loop, *requests) == (NUM_SHARED + sum(map(len, rest)), 5 * NUM_SHARED)
    assert loop.scheduler.stats.max_running == 6


def test_others_do_not_wait_with_them():
    loop = make_loop()
    for name, prompt in (("0", SHARED[:9]), ("1", SHARED[:10]), ("other", [8] * 9)):
        loop.submit(make_request(name, prompt, 4))
    loop.step()
    assert loop.plans[0].prefill.lengths_b.tolist() == [9, 9]
    run(loop)
    assert loop.plans[1].prefill.starts_b.tolist() == [PAGE_SIZE]


def test_the_last_token_of_a_prompt_is_computed_whatever_is_known():
    loop = make_loop()
    run(loop, request("0", []))
    assert run(loop, request("1", [])) == (PAGE_SIZE, NUM_SHARED - PAGE_SIZE)


def test_prompts_whose_logprobs_are_wanted_are_computed_whole():
    loop = make_loop()
    run(loop, request("0", [5]))
    assert run(loop, request("1", [5], prompt_logprobs=0)) == (NUM_SHARED + 1, 0)
    loop = make_loop()
    run(loop, request("0", [5], prompt_logprobs=0))
    assert run(loop, request("1", [5])) == (1, NUM_SHARED)


def test_without_reuse_nothing_is_shared():
    loop = Loop(num_pages=40, max_requests=8)
    requests = [request(str(number), [5]) for number in range(3)]
    assert run(loop, *requests) == (3 * NUM_SHARED + 3, 0)


def test_a_conversation_goes_on_where_its_pages_end():
    loop = make_loop()
    run(loop, request("0", [5], max_tokens=16))
    text = [*SHARED, 5, *loop.outputs["0"].token_ids]
    num_known = (len(text) - 1) // PAGE_SIZE * PAGE_SIZE  # the last token's KV was never computed
    assert run(loop, make_request("1", [*text, 6], 4)) == (len(text) + 1 - num_known, num_known)


@pytest.mark.parametrize("num_steps", [1, 2])
def test_who_waited_for_a_cancelled_prompt_computes_it(num_steps):
    loop = make_loop(max_prefill_tokens=16)
    loop.submit(request("0", [5]))
    loop.submit(request("1", [6]))
    for _ in range(num_steps):
        loop.step()
    assert loop.scheduler.num_waiting == 1
    assert loop.scheduler.cancel("0")
    num_done = min(16 * num_steps, NUM_SHARED)  # what was planned stays known
    assert run(loop) == (NUM_SHARED + 1 - num_done, num_done)
    assert list(loop.outputs) == ["1"]


def test_a_preempted_request_finds_its_own_pages_again():
    loop = make_loop(num_pages=9, max_requests=4)
    run(loop, *(request(str(number), [number + 5] * 8, max_tokens=24) for number in range(4)))
    stats = loop.scheduler.stats
    assert stats.num_preemptions > 0
    reused = stats.num_admitted_tokens - stats.num_prefilled_tokens
    assert reused == stats.num_reused_tokens > 3 * NUM_SHARED


def test_pages_go_to_others_longest_unused_first():
    loop = make_loop(num_pages=10, max_requests=1)
    other = [40 - token for token in range(NUM_SHARED)]
    run(loop, request("0", [5]))
    run(loop, make_request("1", [*other, 5], 4))
    run(loop, request("2", [5]))  # uses the older again
    run(loop, make_request("3", [9] * 41, 4))
    assert run(loop, request("4", [5])) == (1, NUM_SHARED)
    assert run(loop, make_request("5", [*other, 5], 4)) == (2 * PAGE_SIZE + 1, PAGE_SIZE)


def test_what_is_kept_counts_as_free():
    loop = make_loop(num_pages=8, max_requests=2)
    run(loop, request("0", [5], max_tokens=32))
    device = loop.scheduler._residency.device
    assert device.num_used == 0
    run(loop, make_request("1", [9] * 60, 4))
    assert loop.outputs["1"].num_preemptions == 0


# Both lanes


def test_moves_and_preemptions_leave_shared_pages_right():
    counts = Counter()
    for seed, pace in enumerate(list(Pace) * 3):
        loop = make_loop(
            num_pages=10,
            num_host_pages=30,
            max_requests=4,
            max_host_requests=4,
            policy=Merging(max_cohorts=2, is_spread=True),
            pace=pace,
            seed=seed,
        )
        run(loop, *(request(str(number), [number] * number, 20) for number in range(12)))
        counts.update(loop.dispatch.stats.num_moves)
        stats = loop.scheduler.stats
        counts.update(reused=stats.num_reused_tokens, host=stats.num_host_tokens)
    assert min(counts[direction] for direction in Direction) > 0
    assert min(counts["reused"], counts["host"]) > 0
