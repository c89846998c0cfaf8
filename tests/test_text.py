"""Text to tokens and back: special tokens, leading spaces, split characters, wrong files."""

import json

import pytest
from batch_files import write_byte_tokenizer, write_sentence_tokenizer

from apex_jax.config import ConfigError
from apex_jax.request import RequestError
from apex_jax.text import Tokenizer, load_tokenizer


@pytest.fixture
def byte_tokenizer(tmp_path):
    return Tokenizer(write_byte_tokenizer(tmp_path))


@pytest.fixture
def sentence_tokenizer(tmp_path):
    return Tokenizer(write_sentence_tokenizer(tmp_path))


def ids_of(tokenizer, *words):
    return tuple(tokenizer._tokenizer.token_to_id(word) for word in words)


def test_prompt_gets_its_special_tokens(byte_tokenizer):
    ids = byte_tokenizer.encode("ab")
    assert ids[0] == ids_of(byte_tokenizer, "<bos>")[0]
    assert len(ids) == 3


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
    assert len(Tokenizer(path).encode("a" * 50)) == 51


def test_leading_space_survives(sentence_tokenizer):
    hello, world = ids_of(sentence_tokenizer, "\u2581hello", "\u2581world")
    assert sentence_tokenizer.decode_after((1, hello), (world, hello)) == " world hello"
    # A prompt without text: the output begins the text, as decoding both together says.
    assert sentence_tokenizer.decode_after((1,), (world,)) == "world"


def test_special_tokens_at_the_end_of_a_prompt_do_not_hide_its_text(sentence_tokenizer):
    hello, world, eos = ids_of(sentence_tokenizer, "\u2581hello", "\u2581world", "</s>")
    assert sentence_tokenizer.decode_after((1, hello, *[eos] * 30), (world,)) == " world"


def test_special_tokens_give_no_text(byte_tokenizer):
    eos, letter = ids_of(byte_tokenizer, "<eos>", "a")
    assert byte_tokenizer.decode_after((letter,), (letter, eos)) == "a"
    assert byte_tokenizer.decode_after((letter,), ()) == ""


def test_character_split_between_prompt_and_output_belongs_to_the_output(byte_tokenizer):
    prompt = byte_tokenizer.encode("x\u20ac")
    assert byte_tokenizer.decode_after(prompt[:-1], prompt[-1:]) == "\u20ac"
    assert byte_tokenizer.decode_after(prompt[:-2], prompt[-2:]) == "\u20ac"


@pytest.mark.parametrize("text", ["plain", " two  spaces", "\n\n", "\u20ac \U0001f600 e\u0301"])
def test_output_continues_any_prompt(byte_tokenizer, text):
    prompt = byte_tokenizer.encode("some prompt, \u00e9 ")
    assert byte_tokenizer.decode_after(prompt, byte_tokenizer.encode(text)[1:]) == text


def test_long_context_starts_in_the_middle_of_a_character(byte_tokenizer):
    prompt = byte_tokenizer.encode("\U0001f600" * 5)  # 8 tokens back is a whole one, 9 is not
    for cut in range(1, 9):
        ids = prompt[:-cut]
        assert byte_tokenizer.decode_after(ids, prompt[-cut:]).endswith("\U0001f600")


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
        Tokenizer(path).encode("   ")
