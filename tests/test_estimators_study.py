"""The comparison of estimators runs: every column trains, the plan resumes from its lines, and the table is theirs."""

from __future__ import annotations

import importlib

import pytest

from dni_seq.app.studies.records import append_line, read_lines
from tests.paths import ROOT


@pytest.fixture
def study(monkeypatch):
    """Imports a module of benchmarks/estimators, whose files import each other by name."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks" / "studies"))
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks" / "estimators"))
    return importlib.import_module


@pytest.fixture
def echo(study):
    """The echo with ten sequences in a trial."""
    task = study("problems").Echo()
    task.steps = 10 * task.whole
    return task


def test_every_column_trains_with_the_updates_of_the_others(study, echo):
    columns = study("columns")
    for column in columns.COLUMNS:
        learner = columns.Learner(echo, column, 1e-2, 0)
        before = {name: parameter.clone() for name, parameter in learner.trainer.model.named_parameters()}
        steps = 0
        while steps < echo.whole:
            steps += learner.step()
        assert steps == echo.whole, "windows end with their sequence"
        assert learner.trainer.updates == 1, column.name
        kept = {name for name, parameter in learner.trainer.model.named_parameters() if parameter.equal(before[name])}
        own = {name for name in before if name.endswith(("cell.nu", "cell.theta", "cell.gamma", "cell.into"))}
        entry = {"rnn.enter.weight", "rnn.enter.bias", "rnn.blocks.0.norm.weight", "rnn.blocks.0.norm.bias"}
        assert kept == (own if column.frozen else entry if column.fixed_input else set()), column.name


def test_gradients_are_as_near_to_full_bptt_as_their_names_say(study, echo):
    columns = study("columns")
    found = {}
    for name in ("truncated", "full BPTT", "full BPTT, chunks", "exact traces", "exact traces, fixed input", "exact future"):
        column = columns.BY_KEY[f"lru: {name}"]
        learner = columns.Learner(echo, column, 1e-2, 0)
        for name_of, parameter in learner.trainer.model.named_parameters():
            if "readout" in name_of or "mix" in name_of:
                parameter.requires_grad_(False)  # they have full BPTT's gradient whatever the column
        found[name] = learner.cosine()
    for name in ("full BPTT", "full BPTT, chunks", "exact traces, fixed input"):
        assert found[name] == pytest.approx(1, abs=1e-5)
    assert found["truncated"] < found["exact traces"] < 0.999
    assert found["truncated"] < 0.9 < found["exact future"]


def test_memory_grows_with_what_is_kept(study, echo):
    columns = study("columns")
    peaks = {}
    for name in ("truncated", "full BPTT", "exact traces"):
        learner = columns.Learner(echo, columns.BY_KEY[f"lru: {name}"], 1e-2, 0)
        for _ in range(2 * echo.whole):
            learner.step()
        peaks[name] = learner.peak()
    assert 10 < peaks["truncated"] < peaks["full BPTT"]
    # A trace of B is [16, 128, 64] in float32, and the old one lives beside the new one.
    assert peaks["exact traces"] > peaks["truncated"] + 512


def test_the_plan_resumes_and_its_table_has_the_means(study, echo, tmp_path, monkeypatch):
    compare, trials = study("compare"), study("trials")
    lines = tmp_path / "lines.jsonl"
    known: dict = {}
    tasks = {"echo": echo.rates}
    truncated, full = "lru: truncated", "lru: full BPTT"
    wanted = list(compare.plan(tasks, known))
    assert [trial["column"] for trial in wanted[:6]] == [truncated] * 3 + [full] * 3
    for number, trial in enumerate(wanted[:6]):
        line = {"trial": trial, "score": 0.5 - 0.01 * number}
        known[trials.key_of(trial)] = line
        append_line(lines, line)
    finals = [trial for trial in compare.plan(tasks, known) if trial["share"] == 1]
    assert [(trial["column"], trial["rate"], trial["seed"]) for trial in finals] == [
        (column, echo.rates[-1], seed) for column in (truncated, full) for seed in (0, 1, 2)
    ]
    for trial, score in zip(finals, (0.9, 0.8, 1.0, 0.1, 0.2, 0.3), strict=True):
        curve = [[75, 0.95], [150, score]]
        append_line(lines, {"trial": trial, "score": score, "curve": curve, "steps": 150, "cosine": 0.5})
    append_line(lines, {"study": "echo", "step_seconds": {truncated: 0.001, full: 0.002}, "peak_kib": {truncated: 7}})
    page = tmp_path / "page.md"
    page.write_text("before\n" + "\n".join(compare.MARKS) + "\nafter\n")
    arguments = ["compare.py", "table", "--only", "echo", "--results", str(lines), "--page", str(page)]
    monkeypatch.setattr("sys.argv", arguments)
    compare.main()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in page.read_text().splitlines() if line[:1] == "|"]
    assert rows[2][:9] == ["lru", "truncated, T = 1", "0.04", "0.90 ± 0.10 (3)", "0 %", *rows[2][5:7], "1.00", "7"]
    assert rows[2][5] == "0.93 ± 0.05 (3)", "the mean of both points of the curve"
    # At the CPU time of truncated BPTT it has read half of the text.
    assert rows[3][3:7] == ["0.20 ± 0.10 (3)", "100 %", "0.95 ± 0.00 (3)", "0.50"]
    assert rows[3][8] == "–"


def test_a_trial_has_a_line_with_its_settings(study, echo, tmp_path):
    compare, columns, trials = study("compare"), study("columns"), study("trials")
    trial = compare.trial_of("echo", "lru: full BPTT", 2e-2, 0, 1.0)

    def plan(known):
        return iter([trial])

    for _ in range(2):
        trials.work(tmp_path / "lines.jsonl", tmp_path, plan, lambda each, _: columns.run(each, echo), 1.0)
    (line,) = read_lines(tmp_path / "lines.jsonl")
    assert line["trial"] == trial
    assert line["steps"] == echo.steps
    assert line["settings"]["T"] == echo.whole
    assert line["settings"]["updates"] == 10
    assert len(line["curve"]) == 10
    assert line["score"] == pytest.approx((line["curve"][-1][1] + line["curve"][-2][1]) / 2, abs=1e-4)
    assert line["cosine"] == pytest.approx(1, abs=1e-3)
    assert line["process_seconds"] > 0


def test_characters_train_after_each_window(study, tmp_path):
    columns, problems = study("columns"), study("problems")
    (tmp_path / "ptb").mkdir()
    for split in ("train", "valid", "test"):
        (tmp_path / "ptb" / f"ptb.{split}.txt").write_text("the cat sat on the mat\n" * 400)
    task = problems.problem("characters", tmp_path)
    task.steps, task.whole = 8, 4
    line = columns.run({"column": "lstm: truncated", "rate": 2e-3, "seed": 0, "share": 1}, task)
    assert line["settings"]["updates"] == 8
    assert all(0 < bits < 6 for _, bits in line["curve"])
    assert len({bits for _, bits in line["curve"]}) == 8
    assert 0 < line["cosine"] < 1
