"""A stack of diagonal recurrent layers with normalisation and residual connections.

Legend: T = window length, B = lanes, D = inputs, H = width, L = layers, S = size of a layer's state in a lane.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from dni_seq.core import traces
from dni_seq.models.cells import DIAGONAL
from dni_seq.models.diagonal_cells import LRU, MinGRU


class MinGRUBlock(nn.Module):
    """Computes y = x + minGRU(norm(x)) and returns y + MLP(norm(y)).

    Source: Feng et al. 2024, arXiv 2410.01201, section 4. The language models of the paper also have a convolution over four
    steps. The convolution is left out here, because its last inputs would be a further part of the state.

    Args:
        width: H.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.cell = MinGRU(width, width)
        self.norm, self.inner_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, inputs: Tensor, state: Tensor, carried: Sequence[Tensor]) -> tuple[Tensor, Tensor, Sequence[Tensor]]:
        """Returns outputs [T, B, H], the last state [B, S] and its traces."""
        states, carried = self.cell(self.norm(inputs), state, carried)
        hidden = inputs + states
        return hidden + self.mlp(self.inner_norm(hidden)), states[-1], carried


class LRUBlock(nn.Module):
    """Computes x + GLU(linear(GELU(LRU(norm(x))))).

    Source: Orvieto et al. 2023, arXiv 2303.06349, section 2.1 and figure 1, with layer normalisation.

    Args:
        width: H, and the number of complex units.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.cell = LRU(width, width)
        self.norm = nn.LayerNorm(width)
        self.mix = nn.Linear(width, 2 * width)

    def forward(self, inputs: Tensor, state: Tensor, carried: Sequence[Tensor]) -> tuple[Tensor, Tensor, Sequence[Tensor]]:
        """Returns outputs [T, B, H], the last state [B, S] and its traces."""
        outputs, state, carried = self.cell(self.norm(inputs), state, carried)
        return inputs + functional.glu(self.mix(functional.gelu(outputs))), state, carried


class DiagonalRNN(nn.Module):
    """A stack of minGRU or LRU layers: `rnn(inputs, state) -> (outputs, state)`.

    With `traces` the state carries the derivative of each layer's state with respect to the recurrent parameters of the same
    layer. The gradient of a window's loss then includes the credit of these parameters from before the window. The gradient
    is exact for the recurrent parameters of the last layer and for all parameters after them. A parameter before a recurrent
    layer, such as one of an earlier layer, loses the credit that reaches it from later windows through that layer's state.

    Args:
        kind: "mingru" or "lru".
        inputs: D; a linear map projects the inputs to H if D differs from H.
        width: H, the number of outputs and of units of every layer.
        layers: L.
        dropout: dropout probability after every layer.
        traces: whether the state carries traces.

    Attributes:
        traced_parameters: the parameters that traces belong to; empty without traces.

    Raises:
        ValueError: the kind is unknown.
    """

    def __init__(
        self, kind: str, inputs: int, width: int, layers: int = 1, *, dropout: float = 0.0, traces: bool = False
    ) -> None:
        super().__init__()
        if kind not in DIAGONAL:
            raise ValueError(f"kind must be one of {', '.join(DIAGONAL)}, got {kind!r}")
        block = MinGRUBlock if kind == "mingru" else LRUBlock
        self.enter = nn.Linear(inputs, width) if inputs != width else nn.Identity()
        self.blocks = nn.ModuleList(block(width) for _ in range(layers))
        self.dropout = nn.Dropout(dropout)
        self.norm = nn.LayerNorm(width)
        self.traces = traces

    @property
    def cells(self) -> list[MinGRU | LRU]:
        """The recurrent cell of every layer."""
        return [block.cell for block in self.blocks]  # type: ignore[misc]

    @property
    def traced_parameters(self) -> list[Tensor]:
        """The parameters that traces belong to."""
        return [parameter for cell in self.cells for parameter in cell.own_parameters] if self.traces else []

    def initial_state(self, lanes: int) -> Any:
        """Returns a zero state [L, B, S]; with `traces` a pair of that tensor and a tuple of traces, each [L, B, ...]."""
        state = self.norm.weight.new_zeros(len(self.blocks), lanes, self.cells[0].width)
        if not self.traces:
            return state
        each = zip(*(cell.initial_traces(lanes) for cell in self.cells), strict=True)
        return state, tuple(traces.carry([torch.stack(layers) for layers in each], state))

    def forward(self, inputs: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        """Returns outputs [T, B, H] and the state after the last step.

        Args:
            inputs: [T, B, D].
            state: see `initial_state`; None for zeros.
        """
        if state is None:
            state = self.initial_state(inputs.shape[1])
        hidden, carried = state if self.traces else (state, ())
        outputs = self.enter(inputs)
        last, kept = [], []
        for i, block in enumerate(self.blocks):
            outputs, after, own = block(outputs, hidden[i], [trace[i] for trace in carried])
            outputs = self.dropout(outputs)
            last.append(after)
            kept.append(own)
        result = torch.stack(last)
        if self.traces:
            # Without gradients the cells return the traces unchanged: nothing is trained, and updating them is costly.
            moved = [torch.stack(layers).as_subclass(traces.Trace) for layers in zip(*kept, strict=True)]
            return self.norm(outputs), (result, tuple(moved))
        return self.norm(outputs), result
