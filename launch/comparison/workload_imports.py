"""Real requests as workloads: a trace's lengths and times, conversations, or a batch job's prompts.

Owns the three formats: CSV as Azure publishes it, ShareGPT's JSON, and lines as launch.generate
takes them. Refuses what does not follow them, by its line or entry. Called by make_workload and
run_benchmark. Imports no jax.
"""

import csv
import datetime
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from apex_jax.batch.lines import BatchRequest, parse_line, read_lines
from apex_jax.config import SamplingDefaults
from apex_jax.request import RequestError
from apex_jax.text.model_text import ModelText
from apex_jax.text.tokenizer import Tokenizer
from launch.comparison.decode import FileError, show
from launch.workloads import Lengths

AZURE_COLUMNS = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")
Item = TypeVar("Item")


class TraceLine(NamedTuple):
    """A request of a trace; arrival_sec: from the first one's."""

    arrival_sec: float
    lengths: Lengths


class Prompt(NamedTuple):
    """A real prompt, and how many tokens are to follow it."""

    id: str
    token_ids: tuple[int, ...]
    output_tokens: int

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids) + self.output_tokens


class Kept(NamedTuple):
    """What fits, and the share of what was looked at that does not."""

    items: list[Any]
    share_dropped: float


def read_azure_csv(path: Path) -> list[TraceLine]:
    """Read a trace in the order of its times; FileError where it is none."""
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            lines = list(_azure_lines(path, file))
    except (OSError, UnicodeDecodeError) as error:
        raise FileError(f"{path} cannot be read: {getattr(error, 'strerror', error)}") from None
    if not lines:
        raise FileError(f"{path} has no requests after its first line")
    lines.sort(key=lambda one: one.arrival_sec)
    first_sec = lines[0].arrival_sec
    return [one._replace(arrival_sec=one.arrival_sec - first_sec) for one in lines]


def _azure_lines(path: Path, file: Iterable[str]) -> Iterator[TraceLine]:
    reader = csv.DictReader(file)
    if tuple(reader.fieldnames or ()) != AZURE_COLUMNS:
        raise FileError(
            f"{path}, line 1 is {show(','.join(reader.fieldnames or ()))}; a trace as Azure "
            f"publishes it begins with {','.join(AZURE_COLUMNS)}"
        )
    for row in reader:
        where = f"{path}, line {reader.line_num}"
        counts = [_count(row[name], f"{where}: {name}") for name in AZURE_COLUMNS[1:]]
        text = row["TIMESTAMP"]
        try:
            # The clock's time is nobody's business; naive and aware ones must not be mixed.
            moment = datetime.datetime.fromisoformat(text)
        except ValueError:
            raise FileError(
                f"{where}: TIMESTAMP is {text!r}; it must be like 2023-11-16 18:17:03.979"
            ) from None
        if moment.tzinfo is None:
            moment = moment.replace(tzinfo=datetime.UTC)
        yield TraceLine(moment.timestamp(), Lengths(*counts))


def _count(text: str | None, where: str) -> int:
    if text is None or not text.isdecimal():
        raise FileError(f"{where} is {text!r}; it must be a count of tokens")
    return int(text)


def read_sharegpt(path: Path, tokenizer: Tokenizer) -> Iterator[Prompt]:
    """Yield the first question of each conversation that has an answer, and the answer's length.

    FileError where the file is not as ShareGPT's are. A conversation that does not begin with two
    turns is left out, as in others' benchmarks.
    """
    try:
        entries = json.loads(path.read_bytes())
    except OSError as error:
        raise FileError(f"{path} cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise FileError(f"{path} is not JSON: {error}") from None
    if not isinstance(entries, list):
        raise FileError(f"{path} holds {show(entries)}; it must be a list of conversations")
    for number, entry in enumerate(entries):
        turns = entry.get("conversations") if isinstance(entry, dict) else None
        if not isinstance(turns, list):
            raise FileError(f"{path}, entry {number} has no list of conversations")
        texts = [turn.get("value") if isinstance(turn, dict) else None for turn in turns[:2]]
        if any(not isinstance(text, str) for text in texts):
            raise FileError(f"{path}, entry {number}: a turn has no text as its value")
        if len(texts) == 2:
            asked, answered = (tokenizer.encode(str(one), add_special_tokens=True) for one in texts)
            yield Prompt(str(number), asked, len(answered))


def read_batch(path: Path, defaults: SamplingDefaults, text: ModelText) -> Iterator[Prompt]:
    """Yield the prompts of a batch job's input; an output is as long as max_tokens allows.

    FileError at the first line that cannot run.
    """
    seen: dict[str, int] = {}
    try:
        with path.open("rb") as file:
            for raw in read_lines(file):
                where = f"{path}, line {raw.number}"
                entry = parse_line(raw, defaults)
                if not isinstance(entry, BatchRequest):
                    raise FileError(f"{where}: {entry.message}")
                if entry.custom_id in seen:
                    first = seen[entry.custom_id]
                    raise FileError(f"{where}: custom_id {entry.custom_id!r} is line {first}'s too")
                seen[entry.custom_id] = raw.number
                try:
                    token_ids = text.encode(entry.prompt)
                except RequestError as error:
                    raise FileError(f"{where}: {error}") from None
                yield Prompt(entry.custom_id, token_ids, entry.sampling.max_tokens)
    except OSError as error:
        raise FileError(f"{path} cannot be read: {error.strerror}") from None


def keep(items: Iterable[Item], max_items: int | None, fits: Any) -> Kept:
    """Return the first items that fit, in their order."""
    kept: list[Item] = []
    num_dropped = 0
    for item in items:
        if len(kept) == max_items:
            break
        if fits(item):
            kept.append(item)
        else:
            num_dropped += 1
    return Kept(kept, num_dropped / max(1, num_dropped + len(kept)))
