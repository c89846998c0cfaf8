"""Measure what the reuse of prefixes saves: many requests behind one system prompt, and `n`.

    python -m launch.bench_prefix --output=prefix_reuse.json

The demo model answers, greedily: questions that all stand behind the same page of Python's
documentation, and one long prompt with several outputs. One engine's arrays and programs serve both
ways, in turn, several times; each turn has a page of its own, so that none finds what an earlier
one computed. A turn that is not timed compares the outputs by the near-tie rule (launch.scoring).
"""

import dataclasses
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from pydoc_data import topics
from typing import NamedTuple

import jax
import numpy as np
from absl import app, flags

from apex_jax.backends.xla import XlaBackend
from apex_jax.batch.flow import Choice, RequestFlow
from apex_jax.buckets import Buckets
from apex_jax.config import CacheConfig, Config, DeviceConfig, ModelConfig, SchedulerConfig
from apex_jax.models import weights
from apex_jax.models.hf_config import read_model_folder
from apex_jax.policies import DeviceOnly
from apex_jax.request import SamplingParams
from apex_jax.text.model_text import ModelText, load_text
from launch.environment import ROOT, environment
from launch.measuring import ResultFile, Row
from launch.scoring import Answers, ScoringBackend, compare
from launch.shared_engine import SharedEngine, use_two_cpu_devices

_OUTPUT = flags.DEFINE_string("output", "docs/results/prefix_reuse.json", "Result file.")
_BUDGET = flags.DEFINE_float("budget_sec", 400.0, "After this time no further group begins.")
_SMOKE = flags.DEFINE_bool("smoke", False, "Tiny sizes: shows that the script runs, no more.")
_PLATFORM = flags.DEFINE_enum("platform", "cpu", ["cpu", "gpu"], "Of the device.")
_NUM_REQUESTS = flags.DEFINE_integer("requests", 200, "Behind each system prompt.")
_SYSTEM = flags.DEFINE_integer("system_tokens", 1500, "Of each system prompt.")
_OUTPUT_TOKENS = flags.DEFINE_integer("output_tokens", 16, "Of each request.")
_CHOICES = flags.DEFINE_integer("n", 8, "Outputs of one prompt of 4/3 as many tokens.")
_REPEATS = flags.DEFINE_integer("repeats", 3, "Turns of both ways.")

MODEL = ROOT / "configs" / "demo_model"
MAX_REQUESTS = 32


class Load(NamedTuple):
    """Prompts of token ids, and how many outputs each has."""

    prompts: list[tuple[int, ...]]
    num_choices: int


class Turn(NamedTuple):
    """What one way made of a load. row: its figures."""

    row: Row
    choices: dict[str, Choice]


def questions(text: ModelText, turn: int, num_system: int, num_requests: int) -> Load:
    """Return prompts that begin with the same documentation and end in different questions."""
    system = _document(text, turn, num_system)
    names = sorted(sys.stdlib_module_names)
    asked = (f"\n\n{number} {names[number % len(names)]}\n\n" for number in range(num_requests))
    return Load([(*system, *text.encode(question)[1:]) for question in asked], 1)


def one_prompt(text: ModelText, turn: int, num_tokens: int, num_choices: int) -> Load:
    return Load([_document(text, turn, num_tokens)], num_choices)


def _document(text: ModelText, turn: int, num_tokens: int) -> tuple[int, ...]:
    """Return the beginning of a page of documentation, which no other turn has."""
    long = [one for _, one in sorted(topics.topics.items()) if len(one) > 2000]
    pages = long[turn:] + long[:turn]
    return text.encode("\n\n".join(pages)[: 12 * num_tokens])[:num_tokens]


def play(shared: SharedEngine, text: ModelText, load: Load, *, reuses_prefixes: bool) -> Turn:
    """Answer all of a load, as a batch job would."""
    started = shared.start(
        DeviceOnly(), shared.whole.memory.num_pages, reuses_prefixes=reuses_prefixes
    )
    flow: RequestFlow[str] = RequestFlow(started.engine, text, MAX_REQUESTS)
    choices: dict[str, Choice] = {}
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
                choices[f"{finished.tag}#{number}"] = choice
    seconds = time.perf_counter() - begin_sec
    stats = started.scheduler.stats
    row: Row = {
        "prefix_reuse": reuses_prefixes,
        "sec": seconds,
        "requests": len(load.prompts),
        "prompt_tokens": sum(map(len, load.prompts)),
        "prefilled_tokens": stats.num_prefilled_tokens,
        "hit_rate": stats.num_reused_tokens / stats.num_admitted_tokens,
        "output_tokens": stats.num_output_tokens,
        "preemptions": stats.num_preemptions,
        "sweeps": stats.num_sweeps,
    }
    return Turn(row, choices)


def measure_turns(shared: SharedEngine, text: ModelText, loads: Sequence[Load]) -> Iterator[Row]:
    """Both ways in turn over each load; which of them begins changes."""
    backend = shared.backend
    assert isinstance(backend, ScoringBackend)
    backend.keeps_scores = False
    for repeat, load in enumerate(loads):
        for reuses_prefixes in (False, True) if repeat % 2 else (True, False):
            turn = play(shared, text, load, reuses_prefixes=reuses_prefixes)
            yield {"repeat": repeat, **turn.row}


def speed_up(rows: Sequence[Row]) -> Iterator[Row]:
    """How many times as fast each turn with reuse was as the one without."""
    seconds = {(row["repeat"], row["prefix_reuse"]): row["sec"] for row in rows}
    ratios = [seconds[repeat, False] / sec for (repeat, reuse), sec in seconds.items() if reuse]
    yield {"speed_up": statistics.median(ratios), "least": min(ratios), "most": max(ratios)}


def compare_outputs(shared: SharedEngine, text: ModelText, load: Load) -> Iterator[Row]:
    """Whether outputs are the same both ways, but for near ties."""
    backend = shared.backend
    assert isinstance(backend, ScoringBackend)
    backend.keeps_scores = True
    answers: list[Answers] = []
    for reuses_prefixes in (False, True):
        choices = play(shared, text, load, reuses_prefixes=reuses_prefixes).choices
        outputs = {name: choice.output for name, choice in choices.items()}
        answers.append(Answers(outputs, backend.take()))
    yield compare(*answers)


def make_engine(longest: int) -> SharedEngine:
    config = Config(
        model=ModelConfig(path=str(MODEL), dtype="float32", precision="highest"),
        cache=CacheConfig(device_bytes=2**28, host_bytes=2**28),
        scheduler=SchedulerConfig(
            strategy="async_overlap",
            max_requests=MAX_REQUESTS,
            max_host_requests=MAX_REQUESTS,
            max_model_len=longest,
        ),
        device=DeviceConfig(platform=_PLATFORM.value),
    )

    def watch(backend: XlaBackend, shapes: Buckets, device: jax.Device) -> ScoringBackend:
        model = read_model_folder(str(MODEL)).architecture
        loaded = weights.load(MODEL, model, np.dtype("float32"), device)
        return ScoringBackend(backend, shapes, weights.to_module(model, loaded))

    return SharedEngine(config, print, watch)


def main(argv: Sequence[str]) -> int:
    del argv
    smoke = _SMOKE.value
    num_system, num_requests = (40, 6) if smoke else (_SYSTEM.value, _NUM_REQUESTS.value)
    turns = range(1 if smoke else _REPEATS.value)
    text = load_text(MODEL)
    use_two_cpu_devices(one_core_each=False)
    num_long = 4 * num_system // 3
    shared = make_engine(num_long + 48)
    header = {
        "what": "the same requests with prefix reuse and without; seconds, tokens",
        "smoke": smoke,
        "model": dataclasses.asdict(shared.whole.model.architecture),
        "dtype": shared.whole.model.dtype,
        "system_tokens": num_system,
        "n": _CHOICES.value,
        "environment": environment(shared.device),
    }
    results = ResultFile(Path(_OUTPUT.value), header, _BUDGET.value)
    loads = {
        "questions": [questions(text, turn, num_system, num_requests) for turn in turns],
        "n": [one_prompt(text, turn, num_long, _CHOICES.value) for turn in turns],
    }
    for name, own in loads.items():
        play(shared, text, own[0], reuses_prefixes=True)  # nothing is timed for the first time
        results.measure(name, lambda own=own: measure_turns(shared, text, own))
        if rows := results.content["groups"].get(name):
            results.measure(f"{name}_speed_up", lambda rows=rows: speed_up(rows))
    results.measure(
        "questions_outputs", lambda: compare_outputs(shared, text, loads["questions"][0])
    )
    shared.close()
    print(f"results in {results.path}")
    return 1 if results.content["failed"] else 0


if __name__ == "__main__":
    sys.exit(app.run(main))
