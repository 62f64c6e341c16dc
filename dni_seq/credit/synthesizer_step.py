"""SynthesizerStep: steps the optimizer of a synthesizer, if its regression is valid."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from dni_seq.core import nonfinite
from dni_seq.core.nonfinite import both_finite
from dni_seq.core.optimizer_step import clear_optimizer_state, clipped_step, gradient_norm, has_fused_kernel
from dni_seq.core.snapshot import TensorSnapshot
from dni_seq.distributed.data_parallel import DataParallel
from dni_seq.synthesizers.base import Regression


class SynthesizerStep:
    """Clips the gradients of a synthesizer and steps its optimizer.

    Args:
        modules: the synthesizer, and the auxiliary task if there is one.
        optimizer: the optimizer of the modules' parameters. Default: Adam with learning rate 1e-3, with the fused kernel if
            there is one, or no optimizer if no parameter can be trained.
        clip: largest norm of the gradient, None for no limit.
        parallel: the `DataParallel` of this rank.
    """

    def __init__(
        self,
        modules: Sequence[nn.Module],
        optimizer: torch.optim.Optimizer | None,
        clip: float | None,
        parallel: DataParallel,
    ) -> None:
        learning = [parameter for module in modules for parameter in module.parameters()]
        if optimizer is None and any(parameter.requires_grad for parameter in learning):
            optimizer = torch.optim.Adam(learning, lr=1e-3, fused=has_fused_kernel(learning))
        self._synthesizer = modules[0]
        self.optimizer = optimizer
        self._clip = clip
        self._parallel = parallel

    def zero_grad(self) -> None:
        """Clears the gradients."""
        if self.optimizer is not None:
            self.optimizer.zero_grad()

    def clear_state(self) -> None:
        """Clears the optimizer's state (moments)."""
        if self.optimizer is not None:
            clear_optimizer_state(self.optimizer)

    def share(self, regression: Regression) -> Regression:
        """Divides a regression and, in place, the synthesizer's gradients by the number of ranks, for a sum over ranks."""
        self._parallel.divide_gradients(self._synthesizer.parameters())
        size = self._parallel.size
        return regression if size == 1 else Regression(*(number / size for number in regression))

    def sum_gradients(self, regression: Regression) -> Regression:
        """Returns the mean regression of all ranks, and averages the synthesizer's gradients too; a collective call."""
        regression = self.share(regression)
        self._parallel.sum_gradients(self._synthesizer.parameters(), regression)
        return regression

    def __call__(self, loss: Tensor, valid: Tensor, buffers: TensorSnapshot) -> tuple[Tensor, Tensor]:
        """Steps the optimizer if `valid` is true and the loss and the gradient norm are finite.

        Otherwise parameters and moments do not change, and the tensors in `buffers` are restored.

        Returns:
            The gradient norm, and whether the step was valid, 0-d bool.
        """
        if self.optimizer is None:
            return torch.zeros(()), valid & torch.isfinite(loss)
        norm = gradient_norm(self.optimizer)
        valid = valid & both_finite(loss, norm)
        clipped_step(self.optimizer, self._clip, norm, valid)
        if not nonfinite.readable_without_sync(valid):
            buffers.restore_unless(valid)
        elif not valid:
            buffers.restore()
        return norm, valid
