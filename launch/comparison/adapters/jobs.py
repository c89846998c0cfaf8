"""What a framework's program is asked, and what it says it did: two JSON files.

Owns the contract between launch.compare and the programs in children/ (or anybody's own): a program
is called with the path of a job and the path for its result. Refuses a result that lacks something.
Imports no jax.
"""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launch.comparison.decode import decode, load_object
from launch.comparison.latency import Served
from launch.comparison.workload_file import WorkloadRequest


@dataclass(frozen=True)
class Job:
    """A workload and the limits that all frameworks have in common.

    model: a Hugging Face folder. device: cpu or gpu. threads: on a CPU; the program also finds
    itself bound to so many CPUs. max_requests: in flight at once. device_kv_bytes, host_kv_bytes:
    of KV cache; 0 where there is no host lane. requests: all due at once, greedy, each with exactly
    output_tokens tokens. settings: the framework's own; None lets it choose, which an earlier
    repeat may have done.
    """

    model: str
    dtype: str
    device: str
    threads: int
    max_requests: int
    device_kv_bytes: int
    host_kv_bytes: int
    requests: tuple[WorkloadRequest, ...]
    settings: dict[str, Any] | None

    def write(self, path: Path) -> None:
        path.write_text(json.dumps(dataclasses.asdict(self)))


@dataclass(frozen=True)
class Done:
    """A request as the framework did it: the prompt that it fed, and seconds from the run's start.

    num_host_tokens: decoded in a host lane; None where there is none.
    """

    id: str
    prompt_token_ids: tuple[int, ...]
    output_token_ids: tuple[int, ...]
    first_token_sec: float
    finish_sec: float
    num_host_tokens: int | None = None

    def served(self) -> Served:
        """Return what the figures are made of; requests are due when the run starts."""
        return Served(
            id=self.id,
            prompt_tokens=len(self.prompt_token_ids),
            output_tokens=len(self.output_token_ids),
            arrival_sec=0.0,
            first_token_sec=self.first_token_sec,
            finish_sec=self.finish_sec,
            num_host_tokens=self.num_host_tokens,
        )


@dataclass(frozen=True)
class JobResult:
    """What a framework did, and what it took.

    max_requests, device_kv_bytes, host_kv_bytes: the most that were in flight, and held. threads:
    that it computed with; num_cpus: that it may run on. cpu_sec: CPU time of the run, all threads.
    settings: that it chose or was given. warm_up: what came before, in a sentence.
    """

    version: str
    dtype: str
    device: str
    threads: int
    num_cpus: int
    max_requests: int
    device_kv_bytes: int
    host_kv_bytes: int
    settings: dict[str, Any]
    warm_up: str
    wall_sec: float
    cpu_sec: float
    requests: tuple[Done, ...]


def read_result(path: Path, where: str) -> JobResult:
    """Read a program's result; FileError says what is wrong with it."""
    return decode(JobResult, load_object(path.read_bytes(), where), where)
