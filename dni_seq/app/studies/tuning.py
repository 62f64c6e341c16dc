"""Selects the learning rates that each column is tuned with, and the rates that it uses."""

from __future__ import annotations

import argparse
import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from dni_seq.app.studies.grid import BUDGETS, COLUMNS, LEARNING_RATES, LEARNS, SYNTHESIZER_LEARNING_RATES
from dni_seq.app.studies.tables import Rates, chosen, rates_in, tied
from dni_seq.synthesizers.for_model import HORIZONS, default_horizons


def reach(settings: Mapping[str, Any], bptt: int) -> dict[str, int]:
    """Returns the horizons to record for a trial that gives none, if the default at this T exceeds `HORIZONS`.

    Before 2026-11-27 the default was `HORIZONS` at every T, so a recorded line without `horizons` has that number.
    """
    by_default = settings["synthesizer"] == "multi-horizon" and "horizons" not in settings
    usual = default_horizons(bptt)
    return {"horizons": usual} if by_default and usual > HORIZONS else {}


def alike(lines: list[dict[str, Any]], settings: Mapping[str, Any], bptt: int) -> list[dict[str, Any]]:
    """Returns the lines with as many horizons as a trial of these settings, because tuned rates depend on that number."""
    horizons = reach(settings, bptt).get("horizons")
    return [line for line in lines if line["options"].get("horizons") == horizons]


def rates_to_try(column: str) -> list[Rates]:
    """Returns the grid: the same network rates for every column, and the same synthesizer rates for all that train one."""
    second: Sequence[float | None] = SYNTHESIZER_LEARNING_RATES if column in LEARNS else (None,)
    return list(itertools.product(LEARNING_RATES, second))


def tied_rates(options: argparse.Namespace, lines: list[dict[str, Any]], column: str, bptt: int) -> list[Rates]:
    """Returns the tied best rates of a column's grid, an empty list if there is no tie."""
    lines = alike(lines, COLUMNS[column], bptt)
    best = tied(tried(options, lines, "tune", options.task, column, bptt, rates_to_try(column)))
    return sorted(map(rates_in, best)) if len(best) > 1 else []


def rates_of(options: argparse.Namespace, lines: list[dict[str, Any]], task: str, column: str, bptt: int) -> Rates:
    """Returns the learning rates of a column: those given, else the best of the grid at the tuned T nearest to `bptt`.

    Raises:
        ValueError: no rates are tuned, or the tuning is not complete.
    """
    learns = column in LEARNS
    if options.lr is not None:
        if learns and options.synthesizer_lr is None:
            raise ValueError("--lr needs --synthesizer-lr for columns with a trained synthesizer: add --synthesizer-lr")
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
    """Returns the lines of a column's learning rates from the grid ("tune") or its ties, which may be missing.

    Raises:
        ValueError: some of the `wanted` rates are not tried yet.
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
