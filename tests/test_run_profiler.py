"""What the profiler's command prints and keeps, over simulated hardware."""

import json
import types

import pytest

from apex_jax.backends.simulated import SimulatedBackend
from apex_jax.buckets import HostLimits, choose
from apex_jax.config import Config, ConfigError, ProfileConfig, SchedulerConfig
from apex_jax.cost_model import StageTimes
from apex_jax.profiling import profiler
from apex_jax.profiling.batches import Capacity
from apex_jax.profiling.profiler import Profiler
from apex_jax.profiling.table import path_of
from launch import run_profiler

TIMES = StageTimes(num_layers=4, linear_sec=1e-3, host_job_sec=2e-3, head_sec=1e-3, stage_sec=1e-4)
CAPACITY = Capacity(num_layers=4, span=2, num_pages=16, num_host_pages=32, max_model_len=64)
KEY = {"device": "simulated"}


@pytest.fixture
def started(monkeypatch):
    """Engines that were started: their number, and whether each was closed."""
    closed = []

    def create_engine(config, on_progress):
        backend = SimulatedBackend(TIMES, layers_per_program=2, page_size=16)
        shapes = choose(
            max_requests=4,
            max_prefill_tokens=16,
            max_model_len=64,
            num_pages=16,
            page_size=16,
            host=HostLimits(max_cohort_rows=4, num_staging_pages=4, max_move_pages=4),
        )
        index = len(closed)
        closed.append(False)
        return types.SimpleNamespace(
            profiler=Profiler(backend, shapes, CAPACITY, KEY),
            close=lambda: closed.__setitem__(index, True),
        )

    monkeypatch.setattr(run_profiler, "create_engine", create_engine)
    monkeypatch.setattr(profiler, "MAX_ROUNDS", 3)
    return closed


@pytest.fixture
def config(tmp_path):
    return Config(
        scheduler=SchedulerConfig(strategy="staggered"),
        profile=ProfileConfig(cache_dir=str(tmp_path / "kept")),
    )


def run(config, output=None, recalibrate=False):
    run_profiler.run(config, output, recalibrate=recalibrate)


def test_a_profile_is_printed_kept_and_copied(started, config, tmp_path, capsys):
    run(config, output=tmp_path / "copy.json")
    told = capsys.readouterr()
    assert started == [True]
    kept = path_of(tmp_path / "kept", KEY)
    assert json.loads(kept.read_text()) == json.loads((tmp_path / "copy.json").read_text())
    assert told.err.count("profile    kept in ") == 2
    boundaries = [line.split() for line in told.out.splitlines() if line.startswith("boundary")]
    assert [(bucket, float(sec)) for _, bucket, sec, _ in boundaries] == [
        ("2", 1100.0),
        ("4", 1100.0),
    ]
    assert "the device's stages take 1.00 and the host's jobs 1.00 times as long" in told.out
    assert "prediction of points between these  median 0.0%" in told.out
    assert "the same point measured twice       median 0.0%" in told.out


def test_a_profile_that_was_kept_is_printed_and_not_measured_again(
    started, config, tmp_path, capsys, monkeypatch
):
    run(config)
    first = capsys.readouterr().out
    kept = path_of(tmp_path / "kept", KEY).read_bytes()
    run(config)
    assert capsys.readouterr().out == first
    monkeypatch.setattr(profiler, "MAX_ROUNDS", 2)
    run(config, recalibrate=True)
    assert " 2 repeats" in capsys.readouterr().out
    assert path_of(tmp_path / "kept", KEY).read_bytes() != kept


def test_a_damaged_profile_is_reported_and_measured_again(started, config, tmp_path, capsys):
    path = path_of(tmp_path / "kept", KEY)
    path.parent.mkdir()
    path.write_text("{}")
    run(config)
    assert "profile    not used: " in capsys.readouterr().err
    assert json.loads(path.read_text())["key"] == KEY


def test_without_a_folder_nothing_is_kept(started, config, tmp_path, capsys):
    config.profile.cache_dir = ""
    run(config)
    assert "kept in" not in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("flag", ["--config.profile.cache_dir", "--output"])
def test_what_cannot_be_written_is_named(started, config, tmp_path, flag):
    (tmp_path / "file").touch()
    if flag == "--output":
        output = tmp_path / "file" / "copy.json"
    else:
        output, config.profile.cache_dir = None, str(tmp_path / "file" / "kept")
    with pytest.raises(ConfigError, match=rf"{flag}: .* cannot be written"):
        run(config, output)
    assert started == [True]


def test_without_a_host_lane_there_is_nothing_to_predict(started, config):
    config.scheduler.strategy = "device_only"
    with pytest.raises(ConfigError, match="'device_only'; without a host lane nothing is predict"):
        run(config)
    assert started == []


def test_what_is_wrong_with_the_settings_is_a_line_and_status_2(monkeypatch, capsys):
    config = Config(scheduler=SchedulerConfig(strategy="device_only"))
    values = types.SimpleNamespace(config=config, output=None, recalibrate=False)
    monkeypatch.setattr(run_profiler.flags, "FLAGS", values)
    with pytest.raises(SystemExit, match="2"):
        run_profiler.main([])
    assert capsys.readouterr().err.startswith("error: --config.scheduler.strategy")
