"""The text the demo model learns: what every Python carries about itself.

Owns which docstrings are taken (those of the standard library, read from its source and from its
compiled modules, and pydoc's topics), their headings and their order. Given a Python installation
the result is always the same; nothing is downloaded. Called by train_demo_model.
"""

import ast
import importlib
import importlib.machinery
import importlib.util
import inspect
import pathlib
import re
import sys
import sysconfig
import warnings
from pydoc_data import topics


def _source_docstrings(tree: ast.Module, module: str) -> list[tuple[str, str]]:
    """Return (heading, docstring) of a module, its classes and functions, in source order."""
    found = [(f"module {module}", ast.get_docstring(tree))]

    def visit(parent: ast.AST, prefix: str) -> None:
        for node in ast.iter_child_nodes(parent):
            name = f"{prefix}.{getattr(node, 'name', '')}"
            if isinstance(node, ast.ClassDef):
                found.append((f"class {name}", ast.get_docstring(node)))
            elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                found.append((f"{name}({ast.unparse(node.args)})", ast.get_docstring(node)))
            else:
                name = prefix
            visit(node, name)

    visit(tree, module)
    return [(heading, docstring) for heading, docstring in found if docstring]


def _compiled_docstrings(module_name: str) -> list[tuple[str, str]]:
    """Return (heading, docstring) of a module written in C, its functions, classes and methods."""
    try:
        module = importlib.import_module(module_name)
    except ImportError:  # some builds of Python lack optional modules
        return []
    found = [(f"module {module_name}", module)]
    for name, value in sorted(vars(module).items()):
        found.append((f"{module_name}.{name}", value))
        if isinstance(value, type):
            members = sorted(vars(value).items())
            found += [(f"{module_name}.{name}.{member}", item) for member, item in members]
    documented = []
    for heading, value in found:
        docstring = getattr(value, "__doc__", None)
        # Other objects, such as constants, only repeat the docstring of their class.
        own = callable(value) or inspect.ismodule(value) or inspect.isdatadescriptor(value)
        if own and isinstance(docstring, str):
            signature = getattr(value, "__text_signature__", None) or ""
            kind = "class " if isinstance(value, type) else ""
            signature = re.sub(r"\$module(, /)?(, )?", "", signature).replace("$", "")
            documented.append((kind + heading + signature, docstring))
    return documented


def collect_documents() -> list[str]:
    """Return "heading, blank line, text" documents in a fixed order, each text once."""
    entries = []
    root = pathlib.Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        if {"site-packages", "test", "tests", "idle_test"} & set(parts):
            continue
        with warnings.catch_warnings(action="ignore"):  # invalid escapes in a few old files
            tree = ast.parse(path.read_bytes())
        entries += _source_docstrings(tree, ".".join(parts).removesuffix(".__init__"))
    for name in sorted(sys.stdlib_module_names):
        loader = getattr(importlib.util.find_spec(name), "loader", None)
        compiled = importlib.machinery.BuiltinImporter, importlib.machinery.ExtensionFileLoader
        if (loader in compiled or isinstance(loader, compiled)) and "test" not in name:
            entries += _compiled_docstrings(name)
    entries += [(f"topic {name}", text) for name, text in sorted(topics.topics.items())]
    documents = {}
    for heading, text in entries:
        text = inspect.cleandoc(text).strip()
        documents.setdefault(text, f"{heading}\n\n{text}")
    return list(documents.values())
