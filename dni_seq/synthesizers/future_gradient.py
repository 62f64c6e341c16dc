"""FutureGradient: messages that are the gradient of a small learned model of what is ahead, instead of regressions on it.

A regression towards real gradients may be right on average and still wrong alike in all lanes for many windows, and an RNN
sums up what is alike; what a message explains of the exact gradient (R²) says little of what it brings. The gradient of
one learned loss is the gradient of something: it leads the RNN to states from which that model, too, tells better what
comes. The model needs no targets but those of the steps ahead, so it learns at every window without a product.

Source: ours; the paper (Jaderberg et al. 2017, arXiv 1608.05343) regresses. Trinh et al. 2018, "Learning Longer-term
Dependencies in RNNs with Auxiliary Losses", arXiv 1803.00144, train an RNN by the loss of a second network that predicts
from its states; that one is unrolled from single states of the past, this one is read at every window's end.
docs/synthetic-gradients.md measures it.

Legend: B = lanes, S = numbers in one lane's packed state, m = lookahead in steps, K = horizons, F = units of the model.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dni_seq.core.states import State
from dni_seq.core.windows import Reduction, step_weight
from dni_seq.synthesizers.base import Regression
from dni_seq.synthesizers.future_model import FutureModel
from dni_seq.synthesizers.packed import Outputs, PackedSynthesizer
from dni_seq.synthesizers.packing import Packing
from dni_seq.synthesizers.state_mlp import StateTrunk
from dni_seq.synthesizers.target_rule import TargetRule, increments


class ClampCache(NamedTuple):
    """Least and largest number of a message, and what they follow from: mean squares, their version, the limit."""

    of: Tensor
    version: int
    limit: float
    range: tuple[Tensor, Tensor]

    def holds(self, of: Tensor, limit: float) -> bool:
        """Whether nothing has changed since."""
        return self.of is of and self.version == of._version and self.limit == limit


class FutureGradient(PackedSynthesizer):
    """Messages by horizon: the n-th is the gradient of a `FutureModel`'s loss over the n-th of K equal parts of m steps.

    With m = K T those parts are the windows to come. Messages are in the unit of the trainer's loss from the first one on.
    A model whose last layers start at zero, and its messages with them, ends up worse (docs/synthetic-gradients.md).

        M_n(s) = w (1 - tanh²(c) at cells) ⊙ ∂(Σ_{steps j of part n} ℓ_j)/∂s

    Targets measure it (R², cosine) and limit it, but do not train it.

    Args:
        example: a state of the model, such as `model.initial_state(1)`.
        future: makes the model of m steps, of K parts, from S.
        window: T, the length of the trainer's windows; a mean over a window weighs each of its steps by w = 1 / (T · B).
        reduction: that of the trainer ("mean", "lane-mean" or "sum"); with "mean", masked windows weigh their steps as full
            ones do.
        cells, decay, limit: see `PackedSynthesizer`.
        batch_dim: where the lanes lie in the state's leaves, an int or a nest.
    """

    self_supervised = True

    def __init__(
        self,
        example: State,
        future: Callable[[int], FutureModel],
        *,
        window: int,
        reduction: Reduction = "mean",
        cells: Any = False,
        decay: float = 0.99,
        limit: float | None = None,
        batch_dim: Any = 1,
    ) -> None:
        model = future(Packing(example, batch_dim).size)
        trunk = StateTrunk(example, model.parts, hidden=(), batch_dim=batch_dim, future=lambda _: model)
        super().__init__(trunk, example, cells, decay, limit)
        self.window, self.reduction = window, reduction
        self._clamp_cache: ClampCache | None = None
        step_weight(reduction, window, 1)  # says what is wrong with them

    @property
    def model(self) -> FutureModel:
        """The model of what is ahead."""
        model: FutureModel = self.network.future
        return model

    def target_rule(self, scale: float, discount: float) -> TargetRule:
        """That of horizons, by which it is measured; it learns at every window."""
        return increments(scale, discount, [1.0] * self.network.horizons, False)._replace(self_supervised=True)

    def outputs(self, bounded: Tensor, gate: Tensor, context: Any) -> Outputs:
        """Raw messages without a graph, those of all lanes of all ranks in one unit."""
        return self._weighted(self.model.gradients(bounded, context), gate, 1)

    def predict(self, trigger: State, context: Any) -> list[State]:
        """One message a horizon, raw, limited once there has been a target."""
        return self._unpacked(self.outputs(*self._bounded(trigger), context), trigger)

    def predict_and_train(self, trigger: State, context: Any) -> tuple[list[State], Tensor]:
        """What `predict` gives, and the model's mean loss, 0-d, whose gradients are added to the parameters."""
        bounded, gate = self._bounded(trigger)
        found, loss = self.model.learn(bounded, context)
        return self._unpacked(self._weighted(found, gate, self.model.steps * len(gate)), trigger), loss

    def _weighted(self, found: Tensor, gate: Tensor, of: int) -> Outputs:
        """Messages from gradients [K, B, S], with respect to bounded states, of losses summed and divided by `of`."""
        ranks = 1 if self.across_ranks is None or self.reduction == "sum" else self.across_ranks.size
        weight = of * step_weight(self.reduction, self.window, len(gate) * ranks)
        return Outputs((found * (weight * gate)).transpose(0, 1), None, None)

    def _unpacked(self, outputs: Outputs, trigger: State) -> list[State]:
        found = outputs.messages
        if self.limit is not None:
            found = found.clamp(*self._clamp_range(self.limit))
        return [self.packing.unpack(message, trigger) for message in found.unbind(1)]

    def __getstate__(self) -> dict[str, Any]:
        """What a copy takes over: what is known of one tensor's versions says nothing of its copy's."""
        return {**self.__dict__, "_known": None}

    def _clamp_range(self, limit: float) -> tuple[Tensor, Tensor]:
        """Least and largest number of a message, [K, S]; computed anew at the few windows that change the mean squares."""
        of = self.mean_square
        if self._clamp_cache is None or not self._clamp_cache.holds(of, limit):
            scales = self._scales()  # zero before the first target, and where all were zero: no unit to limit it by
            largest = torch.where(scales > 0, limit * scales, torch.inf)
            self._clamp_cache = ClampCache(of, of._version, limit, (-largest, largest))
        return self._clamp_cache.range

    def regress(self, trigger: State, context: Any, targets: list[State | None]) -> Regression:
        """The model's own mean loss, which trains it; against the targets that are there the message is measured.

        Raises:
            ValueError: a target has not the shape of its message.
        """
        bounded, gate = self._bounded(trigger)
        loss = self.model.loss(bounded, context)
        trained = [i for i, target in enumerate(targets) if target is not None]
        with torch.no_grad():
            wanted = self._wanted(trigger, targets, trained)
            found = self.outputs(bounded, gate, context).messages[:, trained]
            scales = self._scales()[trained]
            # Where every target was zero so far there is no unit, and nothing to measure a message by.
            found = torch.where(scales > 0, found / scales, 0)
            error = (found - wanted).square().mean((0, 2))
            return Regression(loss, *self._measured(error, found, wanted, trained, len(targets)))
