"""The benchmarks run, on cases small enough for a test."""

from __future__ import annotations

import importlib
import json
import shutil
import subprocess
import sys

import pytest

from tests.paths import ROOT

BENCHMARKS = ROOT / "benchmarks"


def call(script: str, *arguments: str) -> list[dict]:
    """The lines of JSON that a benchmark prints."""
    command = [sys.executable, str(BENCHMARKS / script), *arguments]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    return [json.loads(line) for line in result.stdout.splitlines()]


@pytest.fixture
def tables_of(monkeypatch):
    """Imports a benchmark, for its `table`."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module


def test_step_times_stand_beside_each_other(tmp_path):
    lines = call(
        "steps.py", "--only", "char-gru", "--bptt", "1", "--way", "plain", "none", "--seconds", "0", "--threads", "2",
        "--output", str(tmp_path / "steps.jsonl"),
    )  # fmt: skip
    assert lines == [json.loads(line) for line in (tmp_path / "steps.jsonl").read_text().splitlines()]
    plain, none = lines
    assert (plain["way"], none["way"]) == ("plain", "none")
    assert none["over plain"] == none["ms"] / plain["ms"]
    assert none["steps"] >= 100
    assert none["threads"] == 2


def test_a_table_of_step_times_has_medians_of_ratios_within_sittings(tables_of):
    """A busy sitting, in which all ways take longer, leaves the ratios as they are."""
    steps = tables_of("steps")
    times = {"a": (4.0, 2.0), "b": (40.0, 16.0), "c": (6.0, 2.0)}
    lines = [
        {"setting": "char-lstm", "bptt": 1, "way": way, "ms": ms, "sitting": sitting}
        for sitting, both in times.items()
        for way, ms in zip(("none", "floor"), both, strict=True)
    ]
    cell = steps.by_sitting(lines)["char-lstm", 1]
    assert steps.median_ratio(cell, "none", "floor") == 2.5
    assert steps.median_ratio(cell, "none") == 6.0
    assert steps.median_ratio(cell, "none", "plain") is None
    assert "| char-lstm | 1 | 2.50 | – |" in steps.table(lines)


def test_a_predictors_floor_grows_with_its_horizons(tmp_path, tables_of):
    output = tmp_path / "floor.jsonl"
    lines = call("predictor_floor.py", "--rounds", "3", "--output", str(output))
    assert lines == [json.loads(line) for line in output.read_text().splitlines()]
    times = {(line["horizons"], line["operation"]): line["ms"] for line in lines}
    assert len(times) == 16
    for name in {name for _, name in times if name.startswith("products")}:
        assert times[4, name] > 1.5 * times[1, name] > 0
    floor = tables_of("predictor_floor")
    together = sum(times[4, name] for name in floor.FLOOR)
    (row,) = (row for row in floor.table(lines).splitlines() if "together" in row)
    assert row.endswith(f"| {together:.2f} |")


def test_memory_is_that_of_a_process_of_its_own(tmp_path):
    (line,) = call("steps.py", "--memory", "--only", "char-gru", "--bptt", "1", "--way", "none", "--windows", "210")
    assert line["peak_mb"] <= line["peak_mb_at_end"] < 1.2 * line["peak_mb"]


def test_reading_is_measured(tmp_path):
    text = "the cat sat on the mat\n" * 2000
    for name in ("lines.txt", "valid.txt", "empty.txt"):
        (tmp_path / name).write_text(text if name != "empty.txt" else "")
    (line,) = call("streams.py", "--only", "lines", "--folder", str(tmp_path))
    assert line["tokens"] > 10_000
    assert line["peak_mb"] > 0


def test_a_start_has_its_moments(tmp_path, tables_of):
    output = tmp_path / "start_up.jsonl"
    only = ("--runs", "1", "--only", "embedded corpus", "--max-steps", "20")
    alone, start = call("start_up.py", *only, "--output", str(output))
    assert [alone, start] == [json.loads(line) for line in output.read_text().splitlines()]
    assert alone["case"] == "import torch"
    assert 0 < start["first line"] < start["three lines"] < start["first figure"]
    assert start["import torch"] == alone["end"]
    first, second = (row.strip("| ").split(" | ") for row in tables_of("start_up").table([alone, start]).splitlines()[2:])
    assert first[1:] == ["–", "–", "–", f"{alone['end']:.2f}"]
    assert second == [
        "embedded corpus",
        *(f"{start[moment]:.2f}" for moment in ("first line", "three lines", "first figure")),
        "–",
    ]


def test_a_point_of_growth_is_measured_and_drawn(tmp_path):
    pytest.importorskip("matplotlib", reason="matplotlib, of the extras plots and dev, is not installed")
    (point,) = call("growth.py", "--one", "multi-horizon", json.dumps({"hidden": 8, "lanes": 4, "windows": 110}))
    assert point["ms"] > 0
    assert point["mb"] >= 0
    lines = [{"varied": name, "value": 5, "way": "none", **point} for name in ("lanes", "reach")]
    (tmp_path / "growth.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    call("growth.py", "--draw", "--output", str(tmp_path / "growth.jsonl"), "--pictures", str(tmp_path))
    for picture in ("growth.png", "memory.png"):
        assert (tmp_path / picture).stat().st_size > 1000


def test_pairs_of_runs_stand_beside_each_other(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("the cat sat on the mat\n" * 200)
    output = tmp_path / "stability.jsonl"
    begin = ("stability.py", "--data-file", str(text), "--windows", "8", "--output", str(output))
    (line,) = call(*begin, "--pairs", "1")
    assert line["ratio"] == line["multi-horizon: loss"] / line["none: loss"]
    assert line["none: largest cell"] > 0
    (other,) = call(*begin, "--pairs", "2")  # that on record is not run again
    assert (line["bptt"], other["bptt"]) == (1, 2)
    assert [json.loads(row) for row in output.read_text().splitlines()] == [line, other]


def test_golden_runs_find_a_change_and_no_other(tmp_path):
    """A checkout against itself, and against one whose learning rate differs."""
    golden, only = str(BENCHMARKS / "golden_runs.py"), ["--only", "copy, gru: none"]
    outputs = [tmp_path / "first.jsonl", tmp_path / "again.jsonl"]
    for output in outputs:
        subprocess.run([sys.executable, golden, "record", *only, "--output", str(output)], check=True, capture_output=True)
    first, again = (json.loads(output.read_text()) for output in outputs)
    assert first == again
    assert first["windows"] == 200
    for folder in ("dni_seq", "scripts"):
        shutil.copytree(ROOT / folder, tmp_path / "other" / folder, ignore=shutil.ignore_patterns("__pycache__"))
    options = tmp_path / "other" / "dni_seq" / "app" / "tasks" / "options.py"
    changed = options.read_text().replace("lr: float = option(1e-3,", "lr: float = option(2e-3,")
    assert changed != options.read_text()
    options.write_text(changed)
    command = [sys.executable, golden, "compare", "--base", str(tmp_path / "other"), *only]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert result.stdout.startswith("DIFFERENT  copy, gru: none")
    assert result.stdout.endswith("1 runs, 1 different\n")


@pytest.fixture
def study(monkeypatch):
    """Imports a module of benchmarks/predictive_messages, whose files import each other by name."""
    monkeypatch.syspath_prepend(str(BENCHMARKS / "studies"))
    monkeypatch.syspath_prepend(str(BENCHMARKS / "predictive_messages"))
    return importlib.import_module


def test_trials_run_once_and_resume_from_the_lines(study, tmp_path):
    trials = study("trials")
    results, scratch, ran = tmp_path / "lines.jsonl", tmp_path / "scratch", []

    def plan(known):
        yield {"lr": 1}
        if trials.key_of({"lr": 1}) in known:
            yield {"lr": 2}

    def run(trial, checkpoint):
        ran.append(trial["lr"])
        return {"valid": 5.0 - trial["lr"]}

    trials.work(results, scratch, plan, run, max_minutes=1)
    trials.work(results, scratch, plan, run, max_minutes=1)
    assert ran == [1, 2]
    known = trials.lines_by_key(results)
    assert trials.best_value(known, [{"lr": 1}, {"lr": 2}], "lr", lambda line: line["valid"]) == 2
    assert trials.best_value(known, [{"lr": 1}, {"lr": 3}], "lr", lambda line: line["valid"]) is None
    with trials.claim(scratch, {"lr": 1}):
        assert trials.claim(scratch, {"lr": 1}) is None, "a process that is alive keeps its claim"
    with trials.claim(scratch, {"lr": 1}) as lock:
        assert lock is not None, "a claim ends with its holder"


def test_a_search_along_rates_brackets_the_best(study):
    words = study("words")
    valid = {1.0: 9.0, 2.0: 7.0, 4.0: 6.0, 8.0: 8.0}
    known: dict = {}
    for _ in range(4):
        wanted, best = words.tuned(known, lambda rate: {"lr": rate}, tuple(valid), first=0)
        known |= {words.key_of(trial): {"valid": valid[trial["lr"]]} for trial in wanted}
    assert best == 4.0
    assert len(wanted) == 4


@pytest.mark.parametrize(
    ("method", "bptt"), [("none", 40), ("far and past", 4), ("past inside", 40), ("exact", 10), ("far", 4)]
)
def test_a_trial_on_copying_runs(study, tmp_path, method, bptt):
    copying = study("copying")
    trial = copying.trial_of(method, bptt, 2e-3, 0.1, "distractors")
    line = copying.run(trial, tmp_path / "none.pt", {copying.kind_of(trial): copying.UpdateTime(0.01, 0.01 / bptt)})
    assert line["updates"] >= 5
    assert line["steps"] >= 4 * (line["updates"] - 1)
    assert line["peak_mib"] > 0


def test_past_and_future_steps_are_those_beside_the_state(study):
    """Of a sequence that is one window: what a predictor at its fourth state predicts."""
    copying = study("copying")
    learner = copying.Learner(copying.trial_of("far and past inside", 40, 2e-3, 1))
    window = next(iter(copying.TaskStream(learner.task, lanes=copying.LANES, bptt=40, lookahead=40, stage=copying.Stage(5))))
    learner.seen = list(window.inputs)
    past, future = (learner.steps(kind, window, [4, len(window.inputs)]) for kind in ("past", "far"))
    assert (past.inputs[:4, : copying.LANES] == window.inputs[:4].flip(0)).all()
    assert past.counts[:4, : copying.LANES].all()
    assert not past.counts[4:, : copying.LANES].any()
    assert (past.inputs[: len(window.inputs), copying.LANES :] == window.inputs.flip(0)).all()
    left = len(window.inputs) - 4
    assert (future.inputs[:left, : copying.LANES] == window.inputs[4:]).all()
    assert int(future.counts[:, : copying.LANES].sum()) == 5 * copying.LANES
    assert not future.counts[:, copying.LANES :].any(), "nothing follows the end"
