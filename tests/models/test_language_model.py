"""The language model keeps the trainer's contract and computes what its docstring says."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from dni_seq.models.language_model import LanguageModel, token_losses

V, T, B = 11, 6, 3


def model_and_tokens(**settings) -> tuple[LanguageModel, torch.Tensor]:
    torch.manual_seed(0)
    settings = {"embed": 8, "hidden": 8, "layers": 2} | settings
    return LanguageModel(V, **settings).double(), torch.randint(V, (T, B))


@pytest.mark.parametrize("cell", ["lstm", "gru"])
@pytest.mark.parametrize("layers", [1, 2])
def test_shapes_and_state(cell, layers):
    model, tokens = model_and_tokens(cell=cell, layers=layers)
    logits, state = model(tokens, model.initial_state(B))
    assert logits.shape == (T, B, V)
    leaves = state if cell == "lstm" else (state,)
    assert [leaf.shape for leaf in leaves] == [(layers, B, 8)] * len(leaves)
    initial = model.initial_state(B)
    for leaf, start in zip(leaves, initial if cell == "lstm" else (initial,), strict=True):
        assert start.dtype == leaf.dtype == torch.float64
        assert not start.any()


@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_two_windows_equal_one(cell):
    model, tokens = model_and_tokens(cell=cell)
    whole, end = model(tokens, None)
    first, middle = model(tokens[:2], model.initial_state(B))
    second, end_of_two = model(tokens[2:], middle)
    # The same products in another grouping: equal up to float64 rounding.
    torch.testing.assert_close(torch.cat([first, second]), whole, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(end_of_two, end, rtol=1e-12, atol=1e-12)


def test_lanes_are_independent():
    model, tokens = model_and_tokens()
    changed = tokens.clone()
    changed[:, 1] = (changed[:, 1] + 1) % V
    before, _ = model(tokens, None)
    after, _ = model(changed, None)
    torch.testing.assert_close(before[:, [0, 2]], after[:, [0, 2]], rtol=1e-12, atol=1e-12)
    assert not torch.allclose(before[:, 1], after[:, 1])


def test_dropout_only_in_training():
    model, tokens = model_and_tokens(dropout=0.5)
    assert not torch.equal(model(tokens)[0], model(tokens)[0])
    model.eval()
    assert torch.equal(model(tokens)[0], model(tokens)[0])


def test_tied_weights_are_one_parameter():
    model, tokens = model_and_tokens(tied=True)
    untied, _ = model_and_tokens(tied=False)
    assert model.projection.weight is model.embedding.weight
    saved = sum(p.numel() for p in untied.parameters()) - sum(p.numel() for p in model.parameters())
    assert saved == V * 8
    model(tokens)[0].sum().backward()
    # The projection's gradient reaches every row; the embedding's alone only those of the tokens read.
    assert model.embedding.weight.grad.abs().sum(dim=1).gt(0).all()


def test_token_losses_are_nats_of_each_step():
    logits = torch.randn(T, B, V, dtype=torch.float64)
    targets = torch.randint(V, (T, B))
    losses = token_losses(logits, targets)
    expected = -functional.log_softmax(logits, dim=-1)[2, 1, targets[2, 1]]
    assert losses.shape == (T, B)
    assert losses.dtype == torch.float64
    torch.testing.assert_close(losses[2, 1], expected)
    assert token_losses(logits.bfloat16(), targets).dtype == torch.float32


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tied": True, "embed": 4}, "embed 4 and hidden 8"),
        ({"cell": "rnn"}, "lstm, gru"),
        ({"layers": 0}, "layers must be 1 or more"),
        ({"hidden": -1}, "hidden must be 1 or more"),
        ({"dropout": 1.0}, "below 1"),
        ({"dropout": float("nan")}, "below 1"),
    ],
)
def test_bad_settings_say_what_to_change(settings, message):
    with pytest.raises(ValueError, match=message):
        model_and_tokens(**settings)
