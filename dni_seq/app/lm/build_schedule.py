"""Builds the schedule of the learning rates of a language-model run, and computes the length of the run."""

from __future__ import annotations

import math
from collections.abc import Callable

from dni_seq.app.build.schedule import Schedule
from dni_seq.app.lm.options import LanguageModelOptions
from dni_seq.core.optimizer_step import parts_of
from dni_seq.streams import WindowStream
from dni_seq.trainer import SequenceTrainer


def total_steps(options: LanguageModelOptions, stream: WindowStream) -> int | None:
    """Returns the number of windows after which the run ends, the smallest of its limits; None if no limit is known."""
    limits = [options.max_steps]
    if options.max_tokens is not None:
        limits.append(math.ceil(options.max_tokens / (stream.lanes * stream.bptt)))
    if options.epochs is not None and stream.windows_per_epoch is not None:
        limits.append(options.epochs * stream.windows_per_epoch)
    return min((limit for limit in limits if limit is not None), default=None)


def windows_behind(options: LanguageModelOptions, stream: WindowStream, steps: int, tokens: int) -> int:
    """Returns the run's progress so far in windows of the present T, so that it compares with `total_steps`.

    If the run ends after `--max-steps` windows, the progress is `steps`. Otherwise it is the number of windows of the
    present T that have `tokens` tokens.

    Args:
        options: the run's options. T may differ from the T at the start of the run.
        stream: the training text.
        steps: number of windows so far.
        tokens: number of tokens in these windows.
    """
    if total_steps(options, stream) == options.max_steps:
        return steps
    return round(tokens / (stream.lanes * stream.bptt))


def build_schedule(options: LanguageModelOptions, trainer: SequenceTrainer, stream: WindowStream) -> Schedule | None:
    """Returns the schedule of the model's learning rate; None if the rate is constant.

    With `--synthesizer-schedule follow`, the learning rate of the synthesizer changes in proportion to the model's. With
    `--scale-schedule follow`, the injected share of the messages changes in this proportion.

    Raises:
        ValueError: the schedule needs the length of the run, which is not known; the warm-up is longer than the run; or the
            injected share is automatic and must follow the schedule.
    """
    if not options.has_schedule:
        return None
    optimizers = parts_of(trainer.optimizer)
    follows = options.synthesizer_schedule == "follow"
    if follows and trainer.credit is not None and trainer.credit.optimizer is not None:
        optimizers = [*optimizers, trainer.credit.optimizer]
    steps = total_steps(options, stream)
    tell = scale_setter(trainer) if options.scale_schedule == "follow" and trainer.credit is not None else None
    return Schedule(options, optimizers, None if steps is None else max(steps // options.accumulate, 1), tell)


def scale_setter(trainer: SequenceTrainer) -> Callable[[float], None]:
    """Returns a function that sets the trainer's `synthetic_scale` to its value at this call times the function's argument.

    Raises:
        ValueError: `synthetic_scale` is "auto".
    """
    scale = trainer.synthetic_scale
    if not isinstance(scale, float | int):
        raise ValueError("--scale-schedule follow needs a number as --synthetic-scale: auto sets it by comparisons")

    def tell(share: float) -> None:
        trainer.synthetic_scale = scale * share

    return tell
