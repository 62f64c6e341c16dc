"""Code shared by the studies whose trials are runs of `python scripts/train_lm.py`, as a user would type them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from trials import Line, Trial, best_value

ROOT = Path(__file__).resolve().parents[2]


def as_options(given: Mapping[str, Any]) -> list[str]:
    """Returns the words of the command line for options that are given by their names without dashes."""
    return [part for name, value in given.items() for part in (f"--{name}", str(value))]


def command_of(given: Mapping[str, Any]) -> str:
    """Returns the command that a user would type, as text."""
    return " ".join(["python scripts/train_lm.py", *as_options(given)])


def train(given: Mapping[str, Any], data: Path, folder: Path) -> dict[str, Any]:
    """Starts the run in `folder`, or resumes it, by the training command, and returns the run's summary.

    Args:
        given: options by their names without dashes.
        data: folder that holds the data sets.
        folder: the run directory.
    """
    call = [sys.executable, str(ROOT / "scripts" / "train_lm.py"), *as_options(given)]
    call += ["--data-dir", str(data.resolve()), "--run-dir", str(folder), "--resume", "auto", "--logger", "none"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    subprocess.run(call, check=True, env=environment, stdout=subprocess.DEVNULL)
    return dict(json.loads((folder / "summary.json").read_text(encoding="utf-8")))


def bracket_rate(
    known: dict[str, Line], make: Callable[[float], Trial], rates: Sequence[float], score: Callable[[Line], float]
) -> tuple[list[Trial], float | None]:
    """Returns the trials that are needed to find the best learning rate, and this rate.

    At first the trials are those at `rates`. As long as the best rate is the lowest or the highest one tried, the next rate
    beyond it, half or twice as large, is tried too. So the best rate in the end has a worse neighbour on both sides.

    Args:
        known: the recorded lines.
        make: a function from a rate to a trial.
        rates: the first rates, in rising order, each twice the one before.
        score: a function from a line to its score; lower is better.

    Returns:
        The trials, and the best rate, None while one of the trials is missing.
    """
    tried = list(rates)
    while True:
        trials = [make(rate) for rate in tried]
        best: float | None = best_value(known, trials, "lr", score)
        if best == tried[-1]:
            tried.append(2 * best)
        elif best == tried[0]:
            tried.insert(0, best / 2)
        else:
            return trials, best
