"""The configs are the published models, and every kind of field can be overridden from flags."""

import dataclasses
import functools
import importlib
import pathlib
import re
import typing

import pytest
from absl import flags
from ml_collections import config_flags

from apex_jax.config import (
    STRATEGIES,
    Config,
    ConfigError,
    LlamaConfig,
    SchedulerConfig,
    parse_cpus,
    validate,
)
from apex_jax.models.hf_config import read_model_folder
from apex_jax.settings import read_size

# How ml_collections 1.1 runs a config file; it works up to Python 3.14.
pytestmark = pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")
CONFIGS = pathlib.Path(__file__).parents[1] / "configs"
# As the model cards and the headers of the published safetensors count them.
NUM_PARAMETERS = {
    "llama_2_7b": 6_738_415_616,
    "llama_3_8b": 8_030_261_248,
    "llama_3_1_8b": 8_030_261_248,
    "llama_3_2_1b": 1_235_814_400,
    "llama_3_2_3b": 3_212_749_824,
    "tinyllama_1_1b": 1_100_048_384,
}


def get_config(name):
    return importlib.import_module(f"configs.{name}").get_config()


def from_flags(name, *overrides) -> Config:
    """Read a config as the command line does."""
    values = flags.FlagValues()
    argv = ["program", f"--config={CONFIGS / name}.py", *overrides]
    config_flags.DEFINE_config_file("config", flag_values=values, sys_argv=argv)
    values(argv)
    return values.config


@pytest.mark.parametrize("name", NUM_PARAMETERS)
def test_parameters_are_as_many_as_published(name):
    assert get_config(name).model.architecture.num_parameters == NUM_PARAMETERS[name]


@pytest.mark.parametrize("name", NUM_PARAMETERS)
def test_heads_fit(name):
    model = get_config(name).model.architecture
    assert model.num_heads * model.head_dim == model.d_model
    assert model.num_heads % model.num_kv_heads == 0


def test_every_config_is_tested():
    names = {path.stem for path in CONFIGS.glob("*.py")} - {"__init__"}
    assert names == {*NUM_PARAMETERS, "default", "demo"}


def test_kv_bytes_are_as_the_models_are_known_for():
    assert get_config("llama_2_7b").model.architecture.kv_bytes_per_token(2) == 512 * 1024
    assert get_config("llama_3_8b").model.architecture.kv_bytes_per_token(2) == 128 * 1024


@pytest.mark.parametrize("name", NUM_PARAMETERS)
def test_each_call_returns_a_config_of_its_own(name):
    get_config(name).model.architecture.rope.theta = 1.0
    assert get_config(name).model.architecture.rope.theta != 1.0


@pytest.mark.parametrize("name", NUM_PARAMETERS)
def test_published_models_need_a_path_or_dummy_weights(name):
    config = get_config(name)
    with pytest.raises(ConfigError, match="model folder"):
        validate(config)
    config.model.weights = "dummy"
    validate(config)


@pytest.mark.parametrize(
    ("name", "value", "right"),
    [
        ("num_layers", 0, "at least 1"),
        ("d_ffn", -1, "at least 1"),
        ("num_kv_heads", 0, "at least 1"),
        ("num_kv_heads", 5, "a divisor of the 32 of num_heads"),
        ("head_dim", 127, "even: RoPE rotates pairs"),
        ("rms_norm_eps", 0.0, "a positive number"),
        ("rope.theta", float("inf"), "a positive number"),
        ("rope.scaling", "yarn", "one of default, linear, llama3"),
        ("rope.factor", 0.5, "at least 1, and finite"),
        ("rope.low_freq_factor", 4.0, "below rope.high_freq_factor (4.0)"),
        ("rope.original_max_position_embeddings", 0, "at least 1"),
    ],
)
def test_nonsense_architectures_are_refused(name, value, right):
    config = get_config("llama_3_1_8b")
    config.model.weights = "dummy"
    *owners, field = name.split(".")
    setattr(functools.reduce(getattr, owners, config.model.architecture), field, value)
    message = f"--config.model.architecture.{name} is {value!r}; it must be {right}"
    with pytest.raises(ConfigError, match=re.escape(message)):
        validate(config)


def test_demo_config_finds_its_model_from_any_working_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = from_flags("demo")
    validate(config)
    assert read_model_folder(config.model.path).architecture.vocab_size == 4096


@pytest.mark.parametrize(
    ("flag", "value", "right"),
    [
        ("cache.host_bytes", 0, "positive"),
        ("scheduler.max_host_requests", 0, "1 to 4096"),
        ("scheduler.cohorts", 0, "at least 1"),
        ("scheduler.passes", 0, "at least 1"),
        ("host.threads", 0, "1 to 1024"),
        ("host.numa_node", -1, "at least 0"),
        ("host.isa", "sse9", "empty or one of avx512, avx2, neon, portable"),
    ],
)
def test_settings_of_the_host_lane_have_ranges(flag, value, right):
    config = get_config("demo")
    owner, field = flag.split(".")
    setattr(getattr(config, owner), field, value)
    with pytest.raises(
        ConfigError, match=re.escape(f"--config.{flag} is {value!r}; it must be {right}")
    ):
        validate(config)


@pytest.mark.parametrize(
    ("text", "cpus"),
    [("", ()), ("  ", ()), ("3", (3,)), ("2,4-7", (2, 4, 5, 6, 7)), ("9, 0-1 \n", (9, 0, 1))],
)
def test_cpus_are_listed_as_linux_does(text, cpus):
    assert parse_cpus(text) == cpus


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("2,,4", "'' is neither a CPU nor a range of them"),
        ("2;4", "'2;4' is neither a CPU"),
        ("-1", "'-1' is neither a CPU"),
        ("1-2-3", "'1-2-3' is neither a CPU"),
        ("7-4", "'7-4' ends before it begins"),
        ("1-3,2", "it names a CPU twice"),
    ],
)
def test_a_wrong_list_of_cpus_is_refused(text, reason):
    config = get_config("demo")
    config.host.cpus = text
    message = f"--config.host.cpus is {text!r}: {reason}"
    with pytest.raises(ConfigError, match=re.escape(message) + ".*such as 2,4-7"):
        validate(config)


def test_a_numa_node_comes_instead_of_cpus():
    config = get_config("demo")
    config.host.numa_node, config.host.cpus = 0, "1"
    with pytest.raises(ConfigError, match=r"host\.numa_node is 0; .* left out where host\.cpus"):
        validate(config)


def test_only_device_only_has_no_host_lane():
    have_one = [one for one in STRATEGIES if SchedulerConfig(strategy=one).has_host_lane]
    assert have_one == [one for one in STRATEGIES if one != "device_only"]


def test_fields_that_are_none_can_be_overridden():
    config = from_flags(
        "default",
        "--config.cache.device_bytes=5",
        "--config.model.path=/x",
        "--config.scheduler.max_model_len=7",
        "--config.compile.layers_per_program=3",
        "--config.cache.device_fraction=0.5",
    )
    assert config.cache.device_bytes == 5
    assert config.model.path == "/x"
    assert config.scheduler.max_model_len == 7
    assert config.compile.layers_per_program == 3
    assert config.cache.device_fraction == 0.5


def test_every_plain_setting_is_a_flag():
    """Whatever is added to the config: its type is one that ml_collections parses."""

    def paths(owner, prefix):
        hints = typing.get_type_hints(type(owner))
        for field in dataclasses.fields(owner):
            value, kinds = getattr(owner, field.name), typing.get_args(hints[field.name])
            if dataclasses.is_dataclass(value):
                yield from paths(value, f"{prefix}{field.name}.")
            elif LlamaConfig not in kinds:
                kind = next(iter(kinds), hints[field.name])
                yield f"{prefix}{field.name}", kind

    for path, kind in paths(Config(), ""):
        text = {int: "3", float: "0.25", str: "word", bool: "true"}[kind]
        config: object = from_flags("default", f"--config.{path}={text}")
        for name in path.split("."):
            config = getattr(config, name)
        assert config == kind(text if kind is not bool else True), path


def test_nested_architecture_can_be_overridden_where_it_is_given():
    model = from_flags(
        "llama_3_1_8b",
        "--config.model.architecture.num_layers=2",
        "--config.model.architecture.rope.factor=16.0",
        "--config.model.architecture.tie_embeddings=true",
    ).model.architecture
    assert (model.num_layers, model.rope.factor, model.tie_embeddings) == (2, 16.0, True)
    assert model.d_model == 4096


def test_nested_architecture_can_be_dropped():
    config = from_flags("llama_3_8b", "--config.model.architecture=none")
    assert config.model.architecture is None


def test_a_value_of_the_wrong_type_is_refused():
    with pytest.raises(flags.IllegalFlagValueError, match="invalid literal for int"):
        from_flags("default", "--config.cache.device_bytes=abc")


@pytest.mark.parametrize(
    ("text", "num_bytes"),
    [
        ("5", 5),
        ("7B", 7),
        ("3GiB", 3 * 2**30),
        ("512 mib", 512 * 2**20),
        ("1.5GB", 1_500_000_000),
        ("0.25KiB", 256),
        ("2TB", 2 * 10**12),
    ],
)
def test_sizes_are_read_as_people_write_them(text, num_bytes):
    assert read_size("x", text) == num_bytes


@pytest.mark.parametrize("text", ["", "GiB", "3G", "1.5", "0.5B", "-1GiB", "3 4", "1e9", "3GiBs"])
def test_what_is_no_size_is_refused(text):
    with pytest.raises(ConfigError, match=f"x is {text!r}; it must be .* such as 3GiB, 512MiB or"):
        read_size("x", text)


def test_an_unknown_field_is_refused():
    with pytest.raises(KeyError, match="device_byte"):
        from_flags("default", "--config.cache.device_byte=5")


def test_recalibrating_for_a_strategy_that_predicts_nothing_is_refused():
    config = Config(model=get_config("llama_3_2_1b").model)
    config.model.weights, config.profile.recalibrate = "dummy", True
    config.scheduler.strategy = "apex"
    validate(config)
    config.scheduler.strategy = "staggered"
    with pytest.raises(ConfigError, match="recalibrate is True; it must be left out: staggered"):
        validate(config)
