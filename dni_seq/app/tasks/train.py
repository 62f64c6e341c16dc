"""Trains a recurrent network on copy, repeat copy or the adding problem, with a curriculum over the length.

python scripts/train_tasks.py --task copy --bptt 4 --synthesizer none
    Copy with plain truncated BPTT on windows of 4 steps; 50,000 updates, about ten minutes on one core.
python scripts/train_tasks.py --task copy --bptt 4 --synthesizer multi-horizon
    The same with synthetic gradients.
python scripts/train_tasks.py --task repeat-copy --bptt 4 --synthesizer exact --exact-steps 8
    Repeat copy with the exact gradient of the next 8 steps.
python scripts/train_tasks.py --run-dir runs/mine --resume auto
    Resume runs/mine if it was stopped or killed, else start it.
tensorboard --logdir runs
    Show the curves.

An update is one window. The length is N for N vectors to copy, N R for R repeats, and the number of steps of an adding
problem. A length is solved if the mean error on 1,000 fresh sequences is below 0.15. The module
dni_seq.streams.algorithmic_tasks defines the error.

A run writes to its directory: TensorBoard events, config.json, checkpoints/last.pt and previous.pt, and summary.json.
TensorBoard has these keys over updates, as averages since the last point unless stated otherwise:
    task/length                the length solved so far
    task/training_length       the length in training
    task/error_bits            mean error of finished training sequences, bits per bit (adding: task/error, 1 at start)
    task/fresh_error_bits      mean error of a check on fresh sequences (adding: task/fresh_error)
    synthetic/..., fidelity/..., gradient/..., train/skipped, memory/peak_mb
                               see README.md; ratios are averaged over the windows where they are defined
    speed/updates_per_second   of this session, checks included
Ctrl-C saves a checkpoint and exits with status 130, SIGTERM with 143. Invalid input prints one line on stderr and exits with
status 2.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

import dni_seq as dni
from dni_seq.app.build.credit import (
    ModelSpec,
    build_auxiliary,
    build_synthesizer,
    learning_parameters,
    trainer_settings,
)
from dni_seq.app.build.device import device_of, on_device
from dni_seq.app.build.optimizers import adam
from dni_seq.app.build.unused_options import remarks
from dni_seq.app.runs.allocator import keep_freed_memory
from dni_seq.app.runs.checkpoint import checkpoint_errors, random_state, save_checkpoint, set_random_state, write_json
from dni_seq.app.runs.directory import RunDirectory, new_run_path
from dni_seq.app.runs.lock import RunLock
from dni_seq.app.runs.options import parse, report
from dni_seq.app.runs.progress import Progress
from dni_seq.app.runs.resume import Plan, config_of, plan_run
from dni_seq.app.runs.signals import StopSignals
from dni_seq.app.runs.tensorboard import LAYOUT, Layout, RunLog, peak_memory_mb
from dni_seq.app.tasks.options import TaskOptions, as_given, resolve_options
from dni_seq.core.nonfinite import NonFiniteError
from dni_seq.core.windows import Window
from dni_seq.models.lstm_kernels import native_up_to
from dni_seq.models.vector_rnn import VectorRNN
from dni_seq.streams.algorithmic_tasks import TASKS, Curriculum, Stage, Task, TaskStream, mean_error
from dni_seq.synthesizers.for_model import EMBED

LOG_EVERY = 100
"""Updates between two points of the TensorBoard curves."""

SAVE_SECONDS = 60.0
"""Seconds between two checkpoints, the most work that a kill loses."""

DASHBOARD: Layout = MappingProxyType(
    {
        "length": {"solved and in training": ["task/length", "task/training_length"]},
        "error": {"of training sequences and of fresh sequences": ["task/error", "task/fresh_error"]},
        "synthetic gradients": LAYOUT["synthetic gradients"],
        "stability": {"gradient norms": ["gradient/norm", "gradient/synthesizer_norm"]},
        "resources": {"updates per second": ["speed/updates_per_second"], "peak memory, MiB": ["memory/peak_mb"]},
    }
)
"""The dashboard in TensorBoard's tab "Custom Scalars"."""

CHECK_SEED = 2**31
"""Offset of the seed for the fresh sequences of checks, so that they differ from the training sequences."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit status."""
    keep_freed_memory()
    with RunLock() as lock:
        return command(arguments, lock)


def command(arguments: Sequence[str] | None, lock: RunLock) -> int:
    """Runs the command with the lock of the run's directory and returns its exit status."""
    try:
        given = parse(TaskOptions, arguments, prog="train_tasks", description=__doc__ or "", as_given=as_given)
        training = prepare(plan_run(TaskOptions, given, lock), lock)
    except (ValueError, OSError) as error:
        return report("train_tasks", error)
    try:
        with StopSignals() as stop:
            return train(training, stop)
    except NonFiniteError as error:
        save(training)
        going_on = f"to resume: --run-dir {training.run.path} --resume auto"
        return report("train_tasks", ValueError(f"{error} (saved at update {training.updates}; {going_on})"))
    except OSError as error:
        return report("train_tasks", error)
    finally:
        training.progress.close()
        training.log.close()


@dataclass
class Counters:
    """The counters of a run; part of its checkpoint.

    Attributes:
        sequences: number of finished sequences in all lanes.
        seconds: time of the run so far, over all sessions, checks included.
        process_seconds: CPU time of the process so far, which does not depend on other load of the machine.
        curve: (update, length solved) at each length solved.
        fresh_error: error of the latest check on fresh sequences, None before the first.
        loss: 0-d, the loss of the current sequence, nats (or squared error) summed over its steps so far.
        steps: number of steps of the current sequence so far that count in the loss.
        injected: [2], sum and number of the defined injected ratios.
        logged_at: update of the latest point of the curves.
    """

    sequences: int = 0
    seconds: float = 0.0
    process_seconds: float = 0.0
    curve: list[list[int]] = field(default_factory=list)
    fresh_error: float | None = None
    loss: Tensor = field(default_factory=lambda: torch.zeros(()))
    steps: int = 0
    injected: Tensor = field(default_factory=lambda: torch.zeros(2))
    logged_at: int = 0


@dataclass
class Training:
    """The parts of a run, ready to train."""

    options: TaskOptions
    run: RunDirectory
    device: torch.device
    task: Task
    stream: TaskStream
    curriculum: Curriculum
    fresh: torch.Generator
    model: VectorRNN
    trainer: dni.SequenceTrainer
    counters: Counters
    log: RunLog
    progress: Progress
    clock: float = field(default_factory=time.monotonic)
    process_clock: float = field(default_factory=time.process_time)
    saved_at: float = field(default_factory=time.monotonic)
    began_at: tuple[float, int] = (0.0, 0)

    def __post_init__(self) -> None:
        self.began_at = (self.clock, self.updates)

    @property
    def updates(self) -> int:
        """Updates done."""
        return self.trainer.steps

    def tick(self) -> None:
        """Adds the time since the last call to the counters."""
        now, process_now = time.monotonic(), time.process_time()
        self.counters.seconds += now - self.clock
        self.counters.process_seconds += process_now - self.process_clock
        self.clock, self.process_clock = now, process_now


def train(t: Training, stop: StopSignals) -> int:
    """Trains until the run is done or a signal arrives, and returns the exit status."""
    windows = iter(t.stream)
    while t.updates < t.options.updates:
        step(t, next(windows))
        if t.updates % LOG_EVERY == 0:
            log_point(t)
            t.log.clear()
        if stop.received is not None:
            save(t)
            t.progress.write_line(f"stopped at update {t.updates}; to resume: --run-dir {t.run.path} --resume auto")
            return stop.exit_status
        if time.monotonic() - t.saved_at > SAVE_SECONDS:
            save(t)
    finish(t)
    return 0


def step(t: Training, window: Window) -> None:
    """Trains on one window. If it ends a sequence, updates the curriculum."""
    assert window.mask is not None
    assert window.ends is not None
    t.counters.steps += int(window.mask[:, 0].sum())
    ended = bool(window.ends.all())
    window = on_device(window, t.device)
    result = t.trainer.step(window.inputs, window.targets, ends=window.ends, mask=window.mask, lookahead=window.lookahead)
    t.counters.loss = t.counters.loss + torch.where(result.skipped, 0, result.loss)
    values = measurements(result, ended)
    t.log.add(values, weight=1, skipped=result.skipped)
    for event in result.events:
        t.progress.write_line(event)
    if "synthetic/injected_ratio" in values:
        ratio = values["synthetic/injected_ratio"]
        t.counters.injected = t.counters.injected + torch.stack([ratio.nan_to_num(0.0), (~ratio.isnan()).to(ratio.dtype)])
    if ended:
        end_sequence(t)
    t.progress.step(window.inputs[..., 0].numel(), lambda: figures(t))


def measurements(result: dni.StepResult, ended: bool) -> dict[str, Tensor]:
    """Returns the measurements of a step by TensorBoard key, NaN for values that are not defined.

    A ratio to a zero gradient, as before the first step that counts, is not defined. The injected ratio of a window that
    ends the sequence is not defined either, because nothing is injected after it.
    """
    values = {"gradient/norm": result.gradient_norm}
    if result.synthetic is None:
        return values
    values["gradient/synthesizer_norm"] = result.synthetic.gradient_norm
    for name in ("loss", "cosine", "r2", "injected_ratio", "scale"):
        values[f"synthetic/{name}"] = getattr(result.synthetic, name)
    if result.synthetic.fidelity is not None:
        horizons = result.synthetic.fidelity.horizons
        values["fidelity/cosine"] = torch.stack([horizon.cosine for horizon in horizons])
        values["fidelity/r2"] = torch.stack([horizon.r2 for horizon in horizons])
    if ended:
        values["synthetic/injected_ratio"] = torch.full_like(result.synthetic.injected_ratio, torch.nan)
    ratios = ("synthetic/injected_ratio", "synthetic/r2", "fidelity/r2")
    return {key: value.where(value.isfinite(), torch.nan) if key in ratios else value for key, value in values.items()}


def end_sequence(t: Training) -> None:
    """Scores a finished sequence. If the length looks solved, checks it on fresh sequences and raises it."""
    error = t.task.error_of_loss * float(t.counters.loss) / t.counters.steps
    t.counters.loss, t.counters.steps = torch.zeros_like(t.counters.loss), 0
    t.counters.sequences += t.options.batch_size
    t.log.add({f"task/{t.task.error_name}": torch.tensor(error)}, weight=1)
    if not t.curriculum.observe(error):
        return
    t.counters.fresh_error = mean_error(t.model, t.task, t.curriculum.stage, t.fresh)
    t.log.scalars(t.updates, {f"task/fresh_{t.task.error_name}": t.counters.fresh_error})
    if t.curriculum.conclude(t.counters.fresh_error):
        t.stream.stage = t.curriculum.stage
        t.counters.curve.append([t.updates, t.curriculum.solved])
        t.progress.write_line(f"update {t.updates}: length {t.curriculum.solved} solved, error {t.counters.fresh_error:.3f}")


def figures(t: Training) -> str:
    """Returns the latest figures as a short text."""
    return f"length {t.curriculum.solved} solved, {t.curriculum.stage.length} in training"


def log_point(t: Training) -> None:
    """Writes a point of the curves."""
    t.counters.logged_at = t.updates
    t.log.write(t.updates)
    began, updates = t.began_at
    t.log.scalars(
        t.updates,
        {
            "task/length": t.curriculum.solved,
            "task/training_length": t.curriculum.stage.length,
            "speed/updates_per_second": (t.updates - updates) / max(time.monotonic() - began, 1e-9),
            "memory/peak_mb": peak_memory_mb(t.device),
            **t.trainer.skip_counts(),
        },
    )


def save(t: Training) -> None:
    """Writes the last checkpoint. The log is flushed first, so it has every update that the checkpoint has."""
    t.tick()
    t.log.flush()
    content = {
        "trainer": t.trainer.state_dict(),
        "stream": t.stream.state_dict(),
        "curriculum": t.curriculum.state_dict(),
        "fresh": t.fresh.get_state(),
        "random": random_state(),
        "counters": {entry.name: getattr(t.counters, entry.name) for entry in dataclasses.fields(t.counters)},
        "log": t.log.state_dict(),
        "config": config_of(t.options),
    }
    save_checkpoint(t.run.last, content, keep=t.run.previous)
    t.saved_at = time.monotonic()


def finish(t: Training) -> None:
    """Ends a run: last point of the curves, checkpoint and summary."""
    if t.counters.logged_at != t.updates:
        log_point(t)
    deciding = {name: value for name, value in config_of(t.options).items() if name not in t.options.MAY_CHANGE}
    t.log.hyperparameters(deciding, ["task/length", "speed/updates_per_second"])
    save(t)
    write_json(t.run.summary, summary(t))
    t.progress.write_line(f"{t.updates} updates in {t.counters.seconds:.0f} s: {figures(t)}; results in {t.run.path}")


def summary(t: Training) -> dict[str, Any]:
    """Returns the content of summary.json. `length` is the length solved, `stage` the size and repeats in training."""
    total, count = t.counters.injected.tolist()
    return {
        **{name: getattr(t.options, name) for name in ("task", "seed", "model", "hidden", "bptt", "synthesizer")},
        "parameters": sum(parameter.numel() for parameter in t.model.parameters()),
        "torch": torch.__version__,
        "length": t.curriculum.solved,
        "curve": t.counters.curve,
        "stage": list(t.curriculum.stage),
        "fresh_error": t.counters.fresh_error,
        "updates": t.updates,
        "sequences": t.counters.sequences,
        "seconds": t.counters.seconds,
        "process_seconds": t.counters.process_seconds,
        "injected_ratio": total / count if count else None,
        "peak_memory_mb": peak_memory_mb(t.device),
    }


def prepare(plan: Plan[TaskOptions], lock: RunLock) -> Training:
    """Builds all parts of the run and then its directory. Nothing is written if an option is not valid."""
    options = resolve_options(plan.options)
    checkpoint = plan.checkpoint
    torch.set_num_threads(options.threads)
    device = device_of(options.device)
    task = TASKS[options.task]
    start = None if options.start is None else Stage(options.start)
    curriculum = Curriculum(task, start=start)
    stream = TaskStream(
        task,
        lanes=options.batch_size,
        bptt=options.bptt,
        lookahead=options.resolve(options.bptt).window_lookahead,
        seed=options.seed,
        stage=start,
    )
    fresh = torch.Generator().manual_seed(options.seed + CHECK_SEED)
    torch.manual_seed(options.seed)
    size = {"hidden": options.hidden, "layers": options.layers}
    model = VectorRNN(task.input_size, task.target_size, cell=options.model, **size).to(device)
    trainer = build_trainer(options, task, model, device)
    counters = Counters(loss=torch.zeros((), device=device), injected=torch.zeros(2, device=device))
    name = f"{options.task}-{options.model}{options.layers}x{options.hidden}-{options.synthesizer}"
    run = plan.run or RunDirectory(new_run_path(f"{name}-T{options.bptt}-seed{options.seed}"))
    if checkpoint is not None:
        with checkpoint_errors(run.path):
            counters = restore(checkpoint, trainer, stream, curriculum, fresh, device)
    plan.initialize_dir(run, options, lock)
    log = RunLog(run.path, resumed_at=trainer.steps)
    log.dashboard(DASHBOARD)
    log.configuration(trainer.steps, config_of(options))
    if checkpoint is not None:
        with checkpoint_errors(run.path):
            log.load_state_dict(checkpoint["log"], device)
    progress = Progress(options.updates, trainer.steps)
    for note in (plan.note, lock.missing, *remarks(options, options.bptt, cells=options.model == "lstm")):
        if note:
            progress.write_line(note)
    return Training(options, run, device, task, stream, curriculum, fresh, model, trainer, counters, log, progress)


def build_trainer(options: TaskOptions, task: Task, model: VectorRNN, device: torch.device) -> dni.SequenceTrainer:
    """Returns the trainer with its optimizers. A window's loss is the sum over time and the mean over lanes."""
    chosen = options.resolve(options.bptt)
    model.native_steps = native_up_to(chosen.state_products)
    spec = ModelSpec(
        model,
        task.losses,
        example=model.initial_state(1),
        cells=dni.LSTM_CELLS if options.model == "lstm" else False,
        encode=lambda: (nn.Linear(task.input_size, EMBED), nn.Linear(task.target_size, EMBED)),
        outputs=task.target_size,
    )
    synthesizer = build_synthesizer(chosen, spec)
    auxiliary = build_auxiliary(chosen, spec)
    for part in (synthesizer, auxiliary):
        if part is not None:
            part.to(device)
    learning = learning_parameters(synthesizer, auxiliary)
    return dni.SequenceTrainer(
        model,
        adam(list(model.parameters()), options.lr, device),
        task.losses,
        synthesizer=synthesizer,
        synthesizer_optimizer=adam(learning, options.synthesizer_lr, device) if learning else None,
        config=dni.SyntheticGradientConfig(auxiliary=auxiliary, **trainer_settings(chosen)),
        clip=options.clip or None,
        reduction="lane-mean",
    )


def restore(
    checkpoint: dict[str, Any],
    trainer: dni.SequenceTrainer,
    stream: TaskStream,
    curriculum: Curriculum,
    fresh: torch.Generator,
    device: torch.device,
) -> Counters:
    """Restores trainer, stream, curriculum and random generators from a checkpoint and returns its counters."""
    trainer.load_state_dict(checkpoint["trainer"], stream.lanes)
    stream.load_state_dict(checkpoint["stream"])
    curriculum.load_state_dict(checkpoint["curriculum"])
    fresh.set_state(checkpoint["fresh"])
    set_random_state(checkpoint["random"])
    saved = checkpoint["counters"]
    return Counters(**saved | {name: saved[name].to(device) for name in ("loss", "injected")})
