"""LSTM and GRU as loops over steps, whose states carry approximate traces of the recurrent parameters.

Their recurrence mixes units, so an exact trace would hold H times the parameters for each lane. Two approximations follow
each unit on its own. J is the block of ∂s_t/∂s_{t-1} of one unit (2x2 for an LSTM's h and c), f_t = ∂s_t/∂y_t of its
pre-activations y_t = W x_t.

- "snap1": E_t = J_t E_{t-1} + f_t ⊗ x_t, memory B · P. Source: Menick et al. 2020, "A Practical Sparse Approximation for
  Real Time Recurrent Learning", arXiv 2006.07232, section 3: SnAp with n = 1.
- "factored": E_t ≈ ε_t ⊗ ξ_t with ξ_t = α ξ_{t-1} + x_t and ε_t = α J_t ε_{t-1} + (1 - α) f_t, memory B · (inputs + units).
  Source: the rule pp_prop of braintrace (Wang et al. 2024, bioRxiv 2024.09.24.614728). There it also replaces the gradient
  of the current step; here autograd is exact inside the window, and only earlier steps come from the trace.

Legend: T = window length, B = lanes, D = inputs, H = units, G = rows of a weight matrix (gates times H), P = parameters,
S = tensors of a state.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from dni_seq.core import traces
from dni_seq.models.cells import APPROXIMATE

DECAY = 0.9
"""α of factored traces."""


class Step(NamedTuple):
    """One step of a layer.

    Attributes:
        state: (h, c) or (h,), each [B, H].
        jacobian: [S, S, B, H], derivative of each tensor of the state with respect to each of the state before.
        of_inputs: [S, B, G], derivative of the state with respect to the pre-activations of the inputs' weights.
        of_hidden: [S, B, G], the same for the recurrent weights.
    """

    state: tuple[Tensor, ...]
    jacobian: Tensor
    of_inputs: Tensor
    of_hidden: Tensor


class _LSTMStep(torch.autograd.Function):
    """One step of an LSTM. With factored traces of the state before it, the backward pass contracts them too.

    The gradient of a weight matrix is then one product, of the step's own slopes and inputs above those of the traces.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, h: Tensor, c: Tensor, *others: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        w_ih, w_hh, b_ih, b_hh, *carried = others
        pre = functional.linear(x, w_ih, b_ih) + functional.linear(h, w_hh, b_hh)
        i, f, g, o = pre.unflatten(-1, (4, -1)).unbind(1)
        i, f, g, o = i.sigmoid(), f.sigmoid(), g.tanh(), o.sigmoid()
        cell = torch.addcmul(f * c, i, g)
        squashed = cell.tanh()
        through = torch.addcmul(o, o * squashed, squashed, value=-1)  # ∂h / ∂c of the same step
        slopes = pre.new_zeros(2, len(pre), 4, c.shape[-1])
        of_cell = slopes[1]
        torch.mul(g, i * (1 - i), out=of_cell[:, 0])
        torch.mul(c, f * (1 - f), out=of_cell[:, 1])
        torch.mul(i, 1 - g * g, out=of_cell[:, 2])
        torch.mul(of_cell, through[:, None], out=slopes[0])
        torch.mul(squashed, o * (1 - o), out=slopes[0][:, 3])
        slopes = slopes.flatten(2)
        from_c = torch.stack([through * f, f])
        ctx.save_for_backward(x, h, w_ih, w_hh, slopes, from_c, *carried)
        ctx.mark_non_differentiable(slopes, from_c)
        return o * squashed, cell, slopes, from_c

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, h, w_ih, w_hh, slopes, from_c, *carried = ctx.saved_tensors
        of_h, of_c = gradients[:2]
        rows = (slopes.unflatten(-1, (4, -1)) * torch.stack([of_h, of_c])[:, :, None]).sum(0).flatten(1)  # [B, G]
        at_c = torch.addcmul(from_c[0] * of_h, from_c[1], of_c)
        trains = any(ctx.needs_input_grad[3:7])
        at_h = rows @ w_hh if ctx.needs_input_grad[1] or (trains and carried) else None
        of_weights: list[Tensor | None] = [None] * 4
        if trains:
            bias, inputs, hidden, both = rows.sum(0), x, h, rows
            if carried:
                assert at_h is not None
                older = Factored.rows([at_h, at_c], carried)[0]
                bias = bias + (older * carried[2][0]).sum(0)
                inputs, hidden = torch.cat([x, carried[0][0]]), torch.cat([h, carried[1][0]])
                both = torch.cat([rows, older])
            of_weights = [both.T @ inputs, both.T @ hidden, bias, bias]
        of_x = rows @ w_ih if ctx.needs_input_grad[0] else None
        return (of_x, at_h, at_c, *of_weights, *(None for _ in carried))


def lstm_step(x: Tensor, state: Sequence[Tensor], weights: Sequence[Tensor], carried: Sequence[Tensor] = ()) -> Step:
    """Returns one step of PyTorch's LSTM, and its derivatives without a graph.

    Args:
        x: [B, D].
        state: (h, c).
        weights: weight_ih [4H, D], weight_hh [4H, H], bias_ih and bias_hh [4H].
        carried: factored traces of the state, to be contracted with the gradient that arrives at it; or nothing.
    """
    hidden, cell, slopes, from_c = _LSTMStep.apply(x, *state, *weights, *carried)
    with torch.no_grad():
        own = weights[1].unflatten(0, (4, -1)).diagonal(dim1=1, dim2=2)  # a unit's own recurrent weights, [4, H]
        from_h = (slopes.unflatten(-1, (4, -1)) * own).sum(2)
        jacobian = torch.stack([from_h, from_c], 1)
    return Step((hidden, cell), jacobian, slopes, slopes)


def gru_step(x: Tensor, state: Sequence[Tensor], weights: Sequence[Tensor]) -> Step:
    """Returns one step of PyTorch's GRU, and its derivatives without a graph; see `lstm_step`."""
    (h,) = state
    w_ih, w_hh, b_ih, b_hh = weights
    of_x, of_h = (x @ w_ih.T + b_ih).chunk(3, -1), (h @ w_hh.T + b_hh).chunk(3, -1)
    r, z = (of_x[0] + of_h[0]).sigmoid(), (of_x[1] + of_h[1]).sigmoid()
    n = (of_x[2] + r * of_h[2]).tanh()
    hidden = n + z * (h - n)
    with torch.no_grad():
        of_n = (1 - z) * (1 - n**2)
        of_r, of_z = of_n * of_h[2] * r * (1 - r), (h - n) * z * (1 - z)
        of_inputs = torch.cat([of_r, of_z, of_n], -1)[None]
        of_hidden = torch.cat([of_r, of_z, of_n * r], -1)[None]
        own = torch.cat([block.diagonal() for block in w_hh.chunk(3)])
        jacobian = (z + (of_hidden * own).unflatten(-1, (3, -1)).sum(2))[None]
    return Step((hidden,), jacobian, of_inputs, of_hidden)


class SnAp1:
    """The traces of one layer: for each tensor of the state, one for each parameter, as large as it for each lane."""

    @staticmethod
    def initial(weights: Sequence[Tensor], lanes: int, tensors: int) -> list[Tensor]:
        """Returns the traces of a zero state, [1, B, *parameter] for each tensor and parameter."""
        return [weight.new_zeros(1, lanes, *weight.shape) for _ in range(tensors) for weight in weights]

    @staticmethod
    def contract(gradients: Sequence[Tensor], carried: Sequence[Tensor]) -> list[Tensor]:
        """Returns a gradient for each parameter from those at the tensors of the state, each [B, H]."""
        each = len(carried) // len(gradients)
        found = []
        for p in range(each):
            gates = carried[p].shape[2] // gradients[0].shape[1]
            terms = (
                torch.einsum("bg,bg...->g...", gradient.repeat(1, gates), carried[s * each + p][0])
                for s, gradient in enumerate(gradients)
            )
            found.append(sum(terms, next(terms)))
        return found

    @staticmethod
    def step(carried: Sequence[Tensor], x: Tensor, h: Tensor, step: Step) -> list[Tensor]:
        """Returns the traces after a step with inputs x [B, D] from a state with h [B, H]."""
        tensors = len(step.state)
        each = len(carried) // tensors
        gates = step.of_inputs.shape[-1] // step.jacobian.shape[-1]
        jacobian = step.jacobian.repeat(1, 1, 1, gates)  # [S, S, B, G]
        ones = x.new_ones(len(x))
        factors = (x, h, ones, ones)
        found = []
        for s in range(tensors):
            for p, factor in enumerate(factors):
                slope = step.of_inputs[s] if p in (0, 2) else step.of_hidden[s]
                new = torch.einsum("bg,bd->bgd", slope, factor) if factor.dim() == 2 else slope.clone()
                for other in range(tensors):
                    keep = jacobian[s, other][..., None] if factor.dim() == 2 else jacobian[s, other]
                    new.addcmul_(keep, carried[other * each + p][0])
                found.append(new[None])
        return found


class Factored:
    """The traces of one layer: running inputs ξ of the weight matrices and the biases, and running slopes ε of the state."""

    @staticmethod
    def initial(weights: Sequence[Tensor], lanes: int, tensors: int) -> list[Tensor]:
        """Returns ξ [1, B, D], [1, B, H] and [1, B, 1], then ε [1, B, S, G] of the matrix of the inputs.

        A cell whose matrices have other slopes, the GRU, has a second ε.
        """
        w_ih, w_hh, *_ = weights
        inputs = [w_ih.new_zeros(1, lanes, size) for size in (w_ih.shape[1], w_hh.shape[1], 1)]
        return [*inputs, *(w_ih.new_zeros(1, lanes, tensors, len(w_ih)) for _ in range(3 - tensors))]

    @staticmethod
    def contract(gradients: Sequence[Tensor], carried: Sequence[Tensor]) -> list[Tensor]:
        """Returns a gradient for each parameter from those at the tensors of the state, each [B, H]."""
        of_x, of_h, of_one, *_ = (trace[0] for trace in carried)
        rows = Factored.rows(gradients, carried)
        x_rows, h_rows = rows[0], rows[-1]
        return [x_rows.T @ of_x, h_rows.T @ of_h, (x_rows * of_one).sum(0), (h_rows * of_one).sum(0)]

    @staticmethod
    def rows(gradients: Sequence[Tensor], carried: Sequence[Tensor]) -> list[Tensor]:
        """Returns a_k ε for each ε, [B, G]: the gradient with respect to earlier pre-activations, but for their inputs ξ."""
        at = torch.stack(list(gradients), 1)  # [B, S, H]
        each = (trace[0].unflatten(-1, (-1, at.shape[-1])) for trace in carried[3:])
        return [(slopes * at[:, :, None]).sum(1).flatten(1) for slopes in each]

    @staticmethod
    def step(carried: Sequence[Tensor], x: Tensor, h: Tensor, step: Step) -> list[Tensor]:
        """Returns the traces after a step with inputs x [B, D] from a state with h [B, H]."""
        units, tensors = step.jacobian.shape[-1], len(step.state)
        found = [torch.add(new, trace, alpha=DECAY) for new, trace in ((x, carried[0]), (h, carried[1]))]
        found.append(DECAY * carried[2] + 1)
        for slope, trace in zip((step.of_inputs, step.of_hidden), carried[3:], strict=False):
            before = trace[0].unflatten(-1, (-1, units))  # [B, S, gates, H]
            moved = (slope * (1 - DECAY)).unflatten(-1, (-1, units))  # [S, B, gates, H]
            for s in range(tensors):
                for other in range(tensors):
                    moved[s].addcmul_(step.jacobian[s, other][:, None], before[:, other], value=DECAY)
            found.append(moved.flatten(2).transpose(0, 1)[None])
        return found


class DenseRNN(nn.Module):
    """A stack of LSTM or GRU layers whose state carries approximate traces: `rnn(inputs, state) -> (outputs, state)`.

    A state is (h, c, *traces) or (h, *traces): h and c are [L, B, H] as PyTorch's, each trace is [1, B, ...].

    Args:
        kind: "lstm" or "gru".
        inputs: D.
        units: H.
        layers: L.
        dropout: between layers.
        traces: "snap1" or "factored".

    Attributes:
        rnn: nn.LSTM or nn.GRU, which holds the parameters.
        traced_parameters: all of them.

    Raises:
        ValueError: the traces are unknown.
    """

    def __init__(self, kind: str, inputs: int, units: int, layers: int = 1, *, dropout: float = 0.0, traces: str) -> None:
        super().__init__()
        if traces not in APPROXIMATE:
            raise ValueError(f"traces must be one of {', '.join(APPROXIMATE)}, got {traces!r}")
        self.rnn = (nn.LSTM if kind == "lstm" else nn.GRU)(inputs, units, layers)
        self.dropout = nn.Dropout(dropout)
        self._tensors = 2 if kind == "lstm" else 1
        self._step: Callable[..., Step] = lstm_step if kind == "lstm" else gru_step
        self._rule: Any = SnAp1 if traces == "snap1" else Factored

    @property
    def traced_parameters(self) -> list[Tensor]:
        """The parameters that traces belong to."""
        return [weight for layer in self.rnn.all_weights for weight in layer]

    def initial_state(self, lanes: int) -> tuple[Tensor, ...]:
        """Returns a zero state."""
        hidden = self.traced_parameters[0].new_zeros(self.rnn.num_layers, lanes, self.rnn.hidden_size)
        zeros = [self._rule.initial(weights, lanes, self._tensors) for weights in self.rnn.all_weights]
        carried = traces.carry([trace for layer in zeros for trace in layer], hidden)
        return (*(torch.zeros_like(hidden) for _ in range(self._tensors)), *carried)

    def forward(self, inputs: Tensor, state: Any = None) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Returns outputs [T, B, H] and the state after the last step.

        Args:
            inputs: [T, B, D].
            state: see the class; None for zeros.
        """
        state = self.initial_state(inputs.shape[1]) if state is None else state
        hidden, carried = state[: self._tensors], state[self._tensors :]
        each = len(carried) // self.rnn.num_layers
        last: list[tuple[Tensor, ...]] = []
        kept: list[Tensor] = []
        outputs = inputs
        for i, weights in enumerate(self.rnn.all_weights):
            outputs = outputs if i == 0 else self.dropout(outputs)
            own = carried[i * each : (i + 1) * each]
            outputs, after, own = self._layer(outputs, [leaf[i] for leaf in hidden], own, weights)
            last.append(after)
            kept += own
        return outputs, (*(torch.stack(leaves) for leaves in zip(*last, strict=True)), *kept)

    def _layer(
        self, inputs: Tensor, state: Sequence[Tensor], carried: Sequence[Tensor], weights: Sequence[Tensor]
    ) -> tuple[Tensor, tuple[Tensor, ...], Sequence[Tensor]]:
        """Runs one layer; returns its outputs, its last state and the traces there."""
        active = traces.is_active(weights)
        moved = traces.plain(carried)
        within: Sequence[Tensor] = ()  # traces that the first step contracts
        now = tuple(state)
        if self._step is lstm_step and self._rule is Factored:
            within = moved if traces.start_a_graph(carried, weights) else ()
        else:
            now = traces.attach(state, carried, weights, self._rule.contract)
        outputs = []
        for x in inputs:
            step = self._step(x, now, weights, within) if within else self._step(x, now, weights)
            within = ()
            if active:
                with torch.no_grad():
                    moved = self._rule.step(moved, x, now[0], step)
            now = step.state
            outputs.append(now[0])
        return torch.stack(outputs), now, traces.carry(moved, now[0]) if active else carried
