"""Writes the page of the frontier study: tables of its lines, and the number of missing trials.

Legend: T = window length in steps.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import sequence_tasks
import text_tasks
from ablation import ROWS, row_trial
from plans import FIRST_SEED, GRIDS, GROUPS, TEXT, Column, Grid, Known, far, forecast, group_of, lines_of, score
from records import Times, estimate, spent

from dni_seq.app.studies.records import NOTHING, markdown, plus_minus, write_tables

sys.path.insert(0, str(Path(__file__).parents[1] / "studies"))
sys.path.insert(0, str(Path(__file__).parents[1] / "predictive_messages"))
from copying import UpdateTime
from trials import Line, Trial, key_of

OPTIMIZERS: Mapping[str | None, str] = MappingProxyType({None: "Adam", "sgd": "SGD"})
"""The names of optimizers in the tables, by the setting `optimizer` of a trial."""

MARKS = ("<!-- frontier: written by study.py table -->", "<!-- end of frontier -->")
COUNTS = (7, 9, 11, 15, 19)
"""The lengths of copying for which the tables show the idle CPU seconds until they were solved."""


def write(page: Path, known: Known, times: Times) -> None:
    """Writes the tables between the marks of the page."""
    parts = ["### What is done", progress_table(known, times)]
    for task, grid in GRIDS.items():
        rows = list(task_rows(grid, known, times))
        if rows:
            parts += [f"### {task.capitalize().replace('-', ' ')}, {unit_of(task)}", markdown(HEADER, rows)]
    far_lines = [known[key_of(trial)] for trial in far() if key_of(trial) in known]
    if far_lines:
        parts += ["### Far lengths, T = 4", markdown(FAR_HEADER, map(far_row, far_lines))]
    for task, rows_of in ROWS.items():
        found = [(row, known.get(key_of(row_trial(task, row)))) for row in rows_of]
        if any(line is not None for _, line in found):
            cells = [[row, *ablation_cells(line, times)] for row, line in found]
            parts += [f"### Ablation, {task}", markdown(("changed", unit_of(task), "CPU s", "saved MiB"), cells)]
    for task, seconds in times.seconds.items():
        if not seconds:
            continue
        parts += [f"### Updates, {task}", markdown(UPDATE_HEADER, update_rows(task, seconds, times))]
    write_tables(page, MARKS, "\n\n".join(part.rstrip() for part in parts) + "\n")


def unit_of(task: str) -> str:
    """Returns the unit of a task's quality, with an arrow that shows whether higher or lower is better."""
    if task in TEXT:
        return f"{text_tasks.TASKS[task].unit} ↓"
    return f"{sequence_tasks.TASKS[task].unit} solved ↑"


def progress_table(known: Known, times: Times) -> str:
    """Returns a table of the trials done and missing, and their CPU hours, by group."""
    rows = []
    for group in GROUPS:
        own = [line for line in known.values() if group_of(line["trial"]) == group]
        taken = sum("from" in line for line in own)
        left = forecast(known, (group,))
        hours = sum(estimate(trial, times) for trial in left)
        used = spent({key_of(line["trial"]): line for line in own})
        rows.append([group, str(len(own) - taken), str(taken), str(len(left)), f"{used:.1f}", f"{hours:.1f}"])
    header = (
        "group",
        "run here",
        "from the study on words",
        "missing, at most",
        "CPU hours used",
        "CPU hours to go, at most",
    )
    return markdown(header, rows)


HEADER = (
    "method",
    "optimizer",
    "budget",
    "T",
    "rate",
    "weight",
    "seeds",
    "CPU s",
    "quality",
    "test",
    "saved MiB",
    "peak MiB",
    "date",
)


def task_rows(grid: Grid, known: Known, times: Times) -> Iterable[list[str]]:
    """Yields a row for the best trial of each method and optimizer at each budget, with the mean over its seeds."""
    for column, optimizer, budget in itertools.product(grid.columns, OPTIMIZERS, grid.budgets):
        line = best_line(grid, column, known, budget, [optimizer])
        if line is not None:
            yield best_row(line, grid, known, times)


def best_line(
    grid: Grid, column: Column, known: Known, budget: float, optimizers: Iterable[str | None] = OPTIMIZERS
) -> Line | None:
    """Returns the best line of a method at a budget with the first seed and one of the optimizers; None without a line."""
    chosen = set(optimizers)
    found = [line for line in lines_of(grid, column, known, budget) if line["trial"].get("optimizer") in chosen]
    return min(found, key=score) if found else None


def best_row(line: Line, grid: Grid, known: Known, times: Times) -> list[str]:
    """Returns the cells of a row: settings of a trial, and the results of its settings over all seeds."""
    trial = line["trial"]
    of_seeds = seeds_of(trial, known)
    places = digits(grid.task)
    means = [mean_cell([each[name] for each in of_seeds if name in each], places) for name in ("quality", "test")]
    saved = saved_of(line, times)
    cells = [
        trial["method"],
        OPTIMIZERS[trial.get("optimizer")],
        trial[grid.unit],
        trial["T"],
        f"{trial['rate']:g}",
        trial.get("weight", ""),
    ]
    cells += [len(of_seeds), f"{line['seconds']:.0f}", *means]
    return [str(cell) for cell in [*cells, mib(saved), line.get("peak_mib", NOTHING), line["date"]]]


def seeds_of(trial: Trial, known: Known) -> list[Line]:
    """Returns the lines that have the settings of a trial except the seed, in the order of their seeds."""
    found = [line for line in known.values() if {**line["trial"], "seed": trial["seed"]} == trial]
    return sorted(found, key=lambda line: int(line["trial"]["seed"]))


def digits(task: str) -> int:
    """Returns the number of decimal places of a task's quality."""
    return {"words": 1, "characters": 3}.get(task, 0)


def mean_cell(values: list[float], places: int) -> str:
    """Returns the text of one number, or mean and standard deviation of several."""
    if len(values) < 2:
        return "".join(f"{value:.{places}f}" for value in values)
    return plus_minus(values, max(1, places))


def saved_of(line: Line, times: Times) -> int | None:
    """Returns the bytes saved for the backward passes of a trial's update: those in its line, or those of its kind."""
    found: int | None = line.get("saved_bytes", times.saved_by(line["trial"]))
    return found


def mib(count: int | None) -> str:
    """Returns a number of bytes as text in MiB."""
    return NOTHING if count is None else f"{count / 2**20:.2f}"


REACHED = f"CPU s to {', '.join(map(str, COUNTS))}"
FAR_HEADER = ("task", "seed", "updates", "solved", REACHED, "CPU s", "saved MiB", "peak MiB", "date")


def far_row(line: Line) -> list[str]:
    """Returns the cells of a run of 200,000 updates."""
    at = {point[0]: point[3] for point in line["curve"]}
    reached = ", ".join(f"{at[count]:.0f}" if count in at else NOTHING for count in COUNTS)
    trial: dict[str, Any] = line["trial"]
    cells = [trial["task"], trial["seed"], line["updates"], line["quality"], reached, f"{line['seconds']:.0f}"]
    return [str(cell) for cell in [*cells, mib(line["saved_bytes"]), line["peak_mib"], line["date"]]]


def ablation_cells(line: Line | None, times: Times) -> list[str]:
    """Returns the cells of a row of the ablation: quality, CPU seconds and saved MiB."""
    if line is None:
        return [NOTHING, NOTHING, NOTHING]
    assert line["trial"]["seed"] == FIRST_SEED
    quality = mean_cell([line["quality"]], digits(line["trial"]["task"]))
    return [quality, f"{line['seconds']:.0f}", mib(saved_of(line, times))]


UPDATE_HEADER = ("update", "ms of a full window", "of truncated BPTT at this T", "saved MiB")


def update_rows(task: str, seconds: dict[str, UpdateTime], times: Times) -> Iterable[list[str]]:
    """Yields a row with the idle time and the memory for each kind of update of a task."""
    for kind, time_of in seconds.items():
        bptt = int(kind.split("T=")[1].split()[0])
        base = seconds.get(f"none T={bptt}" + " by SGD" * kind.endswith("by SGD"))
        own = time_of.seconds(bptt)
        ratio = NOTHING if base is None else f"{own / base.seconds(bptt):.2f}"
        yield [kind, f"{1000 * own:.1f}", ratio, mib(times.saved[task][kind])]
