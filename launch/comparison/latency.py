"""When a run's tokens came, and the figures that follow: rates, latencies, goodput.

Owns the formulas (FORMULAS says each in a sentence, and result files carry them) and the check that
every system did the same work. Called by whoever runs workloads. Imports no jax.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

from launch.comparison.results import LaneLatency, Quantiles
from launch.comparison.workload_file import WorkloadRequest

EDGE = 0.1  # of the output tokens, before and after the steady window
FORMULAS = {
    "wall_sec": "from the first arrival to the last token",
    "output_tokens_per_sec": "output tokens / wall_sec",
    "steady_output_tokens_per_sec": "output tokens between the tenth and the ninetieth hundredth "
    "of all, over the time from the one to the other",
    "host_share": "output tokens whose attention the host did / output tokens",
    "ttft_sec": "first token - arrival; an arrival is when the request was due",
    "tpot_sec": "(last token - first token) / (output tokens - 1), of requests with two or more",
    "itl_sec": "between two tokens of a request that follow each other, all requests together",
    "e2e_sec": "last token - arrival",
    "normalized_sec": "(last token - arrival) / output tokens",
    "by_lane": "a request counts to the lane that decoded more than half of its tokens",
    "goodput_requests_per_sec": "requests within both bounds / wall_sec; a request of one token "
    "has no TPOT to be late with",
    "ratio": "output_tokens_per_sec / that of the baseline in the same repeat at the same rate",
    "predicted_output_tokens_per_sec": "output_tokens_per_sec of the same run on the simulated "
    "backend, with the stage times that the strategies go by",
}


@dataclass(frozen=True)
class Served:
    """A request that is done, and when its tokens came; all on one clock.

    token_sec: of each output token; None where a framework tells of the first and the last only.
    num_host_tokens: None where there is no host lane to ask for.
    """

    id: str
    prompt_tokens: int
    output_tokens: int
    arrival_sec: float
    first_token_sec: float
    finish_sec: float
    token_sec: tuple[float, ...] | None = None
    num_host_tokens: int | None = None

    @property
    def ttft_sec(self) -> float:
        return self.first_token_sec - self.arrival_sec

    @property
    def tpot_sec(self) -> float | None:
        """None for a single token."""
        if self.output_tokens < 2:
            return None
        return (self.finish_sec - self.first_token_sec) / (self.output_tokens - 1)

    @property
    def e2e_sec(self) -> float:
        return self.finish_sec - self.arrival_sec


class Bounds(NamedTuple):
    """What a request must keep to count as goodput."""

    ttft_sec: float
    tpot_sec: float

    def holds(self, one: Served) -> bool:
        return one.ttft_sec <= self.ttft_sec and (one.tpot_sec or 0.0) <= self.tpot_sec


def fault_of(wanted: Sequence[WorkloadRequest], served: Sequence[Served]) -> str | None:
    """Return how what was done differs from what was asked for, None where it does not.

    Each request must have the workload's prompt and output lengths: equal sums may hide that two
    lengths were exchanged.
    """
    found = {one.id: one for one in served}
    if len(found) != len(served):
        return f"{len(served)} requests were served, {len(found)} of them with names of their own"
    sums = {
        "requests": (len(wanted), len(served)),
        "prompt tokens": (
            sum(len(one.prompt_token_ids) for one in wanted),
            sum(one.prompt_tokens for one in served),
        ),
        "output tokens": (
            sum(one.output_tokens for one in wanted),
            sum(one.output_tokens for one in served),
        ),
    }
    for name, (asked, done) in sums.items():
        if asked != done:
            return f"the workload has {asked} {name} and the system did {done}"
    for request in wanted:
        if (one := found.get(request.id)) is None:
            return f"request {request.id!r} was not served"
        asked = len(request.prompt_token_ids), request.output_tokens
        if asked != (done := (one.prompt_tokens, one.output_tokens)):
            return (
                f"request {request.id!r} has {asked[0]} prompt and {asked[1]} output tokens, and "
                f"the system did {done[0]} and {done[1]}"
            )
    return None


def figures(served: Sequence[Served], bounds: Bounds | None) -> dict[str, Any]:
    """Return what a RunRow holds of a run, by the names of its fields; by FORMULAS."""
    begin_sec = min(one.arrival_sec for one in served)
    wall_sec = max(one.finish_sec for one in served) - begin_sec
    num_tokens = sum(one.output_tokens for one in served)
    times = [one.token_sec for one in served]
    known = [token_sec for token_sec in times if token_sec is not None]
    has_all = len(known) == len(served)
    gaps = [after - before for token_sec in known for before, after in pairwise(token_sec)]
    host_tokens = [one.num_host_tokens for one in served if one.num_host_tokens is not None]
    has_lanes = len(host_tokens) == len(served)
    return {
        "num_requests": len(served),
        "prompt_tokens": sum(one.prompt_tokens for one in served),
        "output_tokens": num_tokens,
        "wall_sec": wall_sec,
        "output_tokens_per_sec": num_tokens / wall_sec,
        "steady_output_tokens_per_sec": _steady_rate(known) if has_all else None,
        "host_share": sum(host_tokens) / num_tokens if has_lanes else None,
        "ttft_sec": _ttft(served),
        "tpot_sec": _tpot(served),
        "itl_sec": Quantiles.of(gaps) if has_all else None,
        "e2e_sec": Quantiles.of([one.e2e_sec for one in served]),
        "normalized_sec": Quantiles.of([one.e2e_sec / one.output_tokens for one in served]),
        "by_lane": _by_lane(served) if has_lanes else None,
        "goodput_requests_per_sec": (
            None if bounds is None else sum(map(bounds.holds, served)) / wall_sec
        ),
    }


def _steady_rate(token_sec: Sequence[Sequence[float]]) -> float | None:
    """Return the rate without the first and the last tokens; None where they come all at once."""
    ascending = sorted(second for times in token_sec for second in times)
    first = int(EDGE * (len(ascending) - 1))
    last = len(ascending) - 1 - first
    seconds = ascending[last] - ascending[first]
    return (last - first) / seconds if seconds > 0 else None


def _by_lane(served: Sequence[Served]) -> dict[str, LaneLatency]:
    is_host = [2 * (one.num_host_tokens or 0) > one.output_tokens for one in served]
    lanes = {
        name: [one for one, on_host in zip(served, is_host, strict=True) if on_host == wanted]
        for name, wanted in (("device", False), ("host", True))
    }
    return {name: LaneLatency(len(own), _tpot(own), _ttft(own)) for name, own in lanes.items()}


def _ttft(served: Sequence[Served]) -> Quantiles | None:
    return Quantiles.of([one.ttft_sec for one in served])


def _tpot(served: Sequence[Served]) -> Quantiles | None:
    return Quantiles.of([sec for one in served if (sec := one.tpot_sec) is not None])
