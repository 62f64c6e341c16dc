"""Horizons and MultiHorizonSynthesizer: one message for each of the next K windows, and an optional tail.

Source: Jaderberg et al. 2017, arXiv 1608.05343, section 3.1. We differ in four points: each horizon has its own head, so
that only the tail bootstraps on itself; the lookahead may have more than one step; LSTM cells are bounded; targets are
normalised. docs/concepts/equations.md has the equations, and docs/results/regressed.md has measurements.

Legend: B = lanes, H = hidden units, L = layers, S = numbers in one lane's state, N, K = horizons, m = lookahead in steps.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from dni_seq.core import states
from dni_seq.core.host_count import CountsOnHost
from dni_seq.core.states import State
from dni_seq.synthesizers.base import (
    Recommended,
    Regression,
    match_message,
    predict,
    predict_and_train,
    recommended,
    regress,
    self_supervised,
)
from dni_seq.synthesizers.state_heads import StateHeads
from dni_seq.synthesizers.target_rule import TargetRule, combine, drawn, increments


class Horizons(CountsOnHost):
    """Predicts one message for each of the next K windows: message n is the gradient of the n-th next window's loss.

        target of E_1(s_k) = a_k                            exact, without bootstrap
        target of E_n(s_k) = J_kᵀ E_{n-1}(s_{k+1})          n = 2..K
        target of the tail = J_kᵀ (E_K + γ tail)(s_{k+1})   if `tail` is set
        injected           = c (Σ_n γ^{n-1} w_n E_n + γ^K w_tail tail)

    E_n(s) is the message of horizon n at state s. a_k is the gradient of window k's loss with respect to the window's first
    state s_k, J_k = ∂s_{k+1}/∂s_k, c is the trainer's `synthetic_scale`, γ is the trainer's `discount`, and w are the
    `weights`. Only the tail bootstraps on itself. γ, c and the weights may change at any time without retraining the heads
    E_1..E_K; only the tail's target depends on γ.

    Source: Jaderberg et al. 2017, arXiv 1608.05343, section 3.1, with one head for each horizon.

    Args:
        heads: `StateHeads`, `LeastSquaresHeads`, `FutureGradient`, or a module whose `predict(trigger, context)` returns the
            messages E_1..E_K and then, with `tail`, the message of the tail.
        horizons: K, the number of windows that get a message of their own.
        tail: whether a last head predicts the gradient of all windows after the K-th.
        draw: train only one head per window, drawn at random. This costs one vector-Jacobian product instead of one for
            each head. Self-supervised heads ignore this setting: all of them train at every window.

    Attributes:
        horizons: K, the number of windows that get a message of their own.
        weights: w, a list with one number for each head; the last is that of the tail. All start at 1 and may be set at any
            time. A head with the weight 0 is not injected. The state dict does not hold the weights.
        self_supervised: True if the heads learn from the lookahead's inputs and targets. The trainer's targets then serve
            only to evaluate their messages.
        draws: int64 buffer, 0-d, number of regressions so far; it seeds the next draw.

    Raises:
        ValueError: `horizons` is not positive.
    """

    COUNTER = "draws"

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

    @property
    def recommended(self) -> Recommended:
        """The settings that the heads recommend to the trainer: c, γ, the clipping limit and `regress_every`."""
        return recommended(self.heads)

    def predict(self, trigger: State, context: Any) -> list[State]:
        """Returns the messages of horizons 1 to K, then that of the tail if there is a tail, in the trigger's structure.

        Messages are gradients of the trainer's loss, not yet multiplied by scale, discount and `weights`.
        """
        return predict(self.heads, trigger, context)

    def predict_and_train(self, trigger: State, context: Any) -> tuple[list[State], Tensor]:
        """Predicts as `predict` does, and adds the gradients of the heads' own loss to the `.grad` of their parameters.

        Only for heads with `self_supervised`, such as `FutureGradient`.

        Returns:
            The messages as `predict` returns them, and the heads' own loss, 0-d.
        """
        return predict_and_train(self.heads, trigger, context)

    def forward(self, trigger: State, context: Any = None) -> State:
        """Returns the sum of all messages, the tail's included, each times its entry of `weights`, without discount."""
        messages = [match_message(message, trigger) for message in self.predict(trigger, context)]
        return states.with_floating(trigger, combine(messages, self.target_rule(1.0, 1.0).injection))

    def regress(self, trigger: State, context: Any, targets: list[State | None]) -> Regression:
        """Compares the messages at `trigger` with `targets`; the caller backpropagates the loss of the result.

        Each call adds 1 to the counter `draws`.

        Args:
            trigger: the state at which the targets were computed.
            context: the context that belongs to the trigger.
            targets: one for each head, a gradient of the trainer's loss, or None for a head that is not trained.

        Raises:
            ValueError: a target and its message differ in the number of tensors, a shape or a dtype.
        """
        self._count_call()
        return regress(self.heads, trigger, context, targets)

    def target_rule(self, scale: float, discount: float) -> TargetRule:
        """Returns the `TargetRule` of the next window: the coefficients of the equations in the class docstring.

        The trainer calls this method once for each window. The method changes nothing.

        Args:
            scale: c, the trainer's `synthetic_scale`.
            discount: γ, the trainer's `discount`.

        Returns:
            The rule. If `draw` is set and the heads are not self-supervised, only the drawn head is active.
        """
        rule = increments(scale, discount, self.weights, self.tail)._replace(self_supervised=self.self_supervised)
        if not self.draw or self.self_supervised:  # self-supervised heads need no targets
            return rule
        chosen = drawn(len(self.weights), self._count())
        return rule._replace(active=[i == chosen for i in range(len(self.weights))])


class MultiHorizonSynthesizer(Horizons):
    """Predicts the gradients of the next K windows with one network: `Horizons` on `StateHeads`.

    The network sees the whole state of a lane and the encoded lookahead, and has one head for each horizon. Messages have
    the state's shapes and dtypes, and the unit of the trainer's loss.

    Source: Jaderberg et al. 2017, arXiv 1608.05343, section 3.1. One head for each horizon, the lookahead, the bounded
    cells and the normalised targets are ours.

    Args:
        example: a state of the model, such as `model.initial_state(1)`.
        horizons: K, the number of windows that get a message of their own.
        tail: whether a last head predicts the gradient of all windows after the K-th.
        draw: train only one head per window, drawn at random; see `Horizons`.
        **settings: `cells`, `decay`, `limit`, `hidden`, `batch_dim`, `encoder` and `future`; see `StateHeads`.

    Raises:
        ValueError: `horizons` or `limit` is not positive.
    """

    def __init__(
        self, example: State, *, horizons: int = 1, tail: bool = False, draw: bool = False, **settings: Any
    ) -> None:
        heads = StateHeads(example, horizons + tail, **settings)
        super().__init__(heads, horizons=horizons, tail=tail, draw=draw)
