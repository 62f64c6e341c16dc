"""Compares estimators of the gradient on three tasks: delayed echo, sequential digits, Penn Treebank by characters.

python benchmarks/estimators/compare.py run --only echo digits --max-minutes 60
    The trials that are missing, in order of value; several processes may run side by side.
python benchmarks/estimators/compare.py time --only echo digits
    Time and memory of a step of each column, in turns: what equal CPU time is made of.
python benchmarks/estimators/compare.py table --only echo digits
    Writes the tables between the marks of docs/estimators.md.
python benchmarks/estimators/compare.py run --only characters --data data
    Penn Treebank, from DATA/ptb/ptb.{train,valid,test}.txt.

Each of the 23 columns is tried at three learning rates on a quarter of the text (seed 3), and then runs on all of it at the
best, with seeds 0 to 2: 138 trials a task. A whole trial of T = 1 needs about 11 CPU seconds for the echo and 15 for the
digits, one with traces or an exact future two to three times as much, one of full BPTT 2. Expected in all: 25 CPU minutes
for the echo, 35 for the digits, and 3 hours for the characters, whose trials need 40 to 250 CPU seconds.

Echo and digits: an update after each sequence, from the sum of its windows' gradients, so that columns differ by their
gradient alone. Characters: an update after each window. Adam, one thread.
"""

from __future__ import annotations

import argparse
import itertools
import math
import statistics
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from columns import BY_KEY, COLUMNS, Column, Learner, Line, Trial, key, run, score_at, serve
from problems import Problem, problem
from trials import best_value, key_of, lines_by_key, measure_in_turns, work

from dni_seq.app.runs.allocator import keep_freed_memory
from dni_seq.app.studies.records import append_line, markdown, mean_and_std, read_lines, write_tables

TASKS = ("echo", "digits", "characters")
SEEDS, TUNING_SEED, TUNING_SHARE = (0, 1, 2), 3, 0.25
MARKS = ("<!-- comparison: begin -->", "<!-- comparison: end -->")
BASE, REFERENCE = "truncated", "full BPTT"
FIRST = 5
"""Columns that are run before all others: truncated and full BPTT, exact traces, with and without what they need."""

TURNS_OF = 6
"""Columns that are timed in turns at once, beside the reference."""


def trial_of(task: str, column: str, rate: float, seed: int = TUNING_SEED, share: float = TUNING_SHARE) -> Trial:
    """A trial's settings."""
    return {"task": task, "column": column, "rate": rate, "seed": seed, "share": share}


def best_rate(known: dict[str, Line], task: str, column: str, rates: Iterable[float]) -> float | None:
    """The rate that tuning has chosen, None while one of its trials is missing."""
    tried = [trial_of(task, column, rate) for rate in rates]
    found: float | None = best_value(known, tried, "rate", lambda line: float(line["score"]))
    return found


def plan(tasks: dict[str, tuple[float, ...]], known: dict[str, Line]) -> Iterator[Trial]:
    """Every trial that can be run now: the first columns of all tasks, then the others, task by task.

    Args:
        tasks: the rates of each task.
        known: the lines on record.
    """
    names = list(BY_KEY)
    first, others = names[:FIRST], names[FIRST:]
    for task, column in [*itertools.product(tasks, first), *itertools.product(tasks, others)]:
        yield from (trial_of(task, column, rate) for rate in tasks[task])
        rate = best_rate(known, task, column, tasks[task])
        if rate is not None:
            yield from (trial_of(task, column, rate, seed, 1.0) for seed in SEEDS)


def measure(task: str, data: Path, results: Path) -> None:
    """Puts CPU seconds a step of text and the peak memory of every column on record."""
    built, base = problem(task, data), key(COLUMNS[0])
    seconds: dict[str, float] = {}
    others = [name for name in BY_KEY if name != base]
    for start in range(0, len(others), TURNS_OF):
        names = [base, *others[start : start + TURNS_OF]]
        counts = dict.fromkeys(names, 3 * built.whole)
        arguments = {name: (task, data, name) for name in names}
        found = measure_in_turns(serve, arguments, counts, base, rounds=5)
        now = seconds.get(base, found[base]) / found[base]  # the machine is busier at some times than at others
        seconds |= {name: round(now * found[name], 6) for name in names}
    peaks = {}
    for name, column in BY_KEY.items():
        learner = Learner(built, column, 1e-3, 0)
        for _ in range(2 * built.whole):
            learner.step()
        peaks[name] = round(learner.peak())
    day = time.strftime("%Y-%m-%d")
    append_line(results, {"study": task, "step_seconds": seconds, "peak_kib": peaks, "date": day})


def table(task: str, built: Problem, results: Path) -> str:
    """The lines of a task as a table of Markdown."""
    known = lines_by_key(results)
    timed = [line for line in read_lines(results) if line.get("study") == task]
    seconds, peaks = (timed[-1][name] if timed else {} for name in ("step_seconds", "peak_kib"))
    finals: dict[str, list[Line]] = {}
    for line in known.values():
        trial = line["trial"]
        if trial["task"] == task and trial["share"] == 1:
            finals.setdefault(trial["column"], []).append(line)
    header = ("cell", "gradient", "rate", f"score, {built.unit}", "gap closed", "at equal CPU time")
    header = (*header, "cosine", "ms a step", "peak KiB", "reach", "needs the future?")
    rows = [row(column, built, finals, seconds, peaks) for column in COLUMNS if key(column) in finals]
    return markdown(header, rows)


def row(
    column: Column, built: Problem, finals: dict[str, list[Line]], seconds: dict[str, float], peaks: dict[str, int]
) -> tuple[str, ...]:
    """One column of the comparison, which is a row of the table.

    Equal CPU time is that of truncated BPTT with the same cell on all of the text. A column that has read the text by then
    counts as it ended.
    """
    name, base = key(column), f"{column.cell}: {BASE}"
    lines = finals[name]
    score = statistics.mean(line["score"] for line in lines)
    worst, best = (
        statistics.mean([line["score"] for line in finals.get(f"{column.cell}: {end}", [])] or [math.nan])
        for end in (BASE, REFERENCE)
    )
    equal = "–"
    if name in seconds and base in seconds:
        steps = lines[0]["steps"] * seconds[base] / seconds[name]
        equal = mean_and_std((score_at(line["curve"], steps) for line in lines), built.decimals)
    return (
        column.cell,
        f"{column.name}, T = {column.window(built)}",
        f"{lines[0]['trial']['rate']:g}",
        mean_and_std((line["score"] for line in lines), built.decimals),
        f"{100 * (worst - score) / (worst - best):.0f} %" if worst != best else "–",
        equal,
        f"{statistics.mean(line['cosine'] for line in lines):.2f}",
        f"{1000 * seconds[name]:.2f}" if name in seconds else "–",
        str(peaks.get(name, "–")),
        column.reach,
        "yes" if column.future else "no",
    )


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("time", "run", "table", "plan"))
    parser.add_argument("--only", nargs="+", choices=TASKS, default=TASKS, metavar="TASK")
    parser.add_argument(
        "--columns", nargs="+", choices=BY_KEY, metavar="COLUMN", help='run: these alone, e.g. "lstm: truncated"'
    )
    parser.add_argument("--results", type=Path, default=Path("docs/results/estimators.jsonl"), metavar="FILE")
    parser.add_argument("--scratch", type=Path, default=Path("runs/estimators"), metavar="DIR")
    parser.add_argument("--data", type=Path, default=Path("data"), metavar="DIR", help="holds ptb/ptb.train.txt")
    parser.add_argument("--page", type=Path, default=Path("docs/estimators.md"), metavar="FILE")
    parser.add_argument("--max-minutes", type=float, default=math.inf, metavar="M", help="start no trial later than this")
    options = parser.parse_args()
    torch.set_num_threads(1)
    keep_freed_memory()
    problems = {name: problem(name, options.data) for name in options.only}
    rates = {name: built.rates for name, built in problems.items()}

    def wanted(known: dict[str, Line]) -> Iterator[Trial]:
        chosen = options.columns or BY_KEY
        return (trial for trial in plan(rates, known) if trial["column"] in chosen)

    if options.part == "plan":
        known = lines_by_key(options.results)
        print("\n".join(key_of(trial) for trial in wanted(known) if key_of(trial) not in known))
    elif options.part == "time":
        for name in problems:
            measure(name, options.data, options.results)
    elif options.part == "table":
        tables = (f"**{name}**\n\n{table(name, built, options.results)}" for name, built in problems.items())
        write_tables(options.page, MARKS, "\n".join(tables))
    else:
        work(
            options.results,
            options.scratch,
            wanted,
            lambda trial, _: run(trial, problems[trial["task"]]),
            options.max_minutes,
        )


if __name__ == "__main__":
    main()
