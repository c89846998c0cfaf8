"""Tokenizer files: special tokens, what a file may carry besides, wrong files."""

import json

import pytest
from batch_files import write_byte_tokenizer

from apex_jax.config import ConfigError
from apex_jax.request import RequestError
from apex_jax.text.model_text import ModelText, load_tokenizer
from apex_jax.text.tokenizer import JsonTokenizer


@pytest.fixture
def byte_tokenizer(tmp_path):
    return JsonTokenizer(write_byte_tokenizer(tmp_path))


def test_prompt_gets_its_special_tokens(byte_tokenizer):
    assert byte_tokenizer.special_ids == {"<bos>": 256, "<eos>": 257}
    assert byte_tokenizer.encode("ab", add_special_tokens=True)[0] == 256
    assert len(byte_tokenizer.encode("ab", add_special_tokens=True)) == 3
    assert byte_tokenizer.encode("<bos>ab", add_special_tokens=False) == (
        byte_tokenizer.encode("ab", add_special_tokens=True)
    )


def test_truncation_and_padding_in_the_file_are_off(tmp_path):
    path = write_byte_tokenizer(tmp_path)
    item = json.loads(path.read_text())
    item["truncation"] = {
        "direction": "Right",
        "max_length": 4,
        "strategy": "LongestFirst",
        "stride": 0,
    }
    path.write_text(json.dumps(item))
    assert len(JsonTokenizer(path).encode("a" * 50, add_special_tokens=True)) == 51


def test_missing_file_is_no_tokenizer(tmp_path):
    assert load_tokenizer(tmp_path) is None


@pytest.mark.parametrize("data", [b"", b"{", b"{}", b"\xff\xfe", b'{"model": 3}'])
def test_corrupt_file_is_named(tmp_path, data):
    (tmp_path / "tokenizer.json").write_bytes(data)
    with pytest.raises(ConfigError, match=r"tokenizer\.json is not a tokenizer\.json that loads"):
        load_tokenizer(tmp_path)


def test_unreadable_file_is_named(tmp_path):
    (tmp_path / "tokenizer.json").mkdir()
    with pytest.raises(ConfigError, match=r"cannot read .*tokenizer\.json: Is a directory"):
        load_tokenizer(tmp_path)


def test_vocabulary_must_fit_the_model(byte_tokenizer):
    byte_tokenizer.check_vocabulary(300)
    byte_tokenizer.check_vocabulary(256)  # <bos> and <eos> lie outside: refused where used
    assert byte_tokenizer.num_tokens == 258
    with pytest.raises(ConfigError, match=r"token ids up to 255, but .* vocabulary has 200"):
        byte_tokenizer.check_vocabulary(200)


def test_text_without_tokens_is_refused(tmp_path):
    path = write_byte_tokenizer(tmp_path)
    item = json.loads(path.read_text())
    item["post_processor"] = None
    item["normalizer"] = {"type": "Strip", "strip_left": True, "strip_right": True}
    path.write_text(json.dumps(item))
    with pytest.raises(RequestError, match="prompt has no tokens"):
        ModelText(tmp_path, JsonTokenizer(path)).encode("   ")
