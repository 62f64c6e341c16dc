"""FutureModel: a small model of what comes, whose own gradient stands in for the gradient to come, or is a feature of it.

The gradient of a loss to come is a vector-Jacobian product: Jᵀ (∂ℓ/∂q), q the outputs of the steps ahead. A perceptron that
is shown the state and the targets has to find out for itself that its answer depends on the difference between what the
network expects and what comes. A model that predicts q from the state, and is given the loss, has that difference, and
the product through its own hidden layer has the form of what is looked for: a linear head on it learns the rest.

Source: ours. Czarnecki et al. 2017, "Sobolev Training for Neural Networks", arXiv 1706.04859, train a synthetic
gradient as the gradient of a predicted loss; here the prediction is of outputs and learns from their targets alone.
`FutureGradient` sends its gradient, `StateTrunk` gives it to fitted heads.

Legend: B = lanes, S = numbers in one lane's packed state, m = lookahead in steps, K = parts of it, E = width of an encoded
input, F = units, Q = width of the outputs that its loss takes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dni_seq.core.windows import Lookahead, check_unreduced, next_steps

SEEN = 4
"""Inputs, the step's own and those before it, from which a step's outputs are predicted, beside the state."""


class FutureModel(nn.Module):
    """Predict the outputs of the next m steps from a state and their inputs, and differentiate their loss.

        z_j = tanh(W_p s + Σ_{i < SEEN} U_i x_{j-i} + b_j),   q_j = D z_j + C_p s + d_p,   step j in part p
        features of p = Σ_{j in p} (Dᵀ ∂ℓ_j/∂q_j) ⊙ (1 - z_j²) = ∂(Σ_{j in p} ℓ_j) / ∂(W_p s)

    Each step sees its own input and those before it, never one behind: in a language model that would be its target. What
    the state says of near steps and of far ones differs, so each part of the steps reads it by weights of its own.

    Args:
        size: S.
        steps: m.
        inputs: module from `Lookahead.inputs` [m, B, ...] to [m, B, E].
        inputs_width: E.
        outputs: Q, the width of the outputs that `loss_fn` takes.
        loss_fn: `loss_fn(outputs [m, B, Q], targets [m, B, ...])`, unreduced losses [m, B].
        units: F.
        parts: K, equal parts of the m steps.

    Attributes:
        features: K F.

    Raises:
        ValueError: a size is not positive, or the steps are not a multiple of the parts.
    """

    def __init__(
        self,
        size: int,
        steps: int,
        *,
        inputs: nn.Module,
        inputs_width: int,
        outputs: int,
        loss_fn: Callable[[Tensor, Tensor], Tensor],
        units: int = 256,
        parts: int = 1,
    ) -> None:
        super().__init__()
        for name, value in (("steps", steps), ("outputs", outputs), ("units", units), ("parts", parts)):
            if value < 1:
                raise ValueError(f"FutureModel: {name} must be positive, got {value}")
        if steps % parts:
            raise ValueError(f"FutureModel: {parts} parts share the lookahead evenly, {steps} steps are no multiple")
        self.steps = steps
        self.seen = min(SEEN, steps)
        self.loss_fn = loss_fn
        self.units = units
        self.features = parts * units
        self.inputs = inputs
        # Of each part: to hidden units and straight to the outputs, in one product.
        self.from_state = nn.ModuleList(nn.Linear(size, units + outputs) for _ in range(parts))
        self.from_step = nn.Parameter(torch.zeros(steps, 1, units))
        self.from_inputs = nn.Linear(self.seen * inputs_width, units, bias=False)
        self.output = nn.Linear(units, outputs, bias=False)

    def forward(self, flat: Tensor, context: Any) -> tuple[Tensor, Tensor]:
        """Features [B, K F] of packed states [B, S] and a `Lookahead` of at least m steps, and the mean loss, 0-d.

        Steps behind the end of a sequence, and those that do not count, add nothing to either. Both are differentiable, so
        that a regression trains this model too; the gradient of a loss with respect to its outputs counts as a constant.

        Raises:
            ValueError: the context is no lookahead of m steps, or `loss_fn` does not return [m, B].
        """
        ahead = next_steps(context, self.steps)
        hidden, outputs = self._expected(flat.expand(self.parts, -1, -1), ahead)
        products, total = self._products(hidden, outputs, ahead)
        by_part = products.unflatten(0, (self.parts, -1)).sum(1)  # [K, B, F]
        return by_part.transpose(0, 1).flatten(1), total / ahead.valid.numel()

    def loss(self, flat: Tensor, context: Any) -> Tensor:
        """The mean loss alone, 0-d, arguments and errors as above."""
        ahead = next_steps(context, self.steps)
        _, outputs = self._expected(flat.expand(self.parts, -1, -1), ahead)
        return self._total(self._losses(outputs, ahead), ahead) / ahead.valid.numel()

    @property
    def parts(self) -> int:
        """K."""
        return len(self.from_state)

    def gradients(self, flat: Tensor, context: Any) -> Tensor:
        """[K, B, S]: the gradient of the summed loss of each part of the steps, without a graph.

        Arguments and errors as above.
        """
        flats, losses, ahead = self._unweighted(flat, context)
        (found,) = torch.autograd.grad(losses, flats, ahead.counts.to(losses.dtype))
        return found

    def learn(self, flat: Tensor, context: Any) -> tuple[Tensor, Tensor]:
        """[K, B, S]: the gradient of each part's share of the mean loss; and that loss, 0-d.

        Its gradients are added to the parameters, in the same one pass.
        """
        flats, losses, ahead = self._unweighted(flat, context)
        steps = ahead.valid.numel()
        losses.backward(ahead.counts.to(losses.dtype) / steps)
        assert flats.grad is not None
        return flats.grad, self._total(losses.detach(), ahead) / steps

    @torch.enable_grad()
    def _unweighted(self, flat: Tensor, context: Any) -> tuple[Tensor, Tensor, Lookahead]:
        """A state [K, B, S] for each part of the steps, their losses [m, B] as its function, and the steps."""
        ahead = next_steps(context, self.steps)
        flats = flat.detach().expand(self.parts, -1, -1).requires_grad_()
        _, outputs = self._expected(flats, ahead)
        return flats, self._losses(outputs, ahead), ahead

    def _expected(self, flats: Tensor, ahead: Lookahead) -> tuple[Tensor, Tensor]:
        """z [m, B, F] and q [m, B, Q] from states [K, B, S], each of which says what comes in its part of the steps."""
        seen = (self.from_inputs(self._recent(ahead)) + self.from_step).unflatten(0, (self.parts, -1))
        said = self._project_state(flats)
        reached, direct = said[:, None].split([self.units, said.shape[-1] - self.units], dim=-1)
        hidden = torch.tanh(reached + seen)
        outputs = self.output(hidden) + direct
        return hidden.flatten(0, 1), outputs.flatten(0, 1)

    def _project_state(self, flats: Tensor) -> Tensor:
        """[K, B, F + Q]: what each part reads from its state."""
        if self.parts == 1:  # nothing to take apart and to stack
            return self.from_state[0](flats)
        return torch.stack([layer(flat) for layer, flat in zip(self.from_state, flats, strict=True)])

    def _losses(self, outputs: Tensor, ahead: Lookahead) -> Tensor:
        losses = self.loss_fn(outputs, ahead.targets)
        check_unreduced(losses, ahead)
        return losses

    @staticmethod
    def _total(losses: Tensor, ahead: Lookahead) -> Tensor:
        return torch.where(ahead.counts, losses, 0).sum()

    def _products(self, hidden: Tensor, outputs: Tensor, ahead: Lookahead) -> tuple[Tensor, Tensor]:
        """∂ℓ_j/∂(W_p s) [m, B, F], and the steps' summed loss."""
        learning = torch.is_grad_enabled()
        with torch.enable_grad():
            roots = outputs if outputs.requires_grad else outputs.detach().requires_grad_()
            total = self._total(self._losses(roots, ahead), ahead)
            (error,) = torch.autograd.grad(total, roots, retain_graph=learning)
        return (error @ self.output.weight) * (1 - hidden.square()), total

    def _recent(self, ahead: Lookahead) -> Tensor:
        """[m, B, SEEN E]: the encoded input of each step and of those before it, zeros where there is none."""
        encoded = self.inputs(ahead.inputs)
        if self.seen == 1:
            return encoded
        before = F.pad(encoded * ahead.valid[..., None], (0, 0, 0, 0, self.seen - 1, 0))
        return torch.cat([before[i : i + self.steps] for i in range(self.seen)], dim=-1)
