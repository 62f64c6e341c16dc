"""A call begins a run or goes on with one, and never mixes two."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar

import pytest

from dni_seq.app.runs.checkpoint import load_checkpoint, save_checkpoint
from dni_seq.app.runs.directory import RunDirectory
from dni_seq.app.runs.lock import RunLock
from dni_seq.app.runs.options import option
from dni_seq.app.runs.resume import config_of, plan_run


@dataclasses.dataclass(frozen=True)
class Options:
    """A script's options, in small."""

    MAY_CHANGE: ClassVar[frozenset[str]] = frozenset({"epochs"})
    MAY_MOVE: ClassVar[frozenset[str]] = frozenset({"text"})
    OF_THE_CALL: ClassVar[frozenset[str]] = frozenset({"run_dir", "resume"})
    RECORDED_LATER: ClassVar[Mapping[str, Any]] = MappingProxyType({})

    bptt: int = option(5, "window", group="run")
    text: str | None = option(None, "text", group="run")
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
    assert plan.describe_start("step 0") == f"there is no run in {tmp_path / 'new'} yet: starting a new one"
    assert not (tmp_path / "new").exists()
    assert plan_run(Options, {"run_dir": str(tmp_path / "new")}).describe_start("step 0") is None


def test_auto_resumes_with_the_runs_own_options(run):
    plan = plan_run(Options, {"run_dir": str(run.path), "resume": "auto", "epochs": 9})
    assert (plan.options.bptt, plan.options.epochs) == (7, 9)
    assert plan.checkpoint["steps"] == 3
    assert plan.describe_start("step 3") == f"resuming from {run.last} at step 3"


def test_a_directory_is_resumed_from_its_last_checkpoint(run, tmp_path):
    plan = plan_run(Options, {"resume": str(run.path), "epochs": 9})
    assert (plan.run.path, plan.options.resume, plan.options.epochs) == (run.path, "auto", 9)
    assert plan.source == run.last
    assert plan_run(Options, {"resume": str(run.path), "run_dir": str(run.path)}).source == run.last
    for given, message in (
        ({"resume": str(run.path), "run_dir": str(tmp_path / "other")}, "remove --run-dir"),
        ({"resume": str(run.last.parent)}, r"is a directory without a run: give RUN_DIR or RUN_DIR/checkpoints/NAME\.pt"),
    ):
        with pytest.raises(ValueError, match=message):
            plan_run(Options, given)


def test_a_text_may_move_if_a_checkpoint_can_tell_that_it_is_the_same(run):
    given = {"run_dir": str(run.path), "resume": "auto", "text": "/new/a.txt"}
    with pytest.raises(ValueError, match=r"another configuration \(--text None there, /new/a.txt here\)"):
        plan_run(Options, given)
    run.create(config_of(Options(bptt=7, text="/old/a.txt")))
    assert plan_run(Options, given).options.text == "/new/a.txt"
    run.last.unlink()
    with pytest.raises(ValueError, match=r"another configuration \(--text /old/a.txt there, /new/a.txt here\)"):
        plan_run(Options, given)


def test_auto_starts_again_where_no_checkpoint_was_written_yet(run):
    run.last.unlink()
    plan = plan_run(Options, {"run_dir": str(run.path), "resume": "auto"})
    assert plan.options.bptt == 7
    assert plan.checkpoint is None
    start = plan.describe_start("step 0")
    assert start == f"the run in {run.path} has no checkpoint yet: starting it from the beginning"


def test_a_path_resumes_from_that_checkpoint_in_its_own_directory(run):
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
        ({"resume": str(run.best), "run_dir": str(tmp_path / "other")}, "remove --run-dir"),
        ({"resume": str(tmp_path / "text.pt")}, "not a checkpoint"),
        ({"resume": str(tmp_path / "absent.pt")}, "there is no checkpoint .*: give RUN_DIR, "),
        ({"resume": str(stray)}, "RUN_DIR/checkpoints"),
        ({"run_dir": directory, "resume": "auto", "epochs": "many"}, "--epochs must be a whole number"),
    ]
    for given, message in cases:
        with pytest.raises(ValueError, match=message):
            plan_run(Options, given)
    assert snapshot(tmp_path) == before


DAMAGES = {
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:100]),
    "flipped": lambda path: path.write_bytes(path.read_bytes()[:500] + b"?" + path.read_bytes()[501:]),
    "missing": lambda path: path.unlink(),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_auto_falls_back_to_the_newest_whole_checkpoint_and_says_so(run, damage):
    save_checkpoint(run.last, {"steps": 4}, keep=run.previous)
    DAMAGES[damage](run.last)
    plan = plan_run(Options, {"run_dir": str(run.path), "resume": "auto"})
    assert plan.checkpoint["steps"] == 3
    assert str(run.last) in plan.note
    assert plan.note.endswith(f": resuming from {run.previous}")
    assert plan.describe_start("step 3") == f"{plan.note} at step 3"
    with RunLock() as lock:
        plan.initialize_dir(run, plan.options, lock)
    # The next checkpoint must not push the whole one out of its place in favour of the damaged one.
    save_checkpoint(run.last, {"steps": 5}, keep=run.previous)
    assert (load_checkpoint(run.last)["steps"], load_checkpoint(run.previous)["steps"]) == (5, 3)
    aside = run.last.with_name("last.pt.damaged")
    assert aside.exists() == (damage != "missing")


def test_a_whole_last_checkpoint_needs_no_note(run):
    plan = plan_run(Options, {"run_dir": str(run.path), "resume": "auto"})
    assert (plan.note, plan.damaged) == (None, ())


def test_a_newer_checkpoint_is_not_passed_over(run):
    save_checkpoint(run.last, {"steps": 4, "version": 99}, keep=run.previous)
    with pytest.raises(ValueError, match="version 99"):
        plan_run(Options, {"run_dir": str(run.path), "resume": "auto"})


def test_a_run_in_use_is_refused_before_its_checkpoint_is_read(run, tmp_path):
    run.last.write_bytes(b"half")
    with RunLock() as holder, RunLock() as lock:
        holder.take(run.path)
        with pytest.raises(ValueError, match="is training in --run-dir"):
            plan_run(Options, {"run_dir": str(run.path), "resume": "auto"}, lock)
    with RunLock() as lock, pytest.raises(ValueError, match="not a checkpoint"):
        plan_run(Options, {"run_dir": str(run.path), "resume": "auto"}, lock)


def test_two_new_runs_in_one_directory_do_not_mix(tmp_path):
    """Both found it free; the second one comes when the first has already begun, or ended."""
    given = {"run_dir": str(tmp_path / "new")}
    one, two = plan_run(Options, given), plan_run(Options, given)
    with RunLock() as first, RunLock() as second:
        one.initialize_dir(one.run, one.options, first)
        with pytest.raises(ValueError, match="is training in"):
            two.initialize_dir(two.run, two.options, second)
    with RunLock() as second, pytest.raises(ValueError, match="holds a run already"):
        two.initialize_dir(two.run, two.options, second)
    # A directory that holds a lock alone is free: a process died just after it had made it.
    (tmp_path / "dead").mkdir()
    (tmp_path / "dead" / "lock").touch()
    assert plan_run(Options, {"run_dir": str(tmp_path / "dead")}).checkpoint is None


def test_a_damaged_run_is_refused_not_restarted(run):
    save_checkpoint(run.last, {"steps": 4}, keep=run.previous)
    for path in (run.last, run.previous):
        path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match=r"not a checkpoint.*no valid checkpoint is left"):
        plan_run(Options, {"run_dir": str(run.path), "resume": "auto"})
    run.config.write_text(json.dumps({"nonsense": 1}))
    with pytest.raises(ValueError, match="unknown options: nonsense"):
        plan_run(Options, {"run_dir": str(run.path), "resume": "auto"})
