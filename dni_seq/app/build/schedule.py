"""The learning rate of a run over its updates, by PyTorch's schedulers."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, ReduceLROnPlateau

from dni_seq.app.build.optimization_options import OptimizationOptions


class RateShare:
    """Computes the learning rate at an update as a share of the highest rate, without the decays of `plateau`.

    During the warm-up the share rises linearly; it is 1 at the last update of the warm-up. After the warm-up, `linear` and
    `cosine` let it fall so that it would reach `floor` one update after the last. `step` follows Zaremba et al. 2014,
    section 4.1: the share is 1 for `decay_after` epochs, and is then multiplied by `decay` for each further epoch.

    Args:
        options: the schedule.
        floor: the lowest share after the warm-up.
        total: number of updates of the whole run; None if it is not known and not needed.

    Attributes:
        epoch: number of epochs that are complete.
        ahead: number that is added to the count of updates. It is not 0 if the run was resumed with another T, so that its
            progress counts in updates of the present T; it may be negative. See `Schedule.go_on_at`.
    """

    def __init__(self, options: OptimizationOptions, floor: float, total: int | None) -> None:
        self._options, self._floor, self._total = options, floor, total
        self.epoch, self.ahead = 0, 0

    def __call__(self, update: int) -> float:
        """Returns the share for the update after `update` updates."""
        options, floor = self._options, self._floor
        update += self.ahead
        if update < options.warmup:
            return (update + 1) / options.warmup
        if options.schedule == "step":
            return max(options.decay ** max(self.epoch + 1 - options.decay_after, 0), floor)
        if not options.falls_to_the_end:
            return 1.0
        assert self._total is not None
        # The schedule ends one update after the last one of the run, so that no update has the rate 0.
        done = min((update - options.warmup) / (self._total - options.warmup), 1.0)
        return floor + (1 - floor) * (1 - done if options.schedule == "linear" else (1 + math.cos(math.pi * done)) / 2)


class Schedule:
    """Sets the learning rates of a run's optimizers after each update.

    PyTorch's schedulers set the rate of the first optimizer. The rates of the other optimizers keep their proportion to it.

    Args:
        options: the schedule; it must change the rate.
        optimizers: first the model's optimizer, which has one learning rate, then the optimizers whose rates follow it.
        total: number of updates of the whole run, None if it is not known.
        tell: called with the present rate as a share of the highest rate whenever the rate is set; None for no call.

    Raises:
        ValueError: the schedule needs the length of the run, which is not known, or the warm-up is not shorter than the run.
    """

    def __init__(
        self,
        options: OptimizationOptions,
        optimizers: Sequence[Optimizer],
        total: int | None,
        tell: Callable[[float], None] | None = None,
    ) -> None:
        _check_length(options, total)
        self._first, *self._followers = optimizers
        self._tell = tell
        self._highest = self.rate
        self._follower_rates = [[group["lr"] for group in follower.param_groups] for follower in self._followers]
        self._warmup, self._updates = options.warmup, 0
        self._share = RateShare(options, options.min_lr / self._highest, total)
        self._by_update = LambdaLR(self._first, self._share)
        self._by_score: ReduceLROnPlateau | None = None
        if options.schedule == "plateau":
            limits: dict[str, Any] = {"min_lr": options.min_lr, "patience": 0, "threshold": 0.0, "eps": 0.0}
            self._by_score = ReduceLROnPlateau(self._first, factor=options.decay, **limits)
        self._follow()

    @property
    def rate(self) -> float:
        """The learning rate of the model's next update."""
        return float(self._first.param_groups[0]["lr"])

    def after_window(self, updates: int, epoch: int) -> None:
        """Sets the rates for the next update. Does nothing if no update was made since the last call.

        Args:
            updates: number of updates so far.
            epoch: number of complete epochs.
        """
        if updates == self._updates:
            return
        self._updates, self._share.epoch = updates, epoch
        # With `plateau`, only validations change the rate after the warm-up.
        if self._by_score is None or updates <= self._warmup:
            self._by_update.step()
            self._follow()

    def after_validation(self, loss: float) -> bool:
        """Gives a validation's loss to `plateau` and returns whether the rate was lowered. False for other schedules."""
        if self._by_score is None or self._updates < self._warmup:
            return False
        before = self.rate
        self._by_score.step(loss)
        self._follow()
        return self.rate < before

    def go_on_at(self, updates: int) -> None:
        """Continues as if `updates` updates were made. For a run resumed with another T, which has another `total`."""
        self._share.ahead = updates - self._updates
        if self._by_score is None:
            for group in self._first.param_groups:
                group["lr"] = self._highest * self._share(self._updates)
            self._follow()

    def _follow(self) -> None:
        share = self.rate / self._highest
        for follower, rates in zip(self._followers, self._follower_rates, strict=True):
            for group, rate in zip(follower.param_groups, rates, strict=True):
                group["lr"] = rate * share
        if self._tell is not None:
            self._tell(share)

    def state_dict(self) -> dict[str, Any]:
        """Returns the states of the schedulers. The present learning rates are part of the optimizers' states instead."""
        return {
            "updates": self._updates,
            "epoch": self._share.epoch,
            "ahead": self._share.ahead,
            "by_update": {name: value for name, value in self._by_update.state_dict().items() if name != "lr_lambdas"},
            "by_score": None if self._by_score is None else self._by_score.state_dict(),
        }

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Restores what `state_dict` returned. Load the states of the optimizers before this call."""
        self._updates, self._share.epoch = saved["updates"], saved["epoch"]
        self._share.ahead = saved.get("ahead", 0)  # older checkpoints lack the entry
        self._by_update.load_state_dict({**saved["by_update"], "lr_lambdas": [None]})
        if self._by_score is not None:
            self._by_score.load_state_dict(saved["by_score"])
        self._follow()


def _check_length(options: OptimizationOptions, total: int | None) -> None:
    if options.falls_to_the_end and total is None:
        raise ValueError(
            f"--schedule {options.schedule} needs the number of updates of the run, which is not known for this text: give "
            "--max-steps or --max-tokens"
        )
    if total is not None and options.warmup >= total:
        raise ValueError(f"--warmup {options.warmup} must be shorter than the run, which has {total} updates")
