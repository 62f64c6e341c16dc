"""A step that fails is undone: every attribute of every part, whoever adds it later."""

from __future__ import annotations

import copy
from collections import deque

import pytest
import torch
from torch import nn

import dni_seq as dni
from dni_seq.core.snapshot import Restorable, TensorSnapshot, buffers_of
from dni_seq.credit.divergence_monitor import DivergenceMonitor
from dni_seq.credit.step_gradients import StepGradients
from dni_seq.credit.step_transaction import StepTransaction
from tests import problems
from tests.credit.trainers import KINDS, make_trainer, steps, windows_of
from tests.nests import assert_same


def parts_of(part: Restorable) -> list[Restorable]:
    """A part and all parts in it."""
    inner = [value for value in vars(part).values() if isinstance(value, Restorable)]
    return [part, *(found for each in inner for found in parts_of(each))]


def all_parts(trainer: dni.SequenceTrainer) -> list[Restorable]:
    assert trainer.credit is not None
    return [*parts_of(trainer.credit), *parts_of(trainer._skip_policy)]


class Interrupted(Exception):
    pass


def raise_interrupted(*_):
    raise Interrupted


def fail_in_the_next_step(trainer: dni.SequenceTrainer, spoil=lambda: None) -> None:
    """The next optimizer step first spoils something, then raises."""

    def step(*_):
        spoil()
        raise Interrupted

    trainer.optimizer.step = step


@pytest.mark.parametrize("kind", KINDS)
def test_an_attribute_that_a_part_gets_later_is_rolled_back(kind):
    trainer = make_trainer(problems.make_model("lstm"), kind)
    first, *rest = windows_of(24)
    steps(trainer, rest[:4])
    parts = all_parts(trainer)
    names = {type(part).__name__ for part in parts}
    assert {"SyntheticCredit", "AutoScale", "RunningFidelity", "ReplayBuffer", "FidelityProbe", "DivergenceMonitor"} <= names
    assert {"MessageFilter", "SkipCounter", "NonFinitePolicy"} <= names
    assert ("TargetNetwork" in names) == ("target_network" in KINDS[kind]["settings"])
    for part in parts:
        part.number, part.items, part.table, part.tensor = 1, [1], {"a": 1}, torch.ones(2)

    def spoil():
        for part in parts:
            part.number, part.tensor, part.late = 2, torch.zeros(2), True
            part.items.append(2)
            part.table["b"] = 2

    fail_in_the_next_step(trainer, spoil)
    with pytest.raises(Interrupted):
        steps(trainer, [first])
    for part in parts:
        assert (part.number, part.items, part.table, part.tensor.tolist()) == (1, [1], {"a": 1}, [1, 1])
        assert not hasattr(part, "late")


@pytest.mark.parametrize("kind", KINDS)
def test_what_a_failed_step_did_is_in_no_state_dict(kind):
    """Whatever window fails: one with a replay, a comparison, a copy to the target network, or none of them."""
    trainer = make_trainer(problems.make_model("lstm"), kind)
    credit = trainer.credit
    for window in windows_of(24):
        before = copy.deepcopy(trainer.state_dict())
        replays = credit._probe.due(trainer.steps + 1)
        replays |= credit.settings.targets == "lambda" and credit._replay_buffer.fills
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(trainer.optimizer, "step", raise_interrupted)
            with pytest.raises(Interrupted):
                steps(trainer, [window])
        after = trainer.state_dict()
        if trainer.steps and not replays:
            # One step of the synthesizer's optimizer is not undone: it is the last thing before the model's.
            for saved in (before, after):
                del saved["synthesizer"], saved["synthesizer_optimizer"]
        assert_same(after, before)
        steps(trainer, [window])


def test_a_target_network_is_rolled_back_at_the_window_that_copies_it():
    trainer = make_trainer(problems.make_model("gru"), "target-network", target_network=4)
    windows = windows_of(24)
    steps(trainer, windows[:3])
    copied = trainer.credit.target_network.module
    before = copy.deepcopy(copied.state_dict())
    fail_in_the_next_step(trainer, lambda: assert_differs(copied.state_dict(), before))
    with pytest.raises(Interrupted):
        steps(trainer, [windows[3]])
    assert_same(dict(copied.state_dict()), dict(before))


def test_a_target_network_that_is_copied_twice_in_a_step_is_rolled_back():
    """At window 12 a copy is due, and the synthesizer diverges, so that its reset copies once more."""
    trainer = make_trainer(problems.make_model("gru"), "target-network", target_network=4)
    windows = windows_of(3 * 12)
    steps(trainer, windows[:9])
    with torch.no_grad():
        for parameter in trainer.credit.synthesizer.parameters():
            parameter.fill_(float("nan"))
    steps(trainer, windows[9:11])
    copied = trainer.credit.target_network.module
    before = copy.deepcopy(copied.state_dict())
    fail_in_the_next_step(trainer, lambda: assert_differs(copied.state_dict(), before))
    with pytest.raises(Interrupted):
        steps(trainer, windows[11:])
    assert trainer.credit.monitor.resets == 0
    assert_same(dict(copied.state_dict()), dict(before))


def assert_differs(found, other):
    assert any(not torch.equal(value, other[key]) for key, value in found.items())


class Plain:
    """A class that no snapshot knows."""


class Careless(DivergenceMonitor):
    def __init__(self):
        super().__init__()
        self.cache = Plain()


def test_state_that_a_snapshot_does_not_cover_fails_at_construction(monkeypatch):
    monkeypatch.setattr("dni_seq.credit.synthetic_gradient.DivergenceMonitor", Careless)
    with pytest.raises(TypeError, match=r"Careless\.cache is a Plain, which a snapshot does not cover"):
        make_trainer(problems.make_model("gru"), "bootstrap")


class Part(Restorable):
    def __init__(self):
        self.tensor = torch.zeros(2)
        self.queue = deque([1], maxlen=3)


def test_a_tensor_that_is_written_to_in_place_is_no_rollback_in_silence():
    part = Part()
    kept = part.snapshot()
    part.tensor += 1
    with pytest.raises(RuntimeError, match=r"Part\.tensor was written to in place"):
        part.restore(kept)


def test_a_snapshot_restores_more_than_once():
    part = Part()
    kept = part.snapshot()
    for _ in range(2):
        part.queue.append(2)
        part.tensor = part.tensor + 1
        part.restore(kept)
        assert list(part.queue) == [1]
        assert part.queue.maxlen == 3
        assert part.tensor.tolist() == [0, 0]


def test_a_transaction_restores_the_random_state_and_lets_good_steps_be():
    trainer = make_trainer(problems.make_model("gru"), "bootstrap")
    (window,) = windows_of(3)[:1]
    random = torch.get_rng_state()
    fail_in_the_next_step(trainer, lambda: torch.rand(3))
    with pytest.raises(Interrupted):
        steps(trainer, [window])
    assert torch.equal(torch.get_rng_state(), random)
    del trainer.optimizer.step
    before = copy.deepcopy(trainer.model.state_dict())
    steps(trainer, [window])
    assert_differs(trainer.model.state_dict(), before)


def test_a_transaction_without_credit_clears_gradients_and_restores_buffers():
    model = nn.BatchNorm1d(2)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    plain = dni.SequenceTrainer(nn.Module(), torch.optim.SGD([nn.Parameter(torch.zeros(1))], 0.1), lambda *_: None)
    gradients = StepGradients(model, lambda: [torch.optim.SGD(model.parameters(), 0.1)])
    buffers = TensorSnapshot(buffers_of([model]))
    transaction = StepTransaction(torch.device("cpu"), buffers, None, plain._skip_policy, gradients, None)

    def step():
        with transaction:
            model(torch.randn(4, 2))
            raise Interrupted

    with pytest.raises(Interrupted):
        step()
    assert model.running_mean.tolist() == [0, 0]
    assert all(parameter.grad is None for parameter in model.parameters())
