"""Strategies that choose: each sweep, from predicted rates, which schedule is to run.

Owns the candidates, the rule that picks among them, and why. What a candidate does is a fixed
policy's business, what it would yield is prediction.py's. Called by the scheduler and the dispatch
loop like any policy. Imports no jax.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from apex_jax.candidates import MAX_COHORTS, UNBOUND, Candidates, TpotBounds
from apex_jax.cost_model import Times
from apex_jax.detour import Detour
from apex_jax.pipelining import AsymmetricPipelining
from apex_jax.policies import Action, CohortView, Load, Merging, Policy
from apex_jax.prediction import Choice, Demand, Prediction, Predictor

MIN_GAIN = 0.015  # over device_only: less is noise
MIN_JOB_GAIN = 0.03  # likewise of a whole job, by guessed costs of the way there and back
MIN_CHANGE = 0.01  # over the choice in force: a change costs the tokens under way some time
# Of a request's time on the device: where its way through the host lane costs more, only those go
# home that the device has room for when nobody waits any more.
DEAR = 0.01
FEWER = 4  # sizes of a host lane, should the largest cost more than it yields
MIN_SWEEPS = 8  # between two looks at a load that is about the same, and at corrected times


@dataclass(frozen=True)
class Decision:
    """What was chosen for a demand, and what else was predicted.

    best: the prediction of the choice in force. device_only: without the host lane. alternatives:
    the best of each kind and number of cohorts, best first. reason: one clause.
    """

    demand: Demand
    best: Prediction
    device_only: Prediction
    alternatives: tuple[Prediction, ...]
    reason: str


class Adaptive:
    """What strategies that choose share: the policy in force does what the loop asks.

    decision: the last one. max_host_rows: as Policy says.
    """

    max_cohorts = MAX_COHORTS
    uses_device_lane = True
    device_prompts_first = False

    def __init__(self, times: Times, layers_per_program: int):
        self._times = times
        self._predictor = Predictor(times, layers_per_program)
        # Without a host lane tokens under way still go on to their end, where that costs nothing.
        self._at_rest = Merging(MAX_COHORTS)
        self._homing = Merging(MAX_COHORTS, passes=None)
        self._policy: Policy = self._at_rest
        self.max_host_rows: int | None = None
        self.drops_tokens = False
        self.keeps_host_rows = False
        self.decision: Decision | None = None

    @property
    def passes(self) -> int | None:
        return self._policy.passes

    def form(self, load: Load) -> Mapping[int, Sequence[int]]:
        if self._policy is self._homing:
            return {}
        # Whom only the host can hold it serves whether that pays or not.
        if self._policy is self._at_rest and not load.num_homeless:
            return {}
        return self._policy.form(load)

    def may_enter(self, points: Sequence[int], num_layers: int) -> bool:
        return self._policy.may_enter(points, num_layers)

    def at_boundary(self, boundary: int, cohort: CohortView) -> Action:
        return self._policy.at_boundary(boundary, cohort)

    def _use(self, choice: Choice) -> None:
        """Put a choice in force."""
        match choice.name:
            case "device_only":
                self._policy = self._at_rest
            case "pipelining":
                self._policy = AsymmetricPipelining(self._times)
            case "pipelining_all":
                self._policy = AsymmetricPipelining(self._times, takes_all=True)
            case _:
                self._policy = Merging(
                    choice.cohorts,
                    choice.passes,
                    is_spread=choice.passes == 1 and choice.cohorts > 1,
                    max_cohort_rows=choice.cohort_rows,
                )


class Apex(Adaptive):
    """The schedule with the highest predicted rate: any number of cohorts, any passes, NEO's, none.

    bounds: on the time per output token of each lane; choices beyond them are not taken.
    """

    # Who decodes on the device yields more for the same prompt, and while it waits to be filled the
    # host lane gains nothing.
    device_prompts_first = True

    def __init__(self, times: Times, layers_per_program: int, bounds: TpotBounds = UNBOUND):
        super().__init__(times, layers_per_program)
        self._candidates = Candidates(times, self._predictor, bounds)
        self._seen: tuple[int, ...] = ()
        self._num_sweeps = 0
        self._host_rate = 0.0  # of the schedule last decided for

    def predict(self, demand: Demand, max_rows: int) -> Prediction:
        """Return the prediction of what would be chosen for a steady state."""
        device_only = self._predictor.device_only(demand)
        self._candidates.forget()
        found = self._candidates.rehearse(demand, max_rows)
        best = max(found, key=_rate, default=device_only)
        return best if best.rate > (1 + MIN_GAIN) * device_only.rate else device_only

    def consider(self, load: Load) -> None:
        num_host, num_tokens = _host_rows(load)
        self.drops_tokens = False
        may_go_home = num_host and load.num_homing and not load.num_homeless
        if may_go_home and self._go_home(load, num_host, num_tokens):
            return
        self._num_sweeps += 1
        # Powers of two: a load that differs as much is another load.
        seen = tuple(
            count.bit_length()
            for count in (load.num_settled_rows, num_host, load.waiting.num_requests)
        )
        if seen != self._seen:
            self._candidates.forget()
        if seen != self._seen or self._num_sweeps >= MIN_SWEEPS:
            self._seen, self._num_sweeps = seen, 0
            self._decide(load, num_host, num_tokens)

    def _decide(self, load: Load, num_host: int, num_tokens: int) -> None:
        row_tokens = num_tokens / num_host if num_host else _device_row_tokens(load)
        demand = Demand(load.num_settled_rows, load.num_settled_tokens, num_host, row_tokens)
        device_only = self._predictor.device_only(demand)
        candidates = self._candidates.rehearse(demand, load.max_rows)
        self._admit(load, demand, device_only, candidates)
        candidates.sort(key=_rate, reverse=True)
        best, reason = device_only, "no requests in the host lane"
        if num_host:
            reason = "the host lane would yield no more"
        if candidates and candidates[0].rate > (1 + MIN_GAIN) * device_only.rate:
            best, reason = self._stay_or_go(candidates)
        in_force = None if self.decision is None else self.decision.best.choice
        if best.choice != in_force:
            self._use(best.choice)
        self._host_rate = best.host_rate
        self.decision = Decision(demand, best, device_only, _best_of_each(candidates), reason)

    def _admit(
        self,
        load: Load,
        demand: Demand,
        device_only: Prediction,
        candidates: Sequence[Prediction],
    ) -> None:
        """Decide how many the host lane may hold, and whether they stay while others wait."""
        num_host, waiting = demand.host_rows, load.waiting
        wanted = demand._replace(host_rows=num_host + waiting.num_requests)
        all_in = list(candidates)
        if wanted != demand:
            all_in += self._candidates.estimate(wanted, load.max_rows)
        most = max(all_in, key=_rate, default=device_only)
        pays = most.rate > (1 + MIN_GAIN) * device_only.rate
        self.max_host_rows = most.host_rows if pays else 0
        self.keeps_host_rows = False
        if not pays or not waiting.num_requests or not device_only.rate:
            return
        detour = Detour(self._times, waiting, device_only)
        if not detour.is_dear(most, DEAR):
            return
        for part in range(1, FEWER):
            fewer = wanted._replace(host_rows=num_host + waiting.num_requests // 4**part)
            all_in += self._candidates.estimate(fewer, load.max_rows)
        most = max(all_in, key=lambda one: detour.gain_sec(one, num_host))
        pays = detour.gain_sec(most, num_host) > MIN_JOB_GAIN * detour.horizon_sec
        self.max_host_rows = most.host_rows if pays else 0
        self.keeps_host_rows = pays

    def _go_home(self, load: Load, num_host: int, num_tokens: int) -> bool:
        """Have no token begin where rows yield more on the device, which has room for them."""
        settled = Demand(load.num_settled_rows, load.num_settled_tokens, num_host)
        alone = self._predictor.device_only(settled)
        row_tokens = round(num_tokens / num_host)
        homing = Demand(
            load.num_settled_rows + load.num_homing,
            load.num_settled_tokens + load.num_homing * row_tokens,
        )
        at_home = self._predictor.device_only(homing)
        if at_home.rate - alone.rate <= self._host_rate:
            return False
        # Rows change lanes between tokens: those under way are hurried to their end, or given up
        # where that takes the rows that wait for it longer than the tokens are worth.
        per_row_sec = self._times.host_attention(num_host, num_tokens) / num_host
        hurry_sec = self._times.num_layers * per_row_sec * load.num_under_way / 2
        lost_tokens = hurry_sec / at_home.sweep_sec * load.num_homing
        self.drops_tokens = lost_tokens > load.num_under_way / 2
        self._policy = self._homing
        self._seen = ()
        best = alone._replace(choice=Choice("homing", MAX_COHORTS, None))
        reason = "the device has room for who is on the host"
        self.decision = Decision(settled, best, alone, (), reason)
        return True

    def _stay_or_go(self, candidates: Sequence[Prediction]) -> tuple[Prediction, str]:
        """Return the best candidate, or what is in force where that is about as good."""
        best = candidates[0]
        if self.decision is not None:
            now = self.decision.best.choice
            for one in candidates:
                is_same = one.choice[:3] == now[:3]
                if is_same and one.rate * (1 + MIN_CHANGE) > best.rate:
                    return one, "it is in force, and none would yield much more"
        return best, "the highest predicted rate"


class ApexPaper(Adaptive):
    """The rule as published: nobody on the host, equation 6, or else asynchronous overlap.

    min_host_rows: fewer host-lane requests are left alone.
    """

    def __init__(self, times: Times, layers_per_program: int, min_host_rows: int = 1):
        super().__init__(times, layers_per_program)
        self._min_host_rows = min_host_rows

    def predict(self, demand: Demand, max_rows: int) -> Prediction:
        """Return the prediction of what would be chosen for a steady state without prompts."""
        return self._choose(demand, max_rows, 0)[0]

    def consider(self, load: Load) -> None:
        num_host, num_tokens = _host_rows(load)
        row_tokens = num_tokens / num_host if num_host else 0.0
        demand = Demand(load.num_settled_rows, load.num_settled_tokens, num_host, row_tokens)
        device_only = self._predictor.device_only(demand)
        best, reason = self._choose(demand, load.max_rows, load.num_prompt_tokens)
        if best.choice != (self.decision.best.choice if self.decision else None):
            self._use(best.choice)
        self.decision = Decision(demand, best, device_only, (best,), reason)

    def _choose(
        self, demand: Demand, max_rows: int, num_prompt_tokens: int
    ) -> tuple[Prediction, str]:
        device_only = self._predictor.device_only(demand)
        host_rows = demand.host_rows
        if host_rows < self._min_host_rows:
            return device_only, f"fewer than {self._min_host_rows} requests in the host lane"
        times, rows = self._times, max(1, demand.device_rows)
        linear_sec = times.linear(rows)
        attention_sec = times.device_attention(rows, demand.device_tokens)
        # One of the two linear passes is the prompts', where there are any.
        overlap_sec = times.linear(num_prompt_tokens or rows) + linear_sec + attention_sec
        host_tokens = round(host_rows * demand.host_row_tokens)
        host_sec = times.host_attention(host_rows, host_tokens) / host_rows
        # N_G / N_C, with N_G = rows / attention_sec and N_C = 1 / host_sec.
        ratio = rows * host_sec / attention_sec if attention_sec else float("inf")
        limit = overlap_sec * (overlap_sec - linear_sec) / max(linear_sec * attention_sec, 1e-30)
        if ratio < limit:
            piped = self._predictor.pipelining(demand, max_rows)
            return (
                piped._replace(choice=Choice("pipelining", 2, None, piped.choice.cohort_rows)),
                f"equation 6: N_G / N_C = {ratio:.3g} is below {limit:.3g}",
            )
        cohort_rows = host_rows
        if demand.device_rows:  # else there is no window to miss
            window_sec = device_only.sweep_sec - 2 * times.transfer(num_rows=host_rows)
            cohort_rows = max(1, self._predictor.rows_within(window_sec, demand))
        choice = Choice("merging", 1, 1, min(max_rows, cohort_rows))
        return (
            self._predictor.merging(demand, choice),
            f"equation 6: N_G / N_C = {ratio:.3g} is not below {limit:.3g}",
        )


def _rate(prediction: Prediction) -> float:
    return prediction.rate


def _best_of_each(candidates: Sequence[Prediction]) -> tuple[Prediction, ...]:
    """Return of each kind and number of cohorts the first."""
    found: dict[tuple[str, int], Prediction] = {}
    for one in candidates:
        found.setdefault(one.choice[:2], one)
    return tuple(found.values())


def _host_rows(load: Load) -> tuple[int, int]:
    """Return the host lane's rows and the tokens of their KV."""
    return (
        len(load.lengths) + load.num_under_way,
        sum(load.lengths) + load.num_tokens_under_way,
    )


def _device_row_tokens(load: Load) -> float:
    """Return the tokens of a device row: the best guess for who waits."""
    return load.num_settled_tokens / load.num_settled_rows if load.num_settled_rows else 1.0
