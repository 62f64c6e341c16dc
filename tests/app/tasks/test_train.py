"""The script for generated tasks, run for real: a few updates of a tiny network."""

from __future__ import annotations

import json
import re

import pytest
import torch

from dni_seq.app.runs.checkpoint import load_checkpoint
from dni_seq.app.tasks.train import main
from dni_seq.app.tasks.training import DASHBOARD
from dni_seq.models.vector_rnn import VectorRNN
from dni_seq.streams.algorithmic_tasks import TASKS, Stage, TaskStream
from tests.events import layout, points
from tests.nests import assert_same

TINY = ("--hidden", "8", "--batch-size", "4", "--synthesizer-hidden", "8", "--threads", "1", "--device", "cpu")

ALWAYS = {
    "Length/solved",
    "Length/training",
    "gradient/norm",
    "train/skipped",
    "memory/peak_mb",
    "speed/updates_per_second",
    "task/length",
    "task/training_length",
}
SYNTHETIC = {f"synthetic/{name}" for name in ("loss", "cosine", "r2", "injected_ratio", "scale")}


pytestmark = pytest.mark.usefixtures("one_thread")


KINDS = {
    "none": ((), set()),
    "basic": (("--synthesizer", "basic", "--synthetic-scale", "0.1"), SYNTHETIC),
    "multi-horizon": (
        (
            "--synthesizer",
            "multi-horizon",
            "--horizons",
            "2",
            "--regress-every",
            "2",
            "--fidelity-every",
            "7",
            "--synthetic-scale",
            "0.5",
        ),
        SYNTHETIC
        | {f"synthetic/{name}/horizon_{n}" for name in ("cosine", "r2", "scale") for n in (1, 2)}
        | {f"fidelity/{name}_{n}" for name in ("cosine", "r2") for n in (1, 2)},
    ),
    "paper": (("--synthesizer", "paper"), SYNTHETIC),
    "paper-with-horizons": (
        ("--synthesizer", "paper", "--horizons", "2", "--tail", "--lookahead", "3", "--normalize", "--gate"),
        SYNTHETIC | {f"synthetic/{name}/horizon_{n}" for name in ("cosine", "r2", "scale") for n in (1, 2, 3)},
    ),
    "state": (("--synthesizer", "state", "--synthetic-scale", "0.5", "--no-normalize", "--no-gate"), SYNTHETIC),
    "purely-online": (
        ("--synthesizer", "multi-horizon", "--lookahead", "0", "--regress-every", "2", "--synthetic-scale", "0.5"),
        SYNTHETIC,
    ),
    "exact": (("--synthesizer", "exact", "--exact-steps", "3"), {"synthetic/scale"}),
    "exact-with-tail": (
        ("--synthesizer", "exact", "--exact-steps", "3", "--tail", "--regress-every", "2"),
        {"synthetic/loss", "synthetic/scale"},
    ),
    "lambda": (
        ("--synthesizer", "basic", "--targets", "lambda", "--replay-windows", "4", "--fidelity-every", "7"),
        {"synthetic/loss", "synthetic/scale", "fidelity/r2_1"},
    ),
    "auxiliary": (("--synthesizer", "basic", "--synthetic-scale", "0.1", "--auxiliary", "0.1"), SYNTHETIC),
}


def assert_charts_are_filled(charts, curves) -> None:
    """No chart of the run is empty, and it leaves none out whose curves say something. A scale that is a number and the
    gradient of a synthesizer that does not learn say nothing."""
    shown = {title: keys for group in charts.values() for title, keys in group.items()}
    for title, keys in shown.items():
        assert any(re.match(key, name) for name in curves for key in keys), title
    for group in DASHBOARD.values():
        for title, keys in group.items():
            if title not in shown:
                left = [name for name in curves for key in keys if re.match(key, name)]
                says_nothing = ("synthetic/scale", "gradient/synthesizer_norm")
                assert all(name.startswith(says_nothing) for name in left), title
                assert all(curves[name][30] == 0 for name in left if name == "gradient/synthesizer_norm")


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_credit_leaves_a_run(kind, tmp_path):
    arguments, expected = KINDS[kind]
    task = {"none": "adding", "auxiliary": "repeat-copy"}.get(kind, "copy")
    arguments = ("--synthesizer", "none", *arguments)  # the later one holds
    # 5 vectors are 12 steps: windows 1 to 4 of each sequence count nothing, 5 and 6 have a gradient to compare with.
    run = tmp_path / "run"
    options = ("--task", task, "--bptt", "2", "--start", "5", "--updates", "30", "--run-dir", str(run))
    assert main([*options, *TINY, *arguments]) == 0
    curves = points(run)
    assert curves.keys() >= ALWAYS | expected | {f"task/{TASKS[task].error_name}"}
    if kind == "none":
        assert not [key for key in curves if key.startswith(("synthetic", "fidelity"))]
    assert_charts_are_filled(layout(run), curves)
    # Only this kind has an automatic scale here.
    assert ("share injected, by horizon" in layout(run).get("synthetic gradients", {})) == (kind == "lambda")
    assert all(list(curve) == [30] for curve in curves.values())
    assert curves["task/training_length"] == {30: 5.0}
    assert all(torch.tensor(list(curve.values())).isfinite().all() for curve in curves.values())
    summary = json.loads((run / "summary.json").read_text())
    assert (summary["task"], summary["length"], summary["curve"], summary["updates"]) == (task, 0, [], 30)
    windows = {"copy": 6, "repeat-copy": 7, "adding": 3}[task]
    assert summary["sequences"] == 30 // windows * 4
    assert summary["peak_memory_mb"] > 50
    assert summary["process_seconds"] > 0
    assert (summary["injected_ratio"] is not None) == ("synthetic/injected_ratio" in expected)
    if summary["injected_ratio"] is not None:
        assert summary["injected_ratio"] == pytest.approx(curves["synthetic/injected_ratio"][30])
        assert summary["injected_ratio"] > 0
    names = {str(path.relative_to(run)) for path in run.rglob("*") if not path.name.startswith("events.")}
    assert names == {"checkpoints", "checkpoints/last.pt", "config.json", "lock", "metrics.csv", "summary.json"}


def test_the_error_is_that_of_the_task(tmp_path):
    """With a learning rate that moves nothing, the training error is that of the first weights on the same sequences."""
    arguments = ["--task", "copy", "--start", "3", "--bptt", "3", "--lr", "1e-30", "--updates", "9", "--synthesizer", "none"]
    assert main([*arguments, *TINY, "--seed", "5", "--run-dir", str(tmp_path / "run")]) == 0
    stream = TaskStream(TASKS["copy"], lanes=4, bptt=8, seed=5, stage=Stage(3))
    torch.manual_seed(5)
    model = VectorRNN(10, 8, hidden=8)
    losses = []
    for window, _ in zip(stream, range(3), strict=False):  # 3 sequences of 3 windows each
        with torch.no_grad():
            outputs, _ = model(window.inputs, None)
        losses.append(TASKS["copy"].losses(outputs, window.targets)[window.mask].mean())
    bits = torch.stack(losses).mean() / torch.tensor(2.0).log()
    # The windows' losses are added in another order, in float32.
    assert points(tmp_path / "run")["task/error_bits"][9] == pytest.approx(float(bits), rel=1e-5)


def test_a_length_that_is_solved_is_raised(tmp_path):
    """One vector in windows that hold the whole sequence is learned within 120 updates at this rate."""
    arguments = ["--task", "copy", "--bptt", "4", "--synthesizer", "none", "--lr", "0.02", "--updates", "120"]
    size = ("--hidden", "32", "--batch-size", "32", "--threads", "1", "--device", "cpu")
    run = tmp_path / "run"
    assert main([*arguments, *size, "--run-dir", str(run)]) == 0
    summary = json.loads((run / "summary.json").read_text())
    assert summary["length"] >= 1
    assert summary["stage"] == [summary["length"] + 1, 1]
    update, length = summary["curve"][0]
    assert length == 1
    assert [length for _, length in summary["curve"]] == list(range(1, summary["length"] + 1))
    curves = points(run)
    checks = curves["task/fresh_error_bits"]
    assert 0 < checks[update] < 0.15
    solved = {step: max((n for at, n in summary["curve"] if at <= step), default=0) for step in (100, 120)}
    assert curves["task/length"] == solved


@pytest.mark.parametrize(
    ("synthesizer", "bptt", "updates", "stopped", "more"),
    [
        ("none", 4, 120, 91, []),
        ("multi-horizon", 2, 60, 31, []),
        ("multi-horizon", 2, 60, 31, ["--predict", "both", "--predict-steps", "5"]),
    ],
)
def test_a_run_resumes_bit_identically(synthesizer, bptt, updates, stopped, more, tmp_path):
    """Stopped within a sequence with the log half filled; without a synthesizer, after a length was raised."""
    common = ["--task", "copy", "--bptt", str(bptt), "--lr", "0.02", "--hidden", "32", "--device", "cpu"]
    common += ["--synthesizer", synthesizer, "--fidelity-every", "7", "--synthetic-scale", "auto", *more]
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    assert main([*common, "--updates", str(updates), "--run-dir", str(whole)]) == 0
    assert main([*common, "--updates", str(stopped), "--run-dir", str(halves), "--resume", "auto"]) == 0
    within = load_checkpoint(halves / "checkpoints" / "last.pt")
    if synthesizer == "none":
        assert within["counters"]["curve"]
    else:
        assert within["stream"]["position"] == 1  # of two
        assert bool(more) == ("past_inputs" in within["trainer"])
    assert within["probe"]["windows"], "stopped within a comparison of gradients"
    assert main(["--updates", str(updates), "--run-dir", str(halves), "--resume", "auto"]) == 0
    one, two = (load_checkpoint(run / "checkpoints" / "last.pt") for run in (whole, halves))
    for saved in (one, two):
        del saved["config"]
        for seconds in ("seconds", "process_seconds"):
            assert saved["counters"].pop(seconds) > 0
    assert_same(one, two)
    curves, resumed = points(whole), points(halves)
    assert (
        -1 <= min(curves["fidelity/parameters_cosine"].values()) <= max(curves["fidelity/parameters_cosine"].values()) <= 1
    )
    for key in set(curves) - {"speed/updates_per_second", "memory/peak_mb"}:
        # The first session gave its last update a point of its own.
        assert curves[key] == {step: value for step, value in resumed[key].items() if step != stopped}


def test_bad_input_is_one_line_and_status_2(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["--updates", "1", *TINY, "--run-dir", "run"]) == 0
    capsys.readouterr()
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    cases = {
        ("--task", "sorting"): "invalid choice: 'sorting'",
        ("--bptt", "0"): "--bptt must be 1 or more",
        ("--updates", "0"): "--updates must be 1 or more",
        ("--hidden", "0"): "--hidden must be 1 or more",
        ("--lr", "-1"): "--lr must be above 0",
        ("--start", "0"): "--start must be 1 or more",
        ("--task", "adding", "--start", "1"): "begin at size 2",
        ("--synthetic-scale", "much"): "--synthetic-scale must be 0 or more",
        ("--device", "nothing"): "--device nothing",
        ("--resume", "auto"): "needs --run-dir",
        ("--run-dir", "run"): "holds a run",
        ("--run-dir", "run", "--resume", "auto", "--task", "adding"): "--task copy there, adding here",
        ("--run-dir", str(tmp_path)): "holds files but no run",
    }
    for arguments, message in cases.items():
        try:
            status = main([*arguments])
        except SystemExit as end:
            status = end.code
        (line,) = capsys.readouterr().err.splitlines()
        assert status == 2, arguments
        assert line.startswith("train_tasks: error: "), arguments
        assert message in line, arguments
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_help_names_the_options_of_credit(capsys):
    with pytest.raises(SystemExit) as end:
        main(["--help-all"])
    assert end.value.code == 0
    text = capsys.readouterr().out
    for name in ("--task", "--bptt", "--synthesizer", "--exact-steps", "--horizons", "--updates", "task/length"):
        assert name in text


def test_a_run_leaves_the_values_in_force_and_the_next_command(tmp_path, capsys, monkeypatch):
    """The command works."""
    monkeypatch.setattr("sys.argv", ["dni-seq tasks"])
    run = tmp_path / "run"
    assert main([*TINY, "--synthesizer", "multi-horizon", "--updates", "3", "--run-dir", str(run)]) == 0
    further, curves = capsys.readouterr().out.splitlines()[-2:]
    assert curves == f"curves: tensorboard --logdir {tmp_path}"
    in_force, config = (json.loads((run / name).read_text()) for name in ("summary.json", "config.json"))
    in_force = in_force["in_force"]
    assert in_force.keys() == config.keys()
    assert (config["lookahead"], config["start"], config["discount"]) == (None, None, None)
    assert (in_force["lookahead"], in_force["start"], in_force["discount"]) == (8, 1, 1.0)
    assert in_force["synthesizer_layers"] is None
    assert further == f"to train on: dni-seq tasks --resume {run} --updates 6"
    assert main(further.removeprefix("to train on: dni-seq tasks ").split()) == 0
    assert json.loads((run / "summary.json").read_text())["updates"] == 6


def test_a_default_of_one_task_is_not_passed_on_to_another(tmp_path):
    """A run on adding has no synthesizer by default; a run on copying with its configuration has one by default."""
    first, second, third = (tmp_path / name for name in ("first", "second", "third"))
    assert main([*TINY, "--task", "adding", "--updates", "1", "--run-dir", str(first)]) == 0
    base = ["--config", str(first / "config.json"), "--task", "copy"]
    assert main([*base, "--run-dir", str(second)]) == 0
    assert main([*base, "--synthesizer", "none", "--run-dir", str(third)]) == 0
    used = [json.loads((run / "config.json").read_text())["synthesizer"] for run in (first, second, third)]
    assert used == ["none", "multi-horizon", "none"]


def test_a_run_begins_with_its_task_its_model_and_its_method(tmp_path, capsys):
    run = tmp_path / "run"
    assert main([*TINY, "--task", "repeat-copy", "--updates", "2", "--run-dir", str(run), "--synthesizer", "none"]) == 0
    summary = json.loads((run / "summary.json").read_text())
    assert capsys.readouterr().out.splitlines()[:3] == [
        "task: repeat-copy, from length 1; 2 updates, 4 sequences at a time",
        f"model: LSTM, 1 layer of 8 units, {summary['parameters']} parameters",
        f"method: truncated BPTT, windows of T = 4; device cpu; run directory {run}",
    ]
