"""StepGradients: clears the gradients of a step, and notices gradients that something else has added."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

MARK = "left_by_step_at_version"
"""Attribute of a gradient tensor that a step has left in `.grad`: its version counter then. Every write increases it."""


class StepGradients:
    """Clears the gradients that a step leaves in `.grad`, and refuses others.

    A step clears all gradients when it begins. Gradients that the user's own backward pass has put there would be lost.

    Args:
        model: names the parameters in messages.
        optimizers: returns the optimizers of the parameters.
    """

    def __init__(self, model: nn.Module, optimizers: Callable[[], list[torch.optim.Optimizer]]) -> None:
        self._model = model
        self._optimizers = optimizers

    def clear(self) -> None:
        """Clears all gradients."""
        for optimizer in self._optimizers():
            optimizer.zero_grad()

    def mark(self) -> None:
        """Marks all gradients that are there as those of a step."""
        for parameter in self._parameters():
            if parameter.grad is not None:
                setattr(parameter.grad, MARK, parameter.grad._version)

    def check(self) -> None:
        """Raises a ValueError if a parameter has a gradient other than zero that no step left there."""
        for parameter in self._parameters():
            gradient = parameter.grad
            if gradient is None or getattr(gradient, MARK, None) == gradient._version:
                continue
            values = gradient.coalesce().values() if gradient.is_sparse else gradient
            if bool(values.any()):
                raise ValueError(
                    f"{self._name_of(parameter)} has a gradient that this trainer did not compute, and a step would discard "
                    "it: call zero_grad() on its optimizer before the step, or make that loss a part of loss_fn (a trainer "
                    "does not accumulate gradients over windows)"
                )

    def _parameters(self) -> list[Tensor]:
        return [p for optimizer in self._optimizers() for group in optimizer.param_groups for p in group["params"]]

    def _name_of(self, parameter: Tensor) -> str:
        names = [name for name, other in self._model.named_parameters() if other is parameter]
        return f"the parameter {names[0]}" if names else "a parameter of the synthesizer"
