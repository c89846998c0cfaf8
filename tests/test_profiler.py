"""The profiler over hardware whose times are known, and over a small engine."""

import dataclasses

import pytest
from small_engines import hybrid_engine, run

from apex_jax.backends.simulated import SimulatedBackend
from apex_jax.buckets import Buckets, HostLimits, choose, smallest_that_holds
from apex_jax.config import ProfileConfig
from apex_jax.cost_model import PromptWork, StageTimes, Times
from apex_jax.measured_times import MeasuredTimes
from apex_jax.profiling import profiler
from apex_jax.profiling.batches import Capacity, decode_batch, device_lengths, fullest, host_lengths
from apex_jax.profiling.profiler import Profiler
from apex_jax.profiling.rounds import Timed, run_rounds
from apex_jax.profiling.table import STAGES, Measurements, path_of, save
from apex_jax.request import Request, SamplingParams

CAPACITY = Capacity(num_layers=8, span=2, num_pages=64, num_host_pages=256, max_model_len=512)
TRUE = StageTimes(
    num_layers=8,
    linear_sec=2e-3,
    linear_sec_per_row=1e-4,
    pre_share=0.25,
    device_attention_sec=1e-4,
    device_attention_sec_per_token=1e-6,
    prefill_attention_sec_per_pair=1e-8,
    host_attention_sec_per_token=2e-6,
    host_row_sec=1e-5,
    host_job_sec=3e-4,
    host_copy_sec_per_token=1e-7,
    transfer_sec=2e-5,
    transfer_sec_per_row=2e-6,
    transfer_sec_per_token=1e-7,
    head_sec=3e-3,
    head_sec_per_row=1e-4,
    stage_sec=1e-5,
    dispatch_sec=5e-6,
)


def choose_shapes(**changes):
    settings = {
        "max_requests": 32,
        "max_prefill_tokens": 64,
        "max_model_len": CAPACITY.max_model_len,
        "num_pages": CAPACITY.num_pages,
        "page_size": 16,
        "host": HostLimits(max_cohort_rows=32, num_staging_pages=32, max_move_pages=32),
    }
    return choose(**{**settings, **changes})


class PaddedTimes(StageTimes):
    """What described hardware takes where programs are padded to buckets, as a real one's are."""

    def __init__(self, times: StageTimes, shapes: Buckets):
        super().__init__(**vars(times))
        object.__setattr__(self, "_shapes", shapes)  # its base is frozen

    def _rows(self, num_rows):
        return smallest_that_holds((0, *self._shapes.host.head_rows), num_rows)

    def _tokens(self, num_rows, num_tokens):
        """Tokens of as many blocks as rows of equal length fill."""
        rows, block_tokens = self._rows(num_rows), self._shapes.block_tokens
        num_blocks = -(-(num_tokens // num_rows) // block_tokens) * num_rows
        return smallest_that_holds(self._shapes.num_blocks[rows], num_blocks) * block_tokens

    def _pages(self, num_tokens):
        sizes = self._shapes.host.move_pages
        return smallest_that_holds((0, *(16 * size for size in sizes)), num_tokens)

    def _prompts(self, prompts):
        context = -(-prompts.num_kv_tokens // prompts.num_rows // 16)
        tokens = smallest_that_holds(self._shapes.context_pages, context) * 16 * prompts.num_rows
        return prompts._replace(num_kv_tokens=tokens, num_pairs=prompts.num_tokens * tokens)

    def linear(self, num_rows, num_cohort_rows=0):
        return super().linear(self._rows(num_rows), self._rows(num_cohort_rows))

    def pre_attention(self, num_rows):
        return super().pre_attention(self._rows(num_rows))

    def post_attention(self, num_rows):
        return super().post_attention(self._rows(num_rows))

    def head(self, num_rows, *, is_greedy=False):
        return super().head(self._rows(num_rows))

    def layers(self, num_layers, num_rows, num_tokens):
        rows = self._rows(num_rows)
        return super().layers(num_layers, rows, self._tokens(num_rows, num_tokens))

    def device_attention(self, num_rows, num_tokens):
        return super().device_attention(num_rows, self._tokens(num_rows, num_tokens))

    def prefill(self, num_layers, prompts):
        return super().prefill(num_layers, self._prompts(prompts))

    def staged_layer(self, prompts):
        return super().staged_layer(self._prompts(prompts))

    def device_copy(self, num_tokens):
        return super().device_copy(self._pages(num_tokens))

    def host_copy(self, num_tokens):
        return super().host_copy(self._pages(num_tokens))

    def transfer(self, num_rows=0, num_tokens=0):
        return super().transfer(self._rows(num_rows), self._pages(num_tokens))


SHAPES = choose_shapes()
PADDED = PaddedTimes(TRUE, SHAPES)
# Rows and tokens in buckets and between them; block buckets have few enough tokens to be told.
QUESTIONS = [
    *(("embed", rows) for rows in (1, 4, 32)),
    *(("linear", rows) for rows in (1, 3, 20, 32)),
    *(("linear", rows, cohort) for rows, cohort in ((1, 1), (3, 20), (32, 9))),
    *((name, rows) for name in ("pre_attention", "post_attention") for rows in (1, 20)),
    *(("device_attention", rows, rows * 60) for rows in (1, 4, 9)),
    *(("layers", 2, rows, rows * 60) for rows in (1, 4, 9)),
    *(("head", rows) for rows in (1, 20, 64)),
    *(("prefill", 4, PromptWork(1, 64, context, 0)) for context in (64, 100, 500)),
    ("staged_layer", PromptWork(4, 16, 4 * 40, 0)),
    *(("host_attention", rows, rows * length) for rows, length in ((1, 16), (5, 200), (32, 100))),
    *((name, tokens) for name in ("device_copy", "host_copy") for tokens in (100, 300)),
    *(("transfer", rows, 0) for rows in (1, 20)),
    *(("transfer", 0, tokens) for tokens in (100, 300)),
]


def make_profiler(times=PADDED, shapes=SHAPES, capacity=CAPACITY, **others):
    backend = SimulatedBackend(times, layers_per_program=capacity.span, page_size=16, **others)
    return Profiler(backend, shapes, capacity, {"device": "simulated"})


@pytest.fixture(scope="module", autouse=True)
def few_rounds():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(profiler, "MAX_ROUNDS", 5)
        yield


@pytest.fixture(scope="module")
def table(few_rounds):
    return make_profiler().profile(lambda _: None)


@pytest.mark.parametrize("question", QUESTIONS, ids=lambda one: " ".join(map(str, one)))
def test_a_profile_of_known_hardware_answers_as_it_does(table, question):
    name, *arguments = question
    found = getattr(make_profiler().times_of(table.measurements), name)(*arguments)
    # The dispatch of a chain's first stage counts as well, and a transfer is what is left over when
    # the rest of a round trip is taken away.
    rel = 0.15 if name == "transfer" else 0.02
    assert found == pytest.approx(getattr(PADDED, name)(*arguments), rel=rel, abs=2e-6)


def test_a_profile_of_known_hardware_predicts_what_lies_between(table):
    assert table.prediction.num_points >= 15
    assert table.prediction.median < 0.005
    assert table.prediction.percentile_95 < 0.02
    assert table.noise.percentile_95 < 1e-9
    assert table.measurements.dispatch_sec == pytest.approx(TRUE.dispatch_sec)
    assert table.measurements.device_slowdown == pytest.approx(1.0, abs=0.01)
    assert table.measurements.host_slowdown == pytest.approx(1.0, abs=0.01)


def test_noisy_hardware_shows_in_spread_and_noise(table):
    noisy = make_profiler(noise=0.1).profile(lambda _: None)
    assert 0.005 < noisy.noise.median < 0.1
    assert noisy.prediction.median < 0.1
    spreads = [
        sum(point.spread_sec for point in one.measurements.stages["layers"].values())
        for one in (table, noisy)
    ]
    assert spreads[0] == pytest.approx(0.0, abs=1e-9)
    assert spreads[1] > 1e-3


@pytest.mark.parametrize("num_host_pages", [256, 32, 3])
def test_a_calibration_answers_all_questions_alike(num_host_pages):
    capacity = dataclasses.replace(CAPACITY, num_host_pages=num_host_pages)
    times = make_profiler(capacity=capacity).calibrate()
    assert isinstance(times, Times)
    for rows in (1, 32):
        assert times.linear(rows) == pytest.approx(PADDED.linear(rows), rel=0.02)
        assert times.head(rows) == pytest.approx(PADDED.head(rows), rel=0.02)
    assert times.host_attention(2, 40) == pytest.approx(PADDED.host_attention(2, 40), rel=0.05)
    assert PADDED.linear(1) < times.linear(9) < PADDED.linear(32), "between the two it knows"


def test_a_device_that_never_answers_is_reported():
    silent = make_profiler()
    silent._chains._backend.wait_any = lambda handles, deadline_sec: None
    with pytest.raises(TimeoutError, match="took more than 120 s when it was measured"):
        silent.calibrate()


# Rounds


def test_too_little_time_drops_repeats_and_no_point():
    timed = [Timed(lambda num_links: 1e-3 * num_links) for _ in range(5)]
    assert run_rounds(timed, 9, 0.0, lambda _: None) == 1
    assert [len(one.seconds) for one in timed] == [1] * 5
    assert run_rounds(timed, 9, 60.0, lambda _: None) == 9


def test_a_chain_is_as_long_as_it_takes_to_be_timed():
    lengths = []
    for link_sec in (1e-6, 1e-3, 1.0):
        timed = Timed(lambda num_links, link_sec=link_sec: link_sec * num_links)
        timed.warm_up()
        timed.repeat()
        lengths.append(timed.num_links)
        assert timed.median == pytest.approx(link_sec)
    assert lengths == [24, 10, 1]


def test_progress_is_reported_now_and_then(monkeypatch):
    clock = iter(range(0, 1000, 3))
    monkeypatch.setattr("time.perf_counter", lambda: float(next(clock)))
    lines = []
    run_rounds([Timed(lambda _: 1e-3)] * 4, 2, 900.0, lines.append)
    assert any("warmed up 2 of 4 points" in line for line in lines)
    assert any("4 points, round 1 of up to 2" in line for line in lines)


# Batches


def test_a_batch_fills_just_the_blocks_that_were_asked_for():
    lengths = device_lengths(3, 7, SHAPES, CAPACITY)
    assert lengths is not None
    assert sum(-(-length // SHAPES.block_tokens) for length in lengths) == 7
    assert device_lengths(3, 2, SHAPES, CAPACITY) is None, "a row fills one at least"
    assert device_lengths(1, 5, SHAPES, CAPACITY) is None, "longer than a request may be"
    assert device_lengths(32, 70, SHAPES, CAPACITY) is None, "more pages than there are"


def test_the_fullest_batch_of_a_bucket_fits_the_pool():
    for rows, sizes in SHAPES.num_blocks.items():
        for blocks in sizes:
            lengths = fullest(rows, blocks, SHAPES, CAPACITY)
            assert lengths is not None
            batch = decode_batch(lengths, CAPACITY.num_pages, SHAPES.page_size)
            used = [
                set(row[: -(-length // 16)].tolist())
                for row, length in zip(batch.block_table_bm, lengths, strict=True)
            ]
            assert len(set().union(*used)) == sum(map(len, used)), "no page has two rows"
    few = dataclasses.replace(CAPACITY, num_pages=3)
    assert fullest(32, SHAPES.num_blocks[32][0], SHAPES, few) is None


def test_a_cohorts_rows_are_as_long_as_the_pool_allows():
    assert host_lengths(1, SHAPES, CAPACITY) == (16, 91, 512)
    assert host_lengths(32, SHAPES, CAPACITY) == (16, 45, 128)
    assert host_lengths(256, SHAPES, CAPACITY) == (16,)
    assert host_lengths(257, SHAPES, CAPACITY) == ()


# What a start of an engine makes of it


@pytest.fixture
def kept(table, tmp_path):
    """A folder that holds the profile."""
    save(path_of(tmp_path, table.key), table)
    return tmp_path


def times_and_lines(config):
    lines = []
    return make_profiler().times(config, lines.append), lines


def test_a_profile_that_was_kept_is_used_and_named(kept, table):
    times, lines = times_and_lines(ProfileConfig(cache_dir=str(kept)))
    assert isinstance(times, MeasuredTimes)
    assert times.measurements == table.measurements
    assert lines == [f"profile    measured {table.measured_at} on simulated"]


@pytest.mark.parametrize("recalibrate", [True, False])
def test_without_one_or_where_it_is_not_wanted_it_is_calibrated(kept, table, recalibrate):
    folder = str(kept) if recalibrate else str(kept / "none")
    times, lines = times_and_lines(ProfileConfig(cache_dir=folder, recalibrate=recalibrate))
    assert isinstance(times, MeasuredTimes)
    assert times.measurements != table.measurements
    assert len(lines) == 1
    assert lines[0].startswith("profile    calibrated now in ")


def test_without_a_folder_none_is_looked_for():
    _, lines = times_and_lines(ProfileConfig(cache_dir=""))
    assert len(lines) == 1


def test_a_damaged_profile_is_reported_and_measured_anew(kept, table):
    path_of(kept, table.key).write_text("{")
    times, lines = times_and_lines(ProfileConfig(cache_dir=str(kept)))
    assert isinstance(times, MeasuredTimes)
    assert "is damaged" in lines[0]
    assert lines[1].startswith("profile    calibrated now in ")


# A real engine


@pytest.fixture(scope="module")
def engine_times():
    engine = hybrid_engine("mha")
    return engine, engine.profiler.calibrate()


def test_a_real_engine_is_measured_stage_by_stage(engine_times):
    _, times = engine_times
    measurements: Measurements = times.measurements
    assert set(measurements.stages) == set(STAGES)
    for name in ("embed", "layers", "prefill", "staged_layer", "head_sample", "host_attention"):
        assert all(point.sec > 0 for point in measurements.stages[name].values()), name
    assert measurements.dispatch_sec > 0
    assert min(measurements.device_slowdown, measurements.host_slowdown) >= 1


def test_measuring_leaves_an_engine_as_it_was(engine_times):
    """What is left in pages and slots is overwritten before it is read."""
    engine, _ = engine_times
    requests = [
        Request(f"r{index}", (1, 2, 3 + index), SamplingParams(max_tokens=8, temperature=0.0))
        for index in range(6)
    ]
    before = run(engine, requests)
    engine.profiler.calibrate()
    assert run(engine, requests) == before
