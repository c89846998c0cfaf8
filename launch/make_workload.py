"""Make a workload: the requests of a comparison in one file, the same for every system.

    python -m launch.make_workload --set=azure_conv --num_requests=200 --max_model_len=4096 \
        --arrivals=poisson --request_rate=2 --output=runs/azure_conv.jsonl
    python -m launch.make_workload --requests=my_prompts.jsonl --model=/models/Llama-3.2-1B \
        --output=runs/mine.jsonl

Lengths are a named set's, or a real trace's (--azure_csv), conversations' (--sharegpt_json) or a
batch job's input (--requests); the last two are texts, and need --model with a tokenizer. Drawn
prompts are random tokens. docs/benchmarks.md says what each set is and what a file holds.
"""

import random
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from absl import app, flags

from apex_jax.config import ConfigError, SamplingDefaults
from apex_jax.models.hf_config import read_model_folder
from apex_jax.text.model_text import ModelText, load_text
from launch.comparison.decode import FileError
from launch.comparison.workload_file import Workload, WorkloadRequest, write_workload
from launch.comparison.workload_imports import (
    Prompt,
    TraceLine,
    keep,
    read_azure_csv,
    read_batch,
    read_sharegpt,
)
from launch.comparison.workload_sets import (
    NAMES,
    Arrivals,
    draw_arrivals,
    draw_set,
    draw_token_ids,
    middle_of,
)
from launch.workloads import Lengths

UNLIMITED = 2**31
SOURCES = ("set", "azure_csv", "sharegpt_json", "requests")


@dataclass(frozen=True)
class Vocabulary:
    """Where token ids come from. text: the model's, without a tokenizer where there is none."""

    size: int
    text: ModelText

    @classmethod
    def of(cls, model: str | None, vocab_size: int) -> "Vocabulary":
        """Return that of a model's folder, or of so many ids; ConfigError where it is corrupt."""
        if model is None:
            return cls(vocab_size, load_text(None))
        folder = Path(model).expanduser()
        return cls(read_model_folder(folder).architecture.vocab_size, load_text(folder))

    @property
    def ordinary_ids(self) -> Sequence[int]:
        """Token ids that stand for text; none of them is special."""
        tokenizer = self.text.tokenizer
        if tokenizer is None:
            return middle_of(self.size)
        return [one for one in range(self.size) if tokenizer.has_text(one)]

    def describe(self) -> str:
        folder = self.text.folder
        if self.text.tokenizer is None:
            ids = middle_of(self.size)
            return f"random token ids from {ids.start} to {ids.stop - 1}"
        return f"random tokens of {folder.name if folder else 'a tokenizer'} that are not special"


@dataclass(frozen=True)
class Made:
    """Requests without arrivals, and what they are in words."""

    prompts: list[Prompt]
    share_dropped: float
    name: str
    description: str
    source: str


def make(values: Any) -> Workload:
    """Return the workload that the flags describe; ConfigError or FileError where there is none."""
    given = [name for name in SOURCES if getattr(values, name) is not None]
    if len(given) != 1:
        wanted = ", ".join(f"--{name}" for name in SOURCES)
        raise ConfigError(f"give exactly one of {wanted}; given: {', '.join(given) or 'none'}")
    rng = random.Random(values.seed)
    vocabulary = Vocabulary.of(values.model, values.vocab_size)
    trace = None if values.azure_csv is None else read_azure_csv(Path(values.azure_csv))
    if trace is not None:
        made, times_sec = _from_trace(values, trace, vocabulary, rng)
    else:
        made, times_sec = _from_lengths_or_texts(values, vocabulary, rng), None
    if not made.prompts:
        raise ConfigError(
            f"none of the requests has at most --max_model_len={values.max_model_len} tokens, a "
            "prompt and an output"
        )
    arrivals = _arrivals(values, times_sec, len(made.prompts), rng)
    requests = [
        WorkloadRequest(one.id, one.token_ids, one.output_tokens, round(arrival_sec, 6))
        for one, arrival_sec in zip(made.prompts, arrivals.times_sec, strict=True)
    ]
    return Workload.create(
        requests,
        name=values.name or made.name,
        description=made.description,
        seed=values.seed,
        max_model_len=values.max_model_len,
        share_dropped=made.share_dropped,
        vocab_size=vocabulary.size,
        arrivals=arrivals.description,
        source=made.source,
    )


def import_batch(
    path: Path, defaults: SamplingDefaults, text: ModelText, vocab_size: int
) -> Workload:
    """Return a batch job's input as a workload: all at once, and no limit."""
    made = _texts(list(read_batch(path, defaults, text)), path, None, None)
    if not made.prompts:
        raise FileError(f"{path} has no requests")
    requests = [WorkloadRequest(*prompt, arrival_sec=0.0) for prompt in made.prompts]
    return Workload.create(
        requests,
        name=made.name,
        description=made.description,
        seed=None,
        max_model_len=None,
        share_dropped=0.0,
        vocab_size=vocab_size,
        arrivals="all at once",
        source=made.source,
    )


def _from_trace(
    values: Any, trace: Sequence[TraceLine], vocabulary: Vocabulary, rng: random.Random
) -> tuple[Made, list[float]]:
    """Return a trace's first requests that fit, and when they arrived after the first of them."""
    limit = values.max_model_len or UNLIMITED
    kept = keep(
        trace,
        values.num_requests,
        lambda one: min(one.lengths) > 0 and sum(one.lengths) <= limit,
    )
    lines: list[TraceLine] = kept.items
    path = Path(values.azure_csv)
    made = Made(
        _drawn([one.lengths for one in lines], vocabulary, rng),
        kept.share_dropped,
        path.stem,
        f"a trace's lengths in its order; {vocabulary.describe()}",
        path.name,
    )
    return made, [one.arrival_sec - lines[0].arrival_sec for one in lines]


def _from_lengths_or_texts(values: Any, vocabulary: Vocabulary, rng: random.Random) -> Made:
    limit = values.max_model_len
    if values.set is None:
        if values.requests is not None:  # some may be token ids
            path = Path(values.requests)
            prompts = read_batch(path, SamplingDefaults(), vocabulary.text)
        elif vocabulary.text.tokenizer is None:
            raise ConfigError("texts become tokens with a tokenizer: --model must name its folder")
        else:
            path = Path(values.sharegpt_json)
            prompts = read_sharegpt(path, vocabulary.text.tokenizer)
        return _texts(prompts, path, values.num_requests, limit)
    given = [values.prompt_tokens, values.output_tokens]
    lengths = None if None in given else Lengths(*given)
    num_requests = 200 if values.num_requests is None else values.num_requests
    found = draw_set(values.set, lengths, num_requests, limit or UNLIMITED, rng)
    return Made(
        _drawn(found.drawn.requests, vocabulary, rng),
        found.drawn.share_dropped,
        values.set,
        f"{found.description}; {vocabulary.describe()}",
        found.source,
    )


def _texts(prompts: Any, path: Path, num_requests: int | None, limit: int | None) -> Made:
    kept = keep(
        prompts,
        num_requests,
        lambda one: one.output_tokens > 0 and one.num_tokens <= (limit or UNLIMITED),
    )
    words = "real prompts in the file's order, outputs as long as they say"
    return Made(kept.items, kept.share_dropped, path.stem, words, path.name)


def _drawn(lengths: Sequence[Lengths], vocabulary: Vocabulary, rng: random.Random) -> list[Prompt]:
    token_ids = draw_token_ids([one.prompt_tokens for one in lengths], vocabulary.ordinary_ids, rng)
    return [
        Prompt(str(number), ids, one.output_tokens)
        for number, (ids, one) in enumerate(zip(token_ids, lengths, strict=True))
    ]


def _arrivals(
    values: Any, times_sec: list[float] | None, num_requests: int, rng: random.Random
) -> Arrivals:
    kind = values.arrivals or ("at_once" if times_sec is None else "trace")
    if kind != "trace":
        return draw_arrivals(kind, num_requests, values.request_rate, values.burst_size, rng)
    if times_sec is None:
        raise ConfigError("--arrivals=trace are those of a trace: give --azure_csv")
    if values.request_rate is not None:
        raise ConfigError("--request_rate is for --arrivals=poisson and burst; a trace has its own")
    rate = f", {num_requests / times_sec[-1]:.3g} a second on average" if times_sec[-1] else ""
    return Arrivals(times_sec, f"as in the trace{rate}")


def define_flags() -> None:
    """Define this command's flags; other scripts have some of the same names."""
    flags.DEFINE_enum("set", None, NAMES, "A named set of lengths.")
    flags.DEFINE_string("azure_csv", None, f"A trace: {'TIMESTAMP,ContextTokens,GeneratedTokens'}.")
    flags.DEFINE_string("sharegpt_json", None, "Conversations as ShareGPT's files have them.")
    flags.DEFINE_string("requests", None, "Requests as launch.generate takes them.")
    flags.DEFINE_string("model", None, "Folder of the model, for its vocabulary and tokenizer.")
    flags.DEFINE_integer("vocab_size", 32_000, "Of the model, where there is no --model.", 10)
    flags.DEFINE_integer("num_requests", None, "Unset: 200 of a set, all that a file has.", 1)
    flags.DEFINE_integer("prompt_tokens", None, "For --set=constant and uniform.", 1)
    flags.DEFINE_integer("output_tokens", None, "For --set=constant and uniform.", 1)
    flags.DEFINE_integer("max_model_len", None, "Longer requests, both together, are left out.", 2)
    flags.DEFINE_enum(
        "arrivals",
        None,
        ["at_once", "poisson", "burst", "trace"],
        "Unset: a trace's own, else at once.",
    )
    flags.DEFINE_float("request_rate", None, "Of Poisson arrivals and bursts, a second.", 1e-6)
    flags.DEFINE_integer("burst_size", 8, "Requests that arrive together in a burst.", 1)
    flags.DEFINE_integer("seed", 0, "Of lengths, tokens and arrivals.")
    flags.DEFINE_string("name", None, "Of the workload; unset: the set's or the file's.")
    flags.DEFINE_string("output", None, "The workload file.")


def main(argv: Sequence[str], values: Any = flags.FLAGS) -> int:
    """Make what the flags describe; return the exit status."""
    try:
        if len(argv) > 1:
            raise ConfigError(f"{argv[1]!r} is no flag; values are given as --name=value")
        if values.output is None:
            raise ConfigError("--output is missing")
        workload = make(values)
        write_workload(Path(values.output), workload)
    except OSError as error:
        print(f"error: cannot write --output={values.output}: {error.strerror}", file=sys.stderr)
        return 2
    except (ConfigError, FileError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    header = workload.header
    print(
        f"{values.output}: {header.name}, {header.num_requests} requests, {header.prompt_tokens} "
        f"prompt and {header.output_tokens} output tokens ({header.description}), arrivals "
        f"{header.arrivals}; {header.share_dropped:.1%} left out; sha256 {header.sha256[:12]}"
    )
    return 0


if __name__ == "__main__":
    define_flags()
    app.run(main)
