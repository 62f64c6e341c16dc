"""Deferred backpropagation: collect tensors and their gradients, then run ONE backward pass.

The loss of a window and the synthetic gradient of its last state flow through the same graph. PyTorch frees a graph when
it is backpropagated, so both have to enter it together. A scope collects them and delivers them at its end.

Scopes nest, each delivering what was collected in it at its own end, and belong to the thread (or asyncio task) that opened
them. A scope that an exception leaves delivers nothing and forgets what it had.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor

_scopes: ContextVar[tuple[GradientAccumulator, ...]] = ContextVar("dni_seq_scopes", default=())


class Participant(Protocol):
    """What takes part in the delivery of a scope, as an interface does that wants gradients intercepted."""

    def before_backward(self) -> None:
        """Called while the graph is whole: the place for vector-Jacobian products."""

    def after_backward(self) -> None:
        """Called when the one backward pass is through."""


ParticipantT = TypeVar("ParticipantT", bound=Participant)


class Deferred(NamedTuple):
    """A tensor to backpropagate and the gradient with respect to it; None stands for that of a scalar, 1."""

    tensor: Tensor
    gradient: Tensor | None


class GradientAccumulator:
    """Tensors with the gradients to backpropagate from them, delivered in one backward pass."""

    def __init__(self) -> None:
        self._entries: list[Deferred] = []
        self._participants: dict[Hashable, Participant] = {}

    def add(self, tensor: Tensor, gradient: Tensor | None = None) -> None:
        """Collect `tensor` with the gradient of the objective with respect to it (same shape; None: a scalar's 1).

        Raises:
            RuntimeError: the tensor needs no gradient.
            ValueError: no gradient is given for a tensor of more than one element, or one of another shape.
        """
        _check(tensor, gradient)
        self._entries.append(Deferred(tensor, gradient))

    def participant(self, key: Hashable, make: Callable[[], ParticipantT]) -> ParticipantT:
        """The participant known by `key`, made by `make` at its first mention."""
        if key not in self._participants:
            self._participants[key] = make()
        return self._participants[key]  # type: ignore[return-value]

    def deliver(self) -> None:
        """Run the one backward pass, with the participants' parts before and after it, and forget them all."""
        participants, self._participants = list(self._participants.values()), {}
        for participant in participants:
            participant.before_backward()
        entries, self._entries = self._entries, []
        if entries:
            with _explained():
                torch.autograd.backward([e.tensor for e in entries], [e.gradient for e in entries])
        for participant in participants:
            participant.after_backward()

    def clear(self) -> None:
        """Drop what has been collected, and with it the graphs, without delivering it."""
        self._entries, self._participants = [], {}


FunctionT = TypeVar("FunctionT", bound=Callable[..., Any])


def uncompiled(function: FunctionT) -> FunctionT:
    """Keep `torch.compile` out of `function`, which leaves a graph break there: its work on the graph cannot be traced."""
    # The private name does what the public one does, but imports the compiler at the first call instead of here.
    disable: Callable[[FunctionT], FunctionT] = getattr(torch, "_disable_dynamo", torch.compiler.disable)
    return disable(function)


def current_scope() -> GradientAccumulator | None:
    """The innermost open scope of this thread, None outside of any."""
    scopes = _scopes.get()
    return scopes[-1] if scopes else None


@contextmanager
def defer_backward() -> Iterator[GradientAccumulator]:
    """Collect everything passed to `backward` in the block and backpropagate it in one pass at the block's end.

    An exception in the block delivers nothing.
    """
    scope = GradientAccumulator()
    token = _scopes.set((*_scopes.get(), scope))
    try:
        try:
            yield scope
        finally:
            _scopes.reset(token)
        scope.deliver()
    finally:
        scope.clear()


@uncompiled
def backward(tensor: Tensor, gradient: Tensor | None = None) -> None:
    """Backpropagate from `tensor`: at the end of the innermost `defer_backward` scope, or at once where there is none.

    Args:
        tensor: a scalar such as a loss, or any tensor with its `gradient`.
        gradient: the gradient of the objective with respect to `tensor`, of the same shape.

    Raises:
        RuntimeError: the tensor needs no gradient, or its graph has been freed by an earlier backward pass.
        ValueError: no gradient for a tensor of more than one element, or one of another shape.
    """
    scope = current_scope()
    if scope is not None:
        scope.add(tensor, gradient)
        return
    _check(tensor, gradient)
    with _explained():
        torch.autograd.backward(tensor, gradient)


def _check(tensor: Tensor, gradient: Tensor | None) -> None:
    if not tensor.requires_grad:
        raise RuntimeError("backward: the tensor needs no gradient; nothing it was computed from has requires_grad=True")
    if gradient is None and tensor.numel() != 1:
        raise ValueError(f"backward: a tensor of shape {tuple(tensor.shape)} is no scalar; pass its gradient too")
    if gradient is not None and gradient.shape != tensor.shape:
        raise ValueError(
            f"backward: the gradient has shape {tuple(gradient.shape)}, the tensor {tuple(tensor.shape)}; they must agree"
        )


@contextmanager
def _explained() -> Iterator[None]:
    """Say what to do where PyTorch reports a graph that is already freed."""
    try:
        yield
    except RuntimeError as error:
        if "backward through the graph a second time" not in str(error):
            raise
        raise RuntimeError(
            "backward: this graph was already backpropagated and freed. Losses and synthetic gradients that share a graph "
            "must be collected in one `with dni_seq.defer_backward():` block and passed to `dni_seq.backward`"
        ) from error
