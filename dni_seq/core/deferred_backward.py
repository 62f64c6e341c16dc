"""Deferred backpropagation: collects tensors and their gradients, then runs one backward pass.

The loss of a window and the synthetic gradient of its last state flow through the same graph. PyTorch frees a graph after
its backward pass, so both must be backpropagated together. A scope is a block of `with defer_backward():`. It collects
both and backpropagates them at the end of the block.

Scopes may be nested. A tensor belongs to the innermost scope of its thread (or asyncio task). If an exception leaves a
scope, nothing is backpropagated and the collected tensors are dropped.
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
    """An object with hooks around the backward pass of a scope, such as an interface's `ScopeExchange`."""

    def before_backward(self) -> None:
        """Runs before the backward pass, while the graph still exists. Vector-Jacobian products are computed here."""

    def after_backward(self) -> None:
        """Runs after the backward pass."""


ParticipantT = TypeVar("ParticipantT", bound=Participant)


class Deferred(NamedTuple):
    """A tensor to backpropagate, and the gradient with respect to it; None means 1, for a scalar."""

    tensor: Tensor
    gradient: Tensor | None


class GradientAccumulator:
    """Collects tensors with their gradients, and backpropagates all of them in one backward pass.

    `defer_backward` makes an accumulator for its block. Gradients have the shape and dtype of their tensors.

    Source: the deferred backward pass of dni-pytorch, as an object instead of the state of a class.
    """

    def __init__(self) -> None:
        self._entries: list[Deferred] = []
        self._participants: dict[Hashable, Participant] = {}

    def add(self, tensor: Tensor, gradient: Tensor | None = None) -> None:
        """Adds `tensor` and its upstream gradient, as for `tensor.backward(gradient)`, for the one backward pass.

        Args:
            tensor: a tensor that requires a gradient.
            gradient: of the tensor's shape; None means 1, for a tensor of one element.

        Raises:
            RuntimeError: the tensor does not require a gradient.
            ValueError: the gradient has another shape, or is None for a tensor of more than one element.
        """
        _check(tensor, gradient)
        self._entries.append(Deferred(tensor, gradient))

    def participant(self, key: Hashable, make: Callable[[], ParticipantT]) -> ParticipantT:
        """Returns the participant registered under `key`, created with `make()` if there is none.

        A participant has the hooks `before_backward()` and `after_backward()`, which `deliver` calls.
        """
        if key not in self._participants:
            self._participants[key] = make()
        return self._participants[key]  # type: ignore[return-value]

    def deliver(self) -> None:
        """Backpropagates all added tensors in one pass, and clears the accumulator.

        `defer_backward` calls this method at the block's end. The hooks of the participants run before and after the pass.
        """
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
        """Drops the collected tensors, and with them their graphs, without a backward pass."""
        self._entries, self._participants = [], {}


FunctionT = TypeVar("FunctionT", bound=Callable[..., Any])


def uncompiled(function: FunctionT) -> FunctionT:
    """Excludes `function` from `torch.compile`, because its autograd calls cannot be traced.

    The compiled graph breaks at a call of `function`.
    """
    # The private function does the same as the public one, but imports the compiler at the first call instead of here.
    disable: Callable[[FunctionT], FunctionT] = getattr(torch, "_disable_dynamo", torch.compiler.disable)
    return disable(function)


def current_scope() -> GradientAccumulator | None:
    """Returns the innermost open scope of this thread, or None outside of scopes."""
    scopes = _scopes.get()
    return scopes[-1] if scopes else None


@contextmanager
def defer_backward() -> Iterator[GradientAccumulator]:
    """Context manager: defers every `dni_seq.backward(...)` and injection in the block to one pass at the block's end.

    `tensor.backward()` of PyTorch is not deferred. `with defer_backward() as scope:` gives the block the
    `GradientAccumulator` that collects the tensors.

    If the block raises an exception, nothing is backpropagated. Blocks may be nested: a call is deferred to the end of the
    innermost block around the call. Each thread has its own blocks.

    Source: `defer_backward` of dni-pytorch.
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
    """Backpropagates from `tensor` at the end of the innermost `defer_backward` block, or at once outside of such a block.

    Source: `backward` of dni-pytorch.

    Args:
        tensor: a scalar such as a loss, or any tensor with its `gradient`.
        gradient: the gradient of the objective with respect to `tensor`, of the same shape; None means 1, for a scalar.

    Raises:
        RuntimeError: the tensor does not require a gradient, or an earlier backward pass has freed its graph.
        ValueError: the gradient has another shape, or is None for a tensor of more than one element.
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
        raise RuntimeError("backward: the tensor does not require a gradient; its inputs need requires_grad=True")
    if gradient is None and tensor.numel() != 1:
        raise ValueError(f"backward: a tensor of shape {tuple(tensor.shape)} is not a scalar; pass its gradient too")
    if gradient is not None and gradient.shape != tensor.shape:
        raise ValueError(
            f"backward: the gradient has shape {tuple(gradient.shape)}, the tensor {tuple(tensor.shape)}; they must agree"
        )


@contextmanager
def _explained() -> Iterator[None]:
    """Replaces PyTorch's error about a graph that is already freed by an error that also says what to change."""
    try:
        yield
    except RuntimeError as error:
        if "backward through the graph a second time" not in str(error):
            raise
        raise RuntimeError(
            "backward: this graph was already backpropagated and freed. Losses and synthetic gradients that share a graph "
            "must be collected in one `with dni_seq.defer_backward():` block and passed to `dni_seq.backward`"
        ) from error
