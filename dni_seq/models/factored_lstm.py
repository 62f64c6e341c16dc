"""An LSTM layer with factored traces: approximate credit from before a window, for little more than a matrix product.

The trace follows the path from a unit's cell state to the same cell state one step later, ∂c_t/∂c_{t-1} = f_t, the forget
gate. It ignores every other path. φ_t = ∂c_t/∂y_t is the derivative with respect to the pre-activations y_t = W x_t of the
input, forget and cell gates, and u_t = o_t (1 - tanh² c_t):

    ξ_t = α ξ_{t-1} + x_t             ε_t = α f_t ε_{t-1} + φ_t
    ∂c_t/∂W ≈ (1 - α) ε_t ⊗ ξ_t       ∂h_t/∂W ≈ u_t ∂c_t/∂W       ∂h_t/∂W_o ≈ (1 - α) ∂h_t/∂y_t ⊗ ξ_t

W stands for the weights of the inputs, the recurrent weights or a bias. x_t then stands for the layer's inputs, the hidden
state before the step, or 1. W_o are the rows of W for the output gate.

Sources: the product of two running means is the rule pp_prop of braintrace (Wang et al. 2024, bioRxiv 2024.09.24.614728).
In braintrace the product also replaces the gradient of the current step. Here autograd computes the exact gradient inside
the window, and the trace covers only the steps before the window. Ignoring how h_{t-1} acts on the gates is the
approximation of e-prop (Bellec et al. 2020, Nature Communications 11:3625).

Legend: T = window length, B = lanes, D = inputs, H = units.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dni_seq.core import traces


class Unpacked(NamedTuple):
    """Views of one layer's trace.

    Attributes:
        inputs: ξ for the weights of the inputs, [B, D].
        hidden: ξ for the recurrent weights, [B, H].
        ones: ξ for the biases, [B, 1].
        slopes: [B, 5, H]: ε of the input, forget and cell gates, ∂h/∂y of the output gate, and u.
    """

    inputs: Tensor
    hidden: Tensor
    ones: Tensor
    slopes: Tensor


def unpack(trace: Tensor, units: int) -> Unpacked:
    """Returns the views of a trace [B, D + 6 H + 1]."""
    sizes = [trace.shape[-1] - 6 * units - 1, units, 1, 5 * units]
    inputs, hidden, ones, slopes = trace.split(sizes, -1)
    return Unpacked(inputs, hidden, ones, slopes.unflatten(-1, (5, units)))


def of_pre_activations(slopes: Tensor, at_h: Tensor, at_c: Tensor | None, out: Tensor) -> Tensor:
    """Writes the gradient at the pre-activations to `out`, [B, 4, H]; returns the gradient at the cell state, [B, H].

    Args:
        slopes: [B, 5, H], laid out as `Unpacked.slopes`.
        at_h: gradient that arrives at h, [B, H].
        at_c: gradient that arrives at c, except through h, [B, H]; None for zeros.
        out: [B, 4, H], is overwritten.
    """
    cell = at_h * slopes[:, 4] if at_c is None else torch.addcmul(at_c, at_h, slopes[:, 4])
    torch.mul(slopes[:, :3], cell[:, None], out=out[:, :3])
    torch.mul(slopes[:, 3], at_h, out=out[:, 3])
    return cell


class _Step(torch.autograd.Function):
    """One step of the LSTM. If a trace is given, the backward pass also contracts the trace of the state before the step.

    The gradient of a weight matrix is then still one matrix product: the slopes and inputs of the trace are appended to
    those of the step as further rows.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, h: Tensor, c: Tensor, *others: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        w_ih, w_hh, b_ih, b_hh, trace, ctx.decay = others
        pre = torch.addmm(torch.addmm(b_ih + b_hh, x, w_ih.t()), h, w_hh.t()).unflatten(-1, (4, -1))
        opened, g = pre.sigmoid(), pre[:, 2].tanh()
        i, f, o = opened[:, 0], opened[:, 1], opened[:, 3]
        cell = torch.addcmul(f * c, i, g)
        squashed = cell.tanh()
        hidden = o * squashed
        bent = torch.addcmul(opened, opened, opened, value=-1)  # σ' = σ (1 - σ)
        slopes = pre.new_empty(len(x), 5, h.shape[-1])
        torch.mul(g, bent[:, 0], out=slopes[:, 0])
        torch.mul(c, bent[:, 1], out=slopes[:, 1])
        torch.addcmul(i, i * g, g, value=-1, out=slopes[:, 2])
        torch.mul(squashed, bent[:, 3], out=slopes[:, 3])
        torch.addcmul(o, hidden, squashed, value=-1, out=slopes[:, 4])
        ctx.save_for_backward(x, h, w_ih, w_hh, slopes, f, trace)
        ctx.mark_non_differentiable(slopes, f)
        ctx.set_materialize_grads(False)
        return hidden, cell, slopes, f

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, at_h: Tensor | None, at_c: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        x, h, w_ih, w_hh, slopes, f, trace = ctx.saved_tensors
        lanes, trains = len(x), any(ctx.needs_input_grad[3:7])
        contracts = trains and trace is not None
        both = slopes.new_empty(2 * lanes if contracts else lanes, 4, h.shape[-1])
        rows = both[:lanes].flatten(1)
        before_c = of_pre_activations(slopes, torch.zeros_like(h) if at_h is None else at_h, at_c, both[:lanes]) * f
        before_h = rows @ w_hh if ctx.needs_input_grad[1] or contracts else None
        of_weights: list[Tensor | None] = [None] * 4
        if trains:
            bias, inputs, hidden = rows.sum(0), x, h
            if contracts:
                assert before_h is not None
                carried, kept = unpack(trace, h.shape[-1]), 1 - ctx.decay
                of_pre_activations(carried.slopes, before_h * kept, before_c * kept, both[lanes:])
                bias = torch.addmv(bias, both[lanes:].flatten(1).t(), carried.ones[:, 0])
                inputs, hidden = torch.cat([x, carried.inputs]), torch.cat([h, carried.hidden])
            gradient = both.flatten(1).t()
            of_weights = [gradient @ inputs, gradient @ hidden, bias, bias]
        of_x = rows @ w_ih if ctx.needs_input_grad[0] else None
        return (of_x, before_h, before_c, *of_weights, None, None)


class FactoredLSTM:
    """Runs an LSTM layer whose state carries one factored trace, the parts of `Unpacked` in one tensor [1, B, D + 6 H + 1].

    Args:
        decay: α, from 0 to below 1.
    """

    def __init__(self, decay: float) -> None:
        self.decay = decay

    def initial(self, weights: Sequence[Tensor], lanes: int) -> list[Tensor]:
        """Returns the trace of a zero state, in a list."""
        w_ih, w_hh, *_ = weights
        return [w_ih.new_zeros(1, lanes, w_ih.shape[1] + 6 * w_hh.shape[1] + 1)]

    def run(
        self, inputs: Tensor, state: Sequence[Tensor], carried: Sequence[Tensor], weights: Sequence[Tensor]
    ) -> tuple[Tensor, tuple[Tensor, ...], Sequence[Tensor]]:
        """Returns outputs [T, B, H], the last (h, c), each [B, H], and the trace of that state in a list.

        Args:
            inputs: [T, B, D].
            state: (h, c) before the first step.
            carried: the trace of `state`, in a list.
            weights: weight_ih [4H, D], weight_hh [4H, H], bias_ih and bias_hh [4H].
        """
        active = traces.is_active(weights)
        trace = traces.plain(carried)[0][0]
        within = trace if traces.start_a_graph(carried, weights) else None
        h, c = state
        outputs = []
        device, dtype = inputs.device.type, weights[0].dtype
        # Without autocast: products of lower precision would be lost in the running sums.
        with torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext():
            for x in inputs.to(dtype):
                hidden, cell, slopes, forget = _Step.apply(x, h, c, *weights, within, self.decay)
                within = None
                if active:
                    trace = self._moved(trace, x, h, slopes, forget)
                h, c = hidden, cell
                outputs.append(h)
        return stacked(outputs), (h, c), traces.carry([trace[None]], h) if active else carried

    @torch.no_grad()
    def _moved(self, trace: Tensor, x: Tensor, h: Tensor, slopes: Tensor, forget: Tensor) -> Tensor:
        """Returns the trace after a step with inputs x [B, D] from a state with h [B, H]."""
        moved = torch.empty_like(trace)
        old, new = unpack(trace, h.shape[-1]), unpack(moved, h.shape[-1])
        torch.add(x, old.inputs, alpha=self.decay, out=new.inputs)
        torch.add(h, old.hidden, alpha=self.decay, out=new.hidden)
        torch.mul(old.ones, self.decay, out=new.ones).add_(1)
        running = new.slopes[:, :3]
        torch.addcmul(slopes[:, :3], old.slopes[:, :3], forget[:, None], value=self.decay, out=running)
        new.slopes[:, 3:] = slopes[:, 3:]
        return moved


def stacked(tensors: Sequence[Tensor]) -> Tensor:
    """Returns `torch.stack(tensors)`; for a single tensor the result is a view of it."""
    return tensors[0][None] if len(tensors) == 1 else torch.stack(list(tensors))
