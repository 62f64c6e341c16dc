"""Scores are exact means over tokens, whatever the windows."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional

from dni_seq.app.lm.evaluation import evaluate, score_of
from dni_seq.core.windows import Window
from dni_seq.models.language_model import LanguageModel

V, B = 7, 2


def model_of(**settings) -> LanguageModel:
    torch.manual_seed(1)
    return LanguageModel(V, embed=5, hidden=6, layers=2, **settings).double()


def windows_of(text: torch.Tensor, length: int) -> list[Window]:
    """`text` [N + 1, B] as windows of `length` steps, the last one ragged and ending all lanes."""
    starts = range(0, len(text) - 1, length)
    return [
        Window(
            text[i : i + length][: len(text) - 1 - i], text[i + 1 : i + 1 + length], ends=torch.full((B,), i == starts[-1])
        )
        for i in starts
    ]


@pytest.mark.parametrize("length", [1, 3, 10])
def test_the_score_is_the_mean_over_all_tokens(length):
    model = model_of()
    text = torch.randint(V, (11, B))
    logits, _ = model(text[:-1])
    expected = functional.cross_entropy(logits.flatten(0, 1), text[1:].flatten()).item()
    score = score_of(evaluate(model, windows_of(text, length)), characters_per_token=3, words_per_token=0.5)
    # Sums in another order: float64 rounding.
    assert score.loss == pytest.approx(expected, rel=1e-12)
    assert score.ppl == pytest.approx(math.exp(expected), rel=1e-12)
    assert score.bpc == pytest.approx(expected / math.log(2) / 3, rel=1e-12)
    assert score.word_ppl == pytest.approx(math.exp(2 * expected), rel=1e-12)


def test_a_lane_that_ends_starts_again_from_the_initial_state():
    model = model_of()
    text = torch.randint(V, (4, B))
    once = evaluate(model, windows_of(text, 3))
    twice = evaluate(model, windows_of(text, 3) * 2)
    carried = evaluate(model, [w._replace(ends=None) for w in windows_of(text, 3) * 2])
    assert twice == pytest.approx(once, rel=1e-12)
    assert carried != pytest.approx(once, rel=1e-6)


def test_masked_steps_do_not_count():
    model = model_of()
    text = torch.randint(V, (4, B))
    (window,) = windows_of(text, 3)
    mask = torch.tensor([[True, True], [True, False], [True, False]])
    logits, _ = model(window.inputs)
    losses = functional.cross_entropy(logits.flatten(0, 1), window.targets.flatten(), reduction="none").view(3, B)
    loss = evaluate(model, [window._replace(mask=mask)])
    assert loss == pytest.approx(losses[mask].mean().item(), rel=1e-12)


@pytest.mark.parametrize("training", [True, False])
def test_no_dropout_and_the_mode_is_restored(training):
    model = model_of(dropout=0.5).train(training)
    text = torch.randint(V, (6, B))
    before = torch.get_rng_state()
    scores = {evaluate(model, windows_of(text, 2)) for _ in range(2)}
    assert len(scores) == 1
    assert model.training is training
    assert torch.equal(torch.get_rng_state(), before)


def test_half_precision_is_near_full_precision():
    # A GRU: oneDNN has no bfloat16 LSTM on many processors.
    model = model_of(cell="gru").float()
    text = torch.randint(V, (30, B))
    full = evaluate(model, windows_of(text, 8))
    half = evaluate(model, windows_of(text, 8), autocast=torch.bfloat16)
    assert half != full
    # bfloat16 keeps 8 bits: the mean of 60 losses near ln 7 moves by less than a percent.
    assert half == pytest.approx(full, rel=1e-2)


def test_nothing_to_score():
    with pytest.raises(ValueError, match="no token to score"):
        evaluate(model_of(), [])
