"""ScopeExchange: computes the targets of synthesizers around one deferred backward pass."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from dni_seq.core import states
from dni_seq.core.deferred_backward import GradientAccumulator
from dni_seq.core.states import State
from dni_seq.interfaces.base import Interface
from dni_seq.synthesizers.base import Regression
from dni_seq.synthesizers.target_rule import TargetRule, combine, rule_of


def zero_ended_lanes(message: State, ends: Tensor, batch_dim: Any) -> State:
    """Returns `message` with exact zeros in the lanes that `ends` [B] marks, where no later loss exists."""
    return states.reset_lanes(message, ends, None, batch_dim)


class Attached(torch.autograd.Function):
    """`Attached.apply(leaf, source)` has the values of `leaf`; the gradient that arrives flows on to both.

    `leaf + (source - source.detach())` has the same gradients, but is NaN where the source is infinite.
    """

    @staticmethod
    def forward(leaf: Tensor, source: Tensor) -> Tensor:
        """Returns a copy of `leaf`."""
        return leaf.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        """Keeps nothing for the backward pass."""

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the gradient for both."""
        return gradient, gradient


def pop_grad(leaf: Tensor) -> Tensor:
    """Returns the gradient that has arrived at a trigger's leaf, or zeros if none has, and clears the leaf's `.grad`."""
    gradient, leaf.grad = leaf.grad, None
    return torch.zeros_like(leaf) if gradient is None else gradient


def with_gradients_wanted(leaves: list[Tensor], gradients: list[Tensor]) -> list[tuple[Tensor, Tensor]]:
    """Returns the leaves that require a gradient, each with its gradient."""
    return [(leaf, gradient) for leaf, gradient in zip(leaves, gradients, strict=True) if leaf.requires_grad]


class InjectionPoint(NamedTuple):
    """A last state in a scope, with the gradient injected there.

    Attributes:
        leaves: the state's floating-point leaves.
        injected: the injected gradient, leaf by leaf.
        messages: the messages that go into targets, by horizon.
        rule: the coefficients of targets and injection.
        same: whether `injected` was computed from these `messages`, not from those of another synthesizer.
    """

    leaves: list[Tensor]
    injected: list[Tensor]
    messages: list[State]
    rule: TargetRule
    same: bool


class ScopeExchange:
    """Collects the triggers and last states of one interface in one scope, and trains the synthesizer at the scope's end.

    Attributes:
        regressions: one for each trigger, in the order of `add_trigger`; filled after the backward pass. For a
            self-supervised synthesizer there is at least one; the loss in each is the synthesizer's mean loss at the last
            states.
        learned: the losses of a self-supervised synthesizer, 0-d, one for each last state.
        own_gradients: the raw target of the first horizon at each trigger, floating-point leaves; None for a trigger at
            which that horizon was not trained.
        injected: the raw injected gradients, floating-point leaves of each last state.
    """

    def __init__(self, interface: Interface, scope: GradientAccumulator) -> None:
        self._interface = interface
        self._scope = scope
        self._triggers: list[tuple[State, Any]] = []
        self._ends: list[InjectionPoint] = []
        self._inner: list[tuple[Tensor, Tensor]] = []
        self._rule: TargetRule | None = None
        self._products: dict[int, list[Tensor | None]] = {}
        self.regressions: list[Regression] = []
        self.learned: list[Tensor] = []
        self.own_gradients: list[list[Tensor] | None] = []
        self.injected: list[list[Tensor]] = []

    def add_trigger(self, state: State, context: Any) -> None:
        """Registers a trigger, whose gradient becomes a target at the scope's end."""
        self._triggers.append((state, context))

    def add_end(self, end: InjectionPoint) -> None:
        """Registers a last state, and adds its injected gradient to the scope.

        Raises:
            ValueError: the same state was added before in this scope.
        """
        if any(leaf is other for leaf in end.leaves for before in self._ends for other in before.leaves):
            raise ValueError("backward: this trigger was already given a synthetic gradient in this defer_backward scope")
        for leaf, gradient in with_gradients_wanted(end.leaves, end.injected):
            self._scope.add(leaf, gradient)
        self._ends.append(end)
        self.injected.append(end.injected)

    def add_inner(self, leaves: list[Tensor], gradients: list[Tensor]) -> None:
        """Adds an injected gradient at a state before the last state to the scope; it is not part of the targets."""
        for leaf, gradient in with_gradients_wanted(leaves, gradients):
            self._scope.add(leaf, gradient)
            self._inner.append((leaf, gradient))

    def before_backward(self) -> None:
        """Computes the vector-Jacobian products for the targets before the backward pass frees the graph.

        At a trigger, a is the gradient of the losses, J the derivative of the last states, and M are the messages. The
        gradient that arrives is S = a + Jᵀ Σ injection · M. The target local · a + Jᵀ Σ bootstrap · M is therefore
        local · S + Jᵀ Σ (bootstrap - local · injection) · M. The second term is a vector-Jacobian product that starts at the
        last states and does not run through the losses. It is skipped if its coefficients are zero, as with c = γ. Gradients
        that were injected at inner states arrive in S too; the same product subtracts them.
        """
        if not self._triggers:
            return
        rule = self._ends[0].rule if self._ends else rule_of(self._interface.synthesizer, 1, 1)
        if not any(rule.active) or not self._interface.learns:
            return
        self._rule = rule
        inputs = self.inputs()
        for i, trained in enumerate(rule.active):
            roots = [root for end in self._ends for root in _difference(end, i)] if trained else []
            if trained and rule.local[i]:
                roots += [(leaf, -rule.local[i] * gradient) for leaf, gradient in self._inner]
            if roots:
                tensors, gradients = zip(*roots, strict=True)
                found = torch.autograd.grad(tensors, inputs, gradients, retain_graph=True, allow_unused=True)
                self._products[i] = list(found)

    def after_backward(self) -> None:
        """Trains the synthesizer at each trigger towards its targets; only evaluates a self-supervised synthesizer."""
        if self._rule is not None:
            self._regress(self._rule, [pop_grad(leaf) for leaf in self.inputs()])
        for leaf in self.inputs():
            leaf.grad = None
        if self.learned:
            loss = self.learned[0] if len(self.learned) == 1 else torch.stack(self.learned).mean()
            nothing = loss.new_full((len(self._ends[0].messages),), float("nan"))
            found = self.regressions or [Regression(loss, nothing, nothing, nothing)]
            self.regressions = [regression._replace(loss=loss) for regression in found]

    def _regress(self, rule: TargetRule, arrived: list[Tensor]) -> None:
        rows = [self._row(i, arrived) if trained else None for i, trained in enumerate(rule.active)]
        position = 0
        for state, context in self._triggers:
            count = len(states.floating(state))
            leaves = [None if row is None else row[position : position + count] for row in rows]
            position += count
            targets = [None if row is None else states.with_floating(state, row) for row in leaves]
            self.own_gradients.append(leaves[0])
            if self.learned:
                with torch.no_grad():
                    regression = self._interface.measure(state, context, targets)
            else:
                regression = self._interface.regress(state, context, targets)
            self.regressions.append(regression)

    def _row(self, i: int, arrived: list[Tensor]) -> list[Tensor]:
        """Returns the target of horizon i, for the leaves of all triggers."""
        own = self._rule.local[i] if self._rule is not None else 0.0
        shares = arrived if own == 1 else [own * leaf for leaf in arrived]
        products = self._products.get(i, [None] * len(shares))
        return [leaf if product is None else leaf + product for leaf, product in zip(shares, products, strict=True)]

    def inputs(self) -> list[Tensor]:
        """Returns the floating-point leaves of all triggers."""
        return [leaf for state, _ in self._triggers for leaf in states.floating(state)]


def _difference(end: InjectionPoint, i: int) -> list[tuple[Tensor, Tensor]]:
    """Returns the leaves of a last state, each with the sum in the second term of target i; see `before_backward`."""
    own, bootstrap, weights = end.rule.local[i], end.rule.bootstrap[i], end.rule.injection
    if end.same:
        coefficients = [f - own * w for f, w in zip(bootstrap, weights, strict=True)]
        return with_gradients_wanted(end.leaves, combine(end.messages, coefficients)) if any(coefficients) else []
    wanted = combine(end.messages, bootstrap)
    return with_gradients_wanted(end.leaves, [w - own * injected for w, injected in zip(wanted, end.injected, strict=True)])
