"""Train a recurrent network on copy, repeat copy or the adding problem, with a curriculum that raises the length.

python scripts/train_tasks.py --task copy --bptt 4 --synthesizer none
    How long a sequence can plain truncated BPTT copy with windows of 4 steps? 50,000 updates, about ten minutes of one core.
python scripts/train_tasks.py --task copy --bptt 4 --synthesizer multi-horizon
    The same with synthetic gradients.
python scripts/train_tasks.py --task repeat-copy --bptt 4 --synthesizer exact --exact-steps 8
    With the exact gradient of the next 8 steps.
python scripts/train_tasks.py --run-dir runs/mine --resume auto
    Go on where runs/mine was stopped or killed, or begin.
tensorboard --logdir runs
    Watch the curves.

An update is one window. The length is N for N vectors to copy, N R for R repeats, and the steps of an adding problem. A
length is solved when the mean error on 1,000 fresh sequences is below 0.15 (dni_seq/tasks.py says what the error is).

A run leaves in its directory: TensorBoard events, config.json, checkpoints/last.pt and previous.pt, and summary.json.
TensorBoard has, over
updates, as averages since the last point where not said otherwise:
    task/length                the length solved so far
    task/training_length       the length that is trained now
    task/error_bits            mean error of the training sequences that ended, bits a bit (adding: task/error, a share of 1)
    task/fresh_error_bits      mean error of a check on fresh sequences (adding: task/fresh_error)
    synthetic/..., fidelity/..., gradient/..., train/skipped, memory/peak_mb
                               as in dni_seq/runlog.py, ratios over the windows where they mean something
    speed/updates_per_second   of this session, the checks' time included
Ctrl-C saves a checkpoint and ends with status 130, SIGTERM with 143. Bad input ends with one line on stderr and status 2.
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
from dni_seq.app.build.credit import EMBED, build_auxiliary, build_synthesizer, learning_parameters, trainer_settings
from dni_seq.app.build.credit_options import lookahead_of, resolve, state_products
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

LOG_EVERY = 100
"""Updates between two points of the curves."""

SAVE_SECONDS = 60.0
"""A kill loses about this much work at most."""

DASHBOARD: Layout = MappingProxyType(
    {
        "length": {"solved, and in training": ["task/length", "task/training_length"]},
        "error": {"of training sequences and of checks": ["task/error", "task/fresh_error"]},
        "synthetic gradients": LAYOUT["synthetic gradients"],
        "stability": {"gradient norms": ["gradient/norm", "gradient/synthesizer_norm"]},
        "resources": {"updates a second": ["speed/updates_per_second"], "peak memory, MiB": ["memory/peak_mb"]},
    }
)
"""TensorBoard's tab "Custom Scalars"."""

CHECK_SEED = 2**31
"""Added to the seed for the sequences of checks, which are then none of the training's."""


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    keep_freed_memory()
    with RunLock() as lock:
        return command(arguments, lock)


def command(arguments: Sequence[str] | None, lock: RunLock) -> int:
    """The command, which takes the lock of the run's directory; returns its exit status."""
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
        going_on = f"to go on: --run-dir {training.run.path} --resume auto"
        return report("train_tasks", ValueError(f"{error} (saved at update {training.updates}; {going_on})"))
    except OSError as error:
        return report("train_tasks", error)
    finally:
        training.progress.close()
        training.log.close()


@dataclass
class Counters:
    """How far a run is; part of its checkpoint.

    Attributes:
        sequences: of all lanes together, ended so far.
        seconds: the run's time so far, over all sessions, checks included.
        process_seconds: the same in CPU time of the process, which other work on the machine does not lengthen.
        curve: (update, length solved) at each length solved.
        fresh_error: of the latest check, None before the first.
        loss: 0-d, the loss of the sequence under way, nats (or squared error) summed over its steps so far.
        steps: of the sequence under way that count, so far.
        injected: [2], sum and number of the injected ratios that mean something.
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
        """Take the time since the last call into the counters."""
        now, process_now = time.monotonic(), time.process_time()
        self.counters.seconds += now - self.clock
        self.counters.process_seconds += process_now - self.process_clock
        self.clock, self.process_clock = now, process_now


def train(t: Training, stop: StopSignals) -> int:
    """Step through the stream until the run is done, or until a signal; returns the exit status."""
    windows = iter(t.stream)
    while t.updates < t.options.updates:
        step(t, next(windows))
        if t.updates % LOG_EVERY == 0:
            log_point(t)
            t.log.clear()
        if stop.received is not None:
            save(t)
            t.progress.write_line(f"stopped at update {t.updates}; to go on: --run-dir {t.run.path} --resume auto")
            return stop.exit_status
        if time.monotonic() - t.saved_at > SAVE_SECONDS:
            save(t)
    finish(t)
    return 0


def step(t: Training, window: Window) -> None:
    """Train on one window; where a sequence ends with it, ask the curriculum."""
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
    """What a step measured, by TensorBoard key; NaN where it means nothing.

    A ratio to a gradient that is zero, as before the first step that counts, means nothing; nor does the injected ratio of a
    window with which the sequence has ended, behind which there is nothing to inject.
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
    """Score the sequence that has ended; where it looks solved, check on fresh ones, and raise the length."""
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
    """The latest figures in a few words."""
    return f"length {t.curriculum.solved} solved, {t.curriculum.stage.length} in training"


def log_point(t: Training) -> None:
    """A point of the curves."""
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
    """Write the last checkpoint; the log is flushed first, so that it never lacks an update that the checkpoint has."""
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
    """The end of a run: last point of the curves, checkpoint, summary."""
    if t.counters.logged_at != t.updates:
        log_point(t)
    deciding = {name: value for name, value in config_of(t.options).items() if name not in t.options.MAY_CHANGE}
    t.log.hyperparameters(deciding, ["task/length", "speed/updates_per_second"])
    save(t)
    write_json(t.run.summary, summary(t))
    t.progress.write_line(f"{t.updates} updates in {t.counters.seconds:.0f} s: {figures(t)}; all in {t.run.path}")


def summary(t: Training) -> dict[str, Any]:
    """What summary.json holds; `length` is the length solved, `stage` the size and the repeats being trained."""
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
    """Build all parts of the run, and only then its directory; nothing is written where something is wrong."""
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
        lookahead=lookahead_of(options, options.bptt),
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
    """The trainer of the options, with its optimizers; a window's loss is the sum over time and the mean over lanes."""
    chosen = resolve(options, options.bptt)
    example = model.initial_state(1)
    model.native_steps = native_up_to(state_products(chosen))
    synthesizer = build_synthesizer(
        chosen,
        model,
        task.losses,
        bptt=options.bptt,
        example=example,
        cells=dni.LSTM_CELLS if options.model == "lstm" else False,
        encode=lambda: (nn.Linear(task.input_size, EMBED), nn.Linear(task.target_size, EMBED)),
        outputs=task.target_size,
        reduction="lane-mean",
    )
    auxiliary = build_auxiliary(options, example)
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
        auxiliary=auxiliary,
        clip=options.clip or None,
        reduction="lane-mean",
        **trainer_settings(chosen),
    )


def restore(
    checkpoint: dict[str, Any],
    trainer: dni.SequenceTrainer,
    stream: TaskStream,
    curriculum: Curriculum,
    fresh: torch.Generator,
    device: torch.device,
) -> Counters:
    """Put trainer, stream, curriculum and random generators where a checkpoint was."""
    trainer.load_state_dict(checkpoint["trainer"], stream.lanes)
    stream.load_state_dict(checkpoint["stream"])
    curriculum.load_state_dict(checkpoint["curriculum"])
    fresh.set_state(checkpoint["fresh"])
    set_random_state(checkpoint["random"])
    saved = checkpoint["counters"]
    return Counters(**saved | {name: saved[name].to(device) for name in ("loss", "injected")})
