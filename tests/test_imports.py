"""Imports go one way, by folder, without a circle, and `import dni_seq` needs torch alone."""

from __future__ import annotations

import ast
import subprocess
import sys
from fnmatch import fnmatch
from pathlib import Path

import pytest

from tests.paths import ROOT

PACKAGE = ROOT / "dni_seq"

CREDIT = {"core", "synthesizers", "interfaces", "distributed"}
LIBRARY = {*CREDIT, "credit", "trainer", "models", "streams", "dni_seq"}

MAY_IMPORT = {
    "core": set(),
    "synthesizers": {"core"},
    "streams": {"core"},
    "distributed": {"core"},
    "interfaces": {"core", "synthesizers"},
    "models": {"core", "synthesizers", "interfaces"},
    "model_checks": {"core"},
    "check": {"core", "model_checks"},
    "credit": CREDIT,
    "trainer": {*CREDIT, "credit"},
    "parameter_fidelity": {*CREDIT, "credit", "trainer"},
    "public": {*CREDIT, "credit", "trainer", "check", "model_checks", "parameter_fidelity"},
    "dni_seq": {"public"},
    "__main__": {"app"},
    "app.runs": {"core", "distributed", "streams", "credit", "trainer", "parameter_fidelity"},
    "app.build": {*LIBRARY, "app.runs"},
    "app.lm": {*LIBRARY, "app.runs", "app.build"},
    "app.tasks": {*LIBRARY, "app.runs", "app.build"},
    "app.feedforward": {*LIBRARY, "app.runs", "app.build"},
    "app.decoupled": {*LIBRARY, "app.runs", "app.build"},
    "app.studies": {*LIBRARY, "app.runs", "app.build", "app.lm", "app.tasks", "app.feedforward"},
    "app.gpu_check": {*LIBRARY, "app.runs"},
    "app": {"app.runs", "dni_seq"},
    "integrations": {*LIBRARY, "app.runs", "app.lm"},
}
"""What the files of a folder may import of other folders; `trainer` is the file, `dni_seq` the package's first
file, which takes the public names from `public`."""


def modules() -> dict[str, Path]:
    """Every module by its dotted name within the package, packages by that of their folder."""
    found = {}
    for path in PACKAGE.rglob("*.py"):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts) or "dni_seq"] = path
    return found


MODULES = modules()


def room(name: str) -> str:
    """The folder of a module, as a key of `MAY_IMPORT`."""
    if name in MAY_IMPORT:
        return name
    return name.rpartition(".")[0]


def imported(name: str) -> set[str]:
    """The modules of the package that a module imports, wherever in the file."""
    found = set()
    for node in ast.walk(ast.parse(MODULES[name].read_text())):
        if isinstance(node, ast.Import):
            targets = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name} has a relative import: write the whole name"
            inside = [f"{node.module}.{alias.name}" for alias in node.names]
            targets = [each if each.removeprefix("dni_seq.") in MODULES else str(node.module) for each in inside]
        else:
            continue
        for target in targets:
            if target.split(".")[0] == "dni_seq":
                found.add(target.removeprefix("dni_seq."))
    return found - {name}


@pytest.mark.parametrize("name", sorted(MODULES))
def test_imports_go_one_way(name):
    for other in imported(name):
        assert room(other) == room(name) or room(other) in MAY_IMPORT[room(name)], f"{name} imports {other}"


def test_every_folder_has_its_row():
    assert {room(name) for name in MODULES} == set(MAY_IMPORT)


def test_folders_have_no_circle():
    graph = {folder: set(others) for folder, others in MAY_IMPORT.items()}
    assert_no_circle(graph)


def test_modules_have_no_circle():
    assert_no_circle({name: imported(name) for name in MODULES})


def assert_no_circle(graph: dict[str, set[str]]) -> None:
    while graph:
        ready = [name for name, needs in graph.items() if not needs & set(graph)]
        assert ready, f"these import each other in a circle: {sorted(graph)}"
        for name in ready:
            del graph[name]


def test_the_root_has_few_files_and_no_file_is_long():
    assert len(list(PACKAGE.glob("*.py"))) <= 6
    for folder in (PACKAGE, ROOT / "scripts"):
        for path in folder.rglob("*.py"):
            assert len(path.read_text().splitlines()) <= 450, path


def test_classes_and_functions_are_short():
    """Classes have at most 300 lines, functions 50, their docstrings included."""
    for path in [*PACKAGE.rglob("*.py"), *(ROOT / "scripts").glob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, (ast.ClassDef, ast.FunctionDef)):
                lines = (node.end_lineno or 0) - node.lineno + 1
                assert lines <= (300 if isinstance(node, ast.ClassDef) else 50), f"{path}: {node.name} has {lines} lines"


def test_pytest_enters_every_folder_of_tests(pytestconfig):
    """Its default leaves out folders with names such as "build"."""
    left_out = pytestconfig.getini("norecursedirs")
    for folder in (ROOT / "tests").rglob("*/"):
        assert folder.name == "__pycache__" or not any(fnmatch(folder.name, pattern) for pattern in left_out), folder


def test_scripts_only_call():
    for path in (ROOT / "scripts").glob("*.py"):
        body = ast.parse(path.read_text()).body
        assert not [node for node in body if isinstance(node, (ast.FunctionDef, ast.ClassDef))], path


def test_import_needs_torch_alone():
    code = (
        "import sys, torch; before = set(sys.modules); import dni_seq; dni_seq.SequenceTrainer; "
        "print({m.split('.')[0] for m in set(sys.modules) - before} - {'torch', 'dni_seq'} - sys.stdlib_module_names)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "set()"


def test_public_names_come_at_their_first_use():
    """A command parses its options before it waits for torch, and every way to a public name still leads there."""
    code = (
        "import sys, dni_seq, dni_seq.app.lm.train, dni_seq.app.cli; assert 'torch' not in sys.modules; "
        "assert {'SequenceTrainer', 'app'} <= set(dir(dni_seq)); from dni_seq import *; SequenceTrainer, defer_backward; "
        "from dni_seq import trainer; assert trainer.SequenceTrainer is dni_seq.SequenceTrainer is SequenceTrainer; "
        "dni_seq.core.states; assert not hasattr(dni_seq, 'nothing'); "
        "assert all(hasattr(dni_seq, name) for name in dni_seq.__all__); print('torch' in sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (result.stdout, result.stderr) == ("True\n", "")
