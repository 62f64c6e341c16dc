"""Traces: the derivative of a state with respect to parameters, carried with the state from window to window.

Let s_k be the first state of window k and θ the parameters. A gradient a_k that arrives at s_k adds a_kᵀ ds_k/dθ to the
gradient of θ. The window's graph begins at s_k, so backpropagation through the window does not compute this term. The trace
E_k = ds_k/dθ, which is carried with the state, gives the term as a_kᵀ E_k.

Source: Williams and Zipser 1989, "A Learning Algorithm for Continually Running Fully Recurrent Neural Networks", Neural
Computation 1(2) (real-time recurrent learning). We contract the trace with a gradient only at the first state of each
window. Inside a window autograd computes the gradient.

Legend: B = lanes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._C import DisableTorchFunctionSubclass

Contraction = Callable[[Sequence[Tensor], Sequence[Tensor]], Sequence[Tensor]]
"""Maps the gradients a_k at the tensors of a state, and the traces of this state, to one gradient for each parameter."""


class Trace(Tensor):
    """A leaf of a state that holds a derivative of the state. It never receives a gradient.

    A trace is carried, reset and saved with the other leaves. Its `requires_grad` is True as long as the state belongs to a
    graph, and False after `detach`. `attach` reads this flag: False means that a graph begins at the state, so that the
    credit of earlier steps must come from the trace.
    """


class _Attach(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, contract: Contraction, leaves: int, count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.contract, ctx.others = contract, leaves + count
        ctx.save_for_backward(*tensors[leaves : ctx.others])
        return tuple(leaf.view_as(leaf) for leaf in tensors[:leaves])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        found = ctx.contract(gradients, ctx.saved_tensors) if any(ctx.needs_input_grad[3 + ctx.others :]) else ()
        return (None, None, None, *gradients, *(None for _ in range(ctx.others - len(gradients))), *found)


class _Link(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, trace: Tensor, state: Tensor) -> Tensor:
        return trace.view_as(trace)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, None]:
        return None, None


def plain(traces: Sequence[Tensor]) -> list[Tensor]:
    """Returns traces as ordinary tensors without a graph."""
    with DisableTorchFunctionSubclass():  # ten times as fast as a subclass's own detach
        return [trace.detach() for trace in traces]


def attach(
    state: Sequence[Tensor], traces: Sequence[Tensor], parameters: Sequence[Tensor], contract: Contraction
) -> tuple[Tensor, ...]:
    """Returns `state`; gradients that arrive at it are also contracted with its traces, into the parameters' gradients.

    If the state belongs to a graph that began at an earlier state, as at the second part of a window, nothing is contracted
    here. The traces were attached at the first state of that graph.

    Args:
        state: the tensors of a state before a window, each [.., B, ..].
        traces: the traces of that state.
        parameters: the parameters, in the order in which `contract` returns gradients.
        contract: computes a_kᵀ E_k.
    """
    if not start_a_graph(traces, parameters):
        return tuple(state)
    attached: tuple[Tensor, ...] = _Attach.apply(contract, len(state), len(traces), *state, *plain(traces), *parameters)
    return attached


def start_a_graph(traces: Sequence[Tensor], parameters: Sequence[Tensor]) -> bool:
    """Returns whether a graph begins at the state that carries these traces, so that the traces are contracted there."""
    return is_active(parameters) and not any(trace.requires_grad for trace in traces)


def carry(traces: Sequence[Tensor], state: Tensor) -> list[Trace]:
    """Returns new traces as leaves of a state; if the state requires a gradient, so do they, until they are detached."""
    if not state.requires_grad:
        return [trace.as_subclass(Trace) for trace in traces]
    with torch.enable_grad():  # new traces are computed without gradients, and here get the flag of the state
        return [_Link.apply(trace, state).as_subclass(Trace) for trace in traces]


def traced_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Returns the parameters that have traces: those that the modules of a model list in `traced_parameters`."""
    return [parameter for module in model.modules() for parameter in getattr(module, "traced_parameters", ())]


def is_active(parameters: Sequence[Tensor]) -> bool:
    """Returns whether traces are needed: gradients are recorded, and a parameter is trained."""
    return torch.is_grad_enabled() and any(parameter.requires_grad for parameter in parameters)
