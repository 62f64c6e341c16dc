"""Trials of the frontier study on copying with and without distractors, repeat copy and adding, at constant learning rates.

Legend: T = window length in steps, B = lanes, S = steps of a sequence.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from methods import Parts, lookahead_of, modules_of, observed_first, trainer_of

import dni_seq as dni
from dni_seq.app.runs.allocator import keep_freed_memory
from dni_seq.models.vector_rnn import VectorRNN
from dni_seq.streams.algorithmic_tasks import (
    Adding,
    Copy,
    Curriculum,
    RepeatCopy,
    Stage,
    Task,
    TaskStream,
    input_losses,
    mean_error,
)

sys.path.insert(0, str(Path(__file__).parents[1] / "studies"))
sys.path.insert(0, str(Path(__file__).parents[1] / "predictive_messages"))
from copying import CHECK_SEED, CLIP, LANES, UNITS, CopyWithDistractors, UpdateTime
from memory import peak_mib, reset_peak, saved_bytes
from trials import Line, Trial, save_whole

SAVE_EVERY = 60.0
"""CPU seconds between two checkpoints of a trial, counted as `Progress.seconds`."""


class SequenceTask(NamedTuple):
    """A generated task, and the stages with whose sequences an update is timed.

    Attributes:
        task: generates sequences.
        short: a stage whose sequences have few steps.
        full: a stage whose sequences fill the longest window.
        unit: the unit of the length.
    """

    task: Task
    short: Stage
    full: Stage
    unit: str


TASKS: Mapping[str, SequenceTask] = MappingProxyType(
    {
        "copy": SequenceTask(Copy(), Stage(1), Stage(19), "vectors"),
        "distractors": SequenceTask(CopyWithDistractors(), Stage(1), Stage(13), "vectors"),
        "repeat-copy": SequenceTask(RepeatCopy(), Stage(1), Stage(6, 6), "vectors"),
        "adding": SequenceTask(Adding(), Stage(4), Stage(40), "steps"),
    }
)

TIMED_AS: Mapping[str, str] = MappingProxyType({"distractors": "copy", "repeat-copy": "copy"})
"""Tasks whose updates are not timed, each with the task whose update times they have.

Their input vectors have one number more than those of that task, so an update needs almost the same time.
"""


@dataclass
class Learner:
    """A model, its trainer, and its stream of windows.

    Args:
        trial: the settings.
        stage: the stage of the first sequences, None for the first stage of the task.
    """

    trial: Trial
    stage: Stage | None = None
    trainer: dni.SequenceTrainer = field(init=False)
    stream: TaskStream = field(init=False)

    def __post_init__(self) -> None:
        """Builds the parts; the trial's seed decides the initial weights and the sequences."""
        torch.manual_seed(self.trial["seed"])
        task = TASKS[self.trial["task"]].task
        model = VectorRNN(task.input_size, task.target_size, hidden=UNITS)
        parts = Parts(
            model,
            task.losses,
            torch.zeros(self.trial["T"], 1, task.input_size),
            vocabulary=None,
            outputs=task.target_size,
            past_loss_fn=input_losses,
            clip=CLIP,
            reduction="lane-mean",
        )
        self.trainer = trainer_of(self.trial, parts)
        options: dict[str, Any] = {"seed": self.trial["seed"], "stage": self.stage}
        self.stream = TaskStream(task, lanes=LANES, bptt=self.trial["T"], lookahead=lookahead_of(self.trainer), **options)

    def step(self, window: dni.Window) -> float:
        """Trains on a window and returns its loss: the sum over its steps of the mean over lanes."""
        options: dict[str, Any] = {"ends": window.ends, "mask": window.mask, "lookahead": window.lookahead}
        return float(self.trainer.step(window.inputs, window.targets, **options).loss)


class Progress:
    """The state of a running trial: its learner, its curriculum, and its counters.

    Args:
        trial: the settings.

    Attributes:
        curve: a row for each solved length: the length, and the updates, steps and idle CPU seconds until then.
        updates: number of updates so far.
        steps: number of steps so far, in one lane.
        seconds: CPU seconds that these updates need on an idle machine.
        loss: loss of the present sequence so far.
        counted: number of steps of the present sequence so far that count in the loss.
    """

    def __init__(self, trial: Trial) -> None:
        self.learner = Learner(trial)
        self.task = TASKS[trial["task"]].task
        self.curriculum = Curriculum(self.task)
        self.fresh = torch.Generator().manual_seed(trial["seed"] + CHECK_SEED)
        self.curve: list[list[float]] = []
        self.updates, self.steps, self.seconds = 0, 0, 0.0
        self.loss, self.counted = 0.0, 0

    def step(self, window: dni.Window, time_of: UpdateTime) -> None:
        """Trains on a window. At the end of a sequence, updates the curriculum."""
        self.loss += self.learner.step(window)
        self.updates += 1
        self.steps += len(window.inputs)
        self.seconds += time_of.seconds(len(window.inputs))
        assert window.mask is not None
        self.counted += int(window.mask[:, 0].sum())
        if ended(window):
            error, self.loss, self.counted = self.task.error_of_loss * self.loss / self.counted, 0.0, 0
            if self.curriculum.observe(error) and self.check():
                self.learner.stream.stage = self.curriculum.stage
                self.curve.append([self.curriculum.solved, self.updates, self.steps, round(self.seconds, 1)])

    def check(self) -> bool:
        """Returns whether the length in training is solved on fresh sequences."""
        return self.curriculum.conclude(mean_error(self.learner.trainer.model, self.task, self.curriculum.stage, self.fresh))

    def state_dict(self) -> dict[str, Any]:
        """Returns the content of a checkpoint."""
        learner = self.learner
        parts: dict[str, Any] = {"trainer": learner.trainer, "stream": learner.stream, "curriculum": self.curriculum}
        found = {name: part.state_dict() for name, part in parts.items()}
        counts = (self.curve, self.updates, self.steps, self.seconds, self.loss, self.counted)
        return {**found, "fresh": self.fresh.get_state(), "random": torch.get_rng_state(), "counts": counts}

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Restores what `state_dict` returned."""
        self.learner.trainer.load_state_dict(saved["trainer"], LANES)
        self.learner.stream.load_state_dict(saved["stream"])
        self.curriculum.load_state_dict(saved["curriculum"])
        self.fresh.set_state(saved["fresh"])
        torch.set_rng_state(saved["random"])
        self.curve, self.updates, self.steps, self.seconds, self.loss, self.counted = saved["counts"]


def run(trial: Trial, checkpoint: Path, time_of: UpdateTime) -> Line:
    """Trains until the trial's budget of idle CPU seconds or updates is used. Resumes from the checkpoint if it exists."""
    reset_peak()
    progress = Progress(trial)
    if checkpoint.exists():
        progress.load_state_dict(torch.load(checkpoint, weights_only=True))
    saved_at = progress.seconds
    for window in progress.learner.stream:
        progress.step(window, time_of)
        if progress.updates >= trial.get("updates", float("inf")) or progress.seconds >= trial.get("seconds", float("inf")):
            break
        if progress.seconds - saved_at >= SAVE_EVERY:
            save_whole(checkpoint, progress.state_dict())
            saved_at = progress.seconds
    peak = peak_mib()
    checkpoint.unlink(missing_ok=True)
    counts = {"updates": progress.updates, "steps": progress.steps, "seconds": round(progress.seconds, 1)}
    return {"quality": progress.curriculum.solved, **counts, "curve": progress.curve, "peak_mib": peak}


def kept_for_backward(trial: Trial) -> int:
    """Trains on one sequence of full windows and returns the most bytes that an update in it saves for backward passes."""
    learner = Learner({**trial, "seed": 0}, TASKS[trial["task"]].full)
    most, windows = 0, iter(learner.stream)
    while True:
        window = next(windows)
        most = max(most, saved_bytes(partial(learner.step, window), modules_of(learner.trainer)))
        if ended(window):
            return most


def ended(window: dni.Window) -> bool:
    """Returns whether a window is the last one of its sequences."""
    assert window.ends is not None
    return bool(window.ends.all())


def serve(trial: Trial, full: bool, pipe: Any) -> None:
    """The program of a process that times the updates of a trial; see `measure_in_turns`.

    For each number received, trains on this many whole sequences and sends the CPU seconds of an update.
    """
    torch.set_num_threads(1)
    keep_freed_memory()
    task = TASKS[trial["task"]]
    learner = Learner({**trial, "seed": 0}, task.full if full else task.short)
    windows = iter(learner.stream)
    seen, over = 0, True
    while seen < observed_first(learner.trainer) or not over:  # ends with a whole sequence
        window = next(windows)
        learner.step(window)
        seen, over = seen + 1, ended(window)
    pipe.send("ready")
    while True:
        left = pipe.recv()
        updates, begun = 0, time.process_time()
        while left:
            window = next(windows)
            learner.step(window)
            updates += 1
            left -= ended(window)
        pipe.send((time.process_time() - begun) / updates)


def steps_of_update(trial: Trial, full: bool) -> float:
    """Returns the mean number of steps of a window in the sequences on which `serve` trains."""
    task = TASKS[trial["task"]]
    sequence = task.task.generate(task.full if full else task.short, 1, torch.Generator())
    steps = len(sequence.mask)
    return steps / -(-steps // trial["T"])


def line_through(trial: Trial, short: float, full: float) -> list[float]:
    """Returns the time of an update as a linear function of its steps: the seconds for 0 steps, and the seconds per step.

    Args:
        trial: the settings.
        short: measured seconds of an update on short sequences.
        full: measured seconds of an update on sequences of full windows.
    """
    at_short, at_full = steps_of_update(trial, False), steps_of_update(trial, True)
    longer = at_full - at_short
    per_step = max(0.0, (full - short) / longer) if longer >= 1 else 0.0
    return [round(full - per_step * at_full, 7), round(per_step, 7)]
