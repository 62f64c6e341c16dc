"""How near estimators are to full BPTT, and that looking changes nothing."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

import dni_seq as dni
from tests import problems, reference
from tests.credit.trainers import KINDS, make_trainer, steps, windows_of
from tests.nests import assert_same
from tests.test_long_windows import noisy
from tests.test_traces import CUTS, model_of, trainer_of, windows


def test_full_bptt_is_its_own_estimate_and_truncation_is_not():
    some = windows(CUTS["T = 3"], [(6, 1)])
    trainer = trainer_of(model_of("lru", traces=None), lr=0.1)
    found = dni.gradient_fidelity(trainer, some)
    assert 0 < found.cosine < 0.999
    trainer.backward_windows = 4
    found = dni.gradient_fidelity(trainer, some)
    assert (found.cosine, found.norm_ratio) == (pytest.approx(1, abs=1e-12), pytest.approx(1, abs=1e-12))
    assert set(found.parameters) == {name for name, _ in trainer.model.named_parameters()}


def test_the_numbers_are_those_of_gradients_computed_by_hand():
    some = windows(CUTS["T = 1"])
    model = model_of("mingru")
    plain = model_of("mingru", traces=None)
    expected = reference.full_bptt(plain, problems.summed, some, plain.initial_state(3), 1)
    found = dni.gradient_fidelity(trainer_of(model, lr=0.3), some)
    for name, (cosine, ratio) in found.parameters.items():
        if "cell" in name:  # exact by traces
            assert (cosine, ratio) == (pytest.approx(1), pytest.approx(1)), name
    total = {name: torch.zeros_like(gradient) for name, gradient in expected.items()}
    trainer = trainer_of(model_of("mingru"))
    for window in some:
        trainer.step(window.inputs, window.targets, ends=window.ends)
        for name, parameter in trainer.model.named_parameters():
            total[name] += parameter.grad
    mine, exact = (torch.cat([each[name].flatten() for name in expected]) for each in (total, expected))
    assert found.cosine == pytest.approx(float(torch.cosine_similarity(mine, exact, dim=0)), rel=1e-9)
    assert found.norm_ratio == pytest.approx(float(mine.norm() / exact.norm()), rel=1e-9)


def test_a_start_counts_as_a_constant():
    """Its traces would be credit from before the windows, which full BPTT over them does not have."""
    some = windows(CUTS["T = 1"])
    trainer = trainer_of(model_of("lru"), lr=0.0)
    for window in some[:6]:
        trainer.step(window.inputs, window.targets, ends=window.ends)
    start = trainer.state
    assert all(trace.any() for trace in start[1])
    found = dni.gradient_fidelity(trainer, some[6:], start)
    assert_same(trainer.state, start)
    for name, (cosine, ratio) in found.parameters.items():
        if "cell" in name:
            assert (cosine, ratio) == (pytest.approx(1), pytest.approx(1)), name
    plain = model_of("lru", traces=None)
    state = start[0]
    total = 0
    for window in some[6:]:
        outputs, state = plain(window.inputs, state)
        total = total + problems.summed(outputs, window.targets)
    exact = torch.autograd.grad(total, plain.embedding.weight)[0]
    zeroed = (start[0], tuple(torch.zeros_like(trace) for trace in start[1]))
    assert found == dni.gradient_fidelity(trainer, some[6:], zeroed)
    trainer.state = zeroed
    mine = torch.zeros_like(exact)
    for window in some[6:]:
        trainer.step(window.inputs, window.targets)
        mine += trainer.model.embedding.weight.grad
    cosine = float(torch.cosine_similarity(mine.flatten(), exact.flatten(), dim=0))
    assert found.parameters["embedding.weight"].cosine == pytest.approx(cosine, rel=1e-9)
    assert cosine < 0.9999


class Started(problems.StackedLSTM):
    """Its initial state is learned."""

    def __init__(self):
        super().__init__()
        self.first = nn.ParameterList(torch.randn_like(leaf[:, :1]) for leaf in super().initial_state(1))

    def initial_state(self, lanes):
        return tuple(leaf.expand(-1, lanes, -1) for leaf in self.first)


def of_whole_sequences(model, names=("",)):
    """A trainer of the parameters with these beginnings, and windows after each of which all sequences end.

    Truncated BPTT then computes the exact gradient.
    """
    trained = [parameter for name, parameter in model.named_parameters() if name.startswith(tuple(names))]
    trainer = dni.SequenceTrainer(model, torch.optim.SGD(trained, 0.1), problems.mean, state_batch_dim=1)
    some = windows_of(12)
    return trainer, [window._replace(ends=torch.ones(window.inputs.shape[1], dtype=torch.bool)) for window in some]


def assert_exact(found):
    for name, each in {"all": found[:2], **found.parameters}.items():
        assert tuple(each) == (pytest.approx(1, abs=1e-9), pytest.approx(1, abs=1e-9)), name


def test_sums_of_an_update_that_is_not_complete_do_not_count():
    trainer, some = of_whole_sequences(problems.make_model("lstm"))
    trainer.accumulate = 4
    steps(trainer, some[:1])
    saved = copy.deepcopy(trainer.state_dict())
    assert_exact(dni.gradient_fidelity(trainer, some[1:]))
    assert_same(trainer.state_dict(), saved)


def test_full_bptt_reaches_a_learned_initial_state_in_every_sequence():
    trainer, some = of_whole_sequences(Started().double())
    assert_exact(dni.gradient_fidelity(trainer, some))


def test_parameters_of_no_optimizer_are_compared_and_keep_their_gradients():
    trainer, some = of_whole_sequences(problems.make_model("lstm"), ["readout"])
    steps(trainer, some[:1])
    before = {name: parameter.grad.clone() for name, parameter in trainer.model.named_parameters()}
    assert_exact(dni.gradient_fidelity(trainer, some[1:]))
    for name, parameter in trainer.model.named_parameters():
        assert torch.equal(parameter.grad, before[name]), name


@pytest.mark.parametrize("kind", KINDS)
def test_looking_changes_nothing(kind):
    """A trainer of every kind goes on bit for bit, in the middle of an accumulation too."""
    found = []
    for look in (True, False):
        trainer = make_trainer(problems.make_model("lstm"), kind)
        trainer.accumulate = 2
        trainer.clip = 0.5
        some = windows_of(27, {3: [1]})
        steps(trainer, some[:3])
        if look:
            before = copy.deepcopy(trainer.state_dict())
            result = dni.gradient_fidelity(trainer, windows_of(12))
            assert math.isfinite(result.cosine)
            assert_same(trainer.state_dict(), before)
        steps(trainer, some[3:])
        found.append(trainer.state_dict())
    assert_same(*found)


def test_random_numbers_and_running_statistics_stay():
    trainer = noisy()
    some = windows_of(12)
    state = torch.get_rng_state()
    before = copy.deepcopy(trainer.state_dict())
    dni.gradient_fidelity(trainer, some)
    assert torch.equal(torch.get_rng_state(), state)
    assert_same(trainer.state_dict(), before)
    assert trainer.model.training


def test_no_windows():
    with pytest.raises(ValueError, match="gradient_fidelity needs at least one window"):
        dni.gradient_fidelity(noisy(), [])
