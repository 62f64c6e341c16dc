"""Builds the predictor of `FutureGradient.for_model` from a model's loss function and an example of the model's inputs.

Legend: T = window length in steps, B = lanes, K = horizons, V = token ids, E, Q = widths of inputs and outputs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dni_seq.core.snapshot import buffers_apart
from dni_seq.core.states import State
from dni_seq.core.windows import Nest
from dni_seq.synthesizers.defaults import PREDICTIONS, REACH, default_horizons, token_reach
from dni_seq.synthesizers.future_model import FutureModel
from dni_seq.synthesizers.gated_predictors import GatedFuture, GatedPast, JointPredictor
from dni_seq.synthesizers.normalization import LSTM_CELLS
from dni_seq.synthesizers.predictor import Predictor
from dni_seq.synthesizers.token_classes import among_the_first, token_embedding

EMBED = 32
"""Width of a synthesizer's own embedding of an input."""


class Text(NamedTuple):
    """What a predictor reads and predicts: token ids or vectors.

    Attributes:
        encoder: makes the encoder of inputs, `EMBED` wide.
        loss_fn: `loss_fn(outputs, targets)` of predicted outputs, unreduced losses [n, B].
        width: width of the predicted outputs.
        past_loss: `past_loss(outputs, inputs)` of predicted inputs, unreduced losses [n, B].
        past_width: width of the predicted inputs.
        parts: default number of parts of a `FutureModel`, K.
        reach: default number of steps of a `FutureModel`, m.
    """

    encoder: Callable[[], nn.Module]
    loss_fn: Callable[[Any, Tensor], Tensor]
    width: int
    past_loss: Callable[[Any, Tensor], Tensor]
    past_width: int
    parts: int
    reach: int


def read_text(
    loss_fn: Callable[[Any, Tensor], Tensor],
    inputs: Nest,
    vocabulary: int | None,
    outputs: int | None,
    classes: int,
    past_loss_fn: Callable[[Any, Tensor], Tensor] | None = None,
) -> Text:
    """Returns what a predictor reads and predicts; the arguments are those of `FutureGradient.for_model`.

    Raises:
        ValueError: `vocabulary` and `outputs` are both given or both missing; with `vocabulary`, `inputs` are not token ids
            [T, B], or `past_loss_fn` is given; with `outputs`, `inputs` are not floating-point vectors [T, B, E].
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
    window = len(inputs)
    if vocabulary is None:
        read, parts = inputs.shape[-1], default_horizons(window)
        past = past_loss_fn or squared_error
        return Text(lambda: nn.Linear(read, EMBED), loss_fn, outputs or 0, past, read, parts, parts * window)
    if past_loss_fn is not None:
        raise ValueError("past_loss_fn is for vectors: past token ids are always predicted by cross-entropy, remove it")
    width, known = min(vocabulary, classes), vocabulary
    few = vocabulary <= classes
    losses, past = (loss_fn, class_losses) if few else (among_the_first(fn, classes) for fn in (loss_fn, class_losses))
    reach = token_reach(window, few)
    return Text(lambda: token_embedding(known, classes, EMBED), losses, width, past, width, *reach)


def check_past_loss(past_loss_fn: Any, predict: str) -> None:
    """Raises ValueError if a loss of past vectors is given to a predictor that does not predict the past."""
    if past_loss_fn is not None and predict not in ("past", "both"):
        raise ValueError(f'past_loss_fn needs predict="past" or "both", got predict={predict!r}')


def predictor_for(
    text: Text, window: int, predict: str, steps: int | None, horizons: int | None, units: int
) -> Callable[[int], Any]:
    """Returns a function that makes a predictor from the size of a lane's packed state.

    Args:
        text: what the predictor reads and predicts.
        window: T.
        predict: one of `PREDICTIONS`.
        steps: m, a multiple of K. None for the default: for "horizons" K T if `horizons` is given, and `text.reach` if it is
            None; for all others `REACH`.
        horizons: K; None for `text.parts`.
        units: hidden units.

    Raises:
        ValueError: `predict` is unknown, or `horizons` is given although `predict` is not "horizons".
    """
    if predict not in PREDICTIONS:
        raise ValueError(f"predict must be one of {PREDICTIONS}, got {predict!r}")
    if predict != "horizons" and horizons is not None:
        raise ValueError(f'horizons needs predict="horizons", which has parts: remove it with predict={predict!r}')
    parts = text.parts if horizons is None else horizons
    ahead = text.reach if horizons is None else horizons * window
    usual = ahead if predict == "horizons" else REACH
    reach = usual if steps is None else steps
    read = {"inputs_width": EMBED, "outputs": text.width, "loss_fn": text.loss_fn}

    def future(size: int, units: int) -> Predictor:
        return GatedFuture(size, reach, inputs=text.encoder(), units=units, **read)  # type: ignore[arg-type]

    def past(size: int, units: int) -> Predictor:
        return GatedPast(size, reach, outputs=text.past_width, loss_fn=text.past_loss, units=units)

    def make(size: int) -> Predictor:
        if predict == "horizons":
            return FutureModel(size, reach, inputs=text.encoder(), units=units, parts=parts, **read)  # type: ignore[arg-type]
        if predict == "both":
            return JointPredictor([future(size, units // 2), past(size, units // 2)])
        return (future if predict == "future" else past)(size, units)

    return make


def class_losses(outputs: Tensor, targets: Tensor) -> Tensor:
    """Returns the cross-entropy of logits [n, B, Q] for class ids [n, B], in nats, [n, B]."""
    return F.cross_entropy(outputs.flatten(0, 1), targets.flatten(), reduction="none").view(targets.shape)


def squared_error(outputs: Tensor, targets: Tensor) -> Tensor:
    """Returns the mean squared error over the numbers of each vector, [n, B], from tensors [n, B, E]."""
    return (outputs - targets).square().mean(-1)


@torch.no_grad()
def example_state(model: nn.Module, inputs: Tensor) -> State:
    """Returns a state of one lane: the model's initial state, or its state after one lane of `inputs` [T, B, ...]."""
    initial: Callable[[int], State] | None = getattr(model, "initial_state", None)
    if initial is not None:
        return initial(1)
    with torch.random.fork_rng(), buffers_apart(model):
        return model(inputs[:, :1], None)[1]


def lstm_cells(model: nn.Module, example: State) -> Any:
    """Returns `LSTM_CELLS` if the model holds an LSTM of PyTorch and `example` is a pair of tensors, else False."""
    pair = isinstance(example, tuple) and len(example) == 2 and all(isinstance(leaf, Tensor) for leaf in example)
    return LSTM_CELLS if pair and any(isinstance(part, (nn.LSTM, nn.LSTMCell)) for part in model.modules()) else False
