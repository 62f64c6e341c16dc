"""The trials of a study: trainings by the real commands, side by side in processes, each of which survives being killed.

A trial runs in its own directory of a scratch place with `--resume auto`, so that one that was killed goes on where it was,
and leaves one line in the file of results. Several calls may share scratch place and results: a trial is locked for as
long as its process lives, be the study that started it gone or not.
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
"""Options that say where a file lies on this machine, which no line repeats."""

COMMAND_OF_SCRIPT: Mapping[str, str] = MappingProxyType({"train_lm": "train", "train_tasks": "tasks"})
"""Commands of `dni-seq`, by the script that a trial names."""


class Trial(NamedTuple):
    """One training of a study.

    Attributes:
        script: the command's file name without its ending, "train_lm" say.
        about: what it is in the study: part, task, column, T, seed and so on.
        options: of the command, all that the study decides.
        paths: options that say where files lie; they make no difference to which trial it is.
    """

    script: str
    about: dict[str, Any]
    options: dict[str, Any]
    paths: Mapping[str, str] = {}

    def key(self) -> str:
        """What tells it from all others."""
        return json.dumps([self.script, self.about, self.options], sort_keys=True)

    def name(self) -> str:
        """A readable name for its directory, and another one for every key."""
        words = "-".join(str(value) for value in self.about.values() if value is not None)
        plain = "".join(letter if letter.isalnum() or letter in "-." else "_" for letter in words)
        return f"{plain}-{hashlib.sha256(self.key().encode()).hexdigest()[:8]}"

    def arguments(self) -> list[str]:
        """Its options on the command line."""
        found = []
        for name, value in (self.options | dict(self.paths)).items():
            if isinstance(value, bool):
                found.append(flag(name) if value else flag(name).replace("--", "--no-", 1))
            else:
                found += [flag(name), str(value)]
        return found


@dataclass
class Outcome:
    """What became of the trials of a call.

    Attributes:
        done: put on record now.
        failed: names of those whose command ended with an error, with its last words.
        elsewhere: another process has them.
        late: not begun, since the time would not have been enough.
        stopped: not done, since a signal came.
    """

    done: int = 0
    failed: list[str] = field(default_factory=list)
    locked_elsewhere: int = 0
    out_of_time: int = 0
    stopped: int = 0


@dataclass
class Study:
    """Where and how trials are run.

    Attributes:
        scratch: the directory of the runs.
        results: the file of lines.
        jobs: trials side by side, one thread each.
        measure: what a trial's line says beside what every line says, from the run's summary.
    """

    scratch: Path
    results: Path
    jobs: int
    measure: Callable[[Trial, dict[str, Any]], dict[str, Any]]

    def run(
        self, trials: Sequence[Trial], minutes: Callable[[Trial], float], limit: float | None, stop: StopSignals
    ) -> Outcome:
        """Run those of `trials` that are not on record, in their order.

        Args:
            trials: all that are wanted.
            minutes: how long one takes, about.
            limit: minutes that this call may take; a trial that would take longer than what is left is not begun.
            stop: a signal stops the trials that run, which go on at the next call.
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
        """Start a trial that is not on record and that no other process has; its process, none if there is nothing to do."""
        if trial.key() in self._done():
            return []
        run, lock = RunDirectory(self.scratch / trial.name()), self._lock(trial)
        if lock is None:
            outcome.locked_elsewhere += 1
            return []
        if trial.key() in self._done():  # it ended between the two looks
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
                pass_fds=[lock.fileno()],  # the lock lives as long as the process does
                start_new_session=True,  # a terminal's Ctrl-C comes to the study alone, which passes it on once
            )
        print(f"begins     {trial.name()}", flush=True)
        return [Running(trial, run, process, lock)]

    def _lock(self, trial: Trial) -> BinaryIO | None:
        """The trial's lock, None where another process has it."""
        file = self._lock_path(trial).open("ab")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            return None
        return file

    def _lock_path(self, trial: Trial) -> Path:
        return self.scratch / f"{trial.name()}.lock"

    def _log(self, trial: Trial) -> Path:
        return self.scratch / f"{trial.name()}.log"

    def _ended(self, each: Running, outcome: Outcome) -> bool:
        """Whether a trial has ended; if so it is put on record, and its files go, or it has failed."""
        status = each.process.poll()
        if status is None:
            return False
        name = each.trial.name()
        try:
            if status == 0:
                append_line(self.results, self.line(each.trial, each.run))
                shutil.rmtree(each.run.path)
                self._log(each.trial).unlink()
                self._lock_path(each.trial).unlink()  # whoever locks the file that is gone finds the line
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
        """The line of a finished run."""
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
    """A trial's process, and the lock that it holds."""

    trial: Trial
    run: RunDirectory
    process: subprocess.Popen[bytes]
    lock: BinaryIO

    def release(self) -> None:
        """Let go of the lock."""
        self.lock.close()


def environment() -> dict[str, str]:
    """The environment of a trial: this package, one thread."""
    package = str(Path(__file__).resolve().parents[3])
    paths = [package, *filter(None, [os.environ.get("PYTHONPATH")])]
    return os.environ | {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}


def last_words(log: Path) -> str:
    """The last line of a log that says anything."""
    lines = log.read_text(encoding="utf-8", errors="replace").replace("\r", "\n").split("\n")
    return next((line.strip() for line in reversed(lines) if line.strip()), "")


def messages(run: Path) -> dict[str, Any]:
    """How true and how large the synthetic gradients of a run were: medians over the points of its second half.

    `injected_ratio`, `regression_r2`, and `fidelity` with the cosine and R² of every horizon; None where not measured.
    """
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run), size_guidance={"scalars": 0})
    events.Reload()
    keys = set(events.Tags()["scalars"])

    def out_of_time(key: str) -> float | None:
        if key not in keys:
            return None
        points = [event.value for event in events.Scalars(key)]
        return statistics.median(points[len(points) // 2 :])

    horizons = sorted(int(key.removeprefix("fidelity/cosine_")) for key in keys if key.startswith("fidelity/cosine_"))
    measured = {name: [out_of_time(f"fidelity/{name}_{n}") for n in horizons] for name in ("cosine", "r2")}
    return {
        "injected_ratio": out_of_time("synthetic/injected_ratio"),
        "regression_r2": out_of_time("synthetic/r2"),
        "fidelity": measured if horizons else None,
    }


def versions() -> dict[str, str | None]:
    """What the run was made with; the commit, where the package lies in a repository."""
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
    """The same nest with None for numbers that are not finite, as those of a run that diverged."""
    if isinstance(value, dict):
        return {name: finite(entry) for name, entry in value.items()}
    if isinstance(value, list):
        return [finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
