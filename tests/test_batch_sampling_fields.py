"""Bad words and logprobs between a batch line and the engine: text in front, text behind."""

import dataclasses
import json

import numpy as np
import pytest
from batch_files import Job, read_output, write_byte_tokenizer, write_lines
from fake_engine import FakeEngine

from apex_jax.batch.bad_words import resolve_bad_words
from apex_jax.batch.logprobs import TokenTexts, chat_logprobs, completion_logprobs, prompt_logprobs
from apex_jax.request import (
    FinishReason,
    RequestError,
    RequestOutput,
    SamplingParams,
    TokenLogprobs,
)
from apex_jax.text.detokenizer import decode_output
from apex_jax.text.tokenizer import JsonTokenizer


def encode(text):
    return tuple(map(ord, text.replace("?", "")))


def logprobs_of(logprob, **best):
    ids = [int(name.removeprefix("t")) for name in best]
    return TokenLogprobs(logprob, np.array(ids, np.int32), np.array([*best.values()], np.float32))


def test_a_bad_word_is_forbidden_at_the_beginning_and_after_a_space():
    params = SamplingParams(seed=3, bad_words=("  no", "\n", (7, 8)))
    resolved = resolve_bad_words(params, encode)
    words = ((110, 111), (32, 110, 111), (10,), (32, 10), (7, 8))
    assert resolved == dataclasses.replace(params, bad_words=words)
    assert resolve_bad_words(resolved, None) is resolved


def test_bad_words_that_cannot_be_resolved_are_refused():
    with pytest.raises(RequestError, match="bad_words has text, and there is no tokenizer: give"):
        resolve_bad_words(SamplingParams(bad_words=((1,), "no")), None)
    unknown = SamplingParams(bad_words=("?",))
    with pytest.raises(
        RequestError, match="bad_words has '\\?', which the tokenizer has no tokens"
    ):
        resolve_bad_words(unknown, lambda text: encode(text.strip()))


TEXTS = {0: "a", 1: " b", 2: "\ufffd", 3: "\ufffd", 4: "", 5: "a"}


def decode(token_ids):
    return "\u00e9" if token_ids == (2, 3) else "".join(TEXTS[one] for one in token_ids)


def test_tokens_have_their_text_and_where_it_begins():
    texts = TokenTexts(decode)
    assert [texts.name(one) for one in (0, 1, 2, 4)] == ["a", " b", "token_id:2", "token_id:4"]
    # The bytes of one character begin together, and it counts once.
    assert texts.offsets([0, 2, 3, 1, 4, 0, 4]) == [0, 1, 1, 2, 4, 4, 5]
    assert texts.offsets([]) == []
    nameless = TokenTexts(None)
    assert nameless.name(0) == "token_id:0"
    assert nameless.offsets([0, 1]) == [0, 0]


def test_logprobs_are_in_the_form_of_the_completions_api():
    of_tokens = [logprobs_of(-2.0, t1=-0.5, t0=-1.0), logprobs_of(-0.25, t0=-0.25, t5=-4.0)]
    assert completion_logprobs([4, 0], of_tokens, TokenTexts(decode)) == {
        "tokens": ["token_id:4", "a"],
        "token_logprobs": [-2.0, -0.25],
        # The chosen token is there too; of two tokens with one text the better.
        "top_logprobs": [{" b": -0.5, "a": -1.0, "token_id:4": -2.0}, {"a": -0.25}],
        "text_offset": [0, 0],
    }


def test_logprobs_are_in_the_form_of_a_chat():
    of_tokens = [logprobs_of(-2.0, t1=-0.5, t0=-1.0), logprobs_of(-0.25)]
    assert chat_logprobs([4, 0], of_tokens, TokenTexts(decode)) == {
        "content": [
            {
                "token": "token_id:4",
                "logprob": -2.0,
                "bytes": None,
                "top_logprobs": [
                    {"token": " b", "logprob": -0.5, "bytes": [32, 98]},
                    {"token": "a", "logprob": -1.0, "bytes": [97]},
                ],
            },
            {"token": "a", "logprob": -0.25, "bytes": [97], "top_logprobs": []},
        ]
    }


def test_prompt_logprobs_are_in_the_form_of_vllm():
    of_tokens = [logprobs_of(-2.0, t1=-0.5), logprobs_of(-0.25, t0=-0.25)]
    assert prompt_logprobs([0, 4, 0], of_tokens, TokenTexts(decode)) == [
        None,
        {
            "4": {"logprob": -2.0, "decoded_token": "token_id:4"},
            "1": {"logprob": -0.5, "decoded_token": " b"},
        },
        {"0": {"logprob": -0.25, "decoded_token": "a"}},
    ]


class Reporting(FakeEngine):
    """Answers "bc" and its end, with a logprob for each token."""

    def step(self):
        request = self.waiting.pop()
        self.asked = request.sampling
        of_token = logprobs_of(-1.5, t65=-0.5)
        logprobs = None if request.sampling.logprobs is None else (of_token,) * 3
        prompt = (of_token,) if logprobs else None
        times = (0.0, 1.0, 2.0)
        return [
            RequestOutput(request, (66, 67, 257), FinishReason.STOP, *times, 0, 0, logprobs, prompt)
        ]


def test_a_job_takes_bad_words_and_gives_logprobs(tmp_path):
    job = Job(tmp_path)
    tokenizer = JsonTokenizer(write_byte_tokenizer(tmp_path))
    item = {"custom_id": "a", "prompt": "x", "bad_words": ["no"], "logprobs": 1}
    write_lines(job.input, [item, {"custom_id": "b", "prompt": "x"}])
    assert job.run(engine=Reporting) == 0
    plain, asked = sorted(read_output(job.output), key=lambda line: -line["apex"]["line"])
    assert plain["response"]["body"]["choices"][0]["logprobs"] is None
    assert "prompt_logprobs" not in plain["response"]["body"]["choices"][0]
    assert asked["apex"]["sampling"]["bad_words"] == ["no"]
    choice = asked["response"]["body"]["choices"][0]
    texts = [decode_output(tokenizer, (), (token,)) for token in (65, 66, 67)]
    assert choice["logprobs"]["tokens"] == [*texts[1:], "token_id:257"]
    assert choice["logprobs"]["text_offset"] == [0, 1, 2]
    assert choice["logprobs"]["top_logprobs"][0] == {texts[0]: -0.5, texts[1]: -1.5}
    [nothing, of_prompt] = choice["prompt_logprobs"]
    assert nothing is None
    assert of_prompt["65"] == {"logprob": -0.5, "decoded_token": texts[0]}
    # The engine was asked last for the line that came first.
    words = [tuple(tokenizer.encode(text, add_special_tokens=False)) for text in ("no", " no")]
    assert job.engine.asked.bad_words == tuple(words)


def test_a_chat_gives_logprobs(tmp_path):
    job = Job(tmp_path)
    write_byte_tokenizer(tmp_path)
    settings = {"chat_template": "{{ bos_token }}{{ messages[0].content }}", "bos_token": "<bos>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    item = {"custom_id": "a", "messages": [{"role": "user", "content": "x"}]}
    write_lines(job.input, [{**item, "logprobs": True, "top_logprobs": 1}])
    assert job.run(engine=Reporting) == 0
    assert job.engine.asked.logprobs == 1
    (line,) = read_output(job.output)
    content = line["response"]["body"]["choices"][0]["logprobs"]["content"]
    assert [one["logprob"] for one in content] == [-1.5] * 3
    assert [one["logprob"] for one in content[0]["top_logprobs"]] == [-0.5]


def test_a_resumed_job_compares_biases_and_words(tmp_path):
    """They are in the output as JSON has them, and still the same."""
    job = Job(tmp_path)
    item = {"custom_id": "a", "prompt": [1], "logit_bias": {"7": 2}, "bad_words": [[4, 5]]}
    write_lines(job.input, [item])
    assert job.run() == job.run() == 0
    assert job.engine.submitted == []
    write_lines(job.input, [{**item, "logit_bias": {"7": 3}}])
    assert job.run() == 2
    assert "logit_bias.7 was 2.0, now 3.0" in job.said, json.dumps(job.said)
