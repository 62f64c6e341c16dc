"""Imports go one way, and `import dni_seq` needs torch alone."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "dni_seq"

# Each module may import those in its own row and in the rows above it, and of the rows beside it (those with the same
# number) only what its row holds. Scripts are on top of all.
LEVELS = {
    "states": 0,
    "deferred": 0,
    "windows": 0,
    "guard": 0,
    "optimization": 1,
    "distributed": 0,
    "data_parallel": 1,
    "synthesizers": 1,
    "targets": 2,
    "reliability": 0,
    "replay": 3,
    "future_model": 1,
    "state_network": 2,
    "state_synthesizers": 3,
    "future_gradient": 4,
    "least_squares": 3,
    "published": 3,
    "interfaces": 4,
    "exact_future": 4,
    "diagnostics": 4,
    "soundness": 5,
    "credit": 6,
    "trainer": 7,
}

SIDES = ("streams", "models", "runlog", "checkpoint", "lock", "rundir", "progress", "stopping")
"""What is around training: knows nothing of the trainer, and the trainer nothing of it."""


def modules() -> dict[str, Path]:
    return {
        ".".join(path.relative_to(PACKAGE).with_suffix("").parts): path
        for path in PACKAGE.rglob("*.py")
        if path.name != "__init__.py"
    }


def imported(name: str, path: Path) -> set[str]:
    """The modules of the package that a module imports, wherever in the file, by their dotted names."""
    found = set()
    parent = name.split(".")[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            # `import dni_seq` brings everything, which is above every module of it.
            names = {a.name for a in node.names if a.name.split(".")[0] == "dni_seq"}
            found |= {name.removeprefix("dni_seq.") if "." in name else "__init__" for name in names}
        if not isinstance(node, ast.ImportFrom):
            continue
        if node.level:
            base = parent[: len(parent) - node.level + 1]
            base += node.module.split(".") if node.module else []
        elif node.module and node.module.split(".")[0] == "dni_seq":
            base = node.module.split(".")[1:]
        else:
            continue
        if base:
            found.add(".".join(base))
        else:
            found |= {a.name for a in node.names}
    return found


@pytest.mark.parametrize("name", LEVELS)
def test_the_core_imports_downwards(name):
    for other in imported(name, modules()[name]):
        assert other in LEVELS, f"{name} is of the core and imports {other}, which is not"
        assert LEVELS[other] <= LEVELS[name], f"{name} imports {other}, which is above it"


def test_the_core_has_no_cycle():
    graph = {name: imported(name, modules()[name]) for name in LEVELS}
    while graph:
        ready = [name for name, needs in graph.items() if not needs & set(graph)]
        assert ready, f"these import each other in a circle: {sorted(graph)}"
        for name in ready:
            del graph[name]


@pytest.mark.parametrize("side", SIDES)
def test_what_is_around_training_knows_nothing_of_the_trainer(side):
    paths = {name: path for name, path in modules().items() if name.split(".")[0] == side}
    assert paths or (PACKAGE / side).is_dir()
    for name, path in paths.items():
        above = imported(name, path) & {"__init__", "trainer", "credit", "credit_options", "credit_parts"}
        assert not above, f"{name} imports {above}"


def test_import_needs_torch_alone():
    code = (
        "import sys, torch; before = set(sys.modules); import dni_seq; "
        "print({m.split('.')[0] for m in set(sys.modules) - before} - {'torch', 'dni_seq'} - sys.stdlib_module_names)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "set()"
