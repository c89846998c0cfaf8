"""How benchmarks bring a loop to a steady state and look at it, on predicted hardware."""

import dataclasses

import pytest

from apex_jax.backends.simulated import SimulatedBackend
from apex_jax.config import Config, LlamaConfig, ModelConfig, SchedulerConfig
from apex_jax.cost_model import StageTimes
from apex_jax.dispatch import StuckError
from apex_jax.paced_engine import PacedPlan
from apex_jax.policies import DeviceOnly, Merging
from apex_jax.request import Request, SamplingParams
from launch.steady_state import SteadyRun, Steered
from launch.strategy_names import settings_of

pytestmark = pytest.mark.usefixtures("without_annotations_checked")

TIMES = StageTimes(num_layers=4, linear_sec=1.0, device_attention_sec=0.5, host_row_sec=0.1)
SWEEP_SEC = 4 * 1.5
PROMPT = 40


def make_run(policy, num_device=3, num_host=6):
    """Return a run of a strategy, and who is to fill its lanes."""
    config = Config(
        model=ModelConfig(
            weights="dummy", architecture=LlamaConfig(4, 64, 128, 4, 2, 16, 256, 4096)
        )
    )
    config.scheduler = SchedulerConfig(
        strategy="async_overlap",
        max_requests=num_device,
        max_host_requests=num_host,
        max_model_len=400,
    )
    config.cache.device_bytes = num_device * 25 * 8192
    plan = PacedPlan.create(config)
    backend = SimulatedBackend(TIMES, layers_per_program=plan.layers_per_program, page_size=16)
    steered = Steered(policy)
    loop = plan.loop(backend, steered)
    sampling = SamplingParams(max_tokens=300, temperature=0.0, ignore_eos=True)
    requests = [Request(str(one), (1,) * PROMPT, sampling) for one in range(num_device + num_host)]
    run = SteadyRun(loop, steered, backend.now, TIMES.num_layers)
    return run, loop, requests[:num_device], requests[num_device:]


def test_both_lanes_are_full_and_parts_of_tokens_count():
    run, loop, device, host = make_run(Merging())
    run.fill(device, host, num_settling_sweeps=10)
    look = run.look(30 * (SWEEP_SEC + 1 / 5) - 1e-6)
    assert (look.device_rows, look.host_rows) == (3, 6)
    rates = look.rates()
    # A cohort samples every fifth sweep, and costs one linear pass more when it does.
    sweep_sec = SWEEP_SEC + 1 / 5
    assert look.num_sweeps % 5 == 0
    assert rates["sweep_sec"] == pytest.approx(sweep_sec)
    assert rates["tokens_per_sec"] == pytest.approx((3 + 6 / 5) / sweep_sec)
    assert rates["host_tokens_per_sec"] == pytest.approx(6 / 5 / sweep_sec)
    assert rates["merges_per_sweep"] == pytest.approx(4 / 5 - 1 / 5)
    assert rates["late_per_sweep"] == rates["preemptions"] == 0
    assert PROMPT < look.lengths(PROMPT)[1] < look.lengths(PROMPT)[0] < PROMPT + 100
    assert loop.scheduler.num_waiting == 0


def test_without_a_host_lane_every_sweep_is_looked_at():
    run, _, device, _ = make_run(DeviceOnly())
    run.fill(device, [], num_settling_sweeps=2)
    rates = run.look(10 * SWEEP_SEC).rates()
    assert rates["tokens_per_sec"] == pytest.approx(3 / SWEEP_SEC)
    assert rates["host_rows"] == rates["host_tokens_per_sec"] == 0


def test_a_policy_is_steered_only_while_the_host_is_filled():
    steered = Steered(Merging(max_cohorts=2))
    assert steered.uses_device_lane
    steered.fills_host = True
    assert not steered.uses_device_lane
    assert not Steered(Merging(uses_device_lane=False)).uses_device_lane
    assert (steered.max_cohorts, steered.passes, steered.max_host_rows) == (2, 1, None)


def test_requests_that_end_too_soon_are_told():
    run, _, device, host = make_run(Merging())
    run.fill(device, host, num_settling_sweeps=1)
    with pytest.raises(ValueError, match="a request ended while it was looked at"):
        run.look(1000 * SWEEP_SEC)


def test_a_loop_in_which_nothing_can_start_says_so():
    _, loop, device, _ = make_run(DeviceOnly())
    loop.submit(device[0])
    loop.scheduler.plan_sweep = lambda: None
    with pytest.raises(StuckError, match=r"nothing can start\n0 in the device lane"):
        loop.step()


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("device_only", SchedulerConfig(strategy="device_only")),
        ("staggered", SchedulerConfig(strategy="staggered")),
        ("staggered_4", SchedulerConfig(strategy="staggered", cohorts=4)),
        ("passes_3", SchedulerConfig(strategy="passes", passes=3)),
    ],
)
def test_names_of_strategies(name, settings):
    base = SchedulerConfig(max_host_requests=9)
    assert settings_of(name, base) == dataclasses.replace(settings, max_host_requests=9)


@pytest.mark.parametrize("name", ["vllm", "device_only_2", "staggered_x", ""])
def test_names_that_mean_nothing_are_refused(name):
    with pytest.raises(
        ValueError, match=f"no strategy is called '{name}'; there are .*device_only"
    ):
        settings_of(name, SchedulerConfig())
