"""Compares estimators of the gradient on three tasks: delayed echo, sequential digits, Penn Treebank by characters.

python benchmarks/estimators/compare.py run --only echo digits --max-minutes 60
    Run the missing trials, the most important first. Several processes may run side by side.
python benchmarks/estimators/compare.py time --only echo digits
    Measure the time and the memory of a step of each column, in turns. The table needs them to compare at equal CPU time.
python benchmarks/estimators/compare.py table --only echo digits
    Write the tables between the marks of docs/estimators.md.
python benchmarks/estimators/compare.py run --only characters --data data
    Run the trials on Penn Treebank by characters, from the files data/ptb/ptb.{train,valid,test}.txt.

An estimator with its cell is called a column. Each of the 23 columns is tried at three learning rates on a quarter of the
text with seed 3. The best rate then runs on the whole text with seeds 0 to 2. A task thus has 138 trials.
A trial of T = 1 on the whole text needs about 11 CPU seconds for the echo and 15 for the digits. With traces or an exact
future it needs two to three times as much, with full BPTT 2 CPU seconds. All trials need about 25 CPU minutes for the echo,
35 for the digits, and 3 hours for the characters, whose trials need 40 to 250 CPU seconds each.

On echo and digits an update follows each sequence and uses the sum of the gradients of its windows, so columns differ only
in the gradient. On characters an update follows each window. Adam, one thread.
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
"""Number of columns that are run before the others. All have the LRU.

They are truncated BPTT, full BPTT, exact traces, a frozen recurrence, and exact traces with a fixed input layer.
"""

TURNS_OF = 6
"""Number of columns that take turns with the reference in one measurement."""


def trial_of(task: str, column: str, rate: float, seed: int = TUNING_SEED, share: float = TUNING_SHARE) -> Trial:
    """Returns the settings of a trial."""
    return {"task": task, "column": column, "rate": rate, "seed": seed, "share": share}


def best_rate(known: dict[str, Line], task: str, column: str, rates: Iterable[float]) -> float | None:
    """Returns the rate of a column with the best tuning trial, None while a tuning trial is missing."""
    tried = [trial_of(task, column, rate) for rate in rates]
    found: float | None = best_value(known, tried, "rate", lambda line: float(line["score"]))
    return found


def plan(tasks: dict[str, tuple[float, ...]], known: dict[str, Line]) -> Iterator[Trial]:
    """Yields every trial that can be run now: the first columns of all tasks, then the others, task by task.

    Args:
        tasks: the learning rates to try for each task.
        known: the recorded lines.
    """
    names = list(BY_KEY)
    first, others = names[:FIRST], names[FIRST:]
    for task, column in [*itertools.product(tasks, first), *itertools.product(tasks, others)]:
        yield from (trial_of(task, column, rate) for rate in tasks[task])
        rate = best_rate(known, task, column, tasks[task])
        if rate is not None:
            yield from (trial_of(task, column, rate, seed, 1.0) for seed in SEEDS)


def measure(task: str, data: Path, results: Path) -> None:
    """Measures the CPU seconds of a step of text and the peak memory of every column, and records them in one line."""
    built, base = problem(task, data), key(COLUMNS[0])
    seconds: dict[str, float] = {}
    others = [name for name in BY_KEY if name != base]
    for start in range(0, len(others), TURNS_OF):
        names = [base, *others[start : start + TURNS_OF]]
        counts = dict.fromkeys(names, 3 * built.whole)
        arguments = {name: (task, data, name) for name in names}
        found = measure_in_turns(serve, arguments, counts, base, rounds=5)
        now = seconds.get(base, found[base]) / found[base]  # scales times of a busier moment to the first measurement
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
    """Returns a table of Markdown with a row for each column of a task."""
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
    """Returns the row of the table for a column of the comparison.

    Equal CPU time is the time that truncated BPTT with the same cell needs for the whole text. For a column that needs less
    time for the whole text, the score at equal CPU time is the final score.
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
    """Runs the command."""
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
