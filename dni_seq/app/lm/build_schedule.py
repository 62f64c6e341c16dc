"""Builds the schedule of a language-model run's learning rates, from the run's length."""

from __future__ import annotations

import math
from collections.abc import Callable

from dni_seq.app.build.schedule import Schedule
from dni_seq.app.lm.options import LanguageModelOptions
from dni_seq.core.optimizer_step import parts_of
from dni_seq.streams import WindowStream
from dni_seq.trainer import SequenceTrainer


def total_steps(options: LanguageModelOptions, stream: WindowStream) -> int | None:
    """Returns the number of windows of the whole run, None if it is not known."""
    limits = [options.max_steps]
    if options.max_tokens is not None:
        limits.append(math.ceil(options.max_tokens / (stream.lanes * stream.bptt)))
    if options.epochs is not None and stream.windows_per_epoch is not None:
        limits.append(options.epochs * stream.windows_per_epoch)
    return min((limit for limit in limits if limit is not None), default=None)


def windows_behind(options: LanguageModelOptions, stream: WindowStream, steps: int, tokens: int) -> int:
    """Returns how many windows of the present T the run has behind it, of those that `total_steps` counts.

    Args:
        options: the run's options; T may be another than at the start.
        stream: the training text.
        steps: number of windows so far.
        tokens: number of tokens in them.
    """
    if total_steps(options, stream) == options.max_steps:
        return steps
    return round(tokens / (stream.lanes * stream.bptt))


def build_schedule(options: LanguageModelOptions, trainer: SequenceTrainer, stream: WindowStream) -> Schedule | None:
    """Returns the schedule of the model's rate, which the synthesizer's follows unless told otherwise; None for a constant.

    Raises:
        ValueError: the schedule needs the length of the run, or the warm-up is longer than the run.
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
    """Returns a function that sets the injected share of a trainer's messages to a part of what it is now.

    Raises:
        ValueError: the share is automatic.
    """
    scale = trainer.synthetic_scale
    if not isinstance(scale, float | int):
        raise ValueError("--scale-schedule follow needs a number as --synthetic-scale: auto sets it by comparisons")

    def tell(share: float) -> None:
        trainer.synthetic_scale = scale * share

    return tell
