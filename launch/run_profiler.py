"""Measure how long an engine's stages take on this machine, and keep it for the jobs to come.

    python -m launch.run_profiler --config=configs/NAME.py

Any field of the config is a flag too: a job finds the profile that was made with its own settings
of model, cache, scheduler and host. Prints the table, and how well it predicts points between its
own. An existing profile is printed, and not measured again without --recalibrate.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from absl import app, flags
from ml_collections import config_flags

from apex_jax.config import Config, ConfigError
from apex_jax.profiling.table import Errors, ProfileTable, path_of, save
from launch import command_line
from launch.starting import create_engine


def describe(table: ProfileTable) -> str:
    """Return a profile for people to read: microseconds by stage and bucket."""
    measurements = table.measurements
    lines = [
        f"{'stage':<18}{'bucket':>16}{'median us':>14}{'spread us':>12}",
        *(
            f"{stage:<18}{'x'.join(map(str, shape)):>16}{1e6 * point.sec:>14.1f}"
            f"{1e6 * point.spread_sec:>12.1f}"
            for stage, points in sorted(measurements.stages.items())
            for shape, point in sorted(points.items())
        ),
        f"{'dispatch':<18}{'':>16}{1e6 * measurements.dispatch_sec:>14.1f}",
        f"while the other side works, the device's stages take {measurements.device_slowdown:.2f} "
        f"and the host's jobs {measurements.host_slowdown:.2f} times as long",
        f"measured {table.measured_at} in {table.took_sec:.0f} s, {table.num_repeats} repeats",
        f"prediction of points between these  {_describe_errors(table.prediction)}",
        f"the same point measured twice       {_describe_errors(table.noise)}",
    ]
    return "\n".join(lines)


def run(config: Config, output: Path | None, *, recalibrate: bool) -> None:
    """Measure where there is no profile yet, or it is asked for; print it and keep it."""
    if not config.scheduler.has_host_lane:
        raise ConfigError(
            "--config.scheduler.strategy is 'device_only'; without a host lane nothing is "
            "predicted: name the strategy that the profile is for"
        )
    engine = create_engine(config, _say)
    try:
        profiler = engine.profiler
        assert profiler is not None
        table = None if recalibrate else profiler.kept(config.profile, _say)
        if table is None:
            table = profiler.profile(_say)
            if config.profile.cache_dir:
                path = path_of(Path(config.profile.cache_dir).expanduser(), table.key)
                _save(path, "--config.profile.cache_dir", table)
        if output is not None:
            _save(output, "--output", table)
        print(describe(table))
    finally:
        engine.close()


def _save(path: Path, flag: str, table: ProfileTable) -> None:
    try:
        save(path, table)
    except OSError as error:
        raise ConfigError(f"{flag}: {path} cannot be written ({error.strerror})") from None
    _say(f"profile    kept in {path}")


def _describe_errors(errors: Errors) -> str:
    return (
        f"median {errors.median:.1%}, 95th percentile {errors.percentile_95:.1%} of "
        f"{errors.num_points} points"
    )


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def main(argv: Sequence[str]) -> None:
    """Do what the flags say; what cannot be done is one line on stderr and status 2."""
    del argv  # the parser has read it
    values = flags.FLAGS
    output = None if values.output is None else Path(values.output)
    try:
        run(values.config, output, recalibrate=values.recalibrate)
    except ConfigError as error:
        command_line.refuse(str(error))


if __name__ == "__main__":
    # Only here: other scripts have flags of the same names, and tests import several of them.
    config_flag = config_flags.DEFINE_config_file(
        "config", help_string="Python file with get_config(); --config.FIELD=VALUE overrides."
    )
    flags.DEFINE_string("output", None, "File for a copy of the profile.")
    flags.DEFINE_bool("recalibrate", False, "Measure again where a profile was kept already.")
    app.run(
        main,
        flags_parser=lambda argv: command_line.parse_flags(argv, config_flag, (config_flag,)),
    )
