"""A workload offered at another rate: the same requests, other arrival times.

Owns what a request rate means for each kind of arrivals. Called by whoever runs workloads. Imports
no jax.
"""

import dataclasses
import random

from launch.comparison.workload_file import Workload, WorkloadRequest
from launch.workloads import poisson_arrivals

SEED = 0  # of Poisson arrivals, where the workload was made without a seed


def offered_at(workload: Workload, request_rate: float | None) -> tuple[WorkloadRequest, ...]:
    """Return the requests with arrivals of so many a second on average; None leaves them as is.

    Arrival times that the workload has are stretched, so that bursts stay bursts; where all arrive
    at once they become Poisson's, drawn by the workload's seed.
    """
    requests = workload.requests
    if request_rate is None:
        return requests
    if (last_sec := requests[-1].arrival_sec) > 0:
        stretch = len(requests) / request_rate / last_sec
        arrivals_sec = [request.arrival_sec * stretch for request in requests]
    else:
        seed = SEED if workload.header.seed is None else workload.header.seed
        arrivals_sec = poisson_arrivals(len(requests), request_rate, random.Random(seed))
    return tuple(
        dataclasses.replace(request, arrival_sec=arrival_sec)
        for request, arrival_sec in zip(requests, arrivals_sec, strict=True)
    )
