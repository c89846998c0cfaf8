"""config.json is read in all its spellings, and whatever is not understood is refused by name."""

import json
import math
import pathlib
import re

import pytest

from apex_jax.config import ConfigError, LlamaConfig, RopeConfig
from apex_jax.models.hf_config import read_model_folder

GOLDEN = pathlib.Path(__file__).parent / "golden"
BASE = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 32,
    "intermediate_size": 64,
    "max_position_embeddings": 256,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "rope_theta": 5e5,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "vocab_size": 128,
}
LLAMA3 = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
LLAMA3_ROPE = RopeConfig(5e5, "llama3", 8.0, 1.0, 4.0, 64)


@pytest.fixture
def read(tmp_path):
    """Write a folder's files (None leaves an attribute out) and read them."""

    def write_and_read(changes=None, generation=None, expected=None):
        values = {k: v for k, v in {**BASE, **(changes or {})}.items() if v is not ...}
        (tmp_path / "config.json").write_text(json.dumps(values))
        if generation is not None:
            (tmp_path / "generation_config.json").write_text(json.dumps(generation))
        return read_model_folder(tmp_path, expected)

    return write_and_read


def refuses(message):
    return pytest.raises(ConfigError, match=re.escape(message))


def test_reads_everything(read, tmp_path):
    folder = read()
    assert folder.path == tmp_path
    assert folder.architecture == LlamaConfig(
        num_layers=2,
        d_model=32,
        d_ffn=64,
        num_heads=4,
        num_kv_heads=2,
        head_dim=8,
        vocab_size=128,
        max_position_embeddings=256,
        rms_norm_eps=1e-5,
        tie_embeddings=False,
        rope=RopeConfig(theta=5e5),
    )
    assert folder.eos_token_ids == {2}
    assert folder.dtype == "bfloat16"


@pytest.mark.parametrize("path", sorted(GOLDEN.iterdir()), ids=lambda path: path.name)
def test_reads_what_transformers_writes(path):
    folder = read_model_folder(str(path))
    assert folder.architecture.max_position_embeddings == 256
    assert folder.dtype == ("bfloat16" if path.name == "mqa_bfloat16" else "float32")
    assert 2 in folder.eos_token_ids


@pytest.mark.parametrize(("kv_heads", "right"), [(4, 4), (2, 2), (1, 1), (..., 4), (None, 4)])
def test_kv_heads(read, kv_heads, right):
    assert read({"num_key_value_heads": kv_heads}).architecture.num_kv_heads == right


@pytest.mark.parametrize(("head_dim", "right"), [(..., 8), (None, 8), (8, 8), (20, 20)])
def test_head_dim(read, head_dim, right):
    assert read({"head_dim": head_dim}).architecture.head_dim == right


def test_width_need_not_divide_where_head_dim_is_given(read):
    assert read({"hidden_size": 33, "head_dim": 8}).architecture.d_model == 33


@pytest.mark.parametrize(("tie", "right"), [(True, True), (False, False), (..., False)])
def test_tied_embeddings(read, tie, right):
    assert read({"tie_word_embeddings": tie}).architecture.tie_embeddings is right


class TestRope:
    @pytest.mark.parametrize(
        "changes",
        [
            {"rope_scaling": {"type": "llama3", **LLAMA3}},
            {"rope_scaling": {"rope_type": "llama3", **LLAMA3}},
            {"rope_scaling": {"rope_type": "llama3", "type": "llama3", **LLAMA3}},
            {"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5, **LLAMA3}},
            {"rope_parameters": {"rope_type": "llama3", **LLAMA3}},
            {"rope_theta": ..., "rope_scaling": {"type": "llama3", "rope_theta": 5e5, **LLAMA3}},
            {
                "rope_theta": ...,
                "rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5, **LLAMA3},
            },
            {
                "rope_scaling": {"type": "llama3", **LLAMA3},
                "rope_parameters": {"rope_type": "llama3", **LLAMA3},
            },
        ],
    )
    def test_spellings_of_llama3(self, read, changes):
        assert read(changes).architecture.rope == LLAMA3_ROPE

    @pytest.mark.parametrize("name", ["rope_scaling", "rope_parameters"])
    @pytest.mark.parametrize("key", ["type", "rope_type"])
    def test_spellings_of_linear(self, read, name, key):
        assert read({name: {key: "linear", "factor": 4}}).architecture.rope == RopeConfig(
            theta=5e5, scaling="linear", factor=4.0
        )

    @pytest.mark.parametrize(
        "changes",
        [
            {"rope_scaling": None},
            {"rope_scaling": {}},
            {"rope_scaling": {"type": "default"}},
            {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
            {"rope_theta": ..., "rope_parameters": {"rope_theta": 5e5}},
            {"rope_parameters": {"rope_theta": 5e5, "partial_rotary_factor": 1.0}},
        ],
    )
    def test_spellings_of_default(self, read, changes):
        assert read(changes).architecture.rope == RopeConfig(theta=5e5)

    def test_theta_is_that_of_transformers_where_no_file_says(self, read):
        assert read({"rope_theta": ...}).architecture.rope == RopeConfig(theta=10_000.0)

    @pytest.mark.parametrize("scaling", ["dynamic", "yarn", "longrope", "su", "mrope"])
    @pytest.mark.parametrize("name", ["rope_scaling", "rope_parameters"])
    @pytest.mark.parametrize("key", ["type", "rope_type"])
    def test_unknown_scaling_is_refused(self, read, scaling, name, key):
        with refuses(f"config.json: {name}.rope_type is {scaling!r}; it must be one of default"):
            read({name: {key: scaling, "factor": 2.0}})

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"rope_scaling": 3}, "rope_scaling is 3; it must be an object"),
            ({"rope_scaling": {"type": 3}}, "rope_scaling.type is 3; it must be a string"),
            ({"rope_scaling": {"type": "linear"}}, "rope_scaling.factor is missing"),
            ({"rope_scaling": {"type": "linear", "factor": "4"}}, "rope_scaling.factor is '4'"),
            ({"rope_scaling": {"type": "linear", "factor": 0.5}}, "rope_scaling.factor is 0.5"),
            ({"rope_scaling": {"type": "linear", "factor": True}}, "rope_scaling.factor is True"),
            (
                {"rope_scaling": {"type": "linear", "factor": 2, "attention_factor": 3}},
                "rope_scaling.attention_factor is 3; this key is not supported with rope_type "
                "linear",
            ),
            (
                {"rope_scaling": {"type": "linear", "rope_type": "llama3", **LLAMA3}},
                "rope_scaling.type is 'linear'; it must be the same as rope_scaling.rope_type",
            ),
            (
                {"rope_scaling": {"type": "llama3", **LLAMA3, "low_freq_factor": 4.0}},
                "rope_scaling.low_freq_factor is 4.0; it must be below high_freq_factor (4.0)",
            ),
            (
                {"rope_scaling": {"type": "llama3", **LLAMA3, "high_freq_factor": None}},
                "rope_scaling.high_freq_factor is missing",
            ),
            (
                {
                    "rope_scaling": {
                        "type": "llama3",
                        **LLAMA3,
                        "original_max_position_embeddings": 64.5,
                    }
                },
                "rope_scaling.original_max_position_embeddings is 64.5; it must be an integer",
            ),
            (
                {"rope_parameters": {"rope_theta": 1e4}},
                "rope_parameters.rope_theta is 10000.0; it must be the same as rope_theta",
            ),
            (
                {
                    "rope_scaling": {"type": "linear", "factor": 2},
                    "rope_parameters": {"type": "linear", "factor": 4},
                },
                "rope_scaling and rope_parameters contradict each other",
            ),
            (
                {"partial_rotary_factor": 0.5},
                "config.json: partial_rotary_factor is 0.5; it must be 1",
            ),
            (
                {"rope_parameters": {"partial_rotary_factor": 0.25}},
                "rope_parameters.partial_rotary_factor is 0.25; it must be 1",
            ),
            ({"rope_theta": 0}, "rope_theta is 0; it must be a positive number"),
            ({"rope_theta": "1e4"}, "rope_theta is '1e4'; it must be a positive number"),
        ],
    )
    def test_bad_values_are_refused(self, read, changes, message):
        with refuses(message):
            read(changes)


class TestAttributes:
    @pytest.mark.parametrize(
        "changes",
        [
            {"pretraining_tp": 4},
            {"use_cache": False},
            {"attention_dropout": 0.1},
            {"pad_token_id": -1},
            {"transformers_version": "4.31.0"},
            {"hidden_act": "swish"},
            {"hidden_act": ...},
            {"attention_bias": False, "mlp_bias": False},
            {"sliding_window": None, "quantization_config": None},
            {"temperature": 0.6, "max_length": 4096},
            {"architectures": ...},
            {"bos_token_id": [1, 2]},
            {"max_sequence_length": 2048, "is_llama_config": True, "rope_interleaved": False},
        ],
    )
    def test_harmless_ones_change_nothing(self, read, changes):
        assert read(changes).architecture == read().architecture

    @pytest.mark.parametrize(
        ("name", "value"),
        [
            ("attention_bias", True),
            ("mlp_bias", True),
            ("hidden_act", "gelu"),
            ("is_encoder_decoder", True),
            ("pruned_heads", {"0": [1]}),
            ("rope_interleaved", True),
            ("use_sliding_window", True),
            ("model_type", "mistral"),
            ("architectures", ["LlamaForSequenceClassification"]),
            ("architectures", ["LlamaForCausalLM", "Other"]),
            ("architectures", "LlamaForCausalLM"),
        ],
    )
    def test_values_that_change_the_result_are_refused(self, read, name, value):
        with refuses(f"config.json: {name} is {value!r}; it must be"):
            read({name: value})

    @pytest.mark.parametrize(
        ("name", "value"),
        [
            ("quantization_config", {"quant_method": "gptq"}),
            ("sliding_window", 4096),
            ("layer_types", ["sliding_attention"]),
            ("original_max_position_embeddings", 4096),
            ("auto_map", {"AutoModelForCausalLM": "modeling_other.Other"}),
            ("query_pre_attn_scalar", 256),
            ("logit_scale", 2.0),
            ("anything_new", False),
        ],
    )
    def test_unknown_ones_are_refused(self, read, name, value):
        with refuses(f"config.json: {name} is {value!r}; this attribute is not supported"):
            read({name: value})

    @pytest.mark.parametrize(
        "name",
        [
            "model_type",
            "hidden_size",
            "intermediate_size",
            "num_attention_heads",
            "num_hidden_layers",
            "vocab_size",
            "max_position_embeddings",
            "rms_norm_eps",
        ],
    )
    @pytest.mark.parametrize("value", [..., None])
    def test_missing_ones_are_named(self, read, name, value):
        with refuses(f"config.json: {name} is missing"):
            read({name: value})

    @pytest.mark.parametrize(
        ("name", "value", "right"),
        [
            ("hidden_size", "32", "an integer"),
            ("hidden_size", 32.0, "an integer"),
            ("hidden_size", True, "an integer"),
            ("num_hidden_layers", 0, "a positive integer"),
            ("vocab_size", -1, "a positive integer"),
            ("num_key_value_heads", 0, "a positive integer"),
            ("rms_norm_eps", "1e-5", "a positive number"),
            ("rms_norm_eps", 0.0, "a positive number"),
            ("rms_norm_eps", math.inf, "a positive number"),
            ("tie_word_embeddings", 1, "true or false"),
            ("model_type", 7, "a string"),
            ("torch_dtype", 16, "a string"),
            ("torch_dtype", "float8_e4m3fn", "one of float32, bfloat16, float16"),
            ("dtype", "int8", "one of float32, bfloat16, float16"),
            ("num_key_value_heads", 3, "a divisor of num_attention_heads (4)"),
            ("num_attention_heads", 6, "a divisor of hidden_size (32) where head_dim is absent"),
            ("head_dim", 7, "even"),
        ],
    )
    def test_wrong_values_are_named(self, read, name, value, right):
        with refuses(f"config.json: {name} is {value!r}; it must be {right}"):
            read({name: value})


class TestTokenIds:
    @pytest.mark.parametrize(
        ("config", "generation", "right"),
        [
            (2, None, {2}),
            ([2, 5], None, {2, 5}),
            (2, {"eos_token_id": 3}, {2, 3}),
            ([2, 5], {"eos_token_id": [5, 6]}, {2, 5, 6}),
            (2, {"eos_token_id": None}, {2}),
            (2, {"temperature": 0.6}, {2}),
            (..., {"eos_token_id": [4]}, {4}),
            (None, None, set()),
        ],
    )
    def test_eos_is_the_union(self, read, config, generation, right):
        assert read({"eos_token_id": config}, generation).eos_token_ids == right

    @pytest.mark.parametrize("value", ["2", 2.0, True, -1, 128, [2, 128], [2, None], {"a": 1}])
    def test_bad_eos_is_refused(self, read, value):
        right = f"eos_token_id is {value!r}; it must be null, an id below vocab_size (128)"
        with refuses(f"config.json: {right}"):
            read({"eos_token_id": value})
        with refuses(f"generation_config.json: {right}"):
            read(generation={"eos_token_id": value})


@pytest.mark.parametrize(
    ("changes", "right"),
    [
        ({"torch_dtype": "float16"}, "float16"),
        ({"torch_dtype": ..., "dtype": "float32"}, "float32"),
        ({"torch_dtype": "float16", "dtype": "bfloat16"}, "bfloat16"),
        ({"torch_dtype": ...}, None),
        ({"torch_dtype": None}, None),
    ],
)
def test_dtype(read, changes, right):
    assert read(changes).dtype == right


class TestExpectedArchitecture:
    def test_the_same_passes(self, read):
        architecture = read().architecture
        assert read(expected=architecture).architecture == architecture

    def test_a_difference_is_named(self, read):
        architecture = read().architecture
        architecture.num_layers = 3
        with refuses("--config.model.architecture.num_layers is 3, but"):
            read(expected=architecture)

    def test_a_difference_in_rope_is_named(self, read):
        architecture = read().architecture
        architecture.rope.theta = 1e4
        with refuses("--config.model.architecture.rope.theta is 10000.0, but"):
            read(expected=architecture)


class TestFiles:
    def test_no_folder(self, tmp_path):
        with pytest.raises(ConfigError, match=r"model\.path is .*there is no such folder"):
            read_model_folder(tmp_path / "nowhere")

    def test_no_config(self, tmp_path):
        with pytest.raises(ConfigError, match=r"config\.json does not exist"):
            read_model_folder(tmp_path)

    @pytest.mark.parametrize("text", [b"{", b"", b"\xff\xfe{}"])
    def test_malformed_json(self, tmp_path, text):
        (tmp_path / "config.json").write_bytes(text)
        with pytest.raises(ConfigError, match=r"config\.json cannot be read as JSON"):
            read_model_folder(tmp_path)

    @pytest.mark.parametrize(("text", "kind"), [("[]", "list"), ("3", "int"), ("null", "NoneType")])
    def test_not_an_object(self, tmp_path, text, kind):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(ConfigError, match=rf"config\.json holds {kind}; it must hold a JSON"):
            read_model_folder(tmp_path)

    def test_malformed_generation_config(self, read, tmp_path):
        (tmp_path / "generation_config.json").write_text("{,}")
        with pytest.raises(ConfigError, match=r"generation_config\.json cannot be read as JSON"):
            read()

    def test_a_folder_in_the_place_of_a_file(self, tmp_path):
        (tmp_path / "config.json").mkdir()
        with pytest.raises(ConfigError, match=r"config\.json cannot be read as JSON"):
            read_model_folder(tmp_path)
