"""The recorded lines of the frontier study: its own, those taken over from the study on words, and the times of updates.

Legend: T = window length in steps.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from ablation import row_trial
from methods import kind_of
from plans import GRIDS, TEXT, Known
from sequence_tasks import TIMED_AS

from dni_seq.app.studies.records import read_lines

sys.path.insert(0, str(Path(__file__).parents[1] / "studies"))
sys.path.insert(0, str(Path(__file__).parents[1] / "predictive_messages"))
from copying import UpdateTime
from trials import Line, Trial, key_of, lines_by_key

FRONTIER = "frontier"
EPOCH_SECONDS: Mapping[str, float] = {"words": 200.0, "characters": 450.0}
"""Approximate CPU seconds, on an idle machine, of a budget of 1 on text. Used to estimate the hours of trials."""

UPDATE_SECONDS = 0.007
"""Approximate CPU seconds of an update at T = 4 with messages of the past. Used to estimate the hours of trials."""

REUSED_DROPOUT = 0.2
"""Lines of the study on words with this dropout are taken over. That study trains with Adam."""

OVERHEAD = 1.2
"""Ratio of a trial's CPU seconds to the idle CPU seconds of its updates.

Evaluations need time too, and updates need more time while others use the machine.
"""


class Times(NamedTuple):
    """Times on an idle machine and memory of updates, by the task on which they were measured and by kind.

    Attributes:
        seconds: the time of an update as a linear function of the window length.
        saved: number of bytes that an update saves for its backward passes.
    """

    seconds: dict[str, dict[str, UpdateTime]]
    saved: dict[str, dict[str, int]]

    def of(self, trial: Trial) -> UpdateTime | None:
        """Returns the time of a trial's update, None if it is not recorded."""
        return self.seconds.get(timed_as(trial), {}).get(kind_of(trial))

    def saved_by(self, trial: Trial) -> int | None:
        """Returns the bytes that a trial's update saves for its backward passes, None if they are not recorded."""
        return self.saved.get(timed_as(trial), {}).get(kind_of(trial))

    def of_text(self, task: str) -> dict[str, float]:
        """Returns the seconds of an update on a text by kind. On text all windows have the same length."""
        return {kind: time.fixed for kind, time in self.seconds.get(task, {}).items()}


def timed_as(trial: Trial) -> str:
    """Returns the task on which a trial's updates are timed."""
    return TIMED_AS.get(trial["task"], str(trial["task"]))


def read_times(results: Path) -> Times:
    """Returns the last recorded times of each task and kind."""
    found = Times({}, {})
    for line in read_lines(results):
        if line.get("study") == FRONTIER:
            times = {kind: UpdateTime(*numbers) for kind, numbers in line["update_seconds"].items()}
            found.seconds.setdefault(line["task"], {}).update(times)
            found.saved.setdefault(line["task"], {}).update(line["saved_bytes"])
    return found


def all_lines(results: Path, study: Path) -> Known:
    """Returns the recorded lines of this study, with those taken over from the study on words."""
    return {**reused(study), **lines_by_key(results)}


def reused(study: Path) -> Known:
    """Returns lines of the study on words as lines of this study, if this study has trials with the same settings.

    The updates of the study on words equal those of the library (tests/test_frontier_study.py). The budgets of the two
    studies are the same.
    """
    found: Known = {}
    step_seconds = [line["step_seconds"] for line in read_lines(study) if line.get("study") == "words"]
    for line in lines_by_key(study).values():
        trial = frontier_trial(line["trial"])
        if trial is not None:
            each = converted(line, trial, step_seconds[-1] if step_seconds else {})
            found[key_of(trial)] = each
            base = row_trial("words", "nothing")
            if trial == {**base, "part": FRONTIER}:
                found[key_of(base)] = {**each, "trial": base}
    return found


def frontier_trial(old: Trial) -> Trial | None:
    """Returns the trial of this study with the settings of `old`, a trial of the study on words; None if there is none."""
    grid = GRIDS["words"]
    columns = {column.method: column for column in grid.columns}
    column = columns.get(old["method"])
    if old["task"] != "words" or column is None or "budget" not in old or old["dropout"] != REUSED_DROPOUT:
        return None
    if old["method"] == "multi-horizon" and old["T"] != 5:
        return None  # the study on words: its default predicts 5 words at each T; the default of this study: K windows
    found = {**grid.trial(column, old["T"], old["lr"], old.get("weight")), "budget": old["budget"], "seed": old["seed"]}
    return {**{name: value for name, value in found.items() if name not in grid.common}, "dropout": old["dropout"]}


def converted(line: Line, trial: Trial, step_seconds: Mapping[str, float]) -> Line:
    """Returns a line of the study on words as a line of `trial` in this study. The new line has no peak memory."""
    old = line["trial"]
    every = f" every {old['every']}" if "every" in old else ""
    seconds = round(line["steps"] * step_seconds.get(f"{old['method']} T={old['T']}{every}", float("nan")), 1)
    counts = {"updates": line["steps"], "steps": line["steps"] * trial["T"], "seconds": seconds}
    measured = {"quality": line["valid"], "test": line["test"], **counts, "curve": line["curve"], "date": line["date"]}
    return {"trial": trial, **measured, "from": "words"}


def estimate(trial: Trial, times: Times) -> float:
    """Returns the CPU hours that a trial will need."""
    if trial["task"] in TEXT:
        return OVERHEAD * trial["budget"] * EPOCH_SECONDS[trial["task"]] / 3600
    if "seconds" in trial:
        return OVERHEAD * float(trial["seconds"]) / 3600
    known: Any = times.of(trial)
    return OVERHEAD * float(trial["updates"] * (UPDATE_SECONDS if known is None else known.seconds(trial["T"]))) / 3600


def spent(known: Known) -> float:
    """Returns the sum of the CPU hours of lines. Lines from the study on words count as 0 hours."""
    return sum(float(line.get("process_seconds", 0.0)) for line in known.values()) / 3600
