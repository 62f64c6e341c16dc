"""FilteredInterface: rejects messages that are not finite, or far larger than any gradient observed.

Messages of a diverging synthesizer could destroy the RNN, or an optimizer's moments for a thousand steps.

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
"""Limit on the norm of an injected gradient, in units of the largest gradient of a window's own loss at its first state."""

OBSERVED_FIRST, OBSERVED_EVERY = 100, 200
"""The first windows and then every n-th are observed. Each costs one vector-Jacobian product to the state."""


class FilteredInterface(BackwardInterface):
    """Injects zeros in place of a message that is not finite or is too large.

    The limit is `LARGEST_MESSAGE` times the largest gradient of a window's own loss. It is not taken from targets, because a
    target that holds a message grows with the message. Messages of a synthesizer without trainable parameters, such as exact
    ones, have no limit.

    Args:
        synthesizer: the module that predicts.
        parallel: this rank's part if the lanes are spread over several ranks. All ranks inject, or none does.

    Attributes:
        valid: 0-d bool, whether the last message was injected; False if it was rejected.
        norm: 0-d, norm of the last weighted sum of messages, before the filter, over this rank's lanes.
        largest: the largest gradient observed; 0 before the first one.
    """

    def __init__(self, synthesizer: nn.Module, parallel: DataParallel | None = None) -> None:
        super().__init__(synthesizer)
        self.parallel = parallel
        self.norm = torch.zeros(())
        self.valid = torch.ones((), dtype=torch.bool)
        self.largest: float | Tensor = 0.0

    def _injection(self, messages: list[State], rule: TargetRule) -> list[Tensor]:
        """Returns the weighted sum of the messages if it is valid, else zeros; sets `norm` and `valid`."""
        injected = super()._injection(messages, rule)
        self.norm = total_norm(injected)
        norm = self._of_all_ranks(self.norm)
        if not nonfinite.readable_without_sync(norm):
            limit = torch.as_tensor(LARGEST_MESSAGE * self.largest, device=norm.device)
            self.valid = norm < torch.where(limit > 0, limit, math.inf)
            return [torch.where(self.valid, leaf, 0) for leaf in injected]
        self.valid = norm < (LARGEST_MESSAGE * self.largest or math.inf)
        return injected if self.valid else [torch.zeros_like(leaf) for leaf in injected]

    def observes(self, windows: int) -> bool:
        """Returns whether to observe the gradient of the window after `windows` others."""
        return (windows < OBSERVED_FIRST or windows % OBSERVED_EVERY == 0) and self.learns

    def observe(self, loss: Tensor, scope: GradientAccumulator, windows: int) -> None:
        """Updates `largest` with the gradient that a window's loss sends to its trigger, if the window is to be observed.

        Args:
            loss: the window's loss without messages, 0-d, with its graph.
            scope: the scope in which the window's trigger was made.
            windows: the number of windows before this one.
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
