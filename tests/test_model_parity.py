"""The model computes what transformers computes: stored results, and live with -m parity."""

import pathlib
import random
import warnings

import jax
import jax.numpy as jnp
import near_tie
import numpy as np
import pytest
import reference

from apex_jax.models import weights
from apex_jax.models.hf_config import read_model_folder

GOLDEN = pathlib.Path(__file__).parent / "golden"
VARIANTS = sorted(path.name for path in GOLDEN.iterdir())
MAX_ERROR = 1e-4  # of logits whose standard deviation is about 2
FLOAT32 = jnp.dtype("float32")


def load_module(folder):
    """Return a folder's configuration and its model in float32."""
    model = read_model_folder(folder).architecture
    loaded = weights.load(folder, model, FLOAT32, jax.devices("cpu")[0])
    return model, weights.to_module(model, loaded)


def decode(module, prompts, num_new):
    """Continue prompts greedily, all in one padded batch; causality hides the padding."""
    score = jax.jit(lambda tokens_bt: jnp.argmax(module(tokens_bt), axis=-1))
    lengths = np.array([len(prompt) for prompt in prompts])
    rows = np.arange(len(prompts))
    tokens_bt = np.zeros((len(prompts), lengths.max() + num_new), np.int32)
    for row, prompt in enumerate(prompts):
        tokens_bt[row, : len(prompt)] = prompt
    for step in range(num_new):
        best_bt = np.asarray(score(tokens_bt))
        tokens_bt[rows, lengths + step] = best_bt[rows, lengths + step - 1]
    return [
        tokens_bt[row, length : length + num_new].tolist() for row, length in enumerate(lengths)
    ]


def read_expected(name):
    with np.load(GOLDEN / name / "expected.npz") as file:
        return dict(file)


def test_variants_are_all_there():
    assert len(VARIANTS) == 6


@pytest.mark.parametrize("name", VARIANTS)
def test_logits_equal_those_of_transformers(name):
    _, module = load_module(GOLDEN / name)
    expected = read_expected(name)
    lengths = [len(expected[f"tokens_{i}"]) for i in range(2)]
    tokens_bt = np.zeros((2, max(lengths)), np.int32)
    for i, length in enumerate(lengths):
        tokens_bt[i, :length] = expected[f"tokens_{i}"]
    logits_btv = jax.jit(module)(tokens_bt)
    assert logits_btv.dtype == jnp.float32
    for i, length in enumerate(lengths):
        right = expected[f"logits_{i}"]
        np.testing.assert_allclose(logits_btv[i, :length], right, rtol=0, atol=MAX_ERROR)


@pytest.mark.parametrize("name", VARIANTS)
def test_reference_equals_transformers(name):
    model = read_model_folder(GOLDEN / name).architecture
    tensors = reference.load_tensors(GOLDEN / name)
    expected = read_expected(name)
    for i in range(2):
        got = reference.logits(model, tensors, expected[f"tokens_{i}"].tolist())
        np.testing.assert_allclose(got, expected[f"logits_{i}"], rtol=0, atol=MAX_ERROR)


def test_greedy_tokens_equal_those_of_transformers():
    got, right, margins, stds = [], [], [], []
    for name in VARIANTS:
        _, module = load_module(GOLDEN / name)
        expected, prompts = read_expected(name), []
        for i, length in enumerate(expected["prompt_lengths"]):
            tokens = expected[f"tokens_{i}"].tolist()
            prompts.append(tokens[:length])
            right.append(tokens[length:])
            margins.append(expected[f"margins_{i}"])
            stds.append(expected[f"stds_{i}"])
        got += decode(module, prompts, 64)
    near_tie.assert_equal_but_for_ties(got, right, margins, stds)


def test_reference_decodes_like_transformers():
    model = read_model_folder(GOLDEN / "rope_llama3").architecture
    tensors = reference.load_tensors(GOLDEN / "rope_llama3")
    expected = read_expected("rope_llama3")
    tokens = expected["tokens_0"].tolist()
    got, margins, stds = reference.decode(model, tensors, tokens[:9], 16)
    assert got == tokens[9:25]
    np.testing.assert_allclose(margins, expected["margins_0"][:16], atol=MAX_ERROR)
    np.testing.assert_allclose(stds, expected["stds_0"][:16], atol=MAX_ERROR)


@pytest.mark.parametrize("name", VARIANTS)
def test_reference_reads_our_weights_as_it_reads_files(name):
    model, folder = read_model_folder(GOLDEN / name).architecture, GOLDEN / name
    loaded = weights.load(folder, model, FLOAT32, jax.devices("cpu")[0])
    from_file, ours = reference.load_tensors(folder), reference.unfuse(model, loaded)
    assert set(from_file) == set(ours)
    for tensor in ours:
        np.testing.assert_array_equal(ours[tensor], from_file[tensor])


class TestNearTie:
    def test_equal_tokens_pass(self):
        assert near_tie.count_equal([1, 2, 3], [1, 2, 3], [1.0] * 3, [1.0] * 3) == 3

    def test_a_difference_fails(self):
        with pytest.raises(AssertionError, match="token 1 is 9, expected 2, by a margin"):
            near_tie.count_equal([1, 9, 3], [1, 2, 3], [1.0] * 3, [1.0] * 3)

    def test_a_difference_after_a_tie_passes(self):
        assert near_tie.count_equal([1, 9, 9], [1, 2, 3], [1.0, 1e-5, 1.0], [1.0] * 3) == 1

    def test_a_tie_is_relative_to_the_spread_of_logits(self):
        assert near_tie.count_equal([9], [1], [1.0], [1e5]) == 0

    @pytest.mark.parametrize("tokens", [[1, 2], [1, 2, 3, 4]])
    def test_another_length_fails(self, tokens):
        with pytest.raises(AssertionError, match="tokens"):
            near_tie.count_equal(tokens, [1, 2, 3], [1.0] * 3, [1.0] * 3)

    def test_too_many_ties_fail(self):
        tokens, margins = [[1]] * 20, [[1.0]] * 18
        with pytest.raises(AssertionError, match="2 of 20 requests stopped at a near tie"):
            near_tie.assert_equal_but_for_ties(
                tokens, tokens, [*margins, [0.0], [0.0]], [[1.0]] * 20
            )
        near_tie.assert_equal_but_for_ties(tokens, tokens, [*margins, [1.0], [0.0]], [[1.0]] * 20)

    def test_the_request_is_named(self):
        with pytest.raises(AssertionError, match="request 1: token 0 is 5"):
            near_tie.assert_equal_but_for_ties([[1], [5]], [[1], [2]], [[1], [1]], [[1], [1]])


@pytest.fixture(scope="module")
def maker():
    """tests/make_golden.py, which needs torch and transformers."""
    for name in ("torch", "transformers"):
        pytest.importorskip(name, reason=f"live parity needs {name}, which is not installed")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of other packages, at import
        import make_golden
    return make_golden


@pytest.mark.parity
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", VARIANTS)
def test_stored_results_are_what_transformers_computes_today(maker, name):
    """Also shows that it reads the hand-edited spelling of RoPE scaling as we do."""
    model, expected = maker.load_model(GOLDEN / name), read_expected(name)
    for i in range(2):
        got = maker.score(model, expected[f"tokens_{i}"].tolist())
        np.testing.assert_allclose(got, expected[f"logits_{i}"], rtol=0, atol=MAX_ERROR)


def random_differences(rng, seed):
    """Draw a configuration from everything that is supported."""
    num_heads = rng.choice([2, 4, 6])
    width = num_heads * rng.choice([8, 10, 16])
    scalings = [
        {"rope_type": "default"},
        {"rope_type": "linear", "factor": rng.uniform(1, 8)},
        {
            "rope_type": "llama3",
            "factor": rng.uniform(1, 32),
            "low_freq_factor": rng.uniform(0.5, 2),
            "high_freq_factor": rng.uniform(3, 8),
            "original_max_position_embeddings": rng.choice([16, 32, 100]),
        },
    ]
    return {
        "vocab_size": rng.randint(50, 200),
        "hidden_size": width,
        "intermediate_size": rng.randint(20, 100),
        "num_hidden_layers": rng.randint(1, 4),
        "num_attention_heads": num_heads,
        "num_key_value_heads": rng.choice([n for n in (1, 2, 3, 4, 6) if num_heads % n == 0]),
        "head_dim": rng.choice([None, 4, 18]),
        "rms_norm_eps": rng.choice([1e-6, 1e-5]),
        "tie_word_embeddings": rng.random() < 0.5,
        "rope_parameters": {"rope_theta": rng.choice([100.0, 1e4, 5e5]), **scalings[seed % 3]},
        # Much more, and both implementations stray 3e-4 from float64: attention becomes a switch.
        "initializer_range": 1.2 * width**-0.5,
    }


@pytest.mark.parity
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("seed", range(12))
def test_fresh_models_equal_those_of_transformers(maker, tmp_path, seed):
    rng = random.Random(seed)
    saved = maker.make_model(random_differences(rng, seed), seed)
    saved.save_pretrained(tmp_path, max_shard_size=rng.choice(["20KB", "1GB"]))
    _, module = load_module(tmp_path)
    tokens = [rng.randrange(50) for _ in range(120)]
    expected = maker.score(maker.load_model(tmp_path), tokens)
    got = jax.jit(module)(np.array([tokens], np.int32))[0]
    np.testing.assert_allclose(got, expected, rtol=0, atol=MAX_ERROR)
