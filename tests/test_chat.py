"""Chats: templates as transformers renders them, what a sandbox refuses, files and their faults."""

import datetime
import json
import pathlib

import pytest
from batch_files import write_byte_tokenizer

from apex_jax.config import ConfigError
from apex_jax.request import RequestError
from apex_jax.text.chat import Chat, load_chat_template
from apex_jax.text.model_text import load_text

GOLDEN = pathlib.Path(__file__).parent / "chat_golden"
NOW = datetime.datetime(2026, 11, 24, 15, 30)
HELLO = Chat(({"role": "user", "content": "hello"},))


def write_template(folder, template, **settings):
    item = {"chat_template": template, **settings}
    (folder / "tokenizer_config.json").write_text(json.dumps(item))


def render(folder, chat=HELLO):
    template = load_chat_template(folder, NOW)
    assert template is not None
    return template.render(chat)


@pytest.mark.parametrize("path", sorted(GOLDEN.glob("*.json")), ids=lambda path: path.stem)
def test_prompts_are_those_of_transformers(tmp_path, path):
    golden = json.loads(path.read_text())
    bos, eos = golden["bos_token"], golden["eos_token"]
    write_template(tmp_path, golden["chat_template"], bos_token=bos, eos_token=eos)
    template = load_chat_template(tmp_path, NOW)
    assert golden["cases"]
    for case in golden["cases"]:
        chat = Chat(tuple(case["messages"]), case.get("variables", {}))
        if "error" in case:
            with pytest.raises(RequestError) as refused:
                template.render(chat)
            assert str(refused.value) == f"the chat template refuses the messages: {case['error']}"
        else:
            assert template.render(chat) == case["text"]


def test_templates_of_all_three_models_are_there():
    assert {path.stem for path in GOLDEN.glob("*.json")} >= {"llama_2", "llama_3", "tinyllama"}


def test_bos_stands_once(tmp_path):
    write_byte_tokenizer(tmp_path)
    write_template(tmp_path, "{{ bos_token }}{{ messages[0].content }}", bos_token="<bos>")
    text = load_text(tmp_path)
    ids = text.encode(HELLO)
    assert ids[0] == 256
    assert 256 not in ids[1:]
    assert ids == text.encode("hello")


def test_a_template_without_bos_gets_none(tmp_path):
    write_byte_tokenizer(tmp_path)
    write_template(tmp_path, "{{ messages[0].content }}", bos_token="<bos>")
    assert load_text(tmp_path).encode(HELLO) == load_text(tmp_path).encode("hello")[1:]


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ messages.append(1) }}", "SecurityError: "),
        ("{{ messages.__class__.__mro__[1].__subclasses__() }}", "SecurityError: "),
        ("{{ raise_exception.__globals__.json }}", "SecurityError: "),
        ("{% for i in range(1000000000) %}x{% endfor %}", "OverflowError: Range too big"),
        ("{{ 'a' + 1 }}", "TypeError: can only concatenate str"),
        ("{{ missing.field }}", "UndefinedError: 'missing' is undefined"),
    ],
)
def test_what_a_template_may_not_do_is_the_requests_error(tmp_path, template, message):
    write_template(tmp_path, template)
    with pytest.raises(RequestError, match=f"the chat template of .* fails: {message}"):
        render(tmp_path)


def test_a_template_that_does_not_compile_stops_chats_only(tmp_path):
    write_byte_tokenizer(tmp_path)
    write_template(tmp_path, "{% for %}")
    text = load_text(tmp_path)
    assert text.encode("x")
    message = (
        "the chat template of .*tokenizer_config.json does not compile: Expected an expression"
    )
    with pytest.raises(RequestError, match=message):
        text.encode(HELLO)


def test_a_prompt_without_tokens_is_refused(tmp_path):
    write_byte_tokenizer(tmp_path)
    write_template(tmp_path, "")
    with pytest.raises(RequestError, match="the conversation has no tokens"):
        load_text(tmp_path).encode(HELLO)


def test_a_folder_without_template_or_tokenizer(tmp_path):
    with pytest.raises(RequestError, match=r"the conversation is text, and there is no .*r\.json"):
        load_text(tmp_path).encode(HELLO)
    write_byte_tokenizer(tmp_path)
    with pytest.raises(RequestError, match=r"messages need a chat template, and .* has none"):
        load_text(tmp_path).encode(HELLO)


def test_where_the_template_lies(tmp_path):
    assert load_chat_template(tmp_path, NOW) is None
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": "oldest"}))
    assert render(tmp_path) == "oldest"
    named = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "default"}]
    write_template(tmp_path, named)
    assert render(tmp_path) == "default"
    write_template(tmp_path, "one")
    assert render(tmp_path) == "one"
    (tmp_path / "chat_template.jinja").write_text("newest: {{ bos_token }} {{ pad_token }}")
    specials = {"bos_token": "<other>", "pad_token": "<pad>"}
    (tmp_path / "special_tokens_map.json").write_text(json.dumps(specials))
    write_template(tmp_path, "one", bos_token={"content": "<s>", "lstrip": False}, pad_token=None)
    assert render(tmp_path) == "newest: <s> <pad>"


def test_a_list_without_a_default_is_no_template(tmp_path):
    write_template(tmp_path, [{"name": "tool_use", "template": "tools"}])
    assert load_chat_template(tmp_path, NOW) is None


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("tokenizer_config.json", b"{", "tokenizer_config.json is not JSON"),
        ("tokenizer_config.json", b"\xff", "tokenizer_config.json is not JSON"),
        ("tokenizer_config.json", b"[]", "tokenizer_config.json holds no JSON object"),
        (
            "tokenizer_config.json",
            b'{"chat_template": 3}',
            "chat_template is neither text nor a list of templates",
        ),
        ("chat_template.jinja", b"\xff", "chat_template.jinja is not UTF-8: invalid start byte"),
    ],
)
def test_corrupt_files_are_named(tmp_path, name, data, message):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ConfigError, match=message):
        load_chat_template(tmp_path, NOW)


def test_the_time_is_that_of_the_job(tmp_path):
    write_template(tmp_path, "{{ strftime_now('%d %b %Y %H:%M') }}")
    template = load_chat_template(tmp_path, NOW)
    assert template.render(HELLO) == "24 Nov 2026 15:30"
    assert template.time == NOW
    write_template(tmp_path, "x")
    assert load_chat_template(tmp_path, NOW).time is None


def test_what_decides_the_prompt_is_in_the_hash(tmp_path):
    hashes = set()
    for template, bos in (("a", "<s>"), ("b", "<s>"), ("a", "<t>")):
        write_template(tmp_path, template, bos_token=bos)
        hashes.add(load_chat_template(tmp_path, NOW).sha256)
    assert len(hashes) == 3
