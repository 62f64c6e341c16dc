"""A `ModelSpec` for tests of the builders."""

from __future__ import annotations

from torch import nn

import dni_seq as dni
from dni_seq.app.build.credit import LossFn, ModelSpec
from dni_seq.models.vector_rnn import VectorRNN
from dni_seq.synthesizers.for_model import EMBED


def squared(outputs, targets):
    return (outputs - targets).square().mean(-1)


def spec_of_vectors(outputs: int = 2, loss_fn: LossFn = squared) -> ModelSpec:
    """Of a small LSTM on vectors of two numbers."""
    model = VectorRNN(2, 2, hidden=8)
    return ModelSpec(
        model,
        loss_fn,
        example=model.initial_state(1),
        cells=dni.LSTM_CELLS,
        encode=lambda: (nn.Linear(2, EMBED), nn.Linear(2, EMBED)),
        outputs=outputs,
        past_loss=squared,
        inputs=2,
    )
