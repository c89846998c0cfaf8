"""The project keeps its shape: folders, dependencies, and modules that do nothing when imported."""

import ast
import os
import pathlib
import pkgutil
import re
import subprocess
import sys
import tomllib

import pytest

ROOT = pathlib.Path(__file__).parents[1]
TOP_LEVEL = {
    *("WORKSPACE", "apex_jax", "cpu_ops", "configs", "launch", "tests", "requirements.txt"),
    *("README.md", "LICENSE", "NOTICE", "pyproject.toml", "docs"),
    *("CMakeLists.txt", "CHANGELOG.md", "CONTRIBUTING.md"),
}
IGNORED = {"build", "dist", "runs"}  # as in .gitignore
PLANNING = ("config", "request", "plan", "pages", "buckets", "scheduler", "dispatch", "cost_model")


def package_modules() -> list[str]:
    paths = [str(ROOT / "apex_jax")]
    names = [module.name for module in pkgutil.walk_packages(paths, prefix="apex_jax.")]
    return ["apex_jax", *names]


def sources(folder: str) -> list[pathlib.Path]:
    return sorted((ROOT / folder).rglob("*.py"))


def imported_names(path: pathlib.Path) -> set[str]:
    """The modules that a file imports, wherever in it."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: relative import"
            names.add(node.module or "")
    return names


def run_python(code: str, **environment: str) -> None:
    """Run `code` in a fresh interpreter at the root and fail with what it wrote."""
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


def test_top_level_holds_only_what_was_agreed():
    entries = {path.name for path in ROOT.iterdir() if not path.name.startswith(".")}
    assert entries - IGNORED <= TOP_LEVEL


def test_requirements_are_the_dependencies_of_the_package():
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    requirements = [line for line in lines if line and not line.startswith("#")]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert requirements == project["dependencies"]


def test_every_module_has_its_layer():
    """A module that the import contract does not name may import anything, unnoticed."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]
    layers = re.findall(r"apex_jax\.[\w.]+", " ".join(settings["contracts"][0]["layers"]))
    divided = {name.rpartition(".")[0] for name in layers if name.count(".") == 2}
    parts = {
        name
        for name in package_modules()
        if name not in divided and name.rpartition(".")[0] in {"apex_jax", *divided}
    }
    assert parts <= set(layers)
    assert len(layers) == len(set(layers))


@pytest.mark.parametrize("path", sources("apex_jax"), ids=lambda path: path.name)
def test_package_does_not_read_the_environment(path):
    for node in ast.walk(ast.parse(path.read_text())):
        name = getattr(node, "attr", None) or getattr(node, "id", None)
        assert name not in ("environ", "getenv"), f"{path}:{node.lineno} reads the environment"
    assert "os.environ" not in imported_names(path)


@pytest.mark.parametrize("path", sources("configs"), ids=lambda path: path.name)
def test_configs_know_only_the_settings(path):
    known = {*sys.stdlib_module_names, "configs"}
    foreign = {name for name in imported_names(path) if name.split(".")[0] not in known}
    assert foreign <= {"apex_jax.config", "apex_jax.hardware_profiles"}


def test_planning_layers_do_not_load_jax():
    names = [f"apex_jax.{name}" for name in PLANNING if (ROOT / f"apex_jax/{name}.py").exists()]
    run_python(f"""
import sys, {", ".join(names)}
loaded = {{name.split(".")[0] for name in sys.modules}} & {{"jax", "jaxlib", "flax"}}
assert not loaded, f"loaded {{loaded}}"
""")


def test_nothing_happens_at_import():
    """No device is touched (the platform named here does not exist), no setting of jax changes."""
    run_python(
        f"""
import importlib, os, threading
import flax.nnx, jax, orbax.checkpoint, tokenizers

settings, environment = dict(jax.config.values), dict(os.environ)
num_threads = threading.active_count()
for name in {package_modules()}:
    importlib.import_module(name)
assert dict(jax.config.values) == settings, "a setting of jax changed"
assert dict(os.environ) == environment, "an environment variable changed"
assert threading.active_count() == num_threads, "a thread was started"
""",
        JAX_PLATFORMS="none_at_import",
    )
