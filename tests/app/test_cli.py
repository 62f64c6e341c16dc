"""`dni-seq`: every command, from a clone and from a wheel in an environment of its own."""

from __future__ import annotations

import importlib
import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

import dni_seq
from dni_seq.app import cli
from tests.paths import ROOT

TINY = ("--embed", "8", "--hidden", "8", "--bptt", "4", "--batch-size", "64", "--max-steps", "2", "--eval-tokens", "2048")


@pytest.fixture(autouse=True)
def _as_it_was(monkeypatch):
    """What a command does to its process is undone."""
    monkeypatch.setattr(sys, "argv", [*sys.argv])
    monkeypatch.setattr(sys, "path", [*sys.path])


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_command_knows_its_name(name, capsys):
    with pytest.raises(SystemExit) as end:
        cli.main([name, "--help"])
    assert end.value.code == 0
    assert capsys.readouterr().out.startswith(f"usage: dni-seq {name} ")
    with pytest.raises(SystemExit) as end:
        cli.main([name, "--nothing"])
    assert end.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith(f"dni-seq {name}: error: ")
    assert error.count("\n") == 1


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_help_names_commands_and_no_script(name, capsys):
    """A wheel has no scripts."""
    pages = [["--help"], ["--help-all"]] if name in ("train", "tasks") else [["--help"]]
    for arguments in (*pages, *([["table1", "--help"]] if name == "reproduce" else [])):
        with pytest.raises(SystemExit):
            cli.main([name, *arguments])
        text = capsys.readouterr().out
        assert f"dni-seq {name}" in text
        assert ".py" not in text


def test_a_scripts_help_names_scripts(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["scripts/train_lm.py"])
    with pytest.raises(SystemExit):
        importlib.import_module(cli.COMMANDS["train"][0]).main(["--help"])
    assert "python scripts/train_lm.py --dataset ptb" in capsys.readouterr().out


def test_reproduce_says_what_it_needs_without_a_clone(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["reproduce", "draw"]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith(
        "dni-seq reproduce: error: docs/results/paper.md does not exist: call this in a clone of dni_seq"
    )
    assert not list(tmp_path.iterdir())


def test_help_lists_the_commands(capsys):
    assert cli.main(["--help"]) == 0
    text = capsys.readouterr().out
    assert [line.split()[0] for line in text.splitlines() if line.startswith("  ")] == list(cli.COMMANDS)
    assert {"train", "evaluate", "sample", "tasks"} <= set(cli.COMMANDS)


def test_the_version(capsys):
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"dni-seq {dni_seq.__version__}\n"
    assert f"version: {dni_seq.__version__}\n" in (ROOT / "CITATION.cff").read_text()


def test_the_package_runs_as_a_module():
    line = [sys.executable, "-m", "dni_seq", "trian"]
    result = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (result.returncode, result.stderr) == (2, "dni-seq: error: there is no command 'trian', did you mean train?\n")


def test_a_misspelt_command_is_answered_with_the_right_one(capsys):
    assert cli.main(["trian"]) == 2
    assert capsys.readouterr().err == "dni-seq: error: there is no command 'trian', did you mean train?\n"


def test_a_wheel_in_a_new_environment(tmp_path):
    """Build, install without anything of this clone on the path, and train, evaluate and sample with no network."""
    pytest.importorskip("build", reason="the package build, of the extra dev, is not installed")
    source = tmp_path / "source"
    shutil.copytree(ROOT / "dni_seq", source / "dni_seq", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PIP_NO_INDEX": "1", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}

    def run(*line: object) -> str:
        words = [str(word) for word in line]
        result = subprocess.run(
            words, check=False, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
        )
        assert result.returncode == 0, f"{words}\n{result.stdout}\n{result.stderr}"
        return result.stdout

    run(sys.executable, "-m", "build", "--no-isolation", "--wheel", "--outdir", tmp_path, source)
    (wheel,) = tmp_path.glob("*.whl")
    modules = {str(path.relative_to(source)) for path in (source / "dni_seq").rglob("*.py")}
    with zipfile.ZipFile(wheel) as file:
        assert {name for name in file.namelist() if name.endswith(".py")} == modules
    shutil.rmtree(source)
    venv = tmp_path / "venv"
    run(sys.executable, "-m", "venv", venv)
    python = venv / "bin" / "python"
    run(python, "-m", "pip", "install", "--quiet", "--no-deps", "--no-compile", wheel)
    # What the package depends on comes from this environment, whose own links to a clone a line like this does not follow.
    site = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip())
    (site / "outer.pth").write_text(sysconfig.get_path("purelib") + "\n")
    assert (site / "dni_seq" / "py.typed").is_file()
    assert wheel.name.startswith(f"dni_seq-{dni_seq.__version__}-")
    assert run(python, "-m", "dni_seq", "--version") == f"dni-seq {dni_seq.__version__}\n"
    run(venv / "bin" / "dni-seq", "train", *TINY, "--run-dir", "run")
    code = "import dni_seq.app.cli as c; print(c.__file__); c.main(['evaluate', 'run']); c.main(['sample', 'run'])"
    where, score, *text = run(python, "-c", code).split("\n")
    assert Path(where).is_relative_to(site)
    assert score.startswith("test: loss ")
    assert len("\n".join(text)) > 400
