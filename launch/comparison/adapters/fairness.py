"""Whether a framework did the same work, within the same limits, as every other.

Owns the checks of a JobResult against its Job. Each failure is one message that names the request
or the limit with both values, and makes the run a failed one. Imports no jax.
"""

from collections.abc import Iterator

from launch.comparison.adapters.jobs import Done, Job, JobResult
from launch.comparison.latency import fault_of
from launch.comparison.workload_file import WorkloadRequest

CLOCK_SLACK_SEC = 0.05  # a program may read its clock for the run before or after a token's


def fault_in(job: Job, result: JobResult) -> str | None:
    """Return the first thing that is not fair, None where everything is."""
    return next(_faults(job, result), None)


def _faults(job: Job, result: JobResult) -> Iterator[str]:
    fault = fault_of(job.requests, [one.served() for one in result.requests])
    if fault is not None:
        yield fault
        return  # what follows compares request by request
    wanted = {one.id: one for one in job.requests}
    for done in result.requests:
        yield from _faults_of(wanted[done.id], done, result.wall_sec)
    if result.dtype != job.dtype:
        yield f"the comparison is in {job.dtype} and the system computed in {result.dtype}"
    if job.device == "cpu" and not result.threads == result.num_cpus == job.threads:
        yield (
            f"the comparison gives {job.threads} threads and the system computed with "
            f"{result.threads}, on {result.num_cpus} CPUs"
        )
    limits = {
        "requests in flight": (job.max_requests, result.max_requests),
        "bytes of KV cache on the device": (job.device_kv_bytes, result.device_kv_bytes),
        "bytes of KV cache on the host": (job.host_kv_bytes, result.host_kv_bytes),
    }
    for name, (limit, used) in limits.items():
        if used > limit:
            yield f"the comparison allows {limit} {name} and the system took {used}"


def _faults_of(request: WorkloadRequest, done: Done, wall_sec: float) -> Iterator[str]:
    if done.prompt_token_ids != request.prompt_token_ids:
        pairs = zip(done.prompt_token_ids, request.prompt_token_ids, strict=True)
        place = next(index for index, (fed, asked) in enumerate(pairs) if fed != asked)
        yield (
            f"request {request.id!r} was fed token {done.prompt_token_ids[place]} at position "
            f"{place} of its prompt, where the workload has {request.prompt_token_ids[place]}: was "
            "it tokenised again?"
        )
    if not 0 < done.first_token_sec <= done.finish_sec <= wall_sec + CLOCK_SLACK_SEC:
        yield (
            f"request {request.id!r} has its first token at {done.first_token_sec:g} s and its "
            f"last at {done.finish_sec:g} s of a run of {wall_sec:g} s"
        )
