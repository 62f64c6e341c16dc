"""The training loop of the commands: steps, curves, checkpoints, stops by signal, and the errors that end a run.

`TrainingRun` is the base class of the runs of train_lm.py and train_tasks.py. A subclass adds the parts that only one of
the two commands has, and overrides the methods that differ between them.
"""

from __future__ import annotations

import dataclasses
import json
import shlex
import time
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor

from dni_seq.app.runs.checkpoint import (
    checkpoint_errors,
    random_state,
    save_checkpoint,
    set_random_state,
    write_json,
)
from dni_seq.app.runs.dashboard import Dashboard, deciding_options
from dni_seq.app.runs.directory import RunDirectory
from dni_seq.app.runs.invocation import curves_command
from dni_seq.app.runs.lock import RunLock
from dni_seq.app.runs.parameter_probe import ParameterProbe
from dni_seq.app.runs.progress import NullProgress, Progress
from dni_seq.app.runs.resume import Plan, RunOptions, config_of
from dni_seq.app.runs.run_log import RunLog
from dni_seq.app.runs.signals import StopSignals
from dni_seq.app.runs.tensorboard import keys_at, peak_memory_mb
from dni_seq.app.runs.trackers import logger_change
from dni_seq.core.windows import Window, on_device
from dni_seq.credit.results import StepResult
from dni_seq.distributed.process_group import RankError, Ranks
from dni_seq.trainer import SequenceTrainer

SAVE_SECONDS = 60.0
"""Seconds between two checkpoints. A kill loses at most this much work. A subclass may ask for further checkpoints."""


class SavedPosition(Protocol):
    """A stream of windows whose position can be saved and restored."""

    def __iter__(self) -> Iterator[Any]: ...

    def state_dict(self) -> dict[str, Any]:
        """Returns the position."""

    def load_state_dict(self, saved: dict[str, Any], /) -> None:
        """Restores a position."""


class SavedStream(SavedPosition, Protocol):
    """The stream of a run.

    Attributes:
        lanes: B, the number of lanes over all ranks.
    """

    @property
    def lanes(self) -> int:
        """B, the number of lanes."""

    def __iter__(self) -> Iterator[Window]: ...


@dataclass
class Counters:
    """The counters that every run has, saved in its checkpoints. A subclass adds the counters of one command.

    Attributes:
        seconds: time of the run so far, over all sessions, evaluation included.
        process_seconds: CPU time of the run so far, over all sessions. Other work on the machine changes it little.
        curve: the run's scores so far, one row for each evaluation; the subclass defines the columns.
        logged_at: step of the latest point of the training curves.
    """

    seconds: float = 0.0
    process_seconds: float = 0.0
    curve: list[Any] = field(default_factory=list)
    logged_at: int = 0


class Measured(NamedTuple):
    """What one step adds to the log.

    Attributes:
        values: measurements by TensorBoard key, as `RunLog.add` takes them.
        weight: weight of the step in the averages.
        tokens: number of tokens of the window, from which the speed is computed.
    """

    values: dict[str, Tensor]
    weight: int
    tokens: int


def measurements(result: StepResult) -> dict[str, Tensor]:
    """Returns the measurements of a step that all runs log, by TensorBoard key."""
    values = {"gradient/norm": result.gradient_norm}
    if result.synthetic is not None:
        values["gradient/synthesizer_norm"] = result.synthetic.gradient_norm
        for name in ("loss", "cosine", "r2", "injected_ratio", "scale"):
            values[f"synthetic/{name}"] = getattr(result.synthetic, name)
        if result.synthetic.fidelity is not None:
            horizons = result.synthetic.fidelity.horizons
            values["fidelity/cosine"] = torch.stack([horizon.cosine for horizon in horizons])
            values["fidelity/r2"] = torch.stack([horizon.r2 for horizon in horizons])
    return values


@dataclass(kw_only=True)
class TrainingRun(ABC):
    """A training run: trains on a stream until it is done, logs, saves, and resumes exactly.

    Build the parts, call `restore` with the checkpoint or None, then `begin`, then `train`. A subclass defines the abstract
    methods. It may override `evaluate`, `scores` and `outcome`, which do nothing in this class. It may extend `restore`,
    `initialize_dir`, `complete_curves`, `content` and `summary`, which do the work that all runs need.

    Attributes:
        UNIT: the name of a step in messages, such as "step" or "update".
        LIMIT: the options that limit the run's length, as messages name them.
        LOG_EVERY: steps between two points of the training curves.
        options: the options of the run.
        run: the directory of the run.
        device: the device of the model and of the windows on which it trains.
        stream: the training windows, with the lanes of all ranks.
        trainer: trains the model on a window.
        counters: see `Counters`.
        ranks: the ranks that share the run. Only the first one writes files and messages.
        log: writes the curves of the run. Before `begin`, and on ranks other than the first, it writes nothing.
        progress: shows steps and messages, from `begin` on.
        probe: compares the parameters' gradient with that of full BPTT every `fidelity_every` windows.
        resumed_at: step of the loaded checkpoint, None for a new run.
        finished: whether an earlier session has finished the run, so that this one trains nothing; known from `begin` on.
        began: time at which this session began to train, in seconds of the monotonic clock.
        saved_at: time of the latest checkpoint, in seconds of the same clock.
    """

    UNIT: ClassVar[str] = "step"
    LIMIT: ClassVar[str] = "the limit of the run"
    LOG_EVERY: ClassVar[int]

    options: RunOptions
    run: RunDirectory
    device: torch.device
    stream: SavedStream
    trainer: SequenceTrainer
    counters: Counters
    ranks: Ranks = field(default_factory=Ranks)
    log: RunLog = field(default_factory=lambda: RunLog(None))
    progress: Progress = field(init=False)
    resumed_at: int | None = None
    finished: bool = field(default=False, init=False)
    began: float = field(init=False)
    saved_at: float = field(init=False)
    probe: ParameterProbe = field(init=False)
    _clock: float = field(init=False, repr=False)
    _process_clock: float = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self.probe = ParameterProbe(self.trainer, self.options.fidelity_every)

    @property
    def steps(self) -> int:
        """Steps done."""
        return self.trainer.steps

    @property
    def how_to_resume(self) -> str:
        """The options that resume this run, as words of the command line."""
        return f"--run-dir {shlex.quote(str(self.run.path))} --resume auto"

    @abstractmethod
    def done(self) -> bool:
        """Returns whether the run has reached its limit."""

    @abstractmethod
    def total_steps(self) -> int | None:
        """Returns the number of steps of the whole run, None if unknown."""

    @abstractmethod
    def measure(self, window: Window, result: StepResult) -> Measured:
        """Returns what a step adds to the log. `window` has the lanes of all ranks and is on the CPU."""

    @abstractmethod
    def after_step(self, window: Window, result: StepResult, measured: Measured) -> None:
        """Updates the counters after a step. `window` has the lanes of all ranks and is on the CPU."""

    @abstractmethod
    def point(self) -> dict[str, float]:
        """Returns the values of a point of the curves, besides the averages, by TensorBoard key."""

    @abstractmethod
    def figures(self) -> str:
        """Returns the latest measurements as a short text for the progress line."""

    @abstractmethod
    def dashboard(self) -> Dashboard:
        """Returns what the tracker shows of the run besides its curves."""

    def evaluate(self) -> bool:
        """Evaluates the model if an evaluation is due at this step. Returns whether a checkpoint must follow."""
        return False

    def scores(self) -> dict[str, Any]:
        """Logs the scores of the finished run and returns them for summary.json. Only the first rank calls this."""
        return {}

    def in_force(self) -> dict[str, Any]:
        """Returns the value in force of every option that config.json stores; None for an option without effect."""
        return {**config_of(self.options), "device": str(self.device)}

    def next_commands(self) -> list[str]:
        """Returns lines for the end of the run with commands that the user may want to call next."""
        return [curves_command(self.run.path, self.options.logger)]

    def outcome(self) -> str:
        """Returns text about the finished run that is added to the last message; empty by default."""
        return ""

    def restore(self, checkpoint: dict[str, Any] | None) -> None:
        """Restores the run from a checkpoint's content, except for the log. None is for a new run, and restores nothing.

        A checkpoint with unexpected content can raise any exception. Therefore call this inside `checkpoint_errors`.
        """
        if checkpoint is None:
            return
        self.trainer.load_state_dict(checkpoint["trainer"], self.stream.lanes)
        self.stream.load_state_dict(checkpoint["stream"])
        if "probe" in checkpoint:  # checkpoints of older versions lack it
            self.probe.load_state_dict(checkpoint["probe"])
        if self.ranks.first:
            set_random_state(checkpoint["random"])
        self.counters = type(self.counters)(**checkpoint["counters"])
        self.resumed_at = self.steps

    def begin(self, plan: Plan[Any], lock: RunLock, notes: Iterable[str] = ()) -> None:
        """Creates the run's directory, opens its log and starts the clocks. A collective call.

        Args:
            plan: whether the call starts or resumes the run, and its options.
            lock: lock to take on the directory.
            notes: further messages to print for the user.

        Raises:
            ValueError: the directory cannot be written, or another process uses it.
            CheckpointError: the checkpoint's log is not valid.
        """
        self.finished = self.ranks.broadcast_from_rank0(lambda: self._open(plan, lock))
        if plan.checkpoint is not None:
            with checkpoint_errors(self.run.path):
                self.log.load_state_dict(plan.checkpoint["log"], self.device)
        self.progress = (Progress if self.ranks.first else NullProgress)(self.total_steps(), self.steps)
        start = plan.note if self.finished else plan.describe_start(f"{self.UNIT} {self.steps}")
        change = None if self.finished else logger_change(plan.checkpoint, self.options.logger)
        for note in (start, lock.missing, change, *notes):
            if note:
                self.progress.write_line(note)
        self.began = self.saved_at = self._clock = time.monotonic()
        self._process_clock = time.process_time()

    def initialize_dir(self, plan: Plan[Any], lock: RunLock) -> None:
        """Creates and locks the run's directory and writes its first files. Only the first rank calls this."""
        plan.initialize_dir(self.run, self.options, lock)

    def _open(self, plan: Plan[Any], lock: RunLock) -> bool:
        """Creates the directory, and opens the log unless the run is finished. Returns whether the run is finished."""
        self.initialize_dir(plan, lock)
        ended = self.resumed_at is not None and self.done()
        if ended and has_summary(self.run, f"{self.UNIT}s", self.steps):
            return True
        # A session that was killed after its last checkpoint may have logged scores at this step.
        written = keys_at(self.run.path, self.steps) if ended else ()
        self.log = RunLog(self.run.path, resumed_at=self.steps, written=written, logger=self.options.logger)
        board = self.dashboard()
        self.log.dashboard(board.layout)
        self.log.paragraph(self.steps, "about/method", board.method)
        self.log.configuration(self.steps, self.in_force())
        return False

    def train(self, stop: StopSignals) -> int:
        """Trains until the run is done or a signal arrives, and returns the exit status."""
        if self.finished:
            where = f"finished at {self.UNIT} {self.steps}, results in {self.run.path}"
            self.progress.write_line(f"{where}; to train on, raise {self.LIMIT}")
            return 0
        while not self.done():
            for window in self.stream:
                with checkpoint_errors(self.run.path) if self.steps == self.resumed_at else nullcontext():
                    self.step(window)
                if self.steps % self.LOG_EVERY == 0:
                    self.log_point()
                    self.log.clear()
                evaluated = self.evaluate()
                if self.done():
                    break
                # The ranks agree when to stop and save: a signal reaches them at different steps, and their clocks differ.
                late = time.monotonic() - self.saved_at > SAVE_SECONDS
                signal, save_due = agreed(self.ranks, stop.received, late or evaluated)
                if signal is not None:
                    # Set only now: a signal that arrives while the ranks agree must be kept for their next agreement.
                    stop.received = signal
                    self.save(self.run.last)
                    self.progress.write_line(f"stopped at {self.UNIT} {self.steps}; to resume: {self.how_to_resume}")
                    return stop.exit_status
                if save_due:
                    self.save(self.run.last)
        self.finish()
        return 0

    def step(self, window: Window) -> None:
        """Trains on one window and logs its measurements."""
        own = self.own_lanes(window)
        self.log.add(self.probe.observe(own), weight=1)
        result = self.trainer.step(own.inputs, own.targets, ends=own.ends, mask=own.mask, lookahead=own.lookahead)
        measured = self.measure(window, result)
        self.log.add(measured.values, weight=measured.weight, skipped=result.skipped)
        for event in result.events:
            self.progress.write_line(event)
        self.after_step(window, result, measured)
        self.progress.step(measured.tokens, self.figures)

    def own_lanes(self, window: Window) -> Window:
        """Returns this rank's lanes of a window, on the device."""
        return on_device(self.trainer.parallel.window(window), self.device)

    def log_point(self) -> None:
        """Writes a point of the training curves: the averages since the last point, and the values of `point`."""
        self.counters.logged_at = self.steps
        self.log.write(self.steps)
        values = {**self.trainer.skip_counts(), **self.point(), "memory/peak_mb": peak_memory_mb(self.device)}
        self.log.scalars(self.steps, values)

    def tick(self) -> None:
        """Adds the time since the last call of this method to the counters."""
        now, process_now = time.monotonic(), time.process_time()
        self.counters.seconds += now - self._clock
        self.counters.process_seconds += process_now - self._process_clock
        self._clock, self._process_clock = now, process_now

    def content(self) -> dict[str, Any]:
        """Returns the content of a checkpoint. A collective call."""
        return {
            "trainer": self.trainer.state_dict(),
            "stream": self.stream.state_dict(),
            "random": random_state(),
            "counters": {entry.name: getattr(self.counters, entry.name) for entry in dataclasses.fields(self.counters)},
            "log": self.log.state_dict(),
            "probe": self.probe.state_dict(),
            "config": config_of(self.options),
        }

    def save(self, path: Path) -> None:
        """Writes a checkpoint. Before that, flushes the log, so that no step of the checkpoint is missing in the log.

        If `path` is last.pt, the older last.pt is kept as previous.pt. A collective call: rank 0 writes the file.
        """
        self.tick()
        self.log.flush()
        content = self.content()
        if self.ranks.first:
            save_checkpoint(path, content, keep=self.run.previous if path == self.run.last else None)
        self.saved_at = time.monotonic()

    def save_after(self, error: Exception) -> Exception:
        """Saves a run that `error` has stopped. Returns the error to report, which says whether saving succeeded."""
        try:
            self.save(self.run.last)
        except (OSError, RankError) as other:
            return OSError(f"{error} ({other})")
        return ValueError(f"{error} (saved at {self.UNIT} {self.steps}; to resume: {self.how_to_resume})")

    def finish(self) -> None:
        """Ends a run: writes the last points of the curves, the last checkpoint, the scores and the summary."""
        self.complete_curves()
        self.save(self.run.last)
        if not self.ranks.first:
            return
        scores = self.scores()
        board = self.dashboard()
        self.log.hyperparameters(deciding_options(self.options), board.scores, board.changed)
        self.log.flush()
        self.tick()
        write_json(self.run.summary, {**self.summary(), **scores})
        seconds = f"{self.counters.seconds:.0f} s"
        self.progress.write_line(f"{self.steps} {self.UNIT}s in {seconds}{self.outcome()}; results in {self.run.path}")
        for line in self.next_commands():
            self.progress.write_line(line)

    def complete_curves(self) -> None:
        """Writes the points of the last step that are not written yet."""
        if self.counters.logged_at != self.steps:
            self.log_point()

    def summary(self) -> dict[str, Any]:
        """Returns the content of summary.json without the scores."""
        return {
            f"{self.UNIT}s": self.steps,
            "parameters": sum(parameter.numel() for parameter in self.trainer.model.parameters()),
            "torch": torch.__version__,
            "seconds": self.counters.seconds,
            "process_seconds": self.counters.process_seconds,
            "peak_memory_mb": peak_memory_mb(self.device),
            "curve": self.counters.curve,
            "in_force": self.in_force(),
        }

    def close(self) -> None:
        """Closes progress bar and log."""
        self.progress.close()
        self.log.close()


def has_summary(run: RunDirectory, unit: str, steps: int) -> bool:
    """Returns whether a run has a summary.json whose entry `unit`, the number of steps, equals `steps`."""
    try:
        summary = json.loads(run.summary.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(summary, dict) and summary.get(unit) == steps


def agreed(ranks: Ranks, signal: int | None, save_due: bool) -> tuple[int | None, bool]:
    """Returns the largest signal number that a rank has received, None if none has, and whether any rank must save.

    A collective call.
    """
    number, due = ranks.all_reduce_max(signal or 0, int(save_due))
    return number or None, bool(due)
