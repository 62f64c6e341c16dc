"""What the frontier study runs, and in which order: trials that follow from the lines on record.

Each method of a task searches at the smallest budget: T at one rate, then the rate at the best T, then the weight where it
has one. Truncated BPTT and the two best others, on words the best one, go on to the larger budgets; on text the next budget
tries the rate and half of it, and on words a dropout. The end points have three seeds for truncated BPTT and for the best
other method.

Legend: T = window length in steps, m = steps predicted, n = steps from message to message.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from dni_seq.synthesizers.defaults import default_horizons

sys.path.insert(0, str(Path(__file__).parents[1] / "studies"))
sys.path.insert(0, str(Path(__file__).parents[1] / "predictive_messages"))
from ablation import ablation
from trials import Line, Trial, key_of
from words import tuned

Known = dict[str, Line]
Steps = Callable[[int], dict[str, Any]]

FIRST_SEED, SEEDS = 1, (1, 2, 3)
BASE = "none"

FAR_UPDATES = 200_000
FAR_RATE = 4e-3
"""The best one of the study of predictive messages, for the past on copying."""

FAR_REACH: Mapping[str, int] = MappingProxyType({"copy": 40, "repeat-copy": 80})
"""m. At the end of repeat copy the vectors are further back than at that of copying."""

TEXT, SEQUENCES = ("words", "characters"), ("copy", "distractors", "repeat-copy", "adding")
TASKS = (*TEXT, *SEQUENCES)
GROUPS = (*TASKS, "far", "ablation")


@dataclass(frozen=True)
class Column:
    """A method in the grid of one task.

    Attributes:
        method: its name.
        settings: its further settings at a T.
        windows: the T that it tries.
        weights: weights of the predictor's loss, the first one until the rate is chosen; none where the scale is given.
    """

    method: str
    settings: Steps
    windows: tuple[int, ...]
    weights: tuple[float, ...] = ()


@dataclass(frozen=True)
class Grid:
    """The grid of one task, the same for each method.

    Attributes:
        task: its name.
        rates: learning rates.
        first: the lower one of the two rates that a search begins with; T is chosen at the upper one.
        budgets: in the task's unit.
        unit: the name of the setting that holds the budget.
        common: settings of every trial.
        columns: the methods, in order of value.
        dropouts: what the second budget tries; none if the task has no dropout to choose.
        going_on: methods beside truncated BPTT that go on to the larger budgets.
    """

    task: str
    rates: tuple[float, ...]
    first: int
    budgets: tuple[float, ...]
    unit: str
    common: Mapping[str, Any]
    columns: tuple[Column, ...]
    dropouts: tuple[float, ...] = ()
    going_on: int = 2

    def trial(self, column: Column, bptt: int, rate: float, weight: float | None = None) -> Trial:
        """Returns a trial at the smallest budget."""
        more = {} if weight is None else {"weight": weight}
        own: Trial = {"part": "frontier", "task": self.task, "method": column.method, "T": bptt, "rate": rate}
        budget = {self.unit: self.budgets[0], "seed": FIRST_SEED}
        return {**own, **budget, **self.common, **column.settings(bptt), **more}


def nothing(bptt: int) -> dict[str, Any]:
    """Returns the settings of a method without options."""
    return {}


def default(bptt: int) -> dict[str, Any]:
    """Returns those of the default: the next K windows."""
    return {"predict": "horizons"}


def default_on_sequences(bptt: int) -> dict[str, Any]:
    """Returns those of the default in numbers, so that the kind of an update shows its reach."""
    horizons = default_horizons(bptt)
    return {"predict": "horizons", "horizons": horizons, "steps": horizons * bptt}


def text_columns(windows: tuple[int, int, int], dense: int, past: int, exact: int) -> tuple[Column, ...]:
    """Returns the methods on text.

    Args:
        windows: T. The default and the exact gradient leave out the longest, where credit from later windows adds least.
        dense: n and m of dense messages. At the shortest T they would be the default's.
        past: m of the past.
        exact: steps of the exact gradient.
    """
    short, middle, _ = windows
    ahead = {"predict": "horizons", "horizons": 1}
    return (
        Column("none", nothing, windows),
        Column("dense", lambda bptt: {**ahead, "steps": dense, "every": dense}, windows[1:], (0.1, 0.3)),
        Column("multi-horizon", default, windows[:2]),
        Column("past", lambda bptt: {"predict": "past", "steps": past}, (middle,), (0.1,)),
        Column("exact", lambda bptt: {"steps": exact}, windows[:2]),
        Column("overlap", lambda bptt: {"back": middle // short}, (short,)),
    )


def sequence_columns(windows: tuple[int, int, int], overlap: bool) -> tuple[Column, ...]:
    """Returns the methods on sequences; dense messages are of the past here."""
    short, middle, _ = windows
    return (
        Column("none", nothing, windows),
        Column("past", lambda bptt: {"predict": "past", "steps": 40}, windows),
        Column("multi-horizon", default_on_sequences, windows),
        Column("dense", lambda bptt: {"predict": "past", "steps": 40, "every": 4}, windows[1:]),
        Column("exact", lambda bptt: {"steps": 16}, windows),
        *([Column("overlap", lambda bptt: {"back": middle // short}, (short,))] if overlap else []),
    )


def sequence_grid(task: str, budgets: tuple[float, float]) -> Grid:
    """Returns the grid of a generated task, whose budgets are idle CPU seconds at a constant rate."""
    return Grid(task, (1e-3, 2e-3, 4e-3), 0, budgets, "seconds", {}, sequence_columns((4, 20, 40), overlap=task == "copy"))


WORD_RATES, CHARACTER_RATES = (5.0, 10.0, 20.0, 40.0), (1e-3, 2e-3, 4e-3, 8e-3)
BY_SGD: Mapping[str, Any] = MappingProxyType({"optimizer": "sgd", "dropout": 0.0})
"""Words are learned faster by SGD at high rates than by Adam, with and without messages. Lines by Adam count too."""

WORDS, CHARACTERS = text_columns((5, 20, 35), 5, 20, 4), text_columns((8, 20, 50), 5, 40, 8)
GRIDS: Mapping[str, Grid] = MappingProxyType(
    {
        "words": Grid("words", WORD_RATES, 1, (1, 3, 6), "budget", BY_SGD, WORDS, (0.0, 0.2), going_on=1),
        "characters": Grid("characters", CHARACTER_RATES, 1, (0.3, 1.2), "budget", {"dropout": 0.0}, CHARACTERS),
        "copy": sequence_grid("copy", (150, 400)),
        "distractors": sequence_grid("distractors", (120, 240)),
        "repeat-copy": sequence_grid("repeat-copy", (120, 240)),
        "adding": sequence_grid("adding", (80, 200)),
    }
)
"""Budgets of text are in epochs of truncated BPTT at the longest T, at idle CPU time."""


def score(line: Line) -> float:
    """Returns what trials are chosen by, lower is better: on sequences the length solved, then how soon."""
    if line["trial"]["task"] in TEXT:
        return float(line["quality"])
    solved, *_, seconds = line["curve"][-1] if line["curve"] else (0, 0.0)
    return -float(solved) + float(seconds) / 1e6


def missing(trials: list[Trial], known: Known) -> bool:
    """Returns whether one of the trials has no line."""
    return any(key_of(trial) not in known for trial in trials)


def best(trials: list[Trial], known: Known) -> Trial:
    """Returns the trial with the best line."""
    return min(trials, key=lambda trial: score(known[key_of(trial)]))


def lines_of(grid: Grid, column: Column, known: Known, budget: float, seed: int = FIRST_SEED) -> list[Line]:
    """Returns the lines of a method at a budget, those of another study among them."""
    wanted = {"part": "frontier", "task": grid.task, "method": column.method, grid.unit: budget, "seed": seed}
    return [line for line in known.values() if all(line["trial"].get(name) == value for name, value in wanted.items())]


def search(grid: Grid, column: Column, known: Known) -> Iterator[Trial]:
    """Yields the trials of a method at the smallest budget that can be run now."""
    weight = column.weights[0] if column.weights else None
    by_window = [grid.trial(column, bptt, grid.rates[grid.first + 1], weight) for bptt in column.windows]
    yield from by_window
    if missing(by_window, known):
        return
    bptt = best(by_window, known)["T"]
    trials, rate = tuned(known_scores(known), lambda rate: grid.trial(column, bptt, rate, weight), grid.rates, grid.first)
    yield from trials
    if rate is not None:
        yield from (grid.trial(column, bptt, rate, other) for other in column.weights[1:])


def known_scores(known: Known) -> Known:
    """Returns the lines with their score where the search of words.py looks for it."""
    return {key: {**line, "valid": score(line)} for key, line in known.items()}


def chosen(grid: Grid, column: Column, known: Known) -> Trial | None:
    """Returns the best trial of a method at the smallest budget, None while its search is not complete."""
    if missing(list(search(grid, column, known)), known):
        return None
    line: Line = min(lines_of(grid, column, known, grid.budgets[0]), key=score)
    found: Trial = line["trial"]
    return found


def going_on(grid: Grid, known: Known) -> dict[str, Trial]:
    """Returns the best trials of truncated BPTT and of the best others, by method; none until all methods are known."""
    found = {column.method: chosen(grid, column, known) for column in grid.columns}
    known_ones = {method: trial for method, trial in found.items() if trial is not None}
    if len(known_ones) < len(found):
        return {}
    others = sorted((method for method in found if method != BASE), key=lambda name: score(known[key_of(known_ones[name])]))
    return {method: known_ones[method] for method in (BASE, *others[: grid.going_on])}


def larger(grid: Grid, settings: Trial, known: Known) -> Iterator[Trial]:
    """Yields the trials of a method at the larger budgets that can be run now, from its best one at the smallest."""
    for number, budget in enumerate(grid.budgets[1:]):
        lower = [settings["rate"] / 2] if not number and grid.task in TEXT else []
        trials = [{**settings, grid.unit: budget, "rate": rate} for rate in (*lower, settings["rate"])]
        if budget == grid.budgets[-1] and settings["method"] == BASE:
            trials += longer_windows(grid, trials[0])
        yield from trials
        if missing(trials, known):
            return
        settings = best(trials, known)
        others = [{**settings, "dropout": share} for share in grid.dropouts if not number and share != settings["dropout"]]
        yield from others
        if missing(others, known):
            return
        settings = best([settings, *others], known)


def longer_windows(grid: Grid, trial: Trial) -> list[Trial]:
    """Returns a trial of truncated BPTT on text in the next longer window, which may pay at large budgets alone."""
    (windows,) = (column.windows for column in grid.columns if column.method == BASE)
    return [{**trial, "T": bptt} for bptt in windows if bptt > trial["T"] and grid.task in TEXT][:1]


def all_larger(grid: Grid, known: Known) -> Iterator[Trial]:
    """Yields the trials of all methods at the larger budgets that can be run now."""
    for settings in going_on(grid, known).values():
        yield from larger(grid, settings, known)


def end_point(grid: Grid, settings: Trial, known: Known) -> Trial | None:
    """Returns the best trial of a method at the largest budget, None while there is none."""
    wanted = list(larger(grid, settings, known))
    last = [trial for trial in wanted if trial[grid.unit] == grid.budgets[-1]]
    return best(last, known) if last and not missing(wanted, known) else None


def more_seeds(grid: Grid, known: Known) -> Iterator[Trial]:
    """Yields the end points of truncated BPTT and of the best other method, at the other seeds."""
    ends = {method: end_point(grid, settings, known) for method, settings in going_on(grid, known).items()}
    base, others = ends.pop(BASE, None), [trial for trial in ends.values() if trial is not None]
    for trial in ([] if base is None else [base]) + ([best(others, known)] if others else []):
        yield from ({**trial, "seed": seed} for seed in SEEDS[1:])


def far() -> Iterator[Trial]:
    """Yields the runs of 200,000 updates at T = 4 with messages of the past."""
    for task, steps in FAR_REACH.items():
        own = {"part": "far", "task": task, "method": "past", "T": 4, "rate": FAR_RATE, "predict": "past", "steps": steps}
        yield from ({**own, "updates": FAR_UPDATES, "seed": seed} for seed in SEEDS)


def group_of(trial: Trial) -> str:
    """Returns the group of a trial, as `--only` names it."""
    return str(trial["task"] if trial["part"] == "frontier" else trial["part"])


def phases(known: Known) -> Iterator[Iterator[tuple[str, Trial]]]:
    """Yields, in order of value, the trials of each phase that can be run now, with their groups."""
    grids = list(GRIDS.items())
    yield ((name, trial) for name, grid in grids for column in grid.columns for trial in search(grid, column, known))
    yield ((name, trial) for name, grid in grids for trial in all_larger(grid, known))
    yield (("far", trial) for trial in far())
    yield (("ablation", trial) for trial in ablation())
    yield ((name, trial) for name, grid in grids for trial in more_seeds(grid, known))


def plan(known: Known, groups: tuple[str, ...] = GROUPS) -> Iterator[Trial]:
    """Yields the trials of some groups that can be run now, in order of value."""
    for phase in phases(known):
        yield from (trial for group, trial in phase if group in groups)


def forecast(known: Known, groups: tuple[str, ...] = GROUPS) -> list[Trial]:
    """Returns all trials that are missing if no method is left behind, in order: an upper estimate of the rest."""
    found: dict[str, Trial] = {}
    known = dict(known)
    for number, _ in enumerate(phases(known)):
        while True:  # a phase is over when its last choice is
            phase = next(itertools.islice(phases(known), number, None))
            left = {key_of(trial): trial for group, trial in phase if group in groups and key_of(trial) not in known}
            if not left:
                break
            found |= left
            known |= {key: supposed(trial) for key, trial in left.items()}
    return list(found.values())


def supposed(trial: Trial) -> Line:
    """Returns a line for `forecast`, better than any other."""
    quality = 1.0 if trial["task"] in TEXT else 1000.0
    return {"trial": trial, "quality": quality, "curve": [[quality, 0, 0, 0.0]]}
