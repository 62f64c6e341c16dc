"""SequenceTrainer.describe: which optimizer trains a parameter, which gradients reach it, and what is never trained."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import dni_seq as dni
from dni_seq.core.optimizer_step import JoinedOptimizer
from tests import problems
from tests.nests import assert_same
from tests.training import LANES, sequence_trainer

STEPS = 4


def window():
    inputs, targets = problems.tokens(STEPS, LANES).split([STEPS, 1])
    return dni.Window(inputs, torch.cat([inputs[1:], targets]))


class Model(problems.StackedLSTM):
    """An LSTM whose readout has dropout, with a part that only the state depends on, and one that nothing does."""

    def __init__(self):
        super().__init__()
        self.last = nn.Linear(5, 5)
        self.spare = nn.Linear(2, 2)

    def forward(self, tokens, state):
        outputs, (h, c) = self.rnn(self.embedding(tokens), state)
        return self.readout(nn.functional.dropout(outputs, 0.5, self.training)), (h, self.last(c))


def make(synthesizer=True, model=None, optimizer=None, loss_fn=problems.mean, **settings):
    torch.manual_seed(0)
    model = Model() if model is None else model
    if synthesizer:
        settings["synthesizer"] = dni.Normalized(dni.GatedCells(dni.BasicSynthesizer(10, n_hidden=1)))
    optimizer = torch.optim.Adam(model.parameters(), 1e-2) if optimizer is None else optimizer
    return sequence_trainer(model, optimizer, loss_fn, **settings)


def step(trainer):
    trainer.step(*window()[:2])


def by_module(description):
    """The optimizer, gradients and reason of each module, whose parameters all agree."""
    found = {}
    for each in description.parameters:
        found.setdefault(each.module, set()).add((each.optimizer, each.gradients, each.idle))
    return {module: rows.pop() for module, rows in found.items() if len(rows) == 1}


def test_credit_by_module():
    assert by_module(make().describe(window())) == {
        "model.embedding": ("model's", ("window", "message"), None),
        "model.rnn": ("model's", ("window", "message"), None),
        "model.readout": ("model's", ("window",), None),
        "model.last": ("model's", ("message",), None),
        "model.spare": ("model's", (), "no gradient reaches it"),
        "synthesizer.synthesizer": ("synthesizer's", ("own loss",), None),
    }


def test_without_a_synthesizer_there_is_no_message():
    found = by_module(make(synthesizer=False).describe(window()))
    assert found["model.rnn"] == ("model's", ("window",), None)
    assert found["model.last"] == ("model's", (), "no gradient reaches it")


def test_an_auxiliary_task_reaches_what_the_first_step_uses():
    model = Model()
    found = by_module(make(model=model, auxiliary=dni.AuxiliaryTask(model.initial_state(1))).describe(window()))
    assert found["model.rnn"][1] == ("window", "message", "auxiliary task")
    assert found["model.readout"][1] == ("window",)
    assert found["auxiliary task.network"] == ("synthesizer's", ("own loss",), None)


def test_the_message_starts_at_the_last_state_also_with_an_auxiliary_task():
    class Later(Model):
        """Its last layer is not used in the first step, which is run alone for the auxiliary task."""

        def forward(self, tokens, state):
            outputs, (h, c) = super().forward(tokens, state)
            return outputs, (h, self.spare(c[..., :2]).mean() + c if len(tokens) > 1 else c)

    model = Later()
    found = by_module(make(model=model, auxiliary=dni.AuxiliaryTask(model.initial_state(1))).describe(window()))
    assert found["model.spare"][1] == ("message",)


def test_a_detached_state_gets_no_message():
    class Detached(Model):
        def forward(self, tokens, state):
            outputs, state = super().forward(tokens, state)
            return outputs, tuple(leaf.detach() for leaf in state)

    found = by_module(make(model=Detached()).describe(window()))
    assert found["model.rnn"][1] == ("window",)


def test_the_first_state_may_be_the_models_own():
    model = problems.PlainGRU()
    found = by_module(make(False, model=model).describe(window()))
    assert found["model.rnn"] == ("model's", ("window",), None)


def test_a_compiled_model_has_the_modules_of_the_model():
    model = Model()
    compiled = torch.compile(model, backend="eager")
    trainer = make(model=compiled, initial_state=model.initial_state)
    assert by_module(trainer.describe(window())) == by_module(make().describe(window()))


def test_what_is_known_without_a_window():
    model = Model()
    model.embedding.requires_grad_(False)
    optimizer = torch.optim.Adam([*model.rnn.parameters(), *model.embedding.parameters()])
    trainer = make(model=model, optimizer=optimizer)
    found = by_module(trainer.describe())
    assert found["model.rnn"] == ("model's", None, None)
    assert found["model.embedding"] == ("model's", None, "requires_grad is False")
    assert found["model.readout"] == (None, None, "in no optimizer")
    assert {each.name for each in trainer.describe().idle} == {
        "embedding.weight",
        *(f"{name}.{kind}" for name in ("readout", "last", "spare") for kind in ("weight", "bias")),
    }


@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.SGD])
def test_after_steps_a_missing_gradient_is_known_without_a_window(kind):
    model = Model()
    trainer = make(model=model, optimizer=kind(model.parameters(), 1e-3))
    assert by_module(trainer.describe())["model.spare"] == ("model's", None, None)
    step(trainer)
    found = by_module(trainer.describe())
    assert found["model.spare"] == ("model's", None, "no gradient so far")
    assert found["model.rnn"] == ("model's", None, None)
    trainer.optimizer.zero_grad()
    if kind is torch.optim.Adam:  # its moments still show what was trained
        assert by_module(trainer.describe())["model.spare"][2] == "no gradient so far"


def test_joined_optimizers_and_parameters_of_the_loss():
    class Loss(nn.Module):
        def __init__(self):
            super().__init__()
            self.readout = nn.Linear(problems.VOCABULARY, problems.VOCABULARY)

        def forward(self, outputs, targets):
            return problems.unreduced(self.readout(outputs), targets)

    model, loss = Model(), Loss()
    other = nn.Parameter(torch.zeros(3))
    parts = [torch.optim.SGD(model.embedding.parameters(), 0.1), torch.optim.Adam([*model.rnn.parameters(), other])]
    trainer = make(model=model, loss_fn=loss, optimizer=JoinedOptimizer([*parts, torch.optim.SGD(loss.parameters(), 0.1)]))
    found = by_module(trainer.describe(window()))
    assert found["model.embedding"] == ("model's", ("window", "message"), None)
    assert found["loss_fn.readout"] == ("model's", ("window",), None)
    assert found["other"] == ("model's", (), "no gradient reaches it")
    assert found["model.readout"] == (None, ("window",), "in no optimizer")
    step(trainer)
    trainer.optimizer.zero_grad()
    found = by_module(trainer.describe())
    assert found["model.rnn"] == ("model's", None, None)  # the moments of a part show that it was trained
    assert found["other"] == ("model's", None, "no gradient so far")


def test_the_table_is_short_and_aligned():
    text = str(make().describe(window()))
    assert text == repr(make().describe(window()))
    assert text.splitlines() == [
        "module                   parameters      optimizer      gradient",
        "model.embedding          1 (28 values)   model's        window + message",
        "model.rnn                8 (460 values)  model's        window + message",
        "model.readout            2 (42 values)   model's        window",
        "model.last               2 (30 values)   model's        message",
        "model.spare              2 (6 values)    model's        not trained: no gradient reaches it",
        "synthesizer.synthesizer  4 (220 values)  synthesizer's  own loss",
    ]
    assert "model.rnn                8 (460 values)  model's        unknown without a window" in str(make().describe())


@pytest.mark.parametrize("steps", [0, 2])
def test_training_goes_on_as_if_nothing_was_described(steps):
    one, other = make(), make()
    torch.manual_seed(1)
    for _ in range(steps):
        step(one)
    before = copy.deepcopy((one.state_dict(), torch.get_rng_state(), [p.grad for p in one.model.parameters()]))
    one.describe(window())
    assert one.runner.reduces is (steps == 0)  # problems.mean returns a scalar, as no step has found out yet
    assert_same((one.state_dict(), torch.get_rng_state(), [p.grad for p in one.model.parameters()]), before)
    step(one)
    torch.manual_seed(1)
    for _ in range(steps + 1):
        step(other)
    assert_same(one.state_dict(), other.state_dict())


def test_a_window_that_does_not_fit_is_refused():
    inputs, targets = window()[:2]
    with pytest.raises(ValueError, match="they must agree"):
        make().describe(dni.Window(inputs, targets[:, :-1]))
