"""The study of synthetic gradients: its cells, its learning rates, and its tables and curves from lines alone."""

from __future__ import annotations

import json
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest

import dni_seq as dni
from dni_seq.app.build.credit import build_synthesizer, trainer_settings
from dni_seq.app.lm.options import LanguageModelOptions
from dni_seq.app.runs.options import build
from dni_seq.app.studies import grid, tuning
from dni_seq.app.studies import reproduce as reproduce_paper
from dni_seq.app.studies.figures import axes_of, draw_curves, joined, linear, step
from dni_seq.app.studies.records import append_line, read_lines
from dni_seq.app.studies.tables import COLUMNS, MARKS, better, beyond_spread, fidelity, tables
from dni_seq.app.studies.trial_runner import Trial
from dni_seq.app.tasks.options import TaskOptions
from dni_seq.synthesizers.defaults import HORIZONS, default_horizons
from tests.app.specs import spec_of_vectors
from tests.paths import ROOT

PAGE = f"before\n{MARKS[0]}\n{MARKS[1]}\nbehind\n"


def line(
    column: str, seed: int, result: Any, *, task: str = "ptb", bptt: int = 1, part: str = "table1", **more: Any
) -> dict:
    """A line as `Study.line` writes it; `result` is test bits per character, or the length solved."""
    text = task == "ptb"
    about = {"part": part, "task": task, "data": None, "budget": "small", "bptt": bptt, "column": column, "seed": seed}
    about |= {name: more.pop(name) for name in ("variant", "data") if name in more}
    return {
        "key": json.dumps([about, more.get("options")]),
        **about,
        "options": {"hidden": 256, "batch_size": 64, "lr": 1e-3},
        "result": {"valid_bpc": result, "test_bpc": result} if text else {"length": result, "stage": [result + 1, 1]},
        "curve": [[100, 1.0, 0.9, 3.0], [200, 2.0, 1.8, 2.0 if result is None else result]]
        if text
        else [[10, 1], [20, result]],
        "updates": 50,
        "seconds": 120.0,
        "process_seconds": 90.0,
        "peak_memory_mb": 300.0,
        "injected_ratio": None if column == "none" else 0.25,
        "fidelity": {"cosine": [0.6, 0.3], "r2": [0.4, 0.1]} if column == "multi-horizon" else None,
        **more,
    }


def trials(*arguments: str, lines: list[dict] | None = None) -> list[Trial]:
    return reproduce_paper.trials_of(reproduce_paper.parse(arguments), lines or [])


RATES = ("--lr", "1e-3", "--synthesizer-lr", "3e-3")
ALL = [
    *(("table1", "--task", task, "--bptt", "1", "4", "--budget", b) for task in ("ptb", "copy") for b in ("small", "paper")),
    ("table1", "--task", "repeat-copy", "--bptt", "2", "--tune"),
    ("ablation",),
]


@pytest.mark.parametrize("arguments", ALL, ids=" ".join)
def test_every_trial_can_be_built(arguments):
    """The commands take their options, a trainer takes what comes of them, and no two cells are the same."""
    found = trials(*arguments, *(() if "--tune" in arguments else RATES))
    assert (
        len({trial.key() for trial in found})
        == len({json.dumps(trial.options, sort_keys=True) for trial in found})
        == len(found)
    )
    spec = spec_of_vectors()
    for trial in found:
        options = build({"train_lm": LanguageModelOptions, "train_tasks": TaskOptions}[trial.script], trial.options)
        credit = options.resolve(options.bptt)
        build_synthesizer(credit, spec)
        dni.SyntheticGradientConfig(**trainer_settings(credit))


@pytest.mark.parametrize("arguments", ALL, ids=" ".join)
def test_making_trials_leaves_the_options_as_they_are(arguments):
    options = reproduce_paper.parse([*arguments, *(() if "--tune" in arguments else RATES)])
    before = deepcopy(vars(options))
    assert reproduce_paper.trials_of(options, [])
    assert vars(options) == before


RECORDED = ROOT / "docs" / "results" / "paper.jsonl"


@pytest.mark.parametrize(
    "arguments",
    [
        ("ablation",),
        ("table1", "--task", "ptb", "--bptt", "1", "2", "4", "8"),
        ("table1", "--task", "copy", "--bptt", "4"),
        ("table1", "--task", "copy", "--bptt", "4", "--tune"),
        ("table1", "--task", "ptb", "--bptt", "1", "--tune"),
    ],
    ids=" ".join,
)
def test_finished_trials_keep_their_keys(arguments):
    """A trial with another key would be run again."""
    lines = read_lines(RECORDED)
    made = {trial.key() for trial in trials(*arguments, lines=lines)}
    assert made
    assert made <= {line["key"] for line in lines}


def test_broken_ties_keep_their_keys():
    lines = read_lines(RECORDED)
    recorded = {line["key"] for line in lines if (line["part"], line["task"], line["bptt"]) == ("ties", "repeat-copy", 4)}
    made = trials("table1", "--task", "repeat-copy", "--bptt", "4", "--break-ties", lines=lines)
    assert recorded
    assert recorded <= {trial.key() for trial in made}


def test_only_trials_that_are_not_on_record_are_missing(capsys):
    """Two more seeds of two columns."""
    arguments = ["table1", "--task", "copy", "--bptt", "4", "--synthesizer", "none", "exact", "--seeds", "5", "--dry-run"]
    files = ["--results", str(RECORDED), "--page", str(RECORDED.with_suffix(".md"))]
    assert reproduce_paper.main([*arguments, *files]) == 0
    *missing, total = capsys.readouterr().out.splitlines()
    assert total.endswith(" min in 4 missing trials of 10")
    assert [line.split()[2].rsplit("-", 1)[0] for line in missing] == [
        f"table1-copy-small-4-{column}-{seed}" for seed in (3, 4) for column in ("none", "exact")
    ]


def test_the_trials_of_a_table():
    found = trials("table1", "--task", "ptb", "--bptt", "1", "8", "--seeds", "2", *RATES)
    assert [(c.about["seed"], c.about["bptt"]) for c in found] == [(s, t) for s in (0, 1) for t in (1, 8) for _ in range(5)]
    assert all(trial.script == "train_lm" and trial.options["max_tokens"] == 2_000_000 for trial in found)
    # Ten validations: 31,250 windows of one step, and a tenth of 3,907 of eight, rounded up.
    assert {trial.about["bptt"]: trial.options["eval_every"] for trial in found} == {1: 3125, 8: 391}
    short, default = [trial for trial in found if trial.about["column"] == "multi-horizon"][:2]
    budget = {"tokenizer", "layers", "dropout", "embed", "hidden", "batch_size", "max_tokens", "eval_every", "dataset"}
    # Ours is the default of then: the study records nothing of it but the learning rate, and runs two horizons at T = 8.
    assert set(default.options) - budget == {"synthesizer", "bptt", "seed", "threads", "lr", "synthesizer_lr"}
    # At T = 1 a line says how many horizons that is: before 2026-11-27 it was two there, on lines that do not say.
    assert set(short.options) - set(default.options) == {"horizons"}
    assert short.options["horizons"] == default_horizons(1) > HORIZONS
    assert [trial.unkeyed.get("horizons") for trial in found if trial.about["seed"] == 0] == [None] * 8 + ["2", None]
    assert "synthesizer_lr" not in found[0].options
    copy = trials("table1", "--task", "copy", "--bptt", "4", "--seeds", "1", "--budget", "paper")
    assert [(c.options["start"], c.options["batch_size"], c.options["lr"]) for c in copy] == [(5, 256, 7e-5)] * 5


def test_a_share_is_of_the_headroom_of_its_own_seeds():
    """Seed 1 has twice the headroom, and its synthesizer is not run yet."""
    lines = [line("none", 0, 2.0), line("exact", 0, 1.8), line("none", 1, 2.4), line("exact", 1, 2.0)]
    assert "| `multi-horizon` | 50 (1) |" in tables([*lines, line("multi-horizon", 0, 1.9)])


def test_columns_have_one_order():
    assert tuple(grid.COLUMNS) == COLUMNS
    text = tables([line("exact", 0, 1.9), line("none", 0, 2.0)])
    assert text.index("| `none` |") < text.index("| `exact` |")


def test_tuning_gives_every_column_the_same_grid():
    found = trials("table1", "--task", "copy", "--bptt", "4", "--tune")
    grids = {
        column: {(c.options["lr"], c.options.get("synthesizer_lr")) for c in found if c.about["column"] == column}
        for column in grid.COLUMNS
    }
    assert {lr for lr, _ in grids["none"]} == {lr for lr, _ in grids["multi-horizon"]} == set(grid.LEARNING_RATES)
    assert grids["none"] == grids["exact"]
    assert grids["paper"] == grids["paper-aux"] == grids["multi-horizon"]
    assert {trial.options["updates"] for trial in found} == {5_000}
    assert {trial.about["seed"] for trial in found} == {grid.TUNING_SEED}


def tuned(column: str, bptt: int, best: tuple, *, task: str = "copy") -> list[dict]:
    """A whole grid, of which `best` solves 5 vectors and all others 4."""
    return [
        line(column, 1000, 5 if rates == best else 4, task=task, bptt=bptt, part="tune", options=_rates(rates))
        for rates in tuning.rates_to_try(column)
    ]


def _rates(rates: tuple) -> dict[str, Any]:
    lr, second = rates
    return {"lr": lr, "hidden": 256, "batch_size": 32} | ({} if second is None else {"synthesizer_lr": second})


def test_a_trial_has_the_rates_of_the_nearest_tuned_window():
    lines = tuned("none", 1, (1e-3, None)) + tuned("none", 4, (2e-3, None)) + tuned("paper", 4, (1e-3, 3e-4))
    arguments = ("table1", "--task", "copy", "--bptt", "1", "3", "8", "--seeds", "1", "--synthesizer", "none", "paper")
    found = {(c.about["column"], c.about["bptt"]): c.options for c in trials(*arguments, lines=lines)}
    assert [found["none", bptt]["lr"] for bptt in (1, 3, 8)] == [1e-3, 2e-3, 2e-3]
    assert {(found["paper", bptt]["lr"], found["paper", bptt]["synthesizer_lr"]) for bptt in (1, 3, 8)} == {(1e-3, 3e-4)}
    # What is given holds.
    assert trials(*arguments, *RATES, lines=lines)[0].options["lr"] == 1e-3


def test_a_trial_has_the_rates_of_as_many_horizons():
    """A grid at T = 1 with two horizons, as they were there once, is the nearest one to T = 2, which has two."""
    two, four = tuned("multi-horizon", 1, (2e-3, 1e-3)), tuned("multi-horizon", 1, (4e-3, 3e-4))
    for each in four:
        each["options"]["horizons"] = default_horizons(1)
    arguments = ("table1", "--task", "copy", "--bptt", "1", "2", "--seeds", "1", "--synthesizer", "multi-horizon")
    found = trials(*arguments, lines=two + four)
    assert [(trial.options["lr"], trial.options["synthesizer_lr"]) for trial in found] == [(4e-3, 3e-4), (2e-3, 1e-3)]
    rows = tables(two + four)
    assert "| copy, small | `multi-horizon` | 1 | 0.002, 0.001 | 5 | 8 |" in rows
    assert "| copy, small | `multi-horizon`, K = 4 | 1 | 0.004, 0.0003 | 5 | 8 |" in rows


def test_ties_are_broken_by_the_whole_budget():
    """Of rates that solve the same length in a short run the soonest is taken, or the best of longer runs."""
    ask = ("table1", "--task", "copy", "--bptt", "4", "--synthesizer", "none")
    found = {0.001: (30, 4), 0.002: (20, 4), 0.004: (40, 4), 0.008: (10, 2)}
    about = {"task": "copy", "bptt": 4, "part": "tune"}
    tried = [
        line("none", 1000, length, options=_rates((lr, None)), curve=[[at, length]], **about)
        for lr, (at, length) in found.items()
    ]
    ties = trials(*ask, "--break-ties", lines=tried)
    assert [(trial.options["lr"], trial.options["updates"], trial.about["seed"]) for trial in ties] == [
        (lr, 20_000, grid.TUNING_SEED) for lr in (0.001, 0.002, 0.004)
    ]
    # Without ties there is nothing to break, and without a grid nothing that could be tied.
    assert trials(*ask, "--break-ties", lines=tuned("none", 4, (1e-3, None))) == []
    with pytest.raises(
        ValueError, match="4 of the learning rates for none on copy at T = 4 are not tried yet: run table1 --tune"
    ):
        trials(*ask, "--break-ties")

    assert trials(*ask, lines=tried)[0].options["lr"] == 0.002
    longer = [
        line("none", 1000, length, task="copy", bptt=4, part="ties", options=_rates((lr, None)))
        for lr, length in ((0.001, 5), (0.002, 4), (0.004, 6))
    ]
    assert trials(*ask, lines=tried + longer)[0].options["lr"] == 0.004
    with pytest.raises(
        ValueError, match="1 of the learning rates for none on copy at T = 4 are not tried yet: run table1 --break-ties"
    ):
        trials(*ask, lines=tried + longer[:2])
    assert "| copy, small | `none` | 4 | 0.004 | 6 | 4, 3 again |" in tables([*tried, *longer])


def test_short_runs_on_text_that_differ_by_a_hair_are_tied():
    ask = ("table1", "--task", "ptb", "--bptt", "4", "--synthesizer", "none")

    def of_rates(part, **by_rate):
        return [
            line("none", 1000, bits, bptt=4, part=part, options=_rates((float(rate), None)))
            for rate, bits in by_rate.items()
        ]

    short = of_rates("tune", **{"0.001": 2.2, "0.002": 2.007, "0.004": 2.0, "0.008": 2.02})
    assert {trial.options["lr"] for trial in trials(*ask, "--break-ties", lines=short)} == {0.002, 0.004}
    assert trials(*ask, lines=short)[0].options["lr"] == 0.004
    longer = of_rates("ties", **{"0.002": 1.9, "0.004": 1.95})
    assert trials(*ask, lines=short + longer)[0].options["lr"] == 0.002


@pytest.mark.parametrize(
    ("lines", "more", "match"),
    [
        ([], (), "no learning rates are tuned for paper on copy: run table1 --tune"),
        (tuned("paper", 4, (1e-3, 3e-4))[:-2], (), "2 of the learning rates for paper on copy at T = 4 are not tried yet"),
        ([], ("--lr", "1e-3"), "--lr needs --synthesizer-lr"),
        ([], ("--data-file", "none.txt"), "--data-file needs --task ptb"),
        ([], ("--tune", "--lr", "1e-3"), "remove --lr"),
    ],
    ids=["untuned", "half-tuned", "one-rate", "data-file", "tuned-rate"],
)
def test_missing_rates_and_files_are_told(lines, more, match, tmp_path, capsys):
    results, page = tmp_path / "results.jsonl", tmp_path / "page.md"
    page.write_text(PAGE)
    for each in lines:
        append_line(results, each)
    arguments = ["table1", "--task", "copy", "--bptt", "2", "--synthesizer", "paper", *more]
    assert reproduce_paper.main([*arguments, "--results", str(results), "--page", str(page)]) == 2
    errors = capsys.readouterr().err
    assert match in errors
    assert errors.count("\n") == 1
    assert page.read_text() == PAGE


def test_the_synthesizers_rate_alone_is_refused(capsys):
    with pytest.raises(SystemExit, match="2"):
        reproduce_paper.main(["ablation", "--synthesizer-lr", "1e-3"])
    assert "add --lr" in capsys.readouterr().err


def test_the_sooner_of_two_equal_lengths_is_better():
    slow, fast = line("none", 0, 5, task="copy"), line("none", 0, 5, task="copy")
    slow["curve"], fast["curve"] = [[10, 1], [90, 5]], [[10, 1], [20, 5]]
    assert min([slow, fast, line("none", 0, 4, task="copy")], key=better) is fast
    diverged = line("none", 0, None)
    assert min([diverged, line("none", 0, 9.0)], key=better) is not diverged


def study_of_text() -> list[dict]:
    """Headroom 0.1; the default closes 70 % of it on one seed and 50 % on the other."""
    return [
        *(line("none", seed, bpc) for seed, bpc in ((0, 2.0), (1, 2.1))),
        *(line("multi-horizon", seed, bpc) for seed, bpc in ((0, 1.93), (1, 2.05))),
        *(line("exact", seed, bpc) for seed, bpc in ((0, 1.9), (1, 2.0))),
    ]


def test_tables_of_text():
    text = tables(study_of_text())
    assert "| `none` | 2.050 ± 0.071 (2) |" in text
    assert "| `multi-horizon` | 60 ± 14 (2) |" in text
    assert "| `exact` | 0.100 ± 0.000 (2) |" in text
    assert "| `multi-horizon` | 0.25; cos 0.60; R² 0.40 |" in text
    assert "| `none` | 1.5; 300 |" in text
    assert "| table1 | ptb | 6 | 0.15 | 0.20 |" in text
    assert "1 diverged" in tables([*study_of_text(), line("none", 2, None)])


def test_no_share_of_a_headroom_within_its_spread():
    lines = [line("none", s, 2.0) for s in (0, 1)] + [line("exact", 0, 1.9), line("exact", 1, 2.05)]
    text = tables([*lines, line("multi-horizon", 0, 1.95)])
    share = text.split("Share of the headroom")[1].split("Injected")[0]
    assert "| `multi-horizon` | – |" in share
    assert [beyond_spread(gained) for gained in ([0.1], [-0.1], [], [0.1, 0.2], [0.1, 0.9])] == [
        True,
        False,
        False,
        True,
        False,
    ]


def test_later_lines_replace_earlier_ones_and_texts_stand_apart():
    text = tables([line("none", 0, 2.5), line("none", 0, 2.0), line("none", 0, 3.0, data="book.txt")])
    assert "2.500" not in text
    assert text.index("### ptb (book.txt), small") < text.index("### ptb, small")


def test_tables_of_copy_ablation_and_tuning():
    changes = [
        ("default", 0, 8),
        ("default", 1, 10),
        ("no gate", 0, 5),
        ("no gate", 1, 9),
        ("K = 2", 0, 12),
        ("K = 2", 1, 12),
    ]
    lines = [
        line("multi-horizon", seed, length, task="copy", bptt=4, part="ablation", variant=variant)
        for variant, seed, length in changes
    ]
    text = tables([*lines, *tuned("none", 4, (1e-3, None)), line("none", 0, 7, task="copy", bptt=2)])
    assert "| `multi-horizon` | default | 9.0 ± 1.4 (2) | – |" in text
    assert "| `multi-horizon` | no gate | 7.0 ± 2.8 (2) | -2.0 ± 1.4 (2) |" in text
    assert "| `multi-horizon` | K = 2 | 12.0 ± 0.0 (2) | +3.0 ± 1.4 (2) |" in text
    assert "| `none` | 7.0 (1) |" in text
    assert f"| copy, small | `none` | 4 | 0.001 | 5 | {len(grid.LEARNING_RATES)} |" in text
    assert "| ablation | copy | 6 | 0.15 | 0.20 |" in text
    assert "### time spent" in tables([])


def test_an_r2_over_next_to_nothing_is_no_number_to_print():
    """Where the exact gradient is next to zero, whatever a message says is some 1e38 times as much."""
    seeds = [
        line("multi-horizon", seed, 1.0, fidelity={"cosine": [0.1], "r2": [r2]}) for seed, r2 in ((0, -1e38), (1, -9.0))
    ]
    assert fidelity(seeds) == "0.25; cos 0.10; R² below -10"
    assert fidelity(seeds[1:]) == "0.25; cos 0.10; R² -9.00"


def test_drawing_from_lines_alone(tmp_path):
    pytest.importorskip("matplotlib")
    results, page = tmp_path / "results.jsonl", tmp_path / "paper.md"
    page.write_text(PAGE)
    lines = [*study_of_text(), *(line("none", seed, 4 + seed, task="copy", bptt=t) for seed in (0, 1) for t in (2, 4))]
    for each in lines:
        append_line(results, each)
    arguments = ["draw", "--results", str(results), "--page", str(page)]
    assert reproduce_paper.main(arguments) == 0
    first = {path.name: path.read_bytes() for path in tmp_path.glob("*.png")}
    assert set(first) == {
        "paper-copy-small-updates.png",
        "paper-ptb-small-CPU-seconds.png",
        "paper-ptb-small-tokens.png",
    }
    written = page.read_text()
    assert written.startswith("before\n")
    assert "| `multi-horizon` | 60 ± 14 (2) |" in written
    assert reproduce_paper.main(arguments) == 0
    assert {path.name: path.read_bytes() for path in tmp_path.glob("*.png")} == first
    assert page.read_text() == written
    # The picture says what the lines say.
    lines[-1]["curve"] = [[5, 9]]
    draw_curves(lines, tmp_path / "paper")
    assert (tmp_path / "paper-copy-small-updates.png").read_bytes() != first["paper-copy-small-updates.png"]


def test_curves_between_their_points():
    assert [step([(0, 0), (10, 1), (20, 3)], at) for at in (0, 9.9, 10, 19, 20, 50)] == [0, 0, 1, 1, 3, 3]
    assert [linear([(0, 4.0), (10, 2.0), (20, 1.0)], at) for at in (0, 5, 10, 15, 20)] == [4.0, 3.0, 2.0, 1.5, 1.0]
    assert linear([(5, 4.0)], 5) == 4.0
    x, values = joined([[(0, 0.0), (10, 1.0)], [(2, 0.0), (8, 1.0)]], linear)
    assert (x[0], x[-1]) == (2, 8)
    assert values[0] == pytest.approx([0.2, 0.0])
    solved = axes_of(line("none", 0, 2, task="copy"))["updates"](line("none", 0, 2, task="copy"))
    assert solved == [(0, 0), (10, 1), (20, 2), (50, 2)]


def test_minutes_come_from_the_lines_where_there_are_some(capsys, tmp_path):
    results, page = tmp_path / "results.jsonl", tmp_path / "page.md"
    page.write_text(PAGE)
    arguments = ["table1", "--task", "ptb", "--bptt", "1", "--seeds", "1", "--synthesizer", "none", *RATES]
    arguments += ["--dry-run", "--results", str(results), "--page", str(page)]
    assert reproduce_paper.main(arguments) == 0
    assert "in 1 missing trials of 1" in capsys.readouterr().out
    append_line(results, line("none", 9, 2.0))  # 120 s for 50 updates; a cell has 31,250
    assert reproduce_paper.main(arguments) == 0
    assert " 1250.0 min in 1 missing trials" in capsys.readouterr().out
    assert not list(tmp_path.glob("*.png"))


def test_a_table_is_made_end_to_end(tmp_path, monkeypatch, capsys):
    """Text of one's own, with a budget of seconds; then everything is on record."""
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    text = Path("text.txt")
    text.write_text("the quick brown fox jumps over the lazy dog again and again\n" * 60)
    size = {"hidden": 8, "layers": 1, "batch_size": 4}
    tiny = grid.Budget({"tokenizer": "char", "dropout": 0.0, "embed": 8, **size, "max_tokens": 400}, {}, None, None)
    monkeypatch.setattr("dni_seq.app.studies.trials.BUDGETS", {"small": tiny})
    Path("paper.md").write_text(PAGE)
    common = ["--seeds", "1", "--results", "paper.jsonl", "--page", "paper.md", *RATES]
    of_text = [
        "table1",
        "--task",
        "ptb",
        "--bptt",
        "2",
        "--synthesizer",
        "multi-horizon",
        "--data-file",
        "text.txt",
        *common,
    ]
    assert reproduce_paper.main(of_text) == 0
    (one,) = read_lines(Path("paper.jsonl"))
    assert (one["data"], one["tokens"], one["updates"]) == ("text.txt", 400, 50)
    assert str(tmp_path) not in json.dumps(one)  # where it was made is nobody's business
    assert [point[0] for point in one["curve"]] == [40 * n for n in range(1, 11)]
    assert one["result"]["valid_bpc"] == pytest.approx(min(point[3] for point in one["curve"]))
    assert f"| `multi-horizon` | {one['result']['test_bpc']:.3f} (1) |" in Path("paper.md").read_text()
    assert {path.name for path in tmp_path.glob("*.png")} == {
        "paper-ptb-text.txt-small-tokens.png",
        "paper-ptb-text.txt-small-CPU-seconds.png",
    }
    capsys.readouterr()
    assert reproduce_paper.main(of_text) == 0
    assert "trials: 0 done" in capsys.readouterr().out
