"""A virtual environment for each framework, made by pip when it is first needed.

Owns which packages a framework takes (pinned: another version is another system) and where its
environment lies. Refuses, with pip's own last words, what cannot be made. Imports no jax.
"""

import hashlib
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

MAX_SHOWN = 400  # characters of pip's complaint
INSTALL_SEC = 3600.0  # some packages are compiled


class SetUpError(RuntimeError):
    """An environment that cannot be made; the message says why and what else can be done."""


@dataclass(frozen=True)
class Framework:
    """A framework that runs here.

    script: in children/. requirements: none for our own. shares: the framework whose environment it
    runs in; None for one of its own.
    """

    name: str
    script: str
    requirements: tuple[str, ...]
    shares: str | None = None

    @property
    def environment(self) -> str:
        return self.shares or self.name

    @property
    def path(self) -> Path:
        return Path(__file__).parent / "children" / self.script


# torch from wherever pip finds it: PIP_EXTRA_INDEX_URL may name an index of builds without CUDA.
_TRANSFORMERS = ("torch==2.13.0", "transformers==5.24.0", "safetensors==0.8.0")
_LLAMA_CPP = ("llama-cpp-python==0.3.36", "gguf==0.19.0", "safetensors==0.8.0", "numpy>=2,<3")
FRAMEWORKS = {
    one.name: one
    for one in (
        Framework("apex_jax", "run_apex_jax.py", ()),
        Framework("transformers", "run_transformers.py", _TRANSFORMERS),
        Framework(
            "transformers_by_prompt",
            "run_transformers_by_prompt.py",
            _TRANSFORMERS,
            shares="transformers",
        ),
        Framework("llama.cpp", "run_llama_cpp.py", _LLAMA_CPP),
    )
}


def interpreter_of(
    framework: Framework, env_dir: Path, given: str | None, on_progress: Callable[[str], None]
) -> str:
    """Return the Python that runs a framework's program; make its environment where there is none.

    given: an interpreter of the user's, taken as it is. Raises SetUpError.
    """
    if given is not None:
        if shutil.which(given) is None:
            raise SetUpError(f"--python gives {framework.name} {given!r}, which does not run")
        return given
    if not framework.requirements:
        return sys.executable
    key = hashlib.sha256(repr((framework.requirements, sys.version_info[:2])).encode())
    folder = env_dir / f"{framework.environment}-{key.hexdigest()[:8]}"
    python, done = folder / "bin" / "python", folder / "installed"
    if done.exists():
        return str(python)
    on_progress(f"making {folder} with {', '.join(framework.requirements)}; this takes minutes")
    try:
        env_dir.mkdir(parents=True, exist_ok=True)
        _run("python -m venv", sys.executable, "-m", "venv", "--clear", str(folder))
        install = ("-m", "pip", "install", "--quiet", "--disable-pip-version-check")
        _run("pip install", str(python), *install, *framework.requirements)
        done.touch()
    except (OSError, SetUpError) as error:
        raise SetUpError(
            f"the environment of {framework.name} could not be made in {folder}: {error}; "
            f"--python={framework.name}=INTERPRETER names one that has {framework.requirements[0]}"
        ) from None
    return str(python)


def _run(what: str, *command: str) -> None:
    try:
        ended = subprocess.run(command, capture_output=True, text=True, timeout=INSTALL_SEC)
    except subprocess.TimeoutExpired:
        raise SetUpError(f"{what} took more than {INSTALL_SEC:.0f} s") from None
    if ended.returncode:
        said = [line for line in ended.stderr.splitlines() if "error" in line.lower()]
        text = " ".join(" ".join(said or ended.stderr.splitlines()[-3:]).split())
        raise SetUpError(f"{what} ended with status {ended.returncode}: {text[:MAX_SHOWN]}")
