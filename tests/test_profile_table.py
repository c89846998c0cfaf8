"""The file of a profile: what is written is read, and what is no profile is refused by name."""

import dataclasses
import json

import pytest

from apex_jax.buckets import Buckets
from apex_jax.config import LlamaConfig
from apex_jax.profiling.batches import Capacity
from apex_jax.profiling.table import (
    FORMAT,
    STAGES,
    Errors,
    Measurements,
    Point,
    ProfileError,
    ProfileTable,
    cpu_model,
    load,
    make_key,
    path_of,
    save,
)

MODEL = LlamaConfig(2, 64, 96, 4, 2, 16, 100, 64)
SHAPES = Buckets((2, 4), {2: (2, 4), 4: (4,)}, ((1, 16),), (1, 4), 16)


def key_of(**changes):
    settings = {
        "device": "cpu",
        "model": MODEL,
        "dtype": "float32",
        "precision": "default",
        "isa": "avx2",
        "num_threads": 1,
        "cpus": (),
        "shapes": SHAPES,
        "capacity": Capacity(2, 2, 8, 16, 64),
    }
    return make_key(**{**settings, **changes})


TABLE = ProfileTable(
    key=key_of(),
    measured_at="2026-11-24 16:00+00:00",
    took_sec=12.5,
    num_repeats=9,
    measurements=Measurements(
        {name: {(2,): Point(1e-3, 1e-4), (4,): Point(2e-3, 0.0)} for name in STAGES},
        dispatch_sec=3e-5,
        device_slowdown=1.0,
        host_slowdown=1.25,
    ),
    prediction=Errors(0.02, 0.1, 20),
    noise=Errors(0.01, 0.05, 120),
)


@pytest.fixture
def path(tmp_path):
    path = path_of(tmp_path / "made" / "for it", TABLE.key)
    save(path, TABLE)
    return path


def test_what_is_written_is_read(path):
    found = load(path, TABLE.key)
    assert found is not None
    assert found.measurements == TABLE.measurements
    for field in ("measured_at", "took_sec", "num_repeats", "prediction", "noise"):
        assert getattr(found, field) == getattr(TABLE, field)
    save(path, found)
    assert load(path, TABLE.key) == found
    assert [file.name for file in path.parent.iterdir()] == [path.name], "nothing is left beside it"


def test_a_missing_file_is_no_error(tmp_path):
    assert load(path_of(tmp_path, TABLE.key), TABLE.key) is None


@pytest.mark.parametrize(
    "changes",
    [
        {"device": "Tesla T4"},
        {"model": dataclasses.replace(MODEL, num_layers=3)},
        {"dtype": "float16"},
        {"isa": "avx512"},
        {"num_threads": 2},
        {"shapes": dataclasses.replace(SHAPES, num_blocks={2: (2, 4), 4: (8,)})},
        {"capacity": Capacity(2, 1, 8, 16, 64)},
    ],
)
def test_what_times_depend_on_makes_another_file(tmp_path, changes):
    assert path_of(tmp_path, key_of(**changes)) != path_of(tmp_path, key_of())


def change(path, **fields):
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda path: path.write_bytes(b"\xff\xfe"), "cannot be read"),
        (lambda path: path.write_text(path.read_text()[:-100]), "is damaged"),
        (lambda path: path.write_text("[]"), "has format None, not 1"),
        (lambda path: change(path, format=FORMAT + 1), "has format 2, not 1"),
        (lambda path: change(path, key={"device": "T4"}), "of another machine, model or settings"),
        (lambda path: change(path, stages=None), "is damaged .TypeError"),
        (lambda path: change(path, stages={"embed": [{"shape": [1]}]}), "is damaged .KeyError"),
        (
            lambda path: change(path, stages={name: [] for name in STAGES}),
            "no points of embed, layers",
        ),
        (lambda path: change(path, dispatch_sec=-1.0), "-1.0 is out of range"),
        (lambda path: change(path, dispatch_sec=float("nan")), "nan is out of range"),
        (lambda path: change(path, dispatch_sec="soon"), "is damaged .ValueError"),
        (lambda path: change(path, noise={"mean": 1}), "is damaged .KeyError"),
    ],
)
def test_what_is_no_profile_of_this_is_refused_by_name(path, spoil, message):
    spoil(path)
    with pytest.raises(ProfileError, match=message) as raised:
        load(path, TABLE.key)
    assert str(path) in str(raised.value)


def test_a_failed_write_leaves_the_old_file(path, monkeypatch):
    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pathlib.Path.replace", fail)
    with pytest.raises(OSError, match="No space left"):
        save(path, dataclasses.replace(TABLE, num_repeats=1))
    monkeypatch.undo()
    assert load(path, TABLE.key).num_repeats == 9
    assert len(list(path.parent.iterdir())) == 1


def test_errors_count_both_ways_and_name_the_95th_of_a_hundred():
    found = Errors.of([0.5, 1.0, 1.25])
    assert dataclasses.astuple(found) == pytest.approx((0.25, 1.0, 3))
    assert Errors.of([]) == Errors(0.0, 0.0, 0)
    ratios = [1 + hundredth / 100 for hundredth in range(1, 101)]
    assert Errors.of(ratios).percentile_95 == pytest.approx(0.95)


def test_the_cpu_has_a_name_where_linux_says_it(tmp_path):
    assert cpu_model(tmp_path).startswith("unknown, ")
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc" / "cpuinfo").write_text("processor: 0\nmodel name\t: A CPU\n")
    assert cpu_model(tmp_path).startswith("A CPU, ")
