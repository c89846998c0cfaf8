"""tokenizer.model files: the tokens that `tokenizers` gives for the same model; files at fault."""

import functools
import json
import pathlib
import sys
import tempfile

import pytest
import tokenizers
from batch_files import write_byte_tokenizer, write_sentence_piece
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers

from apex_jax.config import ConfigError
from apex_jax.text.model_text import load_text, load_tokenizer
from apex_jax.text.sentence_piece import SentencePieceTokenizer

TEXTS = st.text(
    st.characters(exclude_categories=("Cs",)) | st.sampled_from("helo wrd\u00e9\u20ac1"),
    max_size=40,
)


@functools.cache
def llama_tokenizer():
    with tempfile.TemporaryDirectory() as folder:
        return SentencePieceTokenizer(write_sentence_piece(pathlib.Path(folder)))


@functools.cache
def converted():
    """The same model as transformers converts Llama's: pieces, and merges in their order."""
    processor = llama_tokenizer()._processor
    pieces = [processor.id_to_piece(index) for index in range(processor.vocab_size())]
    vocab = {piece: index for index, piece in enumerate(pieces)}
    merges = [
        (piece[:cut], piece[cut:])
        for piece in pieces[3 + 256 :]
        for cut in range(1, len(piece))
        if piece[:cut] in vocab and piece[cut:] in vocab
    ]
    model = models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("\u2581", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    return tokenizer


@given(TEXTS)
def test_tokens_are_those_of_tokenizers(text):
    ids = llama_tokenizer().encode(text, add_special_tokens=False)
    assert list(ids) == converted().encode(text).ids
    assert llama_tokenizer().decode(ids) == converted().decode(ids) == text


@given(st.lists(st.sampled_from(["hello", " ", "[INST]", "<s>", "</s>", "\n", "a  b"]), max_size=8))
def test_special_tokens_in_a_text_are_found(parts):
    text = "".join(parts)
    ids = llama_tokenizer().encode(text, add_special_tokens=False)
    assert list(ids) == converted().encode(text).ids


def test_prompts_begin_with_bos(tmp_path):
    path = write_sentence_piece(tmp_path)
    text = load_text(tmp_path)
    assert text.tokenizer.path == path
    ids = text.encode("hello world")
    assert ids[0] == text.tokenizer.special_ids["<s>"] == 1
    assert text.tokenizer.decode(ids) == "hello world"
    settings = {"add_bos_token": False, "add_eos_token": True}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    assert load_text(tmp_path).encode("hello world") == (*ids[1:], 2)


def test_tokens_added_later_have_no_text(tmp_path):
    write_sentence_piece(tmp_path)
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<s>": 1, "[PAD]": 420}))
    added = {"421": {"content": "<|im_end|>"}, "1": {"content": "<s>"}}
    config = {"added_tokens_decoder": added}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.num_tokens == 422
    tokenizer.check_vocabulary(420)
    with pytest.raises(ConfigError, match=r"token ids up to 419, but .* vocabulary has 419"):
        tokenizer.check_vocabulary(419)
    ids = tokenizer.encode("hello<|im_end|>[PAD]", add_special_tokens=False)
    assert ids[-2:] == (421, 420)
    assert tokenizer.decode((*ids, 500)) == "hello"


def test_a_unigram_model_normalizes_as_it_was_trained_to(tmp_path):
    write_sentence_piece(
        tmp_path,
        model_type="unigram",
        vocab_size=80,
        byte_fallback=False,
        normalization_rule_name="nmt_nfkc",
        remove_extra_whitespaces=True,
    )
    tokenizer = load_tokenizer(tmp_path)
    ids = tokenizer.encode("  hello \uff57orld\u3000 \u5b57", add_special_tokens=False)
    assert tokenizer.decode(ids) == "hello world "  # what it has no token for has no text


def test_tokenizer_json_comes_first(tmp_path):
    write_sentence_piece(tmp_path)
    path = write_byte_tokenizer(tmp_path)
    assert load_tokenizer(tmp_path).path == path


@pytest.mark.parametrize("data", [b"", b"x", b"IQ== 0\nIg== 1\n"])
def test_a_file_of_another_kind_is_named(tmp_path, data):
    (tmp_path / "tokenizer.model").write_bytes(data)
    message = r"tokenizer\.model is not a sentencepiece model that loads .*; Llama 3's file of this"
    with pytest.raises(ConfigError, match=message):
        load_tokenizer(tmp_path)


def test_a_missing_library_is_named(tmp_path, monkeypatch):
    write_sentence_piece(tmp_path)
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    message = r"tokenizer\.model needs the sentencepiece library: pip install sentencepiece, or"
    with pytest.raises(ConfigError, match=message):
        load_tokenizer(tmp_path)
