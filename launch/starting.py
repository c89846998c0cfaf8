"""Starting the real engine: what the process must be told before jax is.

Called by the commands that run or measure an engine. Imports jax only when it is called: a misspelt
flag should not wait for it.
"""

import contextlib
import ctypes
import logging
import os
from collections.abc import Callable
from typing import TYPE_CHECKING

from apex_jax.config import Config
from apex_jax.timeline import Timeline

if TYPE_CHECKING:
    from apex_jax.engine import Engine


def create_engine(
    config: Config, on_progress: Callable[[str], None], timeline: Timeline | None = None
) -> "Engine":
    """Return an engine; ConfigError says what cannot be had."""
    on_progress("starting JAX")
    prepare_jax(config)
    from apex_jax.engine import Engine

    return Engine.create(config, on_progress, timeline)


# glibc's mallopt, by the numbers of malloc.h.
_ARENA_MAX, _MMAP_MAX, _TRIM_THRESHOLD = -8, -4, -1
_NEVER = 2**31 - 1


def keep_freed_memory() -> None:
    """Let malloc keep what is freed, for the rest of the process.

    XLA's CPU programs take their scratch memory at each call. What is larger than 32 MiB comes from
    the system each time, page by page: for 32 rows of a model with 12 KV heads that was half of a
    layer's attention (12,800 page faults, 39 ms of CPU time instead of 18). Without glibc this does
    nothing.
    """
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        # One arena: those of other threads take large pieces from the system whatever is set.
        for option, value in ((_ARENA_MAX, 1), (_MMAP_MAX, 0), (_TRIM_THRESHOLD, _NEVER)):
            mallopt(option, value)


def prepare_jax(config: Config) -> None:
    """Tell JAX what it must know before it looks for devices."""
    # JAX takes 75 % of a GPU, and what it does not take no KV cache can use.
    if "XLA_PYTHON_CLIENT_MEM_FRACTION" not in os.environ:
        os.environ.setdefault("XLA_CLIENT_MEM_FRACTION", "0.95")
    for library in ("jax", "absl", "orbax"):  # they tell what only their developers need
        logging.getLogger(library).setLevel(logging.WARNING)
    if config.device.platform == "cpu":
        keep_freed_memory()
        import jax

        jax.config.update("jax_platforms", "cpu")  # else a GPU that is not wanted is set up too
    if config.scheduler.has_host_lane:
        import jax

        jax.config.update("jax_num_cpu_devices", 2)  # one may have to stand in for a GPU
