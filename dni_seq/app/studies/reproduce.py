"""Reproduces Table 1 of Jaderberg et al. 2017 (arXiv 1608.05343) and runs an ablation of its recipe and of the default.

python scripts/reproduce_paper.py table1 --task copy --bptt 4 --tune --jobs 2
    Tune the learning rates: the same grid for every column, one seed, a quarter of the budget.
python scripts/reproduce_paper.py table1 --task copy --bptt 4 --break-ties --jobs 2
    Run the rates that are tied for best in that grid again, with the full budget; the best of them is used.
python scripts/reproduce_paper.py table1 --task copy --bptt 2 4 --jobs 2
    Run the trials with 3 seeds and the best rates, tuned at the nearest T; then write tables and curves.
python scripts/reproduce_paper.py table1 --task ptb --bptt 1 2 4 8 --synthesizer none paper multi-horizon --max-minutes 60
    Run some columns on Penn Treebank; a trial that would end after the hour is not started.
python scripts/reproduce_paper.py table1 --task ptb --bptt 1 --data-file book.txt
    The same on another text, by characters, with the rates of Penn Treebank.
python scripts/reproduce_paper.py ablation --jobs 2
    Remove single parts from the default, and add single parts to the published recipe.
python scripts/reproduce_paper.py draw
    Only write tables and curves from docs/results/paper.jsonl.
python scripts/reproduce_paper.py figure feedforward
    Run the MNIST rows: scripts/feedforward_table.py.

A trial is one training by train_lm.py or train_tasks.py in its own process, and one line of results. Recorded trials are not
run again. A stopped (Ctrl-C) or killed call loses a minute of work and resumes when it is repeated. Several calls may share
the files. --dry-run lists the missing trials with their estimated minutes.
"""

from __future__ import annotations

import argparse
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from dni_seq.app.runs.options import OneLineParser, report
from dni_seq.app.runs.signals import StopSignals
from dni_seq.app.studies.feedforward_table import main as feedforward_table
from dni_seq.app.studies.figures import draw_curves
from dni_seq.app.studies.grid import ABLATION, BUDGETS, COLUMNS, TUNING_SEED, TUNING_SHARE, VALIDATIONS, added, without
from dni_seq.app.studies.records import around_tables, read_lines, write_tables
from dni_seq.app.studies.tables import MARKS, TASKS, Rates, tables
from dni_seq.app.studies.trial_runner import Outcome, Study, Trial
from dni_seq.app.studies.tuning import alike, rates_of, rates_to_try, reach, tied_rates
from dni_seq.synthesizers.for_model import HORIZONS

_PROG = "reproduce_paper"


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit status."""
    options = parse(arguments)
    if options.part == "figure":
        return feedforward_table([])
    try:
        around_tables(options.page, MARKS)
        status = 0
        if options.part != "draw":
            lines = read_lines(options.results)
            trials = table1(options, lines) if options.part == "table1" else ablation(options, lines)
            if options.dry_run:
                return list_missing(trials, lines)
            status = run(trials, lines, options)
        draw(options)
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
    table.add_argument("--task", choices=TASKS, required=True)
    table.add_argument("--bptt", type=positive, nargs="+", required=True, metavar="T")
    table.add_argument("--synthesizer", choices=COLUMNS, nargs="+", default=list(COLUMNS))
    table.add_argument("--budget", choices=("small", "paper"), default="small")
    instead = table.add_mutually_exclusive_group()
    instead.add_argument("--tune", action="store_true", help="run the grid of learning rates instead of the trials")
    instead.add_argument("--break-ties", action="store_true", help="run the tied best rates again with the full budget")
    table.add_argument("--data-file", metavar="FILE", help="text to use instead of Penn Treebank")
    away = parts.add_parser("ablation", help="run variants with one part removed or added", allow_abbrev=False)
    away.add_argument("--task", choices=[task for task, _ in ABLATION], nargs="+", default=[task for task, _ in ABLATION])
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
        part.add_argument("--scratch", type=Path, default=Path("runs/reproduce_paper"), metavar="DIR")
    figure = parts.add_parser("figure", help="reproduce the other figures of the paper")
    figure.add_argument("which", choices=("feedforward",))
    for part in (table, away, parts.add_parser("draw", help="only write tables and curves", allow_abbrev=False)):
        part.add_argument("--results", type=Path, default=Path("docs/results/paper.jsonl"), metavar="FILE")
        part.add_argument("--page", type=Path, default=Path("docs/results/paper.md"), metavar="FILE")
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


def table1(options: argparse.Namespace, lines: list[dict[str, Any]]) -> list[Trial]:
    """Returns the trials of a call, with seeds outermost, so an unfinished study has a complete table of fewer seeds."""
    if options.tune and options.lr is not None:
        raise ValueError("--tune tries a grid of learning rates: remove --lr")
    if options.data_file is not None:
        if options.task != "ptb" or options.tune or options.break_ties:
            raise ValueError("--data-file needs --task ptb and uses the rates tuned there: remove --tune and --break-ties")
        if not Path(options.data_file).is_file():
            raise ValueError(f"--data-file {options.data_file} does not exist")
    if options.tune or options.break_ties:
        part = "tune" if options.tune else "ties"
        return [
            make_trial(part, options, options.task, bptt, column, COLUMNS[column], TUNING_SEED, rates)
            for bptt, column in itertools.product(options.bptt, options.synthesizer)
            for rates in (rates_to_try(column) if options.tune else tied_rates(options, lines, column, bptt))
        ]
    return [
        make_trial("table1", options, options.task, bptt, column, COLUMNS[column], seed, rates)
        for seed, bptt, column in itertools.product(range(options.seeds), options.bptt, options.synthesizer)
        for rates in [rates_of(options, alike(lines, COLUMNS[column], bptt), options.task, column, bptt)]
    ]


def ablation(options: argparse.Namespace, lines: list[dict[str, Any]]) -> list[Trial]:
    """Returns the trials of the ablation: two bases, each with one change, with the learning rates of the base."""
    options.budget, options.data_file = "small", None
    trials = []
    for seed, (task, bptt) in itertools.product(range(options.seeds), ABLATION):
        if task not in options.task:
            continue
        for base, variants in (("multi-horizon", without(bptt)), ("paper", added(bptt))):
            # All variants use the rates tuned with two horizons, which most variants have, also if the default is four.
            rates = rates_of(options, alike(lines, {**COLUMNS[base], "horizons": HORIZONS}, bptt), task, base, bptt)
            for variant, change in variants.items():
                settings = {**COLUMNS[base], **change}
                if settings.get("synthetic_scale") == "auto":
                    settings.pop("fidelity_every", None)
                trials.append(make_trial("ablation", options, task, bptt, base, settings, seed, rates, variant=variant))
    return trials


def make_trial(
    part: str,
    options: argparse.Namespace,
    task: str,
    bptt: int,
    column: str,
    settings: Mapping[str, Any],
    seed: int,
    rates: Rates,
    **more: str,
) -> Trial:
    """Returns one trial with the command's options from budget, column and rates."""
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
        return Trial("train_lm", {**about, "seed": seed}, {**text, **chosen}, paths)
    start = {"start": budget.start} if task == "copy" and budget.start else {}
    updates = budget.task["updates"] // share
    return Trial(
        "train_tasks", {**about, "seed": seed}, {**budget.task, "task": task, "updates": updates, **start, **chosen}
    )


def measure(trial: Trial, summary: dict[str, Any]) -> dict[str, Any]:
    """Returns the entries of a line that are specific to this study: result, curve, and length of the training."""
    if trial.script == "train_lm":
        result = {"valid_bpc": summary["valid"]["bpc"], "test_bpc": summary["test"]["bpc"]}
        return {"result": result, "curve": summary["curve"], "tokens": summary["tokens"], "updates": summary["steps"]}
    result = {"length": summary["length"], "stage": summary["stage"]}
    sizes = {"updates": summary["updates"], "sequences": summary["sequences"]}
    return {"result": result, "curve": summary["curve"], **sizes}


def minutes_by(lines: list[dict[str, Any]]) -> Callable[[Trial], float]:
    """Returns a function that estimates a trial's minutes from the latest similar trial, else by a rule of thumb."""
    known = {_kind(line, line["options"]): line["seconds"] / line["updates"] for line in lines}

    def minutes(trial: Trial) -> float:
        windows = windows_of(trial)
        return windows * known.get(_kind(trial.about, trial.options), rule_of_thumb(trial)) / 60

    return minutes


def _kind(about: Mapping[str, Any], options: Mapping[str, Any]) -> tuple[Any, ...]:
    changes = tuple(about.get(name) for name in ("task", "column", "bptt", "budget", "variant"))
    return (*changes, options["hidden"], options["batch_size"])


def windows_of(trial: Trial) -> int:
    """Returns the number of updates of a trial."""
    options = trial.options
    return int(options.get("updates") or math.ceil(options["max_tokens"] / (options["batch_size"] * options["bptt"])))


def rule_of_thumb(trial: Trial) -> float:
    """Returns the seconds per window on an idle core, extrapolated from copying with 256 units and 32 lanes."""
    steps, lanes, units = (trial.options[name] for name in ("bptt", "batch_size", "hidden"))
    added = {"none": 0.0, "paper": 8.5, "paper-aux": 11.0, "multi-horizon": 20.0, "exact": 11.0}[trial.about["column"]]
    plain = 2.2 + 1.2 * steps
    return (plain + added) * 1e-3 * max(lanes / 32, 1) ** 0.5 * (units / 256) ** 2


def list_missing(trials: Sequence[Trial], lines: list[dict[str, Any]]) -> int:
    """Prints the missing trials with their estimated minutes and returns the exit status 0."""
    done, minutes = {line["key"] for line in lines}, minutes_by(lines)
    missing = [trial for trial in trials if trial.key() not in done]
    for trial in missing:
        print(f"{minutes(trial):7.1f} min  {trial.name()}")
    print(f"{sum(map(minutes, missing)):7.1f} min in {len(missing)} missing trials of {len(trials)}")
    return 0


def run(trials: Sequence[Trial], lines: list[dict[str, Any]], options: argparse.Namespace) -> int:
    """Runs the missing trials. Returns 0 if none failed, 1 if one failed, and the signal's status after a signal."""
    study = Study(options.scratch, options.results, options.jobs, measure)
    with StopSignals() as stop:
        outcome = study.run(trials, minutes_by(lines), options.max_minutes, stop)
    print(summary_of(outcome), flush=True)
    return stop.exit_status or (1 if outcome.failed else 0)


def summary_of(outcome: Outcome) -> str:
    """Returns the outcome of the trials as one line."""
    parts = {
        "done": outcome.done,
        "failed": len(outcome.failed),
        "run by another process": outcome.locked_elsewhere,
        "not started for lack of time": outcome.out_of_time,
        "stopped": outcome.stopped,
    }
    return "trials: " + ", ".join(f"{count} {what}" for what, count in parts.items() if count or what == "done")


def draw(options: argparse.Namespace) -> None:
    """Writes tables and curves from the recorded lines. After runs, skips the curves if matplotlib is missing.

    Raises:
        ValueError: the command is `draw` and matplotlib is missing; the tables are written before.
    """
    lines = read_lines(options.results)
    write_tables(options.page, MARKS, tables(lines))
    if options.part != "draw" and find_spec("matplotlib") is None:
        print("no curves were drawn because matplotlib is missing: pip install 'dni-seq[plots]', then run draw", flush=True)
        return
    for path in draw_curves(lines, options.page.with_suffix("")):
        print(f"drawn      {path}", flush=True)
