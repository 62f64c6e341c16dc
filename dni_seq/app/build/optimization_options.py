"""The options of the optimizer and of its learning rate.

A training step is one window. An update follows every n windows, with n from `--accumulate`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from dni_seq.app.runs.options import at_least, flag, option, share

GROUP = "optimization"

OPTIMIZERS = ("adam", "adamw", "sgd")
SCHEDULES = ("constant", "linear", "cosine", "step", "plateau")


def _between(value: float) -> str | None:
    """Checks that a number is above 0 and below 1."""
    return None if 0 < value < 1 else "above 0 and below 1"


@dataclass(frozen=True)
class OptimizationOptions:
    """The options of the model's optimizer, except its learning rate and clip, whose defaults depend on the tokenizer.

    The schedule is None until the command fills it in; None acts as "constant".
    `warmup` counts updates; `accumulate` counts windows.
    """

    optimizer: str = option("adam", "optimizer of the model", group=GROUP, choices=OPTIMIZERS)
    weight_decay: float = option(
        0.0, "weight decay: decoupled with adamw, else an L2 penalty", group=GROUP, check=at_least(0)
    )
    momentum: float = option(0.0, "momentum of sgd", group=GROUP, check=share)
    accumulate: int = option(1, "windows whose gradients are summed for one update", group=GROUP, check=at_least(1))
    schedule: str = option(
        None,
        "learning rate after the warm-up; linear and cosine fall to --min-lr at the end of the run; step is multiplied by "
        "--decay after each epoch; plateau, after each validation that is not the best so far; a run whose length is not "
        "known has a constant rate by default",
        group=GROUP,
        choices=SCHEDULES,
        shown="linear to a known end",
    )
    warmup: int = option(0, "updates in which the learning rate rises from 0 to --lr", group=GROUP, check=at_least(0))
    min_lr: float = option(0.0, "lowest learning rate after the warm-up", group=GROUP, check=at_least(0))
    decay: float = option(0.5, "step and plateau: factor on the learning rate", group=GROUP, check=_between)
    decay_after: int = option(1, "step: epochs at the full learning rate", group=GROUP, check=at_least(0))
    scale_schedule: str = option(
        "constant",
        "share of the message that is injected: constant, or follow the learning rate in proportion",
        group=GROUP,
        choices=("constant", "follow"),
    )
    synthesizer_schedule: str = option(
        "follow",
        "learning rate of the synthesizer: follow the model's in proportion, or stay constant",
        group=GROUP,
        choices=("follow", "constant"),
    )
    patience: int | None = option(
        None,
        "stop after this many validations in a row that are not the best so far",
        group=GROUP,
        check=at_least(1),
        shown="never",
    )

    @property
    def falls_to_the_end(self) -> bool:
        """Whether the learning rate falls to `min_lr` at the end of the run. The length of the run must then be known."""
        return self.schedule in ("linear", "cosine")

    @property
    def has_schedule(self) -> bool:
        """Whether the learning rate changes during a run."""
        return self.schedule not in (None, "constant") or self.warmup > 0


def check_optimization(options: OptimizationOptions, lr: float) -> None:
    """Raises a ValueError if the lowest learning rate is not below `lr`, the highest one."""
    if options.min_lr >= lr:
        raise ValueError(f"--min-lr {options.min_lr:g} must be below --lr {lr:g}")


def optimization_remarks(options: OptimizationOptions) -> Iterator[str]:
    """Yields one warning per reason for which options of the optimizer have no effect."""
    for reason, names in _without_effect(options):
        changed = [flag(name) for name in names if getattr(options, name) != getattr(OptimizationOptions, name)]
        if changed:
            yield f"no effect with {reason}: {', '.join(changed)}"


def optimization_without_effect(options: OptimizationOptions) -> set[str]:
    """Returns the names of the options of the optimizer that have no effect, given the others."""
    return {name for _, names in _without_effect(options) for name in names}


def _without_effect(options: OptimizationOptions) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Yields pairs: a reason as text, and the names of the options that have no effect for this reason."""
    kind, schedule = options.optimizer, options.schedule
    reasons: list[tuple[bool, str, tuple[str, ...]]] = [
        (kind != "sgd", f"--optimizer {kind}", ("momentum",)),
        (schedule in (None, "constant"), "--schedule constant", ("min_lr", "decay", "decay_after")),
        (options.falls_to_the_end, f"--schedule {schedule}", ("decay", "decay_after")),
        (schedule == "plateau", "--schedule plateau", ("decay_after",)),
        (not options.has_schedule, "a constant learning rate", ("scale_schedule", "synthesizer_schedule")),
    ]
    yield from ((reason, names) for holds, reason, names in reasons if holds)
