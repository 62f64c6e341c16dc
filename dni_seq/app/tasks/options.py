"""The options of a run on generated tasks.

To add an option: declare it here, and use it in `scripts/train_tasks.py`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, cast

from dni_seq.app.build.credit_options import GROUP as CREDIT
from dni_seq.app.build.credit_options import STANDS_IN, SYNTHESIZERS, CreditOptions, horizons_of, without_resolved
from dni_seq.app.runs.options import above_zero, at_least, build, option
from dni_seq.models.language_model import CELLS
from dni_seq.streams.algorithmic_tasks import TASKS

_TASK, _MODEL, _RUN = "task", "model", "run"


@dataclass(frozen=True)
class TaskOptions(CreditOptions):
    """Everything that `scripts/train_tasks.py` can be told."""

    MAY_CHANGE: ClassVar[frozenset[str]] = frozenset({"updates", "threads", "device"})
    OF_THE_CALL: ClassVar[frozenset[str]] = frozenset({"run_dir", "resume"})

    synthesizer: str = option(
        None, STANDS_IN, group=CREDIT, choices=SYNTHESIZERS, shown="multi-horizon, of the adding problem none"
    )
    task: str = option("copy", "what is learned", group=_TASK, choices=tuple(TASKS))
    start: int | None = option(
        None,
        "vectors, or steps of an adding problem, to begin with",
        group=_TASK,
        check=at_least(1),
        shown=", ".join(f"{name} {task.first.size}" for name, task in TASKS.items()),
    )
    model: str = option("lstm", "recurrent cell", group=_MODEL, choices=CELLS)
    hidden: int = option(256, "hidden units a layer", group=_MODEL, check=at_least(1))
    layers: int = option(1, "layers", group=_MODEL, check=at_least(1))
    bptt: int = option(4, "window length in steps: gradients are exact within it", group=CREDIT, check=at_least(1))
    updates: int = option(50_000, "windows to train on", group=_RUN, check=at_least(1))
    batch_size: int = option(32, "lanes: sequences side by side", group=_RUN, check=at_least(1))
    lr: float = option(1e-3, "Adam's learning rate", group=_RUN, check=above_zero)
    clip: float = option(5.0, "largest norm of the gradient, 0 for no limit", group=_RUN, check=at_least(0))
    seed: int = option(1111, "of weights and sequences", group=_RUN, check=at_least(0))
    threads: int = option(1, "CPU threads", group=_RUN, check=at_least(1))
    device: str | None = option(None, "cpu, cuda, cuda:1, mps", group=_RUN, shown="cuda where there is one, else cpu")
    run_dir: str | None = option(None, "where the run is kept", group=_RUN, metavar="DIR", shown="a new one in runs/")
    resume: str | None = option(
        None,
        "go on: from the last checkpoint in --run-dir, where there is one, or from RUN_DIR/checkpoints/NAME.pt",
        group=_RUN,
        metavar="auto|PATH",
    )


def resolve_options(options: TaskOptions) -> TaskOptions:
    """Fill synthesizer and K where nobody gave them, to be on record: a run which is resumed keeps them."""
    if cast("str | None", options.synthesizer) is None:  # until here, whatever its type says
        # There it does no better, in twice the time (docs/synthetic-gradients.md).
        options = dataclasses.replace(options, synthesizer="none" if options.task == "adding" else "multi-horizon")
    return dataclasses.replace(options, horizons=horizons_of(options, options.bptt))


def as_given(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """What a new run takes over from a configuration, a run's or another one; see `without_resolved`."""
    return without_resolved(config, build(TaskOptions, config), resolve_options)
