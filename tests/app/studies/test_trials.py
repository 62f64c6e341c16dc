"""Trials of the study: their tasks, options and budgets, and the results of a finished trial."""

from __future__ import annotations

from dni_seq.app.studies.grid import ABLATION, BUDGETS, COLUMNS, TableCell
from dni_seq.app.studies.trial_runner import Trial
from dni_seq.app.studies.trials import ablation_trials, measure, table_trials

RATES = (1e-3, 3e-3)


def test_an_ablation_has_the_chosen_tasks():
    both = ablation_trials([], [task for task, _ in ABLATION], 1, RATES)
    one = ablation_trials([], ["copy"], 1, RATES)
    assert {trial.about["task"] for trial in both} == {"ptb", "copy"}
    assert one
    assert [trial.key() for trial in one] == [trial.key() for trial in both if trial.about["task"] == "copy"]


def test_only_the_copy_task_has_an_initial_length():
    """The published budget starts the copy task with five vectors; other tasks start as usual."""

    def options(task: str) -> list[dict]:
        return [trial.options for trial in table_trials([], [TableCell(task, 4, c, "paper") for c in COLUMNS], 1, RATES)]

    assert [each["start"] for each in options("copy")] == [BUDGETS["paper"].start] * len(COLUMNS)
    assert not any("start" in each for each in options("repeat-copy"))


def test_text_trains_at_the_constant_rate_of_the_recorded_trials():
    """The command by itself lets the rate fall, so that a repeated trial would have other bits."""
    for trial in table_trials([], [TableCell(task, 4, "none", "small") for task in ("ptb", "copy")], 1, RATES):
        given = trial.arguments()
        assert (trial.script == "train_lm") == ("--schedule" in given)
        if "--schedule" in given:
            assert given[given.index("--schedule") + 1] == "constant"
        assert "schedule" not in trial.key()


def test_an_ablation_has_half_the_budget():
    table = table_trials([], [TableCell(task, bptt, "none", "small") for task, bptt in ABLATION], 1, RATES)
    lengths = {trial.script: trial.options.get("max_tokens") or trial.options["updates"] for trial in table}
    for trial in ablation_trials([], [task for task, _ in ABLATION], 1, RATES):
        assert 2 * (trial.options.get("max_tokens") or trial.options["updates"]) == lengths[trial.script]


def test_the_result_of_a_task_is_the_length_that_it_solved():
    """The stage that the run was in has another length."""
    summary = {"length": 7, "stage": [8, 1], "updates": 30, "sequences": 960, "curve": [[10, 7]], "seconds": 9.0}
    found = measure(Trial("train_tasks", {}, {}), summary)
    assert found == {"result": {"length": 7, "stage": [8, 1]}, "curve": [[10, 7]], "updates": 30, "sequences": 960}
