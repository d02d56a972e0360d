"""The rules of the house that a parser can check, and that the checker catches who breaks them.

Everything is read from the syntax tree: imports inside functions and under ``TYPE_CHECKING`` count,
and nothing is executed.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

import fedkl

ROOT = Path(fedkl.__file__).parent
MAX_LINES = 400

# A module imports strictly lower ranks and its own package, nothing else of FedKL.
RANKS = {
    **dict.fromkeys(["errors", "_version"], 0),
    **dict.fromkeys(["rng", "files", "pruning"], 1),
    **dict.fromkeys(["key", "models", "data", "metrics", "observation"], 2),
    "locking": 3,
    **dict.fromkeys(["attacks", "defenses"], 4),
    **dict.fromkeys(["federation", "certificate"], 5),
    "audit": 6,
    **dict.fromkeys(["report", "flower"], 7),
    "cli": 8,
    **dict.fromkeys(["__init__", "__main__"], 9),
}
# Narrower than the ranks: attackers get data and training loops as arguments.
ATTACKS_MAY_NOT = {"data", "locking"}
ATTACKS_THAT_KNOW_THE_LOCK = "fedkl.attacks.adaptive"
# Third parties that have one home each.
HOMES = {"flwr": "flower", "rich": "cli", "typer": "cli"}
PICKLERS = {"pickle", "_pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}
PICKLING = {"torch.save", "torch.load"}
WRITERS = {"print", "sys.stdout.write", "sys.stderr.write"}


@dataclass(frozen=True)
class Source:
    """One file: its dotted name, the first component below ``fedkl``, its text and its tree."""

    module: str
    layer: str
    package: str
    text: str
    tree: ast.Module


def read(root: Path) -> list[Source]:
    """Every Python file below ``root``, which is read as the package ``fedkl``."""
    sources = []
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        inside = parts[:-1] if parts[-1] == "__init__" else parts
        text = path.read_text(encoding="utf-8")
        sources.append(
            Source(
                module=".".join(("fedkl", *inside)),
                layer=parts[0],
                package=".".join(("fedkl", *parts[:-1])),
                text=text,
                tree=ast.parse(text, str(path)),
            )
        )
    return sources


def aliases(source: Source) -> Iterator[tuple[str, str, str]]:
    """(name bound here, dotted name it stands for, dotted name imported) for every import."""
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Import):
            for item in node.names:
                name = item.asname or item.name.partition(".")[0]
                yield name, item.name if item.asname else name, item.name
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = source.package.split(".")
                base = ".".join([*above[: len(above) - node.level + 1], *filter(None, [base])])
            for item in node.names:
                yield item.asname or item.name, f"{base}.{item.name}", f"{base}.{item.name}"


def calls(source: Source) -> Iterator[tuple[str, ast.Call]]:
    """(dotted name, call), aliases resolved; what is not a plain name at its root starts with ?."""
    known = {bound: target for bound, target, _ in aliases(source)}
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Call):
            function, tail = node.func, []
            while isinstance(function, ast.Attribute):
                tail.append(function.attr)
                function = function.value
            start = known.get(function.id, function.id) if isinstance(function, ast.Name) else "?"
            yield ".".join([start, *reversed(tail)]), node


def imported(source: Source) -> Iterator[str]:
    """Every dotted name the file imports, by statement or by a literal ``import_module``."""
    for _, _, target in aliases(source):
        yield target
    for name, call in calls(source):
        if name in {"importlib.import_module", "__import__"} and call.args:
            match call.args[0]:
                case ast.Constant(value=str(target)):
                    yield target


def points_down(source: Source) -> Iterator[str]:
    if source.layer not in RANKS:
        yield f"{source.layer!r} has no rank; give it one in RANKS"
        return
    for target in imported(source):
        top, _, below = target.partition(".")
        layer = below.partition(".")[0]
        if top != "fedkl" or layer == source.layer:
            continue
        if layer not in RANKS:
            yield f"imports {target}: from the public surface, or from a module without a rank"
        elif RANKS[layer] >= RANKS[source.layer]:
            yield f"imports {target}, which is not below {source.layer}"


def attacks_stand_apart(source: Source) -> Iterator[str]:
    if source.layer != "attacks":
        return
    adaptive = f"{source.module}.".startswith(f"{ATTACKS_THAT_KNOW_THE_LOCK}.")
    forbidden = ATTACKS_MAY_NOT - {"locking"} if adaptive else ATTACKS_MAY_NOT
    for target in imported(source):
        if target.startswith("fedkl.") and target.split(".")[1] in forbidden:
            yield f"imports {target}; an attack gets what it may know as an argument"


def third_parties_have_one_home(source: Source) -> Iterator[str]:
    for target in imported(source):
        top = target.partition(".")[0]
        if HOMES.get(top, source.layer) != source.layer:
            yield f"imports {target}; only {HOMES[top]} may"
        if top == "torch" and source.layer == "report":
            yield f"imports {target}; a report is made from JSON alone"


def only_the_command_line_prints(source: Source) -> Iterator[str]:
    if source.layer != "cli":
        for name, call in calls(source):
            if name in WRITERS:
                yield f"line {call.lineno}: {name}"


def randomness_is_an_argument(source: Source) -> Iterator[str]:
    for name, call in calls(source):
        root, _, last = name.rpartition(".")
        own_generator = source.layer == "rng" and root.partition(".")[0] != "torch"
        seeds = last in {"manual_seed", "manual_seed_all"} and not own_generator
        if seeds or name in {"torch.seed", "random.seed", "numpy.random.seed"}:
            yield f"line {call.lineno}: {name}; take a generator, or make one with fedkl.rng.derive"


def nothing_is_pickled(source: Source) -> Iterator[str]:
    for target in imported(source):
        if target.partition(".")[0] in PICKLERS or target in PICKLING:
            yield f"imports {target}; tensors on disk are safetensors"
    for name, call in calls(source):
        if name in PICKLING:
            yield f"line {call.lineno}: {name}; use fedkl.files"


def files_are_short(source: Source) -> Iterator[str]:
    if (lines := len(source.text.splitlines())) > MAX_LINES:
        yield f"{lines} lines, more than {MAX_LINES}"


RULES: list[Callable[[Source], Iterator[str]]] = [
    points_down,
    attacks_stand_apart,
    third_parties_have_one_home,
    only_the_command_line_prints,
    randomness_is_an_argument,
    nothing_is_pickled,
    files_are_short,
]


def check(root: Path, rule: Callable[[Source], Iterator[str]]) -> list[str]:
    return [f"{source.module}: {fault}" for source in read(root) for fault in rule(source)]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_package_follows(rule: Callable[[Source], Iterator[str]]) -> None:
    assert check(ROOT, rule) == []


def test_checker_reads_the_whole_package() -> None:
    assert {"fedkl", "fedkl.errors", "fedkl.rng"} <= {source.module for source in read(ROOT)}


VIOLATIONS = [
    (points_down, "key.py", "from fedkl.locking import lock"),
    (points_down, "key.py", "import fedkl.models"),
    (points_down, "files.py", "from fedkl.rng import derive"),
    (points_down, "data/images.py", "from fedkl.key import Key"),
    (points_down, "data/images.py", "from ..key import Key"),
    (points_down, "data/__init__.py", "from .. import key"),
    (points_down, "errors.py", "def f():\n    from fedkl import rng"),
    (points_down, "defenses/norm.py", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n"
     "    from fedkl.attacks import DLG"),
    (points_down, "federation/engine.py", "import importlib as i\ni.import_module('fedkl.cli')"),
    (points_down, "federation/engine.py", "from fedkl import Key"),
    (points_down, "federation/engine.py", "import fedkl"),
    (points_down, "surprise.py", "x = 1"),
    (attacks_stand_apart, "attacks/dlg.py", "from fedkl.locking import lock"),
    (attacks_stand_apart, "attacks/adaptively.py", "from fedkl.locking import lock"),
    (attacks_stand_apart, "attacks/adaptive/pad.py", "from fedkl import data"),
    (third_parties_have_one_home, "federation/engine.py", "import flwr.client"),
    (third_parties_have_one_home, "report/html.py", "from rich import print as show"),
    (third_parties_have_one_home, "report/html.py", "from torch import Tensor"),
    (only_the_command_line_prints, "key.py", "print('secret')"),
    (only_the_command_line_prints, "key.py", "from sys import stderr as e\ne.write('secret')"),
    (randomness_is_an_argument, "models.py", "import torch as t\nt.manual_seed(0)"),
    (randomness_is_an_argument, "models.py", "import torch\ntorch.cuda.manual_seed_all(0)"),
    (randomness_is_an_argument, "models.py", "import torch\ntorch.Generator().manual_seed(0)"),
    (randomness_is_an_argument, "rng.py", "from torch import manual_seed\nmanual_seed(0)"),
    (randomness_is_an_argument, "data/splits.py", "import numpy as np\nnp.random.seed(0)"),
    (nothing_is_pickled, "files.py", "def f():\n    import pickle"),
    (nothing_is_pickled, "files.py", "import torch\ntorch.save({}, 'x')"),
    (nothing_is_pickled, "files.py", "from torch import load"),
    (files_are_short, "files.py", "x = 1\n" * (MAX_LINES + 1)),
]  # fmt: skip


@pytest.mark.parametrize("rule, name, code", VIOLATIONS)
def test_violation_is_caught(
    rule: Callable[[Source], Iterator[str]], name: str, code: str, tmp_path: Path
) -> None:
    plant(tmp_path, name, code)
    assert len(check(tmp_path, rule)) == 1


PERMITTED = [
    ("__init__.py", "from fedkl.key import Key"),
    ("__main__.py", "from fedkl.cli import main"),
    ("data/__init__.py", "from .images import Images\nfrom fedkl.errors import DataError"),
    ("locking/__init__.py", "from fedkl import key\nimport torch\nx: object = torch"),
    ("attacks/adaptive.py", "from fedkl.locking import lock"),
    ("attacks/adaptive/pad.py", "from fedkl.locking import lock"),
    ("defenses/channel.py", "from fedkl.locking import lock"),
    ("flower.py", "import flwr\nimport torch"),
    ("cli.py", "import rich\nprint('done')"),
    ("rng.py", "import torch\ngenerator = torch.Generator()\ngenerator.manual_seed(0)"),
    ("files.py", "x = 1\n" * MAX_LINES),
]


@pytest.mark.parametrize("name, code", PERMITTED)
def test_permitted_is_let_through(name: str, code: str, tmp_path: Path) -> None:
    plant(tmp_path, name, code)
    assert [fault for rule in RULES for fault in check(tmp_path, rule)] == []


def plant(root: Path, name: str, code: str) -> None:
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    (root / name).write_text(code, encoding="utf-8")
