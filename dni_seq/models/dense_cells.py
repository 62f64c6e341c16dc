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

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

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


def lstm_step(x: Tensor, state: Sequence[Tensor], weights: Sequence[Tensor]) -> Step:
    """Returns one step of PyTorch's LSTM, and its derivatives without a graph.

    Args:
        x: [B, D].
        state: (h, c).
        weights: weight_ih [4H, D], weight_hh [4H, H], bias_ih and bias_hh [4H].
    """
    h, c = state
    w_ih, w_hh, b_ih, b_hh = weights
    i, f, g, o = (x @ w_ih.T + b_ih + h @ w_hh.T + b_hh).chunk(4, -1)
    i, f, g, o = i.sigmoid(), f.sigmoid(), g.tanh(), o.sigmoid()
    cell = f * c + i * g
    squashed = cell.tanh()
    hidden = o * squashed
    with torch.no_grad():
        through = o * (1 - squashed**2)
        of_cell = torch.cat([g * i * (1 - i), c * f * (1 - f), i * (1 - g**2), torch.zeros_like(o)], -1)
        of_output = torch.cat([torch.zeros_like(o).repeat(1, 3), squashed * o * (1 - o)], -1)
        direct = torch.stack([through.repeat(1, 4) * of_cell + of_output, of_cell])  # [S, B, G]
        own = torch.cat([block.diagonal() for block in w_hh.chunk(4)])  # a unit's own recurrent weights, [G]
        from_h = (direct * own).unflatten(-1, (4, -1)).sum(2)
        from_c = torch.stack([through * f, f])
        jacobian = torch.stack([from_h, from_c], 1)
    return Step((hidden, cell), jacobian, direct, direct)


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
    def of_tensor(carried: Sequence[Tensor], tensor: int, tensors: int) -> list[Tensor]:
        """Returns the traces that are contracted with the gradient at one tensor of the state."""
        each = len(carried) // tensors
        return list(carried[tensor * each : (tensor + 1) * each])

    @staticmethod
    def contract(gradient: Tensor, carried: Sequence[Tensor]) -> list[Tensor]:
        """Returns a gradient for each parameter from that at a tensor of the state, [B, H]."""
        found = []
        for trace in carried:
            rows = gradient.repeat(1, trace.shape[2] // gradient.shape[1])
            found.append(torch.einsum("bg,bg...->g...", rows, trace[0]))
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
        """Returns ξ [1, B, D], [1, B, H] and [1, B, 1], then for each tensor of the state ε of both matrices, [1, B, G]."""
        w_ih, w_hh, *_ = weights
        inputs = [w_ih.new_zeros(1, lanes, size) for size in (w_ih.shape[1], w_hh.shape[1], 1)]
        return [*inputs, *(w_ih.new_zeros(1, lanes, len(w_ih)) for _ in range(2 * tensors))]

    @staticmethod
    def of_tensor(carried: Sequence[Tensor], tensor: int, tensors: int) -> list[Tensor]:
        """Returns the traces that are contracted with the gradient at one tensor of the state."""
        return [*carried[:3], *carried[3 + 2 * tensor : 5 + 2 * tensor]]

    @staticmethod
    def contract(gradient: Tensor, carried: Sequence[Tensor]) -> list[Tensor]:
        """Returns a gradient for each parameter from that at a tensor of the state, [B, H]."""
        of_x, of_h, of_one, slopes_x, slopes_h = (trace[0] for trace in carried)
        rows = gradient.repeat(1, slopes_x.shape[1] // gradient.shape[1])
        x_rows, h_rows = rows * slopes_x, rows * slopes_h
        return [x_rows.T @ of_x, h_rows.T @ of_h, (x_rows * of_one).sum(0), (h_rows * of_one).sum(0)]

    @staticmethod
    def step(carried: Sequence[Tensor], x: Tensor, h: Tensor, step: Step) -> list[Tensor]:
        """Returns the traces after a step with inputs x [B, D] from a state with h [B, H]."""
        tensors = len(step.state)
        gates = step.of_inputs.shape[-1] // step.jacobian.shape[-1]
        jacobian = step.jacobian.repeat(1, 1, 1, gates) * DECAY
        found = [DECAY * carried[0] + x, DECAY * carried[1] + h, DECAY * carried[2] + 1]
        for s in range(tensors):
            for p, slopes in enumerate((step.of_inputs, step.of_hidden)):
                new = (1 - DECAY) * slopes[s]
                for other in range(tensors):
                    new = torch.addcmul(new, jacobian[s, other], carried[3 + 2 * other + p][0])
                found.append(new[None])
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
        self._step = lstm_step if kind == "lstm" else gru_step
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
        parts = (self._rule.of_tensor(carried, s, self._tensors) for s in range(self._tensors))
        now = tuple(traces.attach(leaf, own, weights, self._rule.contract) for leaf, own in zip(state, parts, strict=True))
        active = traces.is_active(weights)
        moved = traces.plain(carried)
        outputs = []
        for x in inputs:
            step = self._step(x, now, weights)
            if active:
                with torch.no_grad():
                    moved = self._rule.step(moved, x, now[0], step)
            now = step.state
            outputs.append(now[0])
        return torch.stack(outputs), now, traces.carry(moved, now[0]) if active else carried
