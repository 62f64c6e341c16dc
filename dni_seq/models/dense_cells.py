"""LSTM and GRU as loops over steps, whose states carry approximate traces of the recurrent parameters.

The recurrence of these cells mixes units. For each lane, an exact trace would hold S · H numbers for each parameter. Two
approximations follow each unit on its own and ignore how one unit acts on another. J_t is the block of ∂s_t/∂s_{t-1} that
belongs to one unit; it is 2x2 for the h and c of an LSTM. φ_t = ∂s_t/∂y_t is the derivative of the unit's state with
respect to its pre-activations y_t = W x_t.

- "snap1": E_t = J_t E_{t-1} + φ_t ⊗ x_t. The traces hold S · P numbers for each lane. Source: Menick et al. 2020, "A
  Practical Sparse Approximation for Real Time Recurrent Learning", arXiv 2006.07232, section 3: SnAp with n = 1.
- "factored": E_t ≈ ε_t ⊗ ξ_t with ξ_t = α ξ_{t-1} + x_t and ε_t = α J_t ε_{t-1} + (1 - α) φ_t. The traces hold, for each
  lane, a number for each input and a few for each unit. For the LSTM, the module `factored_lstm` computes them; its
  traces also ignore how h acts on the gates. The docstring of `factored_lstm` names the sources.

Legend: T = window length, B = lanes, D = inputs, H = units, G = rows of a weight matrix (gates times H), P = parameters of a
layer, S = tensors of a layer's state (2 for h and c of an LSTM, 1 for a GRU).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from dni_seq.core import traces
from dni_seq.models.cells import APPROXIMATE, checked_decay
from dni_seq.models.factored_lstm import FactoredLSTM, stacked


class Step(NamedTuple):
    """One step of a layer. S is the number of tensors of its state, G the width of all its gates together.

    Attributes:
        state: (h, c) or (h,), each [B, H].
        jacobian: [S, S, B, H]; [i, j] is the derivative of a unit's tensor i with respect to its tensor j before the step.
            It includes the path through the unit's own recurrent weight, and none through other units.
        of_inputs: [S, B, G], derivatives of the state with respect to W_ih x + b_ih.
        of_hidden: [S, B, G], derivatives of the state with respect to W_hh h + b_hh.
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
    i, f, g, o = (functional.linear(x, w_ih, b_ih) + functional.linear(h, w_hh, b_hh)).chunk(4, -1)
    i, f, g, o = i.sigmoid(), f.sigmoid(), g.tanh(), o.sigmoid()
    cell = f * c + i * g
    squashed = cell.tanh()
    with torch.no_grad():
        through = o * (1 - squashed**2)  # ∂h / ∂c of the same step
        gates = (g * i * (1 - i), c * f * (1 - f), i * (1 - g**2))
        of_cell = torch.cat([*gates, torch.zeros_like(o)], -1)
        of_hidden = torch.cat([*(gate * through for gate in gates), squashed * o * (1 - o)], -1)
        slopes = torch.stack([of_hidden, of_cell])
        own = torch.cat([block.diagonal() for block in w_hh.chunk(4)])
        from_h = (slopes * own).unflatten(-1, (4, -1)).sum(2)
        jacobian = torch.stack([from_h, torch.stack([through * f, f])], 1)
    return Step((o * squashed, cell), jacobian, slopes, slopes)


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
    """The "snap1" traces of one layer: one trace for each pair of a state tensor and a parameter.

    For each lane, a trace has the shape of its parameter.
    """

    @staticmethod
    def initial(weights: Sequence[Tensor], lanes: int, tensors: int) -> list[Tensor]:
        """Returns the traces of a zero state: [1, B, *parameter.shape] for each state tensor and each parameter."""
        return [weight.new_zeros(1, lanes, *weight.shape) for _ in range(tensors) for weight in weights]

    @staticmethod
    def contract(gradients: Sequence[Tensor], carried: Sequence[Tensor]) -> list[Tensor]:
        """Returns a gradient for each parameter, from `gradients` [B, H] that arrive at the tensors of the state."""
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
    """The factored traces of one GRU layer: running sums ξ of inputs, and running sums ε of derivatives of the state.

    Args:
        decay: α, from 0 to below 1.
    """

    def __init__(self, decay: float) -> None:
        self.decay = decay

    @staticmethod
    def initial(weights: Sequence[Tensor], lanes: int, tensors: int) -> list[Tensor]:
        """Returns ξ of inputs [1, B, D], hidden state [1, B, H] and biases [1, B, 1]; ε [1, B, S, G] of both matrices."""
        w_ih, w_hh, *_ = weights
        inputs = [w_ih.new_zeros(1, lanes, size) for size in (w_ih.shape[1], w_hh.shape[1], 1)]
        return [*inputs, *(w_ih.new_zeros(1, lanes, tensors, len(w_ih)) for _ in range(2))]

    @staticmethod
    def contract(gradients: Sequence[Tensor], carried: Sequence[Tensor]) -> list[Tensor]:
        """Returns a gradient for each parameter, from the one gradient [B, H] that arrives at the state."""
        (at,) = gradients
        of_x, of_h, of_one, *slopes = (trace[0] for trace in carried)
        x_rows, h_rows = ((epsilon.unflatten(-1, (-1, at.shape[-1])) * at[:, None, None]).flatten(1) for epsilon in slopes)
        return [x_rows.T @ of_x, h_rows.T @ of_h, (x_rows * of_one).sum(0), (h_rows * of_one).sum(0)]

    def step(self, carried: Sequence[Tensor], x: Tensor, h: Tensor, step: Step) -> list[Tensor]:
        """Returns the traces after a step with inputs x [B, D] from a state with h [B, H]."""
        found = [torch.add(new, trace, alpha=self.decay) for new, trace in ((x, carried[0]), (h, carried[1]))]
        found.append(self.decay * carried[2] + 1)
        units, jacobian = h.shape[-1], step.jacobian[0, 0, :, None, None]  # [B, 1, 1, H]
        for slope, trace in zip((step.of_inputs, step.of_hidden), carried[3:], strict=True):
            before = trace[0].unflatten(-1, (-1, units))  # [B, 1, gates, H]
            moved = (slope * (1 - self.decay)).transpose(0, 1).unflatten(-1, (-1, units))
            found.append(moved.addcmul(jacobian, before, value=self.decay).flatten(2)[None])
        return found


class StepByStep:
    """Runs a layer as a loop over steps, and updates its traces by a rule.

    An LSTM layer with factored traces is run by `FactoredLSTM` instead.

    Args:
        step: `lstm_step` or `gru_step`.
        rule: updates and contracts the traces.
        tensors: S, the number of tensors of a state.
    """

    def __init__(self, step: Callable[..., Step], rule: SnAp1 | Factored, tensors: int) -> None:
        self.step, self.rule, self.tensors = step, rule, tensors

    def initial(self, weights: Sequence[Tensor], lanes: int) -> list[Tensor]:
        """Returns the traces of a zero state."""
        return self.rule.initial(weights, lanes, self.tensors)

    def run(
        self, inputs: Tensor, state: Sequence[Tensor], carried: Sequence[Tensor], weights: Sequence[Tensor]
    ) -> tuple[Tensor, tuple[Tensor, ...], Sequence[Tensor]]:
        """Returns outputs [T, B, H], the tensors [B, H] of the last state, and its traces; see `FactoredLSTM.run`."""
        active = traces.is_active(weights)
        moved: Sequence[Tensor] = traces.plain(carried)
        now = traces.attach(state, carried, weights, self.rule.contract)
        outputs = []
        for x in inputs:
            step = self.step(x, now, weights)
            if active:
                with torch.no_grad():
                    moved = self.rule.step(moved, x, now[0], step)
            now = step.state
            outputs.append(now[0])
        return stacked(outputs), now, traces.carry(moved, now[0]) if active else carried


class DenseRNN(nn.Module):
    """A stack of LSTM or GRU layers whose state carries approximate traces: `rnn(inputs, state) -> (outputs, state)`.

    A state is (h, c, *traces) for an LSTM and (h, *traces) for a GRU. As in PyTorch, h and c are [L, B, H]. Each trace is
    [1, B, ...].

    Args:
        kind: "lstm" or "gru".
        inputs: D.
        units: H.
        layers: L.
        dropout: dropout probability between layers.
        traces: "snap1" or "factored".
        decay: α of factored traces, from 0 to below 1; None for `cells.TRACE_DECAY`.

    Attributes:
        rnn: nn.LSTM or nn.GRU, which holds the parameters.
        traced_parameters: all parameters of `rnn`.

    Raises:
        ValueError: the traces are unknown, or `decay` is outside [0, 1) or is given for "snap1".
    """

    def __init__(
        self,
        kind: str,
        inputs: int,
        units: int,
        layers: int = 1,
        *,
        dropout: float = 0.0,
        traces: str,
        decay: float | None = None,
    ) -> None:
        super().__init__()
        if traces not in APPROXIMATE:
            raise ValueError(f"traces must be one of {', '.join(APPROXIMATE)}, got {traces!r}")
        self.rnn = (nn.LSTM if kind == "lstm" else nn.GRU)(inputs, units, layers)
        self.dropout = nn.Dropout(dropout)
        self._tensors = 2 if kind == "lstm" else 1
        self._layer = layer_with_traces(kind, traces, checked_decay(traces, decay))

    @property
    def traced_parameters(self) -> list[Tensor]:
        """The parameters that traces belong to."""
        return [weight for layer in self.rnn.all_weights for weight in layer]

    def initial_state(self, lanes: int) -> tuple[Tensor, ...]:
        """Returns a zero state."""
        hidden = self.traced_parameters[0].new_zeros(self.rnn.num_layers, lanes, self.rnn.hidden_size)
        zeros = [self._layer.initial(weights, lanes) for weights in self.rnn.all_weights]
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
            outputs, after, own = self._layer.run(outputs, [leaf[i] for leaf in hidden], own, weights)
            last.append(after)
            kept += own
        return outputs, (*(stacked(leaves) for leaves in zip(*last, strict=True)), *kept)


def layer_with_traces(kind: str, traces: str, decay: float) -> StepByStep | FactoredLSTM:
    """Returns the object that runs every layer of a `DenseRNN`."""
    if kind == "lstm" and traces == "factored":
        return FactoredLSTM(decay)
    rule = SnAp1() if traces == "snap1" else Factored(decay)
    return StepByStep(lstm_step, rule, 2) if kind == "lstm" else StepByStep(gru_step, rule, 1)
