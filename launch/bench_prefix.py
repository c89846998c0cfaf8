"""Measure what the reuse of prefixes saves: many requests behind one system prompt, and `n`.

    python -m launch.bench_prefix --output=prefix_reuse.json

The demo model answers, greedily: questions that all stand behind the same page of Python's
documentation, and one long prompt with several outputs. An engine with prefix reuse and one without
take turns; each turn has a page of its own, so that none finds what an earlier one computed. A turn
that is not timed compares the outputs by the near-tie rule (launch.scoring).
"""

import dataclasses
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from pydoc_data import topics
from typing import NamedTuple

import numpy as np
from absl import app, flags

from apex_jax.backends.xla import XlaBackend
from apex_jax.batch.flow import RequestFlow
from apex_jax.config import CacheConfig, Config, DeviceConfig, ModelConfig, SchedulerConfig
from apex_jax.engine import Engine
from apex_jax.models import weights
from apex_jax.request import RequestOutput, SamplingParams
from apex_jax.text.model_text import ModelText, load_text
from launch.environment import ROOT, environment
from launch.measuring import ResultFile, Row
from launch.scoring import Answers, ScoringBackend, compare
from launch.starting import create_engine

_OUTPUT = flags.DEFINE_string("output", "docs/results/prefix_reuse.json", "Result file.")
_BUDGET = flags.DEFINE_float("budget_sec", 400.0, "After this time no further group begins.")
_SMOKE = flags.DEFINE_bool("smoke", False, "Tiny sizes: shows that the script runs, no more.")
_PLATFORM = flags.DEFINE_enum("platform", "cpu", ["cpu", "gpu"], "Of the device.")
_STRATEGY = flags.DEFINE_string("strategy", "device_only", "As --config.scheduler.strategy.")
_NUM_REQUESTS = flags.DEFINE_integer("requests", 200, "Behind each system prompt.")
_SYSTEM = flags.DEFINE_integer("system_tokens", 1500, "Of each system prompt.")
# Answers are short: decoding over so long a prompt costs the same both ways, and hides the rest.
_OUTPUT_TOKENS = flags.DEFINE_integer("output_tokens", 8, "Of each request.")
_CHOICES = flags.DEFINE_integer("n", 8, "Outputs of one prompt of 4/3 as many tokens.")
_REPEATS = flags.DEFINE_integer("repeats", 3, "Turns of both ways.")

MODEL = ROOT / "configs" / "demo_model"
MAX_REQUESTS = 32


class Load(NamedTuple):
    """Prompts of token ids, and how many outputs each has."""

    prompts: list[tuple[int, ...]]
    num_choices: int


class Way(NamedTuple):
    """An engine with prefix reuse or without, and its backend."""

    engine: Engine
    backend: ScoringBackend


class Turn(NamedTuple):
    """What one way made of a load. row: its figures."""

    row: Row
    outputs: dict[str, RequestOutput]


def questions(text: ModelText, turn: int, num_system: int, num_requests: int) -> Load:
    """Return prompts that begin with the same documentation and end in different questions."""
    system = _document(text, turn, num_system)
    names = sorted(sys.stdlib_module_names)
    asked = (f"\n\n{number} {names[number % len(names)]}\n\n" for number in range(num_requests))
    return Load([(*system, *text.encode(question)[1:]) for question in asked], 1)


def one_prompt(text: ModelText, turn: int, num_tokens: int, num_choices: int) -> Load:
    return Load([_document(text, turn, num_tokens)], num_choices)


def _document(text: ModelText, turn: int, num_tokens: int) -> tuple[int, ...]:
    """Return the beginning of a page of documentation, another one for each turn."""
    long = [one for _, one in sorted(topics.topics.items()) if len(one) > 2000]
    pages = long[turn:] + long[:turn]
    return text.encode("\n\n".join(pages)[: 12 * num_tokens])[:num_tokens]


def play(engine: Engine, text: ModelText, load: Load) -> Turn:
    """Answer all of a load, as a batch job would."""
    flow: RequestFlow[str] = RequestFlow(engine, text, 2 * MAX_REQUESTS)
    outputs: dict[str, RequestOutput] = {}
    before = engine.metrics()
    begin_sec = time.perf_counter()
    for index, prompt in enumerate(load.prompts):
        params = SamplingParams(
            max_tokens=2 if _SMOKE.value else _OUTPUT_TOKENS.value,
            temperature=0.0,
            seed=index,
            ignore_eos=True,
            n=load.num_choices,
        )
        flow.submit(str(index), prompt, params, str(index))
    while flow.num_in_flight:
        for finished in flow.step():
            for number, choice in enumerate(finished.choices):
                outputs[f"{finished.tag}#{number}"] = choice.output
    seconds = time.perf_counter() - begin_sec
    after = engine.metrics()
    prefilled = [
        one["num_prefilled_tokens"] + one.get("hybrid", {}).get("num_host_prefilled_tokens", 0)
        for one in (before, after)
    ]
    row: Row = {
        "sec": seconds,
        "requests": len(load.prompts),
        "outputs": len(outputs),
        "prompt_tokens": sum(map(len, load.prompts)),
        "prefilled_tokens": prefilled[1] - prefilled[0],
        "output_tokens": sum(len(output.token_ids) for output in outputs.values()),
        "host_tokens": sum(output.num_host_tokens for output in outputs.values()),
        "sweeps": after["num_sweeps"] - before["num_sweeps"],
    }
    return Turn(row, outputs)


def measure_turns(ways: dict[bool, Way], text: ModelText, loads: Sequence[Load]) -> Iterator[Row]:
    """Both ways in turn over each load; which of them begins changes."""
    for repeat, load in enumerate(loads):
        for reuses_prefixes in (False, True) if repeat % 2 else (True, False):
            way = ways[reuses_prefixes]
            way.backend.keeps_scores = False
            row = play(way.engine, text, load).row
            yield {"repeat": repeat, "prefix_reuse": reuses_prefixes, **row}


def speed_up(rows: Sequence[Row]) -> Iterator[Row]:
    """How many times as fast each turn with reuse was as the one without."""
    seconds = {(row["repeat"], row["prefix_reuse"]): row["sec"] for row in rows}
    ratios = [seconds[repeat, False] / sec for (repeat, reuse), sec in seconds.items() if reuse]
    yield {"speed_up": statistics.median(ratios), "least": min(ratios), "most": max(ratios)}


def compare_outputs(ways: dict[bool, Way], text: ModelText, load: Load) -> Iterator[Row]:
    """Whether outputs are the same both ways, but for near ties."""
    answers: dict[bool, Answers] = {}
    for reuses_prefixes, way in ways.items():
        way.backend.keeps_scores = True
        outputs = play(way.engine, text, load).outputs
        answers[reuses_prefixes] = Answers(outputs, way.backend.take())
    yield compare(answers[False], answers[True])


def start(longest: int, *, reuses_prefixes: bool) -> Way:
    config = Config(
        model=ModelConfig(path=str(MODEL), dtype="float32", precision="highest"),
        cache=CacheConfig(device_bytes=2**28, host_bytes=2**28, prefix_reuse=reuses_prefixes),
        scheduler=SchedulerConfig(
            strategy=_STRATEGY.value,
            max_requests=MAX_REQUESTS,
            max_host_requests=MAX_REQUESTS,
            max_model_len=longest,
        ),
        device=DeviceConfig(platform=_PLATFORM.value),
    )
    engine = create_engine(config, print)
    model = engine.model.architecture
    loaded = weights.load(MODEL, model, np.dtype("float32"), engine._device)
    inner = engine._dispatch._backend
    assert isinstance(inner, XlaBackend)
    backend = ScoringBackend(inner, engine.programs.buckets, weights.to_module(model, loaded))
    engine._dispatch._work.backend = backend
    return Way(engine, backend)


def main(argv: Sequence[str]) -> int:
    del argv
    smoke = _SMOKE.value
    num_system, num_requests = (40, 6) if smoke else (_SYSTEM.value, _NUM_REQUESTS.value)
    turns = range(1 if smoke else _REPEATS.value)
    text = load_text(MODEL)
    num_long = 4 * num_system // 3
    ways = {reuses: start(num_long + 48, reuses_prefixes=reuses) for reuses in (False, True)}
    engine = ways[True].engine
    header = {
        "what": "the same requests with prefix reuse and without; seconds, tokens",
        "smoke": smoke,
        "model": dataclasses.asdict(engine.model.architecture),
        "dtype": engine.model.dtype,
        "strategy": _STRATEGY.value,
        "system_tokens": num_system,
        "n": _CHOICES.value,
        "environment": environment(engine._device),
    }
    results = ResultFile(Path(_OUTPUT.value), header, _BUDGET.value)
    loads = {
        "questions": [questions(text, turn, num_system, num_requests) for turn in turns],
        "n": [one_prompt(text, ~turn, num_long, _CHOICES.value) for turn in turns],
    }
    check = questions(text, len(turns), num_system, num_requests)
    results.measure("outputs", lambda: compare_outputs(ways, text, check))  # and all is warm
    for name, own in loads.items():
        results.measure(name, lambda own=own: measure_turns(ways, text, own))
        if rows := results.content["groups"].get(name):
            results.measure(f"{name}_speed_up", lambda rows=rows: speed_up(rows))
    for way in ways.values():
        way.engine.close()
    print(f"results in {results.path}")
    return 1 if results.content["failed"] else 0


if __name__ == "__main__":
    sys.exit(app.run(main))
