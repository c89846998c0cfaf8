"""Workload files: the requests of a comparison, the same for every system that is compared.

Owns the format (docs/benchmarks.md): a line of JSON that describes, then a line for each request.
Refuses a file that does not hold what its first line says, by its line. Called by whoever makes,
runs or exports workloads. Imports no jax.
"""

import hashlib
import json
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from launch.comparison.decode import FileError, decode, load_object

FORMAT = "apex_jax.workload/1"


@dataclass(frozen=True)
class WorkloadRequest:
    """A request: greedy, exactly so many output tokens, whatever the model says ends a text.

    arrival_sec: from the start of the run.
    """

    id: str
    prompt_token_ids: tuple[int, ...]
    output_tokens: int
    arrival_sec: float

    def __post_init__(self) -> None:
        if not self.prompt_token_ids:
            raise ValueError("prompt_token_ids is empty; a prompt has at least one token")
        if self.output_tokens < 1:
            raise ValueError(f"output_tokens is {self.output_tokens}; it must be at least 1")
        if not 0 <= self.arrival_sec < math.inf:
            raise ValueError(f"arrival_sec is {self.arrival_sec}; it must be at least 0")

    @property
    def num_tokens(self) -> int:
        """Prompt and output."""
        return len(self.prompt_token_ids) + self.output_tokens


@dataclass(frozen=True)
class WorkloadHeader:
    """What a workload is.

    seed: None where nothing was drawn. prompt_tokens, output_tokens: sums over the requests.
    max_model_len: prompt plus output that a request could have; None for no limit. share_dropped:
    of the requests that were drawn or read, those left out because they were longer. vocab_size:
    all token ids are below it. arrivals, source: in words. sha256: of the lines after the first.
    """

    format: str
    name: str
    description: str
    seed: int | None
    num_requests: int
    prompt_tokens: int
    output_tokens: int
    max_model_len: int | None
    share_dropped: float
    vocab_size: int
    arrivals: str
    source: str
    sha256: str

    def __post_init__(self) -> None:
        if self.format != FORMAT:
            raise ValueError(f"format is {self.format!r}; this version reads {FORMAT!r}")
        if not 0 <= self.share_dropped <= 1:
            raise ValueError(f"share_dropped is {self.share_dropped}; it must be between 0 and 1")


@dataclass(frozen=True)
class Workload:
    """Requests in the order of their arrival."""

    header: WorkloadHeader
    requests: tuple[WorkloadRequest, ...]

    @classmethod
    def create(
        cls,
        requests: Sequence[WorkloadRequest],
        *,
        name: str,
        description: str,
        seed: int | None,
        max_model_len: int | None,
        share_dropped: float,
        vocab_size: int,
        arrivals: str,
        source: str,
    ) -> "Workload":
        """Return a workload with the sums and the hash of its requests."""
        header = WorkloadHeader(
            format=FORMAT,
            name=name,
            description=description,
            seed=seed,
            num_requests=len(requests),
            prompt_tokens=sum(len(one.prompt_token_ids) for one in requests),
            output_tokens=sum(one.output_tokens for one in requests),
            max_model_len=max_model_len,
            share_dropped=share_dropped,
            vocab_size=vocab_size,
            arrivals=arrivals,
            source=source,
            sha256=_hash(map(_line, requests)),
        )
        return cls(header, tuple(requests))

    @property
    def longest(self) -> int:
        """Tokens of the longest request, prompt and output."""
        return max(one.num_tokens for one in self.requests)


def write_workload(path: Path, workload: Workload) -> None:
    """Write a workload; its folder is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        file.write(json.dumps(asdict(workload.header)).encode() + b"\n")
        file.writelines(map(_line, workload.requests))


def read_workload(path: Path) -> Workload:
    """Read a workload, and see that it is what its first line says; FileError else."""
    try:
        lines = path.read_bytes().splitlines(keepends=True)
    except OSError as error:
        raise FileError(f"{path} cannot be read: {error.strerror}") from None
    if not lines:
        raise FileError(f"{path} is empty; python -m launch.make_workload makes workload files")
    where = f"{path}, line 1"
    header = decode(WorkloadHeader, load_object(lines[0], where), where)
    requests = tuple(_read_requests(path, lines[1:], header))
    if not requests:
        raise FileError(f"{path} has no requests; each is a line after the first")
    found = {
        "num_requests": len(requests),
        "prompt_tokens": sum(len(one.prompt_token_ids) for one in requests),
        "output_tokens": sum(one.output_tokens for one in requests),
        "sha256": _hash(lines[1:]),
    }
    for name, value in found.items():
        if (stated := getattr(header, name)) != value:
            raise FileError(
                f"{path}, line 1: {name} is {stated}, but the lines after it come to {value}; the "
                "file was changed or cut short: make it again"
            )
    return Workload(header, requests)


def _read_requests(
    path: Path, lines: Iterable[bytes], header: WorkloadHeader
) -> Iterator[WorkloadRequest]:
    seen: dict[str, int] = {}
    latest_sec = 0.0
    for number, line in enumerate(lines, 2):
        where = f"{path}, line {number}"
        request = decode(WorkloadRequest, load_object(line, where), where)
        if request.id in seen:
            raise FileError(f"{where}: id {request.id!r} is that of line {seen[request.id]} too")
        seen[request.id] = number
        least, most = min(request.prompt_token_ids), max(request.prompt_token_ids)
        if least < 0 or most >= header.vocab_size:
            outside = least if least < 0 else most
            raise FileError(
                f"{where}: token id {outside} is not within the vocabulary of "
                f"{header.vocab_size} that line 1 states"
            )
        if request.arrival_sec < latest_sec:
            raise FileError(
                f"{where}: arrival_sec is {request.arrival_sec}, before the {latest_sec} of the "
                "line above; requests stand in the order of their arrival"
            )
        latest_sec = request.arrival_sec
        if header.max_model_len is not None and request.num_tokens > header.max_model_len:
            raise FileError(
                f"{where}: the request has {request.num_tokens} tokens, more than the "
                f"max_model_len of {header.max_model_len} that line 1 states"
            )
        yield request


def _line(request: WorkloadRequest) -> bytes:
    # By name, not with asdict, which copies every token id.
    return json.dumps(vars(request)).encode() + b"\n"


def _hash(lines: Iterable[bytes]) -> str:
    digest = hashlib.sha256()
    for line in lines:
        digest.update(line)
    return digest.hexdigest()
