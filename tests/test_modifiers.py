"""What modifies scores, from the host's entries to the device's scores, against float64."""

import re

import choices
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats  # comes with jax

from apex_jax import sampling
from apex_jax.buckets import entry_bucket
from apex_jax.modifiers import MASK, ModifierBatch, Modifiers, check_modifiers
from apex_jax.packing import (
    join_heads,
    pack_head,
    pack_logprobs,
    pack_modifiers,
    unpack_head,
    unpack_logprobs,
    unpack_modifiers,
)
from apex_jax.plan import HeadBatch, Sampled, join_sampled
from apex_jax.request import RequestError, SamplingParams, TokenLogprobs

VOCAB, ROWS, STOPS = 60, 6, frozenset({3, 59})
NEUTRAL = SamplingParams(max_tokens=100)
# Each modifier by itself, at both ends, and several that name the same tokens.
MODIFIED = (
    {"presence_penalty": 2.0},
    {"presence_penalty": -2.0},
    {"frequency_penalty": 0.7},
    {"frequency_penalty": -0.3},
    {"repetition_penalty": 1.4},
    {"repetition_penalty": 0.8},
    {"logit_bias": {0: 100.0, 7: -100.0, 59: 2.5}},
    {"min_tokens": 5},
    {"bad_words": ((4,), (59,))},
    {"bad_words": ((1, 2), (2, 2), (1, 1, 0), (0, 1, 2, 3), (1,) * 5)},
    {
        "presence_penalty": 0.5,
        "frequency_penalty": 0.25,
        "repetition_penalty": 1.1,
        "logit_bias": {1: 1.5, 3: 50.0, 4: -3.0},
        "bad_words": ((5,), (1, 0), (1, 1)),
        "min_tokens": 9,
    },
)


@jax.jit
def modify_on_device(logits_bv, last_tokens_b, arrays):
    return sampling.modify(logits_bv, last_tokens_b, *unpack_modifiers(arrays))


def modify(logits_bv, last_tokens, head):
    num_entries = entry_bucket(0 if head.modifiers is None else len(head.modifiers.entries_e))
    arrays = pack_modifiers(head, rows=len(logits_bv), num_entries=num_entries)
    return np.asarray(modify_on_device(logits_bv, np.array(last_tokens, np.int32), arrays))


def draw_text(rng):
    """A prompt and an output of few different tokens, so that they meet those that are named."""
    prompt = rng.integers(0, VOCAB, rng.integers(1, 6)).tolist()
    return prompt, rng.integers(0, 5, rng.integers(0, 12)).tolist()


def changes_of(params, prompt, output, num_unread):
    modifiers = Modifiers.of(params, prompt, STOPS)
    if modifiers is None:
        return None
    for token in output[: len(output) - num_unread]:
        modifiers.append(token)
    return modifiers.changes(num_unread)


@pytest.mark.parametrize("fields", MODIFIED, ids=lambda fields: "+".join(fields))
def test_scores_are_those_of_float64(fields):
    """In every row, at every length, whether the last token has been read or lies on the device."""
    params = SamplingParams(max_tokens=100, **fields)
    rng = np.random.default_rng(1)
    num_changed = 0
    for _ in range(60):
        logits_bv = rng.normal(size=(ROWS, VOCAB)).astype(np.float32) * 4
        texts = [draw_text(rng) for _ in range(ROWS)]
        is_modified = rng.random(ROWS) < 0.7
        rows = rng.permutation(ROWS)[: rng.integers(1, ROWS + 1)].tolist()
        last_tokens, changes = rng.integers(0, VOCAB, ROWS), []
        for row in rows:
            prompt, output = texts[row]
            num_unread = int(rng.integers(0, 2)) if output else 0
            if num_unread:
                last_tokens[row] = output[-1]
            row_params = params if is_modified[row] else NEUTRAL
            changes.append(changes_of(row_params, prompt, output, num_unread))
        sampled = [NEUTRAL] * len(rows)
        got_bv = modify(logits_bv, last_tokens, HeadBatch.of(rows, rows, rows, sampled, changes))
        for row in range(ROWS):
            if row not in rows or not is_modified[row]:
                assert np.array_equal(got_bv[row], logits_bv[row])  # to the last bit
                continue
            right_v = choices.modified(params, sorted(STOPS), *texts[row], logits_bv[row])
            np.testing.assert_allclose(got_bv[row], right_v, rtol=1e-5, atol=1e-5)
            num_changed += not np.array_equal(right_v, logits_bv[row])
    assert num_changed > 20


def test_what_changes_nothing_needs_no_modified_head():
    assert Modifiers.of(NEUTRAL, [1, 2], STOPS) is None
    assert Modifiers.of(SamplingParams(min_tokens=3), [1, 2], frozenset()) is None
    # No output to penalise, the minimum reached, the word not begun.
    assert changes_of(SamplingParams(presence_penalty=1.0), [1, 2], [], 0) is None
    assert changes_of(SamplingParams(min_tokens=2), [1], [7, 7], 0) is None
    assert changes_of(SamplingParams(min_tokens=2), [1], [7], 0) is not None
    assert changes_of(SamplingParams(bad_words=((1, 2, 3),)), [1, 2], [5, 1], 1) is None
    assert changes_of(SamplingParams(bad_words=((1, 2, 3),)), [1, 2], [1, 5], 1) is not None
    assert ModifierBatch.of([0, 1], [None, None]) is None


def test_only_the_newest_token_may_be_unread():
    modifiers = Modifiers.of(SamplingParams(presence_penalty=1.0), [1], STOPS)
    with pytest.raises(AssertionError, match="only the newest token is on the device"):
        modifiers.changes(2)


def test_a_bad_word_is_no_part_of_the_prompt():
    """Its beginning must stand in the output, as in vLLM."""
    params = SamplingParams(bad_words=((1, 2),))
    assert changes_of(params, [5, 1], [], 0) is None
    entry = changes_of(params, [5], [1], 0).entries_e
    assert (entry["token_id"], entry["bias"]) == (2, MASK)


def test_many_tokens_have_their_entries():
    """More than there was room for at first."""
    prompt = list(range(5000))
    params = SamplingParams(max_tokens=100, repetition_penalty=2.0)
    entries_e = changes_of(params, prompt, [7, 7, 8], 1).entries_e
    assert entries_e["token_id"].tolist() == prompt
    assert np.flatnonzero(entries_e["count"]).tolist() == [7]
    assert (entries_e["is_seen"] == 1).all()
    assert [entry_bucket(count) for count in (0, 256, 257, 5000)] == [256, 256, 1024, 16384]


def test_joint_heads_modify_what_each_would_alone():
    rng = np.random.default_rng(2)
    logits_bv = rng.normal(size=(ROWS, VOCAB)).astype(np.float32)
    last_tokens = rng.integers(0, 5, ROWS)
    alone_bv = logits_bv.copy()
    heads = []
    for first, rows in ((0, [1, 0]), (2, [0]), (3, [2, 0, 1])):
        changes, params = [], SamplingParams(**MODIFIED[-1], max_tokens=100, logprobs=first)
        for row in rows:
            prompt, output = draw_text(rng)
            changes.append(changes_of(params, prompt, [*output, last_tokens[first + row]], 1))
        if first == 2:
            changes, params = None, NEUTRAL
        head = HeadBatch.of(rows, rows, rows, [params] * len(rows), changes)
        own = slice(first, first + len(rows))
        padding = ROWS - len(rows)
        padded_bv = np.pad(logits_bv[own], ((0, padding), (0, 0)))
        padded_b = np.pad(last_tokens[own], (0, padding))
        alone_bv[own] = modify(padded_bv, padded_b, head)[: len(rows)]
        heads.append(head)
    joint, firsts, _ = join_heads(heads)
    assert firsts == (0, 2, 3)
    assert joint.wants_logprobs
    assert np.array_equal(modify(logits_bv, last_tokens, joint), alone_bv)
    plain, _, _ = join_heads([heads[1], heads[1]])
    assert plain.modifiers is None
    assert not plain.wants_logprobs


@pytest.mark.parametrize(
    ("fields", "cuts"),
    [
        ({"presence_penalty": 1.5, "frequency_penalty": -0.5}, {}),
        ({"repetition_penalty": 1.5}, {"temperature": 0.7}),
        ({"logit_bias": {2: 3.0, 9: -2.0}, "bad_words": ((0,), (1, 4))}, {"min_p": 0.05}),
        ({"min_tokens": 9, "frequency_penalty": 0.5}, {"top_k": 20, "top_p": 0.9}),
    ],
)
def test_draws_follow_the_modified_distribution(fields, cuts):
    """4,096 draws from one seed: the outcome is always the same, so it cannot flake."""
    count, prompt, output = 4096, [0, 9, 12], [1, 4, 4, 20, 1]
    params = SamplingParams(max_tokens=100, seed=5, **fields, **cuts)
    rng = np.random.default_rng(3)
    logits_v = rng.normal(size=VOCAB).astype(np.float32) * 1.5
    changes = changes_of(params, prompt, output, 1)
    every = range(count)
    head = HeadBatch.of(every, every, every, [params] * count, [changes] * count)
    scores_bv = modify(np.tile(logits_v, (count, 1)), [output[-1]] * count, head)
    _, rows = unpack_head(jnp.asarray(pack_head(head, rows=count)))
    tokens = np.asarray(jax.jit(sampling.sample)(scores_bv, rows))

    scores = choices.modified(params, sorted(STOPS), prompt, output, logits_v) / params.temperature
    order = np.argsort(-scores)
    kept = scores >= scores.max() + np.log(max(params.min_p, 1e-30))
    kept[order[params.top_k or VOCAB :]] = False
    mass = np.cumsum(np.exp(scores[order]) * kept[order])
    kept[order[np.searchsorted(mass, params.top_p * mass[-1]) + 1 :]] = False
    assert kept[tokens].all()
    expected = np.exp(scores) * kept
    expected *= count / expected.sum()
    is_frequent = expected >= 5
    observed = np.bincount(tokens, minlength=VOCAB)
    classes = [*expected[is_frequent], expected[~is_frequent].sum()]
    counts = [*observed[is_frequent], observed[~is_frequent].sum()]
    if classes[-1] < 5:
        classes, counts = classes[:-1], counts[:-1]
    statistic = ((np.array(counts) - classes) ** 2 / classes).sum()
    assert scipy.stats.chi2.sf(statistic, len(classes) - 1) > 1e-3


@pytest.mark.parametrize("vocab", [8, 300])
def test_logprobs_are_those_of_the_softmax(vocab):
    rng = np.random.default_rng(4)
    logits_bv = (rng.normal(size=(3, vocab)) * 5).astype(np.float32)
    tokens_b = rng.integers(0, vocab, 3).astype(np.int32)
    packed_bi = jax.jit(lambda *args: pack_logprobs(sampling.logprobs(*args)))(logits_bv, tokens_b)
    exact_bv = logits_bv.astype(np.float64)
    exact_bv -= np.log(np.exp(exact_bv).sum(-1, keepdims=True))
    for row, (chosen, ids_i, best_i) in enumerate(unpack_logprobs(np.asarray(packed_bi))):
        assert chosen == pytest.approx(exact_bv[row, tokens_b[row]], abs=1e-5)
        assert ids_i.tolist() == np.argsort(-exact_bv[row])[:20].tolist()
        np.testing.assert_allclose(best_i, exact_bv[row, ids_i], atol=1e-5)


def test_heads_with_and_without_logprobs_are_read_together():
    row = TokenLogprobs(-1.0, np.zeros(1, np.int32), np.zeros(1, np.float32))
    one, two = np.array([1, 2], np.int32), np.array([3], np.int32)
    joined = join_sampled([Sampled(one), Sampled(two, (row,))])
    assert joined.tokens_b.tolist() == [1, 2, 3]
    assert joined.logprobs == (None, None, row)
    assert join_sampled([Sampled(one), Sampled(two)]).logprobs == ()
    assert join_sampled([]).tokens_b.tolist() == []


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"logit_bias": {VOCAB: 1.0}}, "logit_bias has token id 60, which is outside the vocab"),
        ({"bad_words": ((1, VOCAB),)}, "bad_words has token id 60, which is outside the vocab"),
        ({"bad_words": ("no",)}, "bad_words has the text 'no'; the engine takes token ids"),
        (
            {"bad_words": tuple((one,) for one in range(VOCAB) if one != 3), "min_tokens": 1},
            "bad_words and min_tokens leave no token to choose",
        ),
    ],
)
def test_what_no_engine_can_do_is_refused(fields, message):
    with pytest.raises(RequestError, match=re.escape(message)):
        check_modifiers(SamplingParams(**fields), STOPS, VOCAB)
    check_modifiers(SamplingParams(**{**fields, "bad_words": (), "logit_bias": {}}), STOPS, VOCAB)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"min_p": float("nan")}, "min_p is nan; it must be between 0 and 1"),
        ({"presence_penalty": 2.1}, "presence_penalty is 2.1; it must be between -2 and 2"),
        ({"frequency_penalty": float("inf")}, "frequency_penalty is inf; it must be between -2"),
        ({"repetition_penalty": 0.0}, "repetition_penalty is 0.0; it must be between 0.01 and 100"),
        ({"min_tokens": 20}, "min_tokens is 20; it must be between 0 and max_tokens, which is 16"),
        ({"logprobs": -1}, "logprobs is -1; it must be between 0 and 20"),
        ({"logit_bias": {-1: 0.0}}, "logit_bias is for -1; it must be for token ids"),
        ({"logit_bias": {4: -101.0}}, "logit_bias[4] is -101.0; it must be between -100 and 100"),
        ({"bad_words": ((1, -1),)}, "bad_words[0] is (1, -1); it must be text or token ids"),
        ({"stop": ("",)}, "stop is ('',); it must be a tuple of strings that are not empty"),
        ({"bad_words": ((1,),) * 1025}, "bad_words is a list of 1025; it must be one of at most"),
    ],
)
def test_ranges_are_checked_by_name(fields, message):
    with pytest.raises(RequestError, match=re.escape(message)):
        SamplingParams(**fields)
