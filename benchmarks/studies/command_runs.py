"""What studies share whose trials are runs of `python scripts/train_lm.py`, as a user would type them."""

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
    """The command's options, by their names without dashes."""
    return [part for name, value in given.items() for part in (f"--{name}", str(value))]


def command_of(given: Mapping[str, Any]) -> str:
    """The command that a user would type."""
    return " ".join(["python scripts/train_lm.py", *as_options(given)])


def train(given: Mapping[str, Any], data: Path, folder: Path) -> dict[str, Any]:
    """Trains by the command, from where the folder's run stands, and returns the run's summary.

    Args:
        given: options by their names without dashes.
        data: holds the data sets.
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
    """The trials at `rates`, doubled or halved beyond their ends, and the best rate once it has both neighbours.

    Args:
        known: the lines on record.
        make: a trial at a rate.
        rates: the first rates, in rising order, each twice the one before.
        score: of a line; lower is better.
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
