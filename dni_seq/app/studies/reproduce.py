"""Table 1 of Jaderberg et al. 2017 (arXiv 1608.05343), and what every part of the recipe brings.

python scripts/reproduce_paper.py table1 --task copy --bptt 4 --tune --jobs 2
    Learning rates: the same grid for every column, one seed, a quarter of the budget.
python scripts/reproduce_paper.py table1 --task copy --bptt 4 --break-ties --jobs 2
    The rates that solve the same length there, with the whole budget: the best of these is taken then, not the soonest.
python scripts/reproduce_paper.py table1 --task copy --bptt 2 4 --jobs 2
    The trials, 3 seeds, with the best rates of that grid, those of the T nearest to it; then tables and curves.
python scripts/reproduce_paper.py table1 --task ptb --bptt 1 2 4 8 --synthesizer none paper multi-horizon --max-minutes 60
    Some columns of the row of Penn Treebank; no trial is begun that would take longer than what is left of the hour.
python scripts/reproduce_paper.py table1 --task ptb --bptt 1 --data-file book.txt
    The same on other text, by characters, with the rates of Penn Treebank.
python scripts/reproduce_paper.py ablation --jobs 2
    Each part taken away from the default alone, and added to the published recipe alone.
python scripts/reproduce_paper.py draw
    Only the tables and curves, from the lines of docs/results/paper.jsonl.
python scripts/reproduce_paper.py figure feedforward
    The rows of MNIST: scripts/feedforward_table.py.

A trial is one training by train_lm.py or train_tasks.py in a process of its own, and one line of results. What is on record
is not run again. A call that is stopped (Ctrl-C) or killed loses a minute of work, the same call goes on; several calls may
share the files. --dry-run lists the trials that are missing with the minutes that each will take, about.
"""

from __future__ import annotations

import argparse
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from dni_seq.app.build.credit_options import HORIZONS
from dni_seq.app.runs.options import OneLineParser, report
from dni_seq.app.runs.signals import StopSignals
from dni_seq.app.studies.feedforward_table import main as feedforward_table
from dni_seq.app.studies.figures import draw_curves
from dni_seq.app.studies.grid import ABLATION, BUDGETS, COLUMNS, TUNING_SEED, TUNING_SHARE, VALIDATIONS, added, without
from dni_seq.app.studies.records import around_tables, read_lines, write_tables
from dni_seq.app.studies.tables import MARKS, TASKS, Rates, tables
from dni_seq.app.studies.trial_runner import Outcome, Study, Trial
from dni_seq.app.studies.tuning import alike, rates_of, rates_to_try, reach, tied_rates

_PROG = "reproduce_paper"


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
            trials = table1(options, lines) if options.part == "table1" else ablation(options, lines)
            if options.dry_run:
                return list_missing(trials, lines)
            status = run(trials, lines, options)
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
    instead.add_argument("--tune", action="store_true", help="the grid of learning rates instead of the trials")
    instead.add_argument("--break-ties", action="store_true", help="the best of that grid again, with the whole budget")
    table.add_argument("--data-file", metavar="FILE", help="other text in the place of Penn Treebank")
    away = parts.add_parser("ablation", help="one thing taken away, or added", allow_abbrev=False)
    away.add_argument("--task", choices=[task for task, _ in ABLATION], nargs="+", default=[task for task, _ in ABLATION])
    for part in (table, away):
        part.add_argument("--seeds", type=positive, default=3, help="from 0 on (default: 3; --tune has one of its own)")
        part.add_argument("--lr", type=rate, help="the network's learning rate, in the place of tuned ones")
        part.add_argument("--synthesizer-lr", type=rate, help="the synthesizer's, given with --lr")
        part.add_argument("--jobs", type=positive, default=1, help="trials side by side (default: 1)")
        part.add_argument("--max-minutes", type=rate, metavar="M", help="begin no trial that would end later than this")
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


def table1(options: argparse.Namespace, lines: list[dict[str, Any]]) -> list[Trial]:
    """The trials of a call, seeds outermost, so that a study that is not through has a whole table of fewer seeds."""
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
    """Two bases, each with one change; rates are those of the base, of the default with two horizons."""
    options.budget, options.data_file = "small", None
    trials = []
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
    """One trial: the command's options from budget, column and rates."""
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
    """What a line says beside what every line says: the result, the curve, and how long the training was."""
    if trial.script == "train_lm":
        result = {"valid_bpc": summary["valid"]["bpc"], "test_bpc": summary["test"]["bpc"]}
        return {"result": result, "curve": summary["curve"], "tokens": summary["tokens"], "updates": summary["steps"]}
    result = {"length": summary["length"], "stage": summary["stage"]}
    sizes = {"updates": summary["updates"], "sequences": summary["sequences"]}
    return {"result": result, "curve": summary["curve"], **sizes}


def minutes_by(lines: list[dict[str, Any]]) -> Callable[[Trial], float]:
    """How long a trial takes, about: as the latest ones like it a window, else by a rule of thumb."""
    known = {_kind(line, line["options"]): line["seconds"] / line["updates"] for line in lines}

    def minutes(trial: Trial) -> float:
        windows = windows_of(trial)
        return windows * known.get(_kind(trial.about, trial.options), rule_of_thumb(trial)) / 60

    return minutes


def _kind(about: Mapping[str, Any], options: Mapping[str, Any]) -> tuple[Any, ...]:
    changes = tuple(about.get(name) for name in ("task", "column", "bptt", "budget", "variant"))
    return (*changes, options["hidden"], options["batch_size"])


def windows_of(trial: Trial) -> int:
    """The updates of a trial."""
    options = trial.options
    return int(options.get("updates") or math.ceil(options["max_tokens"] / (options["batch_size"] * options["bptt"])))


def rule_of_thumb(trial: Trial) -> float:
    """Seconds a window on an idle core: a plain step, and what the column adds; as copying took with 256 units, 32 lanes."""
    steps, lanes, units = (trial.options[name] for name in ("bptt", "batch_size", "hidden"))
    added = {"none": 0.0, "paper": 8.5, "paper-aux": 11.0, "multi-horizon": 20.0, "exact": 11.0}[trial.about["column"]]
    plain = 2.2 + 1.2 * steps
    return (plain + added) * 1e-3 * max(lanes / 32, 1) ** 0.5 * (units / 256) ** 2


def list_missing(trials: Sequence[Trial], lines: list[dict[str, Any]]) -> int:
    """Print what is not on record, with its minutes."""
    done, minutes = {line["key"] for line in lines}, minutes_by(lines)
    missing = [trial for trial in trials if trial.key() not in done]
    for trial in missing:
        print(f"{minutes(trial):7.1f} min  {trial.name()}")
    print(f"{sum(map(minutes, missing)):7.1f} min in {len(missing)} trials that are missing of {len(trials)}")
    return 0


def run(trials: Sequence[Trial], lines: list[dict[str, Any]], options: argparse.Namespace) -> int:
    """Run what is missing; the exit status: 0 where nothing failed, else 1, after a signal that of the signal."""
    study = Study(options.scratch, options.results, options.jobs, measure)
    with StopSignals() as stop:
        outcome = study.run(trials, minutes_by(lines), options.max_minutes, stop)
    print(summary_of(outcome), flush=True)
    return stop.exit_status or (1 if outcome.failed else 0)


def summary_of(outcome: Outcome) -> str:
    """What became of the trials, in one line."""
    parts = {
        "done": outcome.done,
        "failed": len(outcome.failed),
        "run by another process": outcome.locked_elsewhere,
        "not begun for lack of time": outcome.out_of_time,
        "stopped": outcome.stopped,
    }
    return "trials: " + ", ".join(f"{count} {what}" for what, count in parts.items() if count or what == "done")


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
