"""Gradients of several windows make one update: the same as one step on their sum."""

from __future__ import annotations

import copy

import pytest
import torch

import dni_seq as dni
from tests import problems
from tests.atomic import run, windows
from tests.credit.trainers import KINDS, make_trainer, steps, windows_of
from tests.nests import assert_same


def plain(accumulate=1, optimizer=torch.optim.Adam, **settings):
    model = problems.make_model("lstm")
    trainer = dni.SequenceTrainer(
        model, optimizer(model.parameters(), 1e-2), settings.pop("loss_fn", problems.mean), **settings
    )
    trainer.accumulate = accumulate
    return trainer


@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("clip", [None, 0.05])
def test_an_update_is_a_step_on_the_summed_gradients(count, clip):
    trainer = plain(count, clip=clip)
    model = copy.deepcopy(trainer.model)
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    state = None
    for i, window in enumerate(windows(4 * count), start=1):
        trainer.step(window.inputs, window.targets)
        outputs, state = model(window.inputs, state if state is not None else model.initial_state(window.inputs.shape[1]))
        problems.mean(outputs, window.targets).backward()  # adds to the gradients
        state = tuple(leaf.detach() for leaf in state)
        if i % count == 0:
            if clip is not None:
                torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
            optimizer.step()
            optimizer.zero_grad()
        for (name, mine), other in zip(trainer.model.named_parameters(), model.parameters(), strict=True):
            torch.testing.assert_close(mine, other, rtol=1e-12, atol=1e-14, msg=name)
    assert (trainer.steps, trainer.updates) == (4 * count, 4)


def test_one_window_an_update_is_what_it_was():
    one, other = plain(1), plain(1)
    run(one, windows(5))
    other.accumulate = 1
    run(other, windows(5))
    assert_same(one.state_dict(), other.state_dict())
    assert one.updates == 5


def test_parameters_may_be_added_between_the_windows_of_an_update():
    """Those added get the sum of the gradients from then on, the others the sum of all."""
    names = {"readout.weight", "readout.bias"}
    trainer = plain(4, torch.optim.SGD)
    model = trainer.model
    first = [parameter for name, parameter in model.named_parameters() if name in names]
    later = [parameter for name, parameter in model.named_parameters() if name not in names]
    trainer.optimizer = torch.optim.SGD(first, 1.0)
    start = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    expected = {name: torch.zeros_like(parameter) for name, parameter in start.items()}
    state = model.initial_state(3)
    for i, window in enumerate(windows(4)):
        if i == 2:
            model.zero_grad()
            trainer.optimizer.add_param_group({"params": later})
        outputs, last = model(window.inputs, state)
        found = torch.autograd.grad(problems.mean(outputs, window.targets), list(model.parameters()))
        for (name, _), gradient in zip(model.named_parameters(), found, strict=True):
            expected[name] += gradient if name in names or i >= 2 else 0
        state = tuple(leaf.detach() for leaf in last)
        trainer.step(window.inputs, window.targets)
    assert trainer.updates == 1
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(start[name] - parameter, expected[name], rtol=1e-12, atol=1e-14, msg=name)


@pytest.mark.parametrize("kind", KINDS)
def test_resuming_in_mid_accumulation_is_exact(kind):
    def finish(interrupted):
        trainer = make_trainer(problems.make_model("lstm"), kind)
        trainer.accumulate = 3
        some = windows_of(27)
        steps(trainer, some[:4])
        if interrupted:
            saved = copy.deepcopy(trainer.state_dict())
            assert saved["gradients"]["collected"] == 1
            trainer = make_trainer(problems.make_model("lstm"), kind)
            trainer.accumulate = 3
            trainer.load_state_dict(saved)
        steps(trainer, some[4:])
        return trainer.state_dict()

    assert_same(finish(True), finish(False))


def test_a_bad_window_adds_nothing():
    """In mid-accumulation too: the other windows' gradients stay."""
    factor = [1.0]
    some = windows(6)
    one, other = plain(2, loss_fn=lambda o, t: problems.mean(o, t) * factor[0]), plain(2)
    run(one, some[:3])
    factor[0] = float("nan")
    assert run(one, [some[3]])[0].skipped
    factor[0] = 1.0
    run(one, some[4:])
    run(other, [*some[:3], *some[4:]])
    assert_same(one.model.state_dict(), other.model.state_dict())
    assert one.updates == other.updates == 2


def test_a_bad_window_on_the_device_adds_nothing(monkeypatch):
    monkeypatch.setattr("dni_seq.core.nonfinite.readable_without_sync", lambda flag: False)
    factor = [1.0]

    def fused(parameters, lr):
        return torch.optim.Adam(parameters, lr, fused=True)

    some = windows(4)
    one = plain(2, optimizer=fused, loss_fn=lambda o, t: problems.mean(o, t) * factor[0])
    other = plain(1, optimizer=fused)
    for trainer in (one, other):
        run(trainer, [])
    run(one, some[:1])
    factor[0] = float("nan")
    run(one, some[1:2])
    run(other, some[:1])
    for mine, same in zip(one.model.parameters(), other.model.parameters(), strict=True):
        torch.testing.assert_close(mine, same, rtol=1e-12, atol=1e-14)


def test_a_step_that_fails_in_mid_accumulation_keeps_the_sums():
    one = plain(3)
    some = windows(7)
    run(one, some[:4])
    before = copy.deepcopy(one.state_dict())
    with pytest.raises(ValueError, match="targets"):
        one.step(some[4].inputs, some[4].targets[:, :1])
    loss, one.runner.loss_fn = one.runner.loss_fn, lambda o, t: 1 / 0
    with pytest.raises(ZeroDivisionError):
        run(one, [some[4]])
    one.runner.loss_fn = loss
    assert_same(one.state_dict(), before)
    run(one, some[4:])
    assert one.updates == 2


def test_the_number_of_windows_is_checked():
    with pytest.raises(ValueError, match="accumulate must be 1 or more windows, got 0"):
        plain(0)
