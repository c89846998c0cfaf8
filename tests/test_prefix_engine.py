"""Prefix reuse on real programs: tokens are those of requests that compute their own prompts."""

import functools
import random

import choices
import jax
import numpy as np
import pytest
import reference
from small_engines import MODELS, SEED, hybrid_engine, run, with_limits

from apex_jax.batch.flow import RequestFlow
from apex_jax.models import weights
from apex_jax.policies import Merging
from apex_jax.request import Request, SamplingParams
from apex_jax.text.model_text import ModelText

pytestmark = pytest.mark.usefixtures("without_annotations_checked")
NAME = "gqa"
NUM_SHARED = 24  # three pages


@functools.cache
def draw_requests():
    """Two families of prompts, half greedy and half sampled; the longest fills six pages."""
    rng = random.Random(7)
    draw = lambda count: [rng.randrange(MODELS[NAME].vocab_size) for _ in range(count)]  # noqa: E731
    families = [draw(NUM_SHARED), draw(NUM_SHARED - 3)]
    requests = []
    for index in range(20):
        prompt = families[index % 2] + draw(rng.choice((0, 1, 5, 9)))
        params = SamplingParams(
            max_tokens=rng.randint(2, 14),
            temperature=0.0 if index % 4 < 2 else 1.0,
            seed=rng.randrange(2**63),
            ignore_eos=True,
        )
        requests.append(Request(str(index), tuple(prompt), params))
    return requests


@functools.cache
def reference_tensors():
    [cpu, _] = jax.devices("cpu")
    return reference.unfuse(
        MODELS[NAME], weights.dummy(MODELS[NAME], np.dtype("float32"), cpu, SEED)
    )


@functools.cache
def right_choices():
    requests = draw_requests()
    engine = with_limits(hybrid_engine(NAME))
    tokens = run(engine, requests)
    assert engine._scheduler.stats.num_reused_tokens == 0
    right = choices.choices_along(MODELS[NAME], reference_tensors(), requests, tokens)
    right.assert_are(tokens)
    return right


WAYS = {
    "device": {},
    "preempted": {"num_pages": 9},
    "evicted": {"num_pages": 12, "max_requests": 1},
    "both_lanes": {"num_pages": 9, "max_host_requests": 8, "policy": Merging(max_cohorts=2)},
    "host": {
        "max_host_requests": 4,
        "num_host_pages": 40,
        "policy": Merging(max_cohorts=2, uses_device_lane=False),
    },
}


@pytest.mark.parametrize("way", WAYS)
def test_tokens_do_not_depend_on_who_computed_a_prefix(way):
    engine = with_limits(hybrid_engine(NAME), reuses_prefixes=True, **WAYS[way])
    tokens = run(engine, draw_requests())
    stats = engine._scheduler.stats
    if way == "preempted":
        assert stats.num_preemptions > 0
    right_choices().assert_are(tokens)
    found = engine.metrics()["prefix_reuse"]
    assert found["reused_tokens"] > 0
    assert found["hit_rate"] == found["reused_tokens"] / found["admitted_tokens"]
    computed = stats.num_prefilled_tokens + stats.num_host_prefilled_tokens
    assert computed == found["admitted_tokens"] - found["reused_tokens"]


@pytest.mark.parametrize("reuses_prefixes", [True, False])
def test_several_outputs_are_those_of_requests_with_their_seeds(reuses_prefixes):
    prompt = draw_requests()[0].prompt_token_ids[:NUM_SHARED]
    sampling = SamplingParams(max_tokens=6, seed=3, n=5, ignore_eos=True)
    engine = with_limits(hybrid_engine(NAME), reuses_prefixes=reuses_prefixes)
    flow = RequestFlow(engine, ModelText(None, None), 4)
    flow.submit("a", prompt, sampling, "tag")
    finished = []
    while flow.num_in_flight:
        finished += flow.step()
    ((tag, outputs),) = [(one.tag, [choice.output for choice in one.choices]) for one in finished]
    assert tag == "tag"
    assert len({output.request.sampling.seed for output in outputs}) == 5
    assert outputs[0].request.sampling.seed == 3
    requests = [output.request for output in outputs]
    tokens = [list(output.token_ids) for output in outputs]
    choices.assert_reference_chooses(MODELS[NAME], reference_tensors(), requests, tokens)
    num_prefilled = engine._scheduler.stats.num_prefilled_tokens
    num_again = 8 if reuses_prefixes else NUM_SHARED
    assert num_prefilled == NUM_SHARED + 4 * num_again
    assert ("prefix_reuse" in engine.metrics()) == reuses_prefixes
