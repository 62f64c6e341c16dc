"""`--logger`: what each tracker receives, in new, stopped, killed and resumed runs, and what is missing in one line."""

from __future__ import annotations

import io
import os
import signal
import sys
from pathlib import Path

import pytest
import torch

from dni_seq.app.decoupled import train as decoupled
from dni_seq.app.feedforward import train as feedforward
from dni_seq.app.lm import train as lm
from dni_seq.app.runs.checkpoint import load_checkpoint
from dni_seq.app.runs.directory import RunDirectory
from dni_seq.app.runs.metrics_file import read_curves
from dni_seq.app.runs.run_log import RunLog
from dni_seq.app.runs.trackers import LOGGERS, METRICS, logger_change
from dni_seq.app.tasks import train as tasks
from tests.app.runs.test_loop import NumberRun, error_of, scored, train
from tests.events import points, wait_for_the_next_second

TINY = ("--updates", "4", "--hidden", "8", "--batch-size", "4", "--synthesizer-hidden", "8")


@pytest.fixture
def offline(monkeypatch):
    """wandb in its offline mode, and the functions that read its files."""
    wandb = pytest.importorskip("wandb")
    from tests import wandb_records

    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    wandb.teardown()  # it reads the environment once in a process
    yield wandb_records
    wandb.teardown()


def curves(run: Path) -> dict[str, dict[int, float]]:
    """The curves of a run in metrics.csv without memory, which depends on the machine."""
    return {key: curve for key, curve in read_curves(run / METRICS).items() if key != "memory/peak_mb"}


def stop(run: NumberRun) -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def at_an_older_checkpoint(path: Path) -> None:
    """Puts back the checkpoint before the last one, as if the run had been killed between the two."""
    run = RunDirectory(path)
    assert load_checkpoint(run.previous)["trainer"]["steps"] == 7
    run.previous.replace(run.last)


@pytest.mark.parametrize("logger", LOGGERS)
def test_every_logger_has_metrics_and_trains_the_same(tmp_path, monkeypatch, capsys, request, logger):
    if logger == "wandb":
        request.getfixturevalue("offline")
    monkeypatch.setattr(NumberRun, "scores", scored)
    losses: dict[str, list[float]] = {}
    for name in dict.fromkeys(("tensorboard", logger)):
        end = {12: lambda run, name=name: losses.update({name: run.losses})}
        assert train(tmp_path / name, at=end, logger=name) == 0
    *_, last_line = capsys.readouterr().out.splitlines()
    assert len(losses["tensorboard"]) == 12
    assert losses[logger] == losses["tensorboard"]
    assert curves(tmp_path / logger) == curves(tmp_path / "tensorboard")
    assert curves(tmp_path / logger)["test/loss"] == {12: 1.5}
    assert bool(list((tmp_path / logger).glob("events.*"))) == (logger == "tensorboard")
    assert (tmp_path / logger / "wandb").exists() == (logger == "wandb")
    file = tmp_path / logger / METRICS
    shown = {"tensorboard": f"tensorboard --logdir {tmp_path}", "wandb": f"at wandb, and in {file}", "none": f"in {file}"}
    assert last_line == f"curves: {shown[logger]}"


def test_metrics_of_a_stopped_run_are_those_of_a_whole_one(tmp_path):
    assert train(tmp_path / "whole", logger="none") == 0
    assert train(tmp_path / "run", at={7: stop}, logger="none") == 143
    assert train(tmp_path / "run") == 0
    assert not list((tmp_path / "run").glob("events.*"))  # a resumed run keeps its logger
    assert curves(tmp_path / "run") == curves(tmp_path / "whole")


@pytest.mark.parametrize("killed", ["after its last checkpoint", "between two checkpoints"])
def test_metrics_of_a_killed_run_are_those_of_a_whole_one(tmp_path, monkeypatch, killed):
    monkeypatch.setattr(NumberRun, "scores", scored)
    monkeypatch.setattr(NumberRun, "evaluate", lambda run: run.steps == 7)
    for name in ("whole", "run"):
        assert train(tmp_path / name, logger="none") == 0
    (tmp_path / "run" / "summary.json").unlink()
    if killed == "between two checkpoints":
        at_an_older_checkpoint(tmp_path / "run")
    with (tmp_path / "run" / METRICS).open("a") as file:
        file.write("1")
    assert train(tmp_path / "run") == 0
    assert curves(tmp_path / "run") == curves(tmp_path / "whole")
    assert curves(tmp_path / "run").keys() >= {"train/loss", "test/loss", "gradient/norm"}


def test_a_full_disk_is_one_line(tmp_path, capsys):
    if not Path("/dev/full").exists():
        pytest.skip("this system has no /dev/full")

    def fill(run: NumberRun) -> None:
        (run.run.path / f"{METRICS}.tmp").symlink_to("/dev/full")

    assert train(tmp_path / "run", at={3: fill}, logger="none") == 2
    assert error_of(capsys).startswith("[Errno 28] cannot write: No space left on device")


def test_a_damaged_table_is_one_line_and_stays(tmp_path, capsys):
    assert train(tmp_path / "run", limit=6, logger="none") == 0
    (tmp_path / "run" / METRICS).write_text("not a table\n1\n")
    capsys.readouterr()
    assert train(tmp_path / "run") == 2
    assert "metrics.csv is not a table of numbers by step, or is damaged: move it" in error_of(capsys)
    assert (tmp_path / "run" / METRICS).read_text() == "not a table\n1\n"


def test_a_resumed_run_may_change_its_logger(tmp_path, capsys):
    """Earlier points stay where they are; metrics.csv has all."""
    run = tmp_path / "run"
    assert train(tmp_path / "whole") == 0
    assert train(run, at={7: stop}) == 143
    capsys.readouterr()
    assert train(run, at={9: stop}, logger="none") == 143
    assert "--logger none from here on; earlier points stay in tensorboard and metrics.csv\n" in capsys.readouterr().out
    assert list(points(run)["train/loss"]) == [5]
    wait_for_the_next_second()
    assert train(run, logger="tensorboard") == 0
    assert "--logger tensorboard from here on; earlier points stay in metrics.csv alone\n" in capsys.readouterr().out
    assert list(points(run)["train/loss"]) == [5, 10, 12]
    assert curves(run) == curves(tmp_path / "whole")
    assert train(run, logger="none") == 0  # finished: there is nothing to log
    assert "earlier points" not in capsys.readouterr().out


def test_a_run_of_an_older_version_has_logged_to_tensorboard():
    assert logger_change({"config": {}}, "tensorboard") is None
    assert "stay in tensorboard" in str(logger_change({"config": {}}, "wandb"))


@pytest.mark.parametrize("killed", [False, True])
def test_a_resumed_run_sends_no_point_twice_to_wandb(tmp_path, monkeypatch, offline, killed):
    """Both sessions are one run there, and together they have the points of metrics.csv."""
    monkeypatch.setattr(NumberRun, "scores", scored)
    monkeypatch.setattr(NumberRun, "evaluate", lambda run: run.steps == 7)
    run = tmp_path / "run"
    assert train(run, at={} if killed else {8: stop}, logger="wandb") == (0 if killed else 143)
    if killed:
        at_an_older_checkpoint(run)
    wait_for_the_next_second()
    assert train(run) == 0
    first, second = offline.sessions(run)
    assert len(offline.ids(run)) == 1
    one, two = offline.history(first), offline.history(second)
    assert one["train/loss"].keys() == ({5, 10, 12} if killed else {5})
    for key, curve in curves(run).items():
        assert not one.get(key, {}).keys() & two.get(key, {}).keys()
        assert one.get(key, {}) | two.get(key, {}) == pytest.approx(curve), key
    if killed:  # the points of the very last step are in the summary again, in case that the kill had cost them
        assert offline.summary(second)["test/loss"] == 1.5


def test_wandb_gets_texts_histograms_and_options(tmp_path, offline):
    log = RunLog(tmp_path / "run", logger="wandb")
    log.configuration(0, {"lr": 0.5, "limit": None})
    log.text(0, "sample", "a < b\nc")
    log.paragraph(0, "about", "all of it")
    log.histogram(1, "messages", torch.tensor([1.0, 2.0, 2.0, torch.inf]))
    log.histogram(1, "nothing", torch.tensor([torch.nan]))
    log.scalars(1, {"train/loss": 3.0})
    log.close()
    (file,) = offline.sessions(tmp_path / "run")
    history = offline.history(file)
    assert sum(history["messages/values"][1]) == 3
    assert "nothing/values" not in history
    assert history["train/loss"] == {1: 3.0}
    pages = {path.read_text() for path in (tmp_path / "run" / "wandb").rglob("*.html")}
    assert any("<pre>a &lt; b\nc</pre>" in page for page in pages)
    assert any("<p>all of it</p>" in page for page in pages)
    options = {item.key: item.value_json for r in offline.records(file) if r.HasField("config") for item in r.config.update}
    assert (options["lr"], options["limit"], options["torch"]) == ("0.5", "null", f'"{torch.__version__}"')


def test_wandb_without_an_account_is_one_line(tmp_path, monkeypatch, capsys, offline):
    for name in ("WANDB_MODE", "WANDB_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    assert train(tmp_path / "run", logger="wandb") == 2
    assert "--logger wandb cannot start" in error_of(capsys)
    assert train(tmp_path / "run", logger="none") == 0


COMMANDS = {
    "train_lm": lambda *given: lm.main([*given, "--max-steps", "2"]),
    "train_tasks": lambda *given: tasks.main([*given, *TINY]),
    "train_feedforward": lambda *given: feedforward.main([*given, "--dataset", "digits"]),
}


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("command", COMMANDS)
def test_a_missing_package_is_one_line_before_training(command, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "wandb", None)  # as if it were not installed
    monkeypatch.chdir(tmp_path)
    assert COMMANDS[command]("--logger", "wandb") == 2
    output = capsys.readouterr()
    assert "--logger wandb needs the package wandb: pip install 'dni-seq[wandb]', or choose --logger none" in output.err
    assert output.err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_missing_package_ends_decoupled_parts_too(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ValueError, match="--logger wandb needs the package wandb"):
        decoupled.new_directory(decoupled.DecoupledOptions(logger="wandb", run_dir=str(tmp_path / "run")))
    assert not (tmp_path / "run").exists()


@pytest.mark.usefixtures("one_thread")
def test_the_commands_log_without_tensorboard(tmp_path):
    assert COMMANDS["train_tasks"]("--logger", "none", "--run-dir", str(tmp_path / "run")) == 0
    assert read_curves(tmp_path / "run" / METRICS)["task/length"] == {4: 0}
    assert not list((tmp_path / "run").glob("events.*"))


def test_an_unknown_tracker_is_refused(tmp_path):
    with pytest.raises(ValueError, match="logger must be one of tensorboard, wandb, none, got 'mlflow'"):
        RunLog(tmp_path / "run", logger="mlflow")
    assert not (tmp_path / "run").exists()
