"""SynthesizerStep: a valid regression changes the synthesizer, any other changes neither parameters nor buffers."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

import dni_seq as dni
from dni_seq.core import states
from dni_seq.core.snapshot import TensorSnapshot, buffers_of
from dni_seq.credit.synthesizer_step import SynthesizerStep
from dni_seq.distributed.data_parallel import SingleProcess
from tests import problems
from tests.atomic import run, windows
from tests.nests import assert_same
from tests.training import sequence_trainer


def step_of(*gradients: float, loss: float = 1.0, valid: bool = True) -> tuple[list[float], list[float], bool]:
    """Returns parameters that were [1, 1], a buffer that the regression changed from [1] to [2], and the step's validity."""
    module = nn.Module()
    module.weight = nn.Parameter(torch.ones(2))
    module.register_buffer("mean", torch.ones(1))
    step = SynthesizerStep([module], torch.optim.SGD(module.parameters(), 1.0), None, SingleProcess())
    buffers = TensorSnapshot(buffers_of([module])).keep()
    module.mean += 1
    module.weight.grad = torch.tensor(gradients)
    _, good = step(torch.tensor(loss), torch.tensor(valid), buffers)
    return module.weight.tolist(), module.mean.tolist(), bool(good)


def test_a_valid_regression_changes_the_synthesizer():
    assert step_of(0.25, 0.5) == ([0.75, 0.5], [2.0], True)


@pytest.mark.parametrize(
    ("gradient", "loss", "valid"),
    [(0.5, 1.0, False), (0.5, math.nan, True), (0.5, math.inf, True), (math.nan, 1.0, True), (math.inf, 1.0, True)],
    ids=["message", "nan-loss", "infinite-loss", "nan-gradient", "infinite-gradient"],
)
def test_an_invalid_regression_changes_nothing(gradient, loss, valid):
    assert step_of(0.25, gradient, loss=loss, valid=valid) == ([1.0, 1.0], [1.0], False)


def test_without_an_optimizer_the_loss_decides():
    module = nn.Linear(1, 1).requires_grad_(False)
    step = SynthesizerStep([module], None, None, SingleProcess())
    for loss, valid, expected in ((1.0, True, True), (1.0, False, False), (math.nan, True, False)):
        norm, good = step(torch.tensor(loss), torch.tensor(valid), TensorSnapshot([]))
        assert (float(norm), bool(good)) == (0.0, expected)


class Spoiled(nn.Module):
    """A linear synthesizer whose message can be made far too large."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(5, 5).double()
        self.factor = 1.0

    def forward(self, trigger, context):
        return states.map_floating(lambda leaf: self.factor * self.linear(leaf), trigger)


def test_a_rejected_message_changes_no_running_statistic(decides):
    """The RNN's step is accepted, so nothing else restores the mean squares that the regression has updated."""
    model = problems.make_model("gru")
    synthesizer = dni.Normalized(Spoiled())
    trainer = sequence_trainer(
        model,
        torch.optim.Adam(model.parameters(), 1e-2, fused=True),
        problems.mean,
        synthesizer=synthesizer,
        synthesizer_optimizer=torch.optim.Adam(synthesizer.parameters(), fused=True),
    )
    *first, last = windows(4)
    run(trainer, first)
    before, weight = copy.deepcopy(synthesizer.state_dict()), model.readout.weight.clone()
    running = copy.deepcopy(trainer.credit.state_dict()["running"])
    assert any("mean_square" in key for key in before)
    synthesizer.synthesizer.factor = 1e9
    (result,) = run(trainer, [last])
    assert not result.skipped
    assert not torch.equal(model.readout.weight, weight)
    assert trainer.credit.monitor.total == 1
    assert_same(dict(synthesizer.state_dict()), dict(before))
    assert_same(trainer.credit.state_dict()["running"], running)
    assert result.synthetic.injected_ratio == 0
