"""MessageFilter: the limit on messages, decided on the host and on the device."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from dni_seq.core import states
from dni_seq.credit.message_filter import (
    LARGEST_MESSAGE,
    OBSERVED_EVERY,
    OBSERVED_FIRST,
    FilteredInterface,
    MessageFilter,
)
from dni_seq.distributed.data_parallel import SingleProcess
from tests import problems
from tests.atomic import run, windows
from tests.training import sequence_trainer


def filter_after(*observed: float) -> MessageFilter:
    found = MessageFilter(SingleProcess())
    for norm in observed:
        found.observe(torch.tensor(norm))
    return found


@pytest.mark.parametrize("observed", [(), (0.0,)], ids=["nothing", "zero"])
def test_before_the_first_gradient_every_finite_message_is_accepted(observed, decides):
    accepts = filter_after(*observed).accepts
    assert accepts(torch.tensor(1e30))
    assert not accepts(torch.tensor(math.inf))
    assert not accepts(torch.tensor(math.nan))


@pytest.mark.parametrize("later", [1.0, math.inf, -math.inf, math.nan])
def test_the_largest_finite_gradient_sets_the_limit(later, decides):
    """A later gradient that is smaller or not finite does not change the limit."""
    found = filter_after(0.5, 2.0, later)
    assert float(found.largest) == 2.0
    assert found.accepts(torch.tensor(1.99 * LARGEST_MESSAGE))
    assert not found.accepts(torch.tensor(2.01 * LARGEST_MESSAGE))


def test_the_first_100_windows_and_then_every_200th_are_observed():
    synthesizer = nn.Linear(1, 1)
    interface = FilteredInterface(synthesizer, filter_after())
    assert [k for k in range(2 * OBSERVED_EVERY + 2) if interface.observes(k)] == [
        *range(OBSERVED_FIRST),
        OBSERVED_EVERY,
        2 * OBSERVED_EVERY,
    ]
    synthesizer.requires_grad_(False)
    assert not interface.observes(0)


class Constant(nn.Module):
    """Predicts a message that is far larger than any gradient; its parameter is trainable or frozen."""

    def __init__(self, trainable: bool) -> None:
        super().__init__()
        self.value = nn.Parameter(torch.tensor(1e6, dtype=torch.float64), requires_grad=trainable)

    def forward(self, trigger, context):
        return states.map_floating(lambda leaf: self.value.expand_as(leaf), trigger)


@pytest.mark.parametrize("trainable", [True, False])
def test_a_synthesizer_without_trainable_parameters_has_no_limit(trainable, decides):
    """Its message may be an exact gradient, and exact gradients may be large."""
    model = problems.make_model("gru")
    trainer = sequence_trainer(model, problems.frozen(model), problems.mean, synthesizer=Constant(trainable))
    run(trainer, windows(3))
    assert trainer.credit.monitor.total == (2 if trainable else 0)
    assert trainer.credit.interface.norm > 1e5
    assert bool(trainer.credit.interface.valid) != trainable


def test_a_disabled_synthesizer_is_not_observed():
    """Nothing is injected then, so an observation would cost a vector-Jacobian product for nothing."""
    model = problems.make_model("lstm")
    trainer = sequence_trainer(model, problems.frozen(model), problems.mean, synthesizer=Constant(True))
    run(trainer, windows(2))
    largest = trainer.credit.state_dict()["largest"]
    assert largest > 0
    trainer.credit.monitor.disabled = True
    trainer.model.embedding.weight.data *= 100
    trainer.model.readout.weight.data *= 100
    run(trainer, windows(2))
    assert trainer.credit.state_dict()["largest"] == largest


def test_a_synthesizer_without_trainable_parameters_is_never_reset():
    """A reset could not help. The messages may be finite again at a later window, and are then injected."""
    model, synthesizer = problems.make_model("gru"), Constant(False)
    trainer = sequence_trainer(model, problems.frozen(model), problems.mean, synthesizer=synthesizer)
    good = synthesizer.value.clone()
    synthesizer.value.fill_(math.nan)
    run(trainer, windows(14))
    assert trainer.credit.monitor.total == 14
    assert (trainer.credit.monitor.resets, trainer.credit.monitor.disabled) == (0, False)
    synthesizer.value.copy_(good)
    run(trainer, windows(1))
    assert trainer.credit.interface.valid
