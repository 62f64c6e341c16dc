"""StepGradients: clears gradients before a step, sums them over windows, and rejects gradients that no step computed."""

from __future__ import annotations

from collections.abc import Callable
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn

from dni_seq.core.nonfinite import both_finite
from dni_seq.core.optimizer_step import gradient_norm
from dni_seq.core.snapshot import Restorable

MARK = "left_by_step_at_version"
"""Name of an attribute that a step sets on the gradient tensors in `.grad`: the tensor's version counter after the step.

Every later write to the tensor increases the version counter, so that it differs from the attribute."""


class StepGradients(Restorable):
    """Clears gradients before a window, sums the gradients of several windows for one update, and rejects foreign gradients.

    A step clears all gradients when it begins. A gradient that a backward pass outside of the trainer has computed would be
    lost, so `check` rejects it.

    Args:
        model: names the parameters in messages.
        optimizers: a function that returns the optimizers of the parameters, the model's optimizer first.

    Attributes:
        updates: number of updates of the model so far.
    """

    UNCHANGING = (FunctionType, MethodType)

    def __init__(self, model: nn.Module, optimizers: Callable[[], list[torch.optim.Optimizer]]) -> None:
        self._model = model
        self._optimizers = optimizers
        self._windows_per_update = 1
        self._collected = 0
        self._sums: list[Tensor | None] = []
        self.updates = 0

    @property
    def windows_per_update(self) -> int:
        """n, the number of windows whose gradients are summed for one update of the model."""
        return self._windows_per_update

    @windows_per_update.setter
    def windows_per_update(self, windows: int) -> None:
        if windows < 1:
            raise ValueError(f"accumulate must be 1 or more windows, got {windows}")
        self._windows_per_update = windows

    def clear(self) -> None:
        """Clears all gradients; the sums stay."""
        for optimizer in self._optimizers():
            optimizer.zero_grad()

    def restart(self) -> None:
        """Drops the sums of the current update."""
        self._sums, self._collected = [], 0

    def collect(self, norm: Tensor, good: Tensor) -> tuple[bool, Tensor, Tensor]:
        """Adds a window's gradients to the sums of the current update; if the sums are complete, they replace the gradients.

        Args:
            norm: 0-d, norm of the window's gradients.
            good: 0-d bool, false if the window is skipped; its gradients then count as zero.

        Returns:
            Whether the model is to be updated now; the norm of the gradients in `.grad`; and a 0-d bool, whether these
            gradients may be used.
        """
        if self._windows_per_update == 1 and not self._collected:
            self.updates += 1
            return True, norm, good
        optimizer = self._optimizers()[0]
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        before = [*self._sums, *[None] * (len(parameters) - len(self._sums))]  # add_param_group appends parameters
        self._sums = [_added(total, p.grad, good) for total, p in zip(before, parameters, strict=True)]
        self._collected += 1
        if self._collected < self._windows_per_update:
            return False, norm, good
        for parameter, total in zip(parameters, self._sums, strict=True):
            parameter.grad = total
        self.restart()
        self.updates += 1
        norm = gradient_norm(optimizer)
        return True, norm, both_finite(norm, norm)

    def mark(self) -> None:
        """Marks all gradients in `.grad` as gradients of a step."""
        for parameter in self._parameters():
            if parameter.grad is not None:
                setattr(parameter.grad, MARK, parameter.grad._version)

    def check(self) -> None:
        """Raises a ValueError if a parameter has a gradient that is not zero and that no step has computed."""
        for parameter in self._parameters():
            gradient = parameter.grad
            if gradient is None or getattr(gradient, MARK, None) == gradient._version:
                continue
            values = gradient.coalesce().values() if gradient.is_sparse else gradient
            if bool(values.any()):
                raise ValueError(
                    f"{self._name_of(parameter)} has a gradient that this trainer did not compute, and a step would discard "
                    "it: call zero_grad() on its optimizer before the step, or make that loss a part of loss_fn. To sum the "
                    "gradients of n windows, set trainer.accumulate = n"
                )

    def state_dict(self) -> dict[str, Any]:
        """Returns the sums of the current update and the number of updates."""
        return {"collected": self._collected, "sums": list(self._sums), "updates": self.updates}

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Restores what `state_dict` returned."""
        self._collected, self.updates = saved["collected"], saved["updates"]
        parameters = self._parameters()[: len(saved["sums"])]  # those of the model
        self._sums = [None if total is None else total.to(p) for total, p in zip(saved["sums"], parameters, strict=True)]

    def _parameters(self) -> list[Tensor]:
        return [p for optimizer in self._optimizers() for group in optimizer.param_groups for p in group["params"]]

    def _name_of(self, parameter: Tensor) -> str:
        names = [name for name, other in self._model.named_parameters() if other is parameter]
        return f"the parameter {names[0]}" if names else "a parameter of the synthesizer"


def _added(total: Tensor | None, gradient: Tensor | None, good: Tensor) -> Tensor | None:
    """Returns total + gradient; None counts as zero, and so does the gradient if `good` is false."""
    if gradient is None:
        return total
    if not gradient.is_sparse:  # with a sparse gradient the host has skipped the step if it is not good
        gradient = torch.where(good, gradient, 0)
    return gradient if total is None else total + gradient
