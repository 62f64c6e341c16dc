"""Selects the learning rates that the study tries for each column, and the best of them."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from dni_seq.app.studies.grid import BUDGETS, COLUMNS, LEARNING_RATES, LEARNS, SYNTHESIZER_LEARNING_RATES, TableCell
from dni_seq.app.studies.tables import Rates, chosen, rates_in, tied
from dni_seq.synthesizers.defaults import HORIZONS, LONG_WINDOW, default_horizons


def reach(settings: Mapping[str, Any], bptt: int) -> dict[str, int]:
    """Returns the option `horizons` to record for a trial that does not give it; empty if recording is not necessary.

    A recorded line without the option has `HORIZONS` horizons, because before 2026-11-27 this was the default at every T.
    So the number has to be recorded only if the default at this T is larger.
    """
    by_default = settings["synthesizer"] == "multi-horizon" and "horizons" not in settings
    usual = default_horizons(bptt)
    return {"horizons": usual} if by_default and usual > HORIZONS else {}


def reach_of_then(settings: Mapping[str, Any], bptt: int) -> dict[str, str]:
    """Returns the option `horizons` that a trial on text gets in addition to its recorded options; empty for none.

    Until 2026-11-30 the default was `HORIZONS` in long windows too, and the recorded lines have that number.
    """
    by_default = settings["synthesizer"] == "multi-horizon" and not {"horizons", "lookahead"} & settings.keys()
    return {"horizons": str(HORIZONS)} if by_default and bptt >= LONG_WINDOW else {}


def alike(lines: list[dict[str, Any]], settings: Mapping[str, Any], bptt: int) -> list[dict[str, Any]]:
    """Returns the lines that have as many horizons as a trial with these settings. Tuned rates depend on that number."""
    horizons = reach(settings, bptt).get("horizons")
    return [line for line in lines if line["options"].get("horizons") == horizons]


def rates_to_try(column: str) -> list[Rates]:
    """Returns the grid of learning rates of a column.

    All columns have the same rates of the network. All columns with a trained synthesizer have the same rates of the
    synthesizer.
    """
    second: Sequence[float | None] = SYNTHESIZER_LEARNING_RATES if column in LEARNS else (None,)
    return list(itertools.product(LEARNING_RATES, second))


def tied_rates(lines: list[dict[str, Any]], cell: TableCell) -> list[Rates]:
    """Returns the rates that are tied for best in a cell's grid (see `tables.tied`), an empty list if one is best alone."""
    lines = alike(lines, COLUMNS[cell.column], cell.bptt)
    best = tied(tried(lines, cell, "tune", rates_to_try(cell.column)))
    return sorted(map(rates_in, best)) if len(best) > 1 else []


def rates_of(lines: list[dict[str, Any]], cell: TableCell, given: Rates | None) -> Rates:
    """Returns the learning rates of a cell: `given`, or the best rates of the grid at the nearest T.

    The nearest T is the one of all T with a tuned grid whose logarithm is nearest to that of the cell's T.

    Args:
        lines: the recorded lines.
        cell: the cell of the tables.
        given: rates to use instead of the tuned ones, None for the tuned ones.

    Raises:
        ValueError: no rates are tuned, the tuning is not complete, or the synthesizer's rate is not given.
    """
    task, bptt, column, budget = cell
    learns = column in LEARNS
    if given is not None:
        if learns and given[1] is None:
            raise ValueError("--lr needs --synthesizer-lr for columns with a trained synthesizer: add --synthesizer-lr")
        return given if learns else (given[0], None)
    here = {"part": "tune", "task": task, "column": column, "budget": budget}
    widths = {line["bptt"] for line in lines if all(line[name] == value for name, value in here.items())}
    if not widths:
        published = BUDGETS[budget].rates
        if published is not None:
            return published if learns else (published[0], None)
        raise ValueError(
            f"no learning rates are tuned for {column} on {task}: run table1 --tune --task {task} --bptt {bptt} "
            f"--synthesizer {column} first, or give --lr and --synthesizer-lr"
        )
    nearest = cell._replace(bptt=min(widths, key=lambda tuned: (abs(math.log(tuned / bptt)), tuned)))
    grid = tried(lines, nearest, "tune", rates_to_try(column))
    return rates_in(chosen(grid, tried(lines, nearest, "ties", map(rates_in, tied(grid)))))


def tried(lines: list[dict[str, Any]], cell: TableCell, part: str, wanted: Iterable[Rates]) -> list[dict[str, Any]]:
    """Returns the lines of a cell from a part of the study: its grid ("tune"), or the longer runs of tied rates ("ties").

    The longer runs are optional: the list is empty if none of them is recorded.

    Raises:
        ValueError: a `wanted` rate of the grid has no line yet, or only some of the `wanted` rates have a longer run.
    """
    here = {"part": part, **cell._asdict()}
    found = [line for line in lines if all(line[name] == value for name, value in here.items())]
    missing = set(wanted) - set(map(rates_in, found))
    if missing and (found or part == "tune"):
        option = {"tune": "--tune", "ties": "--break-ties"}[part]
        raise ValueError(
            f"{len(missing)} of the learning rates for {cell.column} on {cell.task} at T = {cell.bptt} are not tried yet: "
            f"run table1 {option} --task {cell.task} --bptt {cell.bptt} --synthesizer {cell.column} to the end"
        )
    return found
