"""LLM: prompts in, texts out, in bounded memory; what is refused; and that closing frees all."""

import dataclasses
import gc
import itertools
import json
import pathlib
import pickle
import re
import subprocess
import sys
import warnings

import jax
import numpy as np
import pytest
from batch_files import Job, make_config, read_output, write_byte_tokenizer, write_lines
from fake_engine import FakeEngine, fake_tokens
from small_engines import make_hybrid_config

import apex_jax
from apex_jax.config import Config, ConfigError, SchedulerConfig
from apex_jax.llm import LLM, GenerationRequest
from apex_jax.request import FinishReason, RequestError, SamplingParams
from apex_jax.settings import with_settings
from apex_jax.timeline import Timeline

README = pathlib.Path(__file__).parents[1] / "README.md"
GREEDY = SamplingParams(max_tokens=12, temperature=0.0)


class Engines:
    """Stands in for apex_jax.llm.Engine: `last` is the one created last, of the class `kind`."""

    def __init__(self):
        self.kind, self.last = FakeEngine, None

    def create(self, config, on_progress):
        on_progress("the plan")
        self.last = self.kind(config, Timeline())
        return self.last


@pytest.fixture
def engines(monkeypatch):
    engines = Engines()
    monkeypatch.setattr("apex_jax.llm.Engine", engines)
    return engines


@pytest.fixture
def folder(tmp_path):
    write_byte_tokenizer(tmp_path)
    template = "{{ bos_token }}{{ messages[-1].content }}"
    settings = {"chat_template": template, "bos_token": "<bos>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    return tmp_path


@pytest.fixture
def llm(engines, folder):
    with LLM(folder, scheduler={"max_requests": 4, "strategy": "device_only"}) as llm:
        yield llm


# --- what comes out ---


def test_results_are_in_the_order_of_their_prompts(llm):
    prompts = ["hi", "ho", [1, 2], np.arange(3), ({"role": "user", "content": "hi"},)] * 4
    results = llm.generate(prompts, GREEDY)
    assert [result.index for result in results] == list(range(20))
    tokens = [(256, 71, 72), (256, 71, 78), (1, 2), (0, 1, 2), (256, 71, 72)] * 4
    assert [result.details.request.prompt_token_ids for result in results] == tokens
    for result in results:
        (output,) = result.outputs
        assert output.token_ids == fake_tokens(result.details.request)
        assert output.finish_reason == result.details.finish_reason
        assert isinstance(output.text, str)
        assert result.error is None


def test_several_outputs_of_a_prompt(llm):
    params = dataclasses.replace(GREEDY, seed=7)
    alone, several = llm.generate(["hi"] * 2, [params, dataclasses.replace(params, n=3)])
    assert several.outputs[0] == alone.outputs[0]
    assert several.details.request == dataclasses.replace(alone.details.request, request_id="1")
    assert len({output.token_ids for output in several.outputs}) == 3
    (again,) = llm.generate("hi", dataclasses.replace(params, n=3))
    assert again.outputs == several.outputs


def test_outputs_of_a_prompt_are_dropped_together(llm, engines):
    stream = llm.stream(["a"] * 3, dataclasses.replace(GREEDY, n=20))
    assert len(next(stream).outputs) == 20
    stream.close()
    assert engines.last.num_unfinished == 0
    assert len(llm.generate("b")) == 1


def test_one_prompt_and_one_conversation(llm):
    (said,) = llm.generate("hi", GREEDY)
    conversation = [{"role": "user", "content": "hi"}]
    (answered,) = llm.chat(conversation, GREEDY)
    assert answered.outputs == said.outputs
    first, second = llm.chat([conversation, conversation], GREEDY)
    assert first.outputs == answered.outputs
    assert second.details.request.sampling.seed != first.details.request.sampling.seed
    assert llm.chat([]) == llm.generate([]) == []


def test_a_batch_job_and_an_llm_say_the_same(llm, folder):
    job = Job(folder)
    texts = ["one", "two", "three"]
    line = {"max_tokens": 12, "stop": "a", "seed": 5}
    lines = [{"custom_id": text, "prompt": text, **line} for text in texts]
    write_lines(job.input, lines)
    assert job.run(config=make_config(folder), ordered=True) == 0
    written = [item["response"]["body"]["choices"][0] for item in read_output(job.output)]
    params = SamplingParams(max_tokens=12, stop=("a",), seed=5)
    results = llm.generate(texts, [params] * 3)
    for choice, result in zip(written, results, strict=True):
        (output,) = result.outputs
        assert choice["text"] == output.text
        assert choice["token_ids"] == list(output.token_ids)
        assert choice["finish_reason"] == output.finish_reason
        assert choice["stop_reason"] == output.stop_reason


def test_the_example_of_the_readme_runs(engines, folder, monkeypatch, capsys):
    (code,) = re.findall(r"```python\n(from apex_jax import LLM.*?)```", README.read_text(), re.S)
    (folder / "prompts.txt").write_text("first\n\nthird\n")
    monkeypatch.chdir(folder)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # it leaves its file to the interpreter
        exec(code.replace("/models/Llama-3.2-1B-Instruct", str(folder)), {})
        gc.collect()
    assert "1 prompt is empty\n" in capsys.readouterr().out
    assert engines.last.config.scheduler.strategy == "staggered"


def test_results_can_be_pickled(llm):
    results = llm.generate(["x"] * 3, SamplingParams(stop=("a",)))
    assert pickle.loads(pickle.dumps(results)) == results


def test_defaults_come_from_the_settings(engines, folder):
    settings = {"max_tokens": 3, "top_k": 7, "seed": 9, "repetition_penalty": 1.5}
    with LLM(folder, sampling=settings) as llm:
        first, second = (one.details.request.sampling for one in llm.generate(["a", "b"]))
    assert (first.max_tokens, first.top_k, first.seed, first.repetition_penalty) == (3, 7, 9, 1.5)
    assert second.seed not in (0, 9)


def test_results_are_told_as_they_finish(llm):
    told = []
    results = llm.generate([f"prompt {i}" for i in range(30)], GREEDY, on_result=told.append)
    assert told != results
    assert sorted(told, key=lambda result: result.index) == results


# --- streams ---


def test_a_stream_reads_as_far_as_it_must(llm):
    num_read = 0

    def endless():
        nonlocal num_read
        for num_read in itertools.count(1):  # noqa: B007
            yield "prompt"

    stream = llm.stream(endless(), GREEDY)
    for num_results, _ in zip(range(1, 200), stream, strict=False):
        assert num_read - num_results <= 3 * 4 + 4  # waiting, running, finished together
    stream.close()
    assert llm._engine.num_unfinished == 0
    assert len(llm.generate(["again"] * 3, GREEDY)) == 3


def test_a_stream_goes_on_after_what_cannot_run(llm):
    requests = ["good", "", [1] * 500, "half \ud800", 5, [1, True], [], [{"role": "usr"}], "good"]
    results = sorted(llm.stream(iter(requests), GREEDY), key=lambda result: result.index)
    assert [result.error for result in results] == [
        None,
        "prompt is empty",
        "512 tokens, and the limit is 200",
        "prompt has half a surrogate pair at character 5, which is not text",
        "prompt is 5; it must be text, token ids or messages",
        "prompt[1] is true; it must be an integer",
        "prompt is empty",
        "messages[0].role is 'usr': did you mean user?",
        None,
    ]
    assert not results[1].outputs
    assert results[1].details is None


def test_requests_have_parameters_of_their_own(llm):
    requests = [GenerationRequest("x", SamplingParams(max_tokens=n, seed=n)) for n in (5, 6)]
    found = {one.index: one.details.request.sampling for one in llm.stream(requests)}
    assert [found[index] for index in range(2)] == [request.sampling for request in requests]


def test_one_stream_at_a_time(llm):
    stream = llm.stream(["x"] * 9, GREEDY)
    next(stream)
    with pytest.raises(RuntimeError, match="another stream of this LLM is open"):
        llm.generate("y")
    assert len(list(stream)) == 8
    assert len(llm.generate("y")) == 1


# --- what is refused ---


def test_generate_names_the_prompt_that_cannot_run(llm):
    with pytest.raises(RequestError, match="prompt 1: 512 tokens, and the limit is 200"):
        llm.generate(["x", [1] * 500, "y"], GREEDY)
    assert llm._engine.num_unfinished == 0
    with pytest.raises(RequestError, match="2 prompts have 1 sampling parameters"):
        llm.generate(["x", "y"], [GREEDY])
    with pytest.raises(RequestError, match="conversation 0 is no list of messages"):
        llm.chat(["x"])


def test_settings_are_checked_by_name_and_type(engines, folder):
    for settings, message in (
        ({"schedular": {}}, "schedular: there is no such setting; did you mean scheduler?"),
        ({"zzzz": {}}, "zzzz: there is no such setting; known are model, cache, scheduler"),
        ({"scheduler": {"strategie": "x"}}, "scheduler.strategie: .* did you mean scheduler.strat"),
        ({"scheduler": {"max_requests": "4"}}, "scheduler.max_requests is '4'; it must be int"),
        ({"scheduler": {"max_requests": True}}, "scheduler.max_requests is True; it must be int"),
        ({"cache": {"host_bytes": 0.5}}, "cache.host_bytes is 0.5; it must be int or None"),
        ({"cache": {"host_bytes": "3G"}}, "cache.host_bytes is '3G'; it must be a whole number"),
        ({"scheduler": 3}, "scheduler is 3; it must be a mapping of settings or a SchedulerConfig"),
        ({"sampling": {"top_p": 2.0}}, "--config.sampling.top_p is 2.0; it must be above 0"),
    ):
        with pytest.raises(ConfigError, match=message):
            LLM(folder, **settings)
    with pytest.raises(ConfigError, match=r"model is '/nowhere'; there is no such folder"):
        LLM("/nowhere")
    assert engines.last is None


def test_settings_may_be_sections_and_start_from_a_config():
    config = Config()
    section = SchedulerConfig(max_requests=3)
    sections = {"scheduler": section, "cache": {"device_fraction": 1, "host_bytes": None}}
    changed = with_settings(config, sections)
    assert changed.scheduler == section
    assert changed.scheduler is not section
    assert changed.cache.device_fraction == 1
    assert with_settings(config, {"cache": {"host_bytes": "2 GiB"}}).cache.host_bytes == 2**31
    assert config == Config()


def test_a_tokenizer_of_another_model_closes_the_engine(engines, folder):
    class Small(FakeEngine):
        def __init__(self, config, timeline):
            super().__init__(config, timeline)
            small = dataclasses.replace(self.model.architecture, vocab_size=20)
            self.model.architecture = small

    engines.kind = Small
    with pytest.raises(ConfigError, match="vocabulary has 20: they do not belong together"):
        LLM(folder)
    assert engines.last.is_closed


# --- closing ---


def test_a_closed_llm_says_so(engines, folder):
    told = []
    with LLM(folder, on_progress=told.append) as llm:
        assert told == ["the plan"]
        assert llm.metrics()["sweeps"] == 0
        stream = llm.stream(["x"] * 9, GREEDY)
        next(stream)
    assert engines.last.is_closed
    with pytest.raises(RuntimeError, match="this LLM is closed"):
        llm.generate("x")
    with pytest.raises(RuntimeError, match="this LLM is closed"):
        llm.metrics()
    stream.close()
    llm.close()


def test_a_fault_of_the_engine_closes_it(engines, folder):
    class Failing(FakeEngine):
        def step(self):
            raise RuntimeError("the wire is cut")

    engines.kind = Failing
    llm = LLM(folder)
    with pytest.raises(RuntimeError, match="the wire is cut"):
        llm.generate("x")
    assert engines.last.is_closed
    with pytest.raises(RuntimeError, match="this LLM is closed"):
        llm.generate("x")


def count_bytes():
    return sum(one.nbytes for one in jax.live_arrays())


def test_closing_frees_all_memory_and_a_second_engine_does_the_same():
    """With real engines, a host lane among them."""
    config = make_hybrid_config("mha")
    prompts, params = [[1, 2, 3], [4] * 20, [5]], SamplingParams(max_tokens=9, ignore_eos=True)
    before = jax.live_arrays()  # held, so that none of them goes away meanwhile
    num_bytes = sum(one.nbytes for one in before)
    tokens = []
    for _ in range(2):
        with LLM(config=config) as llm:
            memory = llm._engine.memory  # numbers only
            assert (
                count_bytes() - num_bytes
                > memory.weight_bytes + memory.pool_bytes + memory.host_pool_bytes
            )
            results = llm.generate(prompts, params)
            assert all(result.details.num_host_tokens for result in results)
            stream = llm.stream(itertools.repeat([7, 8]), params)
            assert next(stream).outputs[0].finish_reason is FinishReason.LENGTH
            stream.close()
            llm._engine._scheduler.check_ledger()
        tokens.append([result.outputs[0].token_ids for result in results])
        # jaxlib lets go a little later of the rows that a transfer read without copying them.
        assert count_bytes() - num_bytes <= 4096
    assert tokens[0] == tokens[1]


def test_what_the_package_exports_is_loaded_late():
    assert apex_jax.LLM is LLM
    assert apex_jax.SamplingParams is SamplingParams
    with pytest.raises(AttributeError, match="module 'apex_jax' has no attribute 'LMM'"):
        apex_jax.LMM  # noqa: B018
    code = "import sys, apex_jax; apex_jax.SamplingParams; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
