"""What a GPU does without waiting runs on the CPU too: one switch in core decides, and nothing decides by another way."""

from __future__ import annotations

import ast

import pytest

from tests.paths import ROOT

LIBRARY = ("core", "synthesizers", "interfaces", "credit", "distributed", "trainer.py")

SWITCH = "readable_without_sync"

ALLOWED = {
    ("core/nonfinite.py", SWITCH): "the switch",
    ("core/optimizer_step.py", "has_fused_kernel"): "the default optimizer of a synthesizer",
    ("core/optimizer_step.py", "total_norm"): "the same number by fewer or more kernels; skips nothing",
    ("core/snapshot.py", "now"): "the random state of a GPU exists beside the CPU's",
    ("core/snapshot.py", "restore"): "the same",
    ("core/vjp.py", "without_parameter_gradients"): "the random states to restore",
    ("distributed/process_group.py", "_meet"): "gloo or NCCL",
    ("distributed/process_group.py", "local_device"): "the rank's GPU",
}
"""Functions that look at a device, with what for."""


def functions(tree: ast.AST):
    return [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]


def looks_at_a_device(node: ast.AST) -> bool:
    """Whether an expression asks for the kind of a device: `.is_cuda`, `.type == "..."`, `torch.cuda....()`."""
    if isinstance(node, ast.Attribute):
        cuda = node.attr in ("is_cuda", "is_cpu", "is_mps")
        return cuda or (isinstance(node.value, ast.Attribute) and node.value.attr == "cuda" and node.attr != "amp")
    if isinstance(node, ast.Compare):
        return any(isinstance(side, ast.Attribute) and side.attr == "type" for side in (node.left, *node.comparators))
    return False


def files():
    for name in LIBRARY:
        path = ROOT / "dni_seq" / name
        yield from [path] if path.is_file() else sorted(path.rglob("*.py"))


@pytest.mark.parametrize("path", list(files()), ids=lambda path: str(path.relative_to(ROOT / "dni_seq")))
def test_only_the_switch_decides(path):
    name = str(path.relative_to(ROOT / "dni_seq"))
    tree = ast.parse(path.read_text())
    looking = {function.name for function in functions(tree) if any(map(looks_at_a_device, ast.walk(function)))}
    assert looking <= {function for file, function in ALLOWED if file == name}


@pytest.mark.parametrize("path", list(files()), ids=lambda path: str(path.relative_to(ROOT / "dni_seq")))
def test_the_switch_is_called_through_its_module(path):
    """Tests patch it there: a module that imports the function itself would keep the CPU's way."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            assert SWITCH not in [alias.name for alias in node.names], path


def test_what_is_allowed_is_there():
    for file, function in ALLOWED:
        tree = ast.parse((ROOT / "dni_seq" / file).read_text())
        found = [each for each in functions(tree) if each.name == function]
        assert any(looks_at_a_device(node) for each in found for node in ast.walk(each)), (file, function)


@pytest.mark.parametrize(
    "code",
    [
        "x.is_cuda",
        'x.device.type == "cuda"',
        '"cpu" != device.type',
        "torch.cuda.is_available()",
        "torch.cuda.current_stream()",
    ],
)
def test_another_way_would_be_seen(code):
    assert any(map(looks_at_a_device, ast.walk(ast.parse(code))))
