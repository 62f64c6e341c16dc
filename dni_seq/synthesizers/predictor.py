"""Predictor: base class of small networks that predict steps around a state; the gradient of their loss is a message.

Legend: B = lanes, S = numbers in one lane's packed state, K = parts, n = predicted steps.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


class StepLosses(NamedTuple):
    """The losses of a predictor, one for each predicted step of each lane.

    Attributes:
        losses: [n, B], the loss of each predicted step.
        counts: [n, B] bool, True for steps that exist in the sequence and count in the loss.
        weights: [n, 1], the weight of each step; None if all weights are 1.
    """

    losses: Tensor
    counts: Tensor
    weights: Tensor | None = None

    @property
    def factors(self) -> Tensor:
        """[n, B], the factor of each loss in `total`: its weight if the step counts, else 0."""
        counts = self.counts.to(self.losses.dtype)
        return counts if self.weights is None else counts * self.weights

    @property
    def total(self) -> Tensor:
        """The weighted sum of the losses that count, 0-d."""
        losses = self.losses if self.weights is None else self.losses * self.weights
        return torch.where(self.counts, losses, 0).sum()


class Predictor(nn.Module):
    """Predicts n steps before or after a state; `FutureGradient` sends the gradient of the predictor's loss to the state.

    A subclass sets the attributes and implements `losses`. The loss whose gradient is the message also trains the
    predictor's parameters, at every window.

    Source: ours; see `FutureGradient`.

    Attributes:
        steps: number of steps after the state that the predictor reads from a `Lookahead`; 0 for none.
        past_steps: number of inputs before the state that the predictor reads from a `Past`; 0 for none.
        parts: K, the number of parts into which the steps are divided. Each part gives one message.
        predicted: n, the number of predicted steps, each with one loss for each lane.
    """

    steps: int = 0
    past_steps: int = 0
    parts: int = 1

    @property
    def predicted(self) -> int:
        """n, the number of predicted steps, each with one loss for each lane."""
        return self.steps + self.past_steps

    def losses(self, flats: Tensor, context: Any) -> StepLosses:
        """Computes the loss of each predicted step.

        Args:
            flats: packed states [K, B, S], one copy of the state for each part. The steps of part p read copy p alone.
            context: a `Lookahead`, or `Surroundings` if the predictor reads the past.

        Raises:
            ValueError: the context does not hold the steps that the predictor needs.
        """
        raise NotImplementedError

    def loss(self, flat: Tensor, context: Any) -> Tensor:
        """Computes the weighted sum of the losses that count, divided by n B, 0-d.

        Args:
            flat: packed states [B, S].
            context: see `losses`.
        """
        found = self.losses(flat.expand(self.parts, -1, -1), context)
        return found.total / found.counts.numel()

    def gradients(self, flat: Tensor, context: Any) -> Tensor:
        """Computes the gradient of each part's summed loss with respect to the state, without a graph.

        Steps that do not count contribute zero.

        Args:
            flat: packed states [B, S].
            context: see `losses`.

        Returns:
            [K, B, S], one gradient for each part.
        """
        flats, found = self._at(flat, context)
        (gradient,) = torch.autograd.grad(found.losses, flats, found.factors)
        return gradient

    def learn(self, flat: Tensor, context: Any) -> tuple[Tensor, Tensor]:
        """Computes the result of `gradients`, divided by n B, and adds the gradients of `loss` to the parameters' `.grad`.

        One backward pass computes both.

        Args:
            flat: packed states [B, S].
            context: see `losses`.

        Returns:
            The gradient of each part's share of the mean loss, [K, B, S], and the loss that `loss` returns, 0-d.
        """
        flats, found = self._at(flat, context)
        steps = found.counts.numel()
        found.losses.backward(found.factors / steps)
        assert flats.grad is not None
        return flats.grad, found._replace(losses=found.losses.detach()).total / steps

    @torch.enable_grad()
    def _at(self, flat: Tensor, context: Any) -> tuple[Tensor, StepLosses]:
        """Returns one copy of the state for each part, [K, B, S], and the losses, with a graph to these copies."""
        flats = flat.detach().expand(self.parts, -1, -1).requires_grad_()
        return flats, self.losses(flats, context)
