"""Both lanes on paper: every strategy gives the tokens of one lane, whatever comes late."""

from hypothesis import given, settings
from hypothesis import strategies as st
from paper_backend import VOCAB_SIZE, Pace
from paper_loop import Loop, check, make_request

from apex_jax.cost_model import StageTimes
from apex_jax.policies import AsymmetricPipelining, Merging

TIMES = StageTimes(num_layers=6, linear_sec=1.0, host_attention_sec_per_token=0.01)
POLICIES = {
    "full_offload": Merging(max_cohorts=2, uses_device_lane=False),
    "async_overlap": Merging(),
    "staggered": Merging(max_cohorts=2, is_spread=True),
    "staggered_3": Merging(max_cohorts=3, is_spread=True),
    "passes_2": Merging(max_cohorts=2, passes=2),
    "passes_4": Merging(max_cohorts=1, passes=4),
    "passes_all": Merging(max_cohorts=2, passes=None),
    "asymmetric_pipelining": AsymmetricPipelining(TIMES),
}

requests = st.tuples(
    st.lists(st.integers(0, VOCAB_SIZE - 1), min_size=1, max_size=40),
    st.integers(1, 24),
    st.booleans(),
)


def submit(loop, drawn):
    for index, (prompt, max_tokens, ignore_eos) in enumerate(drawn):
        loop.submit(make_request(str(index), prompt, max_tokens, ignore_eos=ignore_eos))


@settings(max_examples=80, deadline=None)
@given(
    st.sampled_from(sorted(POLICIES)),
    st.lists(requests, min_size=1, max_size=14),
    st.integers(2, 16),
    st.integers(8, 30),
    st.integers(1, 5),
    st.integers(1, 9),
    st.integers(1, 6),
    st.sampled_from(Pace),
    st.integers(0, 2**32),
)
def test_tokens_do_not_depend_on_strategy_or_pace(
    name, drawn, num_pages, num_host_pages, max_requests, max_host_requests, rows, pace, seed
):
    loop = Loop(
        num_pages=num_pages,
        num_host_pages=num_host_pages,
        max_requests=max_requests,
        max_host_requests=max_host_requests,
        max_cohort_rows=rows,
        policy=POLICIES[name],
        pace=pace,
        seed=seed,
    )
    submit(loop, drawn)
    loop.run()
    assert len(loop.outputs) == len(drawn)
    for output in loop.outputs.values():
        check(output)
