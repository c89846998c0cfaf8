"""Text of outputs: split characters, leading spaces, stop strings, over random Unicode."""

import functools
import pathlib
import tempfile

import pytest
from batch_files import write_byte_tokenizer, write_sentence_piece, write_sentence_tokenizer
from hypothesis import assume, given
from hypothesis import strategies as st

from apex_jax.text.detokenizer import MAX_WAITING, Detokenizer, decode_output
from apex_jax.text.output_text import OutputText
from apex_jax.text.sentence_piece import SentencePieceTokenizer
from apex_jax.text.tokenizer import JsonTokenizer

DEMO_MODEL = pathlib.Path(__file__).parents[1] / "configs/demo_model"


@functools.cache
def load(kind):
    """`byte`: a token a byte; `sentence`: as Llama 2's, bytes as a fallback; `demo`: trained;
    `model`: a sentencepiece model, trained too.
    """
    if kind == "demo":
        return JsonTokenizer(DEMO_MODEL / "tokenizer.json")
    with tempfile.TemporaryDirectory() as folder:
        if kind == "model":
            return SentencePieceTokenizer(write_sentence_piece(pathlib.Path(folder)))
        write = write_byte_tokenizer if kind == "byte" else write_sentence_tokenizer
        return JsonTokenizer(write(pathlib.Path(folder)))


KINDS = pytest.mark.parametrize("kind", ["byte", "sentence", "demo", "model"])
# Halves of surrogate pairs are no text; U+FFFD is what decoders write for what is no character.
CHARACTERS = st.characters(exclude_categories=("Cs",), exclude_characters="\ufffd")
TEXTS = st.text(CHARACTERS, max_size=30) | st.text("ab \n\u20ac\U0001f600e\u0301", max_size=30)


@pytest.fixture
def byte_tokenizer():
    return load("byte")


@pytest.fixture
def sentence_tokenizer():
    return load("sentence")


def ids_of(tokenizer, *words):
    return tuple(tokenizer._tokenizer.token_to_id(word) for word in words)


def encode(tokenizer, text):
    return tokenizer.encode(text, add_special_tokens=True)


def stream(tokenizer, prompt, token_ids):
    """The pieces that single tokens give, the rest last."""
    detokenizer = Detokenizer(tokenizer, prompt)
    return [*(detokenizer.push(one) for one in token_ids), detokenizer.flush()]


def test_leading_space_survives(sentence_tokenizer):
    hello, world = ids_of(sentence_tokenizer, "\u2581hello", "\u2581world")
    assert decode_output(sentence_tokenizer, (1, hello), (world, hello)) == " world hello"
    # A prompt without text: the output begins the text, as decoding both together says.
    assert decode_output(sentence_tokenizer, (1,), (world,)) == "world"


def test_special_tokens_at_the_end_of_a_prompt_do_not_hide_its_text(sentence_tokenizer):
    hello, world, eos = ids_of(sentence_tokenizer, "\u2581hello", "\u2581world", "</s>")
    assert decode_output(sentence_tokenizer, (1, hello, *[eos] * 30), (world,)) == " world"


def test_special_tokens_give_no_text(byte_tokenizer):
    eos, letter = ids_of(byte_tokenizer, "<eos>", "a")
    assert decode_output(byte_tokenizer, (letter,), (letter, eos)) == "a"
    assert decode_output(byte_tokenizer, (letter,), ()) == ""


def test_character_split_between_prompt_and_output_belongs_to_the_output(byte_tokenizer):
    prompt = encode(byte_tokenizer, "x\u20ac")
    assert decode_output(byte_tokenizer, prompt[:-1], prompt[-1:]) == "\u20ac"
    assert decode_output(byte_tokenizer, prompt[:-2], prompt[-2:]) == "\u20ac"


@pytest.mark.parametrize("text", ["plain", " two  spaces", "\n\n", "\u20ac \U0001f600 e\u0301"])
def test_output_continues_any_prompt(byte_tokenizer, text):
    prompt = encode(byte_tokenizer, "some prompt, \u00e9 ")
    assert decode_output(byte_tokenizer, prompt, encode(byte_tokenizer, text)[1:]) == text


def test_long_context_starts_in_the_middle_of_a_character(byte_tokenizer):
    prompt = encode(byte_tokenizer, "\U0001f600" * 5)  # 8 tokens back is a whole one, 9 is not
    for cut in range(1, 9):
        ids = prompt[:-cut]
        assert decode_output(byte_tokenizer, ids, prompt[-cut:]).endswith("\U0001f600")


@KINDS
@given(TEXTS, st.data())
def test_pieces_make_up_what_decoding_the_whole_gives(kind, text, data):
    tokenizer = load(kind)
    ids = encode(tokenizer, text)
    cut = data.draw(st.integers(0, len(ids)))
    prompt, output = ids[:cut], ids[cut:]
    whole, head = tokenizer.decode(ids), tokenizer.decode(prompt)
    assert "\ufffd" not in whole
    # A character that begins in the prompt belongs to the output.
    num_split = next(n for n in range(4) if not tokenizer.decode(ids[: cut - n]).endswith("\ufffd"))
    if num_split:
        head = tokenizer.decode(ids[: cut - num_split])
    pieces = stream(tokenizer, prompt, output)
    assert "".join(pieces) == whole[len(head) :]
    assert decode_output(tokenizer, prompt, output) == whole[len(head) :]


@KINDS
@given(TEXTS)
def test_every_character_comes_with_its_last_token(kind, text):
    tokenizer = load(kind)
    ids = encode(tokenizer, text)
    pieces = stream(tokenizer, (), ids)
    assert pieces.pop() == ""
    for count in range(len(ids) + 1):
        so_far = "".join(pieces[:count])
        decoded = tokenizer.decode(ids[:count])
        if not decoded.endswith("\ufffd"):
            assert so_far == decoded
        assert tokenizer.decode(ids).startswith(so_far)


@given(st.lists(st.integers(0, 299), max_size=MAX_WAITING - 1), st.integers(0, MAX_WAITING - 1))
def test_any_bytes_are_decoded_as_a_whole_would_be(token_ids, cut):
    tokenizer = load("byte")
    prompt, output = tuple(token_ids[:cut]), tuple(token_ids[cut:])
    head, whole = tokenizer.decode(prompt), tokenizer.decode(token_ids)
    assume(not head.endswith("\ufffd"))
    text = "".join(stream(tokenizer, prompt, output))
    assert text == decode_output(tokenizer, prompt, output) == whole[len(head) :]


@KINDS
@given(st.lists(st.integers(0, 299), max_size=60), st.integers(0, 60))
def test_any_tokens_give_the_same_text_at_once_and_one_by_one(kind, token_ids, cut):
    tokenizer = load(kind)
    prompt, output = tuple(token_ids[:cut]), tuple(token_ids[cut:])
    text = "".join(stream(tokenizer, prompt, output))
    assert decode_output(tokenizer, prompt, output) == text
    whole = tokenizer.decode(token_ids)
    if "\ufffd" not in whole:
        assert whole == tokenizer.decode(prompt) + text


def test_a_stray_byte_leaves_the_characters_before_it_alone(sentence_tokenizer):
    euro, stray, hello = encode(sentence_tokenizer, "\u20ac")[1:], 3 + 0xFF, 259
    assert sentence_tokenizer.decode([*euro, stray, hello]) == "\ufffd" * 4 + " hello"
    assert stream(sentence_tokenizer, (1,), (*euro, stray, hello)) == [
        *("", "", "\u20ac", "", "\ufffd hello", "")
    ]
    assert decode_output(sentence_tokenizer, (1,), (*euro, stray, hello)) == "\u20ac\ufffd hello"


def test_a_stray_byte_of_the_prompt_is_no_output(byte_tokenizer):
    first, *_ = encode(byte_tokenizer, "\u20ac")[1:]
    (letter,) = ids_of(byte_tokenizer, "a")
    assert decode_output(byte_tokenizer, (letter, first), (letter,)) == "a"
    assert decode_output(byte_tokenizer, (letter, first), ()) == ""
    assert decode_output(byte_tokenizer, (letter, first), (first,)) == "\ufffd"


def test_many_stray_bytes_cost_what_other_tokens_do(byte_tokenizer, monkeypatch):
    stray = encode(byte_tokenizer, "\u20ac")[-1]
    num_decoded = 0
    decode = byte_tokenizer.decode

    def count(token_ids):
        nonlocal num_decoded
        num_decoded += len(token_ids)
        return decode(token_ids)

    monkeypatch.setattr(byte_tokenizer, "decode", count)
    assert "".join(stream(byte_tokenizer, (), [stray] * 2000)) == "\ufffd" * 2000
    assert num_decoded < 2000 * (2 * MAX_WAITING + 1)


# --- stop strings ---


def cut_at_stop(text, stop, include):
    """The definition: as if the text came character by character."""
    for end in range(len(text) + 1):
        complete = [one for one in stop if text[:end].endswith(one)]
        if complete:
            found = max(complete, key=len)
            return text[: end if include else end - len(found)], found
    return text, None


def watch(kind, text, stop, *, include=False):
    """Return the text, the stop string, and how many of how many tokens were taken."""
    tokenizer = load(kind)
    ids = encode(tokenizer, text)
    prompt, output = ids[:1], ids[1:]
    watched = OutputText(tokenizer, prompt, stop, include_stop=include)
    count = next((i for i, one in enumerate(output, 1) if watched.push(one)), len(output))
    return watched.end(), watched.stop_string, count, output


@pytest.mark.parametrize("kind", ["byte", "demo", "model"])
@given(st.text("ab\u20ac\U0001f600", max_size=40), st.data())
def test_the_text_ends_at_the_stop_string_that_is_complete_first(kind, text, data):
    stops = st.text("ab\u20ac\U0001f600", min_size=1, max_size=4)
    stop = tuple(data.draw(st.lists(stops, min_size=1, max_size=4)))
    include = data.draw(st.booleans())
    ended, found, count, output = watch(kind, text, stop, include=include)
    assert (ended, found) == cut_at_stop(text, stop, include)
    if found is not None:  # and no token is taken too many
        tokenizer = load(kind)
        assert not any(one in tokenizer.decode(output[: count - 1]) for one in stop)
        assert any(one in tokenizer.decode(output[:count]) for one in stop)


def test_a_stop_string_across_tokens():
    text = "one\n\n\u20actwo\n\nthree"
    assert watch("byte", text, ("\n\n\u20act",))[:3] == ("one", "\n\n\u20act", 3 + 2 + 3 + 1)
    assert watch("byte", text, ("\n\n\u20act",), include=True)[0] == "one\n\n\u20act"
    assert watch("byte", text, ("three!",))[:2] == (text, None)


def test_a_stop_string_within_a_token():
    ids = encode(load("demo"), " return")
    assert len(ids) == 2, "a token of several characters"
    assert watch("demo", "self return", ("ret",))[:2] == ("self ", "ret")


def test_a_stop_string_may_be_a_special_token():
    tokenizer = load("byte")
    watched = OutputText(tokenizer, (256,), ("<eos>",), include_stop=False)
    assert [watched.push(one) for one in (*encode(tokenizer, "ab")[1:], 257)] == [
        *(False, False, True)
    ]
    assert (watched.end(), watched.stop_string) == ("ab", "<eos>")


def test_min_tokens_end_nothing():
    tokenizer = load("byte")
    ids = encode(tokenizer, "abab")[1:]
    taken = {}
    for min_tokens in range(5):
        watched = OutputText(tokenizer, (256,), ("ab",), include_stop=False, min_tokens=min_tokens)
        count = next((i for i, one in enumerate(ids, 1) if watched.push(one)), None)
        taken[min_tokens] = count, watched.end()
    assert taken == {0: (2, ""), 1: (2, ""), 2: (4, "ab"), 3: (4, "ab"), 4: (None, "abab")}
    watched = OutputText(tokenizer, (256,), ("<eos>",), include_stop=False, min_tokens=1)
    assert [watched.push(257), watched.push(257)] == [False, True]


def test_an_unfinished_character_is_shown_where_the_output_ends():
    tokenizer = load("byte")
    watched = OutputText(tokenizer, (256,), ("x",), include_stop=False)
    for one in encode(tokenizer, "a\u20ac")[1:-1]:
        assert not watched.push(one)
    assert watched.text == "a"
    assert watched.end() == "a\ufffd"
