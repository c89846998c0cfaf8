"""What every test stands on: one platform, strict arithmetic, nothing from the user's environment.

Imports no apex_jax at the top: the jaxtyping hook must be there before the package is first read.
"""

import os
import re
import tempfile
from collections.abc import Iterator

import hypothesis
import jax
import jaxtyping
import pytest

# Variables of the user's shell that change what programs compute or where they are kept.
FOREIGN_VARIABLES = (
    "JAX_COMPILATION_CACHE_DIR",
    "JAX_DEFAULT_MATMUL_PRECISION",
    "JAX_DISABLE_JIT",
    "JAX_ENABLE_X64",
    "JAX_NUM_CPU_DEVICES",
    "XLA_FLAGS",
)
# Set in this process and, through the environment, in those that tests start.
STRICT_SETTINGS = {
    "jax_numpy_dtype_promotion": "strict",
    "jax_numpy_rank_promotion": "raise",
}
SKIPPED_UNLESS_SELECTED = {
    "gpu": "needs an NVIDIA GPU; run with -m gpu",
    "slow": "takes minutes; run with -m slow",
    "parity": "needs torch and transformers; run with -m parity",
}

# Compiling takes longer than hypothesis allows an example by default. `ci` draws the same examples
# every time, so that a change is what makes it fail; a bare run explores.
hypothesis.settings.register_profile("dev", deadline=None)
hypothesis.settings.register_profile("ci", deadline=None, derandomize=True)
hypothesis.settings.load_profile("dev")


def _selects(config: pytest.Config, marker: str) -> bool:
    """Whether the -m expression asks for the marker, and not only rules it out."""
    expression = re.sub(r"\bnot\s+\w+", "", config.option.markexpr)
    return re.search(rf"\b{marker}\b", expression) is not None


def pytest_configure(config: pytest.Config) -> None:
    # A home for this session: the compile cache of its engines lies there, shared and thrown away.
    home = tempfile.TemporaryDirectory(prefix="apex_jax_home_", ignore_cleanup_errors=True)
    config.add_cleanup(home.cleanup)
    os.environ["HOME"] = home.name
    for name in FOREIGN_VARIABLES:
        os.environ.pop(name, None)
    settings = dict(STRICT_SETTINGS)
    if not _selects(config, "gpu"):
        settings["jax_platforms"] = "cpu"
    # The second stands in for the host where the first stands in for an accelerator.
    jax.config.update("jax_num_cpu_devices", 2)
    for name, value in settings.items():
        os.environ[name.upper()] = value
        jax.config.update(name, value)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        for marker, reason in SKIPPED_UNLESS_SELECTED.items():
            if item.get_closest_marker(marker) and not _selects(config, marker):
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="module")
def without_annotations_checked() -> Iterator[None]:
    """For modules of some million calls: checking each one's annotations, as the other tests do,
    takes 25 times as long as the calls.
    """
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)
