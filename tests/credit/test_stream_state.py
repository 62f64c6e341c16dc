"""StreamState: loads a hidden state, resets it before it is used, and rejects one that does not fit."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import dni_seq as dni
from dni_seq.core import states
from tests import problems
from tests.credit.trainers import T, make_trainer, steps, windows_of
from tests.nests import assert_same
from tests.training import LANES, trainer_initial


@pytest.mark.parametrize("kind", ["lambda", "auto"])
def test_a_reset_after_loading_drops_the_recorded_windows(kind):
    """The next window does not follow them, and may have another number of lanes."""
    model = problems.make_model("lstm")
    saving = make_trainer(model, kind, initial_state=model.initial_state)
    steps(saving, windows_of(T * 3))
    saved = copy.deepcopy(saving.state_dict())
    assert saved["credit"]["ring"] or saved["credit"]["probe_windows"]
    trainer = make_trainer(model, kind, initial_state=model.initial_state)
    trainer.load_state_dict(saved)
    trainer.reset()
    kept = trainer.state_dict()["credit"]
    assert (kept["ring"], kept["probe_windows"], kept["probe_messages"]) == ([], [], None)
    assert kept["steps"] == 3
    narrow = dni.with_lookahead(problems.cut(problems.tokens(T * 12, LANES - 1), T), T)
    assert all(result.loss.isfinite() for result in steps(trainer, list(narrow)))


@pytest.mark.parametrize("kind", ["bootstrap", "lambda", "auto"])
def test_a_state_set_after_loading_replaces_the_loaded_state(kind):
    """The next window starts from it, a checkpoint saved before that window holds it, and counts are as loaded."""
    model = problems.make_model("lstm")
    *before, after = windows_of(T * 4)
    saving = make_trainer(model, kind, initial_state=model.initial_state)
    steps(saving, before)
    saved = copy.deepcopy(saving.state_dict())
    trainer = make_trainer(model, kind, initial_state=model.initial_state)
    trainer.load_state_dict(saved)
    new = states.map_floating(lambda leaf: torch.full_like(leaf, 0.5), saving.state)
    trainer.state = new
    again = make_trainer(model, kind, initial_state=model.initial_state)
    again.load_state_dict(copy.deepcopy(trainer.state_dict()))
    expected = problems.mean(model(after.inputs, states.clone(new))[0], after.targets)
    for found in (trainer, again):
        kept = found.state_dict()["credit"]
        assert (kept["ring"], kept["probe_windows"], kept["steps"]) == ([], [], 3)
    for found in (again, trainer):
        loading = copy.deepcopy(found)
        (result,) = steps(loading, [after])
        torch.testing.assert_close(result.loss, expected.detach(), rtol=1e-12, atol=0)


@pytest.mark.parametrize("kind", ["lambda", "auto"])
def test_a_state_that_is_set_does_not_follow_the_recorded_windows(kind):
    """Targets and comparisons are those after a reset, and the recorded windows start with the next window."""
    *some, after = windows_of(T * 6)
    found = []
    for resets in (False, True):
        model = problems.make_model("lstm")
        trainer = make_trainer(model, kind, initial_state=model.initial_state, fidelity_every=2, replay_windows=3)
        results = steps(trainer, some[:2])
        if resets:
            trainer.reset()
        trainer.state = states.map_floating(lambda leaf: torch.full_like(leaf, 0.5), model.initial_state(LANES))
        results += steps(trainer, [*some[2:], after])
        compared = [i for i, result in enumerate(results) if result.synthetic.fidelity is not None]
        found.append((compared, [[result.loss, *result.synthetic[:-1]] for result in results], trainer.state))
    (one, *numbers), (other, *expected) = found
    assert one == other
    assert_same(numbers, expected)


def test_an_exact_gradient_does_not_run_over_a_state_that_was_set():
    """The window after it ends no comparison. Each other comparison is that of plain autograd through two windows."""
    model = problems.make_model("lstm")
    trainer = make_trainer(model, "bootstrap", 0.0, fidelity_every=2, replay_windows=2, discount=1.0)
    some = windows_of(T * 8)
    starts, measured = [], {}
    for i, window in enumerate(some):
        if i == 2:
            trainer.state = states.map_floating(lambda leaf: torch.full_like(leaf, 0.5), trainer.state)
        starts.append(trainer_initial(model) if trainer.state is None else trainer.state)
        (result,) = steps(trainer, [window])
        if result.synthetic.fidelity is not None:
            measured[i] = result.synthetic.fidelity.total.exact_power
    assert len(measured) >= 2
    assert 2 not in measured
    for last, power in measured.items():
        start = states.map_floating(lambda leaf: leaf.detach().clone().requires_grad_(), starts[last - 1])
        state, total = start, 0.0
        for window in some[last - 1 : last + 1]:
            outputs, state = model(window.inputs, state)
            total = total + problems.mean(outputs, window.targets)
        gradients = torch.autograd.grad(total, states.floating(start))
        expected = sum(gradient.square().sum() for gradient in gradients)
        torch.testing.assert_close(power, expected, rtol=1e-9, atol=0)


def test_loading_a_trainer_without_a_state_discards_the_current_state():
    """The next window starts from the initial state, as it would in the trainer that was saved."""
    first, *rest = windows_of(T * 4)
    saving = make_trainer(problems.make_model("lstm"), "bootstrap")
    steps(saving, rest)
    saving.reset()
    saved = copy.deepcopy(saving.state_dict())
    loading = make_trainer(problems.make_model("lstm", seed=1), "bootstrap")
    steps(loading, rest)
    loading.load_state_dict(saved)
    assert loading.state is None
    (found,), (expected,) = steps(loading, [first]), steps(saving, [first])
    assert torch.equal(found.loss, expected.loss)


def test_a_saved_state_of_another_size_is_rejected():
    """It has the nesting of the model's state, but more units. The message names both shapes."""
    small, large = (problems.StackedLSTM(hidden=hidden).double() for hidden in (5, 6))
    saving, loading = (dni.SequenceTrainer(model, problems.frozen(model), problems.mean) for model in (large, small))
    steps(saving, windows_of(T)[:1])
    saved = {**loading.state_dict(), "state": saving.state_dict()["state"]}
    message = r"the saved hidden state has a leaf \[2, 3, 6\], this model's has \[2, 3, 5\]"
    with pytest.raises(ValueError, match=message):
        loading.load_state_dict(saved, LANES)
    assert loading.state is None


class LogChain(nn.Module):
    """A Markov chain in log space that cannot start in its last state: the learned initial state holds -inf."""

    def __init__(self):
        super().__init__()
        self.moves = nn.Parameter(torch.randn(3, 3, dtype=torch.float64))
        self.first = nn.Parameter(torch.randn(2, dtype=torch.float64))

    def initial_state(self, lanes):
        return torch.cat([self.first, self.first.new_full((1,), -torch.inf)]).log_softmax(0).expand(lanes, 3)

    def forward(self, inputs, state):
        outputs = []
        for scores in inputs:
            outputs.append((state[:, :, None] + self.moves.log_softmax(1)).logsumexp(1) + scores)
            state = outputs[-1]
        return torch.stack(outputs), state


def test_a_learned_initial_state_may_hold_infinities():
    """Lanes end at some windows. Gradients are those of plain autograd from the initial state of these lanes."""
    torch.manual_seed(0)
    model = LogChain()

    def loss_fn(outputs, _):
        return -outputs.logsumexp(-1)

    trainer = dni.SequenceTrainer(model, torch.optim.SGD(model.parameters(), 0.1), loss_fn, state_batch_dim=0)
    state, fresh = torch.zeros(2, 3, dtype=torch.float64), torch.tensor([True, True])
    for ends in ([True, False], [False, False], [False, True]):
        inputs = torch.randn(4, 2, 3, dtype=torch.float64)
        start = torch.where(fresh[:, None], model.initial_state(2), state)
        outputs, state = model(inputs, start)
        expected = torch.autograd.grad(loss_fn(outputs, None).mean(), list(model.parameters()), allow_unused=True)
        result = trainer.step(inputs, inputs, ends=torch.tensor(ends))
        assert not result.skipped
        for parameter, gradient in zip(model.parameters(), expected, strict=True):
            torch.testing.assert_close(parameter.grad, gradient, rtol=1e-10, atol=1e-14)
        state, fresh = state.detach(), torch.tensor(ends)
