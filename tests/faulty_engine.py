"""launch.generate, run as a script, with a real engine whose host fails in the middle of a job."""

import functools
import itertools
import sys
from collections.abc import Callable

from absl import app

from apex_jax.config import Config
from apex_jax.hardware import Job
from apex_jax.timeline import Timeline
from launch import generate

FAILING_JOB = 200


def create(config: Config, on_progress: Callable[[str], None], timeline: Timeline) -> object:
    engine = generate.create_engine(config, on_progress, timeline)
    numbers = itertools.count()

    def fail(job: Job) -> None:
        if next(numbers) == FAILING_JOB:
            raise OSError("the wire is cut")

    engine._workers.host_lane._before_job = fail
    return engine


if __name__ == "__main__":
    app.run(
        functools.partial(generate.main, create=create),
        argv=sys.argv,
        flags_parser=generate.parse_flags,
    )
