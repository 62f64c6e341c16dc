"""Predictors of many steps before or after a state: one product with the state for all steps, and a gate for each step.

`FutureModel` has separate weights for each part of its steps, and many steps would need too many weights. Here all steps
share one product with the state, and a gate selects what each step needs of this product. A predictor of the past needs no
future steps, so it can be used on a live stream.

Source: ours. Trinh et al. 2018, arXiv 1803.00144, unroll a second network from a state to predict or reconstruct; here no
network is unrolled. Sun et al. 2017, "Predictive-State Decoders", arXiv 1709.08520, train states to predict future
observations.

Legend: B = lanes, S = numbers in one lane's packed state, m = reach in steps, n = steps in the loss, E = width of an encoded
input, F = units, Q = width of the outputs that `loss_fn` takes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dni_seq.core import states
from dni_seq.core.windows import check_unreduced, next_steps, previous_steps
from dni_seq.synthesizers.predictor import Predictor, StepLosses

CONTEXT_UNITS = 64
"""Hidden units of the GRU that reads the inputs of the next steps."""

LARGEST_WEIGHT = 8.0
"""Limit on the weight of a drawn step. A drawn step stands for all steps of its stretch."""


class Offsets(nn.Module):
    """Chooses which of m steps one call predicts: all of them, or one from each of n stretches.

    The stretches grow with the distance from the state: their bounds are spaced evenly on a logarithmic scale. A step that
    is drawn from a stretch of w steps has the weight w, or `LARGEST_WEIGHT` if w is larger. If no w is larger, the expected
    loss is the loss of all m steps.

    Args:
        steps: m, the number of steps to choose from.
        draws: n, the number of stretches; None for all steps.

    Attributes:
        count: number of steps that one call predicts.

    Raises:
        ValueError: `draws` is not between 1 and m.
    """

    first: Tensor
    lengths: Tensor

    def __init__(self, steps: int, draws: int | None) -> None:
        super().__init__()
        if draws is not None and not 1 <= draws <= steps:
            raise ValueError(f"draws must be between 1 and the {steps} steps of the reach, got {draws}")
        self.count = steps if draws is None else draws
        self.draws = draws
        bounds = stretches(steps, self.count)
        self.register_buffer("first", torch.tensor(bounds[:-1]), persistent=False)
        self.register_buffer("lengths", torch.tensor(bounds).diff(), persistent=False)

    def forward(self) -> tuple[Any, Tensor | None]:
        """Returns the indices of the chosen steps, [n] or a slice of all, and their weights [n, 1], or None if all are 1."""
        if self.draws is None:
            return slice(None), None
        drawn = (torch.rand(self.count, device=self.first.device) * self.lengths).long()
        return self.first + drawn.minimum(self.lengths - 1), self.lengths.clamp(max=LARGEST_WEIGHT)[:, None]


def stretches(steps: int, count: int) -> list[int]:
    """Returns the count + 1 bounds of `count` stretches that divide `steps` steps, evenly spaced on a logarithmic scale.

    Each stretch has at least one step.
    """
    bounds = [0]
    for left in range(count, 0, -1):
        # The factor from one of the remaining bounds to the next. A bound counts plus 1, because the first one is 0.
        ratio = ((steps + 1) / (bounds[-1] + 1)) ** (1 / left)
        bounds.append(min(max(bounds[-1] + 1, round((bounds[-1] + 1) * ratio) - 1), steps - left + 1))
    return bounds


class GatedPredictor(Predictor):
    """Base class of `GatedFuture` and `GatedPast`: reads the state as tanh(W s), and chooses the steps that a call predicts.

    Args:
        size: S, the width of a lane's packed state.
        steps: m, the number of steps before or after the state that can be predicted.
        outputs: Q, the width of the predicted outputs.
        loss_fn: unreduced losses [n, B] of predicted steps.
        units: F, the number of hidden units.
        draws: see `Offsets`.
    """

    def __init__(
        self, size: int, steps: int, outputs: int, loss_fn: Callable[[Tensor, Any], Tensor], units: int, draws: int | None
    ) -> None:
        super().__init__()
        for name, value in (("steps", steps), ("outputs", outputs), ("units", units)):
            if value < 1:
                raise ValueError(f"{type(self).__name__}: {name} must be positive, got {value}")
        self.loss_fn = loss_fn
        self.offsets = Offsets(steps, draws)
        self.read = nn.Linear(size, units)

    @property
    def predicted(self) -> int:
        """n, the number of predicted steps, each with one loss for each lane."""
        return self.offsets.count


class GatedFuture(GatedPredictor):
    """Predicts the outputs of the next m steps, each from a state and the inputs after the state up to this step.

        z_j = tanh(W s) ⊙ tanh(V c_j + b_j),   q_j = D z_j,   c_j = GRU(x_1 .. x_j)        j = 1..m

    x_j is the encoded input of step j after the state, c_j is the GRU's output at this step, and q_j is the predicted output
    of this step. W, V, b_j, D and the GRU are learned.

    Source: ours; Trinh et al. 2018, arXiv 1803.00144, unroll a second network from the state.

    Args:
        size: S, the width of a lane's packed state.
        steps: m, the number of steps after the state that can be predicted.
        inputs: module from `Lookahead.inputs` [m, B, ...] to [m, B, E]. It is registered as a submodule.
        inputs_width: E, the width of an encoded input.
        outputs: Q, the width of the predicted outputs.
        loss_fn: `loss_fn(outputs [n, B, Q], targets [n, B, ...])`, unreduced losses [n, B].
        units: F, the number of hidden units.
        draws: n, the number of steps in the loss of a call. They are drawn at random, one from each of n stretches that
            grow with the distance from the state. A drawn step has the length of its stretch as weight, at most 8. None for
            all m steps.

    Raises:
        ValueError: `steps`, `outputs` or `units` is not positive, or `draws` is not between 1 and m.
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
        draws: int | None = None,
    ) -> None:
        super().__init__(size, steps, outputs, loss_fn, units, draws)
        self.steps = steps
        self.inputs = inputs
        self.context = nn.GRU(inputs_width, CONTEXT_UNITS)
        self.gate = nn.Linear(CONTEXT_UNITS, units, bias=False)
        self.gate_bias = nn.Parameter(torch.zeros(steps, 1, units))
        self.output = nn.Linear(units, outputs)

    def losses(self, flats: Tensor, context: Any) -> StepLosses:
        """Computes the losses of the drawn steps, or of all m steps if `draws` is None, from packed states [1, B, S].

        Raises:
            ValueError: the context does not hold a `Lookahead` of at least m steps, or `loss_fn` does not return [n, B].
        """
        ahead = next_steps(context, self.steps)
        encoded, _ = self.context(self.inputs(ahead.inputs) * ahead.valid[..., None])
        chosen, weights = self.offsets()
        ahead = ahead.map(lambda tensor: tensor[chosen])
        gates = torch.tanh(self.gate(encoded[chosen]) + self.gate_bias[chosen])
        outputs = self.output(torch.tanh(self.read(flats)) * gates)
        losses = self.loss_fn(outputs, ahead.targets)
        check_unreduced(losses, ahead)
        return StepLosses(losses, ahead.counts, weights)


class GatedPast(GatedPredictor):
    """Predicts the inputs of the last m steps from a state.

        z_j = tanh(W s) ⊙ g_j,   q_j = D z_j        j = 0..m-1

    q_0 predicts the input that led to the state, and q_j the input j steps earlier. g_j is a gate of F numbers for step j.
    W, g_j and D are learned.

    Source: ours; Trinh et al. 2018, arXiv 1803.00144, reconstruct earlier inputs with a second network.

    Args:
        size: S, the width of a lane's packed state.
        steps: m, the number of inputs before the state that can be predicted.
        outputs: Q, the width of the predicted outputs.
        loss_fn: `loss_fn(outputs [n, B, Q], inputs [n, B, ...])`, unreduced losses [n, B].
        units: F, the number of hidden units.
        draws: n, the number of steps in the loss of a call. They are drawn at random, one from each of n stretches that
            grow with the distance from the state. A drawn step has the length of its stretch as weight, at most 8. None for
            all m steps.

    Raises:
        ValueError: `steps`, `outputs` or `units` is not positive, or `draws` is not between 1 and m.
    """

    def __init__(
        self,
        size: int,
        steps: int,
        *,
        outputs: int,
        loss_fn: Callable[[Tensor, Any], Tensor],
        units: int = 256,
        draws: int | None = None,
    ) -> None:
        super().__init__(size, steps, outputs, loss_fn, units, draws)
        self.past_steps = steps
        self.gate = nn.Parameter(torch.randn(steps, 1, units))
        self.output = nn.Linear(units, outputs)

    def losses(self, flats: Tensor, context: Any) -> StepLosses:
        """Computes the losses of the drawn steps, or of all m steps if `draws` is None, from packed states [1, B, S].

        Raises:
            ValueError: the context does not hold a `Past` of at least m steps, or `loss_fn` does not return [n, B].
        """
        past = previous_steps(context, self.past_steps)
        chosen, weights = self.offsets()
        inputs = states.map_tensors(lambda tensor: tensor[chosen], past.inputs)
        valid = past.valid[chosen]
        losses = self.loss_fn(self._outputs(torch.tanh(self.read(flats[0])), self.gate[chosen]), inputs)
        if losses.shape != valid.shape:
            raise ValueError(f"loss_fn must return unreduced losses {list(valid.shape)}, got {list(losses.shape)}")
        return StepLosses(losses, valid, weights)

    def _outputs(self, read: Tensor, gates: Tensor) -> Tensor:
        """Returns D (tanh(W s) ⊙ g_j) [n, B, Q] from tanh(W s) [B, F] and gates [n, 1, F], in the cheaper of two ways."""
        if self.output.out_features >= len(read):
            return self.output(read * gates)
        weights = (self.output.weight * gates).flatten(0, 1)  # [n Q, F]
        found = F.linear(read, weights).unflatten(1, (len(gates), -1))
        return found.transpose(0, 1) + self.output.bias


class JointPredictor(Predictor):
    """Runs several predictors on one state, such as one of the future and one of the past, and sums their losses.

    Source: ours.

    Args:
        predictors: the predictors, each with one part (`parts` = 1).

    Raises:
        ValueError: there is no predictor, or a predictor has several parts.
    """

    def __init__(self, predictors: Sequence[Predictor]) -> None:
        super().__init__()
        if not predictors or any(predictor.parts != 1 for predictor in predictors):
            raise ValueError("JointPredictor needs one predictor or more, with one part each")
        self.predictors = nn.ModuleList(predictors)
        self.steps = max(predictor.steps for predictor in predictors)
        self.past_steps = max(predictor.past_steps for predictor in predictors)

    @property
    def _members(self) -> list[Predictor]:
        return [predictor for predictor in self.predictors if isinstance(predictor, Predictor)]

    @property
    def predicted(self) -> int:
        """n, the number of steps that the predictors predict together, each with one loss for each lane."""
        return sum(predictor.predicted for predictor in self._members)

    def losses(self, flats: Tensor, context: Any) -> StepLosses:
        """Computes the losses of all predictors from packed states [1, B, S], concatenated along the steps."""
        found = [predictor.losses(flats, context) for predictor in self._members]
        losses, counts = torch.cat([each.losses for each in found]), torch.cat([each.counts for each in found])
        return StepLosses(losses, counts, _joined_weights(found))


def _joined_weights(found: Sequence[StepLosses]) -> Tensor | None:
    """Returns the weights of all steps of several losses, [n, 1]; None if all weights are 1."""
    if all(each.weights is None for each in found):
        return None
    rows = [each.losses.new_ones(len(each.losses), 1) if each.weights is None else each.weights for each in found]
    return torch.cat(rows)
