"""The shipped demo model: small, whole, and better than guessing; the slow test trains another."""

import json
import math
import os
import pathlib
import subprocess
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.flax
import tokenizers

from apex_jax.batch.lines import BatchRequest, parse_line, read_lines
from apex_jax.config import SamplingDefaults
from apex_jax.models import weights
from apex_jax.models.hf_config import read_model_folder
from apex_jax.models.llama import Llama
from launch import train_demo_model

CONFIGS = pathlib.Path(__file__).parent.parent / "configs"
FOLDER = CONFIGS / "demo_model"
REQUESTS = CONFIGS / "demo_requests.jsonl"
MAX_FOLDER_BYTES = 10 * 10**6

# In the style of the training text, and not in it.
UNSEEN_TEXT = """archive.Reader.read_member(self, name, *, encoding=None)

Return the contents of the member called name as a bytes object.

If encoding is given, the bytes are decoded and a string is returned instead. If there is no
such member, KeyError is raised. The archive must be open for reading; if it has been closed,
a ValueError is raised. The file position of the underlying file object may change.
"""


@pytest.fixture(scope="module")
def config() -> dict[str, Any]:
    return json.loads((FOLDER / "config.json").read_text())


@pytest.fixture(scope="module")
def tensors() -> dict[str, jax.Array]:
    return safetensors.flax.load_file(FOLDER / "model.safetensors")


@pytest.fixture(scope="module")
def tokenizer() -> tokenizers.Tokenizer:
    return tokenizers.Tokenizer.from_file(str(FOLDER / "tokenizer.json"))


@pytest.fixture(scope="module")
def requests() -> list[BatchRequest]:
    with REQUESTS.open("rb") as file:
        parsed = [parse_line(raw, SamplingDefaults()) for raw in read_lines(file)]
    refused = [line for line in parsed if not isinstance(line, BatchRequest)]
    assert not refused
    return parsed


@pytest.fixture(scope="module")
def model() -> Llama:
    """The shipped weights in float32, as the module that scores whole sequences."""
    shape, dtype = read_model_folder(FOLDER).architecture, jnp.dtype(jnp.float32)
    return weights.to_module(shape, weights.load(FOLDER, shape, dtype, jax.devices()[0]))


def token_losses(model: Llama, tokens: list[int]) -> np.ndarray:
    """Return the cross entropy of tokens 1, 2, ... given those before, in nats."""
    scores = jax.nn.log_softmax(model(jnp.asarray([tokens[:-1]])))[0]
    return -np.asarray(scores)[np.arange(len(tokens) - 1), tokens[1:]]


def test_folder_is_whole_and_small():
    names = {path.name for path in FOLDER.iterdir()}
    assert names >= {
        "README.md",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) <= MAX_FOLDER_BYTES


def test_weights_are_what_the_config_says(config, tensors, model):
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert {str(tensor.dtype) for tensor in tensors.values()} == {config["torch_dtype"]}
    exported = jax.eval_shape(train_demo_model.hugging_face_tensors, model)
    assert {name: tensor.shape for name, tensor in tensors.items()} == {
        name: tensor.shape for name, tensor in exported.items()
    }
    assert sum(tensor.size for tensor in tensors.values()) == model.config.num_parameters


def test_export_splits_what_the_loader_fuses(tensors, model):
    exported = train_demo_model.hugging_face_tensors(model)
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(exported[name], tensor, err_msg=name)


def test_special_tokens_agree(config, tokenizer):
    assert tokenizer.get_vocab_size() == config["vocab_size"]
    generation = json.loads((FOLDER / "generation_config.json").read_text())
    named = json.loads((FOLDER / "tokenizer_config.json").read_text())
    for kind in ("bos", "eos"):
        token_id = tokenizer.token_to_id(named[f"{kind}_token"])
        assert token_id == config[f"{kind}_token_id"] == generation[f"{kind}_token_id"]
    assert tokenizer.encode("").ids == [config["bos_token_id"]]
    assert tokenizer.encode("", add_special_tokens=False).ids == []


@pytest.mark.parametrize(
    "text",
    [
        "plain words",
        "  indented\n\n\ttabs  and   runs ",
        "naïve café — “quotes”",
        "日本語 🙂👩‍👩‍👧 ẞ",
        "\x00\x7f",
    ],
)
def test_tokenizer_round_trips(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text).ids) == text


def test_unseen_text_is_far_more_likely_than_under_a_uniform_model(config, tokenizer, model):
    loss = token_losses(model, tokenizer.encode(UNSEEN_TEXT).ids).mean()
    assert loss < 0.6 * math.log(config["vocab_size"])


def test_long_contexts_are_read(config, tokenizer, model, requests):
    """Positions far beyond the short training windows are predicted, not guessed."""
    rows = [tokenizer.encode(request.prompt).ids for request in requests]
    longest = max(rows, key=len)
    losses = token_losses(model, longest)
    assert len(losses) > 512
    assert losses[-256:].mean() < 0.6 * math.log(config["vocab_size"])


def test_demo_requests_fit_the_model(config, tokenizer, requests):
    assert len(requests) >= 24
    assert len({request.custom_id for request in requests}) == len(requests)
    for request in requests:
        num_tokens = len(tokenizer.encode(request.prompt).ids) + request.sampling.max_tokens
        assert num_tokens <= config["max_position_embeddings"], request.custom_id


@pytest.mark.slow
def test_a_few_steps_of_training_write_a_folder_that_loads(tmp_path):
    command = [sys.executable, "-m", "launch.train_demo_model", f"--output={tmp_path}"]
    flags = ["--steps=10", "--export_every=5"]
    # optax's schedules promote dtypes, which conftest's settings forbid this package.
    environment = {name: os.environ[name] for name in os.environ if "PROMOTION" not in name}
    done = subprocess.run(
        [*command, *flags],
        cwd=CONFIGS.parent,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert "held-out loss in windows of 2048 tokens" in done.stdout
    shape = read_model_folder(tmp_path).architecture
    assert shape == train_demo_model.ARCHITECTURE
    weights.load(tmp_path, shape, jnp.dtype(jnp.float32), jax.devices()[0])
