"""Inputs, outputs and small tokenizers for the tests of batch jobs."""

import io
import json
from collections.abc import Iterable
from pathlib import Path

import sentencepiece
import tokenizers
from fake_engine import FakeEngine
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

from apex_jax.batch.job import JobOptions, run_job
from apex_jax.config import Config

BAD_LINES = [
    "not json\n",
    {"custom_id": "bad", "prompt_token_ids": [1], "best_of": 2},
    {"prompt_token_ids": [1]},
    {"custom_id": "long", "prompt_token_ids": [1] * 500},
    {"custom_id": "r3", "prompt_token_ids": [1]},
    {"custom_id": "text", "prompt": "no tokenizer here"},
]


def make_config(folder: Path, **sampling) -> Config:
    config = Config()
    config.model.path = str(folder)
    config.scheduler.max_requests = 4
    config.scheduler.strategy = "device_only"
    for name, value in sampling.items():
        setattr(config.sampling, name, value)
    return config


def request_line(number: int, **fields) -> dict:
    """Every third one in the OpenAI form."""
    item = {"prompt_token_ids": [number % 200, 7, 9], "max_tokens": 5 + number % 20, **fields}
    custom_id = item.pop("custom_id", f"r{number}")
    if number % 3:
        return {"custom_id": custom_id, **item}
    item["prompt"] = item.pop("prompt_token_ids")
    return {"custom_id": custom_id, "method": "POST", "url": "/v1/completions", "body": item}


def write_lines(path: Path, items) -> Path:
    path.write_text(
        "".join(one if isinstance(one, str) else json.dumps(one) + "\n" for one in items)
    )
    return path


def write_input(job: "Job", count: int = 30, extra: Iterable[str | dict] = ()) -> None:
    write_lines(job.input, [*(request_line(number) for number in range(count)), *extra])


def read_output(path: Path) -> list[dict]:
    data = path.read_bytes()
    assert data == b"" or data.endswith(b"\n")
    return [json.loads(line) for line in data.split(b"\n")[:-1]]


def without_time(items: list[dict]) -> dict:
    """By custom_id (or line), less the one field that says when."""
    found = {}
    for item in items:
        if item["response"]:
            del item["response"]["body"]["created"]
        name = item["custom_id"] if item["error"] is None else item["apex"]["line"]
        assert name not in found, f"{name} twice"
        found[name] = item
    return found


class Job:
    """Run jobs in this process: `engine` is the last one created, `said` what was printed."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.input = folder / "in.jsonl"
        self.output = folder / "out.jsonl"
        self.sidecar = folder / "out.jsonl.job.json"
        self.engine: FakeEngine | None = None
        self.said = ""

    def run(self, *, config=None, engine=FakeEngine, **options) -> int:
        self.engine = None
        stream = io.StringIO()

        def create(config, on_progress, timeline):
            self.engine = engine(config, timeline)
            on_progress("loading")
            return self.engine

        paths = {"input": self.input, "output": self.output}
        status = run_job(
            config or make_config(self.folder), JobOptions(**{**paths, **options}), create, stream
        )
        self.said = stream.getvalue()
        return status


def write_byte_tokenizer(folder: Path) -> Path:
    """GPT-2 style: a token for each byte, <bos> before a prompt, <eos>."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {letter: index for index, letter in enumerate(alphabet)}
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<bos>", "<eos>"])
    bos = tokenizer.token_to_id("<bos>")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", bos)]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder / "tokenizer.json"


def write_sentence_tokenizer(folder: Path) -> Path:
    """Llama-2 style: a space is part of the word after it, and the first one is dropped."""
    words = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    words += ["\u2581hello", "\u2581world", "\u2581", "h", "w"]
    vocab = {word: index for index, word in enumerate(words)}
    tokenizer = tokenizers.Tokenizer(
        models.BPE(vocab, [], unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
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
    tokenizer.add_special_tokens(["<s>", "</s>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder / "tokenizer.json"


SENTENCES = (
    "The quick brown fox jumps over the lazy dog, and the dog does not mind at all.",
    "def read(path):  return open(path).read()  # 100 lines\n",
    "Les \u00e9l\u00e8ves ont mang\u00e9 des cr\u00eapes; na\u00efve caf\u00e9, d\u00e9j\u00e0.",
    "\u041c\u043e\u0441\u043a\u0432\u0430: 1234567890 \u20ac, hello world, hello there.",
)


def write_sentence_piece(folder: Path, **options) -> Path:
    """A tokenizer.model trained on a few sentences, by default as Llama 2's: BPE with bytes."""
    llama = {
        "model_type": "bpe",
        "vocab_size": 420,
        "byte_fallback": True,
        "split_digits": True,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
    }
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SENTENCES * 5),
        model_prefix=str(folder / "tokenizer"),
        num_threads=1,
        minloglevel=2,
        **{**llama, **options},
    )
    return folder / "tokenizer.model"
