"""Synthesizers made for recurrent states: several layers and tensors, a look at the future, several horizons.

Source: the recipe starts from Jaderberg et al. 2017, arXiv 1608.05343, section 3.1. We differ in the heads by horizon (each
predicts the gradient of one window ahead, so that none but the tail bootstraps on itself), in the lookahead of more than one
step, in bounded cells and in normalised targets; docs/synthetic-gradients.md measures each.

Legend: B = lanes, H = hidden units, L = layers, S = numbers in one lane's state, N, K = horizons, m = lookahead in steps.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from dni_seq.core import states
from dni_seq.core.states import State
from dni_seq.synthesizers.base import (
    Regression,
    predict,
    predict_and_train,
    regress,
    self_supervised,
)
from dni_seq.synthesizers.state_heads import StateHeads
from dni_seq.synthesizers.target_rule import TargetRule, combine, drawn, increments


class Horizons(nn.Module):
    """K synthesizers in one: horizon n predicts the gradient of the loss of the n-th window ahead.

        target of E_1(s_k) = a_k                            exact, without bootstrap
        target of E_n(s_k) = J_kᵀ E_{n-1}(s_{k+1})          n = 2..K
        target of the tail = J_kᵀ (E_K + γ tail)(s_{k+1})   where there is one
        injected           = c (Σ_n γ^{n-1} w_n E_n + γ^K w_tail tail)

    Nothing but the tail bootstraps on itself. Discount, number of horizons used and their weights may change at any time
    without training anew; only the tail's target depends on γ.

    Args:
        heads: `predict(trigger, context)` gives E_1..E_K and the tail, a list of messages.
        horizons: K.
        tail: whether a last head stands for all windows behind the K-th.
        draw: train one head, drawn at random, a window: one vector-Jacobian product instead of K. Heads that learn as they
            predict do so at every window all the same.

    Attributes:
        weights: w, one number a head, the tail's last; 1 at first. Set it, or single entries, at any time.

    Raises:
        ValueError: `horizons` is not positive.
    """

    draws: Tensor

    def __init__(self, heads: nn.Module, *, horizons: int = 1, tail: bool = False, draw: bool = False) -> None:
        super().__init__()
        if horizons < 1:
            raise ValueError(f"horizons must be positive, got {horizons}")
        self.horizons = horizons
        self.tail = tail
        self.draw = draw
        self.weights = [1.0] * (horizons + tail)
        self.heads = heads
        self.self_supervised = self_supervised(heads)
        self.register_buffer("draws", torch.zeros((), dtype=torch.int64))

    def predict(self, trigger: State, context: Any) -> list[State]:
        """E_1..E_K and the tail, raw."""
        return predict(self.heads, trigger, context)

    def predict_and_train(self, trigger: State, context: Any) -> tuple[list[State], Tensor]:
        """The same from heads that learn as they predict, and their loss; see `synthesizers.predict_and_train`."""
        return predict_and_train(self.heads, trigger, context)

    def forward(self, trigger: State, context: Any = None) -> State:
        """The raw gradient of all the windows predicted, undiscounted: Σ_n w_n E_n + w_tail tail."""
        messages = self.predict(trigger, context)
        return states.with_floating(trigger, combine(messages, self.target_rule(1.0, 1.0).injection))

    def regress(self, trigger: State, context: Any, targets: list[State | None]) -> Regression:
        """One regression step of the heads that have a target."""
        self.draws += 1
        return regress(self.heads, trigger, context, targets)

    def target_rule(self, scale: float, discount: float) -> TargetRule:
        """The rule above, for one window."""
        rule = increments(scale, discount, self.weights, self.tail)._replace(self_supervised=self.self_supervised)
        if not self.draw or self.self_supervised:  # there a target measures, which all heads learn without
            return rule
        chosen = drawn(len(self.weights), int(self.draws))
        return rule._replace(active=[i == chosen for i in range(len(self.weights))])


class MultiHorizonSynthesizer(Horizons):
    """`Horizons` by one network that sees the whole state, and what it has ahead, and has a head for each of them.

    Args:
        example: a state of the model.
        horizons, tail, draw: see `Horizons`.
        cells, hidden, batch_dim, encoder, future, decay, limit: see `StateHeads`.

    Raises:
        ValueError: `horizons` is not positive.
    """

    def __init__(
        self, example: State, *, horizons: int = 1, tail: bool = False, draw: bool = False, **settings: Any
    ) -> None:
        heads = StateHeads(example, horizons + tail, **settings)
        super().__init__(heads, horizons=horizons, tail=tail, draw=draw)
