"""Reads from a model and an example of its inputs what a recommended synthesizer needs.

Legend: T = window length in steps, B = lanes, K = horizons, V = token ids, E, Q = widths of inputs and outputs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from dni_seq.core.snapshot import buffers_apart
from dni_seq.core.states import State
from dni_seq.core.windows import Nest
from dni_seq.synthesizers.defaults import default_horizons
from dni_seq.synthesizers.future_model import FutureModel
from dni_seq.synthesizers.normalization import LSTM_CELLS
from dni_seq.synthesizers.token_classes import among_the_first, token_embedding

EMBED = 32
"""Width of a synthesizer's own embedding of an input."""


def future_for(
    loss_fn: Callable[[Any, Tensor], Tensor],
    inputs: Nest,
    vocabulary: int | None,
    outputs: int | None,
    horizons: int | None,
    classes: int,
    units: int,
) -> Callable[[int], FutureModel]:
    """Returns a function that makes a future model from the size of a lane's packed state.

    The arguments are those of `FutureGradient.for_model`.

    Raises:
        ValueError: not exactly one of `vocabulary` and `outputs` is given, or `inputs` does not fit it.
    """
    if (vocabulary is None) == (outputs is None):
        raise ValueError("give either vocabulary, for token ids, or outputs, the width of the model's outputs")
    if not isinstance(inputs, Tensor):
        kind = type(inputs).__name__
        raise ValueError(f"example_inputs is a {kind}, for_model needs a tensor: build a FutureModel with your own inputs=")
    ids, kind = vocabulary is not None, f"{inputs.dtype} {list(inputs.shape)}"
    if ids and (inputs.is_floating_point() or inputs.dim() != 2):
        raise ValueError(f"vocabulary is for token ids [T, B], example_inputs is {kind}: give outputs instead")
    if not ids and (not inputs.is_floating_point() or inputs.dim() != 3):
        raise ValueError(f"outputs is for vectors [T, B, E], example_inputs is {kind}: give vocabulary instead")
    width, many = vocabulary or outputs or 0, vocabulary is not None and vocabulary > classes
    if many:
        loss_fn, width = among_the_first(loss_fn, classes), classes
    parts = horizons if horizons is not None else 1 if many else default_horizons(len(inputs))

    def make(size: int) -> FutureModel:
        encoder: nn.Module
        if vocabulary is not None:
            encoder = token_embedding(vocabulary, classes, EMBED)
        else:
            encoder = nn.Linear(inputs.shape[-1], EMBED)
        sizes = {"inputs_width": EMBED, "outputs": width, "units": units, "parts": parts}
        return FutureModel(size, parts * len(inputs), inputs=encoder, loss_fn=loss_fn, **sizes)

    return make


@torch.no_grad()
def example_state(model: nn.Module, inputs: Tensor) -> State:
    """Returns a state of one lane: the model's initial state, or its state after one lane of `inputs` [T, B, ...]."""
    initial: Callable[[int], State] | None = getattr(model, "initial_state", None)
    if initial is not None:
        return initial(1)
    with torch.random.fork_rng(), buffers_apart(model):
        return model(inputs[:, :1], None)[1]


def lstm_cells(model: nn.Module, example: State) -> Any:
    """Returns `LSTM_CELLS` if the model holds an LSTM of PyTorch and its state is a pair of tensors, else False."""
    pair = isinstance(example, tuple) and len(example) == 2 and all(isinstance(leaf, Tensor) for leaf in example)
    return LSTM_CELLS if pair and any(isinstance(part, (nn.LSTM, nn.LSTMCell)) for part in model.modules()) else False
