"""Every source of weights yields one structure; a damaged folder is refused by tensor and file."""

import json
import pathlib
import re
import shutil
import subprocess
import sys
import tracemalloc

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from flax import nnx
from safetensors.flax import load_file, save_file

from apex_jax.config import ConfigError, LlamaConfig, RopeConfig
from apex_jax.models import safetensors_store, weights
from apex_jax.models.hf_config import read_model_folder
from apex_jax.models.model_files import fingerprint

ROOT = pathlib.Path(__file__).parents[1]
GOLDEN = ROOT / "tests" / "golden"
VARIANTS = sorted(path.name for path in GOLDEN.iterdir())
DTYPES = ("float32", "bfloat16", "float16")
FLOAT32 = jnp.dtype("float32")


def load(folder, dtype="float32"):
    model = read_model_folder(folder).architecture
    return weights.load(folder, model, jnp.dtype(dtype), jax.devices("cpu")[0])


def refuses(*parts):
    """Expect a ConfigError whose message has these parts, in this order."""
    return pytest.raises(ConfigError, match=".*".join(re.escape(part) for part in parts))


def describe(tree):
    return jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), tree)


def assert_same_bits(got, right):
    assert jax.tree.structure(got) == jax.tree.structure(right)
    for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(right), strict=True):
        assert one.dtype == other.dtype
        assert np.asarray(one).tobytes() == np.asarray(other).tobytes()


@pytest.fixture
def copy(tmp_path):
    """A copy of a golden folder, to damage."""

    def make(name="mha_untied"):
        return pathlib.Path(shutil.copytree(GOLDEN / name, tmp_path / name))

    return make


@pytest.fixture
def edited(copy):
    """A copy whose tensors, in its one file, were changed by a function of their dict."""

    def make(edit, name="mha_untied"):
        folder = copy(name)
        tensors = load_file(folder / "model.safetensors")
        edit(tensors)
        save_file(tensors, folder / "model.safetensors")
        return folder

    return make


class TestStructure:
    @pytest.mark.parametrize("name", VARIANTS)
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_every_source_yields_the_abstract_one(self, name, dtype):
        model = read_model_folder(GOLDEN / name).architecture
        right = weights.abstract(model, jnp.dtype(dtype))
        made = weights.dummy(model, jnp.dtype(dtype), jax.devices("cpu")[0], 0)
        for got in (load(GOLDEN / name, dtype), made):
            assert jax.tree.structure(got) == jax.tree.structure(right)
            assert describe(got) == describe(right)

    def test_output_is_none_where_embeddings_are_tied(self):
        assert load(GOLDEN / "rope_llama3").output is None
        assert load(GOLDEN / "rope_linear").output is not None

    def test_abstract_counts_the_parameters(self):
        model = read_model_folder(GOLDEN / "head_dim_apart").architecture
        leaves = jax.tree.leaves(weights.abstract(model, FLOAT32))
        assert sum(leaf.size for leaf in leaves) == model.num_parameters

    def test_layers_merge_with_the_graph(self):
        model = read_model_folder(GOLDEN / "rope_llama3").architecture
        loaded = load(GOLDEN / "rope_llama3")
        layer_graph, norm_graph = weights.graphs(model, FLOAT32)
        x = jnp.ones((3, model.d_model))
        module = weights.to_module(model, loaded)
        for layer, right in zip(loaded.layers, module.layers, strict=True):
            got = nnx.merge(layer_graph, layer)
            positions = jnp.arange(3)
            np.testing.assert_array_equal(
                got.pre_attention(x, positions)[0], right.pre_attention(x, positions)[0]
            )
        np.testing.assert_array_equal(nnx.merge(norm_graph, loaded.norm)(x), module.norm(x))

    def test_weights_lie_on_the_device_asked_for(self):
        device = jax.devices("cpu")[0]
        model = read_model_folder(GOLDEN / "mha_untied").architecture
        for tree in (load(GOLDEN / "mha_untied"), weights.dummy(model, FLOAT32, device, 0)):
            assert {leaf.device for leaf in jax.tree.leaves(tree)} == {device}


class TestSafetensors:
    @pytest.mark.parametrize("name", VARIANTS)
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_values_are_the_files_own_rounded_once(self, name, dtype):
        model = read_model_folder(GOLDEN / name).architecture
        got = reference.unfuse(model, load(GOLDEN / name, dtype))
        right = reference.load_tensors(GOLDEN / name)
        assert set(got) == set(right)
        for tensor in right:
            # Both kinds of file round exactly once: float32 holds what they hold.
            rounded = right[tensor].astype(np.float32).astype(jnp.dtype(dtype))
            np.testing.assert_array_equal(got[tensor], rounded.astype(np.float64))

    @pytest.mark.parametrize("name", VARIANTS)
    def test_stored_dtype(self, name):
        right = "bfloat16" if name == "mqa_bfloat16" else "float32"
        assert safetensors_store.stored_dtype(GOLDEN / name) == jnp.dtype(right)

    def test_stored_dtype_of_a_mixture_holds_all(self, edited):
        def mix(tensors):
            tensors["model.norm.weight"] = tensors["model.norm.weight"].astype(jnp.float16)

        folder = edited(mix, "mqa_bfloat16")
        assert safetensors_store.stored_dtype(folder) == jnp.float32
        load(folder)

    def test_one_file_goes_before_an_index(self, copy):
        folder = copy()
        (folder / "model.safetensors.index.json").write_text("stale")
        assert_same_bits(load(folder), load(GOLDEN / "mha_untied"))

    def test_host_holds_one_parameter_at_a_time(self, tmp_path):
        model = LlamaConfig(24, 128, 384, 4, 4, 32, 512, 64, 1e-5, False, RopeConfig())
        made = weights.dummy(model, FLOAT32, jax.devices("cpu")[0], 0)
        tensors = {}
        for name, values in reference.unfuse(model, made).items():
            prefix = "" if name == "lm_head" else "model."
            tensors[f"{prefix}{name}.weight"] = jnp.asarray(values, jnp.float32)
        save_file(tensors, tmp_path / "model.safetensors")
        weights.abstract(model, FLOAT32)  # what a first call imports and caches is not meant
        tracemalloc.start()
        weights.load(tmp_path, model, FLOAT32, jax.devices("cpu")[0])
        _, peak_bytes = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        # A fused matrix is 2 % of this model, a part on the way there 1 %; the rest is Python.
        assert peak_bytes < 4 * model.num_parameters / 8


class TestTolerated:
    def test_rotary_buffers(self, edited):
        def add(tensors):
            tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = jnp.ones(4, jnp.int32)

        assert_same_bits(load(edited(add)), load(GOLDEN / "mha_untied"))

    def test_a_copy_of_tied_embeddings(self, edited):
        def add(tensors):
            tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]

        assert_same_bits(load(edited(add, "rope_llama3")), load(GOLDEN / "rope_llama3"))


class TestDamagedTensors:
    def test_tied_but_different(self, edited):
        def add(tensors):
            tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + jnp.float32(1e-6)

        with refuses("model.safetensors: tensor lm_head.weight differs from the embedding"):
            load(edited(add, "rope_llama3"))

    @pytest.mark.parametrize(
        "name",
        ["lm_head.weight", "model.norm.weight", "model.layers.1.self_attn.v_proj.weight"],
    )
    def test_missing(self, edited, name):
        with refuses(f"tensor {name} is missing from the weights"):
            load(edited(lambda tensors: tensors.pop(name)))

    @pytest.mark.parametrize(
        "name",
        ["model.layers.2.mlp.up_proj.weight", "model.layers.0.self_attn.q_proj.bias", "other"],
    )
    def test_extra(self, edited, name):
        def add(tensors):
            tensors[name] = jnp.ones(3)

        with refuses(f"model.safetensors: tensor {name} is not part of a Llama of this shape"):
            load(edited(add))

    def test_misshapen(self, edited):
        name = "model.layers.1.mlp.down_proj.weight"

        def transpose(tensors):
            tensors[name] = tensors[name].T

        with refuses(f"model.safetensors: tensor {name} has shape (64, 32); ", "makes it (32, 64)"):
            load(edited(transpose))

    @pytest.mark.parametrize(("dtype", "word"), [(jnp.int8, "I8"), (jnp.float8_e4m3fn, "F8_E4M3")])
    def test_quantized(self, edited, dtype, word):
        name = "model.layers.0.mlp.up_proj.weight"

        def quantize(tensors):
            tensors[name] = tensors[name].astype(dtype)

        with refuses(f"tensor {name} is {word}; supported are F32, F16, BF16"):
            load(edited(quantize))

    @pytest.mark.parametrize("name", ["mha_untied", "mqa_bfloat16"])
    def test_beyond_float16(self, edited, name):
        tensor = "model.layers.1.self_attn.k_proj.weight"

        def grow(tensors):
            tensors[tensor] = tensors[tensor].at[0, 0].set(1e5)

        folder = edited(grow, name)
        with refuses(
            f"tensor {tensor} holds values that float16 cannot; use --config.model.dtype="
        ):
            load(folder, "float16")
        load(folder, "bfloat16")


class TestDamagedFiles:
    def test_cut_off(self, copy):
        folder = copy()
        path = folder / "model.safetensors"
        tensors = sorted(safetensors_store.read_headers(folder).values(), key=lambda one: one.end)
        for cut, named in ((tensors[3].end, tensors[4]), (tensors[-1].end - 1, tensors[-1])):
            path.write_bytes((GOLDEN / "mha_untied" / path.name).read_bytes()[:cut])
            with refuses(f"is cut off at {cut} bytes: tensor {named.name} ends at {named.end}"):
                load(folder)

    @pytest.mark.parametrize("cut", [0, 4, 100])
    def test_cut_off_in_the_header(self, copy, cut):
        folder = copy()
        path = folder / "model.safetensors"
        path.write_bytes(path.read_bytes()[:cut])
        with refuses("model.safetensors"):
            load(folder)

    @pytest.mark.parametrize(
        "header", [b"{", b"[]", b'{"a": 1}', b'{"a": {"dtype": "F32"}}', b"\xff"]
    )
    def test_malformed_header(self, copy, header):
        folder = copy()
        path = folder / "model.safetensors"
        path.write_bytes(len(header).to_bytes(8, "little") + header)
        with refuses("model.safetensors is not a safetensors file"):
            load(folder)

    def test_bytes_that_no_tensor_owns(self, copy):
        folder = copy()
        with (folder / "model.safetensors").open("ab") as file:
            file.write(b"more")
        with refuses("model.safetensors: tensor model.embed_tokens.weight: ", "not fully covered"):
            load(folder)

    def test_no_weights(self, copy):
        folder = copy()
        (folder / "model.safetensors").unlink()
        with refuses("holds no weights", "model.safetensors", ".bin"):
            load(folder)


class TestDamagedIndex:
    @pytest.fixture
    def index(self, copy):
        """The folder and its index; `write` changes the index."""
        folder = copy("gqa_tied_sharded")
        path = folder / "model.safetensors.index.json"
        shard_of = json.loads(path.read_text())["weight_map"]

        def write(changes):
            path.write_text(json.dumps({"weight_map": {**shard_of, **changes}}))

        return folder, shard_of, write

    @pytest.mark.parametrize("text", ["", "{}", "[]", '{"weight_map": 3}', '{"weight_map": [3]}'])
    def test_malformed(self, index, text):
        folder, _, _ = index
        (folder / "model.safetensors.index.json").write_text(text)
        with refuses("model.safetensors.index.json is not an index of shards"):
            load(folder)

    def test_shard_absent(self, index):
        folder, _, _ = index
        (folder / "model-00003-of-00005.safetensors").unlink()
        with refuses("index.json lists 'model-00003-of-00005.safetensors', which is not in the"):
            load(folder)

    @pytest.mark.parametrize("shard", ["../mha_untied/model.safetensors", "/etc/passwd", ""])
    def test_shard_elsewhere(self, index, shard):
        folder, _, write = index
        write({"model.norm.weight": shard})
        with refuses(f"lists {shard!r}, which is not in the folder"):
            load(folder)

    def test_tensor_not_in_its_shard(self, index):
        folder, shard_of, write = index
        name = "model.norm.weight"
        other = next(shard for shard in shard_of.values() if shard != shard_of[name])
        write({name: other})
        with refuses(f"{other}: tensor {name} is missing; the index lists it there"):
            load(folder)

    def test_shard_cut_off(self, index):
        folder, _, _ = index
        path = folder / "model-00002-of-00005.safetensors"
        path.write_bytes(path.read_bytes()[:-10])
        with refuses("model-00002-of-00005.safetensors is cut off at", "tensor model.layers."):
            load(folder)


class TestDummy:
    MODEL = LlamaConfig(3, 256, 512, 8, 2, 32, 512, 64, 1e-5, False, RopeConfig())

    def make(self, dtype="float32", seed=0):
        return weights.dummy(self.MODEL, jnp.dtype(dtype), jax.devices("cpu")[0], seed)

    def test_equal_seeds_give_equal_weights(self):
        assert_same_bits(self.make(seed=3), self.make(seed=3))

    @pytest.mark.parametrize("seed", [1, 2**32 - 1, 2**40, -1])
    def test_other_seeds_give_others(self, seed):
        one, other = self.make(seed=0), self.make(seed=seed)
        assert not np.array_equal(one.embedding, other.embedding)

    def test_no_two_parameters_are_alike(self):
        leaves = [np.asarray(leaf) for leaf in jax.tree.leaves(self.make()) if leaf.ndim == 2]
        starts = {leaf.ravel()[:4].tobytes() for leaf in leaves}
        assert len(starts) == len(leaves)

    def test_distribution(self):
        made = self.make()
        for leaf in jax.tree.leaves(made):
            if leaf.ndim == 1:
                assert (leaf == 1).all()
            else:
                assert abs(float(leaf.mean())) < 4 * 0.02 / leaf.size**0.5
                assert abs(float(leaf.std()) / 0.02 - 1) < 0.02
                # Of independent elements (Marchenko and Pastur); rows that resemble exceed it.
                limit = 0.02 * (leaf.shape[0] ** 0.5 + leaf.shape[1] ** 0.5)
                assert np.linalg.norm(leaf, ord=2) < 1.05 * limit

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_activations_are_finite(self, dtype):
        module = weights.to_module(self.MODEL, self.make(dtype))
        logits_btv = jax.jit(module)(jnp.arange(64)[None])
        assert jnp.isfinite(logits_btv).all()


class TestFingerprint:
    def test_is_the_same_for_a_copy_elsewhere(self, copy):
        for name in ("mha_untied", "gqa_tied_sharded"):
            right = fingerprint(GOLDEN / name)
            assert re.fullmatch("[0-9a-f]{16}", right)
            assert fingerprint(copy(name)) == right

    def test_tells_models_apart(self):
        assert len({fingerprint(GOLDEN / name) for name in VARIANTS}) == len(VARIANTS)

    @pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
    def test_changes_with_what_changes_the_output(self, copy, name):
        folder = copy()
        before = fingerprint(folder)
        path = folder / name
        content = bytearray(path.read_bytes()) if path.exists() else bytearray(b"{}")
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
        assert fingerprint(folder) != before

    def test_ignores_other_files(self, copy):
        folder = copy()
        before = fingerprint(folder)
        (folder / "README.md").write_text("hello")
        assert fingerprint(folder) == before

    def test_samples_the_whole_of_a_large_file(self, copy):
        folder = copy()
        path = folder / "model.safetensors"
        content = bytearray(8 << 20)
        path.write_bytes(content)
        before = fingerprint(folder)
        for start in range(1 << 20, 8 << 20, 1 << 20):
            content[start : start + (256 << 10)] = b"\1" * (256 << 10)
            path.write_bytes(content)
            after = fingerprint(folder)
            assert after != before
            before = after

    def test_needs_weights(self, tmp_path):
        with refuses("holds no weights"):
            fingerprint(tmp_path)


def test_orbax_is_not_imported_until_a_folder_needs_it():
    code = f"""
import pathlib, sys
import jax, jax.numpy as jnp
sys.modules["orbax"] = None  # as where it is not installed
from apex_jax.models import weights
from apex_jax.models.hf_config import read_model_folder
folder = read_model_folder({str(GOLDEN / "mha_untied")!r})
device, dtype = jax.devices("cpu")[0], jnp.dtype("float32")
weights.load(folder.path, folder.architecture, dtype, device)
weights.dummy(folder.architecture, dtype, device, 0)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
