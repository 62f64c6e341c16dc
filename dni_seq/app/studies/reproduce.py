"""Reproduces Table 1 of Jaderberg et al. 2017 (arXiv 1608.05343) and runs an ablation of its recipe and of the default.

python scripts/reproduce_paper.py table1 --task copy --bptt 4 --tune --jobs 2
    Tune the learning rates: the same grid for every column, one seed, a quarter of the budget.
python scripts/reproduce_paper.py table1 --task copy --bptt 4 --break-ties --jobs 2
    Run the learning rates again that are tied for best in that grid, with the full budget. The best of these runs decides.
python scripts/reproduce_paper.py table1 --task copy --bptt 2 4 --jobs 2
    Run the trials with 3 seeds and the best rates, tuned at the nearest T; then write tables and curves.
python scripts/reproduce_paper.py table1 --task ptb --bptt 1 2 4 8 --synthesizer none paper multi-horizon --max-minutes 60
    Run some columns on Penn Treebank. A trial whose estimated end is after the 60 minutes is not started.
python scripts/reproduce_paper.py table1 --task ptb --bptt 1 --data-file book.txt
    Run the trials on another text, by characters, with the learning rates tuned on Penn Treebank.
python scripts/reproduce_paper.py ablation --jobs 2
    Remove single parts from the default, and add single parts to the published recipe.
python scripts/reproduce_paper.py draw
    Only write tables and curves from docs/results/paper.jsonl.
python scripts/reproduce_paper.py figure feedforward
    Run the MNIST rows.

A trial is one training by train_lm.py or train_tasks.py in its own process, and one line of results. Recorded trials are not
run again. A call that is stopped (Ctrl-C) or killed loses a minute of work at most; the same call later resumes its trials.
Several calls may run at once on the same files. --dry-run lists the missing trials with their estimated minutes.
"""

from __future__ import annotations

import argparse
import itertools
import math
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from dni_seq.app.runs.options import OneLineParser, report
from dni_seq.app.runs.signals import StopSignals
from dni_seq.app.studies.estimates import minutes_by
from dni_seq.app.studies.feedforward_table import main as feedforward_table
from dni_seq.app.studies.figures import draw_curves
from dni_seq.app.studies.grid import ABLATION, COLUMNS, TableCell
from dni_seq.app.studies.records import around_tables, read_lines, write_tables
from dni_seq.app.studies.tables import MARKS, TASKS, tables
from dni_seq.app.studies.trial_runner import Study, Trial
from dni_seq.app.studies.trials import ablation_trials, measure, table_trials, tie_trials, tuning_trials

_PROG = "reproduce_paper"


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit status."""
    options = parse(arguments)
    if options.part == "figure":
        return feedforward_table([] if options.max_runs is None else ["--max-runs", str(options.max_runs)])
    try:
        around_tables(options.page, MARKS)
        status = 0
        if options.part != "draw":
            lines = read_lines(options.results)
            trials = trials_of(options, lines)
            if options.dry_run:
                return list_missing(trials, lines)
            study = Study(options.scratch, options.results, options.jobs, measure)
            status = run(study, trials, lines, options.max_minutes)
        lines = read_lines(options.results)
        write_tables(options.page, MARKS, tables(lines))
        if options.part == "draw" or find_spec("matplotlib") is not None:
            for path in draw_curves(lines, options.page.with_suffix("")):
                print(f"drawn      {path}", flush=True)
        else:
            print("no curves were drawn because matplotlib is missing: pip install 'dni-seq[plots]', then run draw")
    except (ValueError, OSError) as error:
        return report(_PROG, error)
    return status


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Returns the parsed command line. An error ends the process with one line on stderr and exit status 2."""
    parser = OneLineParser(
        prog=_PROG, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parts = parser.add_subparsers(dest="part", required=True)
    table = parts.add_parser("table1", help="run the trials of Table 1: tasks and T by columns", allow_abbrev=False)
    table.add_argument("--task", choices=TASKS, required=True, help="task of the cells")
    table.add_argument("--bptt", type=positive, nargs="+", required=True, metavar="T", help="window lengths in steps")
    table.add_argument("--synthesizer", choices=COLUMNS, nargs="+", default=list(COLUMNS), help="columns (default: all)")
    table.add_argument("--budget", choices=("small", "paper"), default="small", help="length of a run (default: small)")
    instead = table.add_mutually_exclusive_group()
    instead.add_argument("--tune", action="store_true", help="run the grid of learning rates instead of the trials")
    instead.add_argument("--break-ties", action="store_true", help="run the tied best rates again with the full budget")
    table.add_argument("--data-file", metavar="FILE", help="text to use instead of Penn Treebank")
    away = parts.add_parser("ablation", help="run variants with one part removed or added", allow_abbrev=False)
    ablated = [task for task, _ in ABLATION]
    away.add_argument("--task", choices=ablated, nargs="+", default=ablated, help="tasks (default: all)")
    for part in (table, away):
        part.add_argument(
            "--seeds", type=positive, default=3, help="number of seeds, from 0 on (default: 3; --tune has its own seed)"
        )
        part.add_argument("--lr", type=rate, help="learning rate of the network instead of the tuned one")
        part.add_argument("--synthesizer-lr", type=rate, help="learning rate of the synthesizer, with --lr")
        part.add_argument("--jobs", type=positive, default=1, help="number of trials in parallel (default: 1)")
        part.add_argument(
            "--max-minutes", type=rate, metavar="M", help="start no trial that would end after this many minutes"
        )
        part.add_argument("--dry-run", action="store_true", help="list the missing trials and run nothing")
        scratch = Path("runs/reproduce_paper")
        part.add_argument("--scratch", type=Path, default=scratch, metavar="DIR", help=f"runs (default: {scratch})")
    figure = parts.add_parser("figure", help="reproduce the other figures of the paper")
    figure.add_argument("which", choices=("feedforward",), help="which figure")
    figure.add_argument("--max-runs", type=positive, metavar="N", help="make at most N of the missing runs")
    for part in (table, away, parts.add_parser("draw", help="only write tables and curves", allow_abbrev=False)):
        for name, suffix, text in (("--results", "jsonl", "lines of results"), ("--page", "md", "page for the tables")):
            path = Path(f"docs/results/paper.{suffix}")
            part.add_argument(name, type=Path, default=path, metavar="FILE", help=f"{text} (default: {path})")
    options = parser.parse_args(arguments)
    if getattr(options, "synthesizer_lr", None) is not None and options.lr is None:
        parser.error("--synthesizer-lr needs --lr: add --lr")
    return options


def positive(text: str) -> int:
    """Returns `text` as an integer of 1 or more."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be 1 or more, got {text}")
    return number


def rate(text: str) -> float:
    """Returns `text` as a finite number above 0."""
    number = float(text)
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"must be a finite number above 0, got {text}")
    return number


def trials_of(options: argparse.Namespace, lines: list[dict[str, Any]]) -> list[Trial]:
    """Returns the trials that the options of the command line select.

    Raises:
        ValueError: options exclude each other, the text does not exist, or learning rates are missing.
    """
    given = None if options.lr is None else (options.lr, options.synthesizer_lr)
    if options.part == "ablation":
        return ablation_trials(lines, options.task, options.seeds, given)
    if options.tune and options.lr is not None:
        raise ValueError("--tune tries a grid of learning rates: remove --lr")
    data_file = None if options.data_file is None else Path(options.data_file)
    if data_file is not None:
        if options.task != "ptb" or options.tune or options.break_ties:
            raise ValueError("--data-file needs --task ptb and uses the rates tuned there: remove --tune and --break-ties")
        if not data_file.is_file():
            raise ValueError(f"--data-file {options.data_file} does not exist")
    cells = [
        TableCell(options.task, bptt, column, options.budget)
        for bptt, column in itertools.product(options.bptt, options.synthesizer)
    ]
    if options.tune:
        return tuning_trials(cells)
    if options.break_ties:
        return tie_trials(lines, cells)
    return table_trials(lines, cells, options.seeds, given, data_file)


def list_missing(trials: Sequence[Trial], lines: list[dict[str, Any]]) -> int:
    """Prints the missing trials with their estimated minutes and returns the exit status 0."""
    done, minutes = {line["key"] for line in lines}, minutes_by(lines)
    missing = [trial for trial in trials if trial.key() not in done]
    for trial in missing:
        print(f"{minutes(trial):7.1f} min  {trial.name()}")
    print(f"{sum(map(minutes, missing)):7.1f} min in {len(missing)} missing trials of {len(trials)}")
    return 0


def run(study: Study, trials: Sequence[Trial], lines: list[dict[str, Any]], limit: float | None) -> int:
    """Runs the missing trials within `limit` minutes.

    Returns:
        0 if no trial failed, 1 if one failed, and the signal's status after a signal.
    """
    with StopSignals() as stop:
        outcome = study.run(trials, minutes_by(lines), limit, stop)
    print(outcome.describe(), flush=True)
    return stop.exit_status or (1 if outcome.failed else 0)
