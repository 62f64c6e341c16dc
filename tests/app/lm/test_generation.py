"""Text is drawn from the model's distribution, and from nothing else."""

from __future__ import annotations

import pytest
import torch

from dni_seq.app.lm.generation import generate
from dni_seq.models.language_model import LanguageModel

V = 6


@pytest.fixture
def model() -> LanguageModel:
    torch.manual_seed(2)
    return LanguageModel(V, embed=4, hidden=4, layers=1, dropout=0.5)


def draw(model, length=8, seed=0, **settings) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return generate(model, torch.tensor([1, 2]), length, generator=generator, **settings)


def test_the_generator_alone_decides(model):
    before = torch.get_rng_state()
    assert draw(model) == draw(model)
    assert draw(model, length=50) != draw(model, length=50, seed=1)
    assert torch.equal(torch.get_rng_state(), before)
    assert model.training


def test_greedy_is_the_likeliest_continuation(model):
    drawn = draw(model, length=5, top_k=1)
    model.eval()
    text = torch.tensor([1, 2, *drawn])[:, None]
    logits, _ = model(text)
    assert logits[1:-1, 0].argmax(dim=-1).tolist() == drawn


def test_frequencies_are_the_models(model):
    torch.nn.init.normal_(model.projection.bias)  # else all frequencies are nearly equal
    logits, _ = model.eval()(torch.tensor([[1], [2]]))
    expected = (logits[-1, 0] / 0.5).softmax(dim=0)
    generator = torch.Generator().manual_seed(0)
    first = [generate(model, torch.tensor([1, 2]), 1, temperature=0.5, generator=generator)[0] for _ in range(2000)]
    shares = torch.bincount(torch.tensor(first), minlength=V) / 2000
    # Four standard deviations of a share of 2000 draws, at most 0.0112 each.
    assert (shares - expected).abs().max() < 0.045
    assert expected.max() - expected.min() > 0.1


def test_top_k_keeps_to_the_likeliest(model):
    logits, _ = model.eval()(torch.tensor([[1], [2]]))
    allowed = set(logits[-1, 0].topk(2).indices.tolist())
    assert {draw(model, length=1, seed=seed, top_k=2)[0] for seed in range(60)} == allowed
    assert draw(model, top_k=V + 1) == draw(model)


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"temperature": 0.0}, "temperature"), ({"top_k": 0}, "top_k"), ({"temperature": float("nan")}, "temperature")],
)
def test_bad_settings(model, settings, message):
    with pytest.raises(ValueError, match=message):
        draw(model, **settings)


def test_an_empty_prompt_and_a_diverged_model_are_refused(model):
    with pytest.raises(ValueError, match="at least one token"):
        generate(model, torch.tensor([], dtype=torch.int64), 3, generator=torch.Generator())
    torch.nn.init.constant_(model.projection.bias, float("nan"))
    with pytest.raises(ValueError, match="not finite"):
        draw(model)
