"""Reports what a run would be: its shapes, its parameters, the losses that train them, its memory, and the time per epoch.

Builds all parts as in a run and trains on a few windows. Writes no file.
"""

from __future__ import annotations

import dataclasses
import itertools
import time
from collections.abc import Iterator

import torch
from torch import nn

from dni_seq.app.build.device import device_of
from dni_seq.app.build.optimization_options import optimization_remarks
from dni_seq.app.build.unused_options import remarks
from dni_seq.app.lm import build as lm
from dni_seq.app.lm.build_schedule import build_schedule
from dni_seq.app.lm.build_trainer import build_trainer
from dni_seq.app.lm.options import LanguageModelOptions, resolve_options
from dni_seq.app.runs.tensorboard import peak_memory_mb
from dni_seq.core.states import floating
from dni_seq.core.windows import Window, on_device
from dni_seq.models.language_model import LanguageModel
from dni_seq.streams import WindowStream
from dni_seq.trainer import SequenceTrainer

WARM_UP = 3
"""Number of first steps that are not timed, because they allocate memory."""

SECONDS = 3.0
"""Shortest time over which steps are timed, in seconds. Some work happens only every n windows, so few steps miss it."""

LEAST = 10
"""Smallest number of steps that are timed."""


def dry_run(options: LanguageModelOptions) -> Iterator[str]:
    """Yields the lines of the report on a run with these options.

    Raises:
        ValueError: the options contradict each other, or the data cannot be used.
        OSError: a file cannot be read.
    """
    torch.set_num_threads(options.threads)
    device = device_of(options.device)
    corpus = lm.open_text(options)
    options = resolve_options(options, corpus)
    tokenizer = lm.build_tokenizer(options, corpus)
    stream = lm.open_training(corpus, tokenizer, options)
    valid = lm.open_split(corpus, "valid", tokenizer, options)
    torch.manual_seed(options.seed)
    model = lm.build_model(options, tokenizer.vocabulary_size, device)
    trainer = build_trainer(options, model, device)
    build_schedule(options, trainer, stream)  # only for its errors, which the run would raise too
    windows = (on_device(window, device) for window in itertools.chain.from_iterable(itertools.repeat(stream)))
    first = next(windows)
    yield from corpus.notes
    yield from remarks(options, options.bptt, cells=options.model == "lstm")
    yield from optimization_remarks(options)
    yield f"data: {corpus.name}, by {options.tokenizer}, vocabulary {tokenizer.vocabulary_size:,}"
    yield from describe_shapes(trainer, first)
    yield from describe_parameters(trainer)
    yield from trainer.describe(first).lines()
    seconds = time_steps(trainer, itertools.chain([first], windows))
    yield f"memory: {peak_memory_mb(device):,.0f} MiB at its peak after {trainer.steps} steps, data and libraries included"
    yield from describe_time(options, stream, valid, model, seconds)


def describe_shapes(trainer: SequenceTrainer, window: Window) -> Iterator[str]:
    """Yields the shapes of a window, of the model's outputs and state, and of the lookahead."""
    lanes = window.inputs.shape[1]
    start = trainer.runner.initial_state(lanes)
    with torch.no_grad():
        outputs, _ = trainer.model(window.inputs, start)
    yield f"inputs and targets [T, B]: {list(window.inputs.shape)}"
    yield f"outputs [T, B, V]: {list(outputs.shape)}"
    yield f"state, each [L, B, H]: {', '.join(str(list(leaf.shape)) for leaf in floating(start))}"
    if window.lookahead is not None:
        yield f"lookahead [m, B]: {list(window.lookahead.inputs.shape)}"


def describe_parameters(trainer: SequenceTrainer) -> Iterator[str]:
    """Yields a line for each part with its number of parameters, and a line with their memory.

    The memory is that of the parameters, their gradients and Adam's two moments, in MiB.
    """
    parts: dict[str, nn.Module | None] = {
        "model": trainer.model,
        "auxiliary task": trainer.credit.auxiliary if trainer.credit else None,
    }
    if trainer.credit is not None:
        parts["synthesizer"] = trainer.credit.synthesizer
    total = 0
    for name, part in parts.items():
        if part is None:
            continue
        count = sum(parameter.numel() for parameter in part.parameters())
        total += sum(parameter.numel() * parameter.element_size() for parameter in part.parameters())
        children = {child: sum(p.numel() for p in module.parameters()) for child, module in part.named_children()}
        inner = ", ".join(f"{child} {size:,}" for child, size in children.items() if size)
        yield f"parameters of the {name}: {count:,}" + (f" ({inner})" if inner else "")
    yield f"memory of parameters, gradients and Adam's moments: {4 * total / 2**20:,.0f} MiB"


def time_steps(trainer: SequenceTrainer, windows: Iterator[Window]) -> float:
    """Trains on windows after a warm-up and returns the mean time of a step in seconds."""
    steps, begin = 0, 0.0
    for count, window in enumerate(windows):
        if count == WARM_UP:
            begin = time.monotonic()
        steps = count - WARM_UP
        if steps >= LEAST and time.monotonic() - begin >= SECONDS:
            break
        result = trainer.step(window.inputs, window.targets, ends=window.ends, mask=window.mask, lookahead=window.lookahead)
        float(result.loss)  # waits for a GPU
    return (time.monotonic() - begin) / steps


def describe_time(
    options: LanguageModelOptions, stream: WindowStream, valid: WindowStream, model: LanguageModel, seconds: float
) -> Iterator[str]:
    """Yields lines with the time of a step, of an epoch, of a validation and of all epochs.

    Streamed text has no known epoch: the second line then has the time of a million tokens and is the last one.
    """
    rate = stream.lanes * stream.bptt / seconds
    yield f"speed: {1000 * seconds:,.1f} ms per step, {rate:,.0f} tokens per second"
    if stream.windows_per_epoch is None:
        yield f"time: {duration(1e6 / rate)} for a million tokens; the length of an epoch of streamed text is unknown"
        return
    begin = time.monotonic()
    few = options.batch_size * lm.EVALUATION_WINDOW * 4
    lm.score(model, valid, dataclasses.replace(options, eval_tokens=few))
    scored = min(options.eval_tokens or valid.tokens_per_epoch or few, valid.tokens_per_epoch or few)
    validation = (time.monotonic() - begin) * scored / min(few, scored)
    training = stream.windows_per_epoch * seconds
    steps = f"{stream.windows_per_epoch:,} steps"
    yield f"time: {duration(training)} for an epoch of {steps}, {duration(validation)} for a validation"
    if options.epochs is not None:
        yield f"total time: {duration(options.epochs * (training + validation))} for {options.epochs} epochs"


def duration(seconds: float) -> str:
    """Returns a time as text in at most two units: "3 h 20 min", "5 min 7 s", "12 s"."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"
