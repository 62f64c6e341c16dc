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
        dropout: between layers.
        traces: what the state carries: "exact" for a diagonal cell, "snap1" or "factored" for an LSTM or GRU, None for none.
        trace_decay: α of factored traces, from 0, which reaches back by one step, to below 1; None for its default.

    Raises:
        ValueError: the cell is unknown, the traces are not made for it, or the decay does not fit the traces.
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
    """Returns a zero state of `build_rnn`'s network, with the dtype and the device of its parameters.

    (h, c), each [L, B, H], for an LSTM; h [L, B, H] for a GRU; see `DiagonalRNN` for the others.
    """
    if isinstance(rnn, DiagonalRNN | DenseRNN):
        return rnn.initial_state(lanes)
    assert isinstance(rnn, nn.LSTM | nn.GRU)
    hidden = next(rnn.parameters()).new_zeros((rnn.num_layers, lanes, rnn.hidden_size))
    return (hidden, torch.zeros_like(hidden)) if isinstance(rnn, nn.LSTM) else hidden


def state_cells(rnn: nn.Module) -> Any:
    """Returns which leaves of the state are LSTM cells, for synthesizers: a tuple like the state, or False for none."""
    if isinstance(rnn, nn.LSTM):
        return LSTM_CELLS
    if isinstance(rnn, DenseRNN) and isinstance(rnn.rnn, nn.LSTM):
        return (*LSTM_CELLS, *(False for _ in rnn.initial_state(1)[2:]))
    return False
