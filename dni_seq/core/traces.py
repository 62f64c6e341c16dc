"""Traces: the derivative of a state with respect to parameters, carried with the state from window to window.

For s_k = f(s_{k-1}, x_k; θ) the gradient of a later loss that arrives at s_k as a_k is worth a_kᵀ ds_k/dθ to the parameters.
A window's own graph holds only the part of ds_k/dθ since its first state. The trace E_k = ds_k/dθ holds the part before it.

Source: Williams and Zipser 1989, "A Learning Algorithm for Continually Running Fully Recurrent Neural Networks", Neural
Computation 1(2) (real-time recurrent learning). We contract E_k once a window, at its first state, and use autograd inside.

Legend: B = lanes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._C import DisableTorchFunctionSubclass

Contraction = Callable[[Sequence[Tensor], Sequence[Tensor]], Sequence[Tensor]]
"""Maps the gradients a_k at the tensors of a state, and its traces, to one gradient for each parameter."""


class Trace(Tensor):
    """A leaf of a state that is carried, reset and saved with it, and never receives a gradient.

    It requires a gradient, formally, while the state's own graph exists. `detach` ends that, and `attach` then knows that
    the credit from before the state is not in the graph.
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
    """Returns traces as tensors without a graph, to compute with."""
    with DisableTorchFunctionSubclass():  # ten times as fast as a subclass's own detach
        return [trace.detach() for trace in traces]


def attach(
    state: Sequence[Tensor], traces: Sequence[Tensor], parameters: Sequence[Tensor], contract: Contraction
) -> tuple[Tensor, ...]:
    """Returns `state`; the gradients that arrive at it are also contracted with its traces, into the parameters' gradients.

    Nothing is contracted if the state's own graph reaches back over this call, as for the second part of one window: the
    graph's first state does it then.

    Args:
        state: the tensors of a state before a window, each [.., B, ..].
        traces: its traces.
        parameters: the parameters, in the order in which `contract` returns gradients.
        contract: computes a_kᵀ E_k.
    """
    if not start_a_graph(traces, parameters):
        return tuple(state)
    attached: tuple[Tensor, ...] = _Attach.apply(contract, len(state), len(traces), *state, *plain(traces), *parameters)
    return attached


def start_a_graph(traces: Sequence[Tensor], parameters: Sequence[Tensor]) -> bool:
    """Returns whether the state that carries these traces begins a graph, so that they are contracted there."""
    return is_active(parameters) and not any(trace.requires_grad for trace in traces)


def carry(traces: Sequence[Tensor], state: Tensor) -> list[Trace]:
    """Returns new traces as leaves of a state. They belong to its graph, if it has one, until they are detached."""
    if not state.requires_grad:
        return [trace.as_subclass(Trace) for trace in traces]
    with torch.enable_grad():  # new traces are computed without
        return [_Link.apply(trace, state).as_subclass(Trace) for trace in traces]


def traced_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Returns the parameters of a model whose credit from before a window comes by traces, by its modules' own account."""
    return [parameter for module in model.modules() for parameter in getattr(module, "traced_parameters", ())]


def is_active(parameters: Sequence[Tensor]) -> bool:
    """Returns whether traces are needed: gradients are recorded, and a parameter is trained."""
    return torch.is_grad_enabled() and any(parameter.requires_grad for parameter in parameters)
