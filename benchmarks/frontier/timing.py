"""Measures the times of updates on an idle machine, all kinds in turns, and the bytes that they save for backward passes.

Legend: T = window length in steps.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import sequence_tasks
import text_tasks
from methods import kind_of
from plans import TEXT
from records import FRONTIER, timed_as

from dni_seq.app.studies.records import append_line

sys.path.insert(0, str(Path(__file__).parents[1] / "studies"))
from trials import Trial, measure_in_turns

TURNS_OF = 6
"""Number of kinds that take turns with the reference in one measurement."""

TEXT_STEPS = 280
"""Approximate number of steps of text in a turn."""

SEQUENCES_OF_TURN = {"full": 4, "short": 16}


def kinds_of(trials: Iterable[Trial]) -> dict[str, dict[str, Trial]]:
    """Returns one trial of each kind, by the task on which the kind is timed and by kind."""
    found: dict[str, dict[str, Trial]] = {}
    for trial in trials:
        task = timed_as(trial)
        found.setdefault(task, {}).setdefault(kind_of(trial), {**trial, "task": task})
    return found


def measure(task: str, kinds: dict[str, Trial], data: Path, results: Path, rounds: int) -> None:
    """Measures the update times and the saved bytes of some kinds, and records them in one line.

    Args:
        task: the task on which the kinds train.
        kinds: a trial of each kind.
        data: the folder of the texts.
        results: the file of results.
        rounds: number of measured turns of each kind; 0 to measure only the saved bytes.
    """
    seconds = update_seconds(task, kinds, data, rounds) if rounds else {}
    saved = saved_by_kind(task, kinds, data)
    line = {"study": FRONTIER, "task": task, "update_seconds": seconds, "saved_bytes": saved, "rounds": rounds}
    append_line(results, {**line, "date": time.strftime("%Y-%m-%d")})


def update_seconds(task: str, kinds: dict[str, Trial], data: Path, rounds: int) -> dict[str, list[float]]:
    """Returns the update time of each kind as a linear function of the window length: seconds for 0 steps, and per step."""
    base = max((trial for trial in kinds.values() if trial["method"] == "none"), key=lambda trial: int(trial["T"]))
    others = [kind for kind in kinds if kind != kind_of(base)]
    seconds: dict[str, list[float]] = {}
    for start in range(0, max(1, len(others)), TURNS_OF):
        chosen = {kind: kinds[kind] for kind in (kind_of(base), *others[start : start + TURNS_OF])}
        found = text_turns(chosen, base, data, rounds) if task in TEXT else sequence_turns(chosen, base, rounds)
        (first, slope), (again, slope_again) = seconds.get(kind_of(base), found[kind_of(base)]), found[kind_of(base)]
        now = (first + slope * base["T"]) / (
            again + slope_again * base["T"]
        )  # scales times of a busier moment to the first measurement
        seconds |= {kind: [round(now * number, 7) for number in numbers] for kind, numbers in found.items()}
    return seconds


def text_turns(kinds: dict[str, Trial], base: Trial, data: Path, rounds: int) -> dict[str, list[float]]:
    """Returns for each kind the seconds of an update, and 0 seconds per step: on text all windows have the same length."""
    arguments: dict[str, tuple[Any, ...]] = {kind: (trial, data) for kind, trial in kinds.items()}
    counts = {kind: max(3, TEXT_STEPS // int(trial["T"])) for kind, trial in kinds.items()}
    found = measure_in_turns(text_tasks.serve, arguments, counts, kind_of(base), rounds)
    return {kind: [value, 0.0] for kind, value in found.items()}


def sequence_turns(kinds: dict[str, Trial], base: Trial, rounds: int) -> dict[str, list[float]]:
    """Returns for each kind the seconds of an update for 0 steps, and the seconds per step."""
    names = {f"{kind}, {size}": (trial, size == "full") for kind, trial in kinds.items() for size in SEQUENCES_OF_TURN}
    counts = {name: SEQUENCES_OF_TURN["full" if full else "short"] for name, (_, full) in names.items()}
    found = measure_in_turns(sequence_tasks.serve, dict(names), counts, f"{kind_of(base)}, full", rounds)
    both = {kind: [found[f"{kind}, {size}"] for size in ("short", "full")] for kind in kinds}
    return {kind: sequence_tasks.line_through(kinds[kind], *values) for kind, values in both.items()}


def saved_by_kind(task: str, kinds: dict[str, Trial], data: Path) -> dict[str, int]:
    """Returns the bytes that an update of each kind saves for its backward passes."""
    if task not in TEXT:
        return {kind: sequence_tasks.kept_for_backward(trial) for kind, trial in kinds.items()}
    splits = text_tasks.Splits(text_tasks.TASKS[task], data)
    return {kind: text_tasks.kept_for_backward(trial, splits) for kind, trial in kinds.items()}
