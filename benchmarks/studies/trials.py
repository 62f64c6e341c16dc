"""Code shared by studies: trials as JSON lines, claims of trials by processes, and the choice of the next trial.

A trial is a dict of settings. When a trial has been run, its line in the results file has the settings under "trial" and the
measurements beside them. A study that was stopped resumes with the trials that have no line. A plan is a function from the
recorded lines to the trials that can be run now, the most important first.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import statistics
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, BinaryIO

import torch

from dni_seq.app.studies.records import append_line, read_lines
from dni_seq.app.studies.trial_runner import locked

Trial = dict[str, Any]
Line = dict[str, Any]


def key_of(trial: Trial) -> str:
    """Returns the settings of a trial as one string, which identifies the trial."""
    return json.dumps(trial, sort_keys=True)


def lines_by_key(results: Path) -> dict[str, Line]:
    """Returns the recorded lines by the key of their trial. Of several lines of one trial, only the last one is returned."""
    return {key_of(line["trial"]): line for line in read_lines(results) if "trial" in line}


def work(
    results: Path,
    scratch: Path,
    plan: Callable[[dict[str, Line]], Iterable[Trial]],
    run: Callable[[Trial, Path], Line],
    max_minutes: float,
) -> None:
    """Runs trials until no trial is left to claim or the time is over. Several processes may work on one results file.

    Args:
        results: the file of results.
        scratch: folder for claims and for checkpoints of unfinished trials.
        plan: a function from the recorded lines to the trials that can be run now.
        run: runs a trial, with a path for its checkpoint, and returns the entries of its line. The entry "process_seconds"
            is the CPU time of this process, unless `run` returns that entry too, as it does for a trial in another process.
        max_minutes: no trial starts later than this many minutes after the call.
    """
    scratch.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + 60 * max_minutes
    while time.monotonic() < deadline:
        taken = next_trial(results, scratch, plan)
        if taken is None:
            break
        trial, lock = taken
        with lock:
            begun = time.process_time()
            line = run(trial, checkpoint_path(scratch, trial))
            spent = round(time.process_time() - begun, 1)
            append_line(results, {"trial": trial, "process_seconds": spent, **line, "date": time.strftime("%Y-%m-%d")})
        print(key_of(trial), json.dumps({k: v for k, v in line.items() if k != "curve"}), f"{spent:.0f} s", flush=True)


def next_trial(
    results: Path, scratch: Path, plan: Callable[[dict[str, Line]], Iterable[Trial]]
) -> tuple[Trial, BinaryIO] | None:
    """Claims the first trial of the plan that is neither recorded nor claimed, and returns the trial with its lock.

    Returns None if the plan has no such trial.
    """
    for trial in plan(lines_by_key(results)):
        if key_of(trial) in lines_by_key(results):
            continue
        lock = claim(scratch, trial)
        if lock is None:
            continue
        if key_of(trial) not in lines_by_key(results):  # another process may have recorded the trial since the first check
            return trial, lock
        lock.close()
    return None


def checkpoint_path(scratch: Path, trial: Trial) -> Path:
    """Returns the path of the checkpoint of an unfinished trial."""
    name = "-".join(str(value) for _, value in sorted(trial.items()))
    return scratch / f"{name}.pt"


def save_whole(checkpoint: Path, parts: dict[str, Any]) -> None:
    """Writes a checkpoint atomically: a process that is killed while it writes leaves the older checkpoint."""
    unfinished = checkpoint.with_suffix(".new")
    torch.save(parts, unfinished)
    unfinished.replace(checkpoint)


def claim(scratch: Path, trial: Trial) -> BinaryIO | None:
    """Returns the trial's lock file, held until it is closed or the process ends; None if another process holds it."""
    return locked(checkpoint_path(scratch, trial).with_suffix(".claim"))


def best_value(
    known: dict[str, Line],
    trials: list[Trial],
    setting: str,
    score: Callable[[Line], float],
) -> Any:
    """Returns the value of `setting` in the trial with the lowest score; None while one of `trials` has no line."""
    if any(key_of(trial) not in known for trial in trials):
        return None
    return min(trials, key=lambda trial: _number(score(known[key_of(trial)])))[setting]


def _number(score: float) -> float:
    return score if math.isfinite(score) else math.inf


def measure_in_turns(
    serve: Callable[..., None],
    arguments: dict[str, tuple[Any, ...]],
    counts: dict[str, int],
    reference: str,
    rounds: int = 9,
) -> dict[str, float]:
    """Measures the CPU seconds of a step for several kinds of steps, which take turns; prints and returns the medians.

    Each kind has a process of its own, as a user's run has, because the contents of the memory influence the time.

    Args:
        serve: `serve(*arguments, pipe)` is the program of a process. It sends "ready", then receives numbers. For each
            number it makes this many steps and sends the CPU seconds of one step.
        arguments: the arguments of `serve` by kind.
        counts: number of steps in a turn by kind.
        reference: the kind with which the others are compared in the printed lines.
        rounds: number of rounds that are measured, in each of which every kind has one turn. One round before them warms up.
    """
    context = multiprocessing.get_context("spawn")
    pipes = {kind: context.Pipe() for kind in arguments}
    processes = [
        context.Process(target=serve, args=(*given, pipes[kind][1]), daemon=True) for kind, given in arguments.items()
    ]
    for process in processes:
        process.start()
    for ours, _ in pipes.values():
        ours.recv()  # no measurement begins while a process still loads
    samples: dict[str, list[float]] = {kind: [] for kind in arguments}
    for round_number in range(rounds + 1):
        for kind, (ours, _) in pipes.items():
            ours.send(counts[kind])
            seconds = ours.recv()
            if round_number:
                samples[kind].append(seconds)
    for process in processes:
        process.terminate()
    medians = {kind: round(statistics.median(values), 6) for kind, values in samples.items()}
    for kind, value in medians.items():
        spread = f"{1000 * min(samples[kind]):.2f} to {1000 * max(samples[kind]):.2f}"
        print(f"{1000 * value:8.2f} ms ({spread})  {value / medians[reference]:5.2f}  {kind}")
    return medians


def serve_steps(step: Callable[[], object], pipe: Any) -> None:
    """Serves `measure_in_turns`: for each number received, makes this many steps and sends the CPU seconds of one step.

    Never returns.
    """
    pipe.send("ready")
    while True:
        steps = pipe.recv()
        begun = time.process_time()
        for _ in range(steps):
            step()
        pipe.send((time.process_time() - begun) / steps)


def latest_times(results: Path, study: str, name: str) -> dict[str, Any]:
    """Returns the entry `name`, such as "step_seconds", of the last recorded line with times of a study.

    Raises:
        SystemExit: no times of the study are recorded.
    """
    found = [line[name] for line in read_lines(results) if line.get("study") == study]
    if not found:
        raise SystemExit(
            f"{results} has no {name.removesuffix('_seconds')} times: run the part 'time' on an idle machine first"
        )
    return dict(found[-1])


def print_plan(results: Path, plan: Callable[[dict[str, Line]], Iterable[Trial]]) -> None:
    """Prints the trials that can be run now and are not recorded."""
    known = lines_by_key(results)
    print("\n".join(key_of(trial) for trial in plan(known) if key_of(trial) not in known))


def study_parser(description: str, parts: tuple[str, ...] = ("time", "run", "table", "plan")) -> argparse.ArgumentParser:
    """Returns a parser with the options that all studies have."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=parts)
    parser.add_argument("--results", type=Path, default=Path("docs/results/predictive_messages.jsonl"), metavar="FILE")
    parser.add_argument("--scratch", type=Path, default=Path("runs/predictive_messages"), metavar="DIR")
    parser.add_argument("--max-minutes", type=float, default=math.inf, metavar="M", help="start no trial later than this")
    return parser


def run_part(
    options: argparse.Namespace,
    plan: Callable[[dict[str, Line]], Iterable[Trial]],
    runner: Callable[[], Callable[[Trial, Path], Line]],
    **others: Callable[[], object],
) -> None:
    """Runs the part of a study that the command names.

    Args:
        options: the options of `study_parser`.
        plan: as in `work`.
        runner: returns the function that runs a trial; called for the part "run" alone.
        **others: the other parts of the study, by name.
    """
    if options.part == "plan":
        print_plan(options.results, plan)
    elif options.part == "run":
        work(options.results, options.scratch, plan, runner(), options.max_minutes)
    else:
        others[options.part]()
