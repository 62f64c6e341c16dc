"""The training on an algorithmic task: what its run measures, how it raises the length, and what it saves."""

from __future__ import annotations

import shlex
import time
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, ClassVar

import torch
from torch import Tensor

from dni_seq.app.build.credit_options import default_values
from dni_seq.app.build.method import describe_method, unwritten_keys
from dni_seq.app.build.unused_options import credit_in_force
from dni_seq.app.runs.dashboard import Dashboard, changed_options, charts
from dni_seq.app.runs.invocation import command_line
from dni_seq.app.runs.loop import Counters, Measured, TrainingRun, measurements
from dni_seq.app.runs.tensorboard import LAYOUT
from dni_seq.app.runs.trackers import Layout
from dni_seq.app.tasks.options import TaskOptions, as_given
from dni_seq.core.windows import Window
from dni_seq.credit.results import StepResult
from dni_seq.models.vector_rnn import VectorRNN
from dni_seq.streams.algorithmic_tasks import Curriculum, Task, TaskStream, mean_error

DASHBOARD: Layout = MappingProxyType(
    {
        "length": {"solved and in training": ["task/length", "task/training_length"]},
        "error": {"of training sequences and of fresh sequences": ["task/error", "task/fresh_error"]},
        "synthetic gradients": LAYOUT["synthetic gradients"],
        "estimator": LAYOUT["estimator"],
        "stability": {"gradient norm": ["gradient/norm"]},
        "resources": {"updates per second": ["speed/updates_per_second"], "peak memory, MiB": ["memory/peak_mb"]},
    }
)
"""The dashboard in TensorBoard's tab "Custom Scalars"."""


@dataclass
class TaskCounters(Counters):
    """The counters of a run on a task; part of its checkpoint.

    Attributes:
        curve: a row (update, length) for each length solved.
        sequences: number of finished sequences, summed over the lanes.
        fresh_error: error of the latest check on fresh sequences, None before the first.
        loss: 0-d, the loss of the current sequence, summed over its steps so far; in nats, or squared error for adding.
        steps: number of steps of the current sequence so far that count in the loss.
        injected: [2], sum and number of the defined injected ratios.
    """

    sequences: int = 0
    fresh_error: float | None = None
    loss: Tensor = field(default_factory=lambda: torch.zeros(()))
    steps: int = 0
    injected: Tensor = field(default_factory=lambda: torch.zeros(2))


@dataclass(kw_only=True)
class TaskRun(TrainingRun):
    """A training run on a task. A step is called an update; it is one window.

    Attributes:
        task: generates the sequences and defines the error.
        curriculum: raises the length when the present one is solved.
        fresh: generator of the fresh sequences of checks.
        model: the model that `trainer` trains.
    """

    UNIT = "update"
    LIMIT = "--updates"
    LOG_EVERY: ClassVar[int] = 100

    options: TaskOptions
    stream: TaskStream
    counters: TaskCounters
    task: Task
    curriculum: Curriculum
    fresh: torch.Generator
    model: VectorRNN

    def done(self) -> bool:
        """Returns whether all updates are done."""
        return self.steps >= self.options.updates

    def total_steps(self) -> int:
        """Returns the number of updates of the whole run."""
        return self.options.updates

    def step(self, window: Window) -> None:
        """Trains on one window. Its steps are counted for the mean error of the sequence even if the window is skipped."""
        assert window.mask is not None
        self.counters.steps += int(window.mask[:, 0].sum())
        super().step(window)

    def measure(self, window: Window, result: StepResult) -> Measured:
        """Returns the measurements of a step. A measurement that is not defined is NaN."""
        values = mask_undefined(measurements(result), is_last(window))
        return Measured(values, weight=1, tokens=window.inputs[..., 0].numel())

    def after_step(self, window: Window, result: StepResult, measured: Measured) -> None:
        """Counts the loss and the injected ratio of a step. At the end of a sequence, updates the curriculum."""
        self.counters.loss = self.counters.loss + torch.where(result.skipped, 0, result.loss)
        ratio = measured.values.get("synthetic/injected_ratio")
        if ratio is not None:
            defined = torch.stack([ratio.nan_to_num(0.0), (~ratio.isnan()).to(ratio.dtype)])
            self.counters.injected = self.counters.injected + defined
        if is_last(window):
            self.end_sequence()

    def end_sequence(self) -> None:
        """Scores a sequence. If recent errors are low, checks the length on fresh sequences, and raises it if solved."""
        counters = self.counters
        error = self.task.error_of_loss * float(counters.loss) / counters.steps
        counters.loss, counters.steps = torch.zeros_like(counters.loss), 0
        counters.sequences += self.options.batch_size
        self.log.add({f"task/{self.task.error_name}": torch.tensor(error)}, weight=1)
        if not self.curriculum.observe(error):
            return
        counters.fresh_error = mean_error(self.model, self.task, self.curriculum.stage, self.fresh)
        self.log.scalars(self.steps, {f"task/fresh_{self.task.error_name}": counters.fresh_error})
        if self.curriculum.conclude(counters.fresh_error):
            self.stream.stage = self.curriculum.stage
            counters.curve.append([self.steps, self.curriculum.solved])
            solved = f"length {self.curriculum.solved} solved, error {counters.fresh_error:.3f}"
            self.progress.write_line(f"update {self.steps}: {solved}")

    def point(self) -> dict[str, float]:
        """Returns the lengths and the speed."""
        updates = self.steps - (self.resumed_at or 0)
        return {
            "task/length": self.curriculum.solved,
            "task/training_length": self.curriculum.stage.length,
            "speed/updates_per_second": updates / max(time.monotonic() - self.began, 1e-9),
        }

    def dashboard(self) -> Dashboard:
        """Returns the charts that this run fills, its method, and the options whose values are not the defaults."""
        options = self.options
        credit = options.resolve(options.bptt)
        return Dashboard(
            charts(DASHBOARD, unwritten_keys(credit, measures=self.probe.active)),
            describe_method(credit, options),
            {"task/length": "length solved", "speed/updates_per_second": "updates/s"},
            changed_options(options, default_values(options, as_given, {})),
        )

    def figures(self) -> str:
        """Returns the length solved and the length in training as a short text."""
        return f"length {self.curriculum.solved} solved, {self.curriculum.stage.length} in training"

    def outcome(self) -> str:
        """Returns the text of `figures` for the last message."""
        return f": {self.figures()}"

    def in_force(self) -> dict[str, Any]:
        """Returns the value in force of every option that config.json stores; None for an option without effect."""
        cells = self.options.model == "lstm"
        own = {"start": self.options.start or self.task.first.size, "trace_decay": self.options.decay_in_force}
        return super().in_force() | credit_in_force(self.options, self.options.bptt, cells=cells) | own

    def next_commands(self) -> list[str]:
        """Returns lines with the commands that train the run further and show its curves."""
        further = f"--resume {shlex.quote(str(self.run.path))} --updates {2 * self.options.updates}"
        return [f"to train on: {command_line('tasks')} {further}", *super().next_commands()]

    def content(self) -> dict[str, Any]:
        """Returns the content of a checkpoint, with the curriculum and the generator of fresh sequences."""
        return {**super().content(), "curriculum": self.curriculum.state_dict(), "fresh": self.fresh.get_state()}

    def restore(self, checkpoint: dict[str, Any] | None) -> None:
        """Restores the run from a checkpoint's content."""
        super().restore(checkpoint)
        if checkpoint is None:
            return
        self.curriculum.load_state_dict(checkpoint["curriculum"])
        self.fresh.set_state(checkpoint["fresh"])
        self.counters.loss = self.counters.loss.to(self.device)
        self.counters.injected = self.counters.injected.to(self.device)

    def summary(self) -> dict[str, Any]:
        """Returns the content of summary.json: `length` is the length solved, `stage` the size and repeats in training."""
        total, count = self.counters.injected.tolist()
        return {
            **{name: getattr(self.options, name) for name in ("task", "seed", "model", "hidden", "bptt", "synthesizer")},
            "length": self.curriculum.solved,
            "stage": list(self.curriculum.stage),
            "fresh_error": self.counters.fresh_error,
            "sequences": self.counters.sequences,
            "injected_ratio": total / count if count else None,
            **super().summary(),
        }


def is_last(window: Window) -> bool:
    """Returns whether a window is the last one of its sequences. All lanes end at the same window."""
    assert window.ends is not None
    return bool(window.ends.all())


def mask_undefined(values: dict[str, Tensor], last: bool) -> dict[str, Tensor]:
    """Returns the measurements of a step with NaN for ratios that are not defined.

    A ratio to a zero gradient is not defined. The gradient is zero in windows before the first step that counts in a loss.
    The injected ratio of a sequence's last window is not defined either, because nothing is injected after that window.

    Args:
        values: measurements by TensorBoard key.
        last: whether the window is the last one of the sequence.
    """
    ratios = ("synthetic/injected_ratio", "synthetic/r2", "fidelity/r2")
    masked = {key: value.where(value.isfinite(), torch.nan) if key in ratios else value for key, value in values.items()}
    if last and "synthetic/injected_ratio" in masked:
        masked["synthetic/injected_ratio"] = torch.full_like(masked["synthetic/injected_ratio"], torch.nan)
    return masked
