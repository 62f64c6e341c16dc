"""BackwardInterface: cuts a network in two parts and sends a synthetic gradient to the first part.

Source: Jaderberg et al. 2017, "Decoupled Neural Interfaces using Synthetic Gradients", arXiv 1608.05343, section 2. Names,
arguments and semantics are those of dni-pytorch. We differ from dni-pytorch in three points. Triggers may be nested states.
A context is captured when its trigger is made. Scopes may be nested, and remain usable after an exception.

docs/interfaces.md has examples.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor, nn

from dni_seq.core import states
from dni_seq.core.deferred_backward import GradientAccumulator, current_scope, uncompiled
from dni_seq.core.states import State
from dni_seq.interfaces.base import Interface
from dni_seq.interfaces.context import current_context
from dni_seq.interfaces.exchange import (
    Attached,
    InjectionPoint,
    ScopeExchange,
    pop_grad,
    with_gradients_wanted,
    zero_ended_lanes,
)
from dni_seq.synthesizers.base import Regression, check_like, match_message
from dni_seq.synthesizers.target_rule import TargetRule, combine, rule_of


class BackwardInterface(Interface):
    """Trains the first part of a network, A, with a prediction of the gradient that the next part, B, would send back.

    A call of the module between the two parts backpropagates the synthetic gradient into part A and returns the activation
    for part B. The synthesizer trains on the true gradient as soon as part B's backward pass has computed this gradient. In
    an unrolled RNN, call `make_trigger` on a window's first state and `backward` on its last state, inside `defer_backward`.

    Training the synthesizer adds gradients to its parameters; the caller steps the synthesizer's optimizer. In `eval()` the
    interface returns its input. A trigger is a floating-point tensor of any shape, or a nest of such tensors. Gradients and
    messages have the shape and dtype of the trigger. Their unit is that of the backpropagated scalar, per unit of the
    trigger.

    Source: Jaderberg et al. 2017, arXiv 1608.05343, section 2; names and arguments are those of dni-pytorch.

    Args:
        synthesizer: any module with `forward(trigger, context)` that returns a message of the trigger's shape. The message
            is the gradient, with respect to the trigger, of the scalar that the user backpropagates.

    Raises:
        ValueError: in a call: a message and its trigger differ in shape, or a context is missing or not expected.
    """

    @uncompiled
    def forward(self, trigger: State) -> State:
        """Backpropagates the synthetic gradient into `trigger`; returns `trigger` detached, to receive the true gradient.

        The true gradient trains the synthesizer, see `make_trigger`. If `trigger` does not require a gradient, nothing is
        backpropagated into it. In `eval()` and under `torch.no_grad()` the trigger is returned unchanged.
        """
        if not self.training or not torch.is_grad_enabled():
            return trigger
        if any(leaf.requires_grad for leaf in states.floating(trigger)):
            self.backward(trigger)
        return self.make_trigger(trigger)

    @uncompiled
    def make_trigger(self, trigger: State, *, watched: bool = True, attached: bool = False) -> State:
        """Returns `trigger` detached from its graph; the gradient that arrives at the result trains the synthesizer.

        In a `defer_backward` scope the synthesizer is trained at the scope's end. Outside of scopes it is trained when a
        backward pass has computed the gradients of all leaves of the result. The training uses the context of the
        `synthesizer_context` block in which this method was called, or None if there was no such block. In `eval()` and
        under `torch.no_grad()` the trigger is returned unchanged.

        Args:
            trigger: a tensor or nest, such as the state that a window starts from.
            watched: False to detach only: no gradient is computed at this trigger, and the synthesizer does not train on it.
                Ignored outside of a scope, where every trigger is watched.
            attached: True to let the arriving gradient flow on into the graph of `trigger`, as dni-pytorch does. Use it for
                a trigger that another network computed in the same step, such as an encoder's state.

        Raises:
            ValueError: the trigger holds no floating-point tensor, or it holds a complex tensor.
        """
        if not self.training or not torch.is_grad_enabled():
            return trigger
        if not _real_leaves(trigger, "make_trigger"):
            raise ValueError("make_trigger: the trigger holds no floating-point tensor, so no gradient can arrive at it")
        scope = current_scope()
        watched = watched or scope is None
        state = states.map_floating(lambda leaf: leaf.detach().requires_grad_(watched), trigger)
        if scope is not None:
            self.exchange(scope).add_trigger(state, current_context())
        elif self.learns:
            self._intercept(state, current_context())
        if attached:
            pairs = zip(states.floating(state), states.floating(trigger), strict=True)
            return states.with_floating(state, [Attached.apply(leaf, source) for leaf, source in pairs])
        return state

    @uncompiled
    def backward(
        self,
        trigger: State,
        factor: float = 1,
        *,
        ends: Tensor | None = None,
        batch_dim: Any = 1,
        rule: TargetRule | None = None,
        bootstrap: nn.Module | None = None,
    ) -> None:
        """Predicts the gradient with respect to `trigger` and backpropagates this prediction through the graph of `trigger`.

        The backward pass runs at the end of the `defer_backward` block around the call, or at once if there is no such
        block. In `eval()` and under `torch.no_grad()` nothing happens.

        Args:
            trigger: a tensor or nest that was computed with a graph.
            factor: the factor of the message, both in the gradient that is injected into `trigger` and in the targets at the
                states given to `make_trigger` in the same scope.
            ends: [B] bool, True for lanes whose sequence ends here: their message is zero.
            batch_dim: the dimension of the lanes in the trigger's leaves, an int or a nest; used with `ends`.
            rule: a `TargetRule` with separate coefficients of injection and targets; with a rule, `factor` is ignored. None
                for the synthesizer's rule with `factor` as both c and γ.
            bootstrap: a synthesizer whose messages go into the targets. None for the interface's own synthesizer.

        Raises:
            ValueError: the trigger does not require a gradient, holds a complex tensor, or was given to this method before
                in the same scope; or the synthesizer's message has other keys, another shape or another dtype than the
                trigger.
        """
        if not self.training or not torch.is_grad_enabled():
            return
        leaves = _real_leaves(trigger, "backward")
        if not any(leaf.requires_grad for leaf in leaves):
            raise ValueError(
                "backward: the trigger does not require a gradient, so nothing can be injected; pass the tensor that part A "
                "computed, before any detach() (make_trigger is for the state that a window starts from)"
            )
        if rule is None:
            rule = rule_of(self.synthesizer, float(factor), float(factor))
        scope, context = current_scope(), current_context()
        messages = self._predicted(trigger, context, rule, scope)
        self.inject(trigger, messages, rule, ends=ends, batch_dim=batch_dim, bootstrap=bootstrap)

    def inject(
        self,
        trigger: State,
        messages: list[State],
        rule: TargetRule,
        *,
        ends: Tensor | None,
        batch_dim: Any,
        bootstrap: nn.Module | None,
    ) -> None:
        """Injects given messages, one for each horizon, at `trigger`; `backward` predicts messages and calls this method.

        The other arguments are those of `backward`.
        """
        leaves, scope = states.floating(trigger), current_scope()
        messages = self._checked(messages, trigger, ends, batch_dim)
        injected = self._injection(messages, rule)
        if rule.skip_injection:
            injected = [torch.zeros_like(leaf) for leaf in injected]
            rule = rule._replace(injection=[0.0] * len(rule.injection))
        if scope is None:
            deliver(leaves, injected)
            return
        others = None
        if bootstrap is not None:
            others = self._checked(self.messages(trigger, current_context(), bootstrap), trigger, ends, batch_dim)
        self.exchange(scope).add_end(InjectionPoint(leaves, injected, others or messages, rule, others is None))

    def _adapted(self, message: State, trigger: State) -> State:
        """Returns `message` with its keys in the order of its trigger, converted to the trigger's half precision."""
        return super()._adapted(match_message(message, trigger), trigger)

    def _predicted(self, trigger: State, context: Any, rule: TargetRule, scope: GradientAccumulator | None) -> list[State]:
        """Returns the messages at `trigger`; in a scope, a self-supervised synthesizer is also trained on its context."""
        if not rule.self_supervised or scope is None or not self.learns:
            return self.messages(trigger, context)
        messages, loss = self._predict_and_train(trigger, context)
        self.exchange(scope).learned.append(loss)
        return messages

    def _injection(self, messages: list[State], rule: TargetRule) -> list[Tensor]:
        """Returns the gradient to inject, leaf by leaf: the weighted sum of the messages of all horizons."""
        return combine(messages, rule.injection)

    @uncompiled
    def send(self, message: State, trigger: State) -> Regression | None:
        """Trains the synthesizer to predict `message`, a true gradient, at `trigger`.

        Gradients are added to the synthesizer's parameters only; the caller steps the synthesizer's optimizer.

        Returns:
            The regression's loss, errors and cosines. None if nothing is trained: in `eval()`, under `torch.no_grad()`, or
            if the synthesizer has no trainable parameter.

        Raises:
            ValueError: `message` does not have the trigger's keys, shape and dtype.
        """
        message = match_message(message, trigger)
        check_like(states.floating(message), states.floating(trigger), "message")
        if not self.training or not torch.is_grad_enabled() or not self.learns:
            return None
        return self.regress(trigger, current_context(), [states.detach(message)])

    @uncompiled
    def receive(self, trigger: State) -> State:
        """Returns the synthetic gradient at `trigger`, detached; nothing is backpropagated or trained.

        The messages of several horizons are added as for an injection with c = γ = 1. The context is that of the innermost
        `synthesizer_context` block around the call.

        Raises:
            ValueError: the synthesizer's message does not have the trigger's keys, shape and dtype.
        """
        messages = self._checked(self.messages(trigger, current_context()), trigger, None, None)
        return states.with_floating(trigger, combine(messages, rule_of(self.synthesizer, 1.0, 1.0).injection))

    def _checked(self, messages: list[State], trigger: State, ends: Tensor | None, batch_dim: Any) -> list[State]:
        """Returns the messages, with zeros in lanes that end.

        Raises:
            ValueError: a message does not have the trigger's shape and dtype.
        """
        for message in messages:
            check_like(states.floating(message), states.floating(trigger), "message")
        return messages if ends is None else [zero_ended_lanes(message, ends, batch_dim) for message in messages]

    def exchange(self, scope: GradientAccumulator) -> ScopeExchange:
        """Returns the record that this interface keeps in `scope`: its triggers, and the states given to `backward`.

        `SequenceTrainer` calls this method. The record is created at the first call in a scope.

        Args:
            scope: what `with defer_backward() as scope:` yields.
        """
        return scope.participant(id(self), lambda: ScopeExchange(self, scope))

    def _intercept(self, state: State, context: Any) -> None:
        """Outside of scopes, trains the synthesizer once a backward pass has computed gradients of all leaves of `state`."""
        leaves = states.floating(state)
        trigger = states.detach(state)
        # A leaf refers to its hook. A strong reference from the hook to the leaf would keep both until garbage collection.
        references = [weakref.ref(leaf) for leaf in leaves]

        def arrived(_: Tensor) -> None:
            alive = [leaf for leaf in (reference() for reference in references) if leaf is not None]
            if len(alive) == len(references) and all(leaf.grad is not None for leaf in alive):
                self.regress(trigger, context, [states.with_floating(trigger, [pop_grad(leaf) for leaf in alive])])

        for leaf in leaves:
            leaf.register_post_accumulate_grad_hook(arrived)


def _real_leaves(trigger: State, method: str) -> list[Tensor]:
    """Returns the floating-point leaves of `trigger`; raises a ValueError if another leaf is complex."""
    states.check_real(trigger, f"{method}: the trigger")
    return states.floating(trigger)


def deliver(leaves: list[Tensor], gradients: list[Tensor]) -> None:
    """Backpropagates all gradients in one pass: the leaves share a graph, which the first backward pass frees."""
    accumulator = GradientAccumulator()
    for leaf, gradient in with_gradients_wanted(leaves, gradients):
        accumulator.add(leaf, gradient)
    accumulator.deliver()
