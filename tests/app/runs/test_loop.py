"""The training loop, with a real trainer on a stream of numbers: curves, checkpoints, stops, and errors in one line."""

from __future__ import annotations

import json
import os
import re
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType, SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from torch import nn

import dni_seq as dni
from dni_seq.app.runs import loop
from dni_seq.app.runs.checkpoint import load_checkpoint, save_checkpoint
from dni_seq.app.runs.command import run_command
from dni_seq.app.runs.dashboard import Dashboard
from dni_seq.app.runs.directory import RunDirectory
from dni_seq.app.runs.lock import RunLock
from dni_seq.app.runs.loop import Counters, Measured, TrainingRun, measurements
from dni_seq.app.runs.options import option
from dni_seq.app.runs.resume import plan_run
from dni_seq.core.windows import Window
from dni_seq.credit.results import StepResult
from dni_seq.distributed.process_group import Ranks
from dni_seq.streams import DataError
from tests.events import RecordWriter, points, wait_for_the_next_second
from tests.nests import assert_same

STEPS, LANES = 3, 2
OF_THE_MACHINE = ("seconds", "process_seconds")


@dataclass(frozen=True)
class NumberOptions:
    MAY_CHANGE: ClassVar[frozenset[str]] = frozenset({"limit", "logger"})
    MAY_MOVE: ClassVar[frozenset[str]] = frozenset()
    OF_THE_CALL: ClassVar[frozenset[str]] = frozenset({"run_dir", "resume"})
    RECORDED_LATER: ClassVar[Mapping[str, Any]] = MappingProxyType({})

    limit: int = option(12, "number of steps", group="run")
    logger: str = option("tensorboard", "tracker", group="run")
    fidelity_every: int = option(0, "windows between comparisons", group="run")
    run_dir: str | None = option(None, "directory", group="run")
    resume: str | None = option(None, "checkpoint", group="run")


class Numbers:
    """An endless stream of windows, drawn from the number of the window; `broken` holds windows that cannot be read."""

    lanes = LANES

    def __init__(self) -> None:
        self.position = 0
        self.broken: set[int] = set()
        self.infinite = False

    def __iter__(self) -> Iterator[Window]:
        while True:
            self.position += 1
            if self.position in self.broken:
                raise DataError(f"window {self.position} cannot be read")
            generator = torch.Generator().manual_seed(self.position)
            inputs = torch.randn(STEPS, LANES, 1, generator=generator)
            yield Window(inputs * torch.inf if self.infinite else inputs, inputs.cumsum(0))

    def state_dict(self) -> dict[str, Any]:
        return {"position": self.position}

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        self.position = saved["position"]


class Net(nn.Module):
    """A recurrent network with dropout, so that the random state matters."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.readout = nn.RNN(1, 4), nn.Linear(4, 1)

    def forward(self, inputs: Any, state: Any) -> Any:
        outputs, state = self.rnn(inputs, state)
        return self.readout(nn.functional.dropout(outputs, 0.2)), state

    def initial_state(self, lanes: int) -> Any:
        return torch.zeros(1, lanes, 4)


@dataclass(kw_only=True)
class NumberRun(TrainingRun):
    """The smallest run. `at` calls a function after a step; `losses` has the loss of each."""

    LOG_EVERY: ClassVar[int] = 5

    options: NumberOptions
    stream: Numbers
    counters: Counters = field(default_factory=Counters)
    at: dict[int, Callable[[NumberRun], None]] = field(default_factory=dict)
    losses: list[float] = field(default_factory=list)

    def done(self) -> bool:
        return self.steps >= self.options.limit

    def total_steps(self) -> int:
        return self.options.limit

    def measure(self, window: Window, result: StepResult) -> Measured:
        return Measured({"train/loss": result.loss, **measurements(result)}, weight=1, tokens=window.targets.numel())

    def after_step(self, window: Window, result: StepResult, measured: Measured) -> None:
        self.losses.append(float(result.loss))
        if self.steps in self.at:
            self.at[self.steps](self)

    def point(self) -> dict[str, float]:
        return {"step": self.steps}

    def figures(self) -> str:
        return "figures"

    def dashboard(self) -> Dashboard:
        return Dashboard({}, "Numbers are added.", {}, {})


def train(path: Path, limit: int = 12, at: dict[int, Any] | None = None, change: Any = None, **given: Any) -> int:
    """Starts or resumes the run in `path` as a command does, and returns the exit status. `change` changes the parts."""
    with RunLock() as lock:

        def prepare() -> NumberRun:
            plan = plan_run(NumberOptions, {"run_dir": str(path), "resume": "auto", "limit": limit, **given}, lock)
            torch.manual_seed(1)
            net = Net()
            losses = lambda outputs, targets: (outputs - targets).square().mean()  # noqa: E731
            trainer = dni.SequenceTrainer(net, torch.optim.Adam(net.parameters(), lr=1e-2), losses)
            run = NumberRun(
                options=plan.options,
                run=RunDirectory(path),
                device=torch.device("cpu"),
                stream=Numbers(),
                trainer=trainer,
                at=at or {},
            )
            if change is not None:
                change(run)
            with loop.checkpoint_errors(path):
                run.restore(plan.checkpoint)
            run.begin(plan, lock)
            return run

        return run_command("numbers", Ranks(), prepare)


def without_times(path: Path) -> dict[str, Any]:
    """The last checkpoint of a run without what depends on the machine."""
    content = load_checkpoint(RunDirectory(path).last)
    for name in OF_THE_MACHINE:
        assert content["counters"].pop(name) > 0
    return content


def test_points_checkpoint_and_summary(tmp_path, capsys):
    assert train(tmp_path / "run") == 0
    curves = points(tmp_path / "run")
    assert list(curves["train/loss"]) == [5, 10, 12]  # every five steps, and the last one
    assert curves.keys() >= {"train/perplexity", "train/skipped", "gradient/norm", "memory/peak_mb", "step"}
    content = load_checkpoint(tmp_path / "run" / "checkpoints" / "last.pt")
    assert content.keys() >= {"trainer", "stream", "random", "counters", "log", "config"}
    assert (content["trainer"]["steps"], content["stream"]["position"], content["counters"]["logged_at"]) == (12, 12, 12)
    assert content["config"] == {"limit": 12, "logger": "tensorboard", "fidelity_every": 0}
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary.keys() == {
        "steps",
        "parameters",
        "torch",
        "curve",
        "seconds",
        "process_seconds",
        "peak_memory_mb",
        "in_force",
    }
    assert summary["steps"] == 12
    assert summary["parameters"] == sum(parameter.numel() for parameter in Net().parameters())
    start, end, curves_of = capsys.readouterr().out.splitlines()
    assert start == f"there is no run in {tmp_path / 'run'} yet: starting a new one"
    assert re.fullmatch(rf"12 steps in \d+ s; results in {tmp_path / 'run'}", end)
    assert curves_of == f"curves: tensorboard --logdir {tmp_path}"


def test_a_checkpoint_is_due_by_time_or_after_an_evaluation(tmp_path, monkeypatch):
    """Twelve steps within a minute give one checkpoint, at the end; `previous.pt` shows the one before."""
    previous = "checkpoints/previous.pt"
    assert train(tmp_path / "end") == 0
    assert not (tmp_path / "end" / previous).exists()
    with monkeypatch.context() as patch:
        patch.setattr(NumberRun, "evaluate", lambda run: run.steps == 7)
        assert train(tmp_path / "evaluated") == 0
    assert load_checkpoint(tmp_path / "evaluated" / previous)["trainer"]["steps"] == 7
    monkeypatch.setattr(loop, "SAVE_SECONDS", -1.0)
    assert train(tmp_path / "late") == 0
    assert load_checkpoint(tmp_path / "late" / previous)["trainer"]["steps"] == 11


def test_a_point_is_the_average_since_the_point_before(tmp_path):
    """If the last step is a fifth step, it has one point, not two."""
    losses: list[float] = []
    assert train(tmp_path / "run", limit=10, at={10: lambda run: losses.extend(run.losses)}) == 0
    found = points(tmp_path / "run")["train/loss"]
    assert found == pytest.approx({5: sum(losses[:5]) / 5, 10: sum(losses[5:]) / 5})


def test_only_the_last_checkpoint_is_kept_as_previous(tmp_path):
    """A run resumes from `previous.pt` if `last.pt` is damaged, so no other checkpoint may be moved there."""
    run = RunDirectory(tmp_path / "run")
    save_best = lambda each: each.save(run.best)  # noqa: E731
    assert train(run.path, at={3: save_best, 5: save_best}) == 0
    assert load_checkpoint(run.best)["trainer"]["steps"] == 5
    assert not run.previous.exists()


def test_checkpoints_are_a_minute_apart(tmp_path, monkeypatch):
    """A step lasts 25 seconds here, so the third step after each checkpoint saves the next one."""
    now, saved, save = [0.0], [], NumberRun.save

    def wait(run: NumberRun) -> None:
        now[0] += 25

    def note(run: NumberRun, path: Path) -> None:
        saved.append(run.steps)
        save(run, path)

    monkeypatch.setattr(loop, "time", SimpleNamespace(monotonic=lambda: now[0], process_time=time.process_time))
    monkeypatch.setattr(NumberRun, "save", note)
    assert train(tmp_path / "run", limit=11, at=dict.fromkeys(range(12), wait)) == 0
    assert saved == [3, 6, 9, 11]
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["seconds"] == 11 * 25


def test_a_checkpoint_is_written_after_its_points(tmp_path, monkeypatch):
    """Else a killed run would resume with a gap in its curves. TensorBoard's thread is slow here."""
    logged = {}
    write = RecordWriter.write
    monkeypatch.setattr(RecordWriter, "write", lambda self, data: (time.sleep(0.05), write(self, data)))

    def look(path: Path, content: dict[str, Any], **more: Any) -> None:
        logged[content["trainer"]["steps"]] = list(points(tmp_path / "run")["train/loss"])
        save_checkpoint(path, content, **more)

    monkeypatch.setattr(loop, "save_checkpoint", look)
    monkeypatch.setattr(NumberRun, "evaluate", lambda run: run.steps in (7, 10))
    assert train(tmp_path / "run") == 0
    assert logged == {7: [5], 10: [5, 10], 12: [5, 10, 12]}


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_a_stopped_run_resumes_bit_identically(number, status, tmp_path, capsys):
    run = tmp_path / "a run"
    assert train(tmp_path / "whole") == 0
    capsys.readouterr()
    assert train(run, at={7: lambda run: os.kill(os.getpid(), number)}) == status
    _, end = capsys.readouterr().out.splitlines()
    assert end == f"stopped at step 7; to resume: --run-dir '{run}' --resume auto"
    assert load_checkpoint(RunDirectory(run).last)["trainer"]["steps"] == 7
    assert not (run / "summary.json").exists()
    wait_for_the_next_second()
    assert train(run) == 0
    assert capsys.readouterr().out.startswith(f"resuming from {run / 'checkpoints' / 'last.pt'} at step 7\n")
    assert_same(without_times(run), without_times(tmp_path / "whole"))
    whole, resumed = points(tmp_path / "whole"), points(run)
    assert {key: curve for key, curve in resumed.items() if key != "memory/peak_mb"} == {
        key: curve for key, curve in whole.items() if key != "memory/peak_mb"
    }


def test_a_signal_at_the_last_step_lets_the_run_finish(tmp_path):
    assert train(tmp_path / "run", at={12: lambda run: os.kill(os.getpid(), signal.SIGTERM)}) == 0
    assert (tmp_path / "run" / "summary.json").exists()


def scored(run: NumberRun) -> dict[str, Any]:
    """Scores of a finished run, as a language model has them."""
    run.log.scalars(run.steps, {"test/loss": 1.5})
    return {"test": 1.5}


def test_a_finished_run_says_so_and_is_left_alone(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(NumberRun, "scores", scored)
    run = tmp_path / "run"
    assert train(run) == 0
    written = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    capsys.readouterr()
    assert train(run) == 0
    assert capsys.readouterr().out == f"finished at step 12, results in {run}; to train on, raise the limit of the run\n"
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == written
    assert points(run)["test/loss"] == {12: 1.5}
    assert train(run, limit=15) == 0
    assert points(run)["test/loss"] == {12: 1.5, 15: 1.5}


@pytest.mark.parametrize("flushed", [False, True])
def test_a_run_that_was_killed_at_its_end_has_no_point_twice(tmp_path, monkeypatch, flushed):
    """After its last checkpoint, while it scored: the scores may be in the event file, or not."""

    def killed(run: NumberRun) -> dict[str, Any]:
        if flushed:
            scored(run)
        raise OSError("killed")

    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(NumberRun, "scores", killed)
        assert train(run) == 2
    assert not (run / "summary.json").exists()
    monkeypatch.setattr(NumberRun, "scores", scored)
    assert train(run) == 0
    curves = points(run)
    assert curves["test/loss"] == {12: 1.5}
    assert list(curves["train/loss"]) == [5, 10, 12]
    assert json.loads((run / "summary.json").read_text())["test"] == 1.5


def test_an_older_checkpoint_than_the_last_points_doubles_none(tmp_path, monkeypatch):
    monkeypatch.setattr(NumberRun, "scores", scored)
    monkeypatch.setattr(NumberRun, "evaluate", lambda run: run.steps == 7)
    run = RunDirectory(tmp_path / "run")
    assert train(run.path) == 0
    assert load_checkpoint(run.previous)["trainer"]["steps"] == 7
    run.previous.replace(run.last)
    assert train(run.path) == 0
    curves = points(run.path)
    assert curves["test/loss"] == {12: 1.5}
    assert list(curves["train/loss"]) == [5, 10, 12]


def test_times_add_up_over_sessions(tmp_path):
    assert train(tmp_path / "run", limit=6) == 0
    path = RunDirectory(tmp_path / "run").last
    content = load_checkpoint(path)
    content["counters"]["seconds"] += 1000
    save_checkpoint(path, {name: value for name, value in content.items() if name not in ("format", "version")})
    assert train(tmp_path / "run") == 0
    assert 1000 < json.loads((tmp_path / "run" / "summary.json").read_text())["seconds"] < 1100


def error_of(capsys) -> str:
    """The one line on stderr, without the name of the command."""
    (line,) = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("step ")]
    return line.removeprefix("numbers: error: ")


def test_a_run_that_cannot_go_on_is_saved(tmp_path, capsys):
    def infinite(run: NumberRun) -> None:
        run.stream.infinite = True

    assert train(tmp_path / "nan", limit=30, at={3: infinite}) == 2
    error = error_of(capsys)
    assert "10 windows in a row were skipped" in error
    assert f"(saved at step 13; to resume: --run-dir {tmp_path / 'nan'} --resume auto)" in error
    assert load_checkpoint(RunDirectory(tmp_path / "nan").last)["trainer"]["steps"] == 13

    def unreadable(run: NumberRun) -> None:
        run.stream.broken = {9}

    assert train(tmp_path / "data", change=unreadable) == 2
    assert error_of(capsys).startswith("window 9 cannot be read (saved at step 8; to resume: ")
    assert load_checkpoint(RunDirectory(tmp_path / "data").last)["trainer"]["steps"] == 8


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
def test_a_full_disk_is_one_line(tmp_path, capsys, monkeypatch):
    """At the end of the run, and after an error that ends it."""

    def fill_disk(run: NumberRun) -> None:
        run.run.last.with_name("last.pt.tmp").symlink_to("/dev/full")

    assert train(tmp_path / "end", at={12: fill_disk}) == 2
    assert error_of(capsys).startswith("[Errno 28] cannot write: No space left on device")

    def unreadable(run: NumberRun) -> None:
        run.stream.broken = {9}

    assert train(tmp_path / "data", change=unreadable, at={8: fill_disk}) == 2
    error = error_of(capsys)
    assert error.startswith("window 9 cannot be read (")
    assert "No space left on device" in error


@pytest.mark.parametrize(
    ("entry", "value"),
    [
        ("counters", {"minutes": 3}),
        ("stream", {}),
        ("trainer", {}),
        ("random", {"cpu": 3, "cuda": []}),
        ("log", {"sums": 1}),
    ],
)
def test_a_checkpoint_with_other_content_is_one_line(entry, value, tmp_path, capsys):
    assert train(tmp_path / "run", limit=6) == 0
    path = RunDirectory(tmp_path / "run").last
    content = load_checkpoint(path) | {entry: value}
    save_checkpoint(path, {name: value for name, value in content.items() if name not in ("format", "version")})
    capsys.readouterr()
    assert train(tmp_path / "run") == 2
    assert error_of(capsys).startswith(f"cannot resume from the checkpoint of the run {tmp_path / 'run'}: ")


def test_the_first_step_after_resuming_is_part_of_the_checks(tmp_path, capsys):
    """A hidden state of another size shows when it is first used; the same error later is a bug."""

    def fail(run: NumberRun) -> None:
        raise RuntimeError("sizes differ")

    assert train(tmp_path / "run", limit=6) == 0
    capsys.readouterr()
    assert train(tmp_path / "run", at={7: fail}) == 2
    assert "RuntimeError: sizes differ" in error_of(capsys)
    with pytest.raises(RuntimeError, match="sizes differ"):
        train(tmp_path / "run", at={8: fail})


def test_a_directory_in_use_is_one_line(tmp_path, capsys):
    assert train(tmp_path / "run", limit=2) == 0
    before = (tmp_path / "run" / "checkpoints" / "last.pt").read_bytes()
    with RunLock() as lock:
        lock.take(tmp_path / "run")
        capsys.readouterr()
        assert train(tmp_path / "run", limit=4) == 2
    assert "is training in --run-dir" in error_of(capsys)
    assert (tmp_path / "run" / "checkpoints" / "last.pt").read_bytes() == before
