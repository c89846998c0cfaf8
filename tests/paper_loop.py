"""The engine's loop on paper: real scheduler and dispatch over a backend that computes nothing."""

import dataclasses

from paper_backend import VOCAB_SIZE, Pace, PaperBackend, expected_output

from apex_jax.buckets import HostLimits, choose
from apex_jax.dispatch import Dispatch
from apex_jax.policies import DeviceOnly
from apex_jax.request import FinishReason, Request, SamplingParams
from apex_jax.scheduler import Scheduler

PAGE_SIZE = 8
EOS = frozenset({3})
SHARED = [1 + index * 7 % 47 for index in range(24)]  # three pages with which prompts may begin
NUM_LAYERS, LAYERS_PER_PROGRAM = 6, 3


class Loop:
    """The engine's loop without its set-up: plan, launch, commit the sweep before.

    num_host_pages: 0 for a policy without a host lane.
    """

    def __init__(
        self,
        *,
        num_pages,
        max_requests,
        max_prefill_tokens=16,
        pace=Pace.LATE,
        seed=0,
        policy=None,
        num_host_pages=0,
        max_host_requests=0,
        max_cohort_rows=4,
        num_layers=NUM_LAYERS,
        layers_per_program=LAYERS_PER_PROGRAM,
        reuses_prefixes=False,
    ):
        self.num_pages = num_pages
        policy = DeviceOnly() if policy is None else policy
        max_model_len = max(num_pages, num_host_pages) * PAGE_SIZE
        num_staging_pages = max_model_len // PAGE_SIZE
        host = HostLimits(max_cohort_rows, num_staging_pages, num_staging_pages)
        buckets = choose(
            max_requests=max_requests,
            max_prefill_tokens=max_prefill_tokens,
            max_model_len=max_model_len,
            num_pages=num_pages,
            page_size=PAGE_SIZE,
            host=host if policy.max_cohorts else None,
        )
        self.scheduler = Scheduler(
            buckets=buckets,
            num_layers=num_layers,
            num_pages=num_pages,
            max_requests=max_requests,
            max_model_len=max_model_len,
            vocab_size=VOCAB_SIZE,
            eos_token_ids=EOS,
            policy=policy,
            num_host_pages=num_host_pages,
            max_host_requests=max_host_requests,
            reuses_prefixes=reuses_prefixes,
        )
        self.backend = PaperBackend(
            num_layers=num_layers,
            layers_per_program=layers_per_program,
            page_size=PAGE_SIZE,
            num_pages=num_pages,
            num_slots=max_requests + max_host_requests,
            num_host_pages=num_host_pages,
            num_staging_pages=num_staging_pages,
            pace=pace,
            seed=seed,
        )
        self.dispatch = Dispatch(
            self.backend,
            policy,
            num_layers=num_layers,
            layers_per_program=layers_per_program,
            watchdog_sec=1e9,
            max_transit_pages=3,
        )
        self.previous = None
        self.plans = []
        self.outputs = {}

    def submit(self, request):
        self.scheduler.submit(request, self.backend.now())

    def step(self):
        scheduler = self.scheduler
        plan = scheduler.plan_sweep()
        launched = None
        if plan is not None:
            self.plans.append(plan)
            launched = self.dispatch.launch(plan)
            scheduler.launched(launched.sampled_cohorts, launched.finished_moves)
        assert plan is not None or self.previous is not None or scheduler.is_idle
        if self.previous is not None:
            tokens = self.dispatch.read(self.previous)
            for output in scheduler.commit(tokens, self.backend.now()):
                assert output.request.request_id not in self.outputs
                self.outputs[output.request.request_id] = output
        self.previous = launched
        scheduler.check_ledger()

    def run(self):
        num_steps = 0
        while not self.scheduler.is_idle or self.previous is not None:
            self.step()
            num_steps += 1
            assert num_steps < 20_000, self.scheduler.describe()
        assert self.scheduler.num_in_flight == self.scheduler.num_unfinished == 0


def make_request(name, prompt, max_tokens, **sampling):
    return Request(name, tuple(prompt), SamplingParams(max_tokens=max_tokens, **sampling))


class Watcher:
    """Ends an output with its token number `num_tokens`, and sees that each comes once."""

    def __init__(self, num_tokens):
        self.num_tokens, self.seen = num_tokens, []

    def is_last(self, token):
        assert len(self.seen) < self.num_tokens, "asked after the end"
        self.seen.append(token)
        return len(self.seen) == self.num_tokens


def make_watched_request(name, prompt, max_tokens, num_tokens, **sampling):
    request = make_request(name, prompt, max_tokens, **sampling)
    return dataclasses.replace(request, is_last=Watcher(num_tokens).is_last)


def check(output):
    request = output.request
    watcher = None if request.is_last is None else request.is_last.__self__
    stops = frozenset(request.sampling.stop_token_ids)
    stops = stops if request.sampling.ignore_eos else stops | EOS
    expected = expected_output(request.prompt_token_ids, request.sampling.max_tokens, stops)
    ends_by_token = expected[-1] in stops
    is_cut = watcher is not None and watcher.num_tokens < len(expected) + (not ends_by_token)
    if watcher is not None:
        expected = expected[: watcher.num_tokens]
        assert watcher.seen == expected[: -1 if ends_by_token and not is_cut else None]
    assert list(output.token_ids) == expected
    ended = FinishReason.STOP if ends_by_token or is_cut else FinishReason.LENGTH
    assert output.finish_reason == ended
    assert output.arrival_sec <= output.first_token_sec <= output.finish_sec
    assert 0 <= output.num_host_tokens <= len(output.token_ids)
