"""Penalties, biases, masks and logprobs on whole engines: the same tokens wherever they are made.

Requests of every modifier, and some of none, run with the device alone, pre-empted, and through
cohorts and moves between the lanes; each must choose what float64 chooses of modified scores.
"""

import dataclasses
import functools

import choices
import jax
import numpy as np
import pytest
import reference
from small_engines import MODELS, SEED, WARM_UP_LINES, compilations, hybrid_engine, with_limits

from apex_jax.lowering import ProgramKey
from apex_jax.models import weights
from apex_jax.plan import Direction
from apex_jax.policies import Merging
from apex_jax.request import Request, RequestError, SamplingParams, TokenLogprobs
from apex_jax.sequence import Sequence

pytestmark = pytest.mark.usefixtures("without_annotations_checked")
NAME = "mha"
MODEL = MODELS[NAME]
STOPS = tuple(range(0, 120, 3))  # so many that an output is soon over where it may be
MODIFIED = (
    {},
    {"presence_penalty": 1.0, "frequency_penalty": 0.5, "logprobs": 0},
    {"repetition_penalty": 1.3},
    {"logit_bias": {5: 2.0, 9: -100.0}, "logprobs": 4},
    {"bad_words": ((17,), (3, 3), (44, 8))},
    {"min_tokens": 9, "stop_token_ids": STOPS},
    {"min_p": 0.2, "logprobs": 20},
    {"presence_penalty": -1.5, "repetition_penalty": 1.1, "min_tokens": 5, "logit_bias": {7: 1.0}},
    {"prompt_logprobs": 0},
    {"prompt_logprobs": 3, "logprobs": 3, "frequency_penalty": 0.2},
)


@functools.cache
def tensors():
    [cpu, _] = jax.devices("cpu")
    return reference.unfuse(MODEL, weights.dummy(MODEL, np.dtype("float32"), cpu, SEED))


@functools.cache
def draw_requests():
    """Each modifier greedily and by sampling; the longest of them fill six pages."""
    rng = np.random.default_rng(21)
    return [
        Request(
            f"{index}",
            tuple(rng.integers(0, MODEL.vocab_size, rng.integers(2, 30)).tolist()),
            SamplingParams(
                **{"max_tokens": 18, "ignore_eos": True, **fields},
                temperature=0.8 * (index % 2),
                seed=index,
            ),
        )
        for index, fields in enumerate(fields for fields in MODIFIED for _ in range(2))
    ]


def run(engine, requests):
    for request in requests:
        engine.submit(request)
    outputs = {}
    while engine.num_unfinished:
        outputs |= {output.request.request_id: output for output in engine.step()}
    return [outputs[request.request_id] for request in requests]


# How the same requests may be run: the limits, and what must be met on the way.
WAYS = {
    "device": {},
    "preempted": {"num_pages": 7},
    "both_lanes": {
        "policy": Merging(max_cohorts=2, is_spread=True),
        "num_pages": 7,
        "max_host_requests": 4,
    },
    "host": {"policy": Merging(max_cohorts=2, uses_device_lane=False), "max_host_requests": 4},
}


@pytest.mark.parametrize("way", WAYS)
def test_tokens_are_what_float64_chooses(way):
    engine = with_limits(hybrid_engine(NAME), **WAYS[way])
    requests = draw_requests()
    outputs = run(engine, requests)
    stats, dispatched = engine._scheduler.stats, engine._dispatch.stats
    assert way != "preempted" or stats.num_preemptions > 0
    if way == "both_lanes":
        assert dispatched.num_joint_heads > 0
        assert {direction for direction, count in dispatched.num_moves.items() if count} == {
            Direction.PROMOTION,
            Direction.DEMOTION,
        }
    texts = [list(output.token_ids) for output in outputs]
    choices.assert_reference_chooses(MODEL, tensors(), requests, texts)
    for output in outputs:
        assert_logprobs_are_the_models(output)
    assert {len(text) < 18 for text in texts} == {True, False}


def assert_logprobs_are_the_models(output):
    """Those of the model itself, whatever modified the scores; of the prompt's tokens as well."""
    prompt, params = list(output.request.prompt_token_ids), output.request.sampling
    logits_tv = reference.logits(MODEL, tensors(), [*prompt, *output.token_ids[:-1]])
    exact_tv = logits_tv - np.log(np.exp(logits_tv).sum(-1, keepdims=True))
    num_first = len(prompt) - 1
    for num_best, tokens, exact, found in (
        (params.logprobs, output.token_ids, exact_tv[num_first:], output.logprobs),
        (params.prompt_logprobs, prompt[1:], exact_tv[:num_first], output.prompt_logprobs),
    ):
        if num_best is None:
            assert found is None
            continue
        assert len(found) == len(tokens)
        for exact_v, token, got in zip(exact, tokens, found, strict=True):
            assert got.logprob == pytest.approx(exact_v[token], abs=1e-4)
            assert got.top_ids_i.shape == got.top_logprobs_i.shape == (num_best,)
            np.testing.assert_allclose(got.top_logprobs_i, exact_v[got.top_ids_i], atol=1e-4)
            best = np.sort(exact_v)[::-1][:num_best]
            np.testing.assert_allclose(got.top_logprobs_i, best, atol=1e-4)


def test_requests_without_modifiers_do_not_notice_their_neighbours():
    requests = draw_requests()
    plain = [
        dataclasses.replace(
            request, sampling=SamplingParams(temperature=request.sampling.temperature)
        )
        for request in requests[:2]
    ]
    alone = run(with_limits(hybrid_engine(NAME)), plain)
    for neighbour in requests[2:8:2]:
        [first, _] = run(with_limits(hybrid_engine(NAME)), [plain[0], neighbour])
        assert first.token_ids == alone[0].token_ids
        [_, second] = run(with_limits(hybrid_engine(NAME)), [neighbour, plain[1]])
        assert second.token_ids == alone[1].token_ids


def test_a_head_is_compiled_when_it_is_first_needed():
    engine = hybrid_engine(NAME)
    run(with_limits(engine), draw_requests()[2:4])
    late = [key for key in engine.programs.compile_sec if key.stage == "head_logprobs"]
    assert late
    for key in late:
        assert f"compiled {key}, which no request before needed" in WARM_UP_LINES
    assert engine.metrics()["num_executables"] == len(engine.programs.compile_sec)
    with compilations() as compiled:
        run(with_limits(engine), draw_requests()[2:4])
    assert compiled == []


def test_late_heads_need_hardly_more_room_than_those_that_were_planned():
    """By the entries, and by the scores as they were: nothing of entries times vocabulary."""
    engine = hybrid_engine(NAME)
    run(with_limits(engine), draw_requests()[2:6])
    executables = engine.programs._executables
    room = {key: one.memory_analysis().temp_size_in_bytes for key, one in executables.items()}
    late = [key for key in room if key.stage in ("head_logprobs", "head_modified")]
    assert {key.stage for key in late} == {"head_logprobs", "head_modified"}
    for key in late:
        rows, num_entries = key.shape
        planned = room[ProgramKey("head_sample", (rows,))]
        assert room[key] <= planned + 2 * 4 * rows * MODEL.vocab_size + 64 * num_entries


def test_what_names_no_token_is_refused():
    params = SamplingParams(logit_bias={MODEL.vocab_size: 1.0})
    engine = with_limits(hybrid_engine(NAME))
    with pytest.raises(RequestError, match="logit_bias has token id 120, which is outside"):
        engine.submit(Request("a", (1,), params))
    assert engine.num_unfinished == 0


def test_logprobs_of_a_prompt_that_begins_again_are_taken_once():
    """Driven out in the midst of its prompt, a request comes back and prefills from the start."""
    found = [TokenLogprobs(-float(i), np.zeros(3, "i4"), np.zeros(3, "f4")) for i in range(5)]
    request = Request("a", (9,) * 6, SamplingParams(prompt_logprobs=2))
    sequence = Sequence(0, request, frozenset(), 0.0, [9] * 6)
    for start, end in ((0, 2), (2, 3), (0, 2), (2, 5)):
        assert sequence.wants_prompt
        sequence.take_prompt(start, found[start:end])
    assert not sequence.wants_prompt
    assert [one.logprob for one in sequence.prompt_logprobs] == [0.0, -1.0, -2.0, -3.0, -4.0]
    assert {one.top_ids_i.shape for one in sequence.prompt_logprobs} == {(2,)}
    lone = Request("b", (9,), request.sampling)
    assert not Sequence(0, lone, frozenset(), 0.0, [9]).wants_prompt
