"""Which learning rates a column is tried with, and which it takes."""

from __future__ import annotations

import argparse
import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from dni_seq.app.build.credit_options import HORIZONS, default_horizons
from dni_seq.app.studies.grid import BUDGETS, COLUMNS, LEARNING_RATES, LEARNS, SYNTHESIZER_LEARNING_RATES
from dni_seq.app.studies.tables import Rates, chosen, rates_in, tied


def reach(settings: Mapping[str, Any], bptt: int) -> dict[str, int]:
    """The horizons of a trial that gives none, at T where there are more than `HORIZONS` by default.

    Before 2026-11-27 there were `HORIZONS` at every T: lines on record of such T that do not say how many have those.
    """
    by_default = settings["synthesizer"] == "multi-horizon" and "horizons" not in settings
    usual = default_horizons(bptt)
    return {"horizons": usual} if by_default and usual > HORIZONS else {}


def alike(lines: list[dict[str, Any]], settings: Mapping[str, Any], bptt: int) -> list[dict[str, Any]]:
    """The lines with as many horizons as trials of those settings: rates that are tuned with others are not theirs."""
    horizons = reach(settings, bptt).get("horizons")
    return [line for line in lines if line["options"].get("horizons") == horizons]


def rates_to_try(column: str) -> list[Rates]:
    """The grid: the same rates of the network for every column, and of the synthesizer for every one that learns."""
    second: Sequence[float | None] = SYNTHESIZER_LEARNING_RATES if column in LEARNS else (None,)
    return list(itertools.product(LEARNING_RATES, second))


def tied_rates(options: argparse.Namespace, lines: list[dict[str, Any]], column: str, bptt: int) -> list[Rates]:
    """Those that are the best of a column's grid, where there are several."""
    lines = alike(lines, COLUMNS[column], bptt)
    best = tied(tried(options, lines, "tune", options.task, column, bptt, rates_to_try(column)))
    return sorted(map(rates_in, best)) if len(best) > 1 else []


def rates_of(options: argparse.Namespace, lines: list[dict[str, Any]], task: str, column: str, bptt: int) -> Rates:
    """The learning rates of a column: given, else those chosen from the grid at the tuned T nearest to `bptt`.

    Raises:
        ValueError: nothing is tuned, or not to the end.
    """
    learns = column in LEARNS
    if options.lr is not None:
        if learns and options.synthesizer_lr is None:
            raise ValueError("--lr needs --synthesizer-lr beside it, for the columns whose synthesizer learns")
        return options.lr, options.synthesizer_lr if learns else None
    here = {"part": "tune", "task": task, "column": column, "budget": options.budget}
    widths = {line["bptt"] for line in lines if all(line[name] == value for name, value in here.items())}
    if not widths:
        published = BUDGETS[options.budget].rates
        if published is not None:
            return published if learns else (published[0], None)
        raise ValueError(
            f"no learning rates are tuned for {column} on {task}: run table1 --tune --task {task} --bptt {bptt} "
            f"--synthesizer {column} first, or give --lr and --synthesizer-lr"
        )
    nearest = min(widths, key=lambda tuned: (abs(math.log(tuned / bptt)), tuned))
    grid = tried(options, lines, "tune", task, column, nearest, rates_to_try(column))
    return rates_in(chosen(grid, tried(options, lines, "ties", task, column, nearest, map(rates_in, tied(grid)))))


def tried(
    options: argparse.Namespace,
    lines: list[dict[str, Any]],
    part: str,
    task: str,
    column: str,
    bptt: int,
    wanted: Iterable[Rates],
) -> list[dict[str, Any]]:
    """The lines of a column's learning rates, of the grid ("tune") or of its ties; of ties there may be none.

    Raises:
        ValueError: some of those `wanted` are not tried yet.
    """
    here = {"part": part, "task": task, "column": column, "budget": options.budget, "bptt": bptt}
    found = [line for line in lines if all(line[name] == value for name, value in here.items())]
    missing = set(wanted) - set(map(rates_in, found))
    if missing and (found or part == "tune"):
        option = {"tune": "--tune", "ties": "--break-ties"}[part]
        raise ValueError(
            f"{len(missing)} of the learning rates for {column} on {task} at T = {bptt} are not tried yet: "
            f"run table1 {option} --task {task} --bptt {bptt} --synthesizer {column} to the end"
        )
    return found
