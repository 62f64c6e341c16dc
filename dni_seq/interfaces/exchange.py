"""Exchange: the vector-Jacobian products and targets of one deferred backward pass."""

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
    """`message` with exact zeros in the lanes that `ends` [B] marks: a state that nothing follows has no gradient."""
    return states.reset_lanes(message, ends, None, batch_dim)


def pop_grad(leaf: Tensor) -> Tensor:
    """The gradient that has arrived at a trigger's leaf, zeros where none has; the leaf's `.grad` is cleared."""
    gradient, leaf.grad = leaf.grad, None
    return torch.zeros_like(leaf) if gradient is None else gradient


def with_gradients_wanted(leaves: list[Tensor], gradients: list[Tensor]) -> list[tuple[Tensor, Tensor]]:
    """Returns the leaves that require a gradient, each with its gradient."""
    return [(leaf, gradient) for leaf, gradient in zip(leaves, gradients, strict=True) if leaf.requires_grad]


class InjectionPoint(NamedTuple):
    """A last state in a scope.

    Attributes:
        leaves: its floating-point leaves.
        injected: the gradient that is injected there, leaf by leaf.
        messages: by horizon, those that go into targets.
        rule: the coefficients.
        same: whether it is these messages that were injected.
    """

    leaves: list[Tensor]
    injected: list[Tensor]
    messages: list[State]
    rule: TargetRule
    same: bool


class ScopeExchange:
    """The triggers and last states of one interface in one scope, until the scope's one backward pass has joined them.

    Attributes:
        regressions: one for every trigger, in the order they were made, once the scope is delivered; of a synthesizer that
            has learned ahead one at least, with the mean loss at the last states.
        learned: the losses, 0-d, of a synthesizer that learns ahead, one for every last state.
        own_gradients: the target of the first horizon of every trigger, raw: its floating-point leaves; None where that
            horizon was not trained.
        injected: the injected messages, raw, floating-point leaves of every last state.
    """

    def __init__(self, interface: Interface, scope: GradientAccumulator) -> None:
        self._interface = interface
        self._scope = scope
        self._triggers: list[tuple[State, Any]] = []
        self._ends: list[InjectionPoint] = []
        self._rule: TargetRule | None = None
        self._products: dict[int, list[Tensor | None]] = {}
        self.regressions: list[Regression] = []
        self.learned: list[Tensor] = []
        self.own_gradients: list[list[Tensor] | None] = []
        self.injected: list[list[Tensor]] = []

    def add_trigger(self, state: State, context: Any) -> None:
        """Take the gradient of `state` as a target at the scope's end."""
        self._triggers.append((state, context))

    def add_end(self, end: InjectionPoint) -> None:
        """Inject into a last state.

        Raises:
            ValueError: the same state was given before in this scope.
        """
        if any(leaf is other for leaf in end.leaves for before in self._ends for other in before.leaves):
            raise ValueError("backward: this trigger was already given a synthetic gradient in this defer_backward scope")
        for leaf, gradient in with_gradients_wanted(end.leaves, end.injected):
            self._scope.add(leaf, gradient)
        self._ends.append(end)
        self.injected.append(end.injected)

    def before_backward(self) -> None:
        """The vector-Jacobian products for the targets, while the graph is whole.

        What arrives at a trigger in the one backward pass is S = a + Jᵀ Σ weights · M. So own · a + Jᵀ Σ following · M
        is own · S + Jᵀ Σ (following - own · weights) · M: a product that starts at the last states and never runs through
        the losses, and none at all where the coefficients vanish, as they do for one factor that is both c and γ.
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
            if roots:
                tensors, gradients = zip(*roots, strict=True)
                found = torch.autograd.grad(tensors, inputs, gradients, retain_graph=True, allow_unused=True)
                self._products[i] = list(found)

    def after_backward(self) -> None:
        """Regress at every trigger towards its targets, or measure there what has learned already."""
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
        """The target of horizon i at every trigger."""
        own = self._rule.local[i] if self._rule is not None else 0.0
        shares = arrived if own == 1 else [own * leaf for leaf in arrived]
        products = self._products.get(i, [None] * len(shares))
        return [leaf if product is None else leaf + product for leaf, product in zip(shares, products, strict=True)]

    def inputs(self) -> list[Tensor]:
        """The floating-point leaves of all triggers."""
        return [leaf for state, _ in self._triggers for leaf in states.floating(state)]


def _difference(end: InjectionPoint, i: int) -> list[tuple[Tensor, Tensor]]:
    """Where target i has other messages behind a last state than were injected: its leaves with that difference."""
    own, following, weights = end.rule.local[i], end.rule.bootstrap[i], end.rule.injection
    if end.same:
        coefficients = [f - own * w for f, w in zip(following, weights, strict=True)]
        return with_gradients_wanted(end.leaves, combine(end.messages, coefficients)) if any(coefficients) else []
    wanted = combine(end.messages, following)
    return with_gradients_wanted(end.leaves, [w - own * injected for w, injected in zip(wanted, end.injected, strict=True)])
