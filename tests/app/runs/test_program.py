"""What every program does around its command: Ctrl-C is one line, a bug keeps its traceback, the status is the command's."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dni_seq.app.runs.program import run_program
from tests.paths import ROOT, SCRIPTS


def test_the_status_is_that_of_the_command(capsys):
    assert [run_program(lambda status=status: status) for status in (0, 2, 143)] == [0, 2, 143]
    assert capsys.readouterr() == ("", "")


def test_an_interrupt_is_one_line(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["scripts/train_feedforward.py"])

    def main() -> int:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(10)
        return 0

    assert run_program(main) == 130
    assert capsys.readouterr() == ("", "train_feedforward: stopped by Ctrl-C\n")


def test_a_bug_keeps_its_traceback(capsys):
    def main() -> int:
        raise KeyError("lane")

    assert run_program(main) == 1
    assert "KeyError: 'lane'\nThis looks like a bug" in capsys.readouterr().err


@pytest.mark.parametrize("seconds", [0.7, 1.5])
def test_an_interrupt_while_torch_is_imported_is_one_line(seconds, tmp_path):
    process = subprocess.Popen(
        [sys.executable, str(SCRIPTS / "sample_lm.py"), "run"], cwd=tmp_path, stderr=subprocess.PIPE, text=True
    )
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    # A quick machine has said by then that there is no such run, and ends or has ended.
    interrupted = (process.returncode, errors) == (130, "sample_lm: stopped by Ctrl-C\n")
    assert interrupted or (process.returncode in (2, -signal.SIGINT) and "config.json" in errors)


def test_every_script_is_a_program_of_its_own_name():
    """And all scripts are alike, but for the names."""
    paths = sorted(SCRIPTS.glob("*.py"))
    assert len(paths) > 10
    for path in paths:
        text = path.read_text(encoding="utf-8")
        assert f'b"{path.stem}: stopped by Ctrl-C\\n"' in text
        module = re.search(r"The code is `(dni_seq[\w.]+)`", text)[1]
        result = ", result=True" if path.stem in ("evaluate_lm", "sample_lm", "compare_runs") else ""
        call = "run_program(main)" if path.stem == "train_lm" else f'run_module("{module}"{result})'
        assert re.search(rf"^    (sys\.exit|leave)\({re.escape(call)}\)$", text, re.MULTILINE)
        assert (f"from {module} import main" in text) == (path.stem == "train_lm")
        assert Path(ROOT, *module.split(".")).with_suffix(".py").is_file()
