"""Interfaces: where a network is cut, and synthetic messages stand in for real ones.

Source: Jaderberg et al. 2017, "Decoupled Neural Interfaces using Synthetic Gradients", arXiv 1608.05343, section 2. Names,
arguments and meaning are those of dni-pytorch. Beyond it, triggers may be nested states, contexts are captured where a
trigger is made, and scopes nest and survive exceptions.

docs/interfaces.md teaches them by example.
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
from dni_seq.interfaces.exchange import InjectionPoint, ScopeExchange, pop_grad, with_gradients_wanted, zero_ended_lanes
from dni_seq.synthesizers.base import Regression, check_like
from dni_seq.synthesizers.target_rule import TargetRule, combine, rule_of


class BackwardInterface(Interface):
    """Synthetic gradients: part A learns from a prediction of the gradient that part B would send back.

    Called as a module between two parts of a network, it backpropagates the synthetic gradient into the part before it at
    once, hands the activation on, and trains the synthesizer on the real gradient when that arrives. In an unrolled RNN
    `make_trigger` takes the first state of a window and `backward` the last one, inside of `defer_backward`.

    In `eval()` it passes its input through.

    Args:
        synthesizer: any module with `forward(trigger, context)` that returns a message of the trigger's shape: the gradient,
            with respect to the trigger, of the scalar that the user backpropagates.
    """

    @uncompiled
    def forward(self, trigger: State) -> State:
        """Decouple: learn from a synthetic gradient on this side, hand on a trigger that collects the real one."""
        if not self.training or not torch.is_grad_enabled():
            return trigger
        if any(leaf.requires_grad for leaf in states.floating(trigger)):
            self.backward(trigger)
        return self.make_trigger(trigger)

    @uncompiled
    def make_trigger(self, trigger: State, *, watched: bool = True) -> State:
        """Cut `trigger` from what came before; the gradient that arrives at the returned copy trains the synthesizer.

        In a scope whose window has no target for it, `watched=False` spares the backward pass that gradient.

        The context of the moment is the one that the synthesizer is trained with. In a `defer_backward` scope the gradient
        is taken at the scope's end; elsewhere when a backward pass brings it, for a nest when it has come for every leaf.

        Raises:
            ValueError: the trigger holds no floating-point tensor.
        """
        if not self.training or not torch.is_grad_enabled():
            return trigger
        if not states.floating(trigger):
            raise ValueError("make_trigger: the trigger holds no floating-point tensor, so no gradient can arrive at it")
        scope = current_scope()
        watched = watched or scope is None
        state = states.map_floating(lambda leaf: leaf.detach().requires_grad_(watched), trigger)
        if scope is not None:
            self.exchange(scope).add_trigger(state, current_context())
        elif self.learns:
            self._intercept(state, current_context())
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
        """Predict the gradient with respect to `trigger` and backpropagate it, at the scope's end where there is one.

        Args:
            trigger: a tensor or nest that was computed with a graph.
            factor: the share of the message that is injected, and its share in the targets of the scope's triggers.
            ends: [B] bool, lanes whose sequence ends here: their message is zero.
            batch_dim: where the lanes lie in the trigger's leaves, used with `ends`.
            rule: the coefficients of injection and targets, apart; it takes the place of `factor`.
            bootstrap: a synthesizer whose messages, instead of this interface's own, go into the targets.

        Raises:
            ValueError: the trigger needs no gradient, or was given before in this scope, or the synthesizer's message does
                not have its shape and dtype.
        """
        if not self.training or not torch.is_grad_enabled():
            return
        leaves = states.floating(trigger)
        if not any(leaf.requires_grad for leaf in leaves):
            raise ValueError(
                "backward: the trigger needs no gradient, so a synthetic one has nowhere to go; pass the tensor that part A "
                "computed, before any detach() (make_trigger is for the state that a window starts from)"
            )
        if rule is None:
            rule = rule_of(self.synthesizer, float(factor), float(factor))
        scope, context = current_scope(), current_context()
        if rule.self_supervised and scope is not None and self.learns:
            messages, loss = self._predict_and_train(trigger, context)
            self.exchange(scope).learned.append(loss)
        else:
            messages = self.messages(trigger, context)
        messages = self._checked(messages, trigger, ends, batch_dim)
        injected = self.injection(messages, rule)
        if rule.skip_injection:
            injected = [torch.zeros_like(leaf) for leaf in injected]
            rule = rule._replace(injection=[0.0] * len(rule.injection))
        if scope is not None:
            others = None
            if bootstrap is not None:
                others = self._checked(self.messages(trigger, context, bootstrap), trigger, ends, batch_dim)
            self.exchange(scope).add_end(InjectionPoint(leaves, injected, others or messages, rule, others is None))
        else:
            alone = GradientAccumulator()  # the leaves of a nest share a graph, which one pass frees
            for leaf, gradient in with_gradients_wanted(leaves, injected):
                alone.add(leaf, gradient)
            alone.deliver()

    def injection(self, messages: list[State], rule: TargetRule) -> list[Tensor]:
        """What is sent for the messages of the horizons, leaf by leaf: their weighted sum."""
        return combine(messages, rule.injection)

    @uncompiled
    def send(self, message: State, trigger: State) -> Regression | None:
        """Train the synthesizer to give `message`, a real gradient, for `trigger`; its optimizer's step is the caller's.

        Returns the regression's loss and fidelity, None in `eval()` or under `torch.no_grad()`, where nothing is trained.
        Gradients go to the synthesizer alone.

        Raises:
            ValueError: the message has not the trigger's shape and dtype.
        """
        check_like(states.floating(message), states.floating(trigger), "message")
        if not self.training or not torch.is_grad_enabled() or not self.learns:
            return None
        return self.regress(trigger, current_context(), [states.detach(message)])

    @uncompiled
    def receive(self, trigger: State) -> State:
        """The synthetic gradient for `trigger`, without a graph: the weighted sum of all horizons."""
        messages = self._checked(self.messages(trigger, current_context()), trigger, None, None)
        return states.with_floating(trigger, combine(messages, rule_of(self.synthesizer, 1.0, 1.0).injection))

    def _checked(self, messages: list[State], trigger: State, ends: Tensor | None, batch_dim: Any) -> list[State]:
        """The messages, zero in lanes that end.

        Raises:
            ValueError: one has not the trigger's shape and dtype.
        """
        for message in messages:
            check_like(states.floating(message), states.floating(trigger), "message")
        return messages if ends is None else [zero_ended_lanes(message, ends, batch_dim) for message in messages]

    def exchange(self, scope: GradientAccumulator) -> ScopeExchange:
        """What this interface has going in `scope`."""
        return scope.participant(id(self), lambda: ScopeExchange(self, scope))

    def _intercept(self, state: State, context: Any) -> None:
        """Regress when a backward pass outside of any scope has brought the gradient of every leaf of `state`."""
        leaves = states.floating(state)
        trigger = states.detach(state)
        # The hook lives on the leaf: a strong reference back to it would keep both until the next garbage collection.
        references = [weakref.ref(leaf) for leaf in leaves]

        def arrived(_: Tensor) -> None:
            alive = [leaf for leaf in (reference() for reference in references) if leaf is not None]
            if len(alive) == len(references) and all(leaf.grad is not None for leaf in alive):
                self.regress(trigger, context, [states.with_floating(trigger, [pop_grad(leaf) for leaf in alive])])

        for leaf in leaves:
            leaf.register_post_accumulate_grad_hook(arrived)
