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

An update is one window. The length of a task is N for N vectors to copy, N times R for N vectors to copy R times, and the
number of steps for the adding problem. A length is solved if the mean error on 1,000 fresh sequences is below 0.15. The
module dni_seq.streams.algorithmic_tasks defines the error.

A run writes to its directory: metrics.csv, TensorBoard events (--logger), config.json, checkpoints/last.pt and
previous.pt, and summary.json.
TensorBoard has these keys over updates, as averages since the last point unless stated otherwise:
    task/length                the length solved so far
    task/training_length       the length in training
    task/error_bits            mean error of finished training sequences, bits per bit (adding: task/error, 1 at start)
    task/fresh_error_bits      mean error of a check on fresh sequences (adding: task/fresh_error)
    synthetic/..., fidelity/..., gradient/..., train/skipped, memory/peak_mb
                               as train_lm.py writes them; ratios are averaged over the windows where they exist
    speed/updates_per_second   speed of this session; its time includes the checks on fresh sequences
Ctrl-C saves a checkpoint and exits with status 130, SIGTERM with 143, SIGHUP with 129. Invalid input prints one line on
stderr and exits with status 2.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

import dni_seq as dni
from dni_seq.app.build.backpropagation import set_backpropagation
from dni_seq.app.build.credit import ModelSpec, synthetic_arguments
from dni_seq.app.build.device import device_of
from dni_seq.app.build.method import brief_method, describe_model
from dni_seq.app.build.optimizers import adam
from dni_seq.app.build.unused_options import remarks
from dni_seq.app.runs.allocator import keep_freed_memory
from dni_seq.app.runs.checkpoint import checkpoint_errors
from dni_seq.app.runs.command import run_command
from dni_seq.app.runs.directory import RunDirectory, new_run_path
from dni_seq.app.runs.lock import RunLock
from dni_seq.app.runs.options import parse, report
from dni_seq.app.runs.resume import plan_run
from dni_seq.app.runs.trackers import check_logger
from dni_seq.app.tasks.options import TaskOptions, as_given, resolve_options
from dni_seq.app.tasks.training import TaskCounters, TaskRun
from dni_seq.distributed.process_group import Ranks
from dni_seq.models.lstm_kernels import native_up_to
from dni_seq.models.recurrent import state_cells
from dni_seq.models.vector_rnn import VectorRNN
from dni_seq.streams.algorithmic_tasks import TASKS, Curriculum, Stage, Task, TaskStream, input_losses
from dni_seq.synthesizers.for_model import EMBED

_PROG = "train_tasks"

CHECK_SEED = 2**31
"""Offset from the run's seed to the seed of the fresh sequences, so that they differ from the training sequences."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit status."""
    keep_freed_memory()
    with RunLock() as lock:
        try:
            given = parse(TaskOptions, arguments, prog=_PROG, description=__doc__ or "", as_given=as_given)
        except (ValueError, OSError) as error:
            return report(_PROG, error)
        return run_command(_PROG, Ranks(), lambda: prepare(given, lock))


def prepare(given: dict[str, Any], lock: RunLock) -> TaskRun:
    """Builds all parts of the run and then its directory. Nothing is written if an option is not valid.

    Args:
        given: the options from the command line, by name.
        lock: the lock of the run's directory.

    Raises:
        ValueError: an option or the checkpoint cannot be used.
        OSError: the directory cannot be locked.
    """
    plan = plan_run(TaskOptions, given, lock)
    check_logger(plan.options.logger)
    options = resolve_options(plan.options)
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
    torch.manual_seed(options.seed)
    size = {name: getattr(options, name) for name in ("hidden", "layers", "traces", "trace_decay")}
    model = VectorRNN(task.input_size, task.target_size, cell=options.model, **size).to(device)
    run = plan.run or RunDirectory(new_run_path(run_name(options)))
    for line in introduction(options, stream.stage, model, device, run):
        print(line, flush=True)
    training = TaskRun(
        options=options,
        run=run,
        device=device,
        stream=stream,
        trainer=build_trainer(options, task, model, device),
        counters=TaskCounters(loss=torch.zeros((), device=device), injected=torch.zeros(2, device=device)),
        task=task,
        curriculum=curriculum,
        fresh=torch.Generator().manual_seed(options.seed + CHECK_SEED),
        model=model,
    )
    with checkpoint_errors(training.run.path):
        training.restore(plan.checkpoint)
    training.begin(plan, lock, remarks(options, options.bptt, cells=options.model == "lstm"))
    return training


def introduction(
    options: TaskOptions, stage: Stage, model: nn.Module, device: torch.device, run: RunDirectory
) -> Iterator[str]:
    """Yields three lines: task and first length, model and parameters, method with device and run directory."""
    lanes = f"{options.batch_size} sequences at a time"
    yield f"task: {options.task}, from length {stage.length}; {options.updates:,} updates, {lanes}"
    yield describe_model(model, options.model, options.layers, options.hidden)
    yield f"method: {brief_method(options.resolve(options.bptt), options)}; device {device}; run directory {run.path}"


def run_name(options: TaskOptions) -> str:
    """Returns a readable name for a run's directory, from its main options."""
    size = f"{options.model}{options.layers}x{options.hidden}"
    return f"{options.task}-{size}-{options.synthesizer}-T{options.bptt}-seed{options.seed}"


def build_trainer(options: TaskOptions, task: Task, model: VectorRNN, device: torch.device) -> dni.SequenceTrainer:
    """Returns the trainer with its optimizers. A window's loss is the sum over time and the mean over lanes."""
    chosen = options.resolve(options.bptt)
    model.native_steps = native_up_to(chosen.state_products)
    spec = ModelSpec(
        model,
        task.losses,
        example=model.initial_state(1),
        cells=state_cells(model.rnn),
        encode=lambda: (nn.Linear(task.input_size, EMBED), nn.Linear(task.target_size, EMBED)),
        outputs=task.target_size,
        past_loss=input_losses,
        inputs=task.input_size,
    )
    trainer = dni.SequenceTrainer(
        model,
        adam(list(model.parameters()), options.lr),
        task.losses,
        clip=options.clip or None,
        reduction="lane-mean",
        **synthetic_arguments(chosen, spec, options.synthesizer_lr),
    )
    set_backpropagation(trainer, options, options.bptt)
    return trainer
