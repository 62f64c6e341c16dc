"""The frontier study runs: each kind of trial trains and resumes, and the plan and the tables follow the lines."""

from __future__ import annotations

import argparse
import importlib
import random
import shutil
from dataclasses import replace
from importlib.util import find_spec

import pytest
import torch
from torch import nn

from dni_seq.app.studies.records import append_line, read_lines
from tests.paths import ROOT


@pytest.fixture
def study(monkeypatch):
    """Imports a module of benchmarks/frontier, whose files import each other by name."""
    for folder in ("studies", "predictive_messages", "frontier"):
        monkeypatch.syspath_prepend(str(ROOT / "benchmarks" / folder))
    return importlib.import_module


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A text of 700 words, more than a predictor distinguishes."""
    folder, draw = tmp_path_factory.mktemp("text"), random.Random(0)
    known = [f"w{number}" for number in range(700)]
    for split, lines in (("train", 180), ("valid", 40), ("test", 40)):
        rows = [" ".join(draw.choices(known, k=20)) for _ in range(lines)]
        first = [" ".join([*known, "<unk>"])] if split == "train" else []
        (folder / f"ptb.{split}.txt").write_text("\n".join(first + rows) + "\n")
    return folder


def times_of(study, trials, seconds: float) -> list[dict]:
    """Lines in which each kind of update has the same time."""
    found = study("timing").kinds_of(trials)
    lines = []
    for task, kinds in found.items():
        both = {"update_seconds": {kind: [seconds, 0.0] for kind in kinds}, "saved_bytes": dict.fromkeys(kinds, 2**20)}
        lines.append({"study": "frontier", "task": task, **both, "date": "2026-01-01"})
    return lines


def call(study, monkeypatch, *arguments) -> None:
    """The command with some arguments."""
    monkeypatch.setattr("sys.argv", ["study.py", *map(str, arguments)])
    study("study").main()


@pytest.mark.parametrize(
    ("method", "bptt", "more"),
    [
        ("none", 20, {}),
        ("multi-horizon", 5, {}),
        ("exact", 5, {}),
        ("dense", 35, {"weight": 0.1, "every": 5}),
    ],
)
def test_updates_on_words_are_those_of_the_study_whose_lines_count(study, data, method, bptt, more):
    """Without dropout for dense messages, which that study's loop draws part by part."""
    text_tasks, words = study("text_tasks"), study("words")
    settings = {"dropout": 0.2, "seed": 1, "schedule": "linear", **more}
    old = {"task": "words", "method": method, "T": bptt, "lr": 8e-3, "budget": 1, **settings}
    trial = study("records").frontier_trial(old)
    if method == "dense":
        old["dropout"] = trial["dropout"] = 0.0
    splits = text_tasks.Splits(text_tasks.TASKS["words"], data)
    model, learner = words.learner_of(old, len(splits.train.vocabulary))
    reader = text_tasks.Reader(text_tasks.trainer_for(trial, splits), splits.train, bptt)
    before = [parameter.clone() for parameter in model.parameters()]
    for run in (lambda number: learner.step(splits.train, number * bptt), lambda number: reader.step()):
        torch.manual_seed(7)
        for number in range(3):
            run(number)
    for (name, ours), theirs, at_first in zip(
        reader.trainer.model.named_parameters(), model.parameters(), before, strict=True
    ):
        if method == "dense":  # another order of sums; Adam makes steps of 8e-3 of the smallest gradients too
            assert float((ours - theirs).detach().abs().max()) < 2e-4, name
            assert float((ours - at_first).detach().abs().max()) > 1e-2, name
        else:
            assert ours.equal(theirs), name


def old_line(method: str, valid: float, **settings) -> dict:
    trial = {"task": "words", "method": method, "T": 35, "lr": 8e-3, "budget": 1, "dropout": 0.2, "seed": 1, **settings}
    scores = {"valid": valid, "test": 140.0, "steps": 1000, "curve": [[1000, 150.0]], "date": "2026-01-01"}
    return {"trial": trial, **scores, "process_seconds": 3600.0}


def test_lines_of_the_study_on_words_count_where_settings_agree(study, tmp_path):
    records, plans, trials = study("records"), study("plans"), study("trials")
    lines = tmp_path / "words.jsonl"
    append_line(lines, {"study": "words", "step_seconds": {"none T=35": 0.15, "dense T=35 every 5": 0.2}})
    others = [("multi-token", {}), ("none", {"dropout": 0.35}), ("multi-horizon", {}), ("end alone", {})]
    for method, settings in [("none", {}), ("dense", {"weight": 0.1, "every": 5}), *others]:
        valid = 100.0 if (method, settings) in others else 150.0
        append_line(lines, old_line(method, valid, **settings))
    known = records.reused(lines)
    assert {(line["trial"]["part"], line["trial"]["method"]) for line in known.values()} == {
        ("frontier", "none"),
        ("frontier", "dense"),
        ("ablation", "dense"),
    }
    by_sgd = {"optimizer": "sgd", "dropout": 0.0, "rate": 20.0}
    settings = [{**line["trial"], **by_sgd} for line in known.values() if line["trial"]["part"] == "frontier"]
    wanted = {trials.key_of(trial) for trial in plans.plan({}, ("words",))}
    assert {trials.key_of(trial) for trial in settings} <= wanted, "the plan has the same by another optimizer"
    assert {line["seconds"] for line in known.values()} == {150.0, 200.0}
    assert {line["quality"] for line in known.values()} == {150.0}
    assert records.spent(known) == 0, "its hours are not this study's"


def test_the_plan_goes_from_the_search_to_larger_budgets_and_seeds(study):
    plans, trials = study("plans"), study("trials")
    quality = {"none": 9, "past": 8, "multi-horizon": 7, "dense": 6, "exact": 5}
    known: dict = {}
    order: list = []
    while True:
        left = [trial for trial in plans.plan(known, ("adding",)) if trials.key_of(trial) not in known]
        if not left:
            break
        trial = left[0]
        order.append(trial)
        # T = 20 is better than the others, and the middle rate than the others
        solved = quality[trial["method"]] + 10 * (trial["T"] == 20) + 5 * (trial["rate"] == 2e-3)
        line = {"trial": trial, "quality": solved, "curve": [[solved, 1, 1, 1.0]]}
        known[trials.key_of(trial)] = line
    searched = [trial for trial in order if trial["seconds"] == 80]
    of_none = [(trial["T"], trial["rate"]) for trial in searched if trial["method"] == "none"]
    assert of_none == [(4, 2e-3), (20, 2e-3), (40, 2e-3), (20, 1e-3), (20, 4e-3)]
    larger = [(trial["method"], trial["T"], trial["rate"], trial["seed"]) for trial in order[len(searched) :]]
    ends = [("none", 20, 2e-3, 1), ("past", 20, 2e-3, 1), ("multi-horizon", 20, 2e-3, 1)]
    assert larger == ends + [(*end[:3], seed) for end in ends[:2] for seed in (2, 3)]
    assert {trial["seconds"] for trial in order[len(searched) :]} == {200}


def test_text_tries_a_lower_rate_at_the_next_budget_and_keeps_the_better(study):
    plans, trials = study("plans"), study("trials")
    grid, known = plans.GRIDS["words"], {}

    def record(trial, quality):
        known[trials.key_of(trial)] = {"trial": trial, "quality": quality, "curve": []}

    for column in grid.columns:
        while left := [trial for trial in plans.search(grid, column, known) if trials.key_of(trial) not in known]:
            for trial in left:
                record(trial, 200 + (trial["rate"] != 20) + 100 * (column.method not in ("none", "dense", "past")))
    next_budget = [trial for trial in plans.all_larger(grid, known) if trial["method"] == "dense"]
    assert [(trial["budget"], trial["rate"]) for trial in next_budget] == [(3, 10), (3, 20)]
    record(next_budget[0], 140.0)
    record(next_budget[1], 150.0)
    (*_, with_dropout) = (trial for trial in plans.all_larger(grid, known) if trial["method"] == "dense")
    assert [with_dropout[name] for name in ("budget", "rate", "dropout", "optimizer")] == [3, 10, 0.2, "sgd"]
    record(with_dropout, 130.0)
    found = [trial for trial in plans.all_larger(grid, known) if trial["method"] == "dense"]
    assert [(trial["budget"], trial["rate"], trial["dropout"]) for trial in found][3:] == [(6, 10, 0.2)]


def test_truncated_bptt_tries_the_next_longer_window_at_the_largest_budget(study):
    plans, trials = study("plans"), study("trials")
    grid, known = plans.GRIDS["words"], {}
    settings = grid.trial(grid.columns[0], 5, 20.0)
    for rate, dropout in ((10.0, 0.0), (20.0, 0.0), (10.0, 0.2)):
        trial = {**settings, "budget": 3, "rate": rate, "dropout": dropout}
        known[trials.key_of(trial)] = {"trial": trial, "quality": rate + dropout, "curve": []}
    *_, one, two = plans.larger(grid, settings, known)
    found = [tuple(trial[name] for name in ("budget", "T", "rate", "dropout")) for trial in (one, two)]
    assert found == [(6, bptt, 10.0, 0.0) for bptt in (5, 20)]


def test_the_whole_study_fits_in_twenty_hours(study):
    """At most: if no choice saves a trial."""
    plans, records, command = study("plans"), study("records"), study("study")
    known, times = records.all_lines(command.RESULTS, command.STUDY), records.read_times(command.RESULTS)
    hours = records.spent(known) + sum(records.estimate(trial, times) for trial in plans.forecast(known))
    assert 1 < hours <= command.MOST_HOURS


def test_the_ablation_has_a_row_for_each_choice(study):
    ablation = study("ablation")
    for task, choices in (("copy", {"draws"}), ("words", {"draws"})):
        base = ablation.row_trial(task, "nothing")
        changed = set()
        for row in ablation.ROWS[task]:
            trial = ablation.row_trial(task, row)
            changed |= {name for name in base.keys() | trial.keys() if base.get(name) != trial.get(name)}
        assert changed == {"predict", "steps", "horizons", "every", "end", "gate"} | choices


def trainer_with(study, settings: dict):
    """The trainer of a trial on copying."""
    trial = {"task": "copy", "method": "past", "T": 4, "rate": 1e-3, "seed": 1, **settings}
    return study("sequence_tasks").Learner(trial).trainer


def test_settings_reach_the_trainer(study):
    past = {"predict": "past", "steps": 40}
    plain = trainer_with(study, past)
    assert plain.credit.settings.message_every is None
    assert plain.credit.synthesizer.past_steps == 40
    assert plain.synthetic_scale == 1.0
    inside = trainer_with(study, {**past, "every": 2, "end": False}).credit.settings
    assert (inside.message_every, inside.message_at_end) == (2, False)
    drawn = trainer_with(study, {**past, "draws": 10}).credit.synthesizer
    assert (drawn.model.predicted, drawn.past_steps) == (10, 40)
    cells = [trainer_with(study, {**past, "gate": gate}).credit.synthesizer.cells for gate in (True, False)]
    assert cells[0] != cells[1]
    assert trainer_with(study, {"predict": "horizons", "horizons": 3, "steps": 12}).credit.synthesizer.lookahead == 12
    assert trainer_with(study, {"method": "exact", "steps": 16}).credit.synthesizer.steps == 16
    assert trainer_with(study, {"method": "overlap", "back": 5}).backward_windows == 5
    kinds = [type(trainer_with(study, {"method": "none", **more}).optimizer) for more in ({}, {"optimizer": "sgd"})]
    assert kinds == [torch.optim.Adam, torch.optim.SGD]


def test_a_weight_is_that_of_the_mean_loss(study, data):
    text_tasks = study("text_tasks")
    splits = text_tasks.Splits(text_tasks.TASKS["words"], data)
    dense = study("ablation").row_trial("words", "nothing")
    assert text_tasks.trainer_for(dense, splits).synthetic_scale == pytest.approx(0.1 * 35 / 5)


def all_kinds(study, tasks: tuple[str, ...]) -> list[dict]:
    """One trial of each kind on some tasks."""
    kinds = study("timing").kinds_of(trial for trial in study("plans").forecast({}) if trial["task"] in tasks)
    return [trial for task in kinds for trial in kinds[task].values()]


def test_every_kind_of_trial_on_sequences_trains(study, tmp_path):
    sequences, copying = study("sequence_tasks"), study("copying")
    kinds = [trial for trial in all_kinds(study, ("copy",)) if trial["T"] == 4 or trial["method"] == "dense"]
    others = [trial for trial in study("plans").plan({}) if trial["task"] in ("distractors", "repeat-copy", "adding")]
    by_task = {trial["task"]: trial for trial in others}
    assert len(kinds) > 12
    for trial in [*kinds, *by_task.values()]:
        budget = {"seconds": 2.0} if "seconds" in trial else {"updates": 2}
        line = sequences.run({**trial, **budget}, tmp_path / "none.pt", copying.UpdateTime(1.0, 0.0))
        assert (line["updates"], line["quality"]) == (2, 0)
        assert line["seconds"] == 2.0
        assert line["peak_mib"] > 0


@pytest.mark.parametrize(
    ("task", "methods"), [("words", ("past", "dense", "overlap")), ("characters", ("none", "multi-horizon", "exact"))]
)
def test_methods_on_text_train(study, data, tmp_path, task, methods):
    text_tasks, plans = study("text_tasks"), study("plans")
    splits = text_tasks.Splits(text_tasks.TASKS[task], data)
    grid = plans.GRIDS[task]
    columns = [column for column in grid.columns if column.method in methods]
    trials = [grid.trial(column, column.windows[0], grid.rates[0], *column.weights[:1]) for column in columns]
    if task == "words":
        changed = [trial for trial in all_kinds(study, ("words",)) if trial["part"] == "ablation"]
        trials += [trial for trial in changed if trial["predict"] in ("both", "future") or "draws" in trial]
    reference = {"method": "none", "T": splits.task.reference}
    seconds = {study("methods").kind_of(trial): 1.0 for trial in [*trials, reference]}
    assert len(trials) == (6 if task == "words" else 3)
    for trial in trials:
        budget = 1.01 / (splits.steps // splits.task.reference)
        line = text_tasks.run({**trial, "budget": budget}, tmp_path / "none.pt", splits, seconds)
        assert (line["updates"], line["steps"], line["seconds"]) == (1, trial["T"], 1.0)
        assert line["curve"] == [[1, line["quality"]]]
        assert (3 < line["quality"] < 6) if task == "characters" else (100 < line["quality"] < 800)


@pytest.mark.parametrize("settings", [{"predict": "past", "steps": 40}, {"predict": "horizons", "horizons": 2, "steps": 8}])
def test_messages_on_sequences_are_those_of_for_model(study, settings):
    sequences, methods = study("sequence_tasks"), study("methods")
    trainer = trainer_with(study, settings)
    task = sequences.TASKS["copy"].task
    torch.manual_seed(1)
    model = sequences.VectorRNN(task.input_size, task.target_size, hidden=sequences.UNITS)
    inputs = torch.zeros(4, 1, task.input_size)
    options = {"predict": settings["predict"], "predict_steps": settings["steps"], "horizons": settings.get("horizons")}
    theirs = methods.dni.FutureGradient.for_model(
        model, task.losses, example_inputs=inputs, outputs=task.target_size, **options
    )
    ours = trainer.credit.synthesizer
    assert repr(ours) == repr(theirs)
    assert (ours.cells, ours.limit, ours.recommended) == (theirs.cells, theirs.limit, theirs.recommended)
    for name, value in theirs.state_dict().items():
        assert ours.state_dict()[name].equal(value), name


def test_a_trial_on_text_that_was_killed_resumes_to_the_same_numbers(study, data, tmp_path, monkeypatch):
    text_tasks = study("text_tasks")
    splits = text_tasks.Splits(text_tasks.TASKS["words"], data)
    trial = {"task": "words", "method": "past", "T": 35, "rate": 8e-3, "budget": 1, "seed": 1, "dropout": 0.2}
    trial |= {"predict": "past", "steps": 20, "weight": 0.1}
    seconds = {study("methods").kind_of(each): 1.0 for each in (trial, {"method": "none", "T": 35})}
    whole = text_tasks.run(trial, tmp_path / "whole.pt", splits, seconds)
    assert whole["updates"] == 6, "a point of the curve and a checkpoint after each"
    save = text_tasks.save

    def killed(checkpoint, reader, done, curve):
        save(checkpoint, reader, done, curve)
        if done == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(text_tasks, "save", killed)
    with pytest.raises(KeyboardInterrupt):
        text_tasks.run(trial, tmp_path / "cut.pt", splits, seconds)
    monkeypatch.setattr(text_tasks, "save", save)
    steps, factors = [], []
    step, set_rates = text_tasks.Reader.step, text_tasks.set_rates

    def recorded(trainer, trial, factor):
        factors.append(factor)
        set_rates(trainer, trial, factor)
        rates = [optimizer.param_groups[0]["lr"] for optimizer in study("methods").optimizers_of(trainer)]
        assert rates == [8e-3 * factor, 1e-3 * factor]

    monkeypatch.setattr(text_tasks, "set_rates", recorded)
    monkeypatch.setattr(text_tasks.Reader, "step", lambda reader: steps.append(reader.position) or step(reader))
    resumed = text_tasks.run(trial, tmp_path / "cut.pt", splits, seconds)
    assert steps[0] == 3 * 35
    assert factors == pytest.approx([3 / 6, 2 / 6, 1 / 6])
    assert {**resumed, "peak_mib": 0} == {**whole, "peak_mib": 0}
    assert not (tmp_path / "cut.pt").exists()


def test_a_trial_on_sequences_that_was_killed_resumes(study, tmp_path, monkeypatch):
    sequences, copying = study("sequence_tasks"), study("copying")
    trial = {"task": "repeat-copy", "method": "past", "T": 4, "rate": 4e-3, "seed": 1, "updates": 6}
    trial |= {"predict": "past", "steps": 8}
    time_of = copying.UpdateTime(100.0, 0.0)  # a checkpoint after each update
    losses: list[float] = []
    step = sequences.Learner.step

    def recorded(learner, window):
        losses.append(step(learner, window))
        return losses[-1]

    monkeypatch.setattr(sequences.Learner, "step", recorded)
    sequences.run(trial, tmp_path / "whole.pt", time_of)
    whole, losses[:] = list(losses), []
    save = sequences.save_whole

    def killed(checkpoint, parts):
        save(checkpoint, parts)
        if len(losses) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(sequences, "save_whole", killed)
    with pytest.raises(KeyboardInterrupt):
        sequences.run(trial, tmp_path / "cut.pt", time_of)
    line = sequences.run(trial, tmp_path / "cut.pt", time_of)
    assert losses == whole
    assert line["updates"] == 6


def test_saved_bytes_are_those_of_the_graph(study):
    first, second = nn.Linear(3, 5, bias=False), nn.Linear(5, 2, bias=False)
    inputs = torch.ones(7, 3)

    def step():
        second(torch.tanh(first(inputs))).sum().backward()

    activations = 4 * (7 * 3 + 7 * 5)  # the input, and the output of tanh, which two operations keep
    assert study("memory").saved_bytes(step, [first, second]) == activations
    assert study("memory").saved_bytes(step, [first]) == activations + 4 * 5 * 2, "weights count where they are not named"


def test_predictors_count_in_memory(study):
    sequences = study("sequence_tasks")
    plain = {"task": "copy", "method": "none", "T": 20, "rate": 1e-3}
    saved = {
        name: sequences.kept_for_backward({**plain, **settings})
        for name, settings in {
            "none": {},
            "past": {"predict": "past", "steps": 40},
            "dense": {"predict": "past", "steps": 40, "every": 4},
        }.items()
    }
    assert saved["none"] < saved["past"] < saved["dense"]
    assert sequences.kept_for_backward(plain) == saved["none"], "the same on each run"


@pytest.fixture
def small(study, monkeypatch):
    """Copying with two methods, one T and two rates, and short far runs of one task."""
    for module in ("report", *(["picture"] if find_spec("matplotlib") else [])):
        study(module)  # before the plan changes, since they show all tasks
    plans = study("plans")
    grid = plans.GRIDS["copy"]
    columns = [replace(column, windows=(4,)) for column in grid.columns if column.method in ("none", "past")]
    monkeypatch.setattr(plans, "GRIDS", {"copy": replace(grid, columns=tuple(columns), rates=grid.rates[:2])})
    monkeypatch.setattr(plans, "FAR_UPDATES", 2)
    monkeypatch.setattr(plans, "FAR_REACH", {"copy": 40})
    return plans


def test_the_command_runs_trials_once_and_writes_what_they_say(
    study, small, data, tmp_path, monkeypatch, one_thread, capsys
):
    trials, lines, page = study("trials"), tmp_path / "lines.jsonl", tmp_path / "page.md"
    (tmp_path / "scratch").mkdir()
    for line in times_of(study, small.forecast({}), 75.0):
        append_line(lines, line)
    common = ["--results", lines, "--study", tmp_path / "no.jsonl", "--scratch", tmp_path / "scratch", "--data", data]
    with trials.claim(tmp_path / "scratch", next(small.plan({}, ("far",)))):  # another process has the first one
        call(study, monkeypatch, "run", "--only", "far", *common)
    found = [line for line in read_lines(lines) if "trial" in line]
    assert [line["trial"]["seed"] for line in found] == [2, 3]
    call(study, monkeypatch, "run", "--only", "copy", "far", *common)
    call(study, monkeypatch, "run", "--only", "copy", "far", *common)
    found = [line for line in read_lines(lines) if "trial" in line]
    keys = [trials.key_of(line["trial"]) for line in found]
    assert len(set(keys)) == len(keys) == 3 + 2 * 2 + 2 + 2 * 2, "far, the search, larger budgets, more seeds"
    for line in found:
        assert {"quality", "steps", "curve", "peak_mib", "saved_bytes", "date"} <= line.keys()
        assert (line["updates"], line["seconds"]) == ((2, 150.0) if line["trial"].get("seconds") != 400 else (6, 450.0))
    capsys.readouterr()
    call(study, monkeypatch, "plan", "--only", "copy", "far", *common)
    assert capsys.readouterr().out.endswith("h used, at most 0.00 h to go; limit 20 h\n")
    page.write_text("before\n" + "\n".join(study("report").MARKS) + "\nafter\n")
    call(study, monkeypatch, "table", "--page", page, *common)
    text = page.read_text()
    assert text.startswith("before\n")
    assert text.endswith("\nafter\n")
    cells = [[cell.strip() for cell in row.split("|")[1:-1]] for row in text.splitlines() if row.startswith("|")]
    assert ["copy", "10", "0", "0"] in [row[:4] for row in cells]
    assert ["copy", "1", "2", "0", "–, –, –, –, –", "150"] in [row[:6] for row in cells], "far lengths"
    assert [row[6:9] for row in cells if row[:4] == ["past", "Adam", "400", "4"]] == [["3", "450", "0.0 ± 0.0"]]
    pytest.importorskip("matplotlib", reason="matplotlib, of the extras plots and dev, is not installed")
    call(study, monkeypatch, "draw", "--images", tmp_path, *common)
    for name in ("frontier_time.svg", "frontier_memory.svg"):
        assert (tmp_path / name).read_text().count("<!-- copy -->") == 1, "a panel for each task with trials"


def test_no_trial_begins_beyond_the_hours(study, small, tmp_path):
    command, trials = study("study"), study("trials")
    options = argparse.Namespace(results=tmp_path / "no", study=tmp_path / "no", only=("ablation",), max_hours=0.11)
    first, *others = small.plan({}, ("ablation",))
    assert list(command.affordable({}, options)) == [first, others[0]], "0.05 hours each"
    known = {trials.key_of(first): {"trial": first, "quality": 0, "curve": [], "process_seconds": 180.0}}
    assert list(command.affordable(known, options)) == [others[0]]
    known[trials.key_of(first)]["process_seconds"] = 300.0
    assert list(command.affordable(known, options)) == []


def test_a_mean_has_its_seeds(study, tmp_path):
    plans, report, records = study("plans"), study("report"), study("records")
    trial = next(iter(plans.plan({}, ("words",))))
    known = {
        seed: {"trial": {**trial, "seed": seed}, "quality": 100.0 + seed, "test": 90.0, "seconds": 200.0, "date": "today"}
        for seed in (1, 2, 3)
    }
    page = tmp_path / "page.md"
    page.write_text("\n".join(report.MARKS) + "\n")
    report.write(page, known, records.Times({}, {}))
    (row,) = (row for row in page.read_text().splitlines() if row.startswith("| none | SGD | 1 |"))
    assert "| 3 | 200 | 102.0 ± 1.0 | 90.0 ± 0.0 |" in row


class OneTurn:
    """The end of a pipe that asks for one turn."""

    def __init__(self, count: int) -> None:
        self.counts, self.answers = [count], []

    def recv(self) -> int:
        if not self.counts:
            raise EOFError
        return self.counts.pop()

    def send(self, answer) -> None:
        self.answers.append(answer)


def test_times_and_memory_get_a_line(study, data, tmp_path, monkeypatch, one_thread):
    """What runs in a process of its own for each kind runs here one after the other."""
    timing, records, plans = study("timing"), study("records"), study("plans")

    def in_turns(serve, arguments, counts, reference, rounds):
        assert reference in arguments
        pipes = {kind: OneTurn(counts[kind]) for kind in arguments}
        for kind, given in arguments.items():
            with pytest.raises(EOFError):
                serve(*given, pipes[kind])
        assert all(pipe.answers[0] == "ready" for pipe in pipes.values())
        return {kind: pipe.answers[1] for kind, pipe in pipes.items()}

    monkeypatch.setattr(timing, "measure_in_turns", in_turns)
    monkeypatch.setattr(timing, "TEXT_STEPS", 35)
    lines = tmp_path / "lines.jsonl"
    first = {task: next(iter(plans.plan({}, (task,)))) for task in ("words", "adding")}
    for task, trial in first.items():
        timing.measure(task, timing.kinds_of([trial])[task], data, lines, 1)
    timing.measure("adding", timing.kinds_of([first["adding"]])["adding"], data, lines, 0)
    *_, memory_alone = read_lines(lines)
    assert memory_alone["update_seconds"] == {}
    times = records.read_times(lines)
    for task, trial in first.items():
        assert times.of(trial).seconds(trial["T"]) > 1e-4
        assert times.saved[task][study("methods").kind_of(trial)] > 2**19


def test_update_times_stand_beside_truncated_bptt(study, tmp_path):
    report, records, copying = study("report"), study("records"), study("copying")
    kind = "messages T=4 of past m=40"
    seconds = {"none T=4": copying.UpdateTime(0.001, 0.001), kind: copying.UpdateTime(0.006, 0.0)}
    rows = list(report.update_rows("copy", seconds, records.Times({}, {"copy": {"none T=4": 2**20, kind: 2**21}})))
    assert rows == [["none T=4", "5.0", "1.00", "1.00"], [kind, "6.0", "1.20", "2.00"]]


def test_update_times_are_a_line_through_two_window_lengths(study):
    sequences = study("sequence_tasks")
    trial = {"task": "copy", "T": 20}
    assert sequences.steps_of_update(trial, False) == 4
    assert sequences.steps_of_update(trial, True) == 20
    assert sequences.line_through(trial, 0.003, 0.011) == pytest.approx([0.001, 0.0005])
    assert sequences.line_through({**trial, "T": 4}, 0.003, 0.004) == [0.004, 0.0]


def test_bad_input_is_one_line_and_status_2(study, data, tmp_path, monkeypatch, one_thread, capsys):
    common = ["--results", tmp_path / "lines.jsonl", "--scratch", tmp_path / "scratch"]
    for arguments, said in (
        (("run", "--only", "words", "--data", tmp_path), "give their folder with --data"),
        (("run", "--only", "copy", "--data", data), "run `time --only copy` on an idle machine first"),
    ):
        with pytest.raises(SystemExit) as ended:
            call(study, monkeypatch, *arguments, *common)
        assert ended.value.code == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert said in line
    assert not (tmp_path / "scratch").exists()


def test_the_page_is_what_its_lines_say(study, tmp_path, monkeypatch, one_thread):
    """Where this fails: python benchmarks/frontier/study.py table"""
    page = ROOT / "docs" / "results" / "frontier.md"
    shutil.copy(page, tmp_path / "page.md")
    call(study, monkeypatch, "table", "--page", tmp_path / "page.md")
    assert (tmp_path / "page.md").read_text() == page.read_text()
