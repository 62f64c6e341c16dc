"""Trains a fast recurrent network and one that ticks every --steps steps, connected by synthetic gradients.

python scripts/train_slow_ticking.py
    The fast network counts one symbol over 5 steps; the slow one, which reads the fast one's states, counts another over 25.
python scripts/train_slow_ticking.py --joint message
    The slow network receives the fast one's states but sends no gradient back.
python scripts/train_slow_ticking.py --joint none
    There is no slow network: the fast network predicts both counts, with truncated BPTT over 5 steps.

Prints the squared error of each count divided by its variance: a constant prediction of the mean gives 1. With --run-dir,
writes summary.json there. Invalid input prints one line on stderr and exits with status 2.
"""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from dni_seq.app.runs.checkpoint import write_json
from dni_seq.app.runs.directory import check_unused
from dni_seq.app.runs.options import above_zero, at_least, build, option, parse, report
from dni_seq.models.multi_timescale import JOINTS, Counting, MultiTimescale

_PROG = "train_slow_ticking"
_TASK, _NETWORK, _RUN = "task", "network", "run"
AVERAGED = 500
"""The errors are averages over the last blocks, this many of them. A block has the steps of one tick."""


@dataclass(frozen=True)
class SlowTickingOptions:
    """The options of `scripts/train_slow_ticking.py`."""

    steps: int = option(5, "steps between two ticks of the slow network", group=_TASK, check=at_least(1))
    ticks: int = option(5, "window of the slow network in ticks, over which it counts", group=_TASK, check=at_least(1))
    joint: str = option("synthetic", "connection between the networks", group=_NETWORK, choices=JOINTS)
    hidden: int = option(16, "hidden units per network", group=_NETWORK, check=at_least(1))
    blocks: int = option(6000, "number of ticks to train for", group=_RUN, check=at_least(1))
    batch_size: int = option(32, "batch size B: number of lanes", group=_RUN, check=at_least(1))
    lr: float = option(5e-3, "learning rate of Adam", group=_RUN, check=above_zero)
    seed: int = option(0, "random seed of weights and symbols", group=_RUN, check=at_least(0))
    run_dir: str | None = option(None, "directory for summary.json", group=_RUN, metavar="DIR", shown="none")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit status."""
    try:
        options = build(SlowTickingOptions, parse(SlowTickingOptions, arguments, prog=_PROG, description=__doc__ or ""))
        if options.joint != "none" and options.blocks < options.ticks:
            raise ValueError(f"--blocks {options.blocks} must be at least --ticks, so that the slow network makes a step")
        path = None if options.run_dir is None else Path(options.run_dir)
        if path is not None:
            check_unused(path)
            path.mkdir(parents=True, exist_ok=True)
    except (ValueError, OSError) as error:
        return report(_PROG, error)
    errors = train(options)
    try:
        if path is not None:
            write_json(path / "summary.json", {**dataclasses.asdict(options), "error": errors})
    except OSError as error:
        return report(_PROG, error)
    return 0


def train(options: SlowTickingOptions) -> dict[str, float]:
    """Trains both networks. Returns each count's squared error over the last blocks, divided by the count's variance."""
    torch.set_num_threads(1)
    torch.manual_seed(options.seed)
    network = MultiTimescale(options.hidden, options.ticks, options.joint, options.lr)
    task = Counting(options.steps, options.ticks, options.batch_size, options.seed)
    recent: dict[str, deque[torch.Tensor]] = {name: deque(maxlen=AVERAGED) for name in ("fast", "fast power", "slow power")}
    every = 1 if options.joint == "none" else options.ticks
    recent["slow"] = deque(maxlen=max(1, AVERAGED // every))
    errors: dict[str, float] = {}
    for number in range(1, options.blocks + 1):
        block = task.block()
        for name, error in network.step(block).items():
            recent[name].append(error)
        recent["fast power"].append(block.fast.square().mean())
        recent["slow power"].append(block.slow.square().mean())
        if recent["slow"] and (number % 1000 == 0 or number == options.blocks):
            errors = {name: mean(recent[name]) / mean(recent[f"{name} power"]) for name in ("fast", "slow")}
            print(
                f"block {number}: error of the fast count {errors['fast']:.3f}, of the slow one {errors['slow']:.3f}",
                flush=True,
            )
    return errors


def mean(values: deque[torch.Tensor]) -> float:
    """Returns the mean of 0-d tensors."""
    return float(torch.stack(list(values)).mean())
