"""Prompts that begin alike, on paper: computed once, shared, kept until others need the room."""

import random
from collections import Counter

import numpy as np
import pytest
from paper_backend import Pace
from paper_loop import PAGE_SIZE, SHARED, Loop, check, make_request

from apex_jax.hardware import ReadPages, WritePages
from apex_jax.plan import Direction
from apex_jax.policies import DeviceOnly, Merging
from apex_jax.prefix_cache import PrefixCache

pytestmark = [
    pytest.mark.usefixtures("without_annotations_checked"),
    pytest.mark.main_python,
]
NUM_SHARED = len(SHARED)


def make_loop(**others):
    limits = {"num_pages": 40, "max_requests": 8, "max_prefill_tokens": 64}
    return Loop(reuses_prefixes=True, **{**limits, **others})


def request(name, rest, max_tokens=4, **sampling):
    return make_request(name, SHARED + rest, max_tokens, ignore_eos=True, **sampling)


def run(loop, *requests):
    """Run requests to their end; return how many of their tokens were computed, and reused."""
    stats = loop.scheduler.stats

    def count():
        num_computed = stats.num_prefilled_tokens + stats.num_host_prefilled_tokens
        return np.array([num_computed, stats.num_reused_tokens])

    before = count()
    for one in requests:
        loop.submit(one)
    loop.run()
    for output in loop.outputs.values():
        check(output)
    return tuple((count() - before).tolist())


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


def test_eight_outputs_of_a_long_prompt_compute_it_once():
    loop = make_loop(num_pages=500, max_prefill_tokens=512, num_layers=3)
    prompt = [index * index % 47 for index in range(2000)]
    requests = [make_request(str(number), prompt, 4, seed=number) for number in range(8)]
    assert run(loop, *requests) == (2000 + 7 * PAGE_SIZE, 7 * (2000 - PAGE_SIZE))


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


# The host's lane


def make_host_loop(**others):
    limits = {"num_pages": 8, "num_host_pages": 40, "max_host_requests": 8}
    policy = Merging(max_cohorts=2, uses_device_lane=False)
    return make_loop(policy=policy, **{**limits, **others})


@pytest.mark.parametrize("pace", Pace)
@pytest.mark.parametrize("max_prefill_tokens", [16, 64])
def test_prompts_bound_for_the_host_share_its_pages(pace, max_prefill_tokens):
    loop = make_host_loop(pace=pace, max_prefill_tokens=max_prefill_tokens)
    requests = [request(str(number), [number] * (9 * number)) for number in range(1, 4)]
    num_new = 9 + 18 + 27
    assert run(loop, *requests) == (NUM_SHARED + num_new, 2 * NUM_SHARED)
    assert run(loop, request("4", [])) == (PAGE_SIZE, NUM_SHARED - PAGE_SIZE)
    assert loop.scheduler.stats.num_host_prefilled_tokens == NUM_SHARED + num_new + PAGE_SIZE


def test_a_layer_of_what_the_host_has_is_read_before_the_one_before_it_is_written():
    loop = make_host_loop(num_layers=3, layers_per_program=3)
    run(loop, request("0", [5]))
    loop.backend.jobs.clear()
    assert run(loop, request("1", [6] * 10, max_tokens=1)) == (10, NUM_SHARED)
    moved = [(type(job), job.layer, len(job.pages_i)) for job in loop.backend.jobs]
    read, written = (ReadPages, NUM_SHARED // PAGE_SIZE), (WritePages, 2)
    order = [(read, 0), (read, 1), (written, 0), (read, 2), (written, 1), (written, 2)]
    assert moved == [(kind, layer, num_pages) for (kind, num_pages), layer in order]


def test_prompts_that_go_to_the_host_together_may_share_different_pages():
    loop = make_host_loop(max_prefill_tokens=64)
    other = [40 - token for token in range(2 * PAGE_SIZE)]
    run(loop, request("0", [5]), make_request("1", [*other, 5], 4))
    num_plans = len(loop.plans)
    together = [request("2", [6] * 5), make_request("3", [*other, 7], 4), make_request("4", [9], 4)]
    assert run(loop, *together) == (5 + 1 + 1, NUM_SHARED + 2 * PAGE_SIZE)
    part = next(plan.host_prefill for plan in loop.plans[num_plans:] if plan.host_prefill)
    [chunk] = part.chunks
    assert chunk.starts_b.tolist() == [NUM_SHARED, 2 * PAGE_SIZE, 0]
    assert chunk.lengths_b.tolist() == [5, 1, 1]
    assert part.prefix.staging_pages_i.tolist() == [0, 1, 2, 4, 5]
    assert part.staging_pages_i.tolist() == [3, 6, 7]


def test_a_prompt_that_lost_its_pages_to_one_before_it_goes_later():
    loop = make_host_loop(num_host_pages=10, max_prefill_tokens=64)
    run(loop, request("0", [5]))
    run(loop, make_request("1", [9] * 48, 4))
    num_plans = len(loop.plans)
    run(loop, *(make_request(name, [int(name)] * 15, 1) for name in "78"), request("2", [5]))
    parts = [plan.host_prefill for plan in loop.plans[num_plans:] if plan.host_prefill]
    firsts = [part.chunks[0].lengths_b.tolist() for part in parts if part.first_unit == 0]
    assert firsts == [[15, 15], [NUM_SHARED + 1]]


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


def test_the_kv_of_a_token_that_was_given_up_is_not_known():
    loop = make_loop(
        num_pages=6,
        num_host_pages=20,
        max_requests=2,
        max_host_requests=2,
        policy=Merging(),
        pace=Pace.EAGER,
    )
    loop.submit(make_request("device", [5] * 9, 30, ignore_eos=True))
    loop.submit(request("host", [6] * 6, max_tokens=20))
    sequences = loop.scheduler._residency.host.sequences
    while not sequences or len(sequences[0].token_ids) < 4 * PAGE_SIZE:
        loop.step()
    [sequence] = sequences
    text = list(sequence.token_ids)
    while sequence.cohort_id is None:
        loop.step()
    assert len(sequence.token_ids) == len(text), "the token that fills the page is under way"
    loop.scheduler.cancel("host")
    loop.step()
    assert sequence.lane is None
    assert run(loop, make_request("again", [*text, 7], 2)) == (PAGE_SIZE + 1, 3 * PAGE_SIZE)


POLICIES = (
    DeviceOnly(),
    Merging(),
    Merging(max_cohorts=2, is_spread=True),
    Merging(max_cohorts=2, uses_device_lane=False),
    Merging(max_cohorts=2, passes=None),
)


def play_at_random(seed):
    """Play a job whose prompts begin alike, of which some are cancelled and some go on."""
    draw = random.Random(seed)
    policy = draw.choice(POLICIES)
    loop = make_loop(
        num_pages=draw.randint(6, 40),
        max_requests=draw.randint(1, 8),
        max_prefill_tokens=draw.choice([16, 64]),
        num_host_pages=draw.randint(10, 40) if policy.max_cohorts else 0,
        max_host_requests=draw.randint(1, 6) if policy.max_cohorts else 0,
        policy=policy,
        pace=draw.choice(list(Pace)),
        seed=seed,
    )
    families = [[draw.randrange(50) for _ in range(draw.randint(1, 40))] for _ in range(2)]
    for number in range(24):
        start, rest = draw.choice(families), draw.choice([0, 1, 2, 8, 16])
        prompt = start[: draw.choice([len(start), draw.randint(1, len(start))])]
        prompt = prompt + [draw.randrange(50) for _ in range(rest)]
        if loop.outputs and draw.random() < 0.2:
            said = loop.outputs[draw.choice(list(loop.outputs))]
            prompt = [*said.request.prompt_token_ids, *said.token_ids, 7]
        max_tokens = draw.randint(1, 24)
        if len(prompt) + max_tokens > loop.scheduler.max_model_len:
            continue
        loop.submit(make_request(str(number), prompt, max_tokens))
        for _ in range(draw.choice([0, draw.randint(1, 12)])):
            loop.step()
        if draw.random() < 0.15:
            loop.scheduler.cancel(str(draw.randint(0, number)))
    run(loop)
    return loop


def test_no_request_reads_what_another_wrote():
    counts = Counter()
    for seed in range(12):
        loop = play_at_random(seed)
        stats = loop.scheduler.stats
        counts.update(loop.dispatch.stats.num_moves)
        counts.update(
            reused=stats.num_reused_tokens,
            preemptions=stats.num_preemptions,
            host=stats.num_host_tokens,
            read_for_prompts=sum(
                plan.host_prefill is not None and plan.host_prefill.prefix is not None
                for plan in loop.plans
            ),
        )
    assert min(counts.values()) > 0
    assert len(counts) == 4 + len(Direction)
