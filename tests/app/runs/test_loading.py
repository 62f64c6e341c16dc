"""The first line of a command is there before PyTorch is imported, and does not spoil help, errors and results."""

from __future__ import annotations

import os
import pty
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.paths import ROOT, SCRIPTS

HOOK = """
import os, sys

class Hook:
    # Records the import of torch on stdout's descriptor, in the order of what else is written there.
    def find_spec(self, name, path=None, target=None):
        if name == "{module}":
            os.write({descriptor}, b"import of {module}\\n")
            {then}

sys.meta_path.insert(0, Hook())
"""
TRAIN = [str(SCRIPTS / "train_lm.py")]


def hooked(tmp_path: Path, descriptor: int = 1, then: str = "os._exit(7)", module: str = "torch") -> dict[str, str]:
    """The environment of a Python that says when a module is imported, and then ends or waits."""
    (tmp_path / "sitecustomize.py").write_text(HOOK.format(descriptor=descriptor, then=then, module=module))
    return os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}


def start(arguments: Sequence[str], tmp_path: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
        env=hooked(tmp_path) | variables,
        timeout=60,
    )


@pytest.mark.parametrize(
    ("arguments", "name"),
    [(TRAIN, "train_lm"), (["-m", "dni_seq.app.cli", "train"], "dni-seq train")]
    + [([str(SCRIPTS / f"{name}.py")], name) for name in ("train_tasks", "train_feedforward", "soak")],
)
def test_the_first_line_comes_before_torch(arguments, name, tmp_path):
    result = start(arguments, tmp_path)
    assert result.stdout == f"{name}: loading PyTorch ...\nimport of torch\n"
    assert (result.returncode, result.stderr) == (7, "")


@pytest.mark.parametrize(
    "arguments", [["--help"], ["--help-all"], ["--layers", "0"], ["--nothing"], ["--dry-run", "--eval-only"]]
)
def test_help_and_errors_in_options_need_no_torch(arguments, tmp_path):
    result = start([*TRAIN, *arguments], tmp_path)
    assert "torch\n" not in result.stdout
    assert "loading" not in result.stdout
    assert result.returncode == (0 if arguments[0].startswith("--help") else 2)
    assert result.stderr.count("\n") == (0 if arguments[0].startswith("--help") else 1)


def test_one_rank_says_it(tmp_path):
    assert start(TRAIN, tmp_path, RANK="0").stdout == "train_lm: loading PyTorch ...\nimport of torch\n"
    assert start(TRAIN, tmp_path, RANK="1").stdout == "import of torch\n"


@pytest.mark.parametrize(
    "arguments", [[*TRAIN, "--dry-run"], [*TRAIN, "--eval-only"], [str(SCRIPTS / "sample_lm.py"), "run"]]
)
def test_a_result_on_stdout_is_not_mixed_with_it(arguments, tmp_path):
    result = start(arguments, tmp_path)
    assert (result.stdout, result.stderr) == ("import of torch\n", "")
    ours, theirs = pty.openpty()
    with subprocess.Popen(
        [sys.executable, *arguments], cwd=tmp_path, env=hooked(tmp_path), stdout=subprocess.PIPE, stderr=theirs
    ) as process:
        assert process.communicate(timeout=60)[0] == b"import of torch\n"
    os.close(theirs)
    assert b": loading PyTorch ..." in os.read(ours, 1000)
    os.close(ours)


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        (TRAIN, "train_lm"),
        (["-m", "dni_seq.app.cli", "tasks"], "dni-seq tasks"),
        (["-m", "dni_seq.app.cli", "sample", "run"], "dni-seq sample"),
    ],
)
def test_ctrl_c_while_torch_is_imported_is_one_line(arguments, name, tmp_path):
    """Also if Python would lose the exception, as in a callback of the import system."""
    waits = "import time, weakref; kept = Hook(); weakref.finalize(kept, time.sleep, 60); del kept; time.sleep(60)"
    environment = hooked(tmp_path, descriptor=2, then=waits)
    process = subprocess.Popen(
        [sys.executable, *arguments], cwd=tmp_path, env=environment, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL
    )
    assert process.stderr is not None
    with process:
        assert process.stderr.readline() == b"import of torch\n"
        time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    assert (process.returncode, errors.decode()) == (130, f"{name}: stopped by Ctrl-C\n")
