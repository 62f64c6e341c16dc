"""Builds the recurrent network of a model by the name of its cell.

Legend: B = lanes, D = inputs, H = hidden units, L = layers.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from dni_seq.models.cells import APPROXIMATE, CELLS, DIAGONAL, checked_decay
from dni_seq.models.dense_cells import DenseRNN
from dni_seq.models.diagonal_rnn import DiagonalRNN
from dni_seq.synthesizers.normalization import LSTM_CELLS


def build_rnn(
    cell: str,
    inputs: int,
    hidden: int,
    layers: int,
    dropout: float = 0.0,
    traces: str | None = None,
    trace_decay: float | None = None,
) -> nn.Module:
    """Returns a recurrent network `rnn(inputs, state) -> (outputs [T, B, H], state)`.

    Args:
        cell: one of `CELLS`.
        inputs: D.
        hidden: H.
        layers: L.
        dropout: dropout probability between layers; for a diagonal cell after every layer.
        traces: the traces that the state carries: "exact" for a diagonal cell, "snap1" or "factored" for an LSTM or a GRU.
            None for no traces.
        trace_decay: α of factored traces, at least 0 and below 1. With α = 0 a trace reaches back by one step only. None for
            `cells.TRACE_DECAY`.

    Raises:
        ValueError: the cell is unknown, the traces are made for another kind of cell, or the decay is outside its range or
            given without factored traces.
    """
    checked_decay(traces, trace_decay)
    if cell not in CELLS:
        raise ValueError(f"cell must be one of {', '.join(CELLS)}, got {cell!r}")
    if cell in DIAGONAL:
        if traces not in (None, "exact"):
            raise ValueError(f"{traces} traces are made for lstm and gru: {cell} is diagonal and has exact traces")
        return DiagonalRNN(cell, inputs, hidden, layers, dropout=dropout, traces=traces is not None)
    if traces == "exact":
        raise ValueError(
            f"exact traces need a diagonal cell ({', '.join(DIAGONAL)}): the recurrence of {cell} mixes units, which "
            f"{' or '.join(APPROXIMATE)} traces ignore"
        )
    if traces is not None:
        return DenseRNN(cell, inputs, hidden, layers, dropout=dropout, traces=traces, decay=trace_decay)
    kind = nn.LSTM if cell == "lstm" else nn.GRU
    # Dropout is applied between layers, and PyTorch warns if there is only one layer.
    return kind(inputs, hidden, layers, dropout=dropout if layers > 1 else 0.0)


def initial_state(rnn: nn.Module, lanes: int) -> Any:
    """Returns a zero state for a network of `build_rnn`, with the dtype and the device of the network's parameters.

    The state is (h, c), each [L, B, H], for an LSTM, and h [L, B, H] for a GRU. For a diagonal cell see `DiagonalRNN`, for
    an LSTM or GRU with traces see `DenseRNN`.
    """
    if isinstance(rnn, DiagonalRNN | DenseRNN):
        return rnn.initial_state(lanes)
    assert isinstance(rnn, nn.LSTM | nn.GRU)
    hidden = next(rnn.parameters()).new_zeros((rnn.num_layers, lanes, rnn.hidden_size))
    return (hidden, torch.zeros_like(hidden)) if isinstance(rnn, nn.LSTM) else hidden


def state_cells(rnn: nn.Module) -> Any:
    """Returns which leaves of the state are cell states c of an LSTM: a tuple of bools like the state; False if none is."""
    if isinstance(rnn, nn.LSTM):
        return LSTM_CELLS
    if isinstance(rnn, DenseRNN) and isinstance(rnn.rnn, nn.LSTM):
        return (*LSTM_CELLS, *(False for _ in rnn.initial_state(1)[2:]))
    return False
