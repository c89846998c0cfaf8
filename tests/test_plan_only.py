"""--plan_only: what a job would come to, in words, and what it refuses."""

import json
import re

import pytest

from apex_jax.config import STRATEGIES, Config, ConfigError, LlamaConfig, ModelConfig
from configs.llama_3_2_3b import get_config
from launch.plan_only import plan, read_job

SHAPE = LlamaConfig(
    num_layers=32,
    d_model=4096,
    d_ffn=11008,
    num_heads=32,
    num_kv_heads=32,
    head_dim=128,
    vocab_size=32000,
    max_position_embeddings=4096,
)


@pytest.fixture
def config():
    return Config(model=ModelConfig(weights="dummy", architecture=SHAPE))


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "in.jsonl"
    lines = [
        {"custom_id": str(index), "prompt_token_ids": [5] * (300 + index % 3), "max_tokens": 200}
        for index in range(600)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines) + "no json\n")
    return path


def test_a_job_is_read_by_its_lines(config, source):
    job, left_out = read_job(config, source)
    assert job == (600, 301, 200)
    (words,) = left_out
    assert words.startswith("left out   1 of 601 lines, the first: line 601: not JSON")


def test_each_output_of_a_line_is_a_request_and_texts_need_a_tokenizer(config, source):
    lines = [
        {"custom_id": "ids", "prompt_token_ids": [5] * 10, "n": 3, "max_tokens": 20},
        {"custom_id": "text", "prompt": "no tokenizer here"},
    ]
    source.write_text("".join(json.dumps(line) + "\n" for line in lines))
    job, (words,) = read_job(config, source)
    assert job == (3, 10, 20)
    assert "line 2: prompt is text, and there is no tokenizer" in words
    source.write_text(json.dumps(lines[1]) + "\n")
    with pytest.raises(ConfigError, match=r"nothing to plan \(line 1: prompt is text"):
        read_job(config, source)


def test_described_hardware_gives_every_strategy_a_line(config, source):
    words = plan(config, source, "t4", "paper_t4")
    assert words.startswith("job        600 requests, 301 prompt tokens and at most 200 output")
    rates = {
        name: float(rate) for name, rate in re.findall(r"^(\w+) +(\d+\.\d) +\d+ ", words, re.M)
    }
    assert set(rates) == set(STRATEGIES)
    assert list(rates.values()) == sorted(rates.values(), reverse=True)
    assert rates["apex"] >= 0.98 * max(rates.values())
    assert re.search(r"^device_only .* device memory$", words, re.M)
    assert "a job's end, when rows run out, and prefix reuse are left out" in words


def test_budgets_are_those_of_the_settings(config, source):
    config.cache.device_bytes, config.cache.host_bytes = 2**30, 2**31
    words = plan(config, source, "t4", "paper_t4")
    assert "KV cache 1.00 GiB (2048 tokens) on the device, 2.00 GiB (4096 tokens)" in words


def test_this_machine_without_a_profile_says_how_to_get_one(config, source, tmp_path):
    config.profile.cache_dir = str(tmp_path / "profiles")
    config.model.architecture = LlamaConfig(2, 64, 128, 4, 2, 16, 100, 512)
    config.cache.device_bytes = config.cache.host_bytes = 2**20
    words = plan(config, source, None, None)
    assert "profile    none is kept of this engine: python -m launch.run_profiler" in words


def test_a_device_that_holds_everything_needs_no_host_lane(config, source):
    config.model.architecture = LlamaConfig(2, 64, 128, 4, 2, 16, 100, 512)
    words = plan(config, source, None, None)
    assert "not needed: the device holds all that may run, so nobody waits" in words


@pytest.mark.parametrize(
    ("device", "host", "message"),
    [
        ("t5", "paper_t4", "--device_profile is 't5'; there are t4, a10"),
        ("t4", "paper", "--host_profile is 'paper'; there are"),
        ("t4", None, "--device_profile and --host_profile go together"),
    ],
)
def test_unknown_hardware_is_refused(config, source, device, host, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        plan(config, source, device, host)


def test_an_input_without_requests_is_refused(config, tmp_path):
    empty = tmp_path / "empty.jsonl"
    empty.write_text("no json\n")
    with pytest.raises(ConfigError, match="has no line that could run: there is nothing to plan"):
        plan(config, empty, "t4", "paper_t4")
    with pytest.raises(ConfigError, match=r"cannot read --input=.*no.jsonl: No such file"):
        plan(config, tmp_path / "no.jsonl", "t4", "paper_t4")


def test_a_card_that_cannot_hold_the_weights_is_refused(config, source):
    config.model.dtype = "float32"
    with pytest.raises(ConfigError, match=r"which cannot hold 25\.10 GiB of weights"):
        plan(config, source, "t4", "paper_t4")


def test_apex_is_not_predicted_to_use_a_host_lane_that_costs_more_than_it_yields(source):
    config = get_config()
    config.model.weights = "dummy"
    config.cache.device_bytes, config.cache.host_bytes = 3 * 2**30, 1_500_000_000
    line = {"prompt_token_ids": [5] * 600, "max_tokens": 200}
    lines = [json.dumps({"custom_id": str(index), **line}) + "\n" for index in range(100)]
    source.write_text("".join(lines))
    words = plan(config, source, "t4", "paper_t4")
    rates = dict(re.findall(r"^(\w+) +(\d+\.\d) +\d+ ", words, re.M))
    assert float(rates["apex"]) >= float(rates["device_only"])
