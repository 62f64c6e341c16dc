"""FutureModel: a small network that predicts the outputs of the next m steps from a state, and differentiates their loss.

The gradient of a future loss is a vector-Jacobian product Jᵀ (∂ℓ/∂q), where q are the outputs of the next steps. A
perceptron that sees the state and the targets must learn that this gradient depends on the difference between predicted
outputs and targets. A model that predicts q from the state and computes the loss has this difference, and the product
through its hidden layer has the form of the gradient itself. `FutureGradient` injects the model's gradient; `StateTrunk`
passes the product to regressed heads as features.

Source: ours. Czarnecki et al. 2017, "Sobolev Training for Neural Networks", arXiv 1706.04859, train a synthetic gradient as
the gradient of a predicted loss. Here the model predicts the outputs of steps and learns from the steps' targets alone.

Legend: B = lanes, S = numbers in one lane's packed state, m = lookahead in steps, K = parts of the lookahead, E = width of
an encoded input, F = hidden units, Q = width of the outputs that `loss_fn` takes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dni_seq.core.windows import Lookahead, check_unreduced, next_steps
from dni_seq.synthesizers.predictor import Predictor, StepLosses

SEEN = 4
"""Number of inputs from which the outputs of a step are predicted: the input of the step and the latest ones before it."""


class FutureModel(Predictor):
    """Predicts the outputs of the next m steps from a state and the steps' inputs; the gradient of its loss is a message.

    For step j = 1..m, with the state s, the encoded inputs x_j, hidden units z_j, predicted outputs q_j and their loss ℓ_j:

        z_j = tanh(W_p s + Σ_{i < SEEN} U_i x_{j-i} + b_j),   q_j = D z_j + C_p s + d_p,   step j in part p
        features of p = Σ_{j in p} (Dᵀ ∂ℓ_j/∂q_j) ⊙ (1 - z_j²) = ∂(Σ_{j in p} ℓ_j) / ∂(W_p s)

    SEEN is 4: the prediction of a step uses the step's input and the 3 inputs before it, never a later input, which in a
    language model would be the step's target. Inputs before the first of the m steps count as zero. The m steps are cut into
    K equal parts. Each part p reads the state with separate weights W_p, C_p, because a state holds different information
    about near and far steps. W_p, U_i, b_j, D, C_p and d_p are learned. The features are the gradient with respect to W_p s
    alone; `gradients` returns the whole gradient with respect to s, which is a message.

    Source: ours; Czarnecki et al. 2017, arXiv 1706.04859, is related.

    Args:
        size: S, the width of a lane's packed state.
        steps: m, the number of steps predicted.
        inputs: module from `Lookahead.inputs` [m, B, ...] to [m, B, E]. It is registered as a submodule.
        inputs_width: E, the width of an encoded input.
        outputs: Q, the width of the outputs that `loss_fn` takes.
        loss_fn: `loss_fn(outputs [m, B, Q], targets [m, B, ...])`, unreduced losses [m, B].
        units: F, number of hidden units.
        parts: K, number of equal parts of the m steps.

    Attributes:
        steps: the number of steps predicted.
        units: the number of hidden units.
        features: K · units, the number of features that `forward` returns for each lane.

    Raises:
        ValueError: `steps`, `outputs`, `units` or `parts` is not positive, or `steps` is not a multiple of `parts`.
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
            raise ValueError(f"FutureModel: steps must be a multiple of parts, got {steps} steps and {parts} parts")
        self.steps = steps
        self.seen = min(SEEN, steps)
        self.loss_fn = loss_fn
        self.units = units
        self.features = parts * units
        self.inputs = inputs
        # For each part, W_p and C_p with their biases, in one product.
        self.from_state = nn.ModuleList(nn.Linear(size, units + outputs) for _ in range(parts))
        self.from_step = nn.Parameter(torch.zeros(steps, 1, units))
        self.from_inputs = nn.Linear(self.seen * inputs_width, units, bias=False)
        self.output = nn.Linear(units, outputs, bias=False)

    def forward(self, flat: Tensor, context: Any) -> tuple[Tensor, Tensor]:
        """Computes features from the gradient of the loss, and the mean loss.

        Steps after the end of a sequence, and steps that do not count in the loss, contribute zero to the features and the
        loss. Both have a graph, so a regression on the features trains this model too. In the features ∂ℓ_j/∂q_j is
        detached.

        Args:
            flat: packed states [B, S].
            context: a `Lookahead` of at least m steps, of which the first m are used.

        Returns:
            The features [B, K F], and the loss, 0-d: the sum over the steps that count, divided by m B.

        Raises:
            ValueError: the context is not a `Lookahead` of at least m steps, or `loss_fn` does not return [m, B].
        """
        lookahead = next_steps(context, self.steps)
        hidden, outputs = self._expected(flat.expand(self.parts, -1, -1), lookahead)
        products, total = self._products(hidden, outputs, lookahead)
        by_part = products.unflatten(0, (self.parts, -1)).sum(1)  # [K, B, F]
        return by_part.transpose(0, 1).flatten(1), total / lookahead.valid.numel()

    @property
    def parts(self) -> int:  # type: ignore[override]
        """K, the number of equal parts of the m steps."""
        return len(self.from_state)

    def losses(self, flats: Tensor, context: Any) -> StepLosses:
        """Computes the loss of each of the m steps from states [K, B, S]; state p predicts the steps of part p.

        Raises:
            ValueError: the context does not hold a `Lookahead` of at least m steps, or `loss_fn` does not return [m, B].
        """
        lookahead = next_steps(context, self.steps)
        _, outputs = self._expected(flats, lookahead)
        return StepLosses(self._losses(outputs, lookahead), lookahead.counts)

    def _expected(self, flats: Tensor, lookahead: Lookahead) -> tuple[Tensor, Tensor]:
        """Returns z [m, B, F] and q [m, B, Q] from states [K, B, S]; state p predicts the steps of part p."""
        seen = (self.from_inputs(self._recent(lookahead)) + self.from_step).unflatten(0, (self.parts, -1))
        projected = self._project_state(flats)
        reached, direct = projected[:, None].split([self.units, projected.shape[-1] - self.units], dim=-1)
        hidden = torch.tanh(reached + seen)
        outputs = self.output(hidden) + direct
        return hidden.flatten(0, 1), outputs.flatten(0, 1)

    def _project_state(self, flats: Tensor) -> Tensor:
        """Returns what each part reads from its state, W_p s and C_p s with their biases, [K, B, F + Q]."""
        if self.parts == 1:  # avoids unbinding and stacking
            return self.from_state[0](flats)
        return torch.stack([layer(flat) for layer, flat in zip(self.from_state, flats, strict=True)])

    def _losses(self, outputs: Tensor, lookahead: Lookahead) -> Tensor:
        losses = self.loss_fn(outputs, lookahead.targets)
        check_unreduced(losses, lookahead)
        return losses

    @staticmethod
    def _total(losses: Tensor, lookahead: Lookahead) -> Tensor:
        return torch.where(lookahead.counts, losses, 0).sum()

    def _products(self, hidden: Tensor, outputs: Tensor, lookahead: Lookahead) -> tuple[Tensor, Tensor]:
        """Returns ∂ℓ_j/∂(W_p s), [m, B, F], and the summed loss, 0-d."""
        learning = torch.is_grad_enabled()
        with torch.enable_grad():
            roots = outputs if outputs.requires_grad else outputs.detach().requires_grad_()
            total = self._total(self._losses(roots, lookahead), lookahead)
            (error,) = torch.autograd.grad(total, roots, retain_graph=learning)
        return (error @ self.output.weight) * (1 - hidden.square()), total

    def _recent(self, lookahead: Lookahead) -> Tensor:
        """Returns the encoded inputs of each step and of the `seen` - 1 steps before it, [m, B, `seen` · E].

        Inputs before the first of the m steps are zeros.
        """
        encoded = self.inputs(lookahead.inputs)
        if self.seen == 1:
            return encoded
        before = F.pad(encoded * lookahead.valid[..., None], (0, 0, 0, 0, self.seen - 1, 0))
        return torch.cat([before[i : i + self.steps] for i in range(self.seen)], dim=-1)
