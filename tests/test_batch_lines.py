"""Input lines: both formats, every refusal by name, and nothing in a line that raises."""

import dataclasses
import io
import json
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from apex_jax.batch import lines as batch_lines
from apex_jax.batch.chat_fields import CHAT_FIELDS
from apex_jax.batch.fields import BODY_FIELDS, NEUTRAL_VALUES, SAMPLING_FIELDS
from apex_jax.batch.lines import (
    BadLine,
    BatchRequest,
    check_defaults,
    derive_seed,
    parse_line,
    read_lines,
)
from apex_jax.config import ConfigError, SamplingDefaults
from apex_jax.request import SamplingParams
from apex_jax.text.chat import Chat

DEFAULTS = SamplingDefaults()
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=8,
)


def parse(item, defaults=DEFAULTS):
    data = item if isinstance(item, bytes) else json.dumps(item).encode()
    (raw,) = read_lines(io.BytesIO(data))
    return parse_line(raw, defaults)


def refusal(item) -> str:
    entry = parse(item)
    assert isinstance(entry, BadLine), entry
    assert len(entry.message) < 800
    return entry.message


def plain(**fields) -> dict:
    return {"custom_id": "a", "prompt": "hi", **fields}


def openai(**body) -> dict:
    body = {"model": "m", "prompt": "hi", **body}
    return {"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": body}


def test_both_formats_say_the_same():
    fields = {
        "max_tokens": 3,
        "temperature": 0,
        "top_k": 5,
        "top_p": 0.5,
        "seed": 9,
        "stop_token_ids": [1, 2],
        "ignore_eos": True,
        "stop": ["x", "yy"],
        "include_stop_str_in_output": True,
        "min_p": 0.25,
        "min_tokens": 2,
        "presence_penalty": -2,
        "frequency_penalty": 0.5,
        "repetition_penalty": 1.5,
        "logit_bias": {"17": -100, "5": 2.5},
        "bad_words": ["no", [3, 4]],
        "logprobs": 5,
        "prompt_logprobs": 0,
        "n": 4,
    }
    one, two = parse(plain(**fields)), parse(openai(**fields))
    assert (one.model, two.model) == (None, "m")
    assert one == dataclasses.replace(two, model=None)
    assert isinstance(one, BatchRequest)
    assert one.sampling == SamplingParams(
        max_tokens=3,
        temperature=0.0,
        top_k=5,
        top_p=0.5,
        seed=9,
        stop_token_ids=(1, 2),
        ignore_eos=True,
        min_p=0.25,
        min_tokens=2,
        presence_penalty=-2.0,
        frequency_penalty=0.5,
        repetition_penalty=1.5,
        logit_bias={17: -100.0, 5: 2.5},
        bad_words=("no", (3, 4)),
        logprobs=5,
        prompt_logprobs=0,
        n=4,
        stop=("x", "yy"),
        include_stop_str_in_output=True,
    )
    assert set(fields) == set(SAMPLING_FIELDS)


def test_defaults_and_nulls():
    defaults = SamplingDefaults(max_tokens=7, temperature=0.25, top_k=3, top_p=0.5, seed=1)
    one = parse(plain(), defaults)
    nulls = plain(**dict.fromkeys((*SAMPLING_FIELDS, *NEUTRAL_VALUES)))
    assert parse(nulls, defaults) == one
    seed = derive_seed(1, "a")
    assert one.sampling == SamplingParams(7, 0.25, 3, 0.5, seed)
    modifiers = {
        "min_p": 0.5,
        "min_tokens": 2,
        "presence_penalty": 1.0,
        "frequency_penalty": -1.0,
        "repetition_penalty": 2.0,
    }
    modified = parse(plain(max_tokens=3), SamplingDefaults(**modifiers))
    assert modified == parse(plain(max_tokens=3, **modifiers))
    assert modified.sampling.repetition_penalty == 2.0
    assert parse(plain(min_p=0.0), SamplingDefaults(min_p=0.5)).sampling.min_p == 0.0


@pytest.mark.parametrize(
    ("stop", "expected"),
    [("x", ("x",)), (["x"], ("x",)), ([], ()), (list("abcde"), tuple("abcde"))],
)
def test_stop_forms(stop, expected):
    assert parse(plain(stop=stop)).sampling.stop == expected


def chat(*messages, **fields) -> dict:
    said = messages or ({"role": "user", "content": "hi"},)
    return {"custom_id": "a", "messages": list(said), **fields}


def openai_chat(item) -> dict:
    body = {key: value for key, value in item.items() if key != "custom_id"}
    return {"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": body}


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, None),
        ({"logprobs": False, "top_logprobs": 0}, None),
        ({"logprobs": True}, 0),
        ({"logprobs": True, "top_logprobs": 20}, 20),
    ],
)
def test_logprobs_of_a_chat(fields, expected):
    assert parse(chat(**fields)).sampling.logprobs == expected


def test_both_formats_of_a_chat_say_the_same():
    item = chat(
        {"role": "system", "content": ""},
        {"role": "user", "content": [{"type": "text", "text": x} for x in ("a", "", "b")]},
        {"role": "assistant", "content": "c", "name": "d", "refusal": None, "tool_calls": []},
        max_completion_tokens=7,
        temperature=0,
        tools=[],
        tool_choice="none",
        response_format={"type": "text"},
        chat_template_kwargs={"date_string": "today"},
    )
    one, two = parse(item), parse(openai_chat(item))
    assert one == two
    assert one.prompt == Chat(
        (
            {"role": "system", "content": ""},
            {"role": "user", "content": "a\n\nb"},
            {"role": "assistant", "content": "c", "name": "d"},
        ),
        {"date_string": "today"},
    )
    assert one.sampling.max_tokens == 7
    del item["max_completion_tokens"]
    assert parse({**item, "max_tokens": 7}) == one
    assert parse({**item, "max_tokens": 7, "max_completion_tokens": 7}) == one
    assert parse({**openai_chat({**item, "max_tokens": 7}), "url": None}) == one
    assert parse({**item, "max_tokens": 7, "chat_template_kwargs": None}).sha256 != one.sha256
    assert parse(chat()).sha256 != parse(plain()).sha256


@pytest.mark.parametrize(
    ("item", "message"),
    [
        (chat(messages=None), "messages is null; it must be an array of messages"),
        (chat(messages="hi"), "messages is 'hi'; it must be an array of messages"),
        (chat(messages=[]), "messages is empty"),
        (chat("hi"), "messages[0] is 'hi'; it must be an object"),
        (chat({"content": "x"}), "messages[0].role is null: known are system, developer, user"),
        (chat({"role": "usr", "content": "x"}), "messages[0].role is 'usr': did you mean user?"),
        (chat({"role": "user"}), "messages[0].content is null; it must be a string or an array"),
        (chat({"role": "user", "content": 3}), "messages[0].content is 3; it must be a string"),
        (
            chat({"role": "user", "content": "a\ud800"}),
            "messages[0].content has half a surrogate pair",
        ),
        (
            chat({"role": "user", "content": ["x"]}),
            "messages[0].content[0] is 'x'; it must be an object",
        ),
        (
            chat({"role": "user", "content": [{"type": "image_url", "image_url": {}}]}),
            "messages[0].content[0] is of type 'image_url'; this version reads text only",
        ),
        (
            chat({"role": "user", "content": [{"type": "text"}]}),
            "messages[0].content[0].text is null; it must be a string",
        ),
        (
            chat({"role": "user", "content": [{"type": "text", "text": "x", "z": 1}]}),
            "messages[0].content[0] has an unknown field 'z'",
        ),
        (
            chat({"role": "assistant", "content": "", "tool_calls": [{}]}),
            "messages[0].tool_calls is an array of 1, which this version does not do",
        ),
        (
            chat({"role": "user", "content": "", "contents": 1}),
            "messages[0] has an unknown field 'contents': did you mean content?",
        ),
        (chat({"role": "user", "content": "", "name": 3}), "messages[0].name is 3; it must be a"),
        (chat(tools=[{}]), "tools is an array of 1, which this version does not do"),
        (chat(response_format={"type": "json_object"}), "response_format is an object of 1 fields"),
        (chat(n=200), "n is 200; it must be between 1 and 128"),
        (chat(chat_template_kwargs=[]), "chat_template_kwargs is an array of 0; it must be an"),
        (chat(chat_template_kwargs={"tools": 1}), "chat_template_kwargs may not set tools"),
        (
            chat(max_tokens=1, max_completion_tokens=2),
            "max_tokens is 1 and max_completion_tokens 2: they mean the same, give one of them",
        ),
        (chat(max_completion_tokens=0), "max_tokens is 0; it must be at least 1"),
        (chat(logprobs=3), "logprobs is 3; it must be true or false"),
        (chat(top_logprobs=3), "top_logprobs is 3: it needs logprobs, as true"),
        (chat(logprobs=True, top_logprobs=21), "top_logprobs is 21; it must be between 0 and 20"),
        (chat(logprobs=True, top_logprobs="x"), "top_logprobs is 'x'; it must be an integer"),
        (chat(suffix="x"), "unknown field 'suffix'"),
        (chat(prompt="x"), "unknown field 'prompt': /v1/chat/completions takes messages"),
        (chat(mesages=[]), "unknown field 'mesages': did you mean messages?"),
    ],
)
def test_chats_are_refused_by_name(item, message):
    assert message in refusal(item)
    assert message in refusal(openai_chat(item))


def test_seeds_differ_between_requests_and_jobs_only():
    assert derive_seed(0, "a") == derive_seed(0, "a") == 8342909361095637454
    assert len({derive_seed(job, name) for job in (0, 1) for name in "abc"}) == 6


def test_hash_covers_the_resolved_request():
    base = parse(plain())
    assert parse(plain(max_tokens=16, temperature=1)).sha256 == base.sha256
    assert parse(openai()).sha256 == base.sha256
    assert parse(plain(user="someone", metadata={"a": 1})).sha256 == base.sha256
    others = [
        parse(item).sha256
        for item in (
            plain(prompt="ho"),
            plain(max_tokens=17),
            plain(ignore_eos=True),
            plain(seed=1),
            plain(custom_id="b"),
            plain(min_p=0.5),
            plain(logit_bias={"1": 1}),
            plain(bad_words=["x"]),
            plain(logprobs=0),
            {"custom_id": "a", "prompt": [1, 2]},
        )
    ]
    assert len({base.sha256, *others}) == 11


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ({"prompt": "x"}, "x"),
        ({"prompt": ["x"]}, "x"),
        ({"prompt": [1, 2]}, (1, 2)),
        ({"prompt": [[1, 2]]}, (1, 2)),
        ({"prompt_token_ids": [0]}, (0,)),
    ],
)
def test_prompt_forms(prompt, expected):
    assert parse({"custom_id": "a", **prompt}).prompt == expected


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"prompt": ""}, "prompt is empty"),
        ({"prompt": []}, "prompt is empty"),
        ({"prompt": [""]}, "prompt is empty"),
        ({"prompt": [[]]}, "prompt is empty"),
        ({"prompt": 3}, "prompt is 3; it must be a string or an array of token ids"),
        ({"prompt": ["a", "b"]}, "prompt is an array of 2 prompts; this version takes one a line"),
        ({"prompt": [1, "a"]}, "prompt[1] is 'a'; it must be an integer"),
        ({"prompt": [1, True]}, "prompt[1] is true; it must be an integer"),
        ({"prompt": [-1]}, "prompt[0] is -1, which is no token id"),
        ({"prompt": None}, "give prompt or prompt_token_ids; the line has neither"),
        ({"prompt_token_ids": [1]}, "give prompt or prompt_token_ids; the line has both"),
        ({"prompt": None, "prompt_token_ids": "x"}, "prompt_token_ids is 'x'; it must be an array"),
        ({"prompt": None, "prompt_token_ids": [[1]]}, "prompt_token_ids is an array of 1 prompts"),
        ({"prompt": "a\ud800"}, "prompt has half a surrogate pair at character 1"),
        ({"custom_id": "\udc00"}, "custom_id has half a surrogate pair at character 0"),
        ({"custom_id": None}, "custom_id is missing"),
        ({"custom_id": 3}, "custom_id is 3; it must be a string"),
        ({"custom_id": ""}, "custom_id is empty"),
        ({"max_tokens": 0}, "max_tokens is 0; it must be at least 1"),
        ({"max_tokens": 5.0}, "max_tokens is 5.0; it must be an integer"),
        ({"max_tokens": "5"}, "max_tokens is '5'; it must be an integer"),
        ({"max_tokens": True}, "max_tokens is true; it must be an integer"),
        ({"temperature": -1}, "temperature is -1.0; it must be between 0 and 100"),
        ({"temperature": "hot"}, "temperature is 'hot'; it must be a number"),
        ({"temperature": 10**400}, "temperature is a number of 1329 bits; it is out of range"),
        ({"temperature": False}, "temperature is false; it must be a number"),
        ({"top_k": -1}, "top_k is -1; it must be at least 0 (0 is off)"),
        ({"top_p": 0}, "top_p is 0.0; it must be above 0 and at most 1"),
        ({"seed": 2**64}, "seed is 18446744073709551616; it must be a 64-bit integer"),
        ({"seed": 0.5}, "seed is 0.5; it must be an integer"),
        ({"stop_token_ids": 3}, "stop_token_ids is 3; it must be an array of token ids"),
        ({"stop_token_ids": [2**40]}, "stop_token_ids[0] is 1099511627776, which is no token id"),
        ({"ignore_eos": 1}, "ignore_eos is 1; it must be true or false"),
        ({"n": 0}, "n is 0; it must be between 1 and 128"),
        ({"n": 129}, "n is 129; it must be between 1 and 128"),
        ({"n": True}, "n is true; it must be an integer"),
        ({"n": 2.0}, "n is 2.0; it must be an integer"),
        ({"best_of": 3}, "best_of is 3, which this version does not do: n gives all of them"),
        ({"stream": True}, "stream is true, which this version does not do"),
        ({"stop": 3}, "stop is 3; it must be a string or an array of strings"),
        ({"stop": ""}, "stop is empty"),
        ({"stop": ["x", ""]}, "stop[1] is empty"),
        ({"stop": ["x", None]}, "stop[1] is null; it must be a string"),
        ({"stop": "a\ud800"}, "stop has half a surrogate pair at character 1"),
        ({"include_stop_str_in_output": 1}, "include_stop_str_in_output is 1; it must be true or"),
        ({"model": 3}, "model is 3; it must be a string"),
        ({"logprobs": True}, "logprobs is true; it must be an integer"),
        ({"logprobs": 21}, "logprobs is 21; it must be between 0 and 20"),
        ({"top_logprobs": 2}, "unknown field 'top_logprobs': /v1/completions calls it logprobs"),
        ({"prompt_logprobs": -1}, "prompt_logprobs is -1; it must be between 0 and 20"),
        ({"echo": True}, "echo is true"),
        ({"suffix": "x"}, "suffix is 'x'"),
        ({"logit_bias": [1]}, "logit_bias is an array of 1; it must be an object of token ids to"),
        ({"logit_bias": {"a": 2}}, "logit_bias has the key 'a', which is no token id"),
        ({"logit_bias": {"-1": 2}}, "logit_bias has the key '-1', which is no token id"),
        ({"logit_bias": {"9" * 10: 2}}, "logit_bias has the key '9999999999', which is no token"),
        ({"logit_bias": {"7": 1, "07": 2}}, "logit_bias has token id 7 twice"),
        ({"logit_bias": {"7": "x"}}, "logit_bias[7] is 'x'; it must be a number"),
        ({"logit_bias": {"7": 101}}, "logit_bias[7] is 101.0; it must be between -100 and 100"),
        (
            {"logit_bias": {str(index): 1 for index in range(1025)}},
            "logit_bias is a list of 1025; it must be one of at most 1024",
        ),
        ({"presence_penalty": 2.5}, "presence_penalty is 2.5; it must be between -2 and 2"),
        ({"frequency_penalty": -3}, "frequency_penalty is -3.0; it must be between -2 and 2"),
        ({"repetition_penalty": 0}, "repetition_penalty is 0.0; it must be between 0.01 and 100"),
        ({"min_p": 1.5}, "min_p is 1.5; it must be between 0 and 1"),
        ({"min_tokens": -1}, "min_tokens is -1; it must be between 0 and max_tokens, which is 16"),
        ({"min_tokens": 17}, "min_tokens is 17; it must be between 0 and max_tokens, which is 16"),
        ({"bad_words": "x"}, "bad_words is 'x'; it must be an array of texts or token ids"),
        ({"bad_words": [""]}, "bad_words[0] is empty"),
        ({"bad_words": ["x", []]}, "bad_words[1] is (); it must be text or token ids"),
        ({"bad_words": [[1, "x"]]}, "bad_words[0][1] is 'x'; it must be an integer"),
        ({"bad_words": [3]}, "bad_words[0] is 3; it must be a string"),
        ({"max_tokes": 3}, "unknown field 'max_tokes': did you mean max_tokens?"),
        ({"temprature": 3}, "unknown field 'temprature': did you mean temperature?"),
        ({"max_completion_tokens": 3}, "/v1/completions calls it max_tokens"),
        ({"zzzz": 3}, "unknown field 'zzzz': known are "),
    ],
)
def test_refused_by_name(fields, message):
    assert message in refusal(plain(**fields))
    if "custom_id" not in fields:
        assert message in refusal(openai(**fields))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"url": "/v1/chat/completions"}, "field 'prompt': /v1/chat/completions takes messages"),
        ({"url": "/v1/embeddings"}, "url is '/v1/embeddings'; this version serves /v1/completions"),
        ({"body": {"messages": []}}, "field 'messages': /v1/chat/completions takes it"),
        ({"url": 3}, "url is 3; this version serves /v1/completions"),
        ({"method": "GET"}, "method is 'GET'; it must be POST"),
        ({"body": None}, "body is null; it must be an object"),
        ({"body": [1]}, "body is an array of 1; it must be an object"),
        ({"boddy": {}}, "the line has an unknown field 'boddy': did you mean body?"),
        ({"max_tokens": 3}, "the line has an unknown field 'max_tokens'"),
    ],
)
def test_openai_envelope(fields, message):
    assert message in refusal({**openai(), **fields})


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"{", "not JSON: Expecting property name"),
        (b"hello", "not JSON: Expecting value at character 0"),
        (b'{"a": 1} x', "not JSON: Extra data at character 9"),
        (b"[1]", "the line is an array of 1; it must be an object"),
        (b"null", "the line is null; it must be an object"),
        (b"\xff\xfe", "not UTF-8: invalid start byte at byte 0"),
        (b'{"custom_id": "a", "custom_id": "b"}', "the field 'custom_id' stands twice"),
        (b'{"temperature": NaN}', "NaN is no JSON number"),
        (b'{"temperature": -Infinity}', "-Infinity is no JSON number"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"seed": ' + b"9" * 5000 + b"}", "not JSON that can be read: Exceeds the limit"),
        (
            b'{"custom_id": "a", "prompt": "x", "temperature": 1e999}',
            "temperature is inf; it must be a finite",
        ),
    ],
)
def test_what_is_no_request_at_all(data, message):
    assert message in refusal(data)


def test_bad_line_keeps_its_id_where_it_has_one():
    assert parse(plain(n=0)).custom_id == "a"
    assert parse({"prompt": "x"}).custom_id is None


def test_byte_order_mark_and_line_ends():
    text = "\ufeff" + json.dumps(plain()) + "\r\n\r\n  \n" + json.dumps(plain(custom_id="b"))
    first, second = read_lines(io.BytesIO(text.encode()))
    assert isinstance(parse_line(first, DEFAULTS), BatchRequest)
    assert (first.number, second.number) == (1, 4)
    assert first.num_bytes + second.num_bytes + 5 == len(text.encode())


def test_long_lines_are_not_held(monkeypatch):
    class Watched(io.BytesIO):
        most = 0

        def readline(self, size=-1):
            assert 0 < size <= 101
            return super().readline(size)

    long, short = b"x" * 1000, b"y" * 100
    data = long + b"\n" + short + b"\n" + long
    lines = list(read_lines(Watched(data), max_bytes=100))
    assert [line.data for line in lines] == [None, short, None]
    assert [line.num_bytes for line in lines] == [1001, 101, 1000]
    assert lines[0].sha256 == lines[2].sha256 != lines[1].sha256
    entry = parse_line(lines[0], DEFAULTS)
    assert entry.code == "line_too_long"
    assert entry.message == "the line is 1001 bytes long; at most 16777216 are read"


@pytest.mark.parametrize(
    ("name", "value", "right"),
    [
        ("max_tokens", 0, "at least 1"),
        ("temperature", -0.5, "between 0 and 100"),
        ("top_k", -1, "at least 0 (0 is off)"),
        ("top_p", 2.0, "above 0 and at most 1"),
        ("top_p", float("nan"), "above 0 and at most 1"),
        ("seed", 2**64, "a 64-bit integer"),
        ("min_p", 1.5, "between 0 and 1"),
        ("min_tokens", 17, "between 0 and max_tokens, which is 16"),
        ("presence_penalty", 3.0, "between -2 and 2"),
        ("frequency_penalty", 3.0, "between -2 and 2"),
        ("repetition_penalty", 0.0, "between 0.01 and 100 (1 is off)"),
    ],
)
def test_defaults_out_of_range_are_refused(name, value, right):
    message = re.escape(f"--config.sampling.{name} is {value}; it must be {right}")
    with pytest.raises(ConfigError, match=message):
        check_defaults(dataclasses.replace(DEFAULTS, **{name: value}))


def test_long_lines_differ_by_their_end():
    data = b"x" * 1000 + b"1\n" + b"x" * 1000 + b"2\n"
    one, two = read_lines(io.BytesIO(data), max_bytes=100)
    assert one.sha256 != two.sha256


def test_every_sampling_parameter_has_a_reader():
    for field in dataclasses.fields(SamplingParams):
        assert field.name in BODY_FIELDS
        refusal(plain(**{field.name: {"": 0}}))


@given(JSON)
def test_any_json_yields_a_request_or_an_error(value):
    assert isinstance(parse(value), BadLine)


KNOWN_FIELDS = sorted({"custom_id", "url", "method", "body", *BODY_FIELDS, *CHAT_FIELDS})


@given(st.dictionaries(st.sampled_from(KNOWN_FIELDS), JSON))
def test_any_values_of_known_fields(item):
    for one in (item, plain(**item), {"custom_id": "a", "body": item}, {**chat(), **item}):
        entry = parse(one)
        assert isinstance(entry, BatchRequest) or entry.message


@given(st.binary(max_size=60))
def test_any_bytes(data):
    for raw in read_lines(io.BytesIO(data), max_bytes=20):
        assert isinstance(batch_lines.parse_line(raw, DEFAULTS), BadLine)
