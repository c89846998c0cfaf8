"""What each strategy would yield for a job, before anything is loaded.

Owns the way from a job's lengths and the pools' sizes to a steady state of each lane, and the words
for what limits it. What a steady state yields is prediction.py's. Called by plans. Imports no jax.
"""

from typing import NamedTuple

from apex_jax.adaptive import MIN_GAIN, Apex, ApexPaper
from apex_jax.config import SchedulerConfig
from apex_jax.cost_model import PromptWork, Times
from apex_jax.prediction import Choice, Demand, Prediction, Predictor
from apex_jax.strategies import tpot_bounds

NUM_ITERATIONS = 4  # of the prompts in a sweep, whose number depends on how many requests it ends
SATURATED = 0.95  # of the time: a host that is busier is what limits


class Job(NamedTuple):
    """Requests as they are on average; tokens of a prompt and of an output."""

    num_requests: int
    prompt_tokens: float
    output_tokens: float


class Room(NamedTuple):
    """What the lanes hold: tokens of KV, and requests at once. host_tokens: 0 for no host lane."""

    device_tokens: int
    device_requests: int
    host_tokens: int
    host_requests: int


class Forecast(NamedTuple):
    """What a strategy comes to while enough requests are left.

    rate: output tokens per second, prompts' time included. Lanes' times per output token: None
    where nobody is. host_share: of the output tokens. limit: the resource that binds.
    """

    strategy: str
    rate: float
    device_rows: int
    host_rows: int
    device_tpot_sec: float | None
    host_tpot_sec: float | None
    host_share: float
    limit: str


def forecast(
    strategy: str,
    config: SchedulerConfig,
    times: Times,
    layers_per_program: int,
    room: Room,
    job: Job,
) -> Forecast:
    """Return what one strategy would yield; config: its settings (cohorts, passes and so on).

    `apex` leaves the host alone where its prompts would cost more than its tokens are worth.
    """
    found = _steady(strategy, config, times, layers_per_program, room, job)
    if strategy != "apex":
        return found
    alone = _steady("device_only", config, times, layers_per_program, room, job)
    is_worth_it = found.rate > (1 + MIN_GAIN) * alone.rate
    return found if is_worth_it else alone._replace(strategy=strategy)


def _steady(
    strategy: str,
    config: SchedulerConfig,
    times: Times,
    layers_per_program: int,
    room: Room,
    job: Job,
) -> Forecast:
    """Return what a strategy comes to with full lanes, or with everybody where fewer run."""
    tokens = job.prompt_tokens + job.output_tokens / 2  # of a row, half-way
    uses_device = strategy != "full_offload"
    device_rows = min(room.device_requests, int(room.device_tokens / tokens), job.num_requests)
    device_rows = device_rows if uses_device else 0
    left = job.num_requests - device_rows
    host_rows = min(room.host_requests, int(room.host_tokens / tokens), left)
    host_rows = 0 if strategy == "device_only" else host_rows
    prompt = round(job.prompt_tokens)
    prefill = PromptWork(1, prompt, prompt, prompt * (prompt + 1) // 2)
    prefill_sec = times.prefill(times.num_layers, prefill) / job.output_tokens
    demand = Demand(device_rows, round(device_rows * tokens), host_rows, tokens)
    predicted = None
    for _ in range(NUM_ITERATIONS):
        predicted = _predict(strategy, config, times, layers_per_program, demand)
        prompt_sec = prefill_sec * predicted.rate * predicted.sweep_sec
        demand = demand._replace(prompt_sec=prompt_sec)
    assert predicted is not None
    return Forecast(
        strategy,
        predicted.rate,
        device_rows,
        predicted.host_rows,
        device_rows / predicted.device_rate if predicted.device_rate else None,
        predicted.host_tpot_sec,
        predicted.host_rate / predicted.rate if predicted.rate else 0.0,
        _limit(predicted, left, host_rows, room),
    )


def _predict(
    strategy: str, config: SchedulerConfig, times: Times, span: int, demand: Demand
) -> Prediction:
    predictor = Predictor(times, span)
    most_rows = max(1, demand.host_rows)
    if not demand.host_rows or not (demand.device_rows or strategy == "full_offload"):
        return predictor.device_only(demand)
    match strategy:
        case "device_only":
            return predictor.device_only(demand)
        case "asymmetric_pipelining":
            return predictor.pipelining(demand, most_rows)
        case "apex":
            policy = Apex(times, span, tpot_bounds(config))
        case "apex_paper":
            policy = ApexPaper(times, span)
        case "full_offload":
            return predictor.merging(demand, Choice("merging", 2, 1, most_rows))
        case "async_overlap":
            return predictor.merging(demand, Choice("merging", 1, 1, most_rows))
        case "staggered":
            return predictor.merging(demand, Choice("merging", config.cohorts, 1, most_rows))
        case "passes":
            choice = Choice("merging", config.cohorts, config.passes, most_rows)
            return predictor.merging(demand, choice)
        case _:
            raise ValueError(f"strategy is {strategy!r}; config.py names those there are")
    return policy.predict(demand, most_rows)


def _limit(predicted: Prediction, left: int, host_rows: int, room: Room) -> str:
    """Return which resource more of would help.

    left: requests that the device has no room for. host_rows: those that the host has room for.
    """
    if predicted.host_busy >= SATURATED:
        return "host bandwidth"
    if left == 0 or (predicted.host_rows and host_rows == left):
        return "queue"  # everybody is in: there are no more requests
    if predicted.host_rows == host_rows and host_rows:
        return "host memory" if host_rows < room.host_requests else "max_host_requests"
    return "device bandwidth" if predicted.host_rows else "device memory"


def describe(forecasts: list[Forecast]) -> str:
    """Return a table of forecasts."""
    header = (
        f"{'strategy':22} {'tokens/s':>9} {'device rows':>11} {'TPOT ms':>8} {'host rows':>9} "
        f"{'TPOT ms':>8} {'host share':>10}  limited by"
    )
    lines = [header]
    for one in forecasts:
        lines.append(
            f"{one.strategy:22} {one.rate:9.1f} {one.device_rows:11} "
            f"{_milliseconds(one.device_tpot_sec):>8} {one.host_rows:9} "
            f"{_milliseconds(one.host_tpot_sec):>8} {one.host_share:10.1%}  {one.limit}"
        )
    return "\n".join(lines)


def _milliseconds(seconds: float | None) -> str:
    return "-" if seconds is None else f"{1e3 * seconds:.1f}"
