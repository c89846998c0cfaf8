"""Converted folders load to the same bits; Orbax folders that do not fit are refused by name."""

import contextlib
import gc
import json
import pathlib
import re
import shutil
import subprocess
import sys
from collections import namedtuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from apex_jax.config import ConfigError
from apex_jax.models import orbax_store, weights
from apex_jax.models.hf_config import read_model_folder
from apex_jax.models.model_files import fingerprint
from launch import convert_checkpoint

ROOT = pathlib.Path(__file__).parents[1]
GOLDEN = ROOT / "tests" / "golden"
VARIANTS = sorted(path.name for path in GOLDEN.iterdir())
# Orbax leaves coroutines and an event loop behind when it fails.
pytestmark = [
    pytest.mark.filterwarnings("ignore:coroutine .* was never awaited:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


@pytest.fixture(autouse=True)
def bury_coroutines():
    """Collect what Orbax leaves behind here, where it is expected, and not in some later test."""
    yield
    gc.collect()


def load(folder, dtype="float32"):
    model = read_model_folder(folder).architecture
    return weights.load(folder, model, jnp.dtype(dtype), jax.devices("cpu")[0])


def refuses(*parts):
    return pytest.raises(ConfigError, match=".*".join(re.escape(part) for part in parts))


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    """Converted golden folders, by name; not to be changed."""
    parent = tmp_path_factory.mktemp("converted")
    folders = {name: parent / name for name in VARIANTS}
    for name, folder in folders.items():
        convert_checkpoint.convert(GOLDEN / name, folder)
    return folders


@pytest.fixture
def saved(tmp_path):
    """Write an Orbax folder of edited weights beside a golden config.json."""

    def make(edit, name="mha_untied"):
        shutil.copyfile(GOLDEN / name / "config.json", tmp_path / "config.json")
        orbax_store.save(tmp_path / "orbax", edit(load(GOLDEN / name)))
        return tmp_path

    return make


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_converted_weights_have_the_same_bits(converted, name, dtype):
    got, right = load(converted[name], dtype), load(GOLDEN / name, dtype)
    assert jax.tree.structure(got) == jax.tree.structure(right)
    for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(right), strict=True):
        assert one.dtype == other.dtype == jnp.dtype(dtype)
        assert one.device == other.device
        assert np.asarray(one).tobytes() == np.asarray(other).tobytes()


@pytest.mark.parametrize("name", VARIANTS)
def test_configuration_is_copied(converted, name):
    got, right = read_model_folder(converted[name]), read_model_folder(GOLDEN / name)
    assert got.architecture == right.architecture
    assert got.eos_token_ids == right.eos_token_ids
    assert got.dtype == right.dtype


def test_tokenizer_is_copied_and_nothing_else(tmp_path):
    source = pathlib.Path(shutil.copytree(GOLDEN / "rope_llama3", tmp_path / "source"))
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "README.md"):
        (source / name).write_text(name)
    convert_checkpoint.convert(source, tmp_path / "output")
    assert {path.name for path in (tmp_path / "output").iterdir()} == {
        *("config.json", "generation_config.json", "orbax"),
        *("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"),
    }


def test_fingerprint_is_the_same_for_a_copy_elsewhere(converted, tmp_path):
    folder = converted["mha_untied"]
    right = fingerprint(folder)
    shutil.copytree(folder, tmp_path / "copy")
    assert fingerprint(tmp_path / "copy") == right
    assert fingerprint(converted["mqa_bfloat16"]) != right


class TestRefusedConversions:
    def test_no_input(self, tmp_path):
        with refuses("there is no such folder"):
            convert_checkpoint.convert(tmp_path / "nowhere", tmp_path / "output")

    def test_input_without_weights(self, tmp_path):
        shutil.copyfile(GOLDEN / "mha_untied" / "config.json", tmp_path / "config.json")
        with refuses("holds no weights"):
            convert_checkpoint.convert(tmp_path, tmp_path / "output")

    def test_input_converted_already(self, converted, tmp_path):
        with refuses("--input is", "which is an Orbax folder already"):
            convert_checkpoint.convert(converted["mha_untied"], tmp_path / "output")

    def test_output_exists(self, tmp_path):
        with refuses("--output is", "which exists"):
            convert_checkpoint.convert(GOLDEN / "mha_untied", tmp_path)

    def test_output_in_no_folder(self, tmp_path):
        with refuses("--output is", "in a folder that does not exist"):
            convert_checkpoint.convert(GOLDEN / "mha_untied", tmp_path / "no" / "output")

    def test_disk_full(self, tmp_path, monkeypatch):
        usage = namedtuple("usage", "total used free")(10, 0, 10)
        monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
        with refuses("--output is", "where 0.0 GiB are free; the weights take"):
            convert_checkpoint.convert(GOLDEN / "mha_untied", tmp_path / "output")

    def test_a_failure_leaves_nothing_behind(self, tmp_path, monkeypatch):
        def fail(path, loaded):
            path.mkdir()
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(orbax_store, "save", fail)
        with pytest.raises(OSError, match="No space left"):
            convert_checkpoint.convert(GOLDEN / "mha_untied", tmp_path / "output")
        assert not list(tmp_path.iterdir())


class TestRefusedFolders:
    def test_missing(self, saved):
        folder = saved(lambda loaded: loaded._replace(output=None))
        with refuses("orbax: tensor output is missing from the checkpoint"):
            load(folder)

    def test_extra(self, saved):
        folder = saved(lambda loaded: loaded._replace(output=loaded.embedding), "rope_llama3")
        with refuses("orbax: tensor output is not part of a Llama of this shape"):
            load(folder)

    def test_misshapen(self, saved):
        def transpose(loaded):
            loaded.layers[1]["o_proj"]["weight"] = jnp.ones((32, 31))
            return loaded

        with refuses("tensor layers.1.o_proj.weight has shape (32, 31); ", "makes it (32, 32)"):
            load(saved(transpose))

    def test_beyond_float16(self, saved):
        def grow(loaded):
            return loaded._replace(embedding=loaded.embedding.at[3, 3].set(1e5))

        folder = saved(grow)
        with refuses("orbax: tensor embedding holds values that float16 cannot"):
            load(folder, "float16")
        load(folder, "bfloat16")

    def test_not_a_checkpoint(self, tmp_path):
        shutil.copyfile(GOLDEN / "mha_untied" / "config.json", tmp_path / "config.json")
        (tmp_path / "orbax").mkdir()
        with refuses("orbax is not an Orbax checkpoint"):
            load(tmp_path)

    @pytest.mark.parametrize(
        "damage",
        [
            lambda content: content[:-100],
            lambda content: content[: len(content) // 2],
            lambda content: content[:40_000] + bytes(20_000) + content[60_000:],
        ],
    )
    def test_damaged(self, converted, tmp_path, damage):
        folder = tmp_path / "damaged"
        shutil.copytree(converted["mha_untied"], folder)
        for path in folder.glob("orbax/**/d/*"):
            path.write_bytes(damage(path.read_bytes()))
        with refuses("orbax cannot be read"):
            load(folder)

    def test_both_kinds(self, saved):
        folder = saved(lambda loaded: loaded)
        shutil.copyfile(GOLDEN / "mha_untied" / "model.safetensors", folder / "model.safetensors")
        with refuses("holds weights twice"):
            load(folder)

    def test_orbax_not_installed(self, converted, monkeypatch):
        monkeypatch.delitem(sys.modules, "apex_jax.models.orbax_store")
        with contextlib.suppress(AttributeError):
            monkeypatch.delattr("apex_jax.models.orbax_store")
        monkeypatch.setitem(sys.modules, "orbax.checkpoint", None)
        with refuses("orbax needs orbax-checkpoint, which does not import"):
            load(converted["mha_untied"])


def test_command_line(tmp_path):
    def run(*arguments):
        return subprocess.run(
            [sys.executable, "-m", "launch.convert_checkpoint", *arguments],
            cwd=ROOT,
            capture_output=True,
            text=True,
        )

    arguments = (f"--input={GOLDEN / 'mqa_bfloat16'}", f"--output={tmp_path / 'output'}")
    done = run(*arguments)
    assert done.returncode == 0, done.stderr
    assert f"--config.model.path={tmp_path / 'output'}" in done.stdout
    assert json.loads((tmp_path / "output" / "config.json").read_text())["dtype"] == "bfloat16"
    again = run(*arguments)
    assert again.returncode == 2
    assert "error: --output is" in again.stderr
    assert "Traceback" not in again.stderr
    nothing = run()
    assert nothing.returncode == 2
    assert "error: give --input" in nothing.stderr
