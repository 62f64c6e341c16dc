"""What both studies share: trials as JSON lines, claimed by one process at a time, and the choice of the next trial.

A trial is a dict of settings. Its line in the results file holds the settings under "trial" and what was measured beside
them, so that a study that was stopped resumes with the trials that are missing. Plans are generators of trials over the
lines on record: a plan yields what can be run now, in order of value.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from dni_seq.app.studies.records import append_line, read_lines

Trial = dict[str, Any]
Line = dict[str, Any]


def key_of(trial: Trial) -> str:
    """The settings as one string, by which a trial is found again."""
    return json.dumps(trial, sort_keys=True)


def lines_by_key(results: Path) -> dict[str, Line]:
    """The lines on record by the key of their trial; the latest one counts."""
    return {key_of(line["trial"]): line for line in read_lines(results) if "trial" in line}


def work(
    results: Path,
    scratch: Path,
    plan: Callable[[dict[str, Line]], Iterable[Trial]],
    run: Callable[[Trial, Path], Line],
    max_minutes: float,
) -> None:
    """Runs trials until none is left to claim or the time is over. Several processes may work on one results file.

    Args:
        results: the JSON lines.
        scratch: a folder for claims and for the checkpoints of trials under way.
        plan: the trials that are wanted, given the lines on record.
        run: runs a trial, with a path for its checkpoint, and returns what it measured.
        max_minutes: no trial starts later than this.
    """
    scratch.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + 60 * max_minutes
    while time.monotonic() < deadline:
        known = lines_by_key(results)
        trial = next((t for t in plan(known) if key_of(t) not in known and claim(scratch, t)), None)
        if trial is None:
            break
        begun = time.process_time()
        line = run(trial, checkpoint_path(scratch, trial))
        spent = time.process_time() - begun
        append_line(results, {"trial": trial, **line, "process_seconds": round(spent, 1), "date": time.strftime("%Y-%m-%d")})
        print(key_of(trial), json.dumps({k: v for k, v in line.items() if k != "curve"}), f"{spent:.0f} s", flush=True)


def checkpoint_path(scratch: Path, trial: Trial) -> Path:
    """Where a trial under way is saved."""
    name = "-".join(str(value) for _, value in sorted(trial.items()))
    return scratch / f"{name}.pt"


def claim(scratch: Path, trial: Trial) -> bool:
    """Whether this process may run the trial: nobody else who is alive has claimed it."""
    path = checkpoint_path(scratch, trial).with_suffix(".claim")
    try:
        descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY)
    except FileExistsError:
        owner = path.read_text().strip()
        if owner and Path(f"/proc/{owner}").exists():
            return False
        path.write_text(str(os.getpid()))
        return True
    with os.fdopen(descriptor, "w") as file:
        file.write(str(os.getpid()))
    return True


def best_value(
    known: dict[str, Line],
    trials: list[Trial],
    setting: str,
    score: Callable[[Line], float],
) -> Any:
    """The value of `setting` in the best of `trials`, lowest score first; None while one of them is missing."""
    if any(key_of(trial) not in known for trial in trials):
        return None
    return min(trials, key=lambda trial: _number(score(known[key_of(trial)])))[setting]


def _number(score: float) -> float:
    return score if math.isfinite(score) else math.inf
