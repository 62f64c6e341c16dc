"""Makes the trials of the study from columns, budgets and learning rates, and reads the results of a finished trial.

Every list of trials with several seeds has all trials of the first seed, then all trials of the next seed. So an unfinished
study has complete tables with fewer seeds.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from dni_seq.app.studies.grid import (
    ABLATION,
    BUDGETS,
    COLUMNS,
    TUNING_SEED,
    TUNING_SHARE,
    VALIDATIONS,
    TableCell,
    added,
    without,
)
from dni_seq.app.studies.tables import Line, Rates
from dni_seq.app.studies.trial_runner import Trial
from dni_seq.app.studies.tuning import alike, rates_of, rates_to_try, reach, reach_of_then, tied_rates
from dni_seq.synthesizers.defaults import HORIZONS

SCHEDULE: Mapping[str, str] = MappingProxyType({"schedule": "constant"})
"""The schedule of all recorded trials on text. The keys of these trials do not name the schedule, because the trials are
older than the option `--schedule`. The trials give the option now, because its default is not "constant"."""


def table_trials(
    lines: list[Line], cells: Sequence[TableCell], seeds: int, given: Rates | None = None, data_file: Path | None = None
) -> list[Trial]:
    """Returns the trials of the tables.

    Args:
        lines: the recorded lines, which have the tuned learning rates.
        cells: the cells of the tables.
        seeds: number of trials per cell, with the seeds from 0 on.
        given: learning rates to use instead of the tuned ones.
        data_file: text to use instead of Penn Treebank.

    Raises:
        ValueError: no learning rates are tuned for a cell.
    """
    return [
        make_trial("table1", cell, COLUMNS[cell.column], seed, rates, data_file=data_file)
        for seed, cell in itertools.product(range(seeds), cells)
        for rates in [rates_of(alike(lines, COLUMNS[cell.column], cell.bptt), cell, given)]
    ]


def tuning_trials(cells: Sequence[TableCell]) -> list[Trial]:
    """Returns the trials that tune the learning rates: the grid of each cell, with a quarter of the budget."""
    return [
        make_trial("tune", cell, COLUMNS[cell.column], TUNING_SEED, rates)
        for cell in cells
        for rates in rates_to_try(cell.column)
    ]


def tie_trials(lines: list[Line], cells: Sequence[TableCell]) -> list[Trial]:
    """Returns trials with the full budget for the learning rates that are tied for best in the grid of a cell.

    Raises:
        ValueError: the grid of a cell is not complete.
    """
    return [
        make_trial("ties", cell, COLUMNS[cell.column], TUNING_SEED, rates)
        for cell in cells
        for rates in tied_rates(lines, cell)
    ]


def ablation_trials(lines: list[Line], tasks: Collection[str], seeds: int, given: Rates | None = None) -> list[Trial]:
    """Returns the trials of the ablation: the variants of two bases, each with the learning rates of its base.

    The bases are the default and the published recipe.

    Args:
        lines: the recorded lines, which have the tuned learning rates.
        tasks: tasks of the ablation to run.
        seeds: number of trials per variant, with the seeds from 0 on.
        given: learning rates to use instead of the tuned ones.

    Raises:
        ValueError: no learning rates are tuned for a base.
    """
    trials = []
    for seed, (task, bptt) in itertools.product(range(seeds), ABLATION):
        if task not in tasks:
            continue
        for base, variants in (("multi-horizon", without(bptt)), ("paper", added(bptt))):
            cell = TableCell(task, bptt, base, "small")
            # All variants use the rates tuned with two horizons, even if the default has four: most variants have two.
            rates = rates_of(alike(lines, {**COLUMNS[base], "horizons": HORIZONS}, bptt), cell, given)
            for variant, change in variants.items():
                settings = {**COLUMNS[base], **change}
                if settings.get("synthetic_scale") == "auto":
                    settings.pop("fidelity_every", None)
                trials.append(make_trial("ablation", cell, settings, seed, rates, variant=variant))
    return trials


def make_trial(
    part: str,
    cell: TableCell,
    settings: Mapping[str, Any],
    seed: int,
    rates: Rates,
    *,
    variant: str | None = None,
    data_file: Path | None = None,
) -> Trial:
    """Returns one trial, with the command's options from budget, column and rates.

    Args:
        part: the part of the study: "table1", "tune", "ties" or "ablation". The ablation has a smaller budget.
        cell: the cell of the tables. For the ablation: the cell whose tuned learning rates the trial uses.
        settings: options of the column or variant.
        seed: random seed.
        rates: learning rates of network and synthesizer.
        variant: name of the variant, for the ablation.
        data_file: text to use instead of Penn Treebank.
    """
    task, bptt, column, size = cell
    budget = BUDGETS["ablation" if part == "ablation" else size]
    data = None if data_file is None else data_file.name
    about = {"part": part, "task": task, "data": data, "budget": size, "bptt": bptt, "column": column}
    if variant is not None:
        about["variant"] = variant
    about["seed"] = seed
    lr, synthesizer_lr = rates
    chosen = {**settings, **reach(settings, bptt), "bptt": bptt, "seed": seed, "threads": 1, "lr": lr}
    if synthesizer_lr is not None:
        chosen["synthesizer_lr"] = synthesizer_lr
    share = TUNING_SHARE if part == "tune" else 1
    if task == "ptb":
        steps = math.ceil(budget.text["max_tokens"] / (budget.text["batch_size"] * bptt * VALIDATIONS))
        text = {**budget.text, "max_tokens": budget.text["max_tokens"] // share, "eval_every": steps}
        beside = {**SCHEDULE, **reach_of_then(settings, bptt)}
        if data_file is None:
            return Trial("train_lm", about, {**text, "dataset": "ptb", **chosen}, beside)
        return Trial("train_lm", about, {**text, **chosen}, {**beside, "data_file": str(data_file.absolute())})
    start = {"start": budget.start} if task == "copy" and budget.start else {}
    updates = budget.task["updates"] // share
    return Trial("train_tasks", about, {**budget.task, "task": task, "updates": updates, **start, **chosen})


def measure(trial: Trial, summary: dict[str, Any]) -> dict[str, Any]:
    """Returns the entries of a line that are specific to this study: result, curve, and length of the training."""
    if trial.script == "train_lm":
        result = {"valid_bpc": summary["valid"]["bpc"], "test_bpc": summary["test"]["bpc"]}
        return {"result": result, "curve": summary["curve"], "tokens": summary["tokens"], "updates": summary["steps"]}
    result = {"length": summary["length"], "stage": summary["stage"]}
    sizes = {"updates": summary["updates"], "sequences": summary["sequences"]}
    return {"result": result, "curve": summary["curve"], **sizes}
