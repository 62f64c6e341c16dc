"""The recurrent cells that a model may have, by name.

Legend: B = lanes, D = inputs, H = hidden units, L = layers.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from dni_seq.models.diagonal_rnn import DIAGONAL, DiagonalRNN

CELLS = ("lstm", "gru", *DIAGONAL)


def build_rnn(cell: str, inputs: int, hidden: int, layers: int, dropout: float = 0.0, traces: bool = False) -> nn.Module:
    """Returns a recurrent network `rnn(inputs, state) -> (outputs [T, B, H], state)`.

    Args:
        cell: one of `CELLS`.
        inputs: D.
        hidden: H.
        layers: L.
        dropout: between layers.
        traces: whether the state carries traces, for a diagonal cell.

    Raises:
        ValueError: the cell is unknown, or has no exact traces because its recurrence mixes units.
    """
    if cell not in CELLS:
        raise ValueError(f"cell must be one of {', '.join(CELLS)}, got {cell!r}")
    if cell in DIAGONAL:
        return DiagonalRNN(cell, inputs, hidden, layers, dropout=dropout, traces=traces)
    if traces:
        raise ValueError(f"exact traces need a diagonal cell ({', '.join(DIAGONAL)}): the recurrence of {cell} mixes units")
    kind = nn.LSTM if cell == "lstm" else nn.GRU
    # Dropout is applied between layers, and PyTorch warns if there is only one layer.
    return kind(inputs, hidden, layers, dropout=dropout if layers > 1 else 0.0)


def initial_state(rnn: nn.Module, lanes: int) -> Any:
    """Returns a zero state of `build_rnn`'s network, with the dtype and the device of its parameters.

    (h, c), each [L, B, H], for an LSTM; h [L, B, H] for a GRU; see `DiagonalRNN` for the others.
    """
    if isinstance(rnn, DiagonalRNN):
        return rnn.initial_state(lanes)
    assert isinstance(rnn, nn.LSTM | nn.GRU)
    hidden = next(rnn.parameters()).new_zeros((rnn.num_layers, lanes, rnn.hidden_size))
    return (hidden, torch.zeros_like(hidden)) if isinstance(rnn, nn.LSTM) else hidden
