"""A call begins a run or goes on with one, and never mixes two."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import ClassVar

import pytest

from dni_seq.checkpoint import save_checkpoint
from dni_seq.options import option
from dni_seq.plan import config_of, plan_run
from dni_seq.rundir import RunDirectory


@dataclasses.dataclass(frozen=True)
class Options:
    """A script's options, in small."""

    MAY_CHANGE: ClassVar[frozenset[str]] = frozenset({"epochs"})
    OF_THE_CALL: ClassVar[frozenset[str]] = frozenset({"run_dir", "resume"})

    bptt: int = option(5, "window", group="run")
    epochs: int = option(6, "epochs", group="run")
    run_dir: str | None = option(None, "directory", group="run")
    resume: str | None = option(None, "go on", group="run")


@pytest.fixture
def run(tmp_path) -> RunDirectory:
    """A run of bptt 7 with a checkpoint at step 3 and a best one at step 2."""
    run = RunDirectory(tmp_path / "run")
    run.create(config_of(Options(bptt=7)))
    save_checkpoint(run.last, {"steps": 3})
    save_checkpoint(run.best, {"steps": 2})
    return run


def snapshot(directory: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def test_a_new_run_in_a_directory_to_be_named():
    plan = plan_run(Options, {"bptt": 3})
    assert (plan.options, plan.run, plan.checkpoint) == (Options(bptt=3), None, None)


def test_auto_begins_where_there_is_no_run(tmp_path):
    given = {"run_dir": str(tmp_path / "new"), "resume": "auto"}
    plan = plan_run(Options, given)
    assert plan.run.path == tmp_path / "new"
    assert plan.checkpoint is None
    assert not (tmp_path / "new").exists()


def test_auto_goes_on_with_the_runs_own_options(run):
    plan = plan_run(Options, {"run_dir": str(run.path), "resume": "auto", "epochs": 9})
    assert (plan.options.bptt, plan.options.epochs) == (7, 9)
    assert plan.checkpoint["steps"] == 3


def test_auto_begins_again_where_no_checkpoint_was_written_yet(run):
    run.last.unlink()
    plan = plan_run(Options, {"run_dir": str(run.path), "resume": "auto"})
    assert plan.options.bptt == 7
    assert plan.checkpoint is None


def test_a_path_goes_on_from_that_checkpoint_in_its_own_directory(run):
    plan = plan_run(Options, {"resume": str(run.best)})
    assert plan.checkpoint["steps"] == 2
    assert plan.run.path == run.path
    assert plan_run(Options, {"resume": str(run.best), "run_dir": str(run.path)}).checkpoint["steps"] == 2


def test_what_is_refused_leaves_the_run_untouched(run, tmp_path):
    directory, stray = str(run.path), tmp_path / "stray.pt"
    save_checkpoint(stray, {"steps": 1})
    (tmp_path / "text.pt").write_text("no checkpoint")
    before = snapshot(tmp_path)
    cases = [
        ({"run_dir": directory}, "--bptt 7 there, 5 here"),
        ({"run_dir": directory, "bptt": 7}, "add --resume auto"),
        ({"run_dir": directory, "resume": "auto", "bptt": 5}, r"another configuration \(--bptt 7 there, 5 here\)"),
        ({"resume": "auto"}, "needs --run-dir"),
        ({"resume": str(run.best), "bptt": 5}, "another configuration"),
        ({"resume": str(run.best), "run_dir": str(tmp_path / "other")}, "leave out --run-dir"),
        ({"resume": str(tmp_path / "text.pt")}, "not a checkpoint"),
        ({"resume": str(tmp_path / "absent.pt")}, "there is no checkpoint"),
        ({"resume": str(stray)}, "RUN_DIR/checkpoints"),
        ({"run_dir": directory, "resume": "auto", "epochs": "many"}, "--epochs must be a whole number"),
    ]
    for given, message in cases:
        with pytest.raises(ValueError, match=message):
            plan_run(Options, given)
    assert snapshot(tmp_path) == before


def test_a_damaged_run_is_refused_not_restarted(run):
    run.last.write_bytes(run.last.read_bytes()[:100])
    with pytest.raises(ValueError, match="not a checkpoint"):
        plan_run(Options, {"run_dir": str(run.path), "resume": "auto"})
    run.config.write_text(json.dumps({"nonsense": 1}))
    with pytest.raises(ValueError, match="unknown options: nonsense"):
        plan_run(Options, {"run_dir": str(run.path), "resume": "auto"})
