"""The frontier study: the best quality over CPU time and over memory, by task and method, with the classes of the library.

python benchmarks/frontier/study.py time --data DIR
    Measure the CPU time of an update of each method, in turns on an idle machine. Budgets are counted by these times.
python benchmarks/frontier/study.py run --data DIR --max-minutes 60
    Run the missing trials, the most important first. Several processes may run side by side.
python benchmarks/frontier/study.py run --only far
    Run copying and repeat copy in windows of 4 steps for 200,000 updates.
python benchmarks/frontier/study.py run --only ablation --data DIR
    Run the ablation, which changes one choice of a predictive message at a time.
python benchmarks/frontier/study.py plan
    Print the missing trials with estimates of their CPU hours.
python benchmarks/frontier/study.py table
    Write the tables between the marks of docs/results/frontier.md.
python benchmarks/frontier/study.py draw
    Draw docs/images/frontier_time.svg and frontier_memory.svg. Needs matplotlib.

DIR holds ptb.train.txt, ptb.valid.txt and ptb.test.txt.
Text: Penn Treebank by words (LSTM of 2 layers of 200 units, 20 lanes, clip 0.25, SGD), and by characters (LSTM of 512 units,
64 lanes, clip 1, Adam). The learning rate falls linearly to zero over the budget.
Sequences: copying without and with distractors, repeat copy and adding (LSTM of 256 units, 32 lanes, clip 5, Adam). The
learning rate is constant.
A method makes as many updates as fit in a budget, if each update has the time that was measured on an idle machine. One
thread. No trial begins that would bring the study over --max-hours. Lines of benchmarks/predictive_messages/words.py with
the same settings, which were made with Adam, count as lines of this study.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import sequence_tasks
import text_tasks
import torch
from methods import kind_of
from plans import GROUPS, TEXT, Known, forecast, group_of, plan
from records import Times, all_lines, estimate, read_times, reused, spent
from timing import kinds_of, measure

from dni_seq.app.runs.allocator import keep_freed_memory

sys.path.insert(0, str(Path(__file__).parents[1] / "studies"))
from trials import Line, Trial, key_of, work

ROOT = Path(__file__).parents[2]
RESULTS, STUDY = ROOT / "docs" / "results" / "frontier.jsonl", ROOT / "docs" / "results" / "predictive_messages.jsonl"
PAGE, IMAGES = ROOT / "docs" / "results" / "frontier.md", ROOT / "docs" / "images"
MOST_HOURS = 20.0


def fail(reason: str) -> SystemExit:
    """Prints a line on stderr and returns the exception that ends the command with status 2, for bad input."""
    print(f"study.py: {reason}", file=sys.stderr)
    return SystemExit(2)


class Runner:
    """Runs trials, and reads each text only once.

    Args:
        options: the options of the command.
    """

    def __init__(self, options: argparse.Namespace) -> None:
        self.results, self.data = options.results, options.data
        self.splits = cache(lambda task: text_tasks.Splits(text_tasks.TASKS[task], self.data))

    def __call__(self, trial: Trial, checkpoint: Path) -> Line:
        """Trains to the end of the trial's budget and returns its line.

        The bytes that an update saves are those that the part "time" of the command has recorded for its kind.
        """
        times = read_times(self.results)
        time_of = times.of(trial)
        assert time_of is not None
        if trial["task"] in TEXT:
            line = text_tasks.run(trial, checkpoint, self.splits(trial["task"]), times.of_text(trial["task"]))
        else:
            line = sequence_tasks.run(trial, checkpoint, time_of)
        return {**line, "saved_bytes": times.saved_by(trial)}


def affordable(own: Known, options: argparse.Namespace) -> Iterator[Trial]:
    """Yields the missing trials that can be run now, as long as the hours used and estimated do not exceed --max-hours."""
    extra, times = reused(options.study), read_times(options.results)
    hours = spent(own)
    for trial in plan({**extra, **own}, options.only):
        if key_of(trial) not in own and key_of(trial) not in extra:
            hours += estimate(trial, times)
            if hours > options.max_hours:
                return
            yield trial


def print_plan(options: argparse.Namespace) -> None:
    """Prints each missing trial with the sum of hours up to this trial, and its own. Marks trials beyond --max-hours."""
    known, times = all_lines(options.results, options.study), read_times(options.results)
    ready = {key_of(trial) for trial in plan(known, options.only)}
    hours, used = 0.0, spent(known)
    for trial in forecast(known, options.only):
        own = estimate(trial, times)
        hours += own
        when = "now  " if key_of(trial) in ready else "later"
        beyond = "  beyond the limit" if used + hours > options.max_hours else ""
        print(f"{hours:6.2f} h  {own:5.2f} h  {when}  {key_of(trial)}{beyond}")
    print(f"{used:.2f} h used, at most {hours:.2f} h to go; limit {options.max_hours:g} h")


def time_all(options: argparse.Namespace) -> None:
    """Measures the update times of the kinds of all trials of the chosen groups that are planned or recorded."""
    known = all_lines(options.results, options.study)
    recorded = [line["trial"] for line in known.values() if group_of(line["trial"]) in options.only]
    kinds = kinds_of([*forecast(known, options.only), *recorded])
    for task, trials in kinds.items():
        if not any(trial["method"] == "none" for trial in trials.values()):
            trials |= kinds_of(forecast({}, (task,)))[task]  # adds a reference, truncated BPTT, and the task's other kinds
        measure(task, trials, options.data, options.results, options.rounds)


def check_input(options: argparse.Namespace) -> None:
    """Checks that the texts and the update times that the part of the command needs exist.

    Raises:
        SystemExit: a text or an update time is missing.
    """
    if options.part not in ("run", "time"):
        return
    trials = forecast(all_lines(options.results, options.study), options.only)
    texts = [options.data / f"ptb.{split}.txt" for split in ("train", "valid", "test")]
    if any(trial["task"] in TEXT for trial in trials) and not all(path.exists() for path in texts):
        raise fail(f"{options.data} does not hold {', '.join(path.name for path in texts)}: give their folder with --data")
    if options.part == "run":
        check_times(trials, read_times(options.results), options)


def check_times(trials: list[Trial], times: Times, options: argparse.Namespace) -> None:
    """Checks that the update time of every trial is recorded.

    Raises:
        SystemExit: the update time of a trial is missing.
    """
    for trial in trials:
        if times.of(trial) is None:
            what = f"{options.results} has no time of {trial['task']}, {kind_of(trial)}"
            raise fail(f"{what}: run `time --only {' '.join(options.only)}` on an idle machine first")


def parse() -> argparse.Namespace:
    """Returns the options of the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("time", "run", "plan", "table", "draw"))
    parser.add_argument("--only", nargs="+", choices=GROUPS, default=GROUPS, metavar="GROUP", help=", ".join(GROUPS))
    parser.add_argument("--data", type=Path, default=Path("data/ptb"), metavar="DIR", help="folder of the texts")
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="FILE", help="lines of this study")
    parser.add_argument("--study", type=Path, default=STUDY, metavar="FILE", help="lines of the study on words")
    parser.add_argument("--scratch", type=Path, default=Path("runs/frontier"), metavar="DIR", help="claims and checkpoints")
    parser.add_argument("--page", type=Path, default=PAGE, metavar="FILE", help="where table writes")
    parser.add_argument("--images", type=Path, default=IMAGES, metavar="DIR", help="where draw writes")
    parser.add_argument("--rounds", type=int, default=9, metavar="N", help="turns that time counts; 0 for memory alone")
    parser.add_argument("--max-minutes", type=float, default=math.inf, metavar="M", help="start no trial later than this")
    parser.add_argument("--max-hours", type=float, default=MOST_HOURS, metavar="H", help="CPU hours of all trials together")
    options = parser.parse_args()
    options.only = tuple(options.only)
    return options


def main() -> None:
    """Runs the command."""
    options = parse()
    torch.set_num_threads(1)
    keep_freed_memory()
    check_input(options)
    parts: dict[str, Any] = {"plan": print_plan, "time": time_all, "run": run_all, "table": write_page, "draw": draw}
    parts[options.part](options)


def run_all(options: argparse.Namespace) -> None:
    """Runs the missing trials."""
    wanted = Runner(options)
    work(options.results, options.scratch, lambda own: affordable(own, options), wanted, options.max_minutes)


def write_page(options: argparse.Namespace) -> None:
    """Writes the tables to the page."""
    from report import write

    write(options.page, all_lines(options.results, options.study), read_times(options.results))


def draw(options: argparse.Namespace) -> None:
    """Draws the pictures."""
    from picture import draw_all

    draw_all(options.images, all_lines(options.results, options.study), read_times(options.results))


if __name__ == "__main__":
    main()
