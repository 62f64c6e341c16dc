"""Runs the trials of a study with the training commands, several processes in parallel; killed trials can be resumed.

A trial runs in its own subdirectory of the scratch directory with `--resume auto`, so a killed trial continues from its last
checkpoint. When a trial is finished, one line is appended to the file of results. Several calls may share the scratch
directory and the results: a trial is locked as long as its process lives, even if the study that started it has ended.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import math
import os
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from types import MappingProxyType
from typing import Any, BinaryIO, NamedTuple

import torch

from dni_seq.app.runs.directory import RunDirectory
from dni_seq.app.runs.options import flag
from dni_seq.app.runs.signals import StopSignals
from dni_seq.app.studies.records import append_line, read_lines

POLL_SECONDS = 0.2

PATHS = frozenset({"data_dir", "data_file", "valid_file", "test_file"})
"""Options that are file paths on this machine. They are not recorded in the results."""

COMMAND_OF_SCRIPT: Mapping[str, str] = MappingProxyType({"train_lm": "train", "train_tasks": "tasks"})
"""The command of `dni-seq` for each script that a trial can name."""


class Trial(NamedTuple):
    """One training of a study.

    Attributes:
        script: the command's file name without its suffix, for example "train_lm".
        about: the trial's place in the study: part, task, column, T, seed and so on.
        options: the options of the command that the study sets.
        unkeyed: further options of the command that are not part of the trial's key: file paths, and options whose values
            were defaults when the first lines were recorded.
    """

    script: str
    about: dict[str, Any]
    options: dict[str, Any]
    unkeyed: Mapping[str, str] = {}

    def key(self) -> str:
        """Returns the text that identifies the trial."""
        return json.dumps([self.script, self.about, self.options], sort_keys=True)

    def name(self) -> str:
        """Returns a readable name for the trial's directory, unique for the trial's key."""
        words = "-".join(str(value) for value in self.about.values() if value is not None)
        plain = "".join(letter if letter.isalnum() or letter in "-." else "_" for letter in words)
        return f"{plain}-{hashlib.sha256(self.key().encode()).hexdigest()[:8]}"

    def arguments(self) -> list[str]:
        """Returns the trial's options as words of the command line."""
        found = []
        for name, value in (self.options | dict(self.unkeyed)).items():
            if isinstance(value, bool):
                found.append(flag(name) if value else flag(name).replace("--", "--no-", 1))
            else:
                found += [flag(name), str(value)]
        return found


@dataclass
class Outcome:
    """The outcome of the trials of a call.

    Attributes:
        done: number of trials recorded by this call.
        failed: names of the trials whose command failed, with the last line of its output.
        locked_elsewhere: number of trials that another process runs.
        out_of_time: number of trials not started because the time limit was too short.
        stopped: number of trials not finished because of a signal.
    """

    done: int = 0
    failed: list[str] = field(default_factory=list)
    locked_elsewhere: int = 0
    out_of_time: int = 0
    stopped: int = 0

    def describe(self) -> str:
        """Returns the outcome as one line."""
        parts = {
            "done": self.done,
            "failed": len(self.failed),
            "run by another process": self.locked_elsewhere,
            "not started for lack of time": self.out_of_time,
            "stopped": self.stopped,
        }
        return "trials: " + ", ".join(f"{count} {what}" for what, count in parts.items() if count or what == "done")


@dataclass
class Study:
    """Runs trials and records their results.

    Attributes:
        scratch: directory of the runs.
        results: file of results, one line per trial.
        jobs: number of trials in parallel, one thread each.
        measure: a function from a trial and its run's summary to the entries of the line that only this study has.
    """

    scratch: Path
    results: Path
    jobs: int
    measure: Callable[[Trial, dict[str, Any]], dict[str, Any]]

    def run(
        self, trials: Sequence[Trial], minutes: Callable[[Trial], float], limit: float | None, stop: StopSignals
    ) -> Outcome:
        """Runs the trials that are not recorded, in the given order, and returns the outcome.

        Args:
            trials: all trials of the call.
            minutes: estimates the time of a trial in minutes.
            limit: time limit of this call in minutes. A trial whose estimate exceeds the time left is not started. None for
                no limit.
            stop: records signals. A signal stops the running trials; the next call resumes them.
        """
        self.scratch.mkdir(parents=True, exist_ok=True)
        end = math.inf if limit is None else time.monotonic() + 60 * limit
        outcome, waiting, running = Outcome(), list(trials), list[Running]()
        while (waiting or running) and stop.received is None:
            while waiting and len(running) < self.jobs:
                trial = waiting.pop(0)
                if time.monotonic() + 60 * minutes(trial) > end:
                    outcome.out_of_time += trial.key() not in self._done()
                    continue
                running += self._begin(trial, outcome)
            time.sleep(POLL_SECONDS if running else 0)
            running = [each for each in running if not self._ended(each, outcome)]
        for each in running:
            each.process.send_signal(signal.SIGTERM)
        outcome.stopped = len(running) + len(waiting)
        for each in running:
            each.process.wait()
            each.release()
        return outcome

    def _done(self) -> set[str]:
        return {line["key"] for line in read_lines(self.results)}

    def _begin(self, trial: Trial, outcome: Outcome) -> list[Running]:
        """Starts a trial unless it is recorded or another process runs it. Returns a list with its process, or []."""
        if trial.key() in self._done():
            return []
        run, lock = RunDirectory(self.scratch / trial.name()), self._lock(trial)
        if lock is None:
            outcome.locked_elsewhere += 1
            return []
        if trial.key() in self._done():  # another process recorded the trial after the first check
            self._lock_path(trial).unlink()
            lock.close()
            return []
        command = [sys.executable, "-m", "dni_seq.app.cli", COMMAND_OF_SCRIPT[trial.script], *trial.arguments()]
        with self._log(trial).open("ab") as log:
            process = subprocess.Popen(
                [*command, "--run-dir", str(run.path), "--resume", "auto"],
                stdout=log,
                stderr=log,
                stdin=subprocess.DEVNULL,
                env=environment(),
                pass_fds=[lock.fileno()],  # inherited, so the lock is held as long as the trial's process lives
                start_new_session=True,  # Ctrl-C reaches only the study, which forwards it once
            )
        print(f"started    {trial.name()}", flush=True)
        return [Running(trial, run, process, lock)]

    def _lock(self, trial: Trial) -> BinaryIO | None:
        """Returns the trial's lock, None if another process holds it."""
        return locked(self._lock_path(trial))

    def _lock_path(self, trial: Trial) -> Path:
        return self.scratch / f"{trial.name()}.lock"

    def _log(self, trial: Trial) -> Path:
        return self.scratch / f"{trial.name()}.log"

    def _ended(self, each: Running, outcome: Outcome) -> bool:
        """Returns whether a trial has ended. Records a finished trial and removes its files; reports a failed one."""
        status = each.process.poll()
        if status is None:
            return False
        name = each.trial.name()
        try:
            if status == 0:
                append_line(self.results, self.line(each.trial, each.run))
                shutil.rmtree(each.run.path)
                self._log(each.trial).unlink()
                self._lock_path(each.trial).unlink()  # safe: a process that opened the file before finds the recorded line
                outcome.done += 1
                print(f"done       {name}", flush=True)
            else:
                words = last_words(self._log(each.trial)) or f"status {status}"
                outcome.failed.append(f"{name}: {words}")
                print(f"failed     {name}: {words}", flush=True)
        finally:
            each.release()
        return True

    def line(self, trial: Trial, run: RunDirectory) -> dict[str, Any]:
        """Returns the line of a finished run."""
        summary, config = (json.loads(path.read_text(encoding="utf-8")) for path in (run.summary, run.config))
        line = {
            "key": trial.key(),
            **trial.about,
            "options": trial.options,
            "config": {name: value for name, value in config.items() if name not in PATHS},
            **self.measure(trial, summary),
            **{name: summary[name] for name in ("seconds", "process_seconds", "parameters", "peak_memory_mb")},
            **messages(run.path),
            "versions": versions(),
        }
        return finite(line)


@dataclass
class Running:
    """A running trial: its process and its lock."""

    trial: Trial
    run: RunDirectory
    process: subprocess.Popen[bytes]
    lock: BinaryIO

    def release(self) -> None:
        """Releases the lock."""
        self.lock.close()


def environment() -> dict[str, str]:
    """Returns the environment variables of a trial: this package on the path, one thread."""
    package = str(Path(__file__).resolve().parents[3])
    paths = [package, *filter(None, [os.environ.get("PYTHONPATH")])]
    return os.environ | {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}


def last_words(log: Path) -> str:
    """Returns the last line of a log that is not blank, empty if there is none."""
    lines = log.read_text(encoding="utf-8", errors="replace").replace("\r", "\n").split("\n")
    return next((line.strip() for line in reversed(lines) if line.strip()), "")


def messages(run: Path) -> dict[str, Any]:
    """Returns the size and the fidelity of a run's synthetic gradients: medians over the points of the run's second half.

    The keys are `injected_ratio`, `regression_r2`, and `fidelity` with cosine and R² of every horizon. Unmeasured values
    are None.
    """
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run), size_guidance={"scalars": 0})
    events.Reload()
    keys = set(events.Tags()["scalars"])

    def late_median(key: str) -> float | None:
        if key not in keys:
            return None
        points = [event.value for event in events.Scalars(key)]
        return statistics.median(points[len(points) // 2 :])

    horizons = sorted(int(key.removeprefix("fidelity/cosine_")) for key in keys if key.startswith("fidelity/cosine_"))
    measured = {name: [late_median(f"fidelity/{name}_{n}") for n in horizons] for name in ("cosine", "r2")}
    return {
        "injected_ratio": late_median("synthetic/injected_ratio"),
        "regression_r2": late_median("synthetic/r2"),
        "fidelity": measured if horizons else None,
    }


def versions() -> dict[str, str | None]:
    """Returns the versions of dni_seq, torch and Python, and the commit if the package is in a repository."""
    try:
        own: str | None = metadata.version("dni-seq")
    except metadata.PackageNotFoundError:
        own = None
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    try:
        commit = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        commit = None
    python = ".".join(map(str, sys.version_info[:3]))
    return {"dni_seq": own, "commit": commit, "torch": torch.__version__, "python": python}


def finite(value: Any) -> Any:
    """Returns the nest with None in place of numbers that are not finite, which a diverged run has and JSON lacks."""
    if isinstance(value, dict):
        return {name: finite(entry) for name, entry in value.items()}
    if isinstance(value, list):
        return [finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def locked(path: Path) -> BinaryIO | None:
    """Returns the file, open and locked until it is closed or the process ends; None if another process holds the lock."""
    file = path.open("ab")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        return None
    return file
