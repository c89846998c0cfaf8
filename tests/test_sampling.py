"""Sampling against a float64 reference, token by token, and the statistics of its noise."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats  # comes with jax

from apex_jax import sampling
from apex_jax.packing import pack_head, unpack_head
from apex_jax.plan import HeadBatch
from apex_jax.request import SamplingParams
from apex_jax.sampling import NUM_CANDIDATES, SamplingRows

# float32 rounding: of a score with its noise (magnitudes up to 64), and of a mass of 32k terms.
SCORE_TIE = 2e-5
MASS_TIE = 1e-5

sample = jax.jit(sampling.sample)
noise_of = jax.jit(sampling.token_noise)


def rows_of(cuts, seeds=None, sample_indices=None, positions=None):
    """One row per (temperature, top_k, top_p) and perhaps min_p; seeds are (high, low)."""
    count = len(cuts)
    if seeds is None:
        seeds = [(7, row) for row in range(count)]
    temperatures, top_ks, top_ps, min_ps = zip(*((*cut, 0.0)[:4] for cut in cuts), strict=True)
    return SamplingRows(
        temperatures_b=np.array(temperatures, np.float32),
        top_ks_b=np.array(top_ks, np.int32),
        top_ps_b=np.array(top_ps, np.float32),
        min_ps_b=np.array(min_ps, np.float32),
        seeds_b2=np.array(seeds, np.uint32),
        sample_indices_b=np.array([0] * count if sample_indices is None else sample_indices, "i4"),
        positions_b=np.array([1] * count if positions is None else positions, np.int32),
    )


def take(rows, index):
    """Rows by place, in a new order."""
    return SamplingRows(*(np.asarray(field)[index] for field in rows))


def noise_over(rows, vocab):
    ids = np.broadcast_to(np.arange(vocab, dtype=np.int32), (len(rows.positions_b), vocab))
    return np.asarray(noise_of(rows, ids))


def kept_by(scores, top_k, top_p, min_p=0.0):
    """Mask of what min-p, top-k, then top-p leave of a row; what equals the last kept is kept."""
    kept = np.isfinite(scores)
    if min_p > 0:
        kept &= scores >= scores.max() + np.log(min_p)
    if 0 < top_k < len(scores):
        kept &= scores >= np.sort(scores)[-top_k]
    if top_p < 1:
        order = np.argsort(-np.where(kept, scores, -np.inf), kind="stable")
        mass = np.cumsum(np.exp(scores[order] - scores.max()) * kept[order])
        last = np.searchsorted(mass, top_p * mass[-1])
        kept &= scores >= scores[order[min(last, len(scores) - 1)]]
    return kept


def reference(logits, noise, temperature, top_k, top_p, min_p=0.0):
    """Every token that exact arithmetic might draw within the rounding of float32."""
    logits = logits.astype(np.float64)
    if temperature == 0:
        return {int(logits.argmax())}
    scores = logits / np.float64(np.float32(temperature))
    tokens = set()
    top_ps = (top_p - MASS_TIE, top_p, top_p + MASS_TIE) if top_p < 1 else (top_p,)
    for p, share in itertools.product(top_ps, (1 - SCORE_TIE, 1, 1 + SCORE_TIE) if min_p else (1,)):
        kept = kept_by(scores, top_k, max(p, 1e-12), min(min_p * share, 1))
        noisy = np.where(kept, scores + noise, -np.inf)
        tokens |= set(np.flatnonzero(noisy >= noisy.max() - SCORE_TIE).tolist())
    return tokens


def cuts_for(vocab):
    """(temperature, top_k, top_p) of every way through `sample`, and of the borders between."""
    return [
        (0.0, 0, 1.0),
        (0.0, 5, 0.5),  # greedy, whatever the cuts
        (1.0, 0, 1.0),  # uncut
        (0.3, 0, 1.0),
        (1.0, 1, 1.0),
        (0.7, 5, 1.0),
        (1.0, NUM_CANDIDATES - 1, 1.0),
        (1.0, NUM_CANDIDATES, 1.0),
        (1.0, NUM_CANDIDATES + 1, 1.0),
        (1.0, vocab - 1, 1.0),
        (1.0, vocab, 1.0),
        (1.3, 2**31 - 1, 1.0),
        (0.25, 0, 0.5),  # a nucleus within the candidates, where the scores are spread
        (1.0, 0, 0.05),
        (1.0, 0, 0.9),  # and beyond
        (1.0, 0, 0.999),
        (1.0, 20, 0.8),
        (1.0, 20, 0.9999),
        (1.0, 90, 0.95),
        (1.0, 90, 1e-6),
        (1.0, 0, 1e-6),
        (100.0, 0, 0.7),
        (0.01, 0, 0.9),
        (0.01, 0, 1.0),
    ]


def draw_and_compare(logits, rows):
    """Return how many tokens each row may be drawn from, after comparing what is drawn."""
    vocab = logits.shape[1]
    tokens = np.asarray(sample(logits, rows)).tolist()
    noise = noise_over(rows, vocab)
    sizes = []
    for row, token in enumerate(tokens):
        cut = (
            rows.temperatures_b[row],
            int(rows.top_ks_b[row]),
            float(rows.top_ps_b[row]),
            float(rows.min_ps_b[row]),
        )
        assert token in reference(logits[row], noise[row], *cut), (cut, vocab, row)
        scores = logits[row].astype(np.float64) / max(cut[0], 1e-30)
        sizes.append(1 if cut[0] == 0 else int(kept_by(scores, *cut[1:]).sum()))
    return sizes


@pytest.mark.parametrize("vocab", [100, 4096, pytest.param(32000, marks=pytest.mark.other_python)])
def test_every_cut_in_one_batch(vocab):
    rng = np.random.default_rng(vocab)
    cuts = cuts_for(vocab) * 2
    sizes = []
    for position in range(1, 9 if vocab < 32000 else 5):
        spread = np.repeat([1.0, 5.0], len(cuts) // 2)[:, None]
        logits = (rng.normal(size=(len(cuts), vocab)) * spread).astype(np.float32)
        sizes += draw_and_compare(logits, rows_of(cuts, positions=[position] * len(cuts)))
    # The cases are what they are meant to be.
    assert {1, 5, NUM_CANDIDATES - 1, NUM_CANDIDATES, NUM_CANDIDATES + 1, vocab} <= set(sizes)
    assert any(5 < size < NUM_CANDIDATES - 1 for size in sizes)
    assert any(NUM_CANDIDATES + 1 < size < vocab - 1 for size in sizes)


@pytest.mark.parametrize("step", [0.25, 2.0, 1e9])
def test_what_equals_the_last_kept_is_kept(step):
    """Scores on a grid, as half precision gives them; on the last one every score is equal."""
    vocab = 4096
    rng = np.random.default_rng(4)
    cuts = cuts_for(vocab) * 2
    for position in range(1, 9):
        logits = rng.normal(size=(len(cuts), vocab)) * 3
        logits = (np.round(logits / step) * step).astype(np.float32)
        draw_and_compare(logits, rows_of(cuts, positions=[position] * len(cuts)))


def test_min_p_cuts_first():
    """Alone and before the others, within the candidates and beyond; 0 and 1 are its ends."""
    vocab = 4096
    rng = np.random.default_rng(12)
    others = [(0.0, 0, 1.0), (1.0, 0, 1.0), (0.6, 0, 0.9), (1.0, 5, 1.0), (1.0, 500, 0.95)]
    cuts = list(itertools.product(others, (0.0, 1e-6, 0.01, 0.05, 0.3, 1.0)))
    cuts = [(*cut, min_p) for cut, min_p in cuts] * 2
    cuts = cuts[: len(cuts_for(vocab)) * 2]  # the same program
    sizes = []
    for position in range(1, 9):
        spread = np.repeat([1.0, 3.0], len(cuts) // 2)[:, None]
        logits = (rng.normal(size=(len(cuts), vocab)) * spread).astype(np.float32)
        sizes += draw_and_compare(logits, rows_of(cuts, positions=[position] * len(cuts)))
    assert {1, 5, vocab} <= set(sizes)
    assert any(5 < size < NUM_CANDIDATES for size in sizes)
    assert any(NUM_CANDIDATES < size < vocab for size in sizes)


def test_masked_tokens_are_never_drawn():
    vocab = 4096
    rng = np.random.default_rng(5)
    cuts = cuts_for(vocab) * 2
    for num_left in (1, 3, 70):
        logits = np.full((len(cuts), vocab), -np.inf, np.float32)
        left = np.stack([rng.permutation(vocab)[:num_left] for _ in cuts])
        np.put_along_axis(logits, left, rng.normal(size=left.shape).astype(np.float32), axis=1)
        draw_and_compare(logits, rows_of(cuts))
        tokens = np.asarray(sample(logits, rows_of(cuts)))
        assert (tokens[:, None] == left).any(1).all()


def test_extreme_scores_and_parameters():
    vocab = 4096
    rng = np.random.default_rng(6)
    cuts = cuts_for(vocab) * 2
    for scale in (1e-7, 1e3, 3e38):  # all but uniform, all but certain, the ends of float32
        logits = (rng.uniform(-1, 1, size=(len(cuts), vocab)) * scale).astype(np.float32)
        for row in range(len(cuts)):
            logits[row, row] = np.float32(scale)
        tokens = np.asarray(sample(logits, rows_of(cuts)))
        assert ((tokens >= 0) & (tokens < vocab)).all()
        if scale == 3e38:
            assert tokens.tolist() == logits.argmax(1).tolist()


def test_a_tiny_temperature_is_greedy():
    """Dividing by it must not overflow into scores that are all infinite."""
    vocab = 4096
    rng = np.random.default_rng(7)
    cuts = list(itertools.product((1e-3, 1e-30, 1e-38, 1e-45), (0, 5, 65), (1.0, 0.9, 1e-6, 1e-45)))
    assert len(cuts) == len(cuts_for(vocab)) * 2  # the same program
    logits = rng.permuted(np.tile(np.arange(vocab) / 64.0, (len(cuts), 1)), axis=1)
    logits = logits.astype(np.float32)
    tokens = np.asarray(sample(logits, rows_of(cuts)))
    assert tokens.tolist() == logits.argmax(1).tolist()


def test_a_tiny_top_p_keeps_the_best_token():
    vocab = 4096
    rng = np.random.default_rng(8)
    cuts = list(
        itertools.product((0.5, 1.0, 2.0, 100.0), (0, 5, 65, 2**31 - 1), (1e-9, 1e-38, 1e-45))
    )
    logits = rng.normal(size=(len(cuts), vocab)).astype(np.float32)
    tokens = np.asarray(sample(logits, rows_of(cuts)))
    assert tokens.tolist() == logits.argmax(1).tolist()


def test_a_row_does_not_depend_on_its_batch_or_place():
    vocab = 4096
    rng = np.random.default_rng(9)
    cuts = cuts_for(vocab) * 2
    rows = rows_of(cuts, positions=rng.integers(1, 2**20, len(cuts)))
    logits = (rng.normal(size=(len(cuts), vocab)) * 2).astype(np.float32)
    tokens = np.asarray(sample(logits, rows))
    order = rng.permutation(len(cuts))
    assert np.array_equal(np.asarray(sample(logits[order], take(rows, order))), tokens[order])
    # Beside one neighbour that needs nothing, or the whole vocabulary, or a cut of it.
    for neighbour, place in itertools.product((0, 2, 8), (0, 1)):
        for row in range(len(cuts)):
            pair = [row, neighbour] if place == 0 else [neighbour, row]
            pair_tokens = np.asarray(sample(logits[pair], take(rows, pair)))
            assert pair_tokens[place] == tokens[row], (cuts[row], cuts[neighbour])


def test_greedy_takes_the_first_of_equals():
    logits = np.array([[0, 3, 3, 1], [2, 2, 2, 2], [-np.inf, -np.inf, -1, -1]], np.float32)
    assert np.asarray(jax.jit(sampling.greedy)(logits)).tolist() == [1, 0, 2]
    assert np.asarray(sample(logits, rows_of([(0.0, 0, 1.0)] * 3))).tolist() == [1, 0, 2]


# Noise


def threefry(key, counter):
    """Threefry-2x32 with 20 rounds (Salmon et al., SC 2011), over Python's integers."""
    mask = 2**32 - 1
    rotations = ((13, 15, 26, 6), (17, 29, 16, 24))
    keys = (*key, key[0] ^ key[1] ^ 0x1BD11BDA)
    a, b = (counter[0] + keys[0]) & mask, (counter[1] + keys[1]) & mask
    for group in range(5):
        for rotation in rotations[group % 2]:
            a = (a + b) & mask
            b = ((b << rotation | b >> (32 - rotation)) & mask) ^ a
        a = (a + keys[(group + 1) % 3]) & mask
        b = (b + keys[(group + 2) % 3] + group + 1) & mask
    return a, b


def test_noise_is_gumbel_of_threefry():
    """A token drawn today is drawn again by a later version: the recipe is part of the contract."""
    seeds = [(0, 0), (2**32 - 1, 2**32 - 1), (0x80000000, 5), (12345, 678910)]
    indices, positions = [0, 3, 0, 1], [0, 2**31 - 1, 100, 7]
    rows = rows_of([(1.0, 0, 1.0)] * 4, seeds, indices, positions)
    ids = np.array([[0, 1, 2, 127_999, 2**31 - 1]] * 4, np.int32)
    expected = np.empty(ids.shape)
    for row, column in np.ndindex(ids.shape):
        key = threefry(seeds[row], (indices[row], positions[row]))
        bits, _ = threefry(key, (int(ids[row, column]), 0))
        expected[row, column] = -np.log(-np.log(((bits >> 9) + 0.5) / 2**23))
    np.testing.assert_allclose(np.asarray(noise_of(rows, ids)), expected, rtol=1e-5, atol=2e-6)


def test_noise_follows_seed_index_and_position():
    keys = [(0, 0, 0, 0), (1, 0, 0, 0), (0, 1, 0, 0), (0, 0, 1, 0), (0, 0, 0, 1), (1, 1, 1, 1)]
    high, low, indices, positions = zip(*keys, strict=True)
    rows = rows_of([(1.0, 0, 1.0)] * 6, list(zip(high, low, strict=True)), indices, positions)
    noise = noise_over(rows, 1000)
    assert np.array_equal(noise, noise_over(rows, 1000))
    assert np.array_equal(noise[::-1], noise_over(take(rows, slice(None, None, -1)), 1000))
    for one, other in itertools.combinations(range(6), 2):
        # With 2^23 values, 1,000 pairs share one in 8,000 comparisons.
        assert (noise[one] == noise[other]).sum() <= 2
        assert abs(np.corrcoef(noise[one], noise[other])[0, 1]) < 0.15


def test_any_64_bit_seed_reaches_the_noise():
    seeds = [-1, 2**64 - 1, -(2**63), 2**63, 0, 1, 2**32, 2**32 - 1, -(2**32), 2**63 - 1]
    params = [SamplingParams(seed=seed) for seed in seeds]
    count = len(seeds)
    head = HeadBatch.of(range(count), range(count), [9] * count, params)
    _, rows = jax.jit(unpack_head)(jnp.asarray(pack_head(head, rows=count)))
    words = [tuple(map(int, pair)) for pair in np.asarray(rows.seeds_b2)]
    assert words == [divmod(seed % 2**64, 2**32) for seed in seeds]
    noise = noise_over(rows, 100)
    for one, other in itertools.combinations(range(count), 2):
        is_same = (seeds[one] - seeds[other]) % 2**64 == 0
        assert np.array_equal(noise[one], noise[other]) == is_same


def test_noise_has_the_gumbel_distribution():
    cuts = [(1.0, 0, 1.0)] * 64
    by_position = noise_over(rows_of(cuts, [(0, 0)] * 64, positions=range(64)), 2000).ravel()
    by_seed = noise_over(rows_of(cuts), 2000).ravel()
    by_index = noise_over(rows_of(cuts, [(0, 0)] * 64, sample_indices=range(64)), 2000).ravel()
    for noise in (by_position, by_seed, by_index):
        assert abs(noise.mean() - np.euler_gamma) < 0.015
        assert abs(noise.var() - np.pi**2 / 6) < 0.04
        assert scipy.stats.kstest(noise, "gumbel_r").pvalue > 1e-3


@pytest.mark.parametrize("bits", [0, 2**32 - 1])
def test_noise_is_finite_at_both_ends(monkeypatch, bits):
    class Constant:
        @staticmethod
        def bind(_key_high, _key_low, high, _low):
            words = jnp.full(high.shape, bits, jnp.uint32)
            return words, words

    monkeypatch.setattr(sampling, "threefry2x32_p", Constant)
    traced_anew = jax.jit(lambda rows, ids: sampling.token_noise(rows, ids))
    noise = traced_anew(rows_of([(1.0, 0, 1.0)]), np.zeros((1, 3), np.int32))
    assert np.isfinite(np.asarray(noise)).all()


# 4,096 draws each, from fixed seeds: the outcome is always the same, so a threshold cannot flake.


@pytest.mark.parametrize("varied", ["position", "seed", "sample_index"])
@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p", "min_p"),
    [
        (0.8, 0, 1.0, 0.0),
        (1.5, 10, 1.0, 0.0),
        (1.0, 30, 0.8, 0.0),
        (1.0, 0, 0.7, 0.0),
        (2.0, 100, 0.9, 0.0),
        (1.0, 0, 1.0, 0.1),
        (1.5, 100, 0.9, 0.02),
    ],
)
def test_draws_follow_the_distribution(temperature, top_k, top_p, min_p, varied):
    vocab, count = 160, 4096
    logits = np.random.default_rng(10).normal(size=vocab).astype(np.float32) * 1.5
    seeds = [(3, row) if varied == "seed" else (11, 12) for row in range(count)]
    rows = rows_of(
        [(temperature, top_k, top_p, min_p)] * count,
        seeds,
        range(count) if varied == "sample_index" else None,
        range(count) if varied == "position" else None,
    )
    tokens = np.asarray(sample(np.tile(logits, (count, 1)), rows))
    scores = logits.astype(np.float64) / temperature
    kept = kept_by(scores, top_k, top_p, min_p)
    assert kept[tokens].all()
    expected = np.exp(scores) * kept
    expected *= count / expected.sum()
    observed = np.bincount(tokens, minlength=vocab)
    is_frequent = expected >= 5  # the test's premise; the rest is one class
    rare = [expected[~is_frequent].sum()]
    classes = np.concatenate([expected[is_frequent], rare])
    counts = np.concatenate([observed[is_frequent], [observed[~is_frequent].sum()]])
    if rare[0] < 5:
        classes, counts = classes[:-1], counts[:-1]
    statistic = ((counts - classes) ** 2 / classes).sum()
    assert scipy.stats.chi2.sf(statistic, len(classes) - 1) > 1e-3


def test_the_vocabulary_is_never_sorted():
    """XLA's CPU recognises top_k among other operations, or else sorts: fifty times the time."""
    rows = rows_of(cuts_for(4096) * 2)
    hlo = sample.lower(jnp.zeros((len(rows.positions_b), 4096)), rows).compile().as_text()
    assert " sort(" not in hlo
    assert "TopK" in hlo
