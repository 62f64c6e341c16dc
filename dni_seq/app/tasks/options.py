"""The options of a run on algorithmic tasks.

To add an option: declare it here, and use it in `train.py`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, ClassVar, cast

from dni_seq.app.build.backpropagation_options import BackpropagationOptions
from dni_seq.app.build.credit_options import GROUP as CREDIT
from dni_seq.app.build.credit_options import STANDS_IN, SYNTHESIZERS, CreditOptions, without_resolved
from dni_seq.app.runs.options import above_zero, at_least, build, option
from dni_seq.app.runs.trackers import LOGGER_HELP, LOGGERS
from dni_seq.models.cells import CELLS
from dni_seq.streams.algorithmic_tasks import TASKS

_TASK, _MODEL, _RUN = "task", "model", "run"


@dataclass(frozen=True)
class TaskOptions(BackpropagationOptions, CreditOptions):
    """The options of `scripts/train_tasks.py`."""

    MAY_CHANGE: ClassVar[frozenset[str]] = frozenset({"updates", "threads", "device", "logger"})
    MAY_MOVE: ClassVar[frozenset[str]] = frozenset()
    RECORDED_LATER: ClassVar[Mapping[str, Any]] = MappingProxyType({})
    COMMON: ClassVar[frozenset[str]] = frozenset(
        {"task", "start", "updates", "batch_size", "lr", "clip", "seed", "threads", "device", "run_dir", "resume"}
        | {"model", "hidden", "layers", "synthesizer", "bptt", "horizons", "lookahead", "synthetic_scale"}
    )
    GROUPS: ClassVar[tuple[str, ...]] = (_TASK, _RUN, _MODEL, CREDIT)
    OF_THE_CALL: ClassVar[frozenset[str]] = frozenset({"run_dir", "resume"})

    synthesizer: str = option(None, STANDS_IN, group=CREDIT, choices=SYNTHESIZERS, shown="multi-horizon; adding: none")
    task: str = option("copy", "algorithmic task to train on", group=_TASK, choices=tuple(TASKS))
    start: int | None = option(
        None,
        "initial length: vectors to copy, or steps of the adding problem",
        group=_TASK,
        check=at_least(1),
        shown=", ".join(f"{name} {task.first.size}" for name, task in TASKS.items()),
    )
    model: str = option("lstm", "recurrent cell", group=_MODEL, choices=CELLS)
    hidden: int = option(256, "hidden units per layer", group=_MODEL, check=at_least(1))
    layers: int = option(1, "recurrent layers", group=_MODEL, check=at_least(1))
    bptt: int = option(4, "window length T in steps; gradients are exact within a window", group=CREDIT, check=at_least(1))
    updates: int = option(50_000, "number of windows to train on", group=_RUN, check=at_least(1))
    batch_size: int = option(32, "batch size B: sequences that run in parallel", group=_RUN, check=at_least(1))
    lr: float = option(1e-3, "learning rate of Adam", group=_RUN, check=above_zero)
    clip: float = option(5.0, "largest gradient norm of the model; 0: no limit", group=_RUN, check=at_least(0))
    seed: int = option(1111, "random seed of weights and sequences", group=_RUN, check=at_least(0))
    threads: int = option(1, "CPU threads", group=_RUN, check=at_least(1))
    device: str | None = option(None, "device: cpu, cuda, cuda:1, mps", group=_RUN, shown="cuda if available, else cpu")
    run_dir: str | None = option(None, "directory of the run", group=_RUN, metavar="DIR", shown="a new one in runs/")
    resume: str | None = option(
        None,
        "resume the run in --run-dir if there is one (auto), or in RUN_DIR; or from RUN_DIR/checkpoints/NAME.pt",
        group=_RUN,
        metavar="auto|PATH",
    )
    logger: str = option("tensorboard", LOGGER_HELP, group=_RUN, choices=LOGGERS)


def resolve_options(options: TaskOptions) -> TaskOptions:
    """Returns the options with a missing synthesizer and a missing K filled in. config.json keeps both for a resumed run."""
    if cast("str | None", options.synthesizer) is None:  # None is possible here, although the field's type is str
        options = dataclasses.replace(options, synthesizer=default_synthesizer(options.task))
    return dataclasses.replace(options, horizons=options.horizons_at(options.bptt))


def default_synthesizer(task: str) -> str:
    """Returns the synthesizer of a run on `task` that names none."""
    # On the adding problem synthetic gradients bring no gain and double the time (docs/results/copying.md).
    return "none" if task == "adding" else "multi-horizon"


def as_given(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Returns the options that a new run takes from a configuration file, without those that the file's run has filled in.

    These are the sizes that `without_resolved` removes, and a synthesizer that is the default of the file's task.
    """
    options = build(TaskOptions, config)
    given = without_resolved(config, options, resolve_options)
    if options.synthesizer == default_synthesizer(options.task):
        given.pop("synthesizer", None)
    return given
