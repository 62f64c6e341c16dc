"""ExactFuture: the exact gradient of the next n steps, used in place of a synthesizer.

It runs the model over the n steps after the window and returns the gradient of their loss with respect to the window's last
state. It is the reference for synthesizers, and an alternative to them if the next steps are available. With a tail, a
synthesizer predicts the gradient of all steps after these n.

Legend: B = lanes, n = steps, m = lookahead of the tail in steps.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dni_seq.core import states
from dni_seq.core.states import State
from dni_seq.core.vjp import without_parameter_gradients
from dni_seq.core.windows import Lookahead, Reduction, check_unreduced, next_steps
from dni_seq.synthesizers.base import (
    Recommended,
    Regression,
    match_message,
    past_steps,
    predict,
    predict_and_train,
    recommended,
    regress,
    self_supervised,
)
from dni_seq.synthesizers.binding import StepWeight
from dni_seq.synthesizers.target_rule import TargetRule


class ExactFuture(nn.Module):
    """Computes the gradient of the next n steps' loss with respect to a state by running the model over these steps.

    The context is a `Lookahead` of n steps, or of n + m steps if the tail needs m steps. The model's parameters get no
    gradients. The model's buffers and the random state are restored, so dropout draws the same numbers as in the next
    window. The gradient is not discounted: the trainer's `discount` is used in the tail's target only.

    The trainer's `fidelity_every` compares the message with the gradient of one window. The comparison is meaningful only if
    n = T and there is no tail.

    The lookahead's inputs and targets may be nests of tensors, as those of the trainer's windows. Messages have the state's
    shapes and dtypes and the unit of the trainer's loss.

    Source: Jaderberg et al. 2017, arXiv 1608.05343, section 2.1, approximate this gradient; computing it exactly is ours.

    Args:
        model: `model(inputs, state) -> (outputs, state)`. It is not registered as a submodule.
        loss_fn: `loss_fn(outputs, targets)`, unreduced losses [n, B].
        steps: n, the number of steps run.
        window: T, the length of the trainer's windows. With the reduction "mean" each step weighs 1 / (T · B). Default: the
            length of the trainer's first window.
        reduction: the trainer's reduction, "mean", "lane-mean" or "sum". With "mean", each step weighs 1 / (T · B),
            in masked windows too. Default: the reduction of the trainer; "mean" without a trainer.
        tail: a synthesizer with one horizon, for all steps after the n-th. None for no tail. In lanes whose sequence ends
            within the n steps the tail's message is zero. A sequence that ends with the n-th step is recognised only if the
            lookahead has at least n + 1 steps.
        batch_dim: dimension of the lanes in the state's leaves, an int or a nest. Used with a tail only. Default:
            the trainer's `state_batch_dim`; 1 without a trainer.

    Attributes:
        steps: the number of steps run.
        tail: the tail, or None.
        self_supervised: True if the tail learns from the lookahead's inputs and targets. The trainer's targets then serve
            only to evaluate the tail's messages.

    Raises:
        ValueError: `steps` or `window` is not positive, the reduction is unknown, or the tail predicts the past.
    """

    supports_auto_scale = False

    def __init__(
        self,
        model: nn.Module,
        loss_fn: Callable[[Any, Any], Tensor],
        *,
        steps: int,
        window: int | None = None,
        reduction: Reduction | None = None,
        tail: nn.Module | None = None,
        batch_dim: Any = None,
    ) -> None:
        super().__init__()
        if steps < 1:
            raise ValueError(f"ExactFuture: steps must be positive, got {steps}")
        if tail is not None and past_steps(tail):
            raise ValueError(
                "ExactFuture: the tail predicts the past, which is not known after the n steps: use another tail"
            )
        self.step_weight = StepWeight("ExactFuture", window, reduction)
        self._model = (model,)  # a tuple hides the model from nn.Module, which would register it
        self.loss_fn = loss_fn
        self.steps = steps
        self.tail = tail
        self._given_dim = batch_dim
        self.batch_dim = 1 if batch_dim is None else batch_dim
        self.self_supervised = tail is not None and self_supervised(tail)

    def bind(self, *, window: int, reduction: Reduction | None, state_batch_dim: Any, state: State) -> None:
        """Takes over the trainer's window length, reduction and lanes; see `dni_seq.synthesizers.binding.bind`.

        Raises:
            ValueError: another window length, reduction or lane dimension was given at construction.
        """
        self.step_weight.bind(window, reduction)
        if self._given_dim not in (None, state_batch_dim):
            raise ValueError(
                f"ExactFuture was built with batch_dim={self._given_dim!r}, but the trainer's state_batch_dim is "
                f"{state_batch_dim!r}: leave batch_dim out"
            )
        self.batch_dim = state_batch_dim

    @property
    def recommended(self) -> Recommended:
        """The recommended settings: c = 1, γ = 0.9, and the clipping limit and the `regress_every` that the tail recommends.

        Without a tail nothing is trained, and the last two are 1.
        """
        of_tail = Recommended() if self.tail is None else recommended(self.tail)
        return Recommended(1.0, 0.9, of_tail.synthesizer_clip, of_tail.regress_every)

    def predict(self, trigger: State, context: Any) -> list[State]:
        """Returns the exact gradient and, if there is a tail, the tail's own message at `trigger`.

        The exact gradient includes the tail's message after the n steps. The second entry is what the tail predicts at
        `trigger` itself. It is compared with the tail's target to train the tail, and is never injected.

        Args:
            trigger: the state.
            context: a `Lookahead` of at least n steps.

        Raises:
            ValueError: the context is not a `Lookahead` of at least n steps, or `loss_fn` does not return [n, B].
        """
        exact = self._exact(trigger, context)
        if self.tail is None:
            return [exact]
        return [exact, *predict(self.tail, trigger, context)]

    def predict_and_train(self, trigger: State, context: Any) -> tuple[list[State], Tensor]:
        """Predicts as `predict` does, and adds the gradients of a self-supervised tail's own loss to the tail's parameters.

        The trainer calls this only if the tail is self-supervised.

        Returns:
            The messages as `predict` returns them, and the tail's loss, 0-d.
        """
        assert self.tail is not None
        exact = self._exact(trigger, context)
        messages, loss = predict_and_train(self.tail, trigger, context)
        return [exact, *messages], loss

    def forward(self, trigger: State, context: Any = None) -> State:
        """Returns the gradient of the next n steps' loss with respect to `trigger`.

        If there is a tail, the tail's message at the state after the n-th step is backpropagated to `trigger` and added.

        Args:
            trigger: the state.
            context: a `Lookahead` of at least n steps.

        Raises:
            ValueError: the context is not a `Lookahead` of at least n steps, or `loss_fn` does not return [n, B].
        """
        return self._exact(trigger, context)

    def regress(self, trigger: State, context: Any, targets: list[State | None]) -> Regression:
        """Returns the error of the tail's message at `trigger` against its target, for the caller to backpropagate.

        Args:
            trigger: the state.
            context: the context at that state.
            targets: two entries, the first for the exact gradient, the second for the tail. The first is ignored.

        Returns:
            The tail's regression. Its diagnostics have two entries, the first for the exact gradient, the second for the
            tail. The first is NaN.

        Raises:
            RuntimeError: there is no tail.
        """
        if self.tail is None:
            raise RuntimeError("ExactFuture without a tail has nothing to train: pass a tail to call regress")
        of_tail = regress(self.tail, trigger, context, targets[1:])
        rows = (F.pad(row, (1, 0), value=float("nan")) for row in (of_tail.error, of_tail.power, of_tail.cosine))
        return Regression(of_tail.loss, *rows)

    def target_rule(self, scale: float, discount: float) -> TargetRule:
        """Returns the rule that injects `scale` times the exact gradient; only the tail has a target.

        The tail's target is the gradient of the window's own loss, plus `discount` times the tail's message at the window's
        last state, backpropagated through the window. The target of a self-supervised tail, which only evaluates it, has no
        such second term. The tail's message enters the injection only through the exact gradient.

        The trainer calls this once for each window.

        Args:
            scale: c, the trainer's `synthetic_scale`.
            discount: γ, the trainer's `discount`.
        """
        if self.tail is None:
            return TargetRule(local=[1.0], bootstrap=[[0.0]], injection=[scale], active=[False])
        # The messages of a self-supervised tail are compared with the gradient of the window's own loss, without bootstrap.
        bootstrap = 0.0 if self.self_supervised else discount
        return TargetRule(
            local=[0.0, 1.0],
            bootstrap=[[0.0, 0.0], [0.0, bootstrap]],
            injection=[scale, 0.0],
            active=[False, True],
            self_supervised=self.self_supervised,
        )

    def _exact(self, trigger: State, context: Any) -> State:
        lookahead = next_steps(context, self.steps)
        model = self._model[0]
        with without_parameter_gradients(model), torch.enable_grad():
            start = states.map_floating(lambda leaf: leaf.detach().requires_grad_(), trigger)
            outputs, last = model(lookahead.inputs, states.clone(start))  # a copy, because a model may write into its state
            losses = self.loss_fn(outputs, lookahead.targets)
            roots: list[Tensor] = [self._reduce(losses, lookahead)]
            gradients: list[Tensor | None] = [None]
            if self.tail is not None:
                after = context.span(self.steps, None)
                with torch.no_grad():
                    (message,) = predict(self.tail, states.detach(last), after)
                # If the lookahead has only n steps, it does not show whether a sequence ends with the n-th.
                alive = after.valid[0] if len(after.valid) else lookahead.valid[-1]
                message = states.reset_lanes(match_message(message, last), ~alive, None, self.batch_dim)
                for leaf, gradient in zip(states.floating(last), states.floating(message), strict=True):
                    roots.append(leaf)
                    gradients.append(gradient)
            found = torch.autograd.grad(roots, states.floating(start), gradients, allow_unused=True)
        leaves = [torch.zeros_like(t) if g is None else g for t, g in zip(states.floating(trigger), found, strict=True)]
        return states.with_floating(trigger, leaves)

    def _reduce(self, losses: Tensor, lookahead: Lookahead) -> Tensor:
        check_unreduced(losses, lookahead)
        return torch.where(lookahead.counts, losses, 0).sum() * self.step_weight(losses.shape[1])
