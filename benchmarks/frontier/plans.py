"""The trials of the frontier study and their order, which follow from the recorded lines.

1. At the smallest budget, each method of a task chooses T at one learning rate, then the rate at the best T, then the weight
   of the predictor's loss, if the method has one.
2. Truncated BPTT and the two best other methods, on words only the best one, then run at the larger budgets. On text, the
   second budget tries the chosen rate and half of it; on words it then tries another dropout.
3. At the largest budget, truncated BPTT and the best other method run with three seeds.

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
"""The learning rate of the long runs. It was the best for messages of the past on copying in predictive_messages."""

FAR_REACH: Mapping[str, int] = MappingProxyType({"copy": 40, "repeat-copy": 80})
"""m of the long runs. In repeat copy, the vectors lie further back at the end of a sequence than in copying."""

TEXT, SEQUENCES = ("words", "characters"), ("copy", "distractors", "repeat-copy", "adding")
TASKS = (*TEXT, *SEQUENCES)
GROUPS = (*TASKS, "far", "ablation")


@dataclass(frozen=True)
class Column:
    """A method in the grid of one task.

    Attributes:
        method: the name of the method.
        settings: a function from T to the method's further settings.
        windows: the window lengths that the method tries.
        weights: the weights of the predictor's loss that the method tries. The first weight is used until the learning rate
            is chosen. Empty if the method has no weight.
    """

    method: str
    settings: Steps
    windows: tuple[int, ...]
    weights: tuple[float, ...] = ()


@dataclass(frozen=True)
class Grid:
    """The grid of one task.

    Attributes:
        task: the name of the task.
        rates: the learning rates, in rising order.
        first: index in `rates` of the lower one of the two rates with which a search begins. T is chosen at the upper one.
        budgets: the budgets in the unit of the task, in rising order.
        unit: the name of the setting that holds the budget.
        common: settings of every trial.
        columns: the methods, the most important first.
        dropouts: the values of dropout that the second budget tries; empty if dropout is not tuned.
        going_on: number of methods besides truncated BPTT that run at the larger budgets.
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
        """Returns a trial at the smallest budget with the first seed. `weight` is None if the method has no weight."""
        more = {} if weight is None else {"weight": weight}
        own: Trial = {"part": "frontier", "task": self.task, "method": column.method, "T": bptt, "rate": rate}
        budget = {self.unit: self.budgets[0], "seed": FIRST_SEED}
        return {**own, **budget, **self.common, **column.settings(bptt), **more}


def nothing(bptt: int) -> dict[str, Any]:
    """Returns the settings of a method that has no further settings."""
    return {}


def default(bptt: int) -> dict[str, Any]:
    """Returns the settings of the default method, which predicts the next K windows."""
    return {"predict": "horizons"}


def default_on_sequences(bptt: int) -> dict[str, Any]:
    """Returns the settings of the default method with K and m as numbers, so that `kind_of` shows its reach."""
    horizons = default_horizons(bptt)
    return {"predict": "horizons", "horizons": horizons, "steps": horizons * bptt}


def text_columns(windows: tuple[int, int, int], dense: int, past: int, exact: int) -> tuple[Column, ...]:
    """Returns the methods on text.

    Args:
        windows: three values of T in rising order. The default and the exact gradient do not try the longest T, at which
            credit from later windows adds least. Dense messages do not try the shortest T, at which they would equal the
            default.
        dense: n and m of dense messages, which are equal.
        past: m of messages of the past.
        exact: number of steps of the exact gradient.
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
    """Returns the methods on sequences, where dense messages are messages of the past.

    Args:
        windows: three values of T in rising order.
        overlap: whether truncated BPTT with gradients over earlier windows is one of the methods.
    """
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
    """Returns the grid of a generated task. Budgets are CPU seconds on an idle machine; the learning rate is constant."""
    return Grid(task, (1e-3, 2e-3, 4e-3), 0, budgets, "seconds", {}, sequence_columns((4, 20, 40), overlap=task == "copy"))


WORD_RATES, CHARACTER_RATES = (5.0, 10.0, 20.0, 40.0), (1e-3, 2e-3, 4e-3, 8e-3)
BY_SGD: Mapping[str, Any] = MappingProxyType({"optimizer": "sgd", "dropout": 0.0})
"""Settings of trials on words. SGD at high rates learns words faster than Adam, with and without messages.

Recorded lines with Adam count too.
"""

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
"""The grids of all tasks. The unit of a budget on text is the CPU time, on an idle machine, of an epoch of truncated BPTT.

The T of that epoch is `TextTask.reference`.
"""


def score(line: Line) -> float:
    """Returns the score by which trials are chosen; lower is better.

    The score of text is its quality. The score of sequences is the negative length solved, plus a millionth of the CPU
    seconds until this length was solved, which decides between equal lengths.
    """
    if line["trial"]["task"] in TEXT:
        return float(line["quality"])
    solved, *_, seconds = line["curve"][-1] if line["curve"] else (0, 0.0)
    return -float(solved) + float(seconds) / 1e6


def missing(trials: list[Trial], known: Known) -> bool:
    """Returns whether at least one of the trials has no line."""
    return any(key_of(trial) not in known for trial in trials)


def best(trials: list[Trial], known: Known) -> Trial:
    """Returns the trial whose line has the best score."""
    return min(trials, key=lambda trial: score(known[key_of(trial)]))


def lines_of(grid: Grid, column: Column, known: Known, budget: float, seed: int = FIRST_SEED) -> list[Line]:
    """Returns the lines of a method at a budget with a seed. Lines taken over from the study on words are among them."""
    wanted = {"part": "frontier", "task": grid.task, "method": column.method, grid.unit: budget, "seed": seed}
    return [line for line in known.values() if all(line["trial"].get(name) == value for name, value in wanted.items())]


def search(grid: Grid, column: Column, known: Known) -> Iterator[Trial]:
    """Yields the trials of a method's search at the smallest budget, as far as the recorded lines decide them."""
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
    """Returns the lines with their score under "valid", the entry that the search of words.py compares."""
    return {key: {**line, "valid": score(line)} for key, line in known.items()}


def chosen(grid: Grid, column: Column, known: Known) -> Trial | None:
    """Returns the best trial of a method at the smallest budget, None while its search is not complete."""
    if missing(list(search(grid, column, known)), known):
        return None
    line: Line = min(lines_of(grid, column, known, grid.budgets[0]), key=score)
    found: Trial = line["trial"]
    return found


def going_on(grid: Grid, known: Known) -> dict[str, Trial]:
    """Returns the methods that run at the larger budgets, each with its best trial at the smallest budget.

    Empty until the search of every method is complete.
    """
    found = {column.method: chosen(grid, column, known) for column in grid.columns}
    known_ones = {method: trial for method, trial in found.items() if trial is not None}
    if len(known_ones) < len(found):
        return {}
    others = sorted((method for method in found if method != BASE), key=lambda name: score(known[key_of(known_ones[name])]))
    return {method: known_ones[method] for method in (BASE, *others[: grid.going_on])}


def larger(grid: Grid, settings: Trial, known: Known) -> Iterator[Trial]:
    """Yields the trials of a method at the larger budgets, as far as the recorded lines decide them.

    `settings` is the best trial of the method at the smallest budget.
    """
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
    """Returns a list with a trial of truncated BPTT on text at the next longer T, which may be better at large budgets.

    The list is empty on sequences, and if `trial` has the longest T.
    """
    (windows,) = (column.windows for column in grid.columns if column.method == BASE)
    return [{**trial, "T": bptt} for bptt in windows if bptt > trial["T"] and grid.task in TEXT][:1]


def all_larger(grid: Grid, known: Known) -> Iterator[Trial]:
    """Yields the trials of all methods at the larger budgets, as far as the recorded lines decide them."""
    for settings in going_on(grid, known).values():
        yield from larger(grid, settings, known)


def end_point(grid: Grid, settings: Trial, known: Known) -> Trial | None:
    """Returns the best trial of a method at the largest budget, None while one of its trials is missing."""
    wanted = list(larger(grid, settings, known))
    last = [trial for trial in wanted if trial[grid.unit] == grid.budgets[-1]]
    return best(last, known) if last and not missing(wanted, known) else None


def more_seeds(grid: Grid, known: Known) -> Iterator[Trial]:
    """Yields the best trials at the largest budget, of truncated BPTT and of the best other method, with the other seeds."""
    ends = {method: end_point(grid, settings, known) for method, settings in going_on(grid, known).items()}
    base, others = ends.pop(BASE, None), [trial for trial in ends.values() if trial is not None]
    for trial in ([] if base is None else [base]) + ([best(others, known)] if others else []):
        yield from ({**trial, "seed": seed} for seed in SEEDS[1:])


def far() -> Iterator[Trial]:
    """Yields the trials of 200,000 updates at T = 4 with messages of the past."""
    for task, steps in FAR_REACH.items():
        own = {"part": "far", "task": task, "method": "past", "T": 4, "rate": FAR_RATE, "predict": "past", "steps": steps}
        yield from ({**own, "updates": FAR_UPDATES, "seed": seed} for seed in SEEDS)


def group_of(trial: Trial) -> str:
    """Returns the group of a trial: one of the names that `--only` accepts."""
    return str(trial["task"] if trial["part"] == "frontier" else trial["part"])


def phases(known: Known) -> Iterator[Iterator[tuple[str, Trial]]]:
    """Yields the phases of the study in their order. A phase yields pairs: a group, and a trial that can be run now."""
    grids = list(GRIDS.items())
    yield ((name, trial) for name, grid in grids for column in grid.columns for trial in search(grid, column, known))
    yield ((name, trial) for name, grid in grids for trial in all_larger(grid, known))
    yield (("far", trial) for trial in far())
    yield (("ablation", trial) for trial in ablation())
    yield ((name, trial) for name, grid in grids for trial in more_seeds(grid, known))


def plan(known: Known, groups: tuple[str, ...] = GROUPS) -> Iterator[Trial]:
    """Yields the trials of some groups that can be run now, the most important first."""
    for phase in phases(known):
        yield from (trial for group, trial in phase if group in groups)


def forecast(known: Known, groups: tuple[str, ...] = GROUPS) -> list[Trial]:
    """Returns an upper estimate of the trials that are still missing, in their order.

    Every missing trial is supposed to give the best result, so that it causes as many further trials as possible.
    """
    found: dict[str, Trial] = {}
    known = dict(known)
    for number, _ in enumerate(phases(known)):
        while True:  # a phase may yield further trials once its first trials have lines
            phase = next(itertools.islice(phases(known), number, None))
            left = {key_of(trial): trial for group, trial in phase if group in groups and key_of(trial) not in known}
            if not left:
                break
            found |= left
            known |= {key: supposed(trial) for key, trial in left.items()}
    return list(found.values())


def supposed(trial: Trial) -> Line:
    """Returns the supposed line of a missing trial for `forecast`, which is better than any recorded line."""
    quality = 1.0 if trial["task"] in TEXT else 1000.0
    return {"trial": trial, "quality": quality, "curve": [[quality, 0, 0, 0.0]]}
