"""Both lanes on real programs: whatever the schedule, the tokens are those of the device alone.

A few hundred cases are drawn over strategies, limits, arrivals and delays of the host; each runs on
one of two engines (small_engines.py). What the cases met on their way is counted, so that a sweep
which no longer meets it fails. Rounding is dealt with by near_tie.py.
"""

import dataclasses
import functools
import random
import time
from collections import Counter, deque

import choices
import jax
import numpy as np
import pytest
import reference
from small_engines import (
    MAX_REQUESTS,
    MODELS,
    SEED,
    compilations,
    hybrid_engine,
    run,
    with_limits,
)

from apex_jax.adaptive import MAX_COHORTS, Adaptive
from apex_jax.cost_model import StageTimes
from apex_jax.models import weights
from apex_jax.pipelining import AsymmetricPipelining
from apex_jax.plan import Direction
from apex_jax.policies import DeviceOnly, Merging, Policy
from apex_jax.prediction import Choice
from apex_jax.request import Request, SamplingParams

pytestmark = pytest.mark.usefixtures("without_annotations_checked")
NUM_CASES = 210
FIRST_SWITCHING, NUM_SWITCHING = 10_000, 30  # cases whose schedule changes on its way
NUM_REQUESTS = 5
NUM_REQUEST_SETS = 3
STRATEGIES = (
    "device_only",
    "full_offload",
    "async_overlap",
    "staggered",
    "passes",
    "asymmetric_pipelining",
)
CHUNKS = {
    "gqa": (((1, 16), (1, 4), (4, 4)), ((1, 16),), ((1, 4), (4, 4))),
    "mha": (((1, 16), (1, 4)), ((1, 4),)),
}


@dataclasses.dataclass(frozen=True)
class Case:
    """A schedule of one of the request sets.

    order: in which its requests come; num_first: how many before the first step, the others at
    arrival_rate a step. max_delay_sec: of a host job.
    """

    strategy: str
    model: str
    request_set: int
    policy: Policy
    num_pages: int
    num_host_pages: int
    max_requests: int
    max_host_requests: int
    chunks: tuple[tuple[int, int], ...]
    order: tuple[int, ...]
    num_first: int
    arrival_rate: float
    max_delay_sec: float


def draw_case(index: int) -> Case:
    rng = random.Random(index)
    strategy = STRATEGIES[index % len(STRATEGIES)]
    if index >= FIRST_SWITCHING:
        strategy = "switching"
    model = rng.choice(list(MODELS))
    max_requests, max_host_requests = MAX_REQUESTS[model]
    request_set = rng.randrange(NUM_REQUEST_SETS)
    requests = draw_requests(model, request_set)
    longest = max(map(num_pages_of, requests))
    # One of the pools at least must hold each request; mostly that is the host's.
    num_pages, num_host_pages = rng.randint(2, longest + 3), rng.randint(longest, 4 * longest)
    if strategy == "device_only" or (strategy != "full_offload" and rng.random() < 0.3):
        num_pages, num_host_pages = rng.randint(longest, 2 * longest), rng.randint(2, 2 * longest)
    return Case(
        strategy=strategy,
        model=model,
        request_set=request_set,
        policy=draw_policy(rng, strategy, MODELS[model].num_layers),
        num_pages=num_pages,
        num_host_pages=num_host_pages,
        max_requests=rng.randint(1, max_requests),
        max_host_requests=rng.randint(1, max_host_requests),
        chunks=rng.choice(CHUNKS[model]),
        order=tuple(rng.sample(range(len(requests)), len(requests))),
        num_first=rng.choice((1, len(requests))),
        arrival_rate=rng.choice((0.1, 0.5, 2.0)),
        max_delay_sec=rng.choice((0.0, 0.001, 0.006)),
    )


class Switching(Adaptive):
    """Takes another schedule every few sweeps, whatever that yields."""

    def __init__(self, rng: random.Random, num_layers: int):
        super().__init__(StageTimes(num_layers=num_layers, linear_sec=1.0), 1)
        self._rng, self._num_layers = rng, num_layers
        self.device_prompts_first = rng.random() < 0.5

    def consider(self, load):
        rng = self._rng
        self.drops_tokens = rng.random() < 0.1
        if rng.random() < 0.7:
            return
        self.keeps_host_rows = rng.random() < 0.3
        self.max_host_rows = rng.choice((None, 0, 2))
        name = rng.choice(("device_only", "merging", "merging", "pipelining", "pipelining_all"))
        passes = rng.choice((None, *range(1, self._num_layers + 1)))
        self._use(Choice(name, rng.randint(1, MAX_COHORTS), passes, rng.randint(1, 4)))
        if load.num_homing and not load.num_homeless and rng.random() < 0.5:
            self._policy = self._homing


def draw_policy(rng: random.Random, strategy: str, num_layers: int) -> Policy:
    match strategy:
        case "device_only":
            return DeviceOnly()
        case "full_offload":
            return Merging(max_cohorts=2, uses_device_lane=False)
        case "async_overlap":
            return Merging(max_cohorts=1)
        case "staggered":
            return Merging(max_cohorts=rng.randint(2, 4), is_spread=True)
        case "passes":
            return Merging(max_cohorts=rng.randint(1, 3), passes=rng.randint(2, num_layers))
        case "switching":
            return Switching(random.Random(rng.random()), num_layers)
        case _:
            return AsymmetricPipelining(
                StageTimes(
                    num_layers=num_layers,
                    linear_sec=1.0,
                    device_attention_sec=rng.uniform(0.5, 5.0),
                    host_attention_sec_per_token=rng.choice((0.001, 0.03)),
                )
            )


@functools.cache
def draw_requests(model: str, request_set: int) -> tuple[Request, ...]:
    """Half greedy, half sampled; the longest fills six pages."""
    rng = random.Random(1000 + request_set)
    requests = []
    for index in range(NUM_REQUESTS):
        prompt = [
            rng.randrange(MODELS[model].vocab_size) for _ in range(rng.choice((3, 4, 12, 30)))
        ]
        params = SamplingParams(
            max_tokens=rng.randint(1, 18),
            temperature=rng.uniform(0.5, 1.5) if index % 2 else 0.0,
            top_k=rng.choice((0, 5, 50)),
            top_p=rng.choice((1.0, 0.8)),
            seed=rng.randrange(2**63),
            ignore_eos=True,
        )
        requests.append(Request(str(index), tuple(prompt), params))
    return tuple(requests)


def num_pages_of(request: Request) -> int:
    return -(-(len(request.prompt_token_ids) + request.sampling.max_tokens) // 8)


@functools.cache
def right_choices(name: str, request_set: int) -> choices.Choices:
    """What the device alone chooses with all the memory it wants, by the margins of float64."""
    requests = list(draw_requests(name, request_set))
    tokens = run(with_limits(hybrid_engine(name)), requests)
    model = MODELS[name]
    [cpu, _] = jax.devices("cpu")
    tensors = reference.unfuse(model, weights.dummy(model, np.dtype("float32"), cpu, SEED))
    right = choices.choices_along(model, tensors, requests, tokens)
    right.assert_are(tokens)
    return right


@functools.cache
def play(index: int) -> tuple[list[list[int]], Counter[str]]:
    """Run a case; return the tokens of its request set, and what was met on the way."""
    case, rng = draw_case(index), random.Random(index)

    def before_job(job: object) -> None:
        if case.max_delay_sec:
            time.sleep(rng.uniform(0, case.max_delay_sec))

    engine = with_limits(
        hybrid_engine(case.model),
        policy=case.policy,
        num_pages=case.num_pages,
        num_host_pages=case.num_host_pages,
        max_requests=case.max_requests,
        max_host_requests=case.max_host_requests,
        change_shapes=lambda shapes: dataclasses.replace(shapes, chunks=case.chunks),
        before_job=before_job,
    )
    met: Counter[str] = Counter()
    plan_sweep = engine._scheduler.plan_sweep

    def watched_plan_sweep() -> object:
        plan = plan_sweep()
        if plan is not None:
            met["dropped cohorts"] += len(plan.dropped_cohorts)
        if plan is not None and (part := plan.host_prefill) is not None:
            met["prompts of several chunks"] += len(part.chunks) > 1
            met["prompts together"] += len(part.chunks[0].lengths_b) > 1
            met["prompts over several sweeps"] += part.first_unit > 0
        return plan

    engine._scheduler.plan_sweep = watched_plan_sweep
    requests = draw_requests(case.model, case.request_set)
    to_come = deque(requests[place] for place in case.order)
    for _ in range(case.num_first):
        engine.submit(to_come.popleft())
    tokens: dict[str, list[int]] = {}
    while to_come or engine.num_unfinished:
        arrived, due = 0, case.arrival_rate
        while to_come and (not engine.num_unfinished or rng.random() < due - arrived):
            engine.submit(to_come.popleft())
            arrived += 1
        for output in engine.step():
            tokens[output.request.request_id] = list(output.token_ids)
    assert_nothing_is_left(engine)
    dispatched, planned = engine._dispatch.stats, engine._scheduler.stats
    met["merges"] = dispatched.num_merges
    met["extra passes"] = dispatched.num_extra_passes
    met["joint heads"] = dispatched.num_joint_heads
    met["head passes"] = dispatched.num_head_passes
    met["late cohorts"] = dispatched.num_late
    met["promotions"] = dispatched.num_moves[Direction.PROMOTION]
    met["demotions"] = dispatched.num_moves[Direction.DEMOTION]
    met["pre-emptions"] = planned.num_preemptions
    met["host tokens"] = planned.num_host_tokens
    met["device tokens"] = planned.num_output_tokens - planned.num_host_tokens
    return [tokens[request.request_id] for request in requests], met


def assert_nothing_is_left(engine: object) -> None:
    """The engine has checked its ledger when the last request ended; here it must be empty."""
    scheduler, dispatch = engine._scheduler, engine._dispatch
    assert [room.num_used for room in scheduler._residency.rooms] == [0] * len(
        scheduler._residency.rooms
    )
    assert len(scheduler._residency._free_slots) == scheduler.num_slots
    assert not dispatch._cohorts
    assert not len(dispatch._traffic)


@pytest.mark.parametrize(
    "index", [*range(NUM_CASES), *range(FIRST_SWITCHING, FIRST_SWITCHING + NUM_SWITCHING)]
)
def test_every_schedule_gives_the_tokens_of_the_device_alone(index):
    case = draw_case(index)
    right = right_choices(case.model, case.request_set)
    tokens, _ = play(index)
    try:
        right.assert_are(tokens)
    except AssertionError as error:
        raise AssertionError(f"{case}: {error}") from None


HOST_PROMPTS = ("host tokens", "prompts of several chunks", "prompts over several sweeps")
BOTH_LANES = (*HOST_PROMPTS, "device tokens", "merges", "joint heads", "head passes", "promotions")
MUST_MEET = {
    "device_only": ("device tokens", "pre-emptions"),
    "full_offload": (*HOST_PROMPTS, "extra passes", "head passes"),
    "async_overlap": (*BOTH_LANES, "late cohorts"),
    "staggered": (*BOTH_LANES, "late cohorts"),
    "passes": (*BOTH_LANES, "late cohorts", "extra passes"),
    "asymmetric_pipelining": (*BOTH_LANES, "extra passes"),
}


def test_the_schedules_have_met_what_they_are_drawn_for():
    met: dict[str, Counter[str]] = {strategy: Counter() for strategy in STRATEGIES}
    for index in range(NUM_CASES):
        met[draw_case(index).strategy].update(play(index)[1])
    for strategy, events in MUST_MEET.items():
        assert {event for event in events if not met[strategy][event]} == set(), strategy
    hybrid = sum((met[strategy] for strategy in STRATEGIES[1:]), Counter())
    rare = ("demotions", "pre-emptions", "prompts together")
    assert {event for event in rare if not hybrid[event]} == set(), hybrid
    switching = range(FIRST_SWITCHING, FIRST_SWITCHING + NUM_SWITCHING)
    assert sum(play(index)[1]["dropped cohorts"] for index in switching)


def test_nothing_compiles_once_the_engine_is_there():
    for index in range(NUM_CASES, NUM_CASES + len(STRATEGIES)):
        play(index)  # the pools of a new lane, and what the test's own hands take
    with compilations() as compiled:
        for index in range(NUM_CASES + 100, NUM_CASES + 100 + 2 * len(STRATEGIES)):
            play(index)
    assert compiled == []


def test_both_pools_stay_where_they_are():
    """Whatever rewrites a pool instead of updating it leaves it at another address."""
    engine = with_limits(
        hybrid_engine("gqa"),
        policy=Merging(max_cohorts=2, passes=2),
        num_pages=4,
        max_host_requests=8,
    )

    def addresses():
        backend, lane = engine._dispatch._backend, engine._workers.host_lane
        arrays = jax.tree.leaves((backend._pages, backend._staging, lane._pools))
        return [array.unsafe_buffer_pointer() for array in arrays]

    before = addresses()
    run(engine, list(draw_requests("gqa", 0)))
    assert engine._scheduler.stats.num_host_tokens > 0
    assert engine._dispatch.stats.num_moves[Direction.PROMOTION] > 0
    assert addresses() == before
