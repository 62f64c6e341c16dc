"""Messages that can be credit: finite, and not far larger than any gradient seen.

A synthesizer that diverges says things that would spoil the RNN, or an optimizer's moments for a thousand steps. They are
not sent.

Legend: N = horizons.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from dni_seq.core import nonfinite
from dni_seq.core.deferred_backward import GradientAccumulator
from dni_seq.core.optimizer_step import total_norm
from dni_seq.core.states import State
from dni_seq.distributed.data_parallel import DataParallel
from dni_seq.interfaces.backward import BackwardInterface
from dni_seq.synthesizers.target_rule import TargetRule

LARGEST_MESSAGE = 100.0
"""Times the largest gradient that a window's own loss has sent to its first state: no credit is as large as that."""

OBSERVED_FIRST, OBSERVED_EVERY = 100, 200
"""Windows at the start, and then every so many, whose own gradient is observed, at the price of a product to the state."""


class FilteredInterface(BackwardInterface):
    """An interface that sends zeros in the place of a message that is not finite, or far too large to be credit.

    The size is held to that of windows' own gradients, by themselves: a target that holds a message grows with it. Messages
    that are not learned, as exact ones, have no limit.

    Args:
        synthesizer: the module that predicts.
        parallel: this rank's part where the lanes are spread over several: all of them send a message, or none does.

    Attributes:
        sound: 0-d bool, whether what was injected last is what the synthesizer said.
        norm: 0-d, the norm of what it said, weighted; of this rank's lanes.
        largest: the largest gradient observed; 0 before there is one.
    """

    def __init__(self, synthesizer: nn.Module, parallel: DataParallel | None = None) -> None:
        super().__init__(synthesizer)
        self.parallel = parallel
        self.norm = torch.zeros(())
        self.valid = torch.ones((), dtype=torch.bool)
        self.largest: float | Tensor = 0.0

    def injection(self, messages: list[State], rule: TargetRule) -> list[Tensor]:
        """The weighted sum of the messages where it is sound, else zeros."""
        injected = super().injection(messages, rule)
        self.norm = total_norm(injected)
        norm = self._of_all_ranks(self.norm)
        if not nonfinite.readable_without_sync(norm):
            limit = torch.as_tensor(LARGEST_MESSAGE * self.largest, device=norm.device)
            self.valid = norm < torch.where(limit > 0, limit, math.inf)
            return [torch.where(self.valid, leaf, 0) for leaf in injected]
        self.valid = norm < (LARGEST_MESSAGE * self.largest or math.inf)
        return injected if self.valid else [torch.zeros_like(leaf) for leaf in injected]

    def observes(self, windows: int) -> bool:
        """Whether the window behind as many others is one to observe."""
        return (windows < OBSERVED_FIRST or windows % OBSERVED_EVERY == 0) and self.learns

    def observe(self, loss: Tensor, scope: GradientAccumulator, windows: int) -> None:
        """Take in the gradient that a window's `loss` alone sends to its trigger, where the window is one to observe.

        Args:
            loss: 0-d, with its graph.
            scope: that the window's trigger was made in.
            windows: before this one.
        """
        leaves = self.exchange(scope).inputs()
        if not leaves or not self.observes(windows):
            return
        found = torch.autograd.grad(loss, leaves, retain_graph=True, allow_unused=True)
        norm = self._of_all_ranks(total_norm([gradient for gradient in found if gradient is not None]))
        if nonfinite.readable_without_sync(norm):
            if norm.isfinite():
                self.largest = max(float(self.largest), float(norm))
        else:
            before = torch.as_tensor(self.largest, dtype=norm.dtype, device=norm.device)
            self.largest = torch.where(norm.isfinite(), before.maximum(norm), before)

    def _of_all_ranks(self, norm: Tensor) -> Tensor:
        return norm if self.parallel is None else self.parallel.norm(norm)
