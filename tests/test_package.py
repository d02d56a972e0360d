"""The public surface and the package's metadata."""

from __future__ import annotations

import ast
import importlib
import importlib.metadata
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import fedkl

ROOT = Path(fedkl.__file__).parent
PROJECT = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text("utf-8"))
# Where the name to import is not the name to install.
DISTRIBUTIONS = {"PIL": "pillow", "sklearn": "scikit-learn"}


def python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def test_import_does_not_wait_for_torch() -> None:
    assert python("import sys, fedkl; dir(fedkl); print('torch' in sys.modules)") == "False"


@pytest.mark.parametrize("name", fedkl.__all__)
def test_public_name_resolves_and_is_listed(name: str) -> None:
    value = getattr(fedkl, name)
    assert name in dir(fedkl)
    home = fedkl._HOMES.get(name, "fedkl._version")
    assert value is getattr(importlib.import_module(home), name)


def test_lock_is_the_function_whatever_was_imported_before() -> None:
    code = "import fedkl.locking; from fedkl import lock; print(lock is fedkl.lock, callable(lock))"
    assert python(code) == "True True"


def test_type_checkers_and_the_interpreter_see_the_same_names() -> None:
    tree = ast.parse((ROOT / "__init__.py").read_text("utf-8"))
    guarded = next(node for node in tree.body if isinstance(node, ast.If))
    seen = {
        item.name: node.module
        for node in guarded.body
        if isinstance(node, ast.ImportFrom)
        for item in node.names
    }
    assert seen == fedkl._HOMES
    assert sorted([*fedkl._HOMES, "__version__"]) == sorted(fedkl.__all__)


def test_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'locks'") as caught:
        fedkl.locks  # noqa: B018
    assert caught.value.name == "locks"
    assert caught.value.obj is fedkl


def test_version_is_the_installed_one() -> None:
    assert re.fullmatch(r"\d+\.\d+\.\d+(\.dev\d+|rc\d+)?", fedkl.__version__)
    assert importlib.metadata.version("fedkl") == fedkl.__version__


def test_types_are_announced() -> None:
    assert (ROOT / "py.typed").is_file()


def declared() -> set[str]:
    """Distributions that pyproject.toml asks for, extras included, in normal form."""
    project = PROJECT["project"]
    extras = project["optional-dependencies"]
    wanted = [*project["dependencies"], *(item for extra in extras.values() for item in extra)]
    names = (re.match(r"[A-Za-z0-9._-]+", item) for item in wanted)
    return {re.sub(r"[-_.]+", "-", name.group()).lower() for name in names if name}


def test_everything_imported_is_declared() -> None:
    used: dict[str, str] = {}
    for path in ROOT.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Import):
                modules = [item.name for item in node.names]
            elif isinstance(node, ast.ImportFrom) and not node.level:
                modules = [str(node.module)]
            else:
                continue
            used |= {module.partition(".")[0]: path.name for module in modules}
    foreign = {name: where for name, where in used.items() if name not in sys.stdlib_module_names}
    foreign.pop("fedkl")
    assert "torch" in foreign
    missing = {n: w for n, w in foreign.items() if DISTRIBUTIONS.get(n, n) not in declared()}
    assert missing == {}
