"""Scores a language model on a split: loss in nats per token, perplexity, bits per character.

Legend: T = window length, B = lanes, V = vocabulary size.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import nn

from dni_seq.app.runs.tensorboard import perplexity
from dni_seq.core.states import reset_lanes
from dni_seq.core.windows import Window, counted
from dni_seq.distributed.data_parallel import DataParallel, SingleProcess
from dni_seq.models.language_model import token_losses


class Score(NamedTuple):
    """A model's score on a split.

    Attributes:
        loss: mean cross-entropy, nats per token.
        ppl: perplexity per token, exp(loss).
        bpc: bits per character of the tokens' text.
        word_ppl: perplexity per word; a line end counts as a word. bpc and word_ppl can be compared between tokenizers.
    """

    loss: float
    ppl: float
    bpc: float
    word_ppl: float


def evaluate(
    model: nn.Module,
    windows: Iterable[Window],
    *,
    autocast: torch.dtype | None = None,
    parallel: DataParallel | None = None,
) -> float:
    """Returns the loss of `model` on `windows` in nats per token, without dropout.

    The state is carried from window to window, and every token that counts has the same weight. The model's training mode
    is restored afterwards.

    Args:
        model: `model(inputs, state) -> (logits [T, B, V], state)` with `initial_state(B)`.
        windows: the split, on the model's device. T may differ from T in training.
        autocast: dtype of `torch.autocast`, None for full precision.
        parallel: selects this rank's lanes of `windows` and sums the loss over all ranks; the call is then collective.
            None for one process.

    Raises:
        ValueError: there is no token to score.
    """
    parallel = SingleProcess() if parallel is None else parallel
    loss, tokens = 0.0, 0
    state = None
    with evaluating(model), torch.no_grad():
        for window in windows:
            window = parallel.window(window)
            lanes = window.inputs.shape[1]
            if state is None:
                state = model.initial_state(lanes)  # type: ignore[operator]
            with torch.autocast(window.inputs.device.type, autocast, enabled=autocast is not None):
                logits, state = model(window.inputs, state)
            keep = counted(window)
            loss += float(token_losses(logits, window.targets)[keep].sum())
            tokens += int(keep.sum())
            if window.ends is not None:
                state = reset_lanes(state, window.ends, model.initial_state(lanes), 1)  # type: ignore[operator]
    loss, tokens = parallel.sum(torch.tensor([loss, tokens], dtype=torch.float64)).tolist()
    if tokens == 0:
        raise ValueError("there is no token to score")
    return loss / tokens


def score_of(loss: float, characters_per_token: float, words_per_token: float) -> Score:
    """Returns the score for a loss in nats per token and the mean number of characters and words per token."""
    return Score(loss, perplexity(loss), loss / math.log(2) / characters_per_token, perplexity(loss / words_per_token))


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Puts `model` in evaluation mode inside the context and restores its mode afterwards."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)
