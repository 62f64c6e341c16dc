"""A model that runs a window in parts itself gives what calls of it part by part give."""

from __future__ import annotations

import pytest
import torch

import dni_seq as dni
from dni_seq.core import states
from dni_seq.core.windows import Nest
from dni_seq.credit.window_runner import WindowRunner
from dni_seq.models.language_model import LanguageModel, token_losses
from dni_seq.models.vector_rnn import VectorRNN

T, LANES, EXACT = 7, 3, {"rtol": 1e-12, "atol": 1e-14}

CELLS = [("lstm", None), ("gru", None), ("mingru", None), ("lru", None), ("lru", "exact"), ("lstm", "factored")]


def parts_of(model, inputs: Nest, steps):
    """Outputs and states by calls of the model."""
    state, outputs, found = model.initial_state(LANES), [], []
    for begin in range(0, T, steps):
        output, state = model(inputs[begin : begin + steps], state)
        outputs.append(output)
        found.append(state)
    return torch.cat(outputs), found


@pytest.mark.parametrize("steps", [1, 3, 7, 9])
@pytest.mark.parametrize(("cell", "traces"), CELLS)
@pytest.mark.parametrize("kind", ["tokens", "vectors"])
def test_outputs_and_states_are_those_of_calls(kind, cell, traces, steps):
    torch.manual_seed(0)
    if kind == "tokens":
        model = LanguageModel(11, embed=4, hidden=6, layers=2, cell=cell, traces=traces).double()
        inputs = torch.randint(11, (T, LANES))
    else:
        model = VectorRNN(4, 2, hidden=6, layers=2, cell=cell, traces=traces).double()
        inputs = torch.randn(T, LANES, 4, dtype=torch.float64)
    outputs, found = model.run_in_parts(inputs, model.initial_state(LANES), steps)
    expected, by_calls = parts_of(model, inputs, steps)
    torch.testing.assert_close(outputs, expected, **EXACT)
    assert len(found) == len(by_calls)
    for one, other in zip(found, by_calls, strict=True):
        for leaf, same in zip(states.floating(one), states.floating(other), strict=True):
            torch.testing.assert_close(leaf, same, **EXACT)


def runner_of(model):
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    runner: WindowRunner = dni.SequenceTrainer(model, optimizer, token_losses).runner
    return runner


def test_the_trainer_asks_a_model_for_its_own_way_unless_it_is_compiled(monkeypatch):
    model = LanguageModel(11, embed=4, hidden=6)
    asked, calls = [], []
    monkeypatch.setattr(
        model, "run_in_parts", lambda inputs, state, steps: asked.append(steps) or parts_of(model, inputs, steps)
    )
    model.register_forward_hook(lambda *_: calls.append(1))
    tokens = torch.randint(11, (T, LANES))
    runner_of(model).run_in_parts(tokens, None, 3)
    assert (asked, len(calls)) == ([3], 3)
    monkeypatch.setattr(model, "_compiled_call_impl", lambda *parts: LanguageModel.forward(model, *parts))
    outputs, found = runner_of(model).run_in_parts(tokens, None, 4)
    assert (asked, len(found), len(outputs)) == ([3], 2, T)
