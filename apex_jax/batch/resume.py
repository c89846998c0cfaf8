"""Starting again on an existing output: what is finished, and whether it may be kept.

Owns the reading of the output into an IdIndex and every reason to refuse. All of it happens before
the first request runs; the checks per line run a second time in the job, for inputs read once.
"""

import json
from array import array
from collections.abc import Iterable
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

from apex_jax.batch.id_index import IdIndex, id_key, line_key
from apex_jax.batch.identity import Identity, differences, hash_identity, read_sidecar
from apex_jax.batch.journal import Journal
from apex_jax.batch.lines import BadLine, BatchRequest, RawLine, parse_line
from apex_jax.batch.results import FinishedLine
from apex_jax.config import SamplingDefaults

_REMEDY = "go back to what it was, name another --output, or drop all results with --overwrite"


class JobRefusedError(RuntimeError):
    """The job cannot start, or go on, without losing something; the message says what."""


def read_finished(journal: Journal, index: IdIndex, *, drop_failed: bool) -> set[str]:
    """Enter the output's lines into `index`; return the job hashes they carry.

    drop_failed: leave out error lines, which `keep_successes` will take away. Raises OutputError
    for a file of something else, JobRefusedError if an id is there twice.
    """
    jobs: set[str] = set()
    for line in journal.scan():
        if line.failed and drop_failed:
            continue
        fresh = index.finish(
            line.key, line.request_sha256, failed=line.failed, by_line=line.is_by_line
        )
        if not fresh:
            name = f"line {line.line}" if line.is_by_line else f"custom_id {line.custom_id!r}"
            raise JobRefusedError(f"{journal.path} has two results for {name}: {_REMEDY}")
        jobs.add(line.job_sha256)
    return jobs


def keep_successes(journal: Journal) -> None:
    """Take the error lines out of the output, so that their requests run again."""
    if any(line.failed for line in journal.scan()):
        journal.rewrite((line.offset, line.num_bytes) for line in journal.scan() if not line.failed)


def put_in_order(journal: Journal, index: IdIndex) -> None:
    """Sort the output by the input lines it answers, if it is not: 60 bytes of memory a line.

    Needed where an ordered run continues one that was not, or retries what failed.
    """
    lines, offsets, sizes = array("Q"), array("Q"), array("Q")
    for line in journal.scan():
        lines.append(index.seen_line(line.key) or line.line)
        offsets.append(line.offset)
        sizes.append(line.num_bytes)
    if any(first > second for first, second in pairwise(lines)):
        order = sorted(range(len(lines)), key=lines.__getitem__)
        journal.rewrite((offsets[one], sizes[one]) for one in order)


def check_identity(output: Path, jobs: Iterable[str], identity: Identity, *, whole: bool) -> None:
    """Raise JobRefusedError unless the lines of `output` come from this job.

    jobs: the hashes its lines carry; none means nothing to protect. whole: False where `identity`
    still lacks the model, so that only what is known can be compared.
    """
    jobs = set(jobs)
    if not jobs:
        return
    old = read_sidecar(output)
    what = [] if old is None else differences(old, identity)
    if what:
        raise JobRefusedError(f"{output} belongs to another job: {'; '.join(what)}; {_REMEDY}")
    if whole and jobs != {hash_identity(identity)}:
        raise JobRefusedError(
            f"{output} belongs to another job, with another model or other defaults ({output.name}"
            f".job.json, which could say what differs, is lost or does not match); {_REMEDY}"
        )


def is_known_to_be_same(output: Path, jobs: Iterable[str], known: Identity) -> bool:
    """Whether what is known before loading, and fits, tells that `output` is of this job.

    It does where the sidecar is that of all lines, and nothing but a dtype that the device decides
    remains to be compared.
    """
    old = read_sidecar(output)
    return old is not None and set(jobs) == {hash_identity(old)} and "fingerprint" in known["model"]


class Progressed(NamedTuple):
    """How many lines of an input its output answers, and how many it does not.

    seen: says at which line each request stands.
    """

    num_finished: int
    num_left: int
    seen: IdIndex


def check_input(
    lines: Iterable[RawLine], defaults: SamplingDefaults, journal: Journal, index: IdIndex
) -> Progressed:
    """Return how far a job is.

    Raises JobRefusedError at the first input line whose finished result is of another request.
    """
    seen = IdIndex()
    num_finished = num_left = 0
    for raw in lines:
        entry = parse_line(raw, defaults)
        is_repeat = entry.custom_id is not None and (
            seen.see(id_key(entry.custom_id), raw.number) is not None
        )
        if check_line(raw, entry, is_repeat, journal, index):
            num_finished += 1
        else:
            num_left += 1
    return Progressed(num_finished, num_left, seen)


def check_line(
    raw: RawLine,
    entry: BatchRequest | BadLine,
    is_repeat: bool,
    journal: Journal,
    index: IdIndex,
) -> bool:
    """Return whether the output already answers a line.

    is_repeat: its custom_id stands on an earlier line too. Raises JobRefusedError if the output
    answers the line as it was, and it is not so any more.
    """
    by_line = entry.custom_id is None or is_repeat
    if index.num_by_line and not by_line and index.is_finished(line_key(raw.number)):
        raise _changed(journal, raw, "it failed as a line that could not run, and now it could")
    if by_line:
        key, sha256 = line_key(raw.number), raw.sha256
    else:
        assert entry.custom_id is not None
        key, sha256 = id_key(entry.custom_id), entry.sha256
    if not index.is_finished(key):
        return False
    if index.is_same_request(key, sha256):
        return True
    if by_line:
        raise _changed(journal, raw, "its text")
    old = next((line for line in journal.scan() if line.key == key), None)
    raise _changed(journal, raw, _what_changed(old, entry), entry.custom_id)


def _changed(
    journal: Journal, raw: RawLine, what: str, custom_id: str | None = None
) -> JobRefusedError:
    name = f"line {raw.number}" if custom_id is None else f"{custom_id!r} (line {raw.number})"
    retry = "--retry_failed runs failed lines again; "
    return JobRefusedError(
        f"the input has changed since {journal.path} answered {name}: {what}; "
        f"{'' if custom_id else retry}{_REMEDY}"
    )


def _what_changed(old: FinishedLine | None, entry: BatchRequest | BadLine) -> str:
    """Say what differs between a finished request and the line that has its id now."""
    if isinstance(entry, BadLine):
        return f"the line cannot run now ({entry.message})"
    if old is None or old.sampling is None:
        return "the line could not run before, and now it could (--retry_failed runs it)"
    what = differences(old.sampling, json.loads(json.dumps(asdict(entry.sampling))))
    return "; ".join(what) if what else "the prompt"
