"""A recurrent network that maps vectors to vectors: LSTM or GRU, and a linear readout.

Legend: T = window length, B = lanes, D = inputs, O = outputs, H = hidden units, L = layers.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dni_seq.models.cells import CELLS
from dni_seq.models.language_model import LSTMState
from dni_seq.models.lstm_kernels import native_up_to, run_rnn


class VectorRNN(nn.Module):
    """Maps a vector to a vector at each step of B lanes: `model(inputs, state) -> (outputs, state)`.

    Args:
        input_size: D, the size of an input vector.
        output_size: O, the size of an output vector.
        cell: "lstm", whose state is (h, c), each [L, B, H], or "gru", whose state is h [L, B, H].
        hidden: H, the number of hidden units in a layer.
        layers: L, the number of recurrent layers.

    Attributes:
        rnn: the nn.LSTM or nn.GRU.
        readout: nn.Linear(H, O).
        native_steps: longest window, in steps, that runs on PyTorch's native LSTM kernel on the CPU; see
            `lstm_kernels.native_up_to`.

    Raises:
        ValueError: the cell is unknown, or a size is below 1.
    """

    def __init__(self, input_size: int, output_size: int, *, cell: str = "lstm", hidden: int = 256, layers: int = 1):
        super().__init__()
        sizes = {"input_size": input_size, "output_size": output_size, "hidden": hidden, "layers": layers}
        for name, size in sizes.items():
            if size < 1:
                raise ValueError(f"{name} must be 1 or more, got {size}")
        if cell not in CELLS:
            raise ValueError(f"cell must be one of {', '.join(CELLS)}, got {cell!r}")
        self.cell, self.hidden, self.layers = cell, hidden, layers
        kind = nn.LSTM if cell == "lstm" else nn.GRU
        self.rnn = kind(input_size, hidden, layers)
        self.native_steps = native_up_to(0)
        self.readout = nn.Linear(hidden, output_size)

    def forward(self, inputs: Tensor, state: Tensor | LSTMState | None = None) -> tuple[Tensor, Tensor | LSTMState]:
        """Returns outputs [T, B, O] and the state after the last step.

        Args:
            inputs: [T, B, D].
            state: state before the first step; None for zeros.
        """
        outputs, state = run_rnn(self.rnn, inputs, state, self.native_steps)  # [T, B, H]
        return self.readout(outputs), state

    def initial_state(self, lanes: int) -> Tensor | LSTMState:
        """Returns a zero state for `lanes` lanes, with the dtype and the device of the parameters."""
        hidden = self.readout.weight.new_zeros((self.layers, lanes, self.hidden))
        return hidden if self.cell == "gru" else (hidden, torch.zeros_like(hidden))
