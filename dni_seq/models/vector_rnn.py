"""A recurrent network that maps vectors to vectors: a recurrent cell, and a linear readout.

Legend: T = window length, B = lanes, D = inputs, O = outputs, H = hidden units, L = layers.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from dni_seq.models.lstm_kernels import native_up_to, run_rnn, run_rnn_in_parts
from dni_seq.models.recurrent import build_rnn, initial_state


class VectorRNN(nn.Module):
    """Maps a vector to a vector at each step of B lanes: `model(inputs, state) -> (outputs, state)`.

    Args:
        input_size: D, the size of an input vector.
        output_size: O, the size of an output vector.
        cell: "lstm", whose state is (h, c), each [L, B, H]; "gru", whose state is h [L, B, H]; or a diagonal cell, "mingru"
            or "lru", see `DiagonalRNN`.
        hidden: H, the number of hidden units in a layer.
        layers: L, the number of recurrent layers.
        traces: the traces that the state carries, for credit from before the window: see `build_rnn`. None for no traces.
        trace_decay: α of factored traces, see `build_rnn`; None for the default.

    Attributes:
        rnn: the recurrent network.
        readout: nn.Linear(H, O).
        native_steps: longest window, in steps, that runs on PyTorch's native LSTM kernel on the CPU; see
            `lstm_kernels.native_up_to`.

    Raises:
        ValueError: the cell is unknown, a size is below 1, or `build_rnn` rejects the traces or their decay.
    """

    def __init__(
        self,
        input_size: int,
        output_size: int,
        *,
        cell: str = "lstm",
        hidden: int = 256,
        layers: int = 1,
        traces: str | None = None,
        trace_decay: float | None = None,
    ):
        super().__init__()
        sizes = {"input_size": input_size, "output_size": output_size, "hidden": hidden, "layers": layers}
        for name, size in sizes.items():
            if size < 1:
                raise ValueError(f"{name} must be 1 or more, got {size}")
        self.cell, self.hidden, self.layers = cell, hidden, layers
        self.rnn = build_rnn(cell, input_size, hidden, layers, traces=traces, trace_decay=trace_decay)
        self.native_steps = native_up_to(0)
        self.readout = nn.Linear(hidden, output_size)

    def forward(self, inputs: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        """Returns outputs [T, B, O] and the state after the last step.

        Args:
            inputs: [T, B, D].
            state: state before the first step; None for zeros.
        """
        outputs, state = run_rnn(self.rnn, inputs, state, self.native_steps)  # [T, B, H]
        return self.readout(outputs), state

    def run_in_parts(self, inputs: Tensor, state: Any, steps: int) -> tuple[Tensor, list[Any]]:
        """Does what `forward` does, and returns the outputs [T, B, O] and the state after every `steps` steps."""
        outputs, found = run_rnn_in_parts(self.rnn, inputs, state, self.native_steps, steps)
        return self.readout(outputs), found

    def initial_state(self, lanes: int) -> Any:
        """Returns a zero state for `lanes` lanes, with the dtype and the device of the parameters."""
        return initial_state(self.rnn, lanes)
