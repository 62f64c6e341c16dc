"""Interfaces: where a network is cut, and synthetic messages stand in for real ones.

Source: Jaderberg et al. 2017, "Decoupled Neural Interfaces using Synthetic Gradients", arXiv 1608.05343, section 2. Names,
arguments and meaning are those of dni-pytorch. Beyond it, triggers may be nested states, contexts are captured where a
trigger is made, and scopes nest and survive exceptions.

docs/interfaces.md teaches them by example.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dni_seq.core import states
from dni_seq.core.deferred_backward import GradientAccumulator, current_scope, uncompiled
from dni_seq.core.states import State
from dni_seq.synthesizers.base import Regression, check_like, learn_ahead, predict, regress
from dni_seq.synthesizers.target_rule import TargetRule, combine, rule_of

_contexts: ContextVar[tuple[Any, ...]] = ContextVar("dni_seq_contexts", default=())


@contextmanager
def synthesizer_context(context: Any) -> Iterator[None]:
    """Give `context` to the synthesizers of all interfaces that are called in the block; blocks nest, the innermost counts.

    Args:
        context: what the synthesizers expect: for `BasicSynthesizer`, a tensor [..., context_dim], such as one-hot labels.
    """
    token = _contexts.set((*_contexts.get(), context))
    try:
        yield
    finally:
        _contexts.reset(token)


def current_context() -> Any:
    """The context of the innermost `synthesizer_context` block of this thread, None outside of any."""
    contexts = _contexts.get()
    return contexts[-1] if contexts else None


class _Interface(nn.Module):
    """What both directions share: a synthesizer, predicted with and regressed towards messages."""

    def __init__(self, synthesizer: nn.Module) -> None:
        super().__init__()
        self.synthesizer = synthesizer

    @property
    def learns(self) -> bool:
        """Whether the synthesizer has anything to train."""
        return any(parameter.requires_grad for parameter in self.synthesizer.parameters())

    @torch.no_grad()
    def messages(self, trigger: State, context: Any, synthesizer: nn.Module | None = None) -> list[State]:
        """The messages by horizon at `trigger`, of the interface's synthesizer or another, without a graph."""
        with _full_precision(trigger) as cast:
            messages = predict(synthesizer or self.synthesizer, cast(states.detach(trigger)), cast(context))
        return [_like(message, trigger) for message in messages]

    def _learn_ahead(self, trigger: State, context: Any) -> tuple[list[State], Tensor]:
        """The messages of a synthesizer that learns ahead, without a graph, and its loss, which it has learned from."""
        with _full_precision(trigger) as cast:
            messages, loss = learn_ahead(self.synthesizer, cast(states.detach(trigger)), cast(context))
        return [_like(message, trigger) for message in messages], loss

    def measure(self, trigger: State, context: Any, targets: list[State | None]) -> Regression:
        """What a regression would say of the synthesizer's messages; its statistics take the targets in, nothing learns.

        With a graph where one is recorded.
        """
        with _full_precision(trigger) as cast:
            numeric = [None if target is None else cast(target) for target in targets]
            trigger, context = cast(states.detach(trigger)), cast(states.detach(context))
            return regress(self.synthesizer, trigger, context, numeric)

    def regress(self, trigger: State, context: Any, targets: list[State | None]) -> Regression:
        """One regression step: the gradients of its loss are added to the synthesizer's parameters, to no others."""
        with torch.enable_grad():
            regression = self.measure(trigger, context, targets)
        if not regression.loss.requires_grad:
            raise RuntimeError(
                "the synthesizer has trainable parameters, but its message does not depend on them: its forward must not "
                "detach, or run under torch.no_grad()"
            )
        regression.loss.backward()
        return regression._replace(loss=regression.loss.detach())


@contextmanager
def _full_precision(trigger: State) -> Iterator[Any]:
    """Synthesizers work outside of autocast; half-precision triggers and contexts are handed to them in float32."""
    leaves = states.floating(trigger)
    device = leaves[0].device.type if leaves else "cpu"

    def cast(state: State) -> State:
        return states.map_floating(states.in_full, state)

    with torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext():
        yield cast


def _like(message: State, trigger: State) -> State:
    """`message` in the half precision of its trigger, leaf by leaf where they correspond, else by the first leaf.

    A trigger without numbers, such as tokens, asks for none.
    """
    leaves, dtypes = states.floating(message), [leaf.dtype for leaf in states.floating(trigger)]
    if not any(dtype in states.HALF for dtype in dtypes):
        return message
    if len(dtypes) != len(leaves):
        dtypes = dtypes[:1] * len(leaves)
    pairs = zip(leaves, dtypes, strict=True)
    return states.with_floating(message, [leaf.to(dtype) if dtype in states.HALF else leaf for leaf, dtype in pairs])


class BackwardInterface(_Interface):
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
        if rule.ahead and scope is not None and self.learns:
            messages, loss = self._learn_ahead(trigger, context)
            self.exchange(scope).learned.append(loss)
        else:
            messages = self.messages(trigger, context)
        messages = self._checked(messages, trigger, ends, batch_dim)
        injected = self.injection(messages, rule)
        if rule.quiet:
            injected = [torch.zeros_like(leaf) for leaf in injected]
            rule = rule._replace(weights=[0.0] * len(rule.weights))
        if scope is not None:
            others = None
            if bootstrap is not None:
                others = self._checked(self.messages(trigger, context, bootstrap), trigger, ends, batch_dim)
            self.exchange(scope).add_end(End(leaves, injected, others or messages, rule, others is None))
        else:
            alone = GradientAccumulator()  # the leaves of a nest share a graph, which one pass frees
            for leaf, gradient in _receptive(leaves, injected):
                alone.add(leaf, gradient)
            alone.deliver()

    def injection(self, messages: list[State], rule: TargetRule) -> list[Tensor]:
        """What is sent for the messages of the horizons, leaf by leaf: their weighted sum."""
        return combine(messages, rule.weights)

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
        return states.with_floating(trigger, combine(messages, rule_of(self.synthesizer, 1.0, 1.0).weights))

    def _checked(self, messages: list[State], trigger: State, ends: Tensor | None, batch_dim: Any) -> list[State]:
        """The messages, zero in lanes that end.

        Raises:
            ValueError: one has not the trigger's shape and dtype.
        """
        for message in messages:
            check_like(states.floating(message), states.floating(trigger), "message")
        return messages if ends is None else [silence(message, ends, batch_dim) for message in messages]

    def exchange(self, scope: GradientAccumulator) -> Exchange:
        """What this interface has going in `scope`."""
        return scope.participant(id(self), lambda: Exchange(self, scope))

    def _intercept(self, state: State, context: Any) -> None:
        """Regress when a backward pass outside of any scope has brought the gradient of every leaf of `state`."""
        leaves = states.floating(state)
        trigger = states.detach(state)
        # The hook lives on the leaf: a strong reference back to it would keep both until the next garbage collection.
        references = [weakref.ref(leaf) for leaf in leaves]

        def arrived(_: Tensor) -> None:
            alive = [leaf for leaf in (reference() for reference in references) if leaf is not None]
            if len(alive) == len(references) and all(leaf.grad is not None for leaf in alive):
                self.regress(trigger, context, [states.with_floating(trigger, [taken(leaf) for leaf in alive])])

        for leaf in leaves:
            leaf.register_post_accumulate_grad_hook(arrived)


class ForwardInterface(_Interface):
    """Synthetic inputs: part B computes with a prediction of the activation that part A would hand on.

    In `eval()` it passes its input through.

    Args:
        synthesizer: any module with `forward(trigger, context)` that returns a message of the activation's shape.
    """

    @uncompiled
    def forward(self, message: State, trigger: State) -> State:
        """Train on the real activation `message`, hand on the synthetic one made from `trigger`."""
        if not self.training:
            return message
        self.send(message, trigger)
        return self.receive(trigger)

    @uncompiled
    def send(self, message: State, trigger: State) -> Regression | None:
        """Train the synthesizer to give `message`, a real activation, for `trigger`; its optimizer's step is the caller's.

        Returns the regression's loss and fidelity, None in `eval()` or under `torch.no_grad()`, where nothing is trained.
        Gradients go to the synthesizer alone.
        """
        if not self.training or not torch.is_grad_enabled() or not self.learns:
            return None
        return self.regress(trigger, current_context(), [states.detach(message)])

    @uncompiled
    def receive(self, trigger: State) -> State:
        """The synthetic activation for `trigger`, without a graph."""
        (message,) = self.messages(trigger, current_context())
        return message


class BidirectionalInterface(nn.Module):
    """Synthetic inputs one way, synthetic gradients the other: neither part waits for the other.

    In `eval()` a call passes its input through, and `receive` gives the synthetic input.

    Args:
        forward_synthesizer: predicts part A's activation from a trigger that both parts know, such as the network's input.
        backward_synthesizer: predicts the gradient with respect to that activation.
    """

    def __init__(self, forward_synthesizer: nn.Module, backward_synthesizer: nn.Module) -> None:
        super().__init__()
        self.forward_interface = ForwardInterface(forward_synthesizer)
        self.backward_interface = BackwardInterface(backward_synthesizer)

    @uncompiled
    def forward(self, message: State, trigger: State) -> State:
        """Both ends in one process: `send`, then `receive`."""
        if not self.training:
            return message
        self.send(message, trigger)
        return self.receive(trigger)

    @uncompiled
    def send(self, message: State, trigger: State) -> Regression | None:
        """Part A's end: learn from the synthetic gradient at `message`, train the synthetic input towards it.

        Returns the synthetic input's regression, as `ForwardInterface.send` does.
        """
        regression = self.forward_interface.send(message, trigger)
        self.backward_interface.backward(message)
        return regression

    @uncompiled
    def receive(self, trigger: State) -> State:
        """Part B's end: the synthetic input for `trigger`, which trains the synthetic gradient when the real one arrives."""
        return self.backward_interface.make_trigger(self.forward_interface.receive(trigger))


def silence(message: State, ends: Tensor, batch_dim: Any) -> State:
    """`message` with exact zeros in the lanes that `ends` [B] marks: a state that nothing follows has no gradient."""
    return states.reset_lanes(message, ends, None, batch_dim)


def taken(leaf: Tensor) -> Tensor:
    """The gradient that has arrived at a trigger's leaf, zeros where none has; the leaf's `.grad` is cleared."""
    gradient, leaf.grad = leaf.grad, None
    return torch.zeros_like(leaf) if gradient is None else gradient


def _receptive(leaves: list[Tensor], gradients: list[Tensor]) -> list[tuple[Tensor, Tensor]]:
    return [(leaf, gradient) for leaf, gradient in zip(leaves, gradients, strict=True) if leaf.requires_grad]


class End(NamedTuple):
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


class Exchange:
    """The triggers and last states of one interface in one scope, until the scope's one backward pass has joined them.

    Attributes:
        regressions: one for every trigger, in the order they were made, once the scope is delivered; of a synthesizer that
            has learned ahead one at least, with the mean loss at the last states.
        learned: the losses, 0-d, of a synthesizer that learns ahead, one for every last state.
        own_gradients: the target of the first horizon of every trigger, raw: its floating-point leaves; None where that
            horizon was not trained.
        injected: the injected messages, raw, floating-point leaves of every last state.
    """

    def __init__(self, interface: BackwardInterface, scope: GradientAccumulator) -> None:
        self._interface = interface
        self._scope = scope
        self._triggers: list[tuple[State, Any]] = []
        self._ends: list[End] = []
        self._rule: TargetRule | None = None
        self._products: dict[int, list[Tensor | None]] = {}
        self.regressions: list[Regression] = []
        self.learned: list[Tensor] = []
        self.own_gradients: list[list[Tensor] | None] = []
        self.injected: list[list[Tensor]] = []

    def add_trigger(self, state: State, context: Any) -> None:
        """Take the gradient of `state` as a target at the scope's end."""
        self._triggers.append((state, context))

    def add_end(self, end: End) -> None:
        """Inject into a last state.

        Raises:
            ValueError: the same state was given before in this scope.
        """
        if any(leaf is other for leaf in end.leaves for before in self._ends for other in before.leaves):
            raise ValueError("backward: this trigger was already given a synthetic gradient in this defer_backward scope")
        for leaf, gradient in _receptive(end.leaves, end.injected):
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
        if not any(rule.trained) or not self._interface.learns:
            return
        self._rule = rule
        inputs = self.inputs()
        for i, trained in enumerate(rule.trained):
            roots = [root for end in self._ends for root in _difference(end, i)] if trained else []
            if roots:
                tensors, gradients = zip(*roots, strict=True)
                found = torch.autograd.grad(tensors, inputs, gradients, retain_graph=True, allow_unused=True)
                self._products[i] = list(found)

    def after_backward(self) -> None:
        """Regress at every trigger towards its targets, or measure there what has learned already."""
        if self._rule is not None:
            self._regress(self._rule, [taken(leaf) for leaf in self.inputs()])
        for leaf in self.inputs():
            leaf.grad = None
        if self.learned:
            loss = self.learned[0] if len(self.learned) == 1 else torch.stack(self.learned).mean()
            nothing = loss.new_full((len(self._ends[0].messages),), float("nan"))
            found = self.regressions or [Regression(loss, nothing, nothing, nothing)]
            self.regressions = [regression._replace(loss=loss) for regression in found]

    def _regress(self, rule: TargetRule, arrived: list[Tensor]) -> None:
        rows = [self._row(i, arrived) if trained else None for i, trained in enumerate(rule.trained)]
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
        own = self._rule.own[i] if self._rule is not None else 0.0
        shares = arrived if own == 1 else [own * leaf for leaf in arrived]
        products = self._products.get(i, [None] * len(shares))
        return [leaf if product is None else leaf + product for leaf, product in zip(shares, products, strict=True)]

    def inputs(self) -> list[Tensor]:
        """The floating-point leaves of all triggers."""
        return [leaf for state, _ in self._triggers for leaf in states.floating(state)]


def _difference(end: End, i: int) -> list[tuple[Tensor, Tensor]]:
    """Where target i has other messages behind a last state than were injected: its leaves with that difference."""
    own, following, weights = end.rule.own[i], end.rule.following[i], end.rule.weights
    if end.same:
        coefficients = [f - own * w for f, w in zip(following, weights, strict=True)]
        return _receptive(end.leaves, combine(end.messages, coefficients)) if any(coefficients) else []
    wanted = combine(end.messages, following)
    return _receptive(end.leaves, [w - own * injected for w, injected in zip(wanted, end.injected, strict=True)])
