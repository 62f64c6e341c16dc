"""ExactFuture: the exact gradient of the next n steps, in the place of a synthesizer.

It is the reference that a synthesizer stands in for, and a rival wherever the text to come is at hand: run the model n steps
past the window, take the gradient of their loss at the boundary, inject it. With a tail, a synthesizer predicts what is
behind those n steps.

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
from dni_seq.core.windows import Lookahead, Reduction, check_unreduced, next_steps, step_weight
from dni_seq.synthesizers.base import Regression, predict, predict_and_train, regress, self_supervised
from dni_seq.synthesizers.target_rule import TargetRule


class ExactFuture(nn.Module):
    """The gradient of the next n steps' loss with respect to a state, by running the model over them.

    Takes a `Lookahead` of n steps, and of the tail's m behind them, as context. Parameters get no gradients from it; the
    model's buffers and the random state are left as they were, so that dropout in those steps is drawn as in the window
    that follows. Comparisons (`fidelity_every`) hold its message against one window's gradient: they tell something where
    n = T and there is no tail.

    Args:
        model: `model(inputs, state) -> (outputs, state)`; held without being registered as a submodule.
        loss_fn: `loss_fn(outputs, targets)`, unreduced losses [n, B].
        steps: n.
        window: T, the length of the trainer's windows; a mean over a window weighs each of its steps by 1 / (T · B).
        reduction: that of the trainer ("mean", "lane-mean" or "sum"); with "mean", masked windows weigh their steps as full
            ones do.
        tail: a synthesizer of one horizon for what is behind the n steps, None for nothing. Where a sequence ends with the
            n-th step shows in the lookahead behind it: a tail that asks for none is sent there too.
        batch_dim: where the lanes lie in the state's leaves, used with a tail.

    Raises:
        ValueError: `steps` or `window` is not positive, or the reduction is none; at a call, the context is no lookahead of
            as many steps, or `loss_fn` does not return [n, B].
    """

    def __init__(
        self,
        model: nn.Module,
        loss_fn: Callable[[Any, Tensor], Tensor],
        *,
        steps: int,
        window: int,
        reduction: Reduction = "mean",
        tail: nn.Module | None = None,
        batch_dim: Any = 1,
    ) -> None:
        super().__init__()
        if steps < 1:
            raise ValueError(f"ExactFuture: steps must be positive, got {steps}")
        step_weight(reduction, window, 1)  # says what is wrong with them
        self._model = (model,)  # in a tuple, which nn.Module does not look into
        self.loss_fn = loss_fn
        self.steps = steps
        self.window = window
        self.reduction = reduction
        self.tail = tail
        self.batch_dim = batch_dim
        self.self_supervised = tail is not None and self_supervised(tail)

    def predict(self, trigger: State, context: Any) -> list[State]:
        """The exact gradient, that of the tail included; then the tail's own message at `trigger`, where there is one."""
        exact = self._exact(trigger, context)
        if self.tail is None:
            return [exact]
        return [exact, *predict(self.tail, trigger, context)]

    def predict_and_train(self, trigger: State, context: Any) -> tuple[list[State], Tensor]:
        """The same with a tail that learns as it predicts, and its loss; see `synthesizers.predict_and_train`."""
        assert self.tail is not None
        exact = self._exact(trigger, context)
        messages, loss = predict_and_train(self.tail, trigger, context)
        return [exact, *messages], loss

    def forward(self, trigger: State, context: Any = None) -> State:
        """The exact gradient, that of the tail included."""
        return self._exact(trigger, context)

    def regress(self, trigger: State, context: Any, targets: list[State | None]) -> Regression:
        """One regression step of the tail; nothing is said of the exact gradient, whose place is the first."""
        if self.tail is None:
            raise RuntimeError("ExactFuture without a tail has nothing to train")
        of_tail = regress(self.tail, trigger, context, targets[1:])
        rows = (F.pad(row, (1, 0), value=float("nan")) for row in (of_tail.error, of_tail.power, of_tail.cosine))
        return Regression(of_tail.loss, *rows)

    def target_rule(self, scale: float, discount: float) -> TargetRule:
        """Inject the exact gradient; train the tail towards its own bootstrapped target."""
        if self.tail is None:
            return TargetRule(local=[1.0], bootstrap=[[0.0]], injection=[scale], active=[False])
        # What is no bootstrap is measured by the window's own gradient.
        following = 0.0 if self.self_supervised else discount
        return TargetRule(
            local=[0.0, 1.0],
            bootstrap=[[0.0, 0.0], [0.0, following]],
            injection=[scale, 0.0],
            active=[False, True],
            self_supervised=self.self_supervised,
        )

    def _exact(self, trigger: State, context: Any) -> State:
        ahead = next_steps(context, self.steps)
        model = self._model[0]
        with without_parameter_gradients(model), torch.enable_grad():
            start = states.map_floating(lambda leaf: leaf.detach().requires_grad_(), trigger)
            outputs, last = model(ahead.inputs, states.clone(start))  # a model may write into its state
            losses = self.loss_fn(outputs, ahead.targets)
            roots: list[Tensor] = [self._reduce(losses, ahead)]
            gradients: list[Tensor | None] = [None]
            if self.tail is not None:
                behind = context.span(self.steps, None)
                with torch.no_grad():
                    (message,) = predict(self.tail, states.detach(last), behind)
                # Without lookahead behind the n steps it is not known whether a sequence ends with the last of them.
                alive = behind.valid[0] if len(behind.valid) else ahead.valid[-1]
                message = states.reset_lanes(message, ~alive, None, self.batch_dim)
                for leaf, gradient in zip(states.floating(last), states.floating(message), strict=True):
                    roots.append(leaf)
                    gradients.append(gradient)
            found = torch.autograd.grad(roots, states.floating(start), gradients, allow_unused=True)
        leaves = [torch.zeros_like(t) if g is None else g for t, g in zip(states.floating(trigger), found, strict=True)]
        return states.with_floating(trigger, leaves)

    def _reduce(self, losses: Tensor, ahead: Lookahead) -> Tensor:
        check_unreduced(losses, ahead)
        return torch.where(ahead.counts, losses, 0).sum() * step_weight(self.reduction, self.window, losses.shape[1])
