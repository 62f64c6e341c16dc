"""Table 1 of Jaderberg et al. 2017 (arXiv 1608.05343), and what every part of the recipe brings.

python scripts/reproduce_paper.py table1 --task copy --bptt 4 --tune --jobs 2
    Learning rates: the same grid for every column, one seed, a quarter of the budget.
python scripts/reproduce_paper.py table1 --task copy --bptt 4 --break-ties --jobs 2
    The rates that solve the same length there, with the whole budget: the best of these is taken then, not the soonest.
python scripts/reproduce_paper.py table1 --task copy --bptt 2 4 --jobs 2
    The cells, 3 seeds, with the best rates of that grid, those of the T nearest to it; then tables and curves.
python scripts/reproduce_paper.py table1 --task ptb --bptt 1 2 4 8 --synthesizer none paper multi-horizon --max-minutes 60
    Some columns of the row of Penn Treebank; no cell is begun that would take longer than what is left of the hour.
python scripts/reproduce_paper.py table1 --task ptb --bptt 1 --data-file book.txt
    The same on other text, by characters, with the rates of Penn Treebank.
python scripts/reproduce_paper.py ablation --jobs 2
    Each part taken away from the default alone, and added to the published recipe alone.
python scripts/reproduce_paper.py draw
    Only the tables and curves, from the lines of docs/results/paper.jsonl.
python scripts/reproduce_paper.py figure feedforward
    The rows of MNIST: scripts/feedforward_table.py.

A cell is one training by train_lm.py or train_tasks.py in a process of its own, and one line of results. What is on record
is not run again. A call that is stopped (Ctrl-C) or killed loses a minute of work, the same call goes on; several calls may
share the files. --dry-run lists the cells that are missing with the minutes that each will take, about.
"""

from __future__ import annotations

import argparse
import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from dni_seq.app.build.credit_options import HORIZONS, default_horizons, default_scale
from dni_seq.app.feedforward.table import main as feedforward_table
from dni_seq.app.runs.options import OneLineParser, report
from dni_seq.app.runs.signals import StopSignals
from dni_seq.app.studies.figures import draw_curves
from dni_seq.app.studies.records import around_tables, read_lines, write_tables
from dni_seq.app.studies.tables import MARKS, TASKS, Rates, chosen, rates_in, tables, tied
from dni_seq.app.studies.trial_runner import Cell, Outcome, Study

_PROG = "reproduce_paper"

FIDELITY_EVERY = 499
"""Windows between comparisons with exact gradients where a column does not make them anyway: they cost less than 2 %."""

COLUMNS: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "none": {"synthesizer": "none"},
        "paper": {"synthesizer": "paper", "fidelity_every": FIDELITY_EVERY},
        "paper-aux": {"synthesizer": "paper", "fidelity_every": FIDELITY_EVERY, "auxiliary": 0.1},
        "multi-horizon": {"synthesizer": "multi-horizon"},
        "exact": {"synthesizer": "exact", "exact_steps": 4},
    }
)
"""The columns of the table: what each sets beside the budget and the learning rates."""

LEARNING_RATES = (1e-3, 2e-3, 4e-3, 8e-3)
SYNTHESIZER_LEARNING_RATES = (3e-4, 1e-3)
LEARNS = ("paper", "paper-aux", "multi-horizon")
"""Columns with a synthesizer that learns; the others have no rate of it to tune."""

TUNING_SEED = 1000
"""Of no cell of the tables."""

TUNING_SHARE = 4


class Budget(NamedTuple):
    """The size of a study's networks and trainings.

    Attributes:
        text: options for text; `max_tokens` a run.
        task: options for copy and repeat copy; `updates` a run.
        start: vectors that a copy task begins with, None for one.
        rates: learning rates of network and synthesizer where nothing is tuned, None where tuning is due.
    """

    text: Mapping[str, Any]
    task: Mapping[str, Any]
    start: int | None
    rates: tuple[float, float] | None


_CHARACTERS = {"tokenizer": "char", "layers": 1, "dropout": 0.0}
_SMALL_TEXT = {**_CHARACTERS, "embed": 64, "hidden": 256, "batch_size": 64}
_SMALL_TASK = {"hidden": 256, "layers": 1, "batch_size": 32, "updates": 20_000}

BUDGETS: Mapping[str, Budget] = MappingProxyType(
    {
        "small": Budget({**_SMALL_TEXT, "max_tokens": 2_000_000}, _SMALL_TASK, None, None),
        # Units, batch, rate and first length are the paper's; embedding, lanes and lengths of training are ours.
        "paper": Budget(
            {**_CHARACTERS, "embed": 256, "hidden": 1024, "batch_size": 64, "max_tokens": 100_000_000},
            {"hidden": 256, "layers": 1, "batch_size": 256, "updates": 500_000},
            5,
            (7e-5, 7e-5),
        ),
        "ablation": Budget({**_SMALL_TEXT, "max_tokens": 1_000_000}, {**_SMALL_TASK, "updates": 10_000}, None, None),
    }
)

VALIDATIONS = 10
"""In a run on text, evenly spaced; a run for tuning has as many for its tokens as any other."""

ABLATION = (("ptb", 1), ("copy", 4))
"""Tasks and T of the ablation."""


def without(bptt: int) -> dict[str, dict[str, Any]]:
    """The default with one thing taken away, or put in the place of another, which may leave messages to be fitted."""
    fitted = {"fit": "least-squares", "horizons": HORIZONS}
    message = {"synthesizer": "state"}
    usual = default_horizons(bptt)
    return {
        "default": {},
        "fitted to targets": fitted,
        "fitted, c = 1": {**fitted, "synthetic_scale": "1"},
        "fitted, no model of the future": {**fitted, "future_units": 0},
        "fitted, no lookahead": {**fitted, "lookahead": 0},
        # Raw targets have no place for a second loss, nor for a solved layer, nor a unit to limit messages by.
        "fitted by descent, no normalisation, model of the future or limit": {
            **fitted,
            "fit": "descent",
            "normalize": False,
        },
        "fitted, with a tail": {**fitted, "tail": True},
        "no gate": {"gate": False},
        **{f"c = {c}": {"synthetic_scale": c} for c in ("0.5", "1") if float(c) != default_scale(usual)},
        "automatic scale": {"synthetic_scale": "auto"},
        **{f"K = {count}, c = 1": {"horizons": count, "synthetic_scale": "1"} for count in (1, 2, 4) if count != usual},
        "auxiliary task": {"auxiliary": 0.1},
        "one bootstrapped message, γ = 0.9": message,
        "one bootstrapped message, c = γ = 0.5": {**message, "synthetic_scale": "0.5", "discount": 0.5},
        "one message, λ-targets": {**message, "targets": "lambda"},
    }


def added(bptt: int) -> dict[str, dict[str, Any]]:
    """The published recipe with one thing added."""
    return {
        "paper": {},
        "lookahead": {"lookahead": HORIZONS * bptt},
        "normalisation": {"normalize": True},
        "gate": {"gate": True},
        "c and γ apart, γ = 0.9": {"discount": 0.9},
        "K = 2": {"horizons": 2},
        "K = 1 and a tail": {"tail": True},
        "λ-targets": {"targets": "lambda"},
        "auxiliary task": {"auxiliary": 0.1},
        "automatic scale": {"synthetic_scale": "auto"},
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    options = parse(arguments)
    if options.part == "figure":
        return feedforward_table([])
    try:
        around_tables(options.page, MARKS)
        status = 0
        if options.part != "draw":
            lines = read_lines(options.results)
            cells = table1(options, lines) if options.part == "table1" else ablation(options, lines)
            if options.dry_run:
                return list_missing(cells, lines)
            status = run(cells, lines, options)
        draw(options)
    except (ValueError, OSError) as error:
        return report(_PROG, error)
    return status


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line; a mistake ends the process with one line on stderr and exit status 2."""
    parser = OneLineParser(
        prog=_PROG, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parts = parser.add_subparsers(dest="part", required=True)
    table = parts.add_parser("table1", help="tasks against T, by columns", allow_abbrev=False)
    table.add_argument("--task", choices=TASKS, required=True)
    table.add_argument("--bptt", type=positive, nargs="+", required=True, metavar="T")
    table.add_argument("--synthesizer", choices=COLUMNS, nargs="+", default=list(COLUMNS))
    table.add_argument("--budget", choices=("small", "paper"), default="small")
    instead = table.add_mutually_exclusive_group()
    instead.add_argument("--tune", action="store_true", help="the grid of learning rates instead of the cells")
    instead.add_argument("--break-ties", action="store_true", help="the best of that grid again, with the whole budget")
    table.add_argument("--data-file", metavar="FILE", help="other text in the place of Penn Treebank")
    away = parts.add_parser("ablation", help="one thing taken away, or added", allow_abbrev=False)
    away.add_argument("--task", choices=[task for task, _ in ABLATION], nargs="+", default=[task for task, _ in ABLATION])
    for part in (table, away):
        part.add_argument("--seeds", type=positive, default=3, help="from 0 on (default: 3; --tune has one of its own)")
        part.add_argument("--lr", type=rate, help="the network's learning rate, in the place of tuned ones")
        part.add_argument("--synthesizer-lr", type=rate, help="the synthesizer's, given with --lr")
        part.add_argument("--jobs", type=positive, default=1, help="cells side by side (default: 1)")
        part.add_argument("--max-minutes", type=rate, metavar="M", help="begin no cell that would end later than this")
        part.add_argument("--dry-run", action="store_true", help="list what is missing, and run nothing")
        part.add_argument("--scratch", type=Path, default=Path("runs/reproduce_paper"), metavar="DIR")
    figure = parts.add_parser("figure", help="the other pictures of the paper")
    figure.add_argument("which", choices=("feedforward",))
    for part in (table, away, parts.add_parser("draw", help="only tables and curves", allow_abbrev=False)):
        part.add_argument("--results", type=Path, default=Path("docs/results/paper.jsonl"), metavar="FILE")
        part.add_argument("--page", type=Path, default=Path("docs/results/paper.md"), metavar="FILE")
    options = parser.parse_args(arguments)
    if getattr(options, "synthesizer_lr", None) is not None and options.lr is None:
        parser.error("--synthesizer-lr is given with --lr: add --lr")
    return options


def positive(text: str) -> int:
    """A whole number from 1 on."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is not 1 or more")
    return number


def rate(text: str) -> float:
    """A finite number above 0."""
    number = float(text)
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is not above 0")
    return number


def table1(options: argparse.Namespace, lines: list[dict[str, Any]]) -> list[Cell]:
    """The cells of a call, seeds outermost, so that a study that is not through has a whole table of fewer seeds."""
    if options.tune and options.lr is not None:
        raise ValueError("--tune tries a grid of rates: leave out --lr")
    if options.data_file is not None:
        if options.task != "ptb" or options.tune or options.break_ties:
            raise ValueError(
                "--data-file is for --task ptb, with the rates that are tuned there: leave out --tune and --break-ties"
            )
        if not Path(options.data_file).is_file():
            raise ValueError(f"--data-file {options.data_file}: there is no such file")
    if options.tune or options.break_ties:
        part = "tune" if options.tune else "ties"
        return [
            made(part, options, options.task, bptt, column, COLUMNS[column], TUNING_SEED, rates)
            for bptt, column in itertools.product(options.bptt, options.synthesizer)
            for rates in (rates_to_try(column) if options.tune else tied_rates(options, lines, column, bptt))
        ]
    return [
        made("table1", options, options.task, bptt, column, COLUMNS[column], seed, rates)
        for seed, bptt, column in itertools.product(range(options.seeds), options.bptt, options.synthesizer)
        for rates in [rates_of(options, alike(lines, COLUMNS[column], bptt), options.task, column, bptt)]
    ]


def ablation(options: argparse.Namespace, lines: list[dict[str, Any]]) -> list[Cell]:
    """Two bases, each with one change; rates are those of the base, of the default with two horizons."""
    options.budget, options.data_file = "small", None
    cells = []
    for seed, (task, bptt) in itertools.product(range(options.seeds), ABLATION):
        if task not in options.task:
            continue
        for base, variants in (("multi-horizon", without(bptt)), ("paper", added(bptt))):
            # Whatever is changed: those of two horizons, as most rows have, where there are four by default.
            rates = rates_of(options, alike(lines, {**COLUMNS[base], "horizons": HORIZONS}, bptt), task, base, bptt)
            for variant, change in variants.items():
                settings = {**COLUMNS[base], **change}
                if settings.get("synthetic_scale") == "auto":
                    settings.pop("fidelity_every", None)
                cells.append(made("ablation", options, task, bptt, base, settings, seed, rates, variant=variant))
    return cells


def made(
    part: str,
    options: argparse.Namespace,
    task: str,
    bptt: int,
    column: str,
    settings: Mapping[str, Any],
    seed: int,
    rates: Rates,
    **more: str,
) -> Cell:
    """One cell: the command's options from budget, column and rates."""
    budget = BUDGETS["ablation" if part == "ablation" else options.budget]
    data = None if options.data_file is None else Path(options.data_file).name
    about = {"part": part, "task": task, "data": data, "budget": options.budget, "bptt": bptt, "column": column, **more}
    lr, synthesizer_lr = rates
    chosen = {**settings, **reach(settings, bptt), "bptt": bptt, "seed": seed, "threads": 1, "lr": lr}
    if synthesizer_lr is not None:
        chosen["synthesizer_lr"] = synthesizer_lr
    share = TUNING_SHARE if part == "tune" else 1
    if task == "ptb":
        tokens = budget.text["max_tokens"] // share
        steps = math.ceil(budget.text["max_tokens"] / (budget.text["batch_size"] * bptt * VALIDATIONS))
        text = {**budget.text, "max_tokens": tokens, "eval_every": steps}
        if data is None:
            text["dataset"] = "ptb"
        paths = {} if data is None else {"data_file": str(Path(options.data_file).absolute())}
        return Cell("train_lm", {**about, "seed": seed}, {**text, **chosen}, paths)
    start = {"start": budget.start} if task == "copy" and budget.start else {}
    updates = budget.task["updates"] // share
    return Cell("train_tasks", {**about, "seed": seed}, {**budget.task, "task": task, "updates": updates, **start, **chosen})


def reach(settings: Mapping[str, Any], bptt: int) -> dict[str, int]:
    """The horizons of a cell that gives none, at T where there are more than `HORIZONS` by default.

    Before 2026-11-27 there were `HORIZONS` at every T: lines on record of such T that do not say how many have those.
    """
    by_default = settings["synthesizer"] == "multi-horizon" and "horizons" not in settings
    usual = default_horizons(bptt)
    return {"horizons": usual} if by_default and usual > HORIZONS else {}


def alike(lines: list[dict[str, Any]], settings: Mapping[str, Any], bptt: int) -> list[dict[str, Any]]:
    """The lines with as many horizons as cells of those settings: rates that are tuned with others are not theirs."""
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


def measure(cell: Cell, summary: dict[str, Any]) -> dict[str, Any]:
    """What a line says beside what every line says: the result, the curve, and how long the training was."""
    if cell.script == "train_lm":
        result = {"valid_bpc": summary["valid"]["bpc"], "test_bpc": summary["test"]["bpc"]}
        return {"result": result, "curve": summary["curve"], "tokens": summary["tokens"], "updates": summary["steps"]}
    result = {"length": summary["length"], "stage": summary["stage"]}
    sizes = {"updates": summary["updates"], "sequences": summary["sequences"]}
    return {"result": result, "curve": summary["curve"], **sizes}


def minutes_by(lines: list[dict[str, Any]]) -> Callable[[Cell], float]:
    """How long a cell takes, about: as the latest ones like it a window, else by a rule of thumb."""
    known = {_kind(line, line["options"]): line["seconds"] / line["updates"] for line in lines}

    def minutes(cell: Cell) -> float:
        windows = windows_of(cell)
        return windows * known.get(_kind(cell.about, cell.options), rule_of_thumb(cell)) / 60

    return minutes


def _kind(about: Mapping[str, Any], options: Mapping[str, Any]) -> tuple[Any, ...]:
    changes = tuple(about.get(name) for name in ("task", "column", "bptt", "budget", "variant"))
    return (*changes, options["hidden"], options["batch_size"])


def windows_of(cell: Cell) -> int:
    """The updates of a cell."""
    options = cell.options
    return int(options.get("updates") or math.ceil(options["max_tokens"] / (options["batch_size"] * options["bptt"])))


def rule_of_thumb(cell: Cell) -> float:
    """Seconds a window on an idle core: a plain step, and what the column adds; as copying took with 256 units, 32 lanes."""
    steps, lanes, units = (cell.options[name] for name in ("bptt", "batch_size", "hidden"))
    added = {"none": 0.0, "paper": 8.5, "paper-aux": 11.0, "multi-horizon": 20.0, "exact": 11.0}[cell.about["column"]]
    plain = 2.2 + 1.2 * steps
    return (plain + added) * 1e-3 * max(lanes / 32, 1) ** 0.5 * (units / 256) ** 2


def list_missing(cells: Sequence[Cell], lines: list[dict[str, Any]]) -> int:
    """Print what is not on record, with its minutes."""
    done, minutes = {line["key"] for line in lines}, minutes_by(lines)
    missing = [cell for cell in cells if cell.key() not in done]
    for cell in missing:
        print(f"{minutes(cell):7.1f} min  {cell.name()}")
    print(f"{sum(map(minutes, missing)):7.1f} min in {len(missing)} cells that are missing of {len(cells)}")
    return 0


def run(cells: Sequence[Cell], lines: list[dict[str, Any]], options: argparse.Namespace) -> int:
    """Run what is missing; the exit status: 0 where nothing failed, else 1, after a signal that of the signal."""
    study = Study(options.scratch, options.results, options.jobs, measure)
    with StopSignals() as stop:
        outcome = study.run(cells, minutes_by(lines), options.max_minutes, stop)
    print(summary_of(outcome), flush=True)
    return stop.exit_status or (1 if outcome.failed else 0)


def summary_of(outcome: Outcome) -> str:
    """What became of the cells, in one line."""
    parts = {
        "done": outcome.done,
        "failed": len(outcome.failed),
        "run by another process": outcome.elsewhere,
        "not begun for lack of time": outcome.late,
        "stopped": outcome.stopped,
    }
    return "cells: " + ", ".join(f"{count} {what}" for what, count in parts.items() if count or what == "done")


def draw(options: argparse.Namespace) -> None:
    """Tables and curves, from the lines alone; after runs without matplotlib, tables alone.

    Raises:
        ValueError: drawing is asked for, and there is nothing to draw with; the tables are written.
    """
    lines = read_lines(options.results)
    write_tables(options.page, MARKS, tables(lines))
    if options.part != "draw" and find_spec("matplotlib") is None:
        print("no curves without matplotlib: pip install 'dni-seq[plots]', then draw", flush=True)
        return
    for path in draw_curves(lines, options.page.with_suffix("")):
        print(f"drawn      {path}", flush=True)
