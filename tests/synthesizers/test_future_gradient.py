"""Messages that are a model's own gradient: exactly that, learned without targets, and worth more than their R² says."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import dni_seq as dni
from dni_seq.core import states
from dni_seq.synthesizers.base import predict, regress
from tests import problems, reference
from tests.credit.trainers import T, future_gradient, make_trainer, steps, windows_of
from tests.training import LANES, sequence_trainer, trainer_initial


def prepared(name="lstm", horizons=1, **settings):
    """A synthesizer with something to say, a state of its model and what lies ahead of it, lanes that end among it."""
    torch.manual_seed(0)
    model = problems.make_model(name)
    synthesizer = future_gradient(model, horizons, window=T // horizons, **settings)
    for layer in (synthesizer.heads.model.output, *synthesizer.heads.model.from_state):
        nn.init.normal_(layer.weight)
    state = states.map_floating(torch.randn_like, trainer_initial(model))
    inputs, targets = (problems.tokens(T, LANES, seed=seed)[:T] for seed in (1, 2))
    valid = torch.ones(T, LANES, dtype=torch.bool)
    valid[1:, 1] = False
    mask = torch.ones(T, LANES, dtype=torch.bool)
    mask[0, 0] = False
    return synthesizer, state, dni.Lookahead(inputs, targets, valid, mask)


@pytest.mark.parametrize("name", problems.MODELS)
@pytest.mark.parametrize("horizons", [1, 3])
@pytest.mark.parametrize("reduction", ["mean", "lane-mean", "sum"])
def test_messages_are_the_gradient_of_the_models_loss(name, horizons, reduction):
    synthesizer, state, ahead = prepared(name, horizons, reduction=reduction)
    weight = {"mean": horizons / (T * LANES), "lane-mean": 1 / LANES, "sum": 1.0}[reduction]
    expected = reference.future_messages(synthesizer.heads, state, ahead, weight)
    found = predict(synthesizer, state, ahead)
    assert len(found) == horizons
    for one, other in zip(found, expected, strict=True):
        for a, b in zip(states.floating(one), states.floating(other), strict=True):
            assert not a.requires_grad
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-14)
            assert a.any()


@pytest.mark.parametrize("name", problems.MODELS)
@pytest.mark.parametrize("horizons", [1, 3])
def test_it_learns_where_it_predicts_what_two_passes_would(name, horizons):
    """One pass gives the messages of `predict` and, for parameters, the gradients of the loss that `regress` has."""
    synthesizer, state, ahead = prepared(name, horizons)
    expected = predict(synthesizer, state, ahead)
    loss = regress(synthesizer, state, ahead, expected).loss
    synthesizer = prepared(name, horizons)[0]
    gradients = torch.autograd.grad(
        synthesizer.heads.model.loss(synthesizer.heads._bounded(state)[0], ahead), synthesizer.parameters()
    )
    found, learned = synthesizer.predict_and_train(state, ahead)
    assert learned.item() == pytest.approx(loss.item(), rel=1e-12)
    for parameter, gradient in zip(synthesizer.parameters(), gradients, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-10, atol=1e-14)
    for one, other in zip(found, expected, strict=True):
        for a, b in zip(states.floating(one), states.floating(other), strict=True):
            assert not a.requires_grad
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-14)


def test_messages_are_zero_where_nothing_follows():
    synthesizer, state, ahead = prepared()
    nothing = ahead._replace(valid=torch.zeros_like(ahead.valid))
    assert not any(leaf.any() for leaf in states.floating(predict(synthesizer, state, nothing)[0]))


def test_a_twin_of_every_lane_halves_a_mean_and_leaves_a_sum():
    """Identity 7: what reaches the parameters through twice as many lanes is the same."""
    for reduction, share in (("mean", 0.5), ("lane-mean", 0.5), ("sum", 1.0)):
        synthesizer, state, ahead = prepared(reduction=reduction)
        twice = states.map_floating(lambda leaf: torch.cat([leaf, leaf], dim=1), state)
        both = dni.Lookahead(*(torch.cat([part, part], dim=1) for part in ahead))
        (one,), (other,) = predict(synthesizer, state, ahead), predict(synthesizer, twice, both)
        for a, b in zip(states.floating(one), states.floating(other), strict=True):
            torch.testing.assert_close(b[:, :LANES], share * a)


def test_it_learns_at_every_window_and_needs_no_target():
    trainer = make_trainer(problems.make_model("lstm"), "future-gradient", regress_every=10**6)
    before = copy.deepcopy(trainer.credit.synthesizer.state_dict())
    losses = []
    counting = (torch.arange(3 * 40 + 1)[:, None] + torch.arange(LANES)) % problems.VOCABULARY
    for window in list(dni.with_lookahead(problems.cut(counting, T), T))[:-1]:
        (result,) = steps(trainer, [window])
        losses.append(result.synthetic.loss.item())
        assert result.synthetic.cosine.isnan().all()
        assert result.synthetic.gradient_norm > 0
        after = trainer.credit.synthesizer.state_dict()
        learned = "heads.network.future.output.weight"
        assert not torch.equal(after[learned], before[learned])
        before = copy.deepcopy(after)
    assert sum(losses[-10:]) < 0.5 * sum(losses[:10])


def test_it_learns_at_the_first_window_too_where_the_model_chooses_its_state():
    """There is no trigger then, and a last state all the same."""
    model = problems.make_model("lstm")
    trainer = make_trainer(model, "future-gradient")
    trainer.runner.start = lambda lanes: None
    (result,) = steps(trainer, windows_of(2 * T)[:1])
    assert result.synthetic.loss > 0
    assert result.synthetic.gradient_norm > 0
    assert result.synthetic.cosine.isnan().all()


def test_targets_measure_it_and_are_the_windows_own_gradients():
    """The first target holds nothing of what was injected, and the regression's numbers are those of the message."""
    synthesizer, state, ahead = prepared()
    (message,) = predict(synthesizer, state, ahead)
    found = regress(synthesizer, state, ahead, [message])
    assert found.error.item() == pytest.approx(0, abs=1e-20)
    assert found.cosine.item() == pytest.approx(1)
    opposite = regress(synthesizer, state, ahead, [states.map_floating(torch.neg, message)])
    assert opposite.cosine.item() == pytest.approx(-1)
    rule = synthesizer.target_rule(0.7, 1.0)
    assert rule.self_supervised
    assert (rule.local, rule.bootstrap, rule.injection) == ([1.0], [[0.0]], [0.7])
    assert synthesizer.heads.target_rule(0.7, 1.0) == rule


def test_targets_of_zero_are_no_measure():
    synthesizer, state, ahead = prepared()
    found = regress(synthesizer, state, ahead, [states.map_floating(torch.zeros_like, state)])
    assert (found.error.item(), found.power.item(), found.cosine.item()) == (0, 0, 0)
    assert found.loss.isfinite()


def test_a_horizon_whose_targets_were_zero_is_not_limited_to_zero():
    """Steps that do not count send nothing; that is no measure of what later ones will send."""
    synthesizer, state, ahead = prepared(horizons=3, limit=10.0)
    messages = predict(synthesizer, state, ahead)
    nothing = states.map_floating(torch.zeros_like, state)
    regress(synthesizer, state, ahead, [messages[0], nothing, nothing])
    assert_alike(predict(synthesizer, state, ahead), messages)


def test_once_measured_a_message_is_limited():
    synthesizer, state, ahead = prepared(limit=0.5)
    (message,) = predict(synthesizer, state, ahead)
    regress(synthesizer, state, ahead, [message])
    (cut,) = predict(synthesizer, state, ahead)
    for whole, limited in zip(states.floating(message), states.floating(cut), strict=True):
        for layer, small in zip(whole, limited, strict=True):
            bound = 0.5 * layer.square().mean().sqrt()
            torch.testing.assert_close(small, layer.clamp(-bound, bound))


def test_a_skipped_window_does_not_spoil_the_mean_squares(decides):
    """Its targets are NaN. The predictor's own loss is finite, so nothing else rejects the window's synthesizer step."""
    model = problems.make_model("lstm")
    trainer = make_trainer(model, "future-gradient", regress_every=1)
    if decides == "on the device":
        for part, owner in ((model, trainer), (trainer.credit.synthesizer, trainer.credit.step_optimizer)):
            owner.optimizer = torch.optim.Adam(part.parameters(), 1e-2, fused=True)
    first, second, bad, after = windows_of(5 * T)[:4]
    steps(trainer, [first, second])
    heads = trainer.credit.synthesizer.heads
    before, counts = heads.mean_square.clone(), heads.counts.clone()
    assert before.all()
    handle = model.register_forward_hook(lambda module, given, found: (found[0] * float("nan"), found[1]))
    (result,) = steps(trainer, [bad])
    handle.remove()
    assert result.skipped
    assert torch.equal(heads.mean_square, before)
    assert torch.equal(heads.counts, counts)
    (result,) = steps(trainer, [after])
    assert not result.skipped
    assert heads.mean_square.isfinite().all()
    assert torch.equal(heads.counts, counts + 1)


def test_limits_are_those_of_the_latest_mean_squares():
    """Whoever writes them: a measure, `load_state_dict`, or the trainer, which puts back what a failed step has changed."""
    synthesizer, state, ahead = prepared(limit=0.5)
    (message,) = predict(synthesizer, state, ahead)
    regress(synthesizer, state, ahead, [message])
    first, saved = predict(synthesizer, state, ahead), copy.deepcopy(synthesizer.state_dict())
    regress(synthesizer, state, ahead, [states.map_floating(lambda leaf: 2 * leaf, message)])
    wider, twin = predict(synthesizer, state, ahead), copy.deepcopy(synthesizer)
    assert not torch.equal(states.floating(first)[0], states.floating(wider)[0])
    assert_alike(predict(twin, state, ahead), wider)
    for module in (synthesizer, twin):
        module.load_state_dict(saved)
        assert_alike(predict(module, state, ahead), first)
    synthesizer.heads.limit = 1e6
    assert_alike(predict(synthesizer, state, ahead), [message])


def test_a_copy_does_not_take_over_its_originals_limits():
    """A tensor's version says nothing about its copy's, whose writes are counted anew."""
    synthesizer, state, ahead = prepared(limit=0.5)
    for _ in range(9):
        regress(synthesizer, state, ahead, predict(synthesizer, state, ahead))
    limited = predict(synthesizer, state, ahead)
    twin = copy.deepcopy(synthesizer)
    version, mean_square = synthesizer.heads.mean_square._version, twin.heads.mean_square
    assert mean_square._version < version, "there is a write left that brings the copy to the original's version"
    while mean_square._version < version:
        mean_square.mul_(4.0)
    assert not torch.equal(states.floating(predict(twin, state, ahead)[0])[0], states.floating(limited[0])[0])


def assert_alike(found, expected):
    """The same messages, to the bit."""
    for one, other in zip(found, expected, strict=True):
        assert all(map(torch.equal, states.floating(one), states.floating(other)))


def test_switched_off_it_learns_nothing():
    trainer = make_trainer(problems.make_model("lstm"), "future-gradient")
    windows = windows_of(30)
    steps(trainer, windows[:3])
    trainer.credit.monitor.disabled = True
    before = copy.deepcopy(trainer.credit.synthesizer.state_dict())
    steps(trainer, windows[3:])
    assert all(torch.equal(value, before[key]) for key, value in trainer.credit.synthesizer.state_dict().items())


def test_a_loss_that_is_reduced_is_refused():
    synthesizer, state, ahead = prepared()
    synthesizer.heads.model.loss_fn = problems.mean
    for ask in (predict, lambda *given: regress(*given, [state])):
        with pytest.raises(ValueError, match="unreduced losses"):
            ask(synthesizer, state, ahead)


def test_unsupported_cases_are_reported():
    model = problems.make_model("lstm")
    with pytest.raises(ValueError, match="steps must be a multiple of parts, got 3 steps and 2 parts"):
        future_gradient(model, 2)
    with pytest.raises(ValueError, match="reduction must be one of"):
        future_gradient(model, reduction="median")
    with pytest.raises(ValueError, match="self-supervised synthesizer"):
        make_trainer(model, "future-gradient", targets="lambda", regress_every=None)


def left_by(synthesizer, updates=400):
    """The error that training leaves on recalling a bit over one window of one step, which truncated BPTT cannot learn."""
    torch.manual_seed(1)
    model = Recall()
    trainer = sequence_trainer(
        model,
        torch.optim.Adam(model.parameters(), 1e-2),
        recall_loss,
        synthesizer=synthesizer(model),
        synthetic_scale=1.0,
        initial_state=lambda lanes: model.initial_state(lanes),
    )
    generator = torch.Generator().manual_seed(2)
    errors = []
    for _ in range(updates):
        bits = torch.randint(2, (16,), generator=generator).float() * 2 - 1
        inputs = torch.stack([bits, torch.zeros(16)])[..., None]
        targets = torch.stack([torch.zeros(16), bits])[..., None]
        mask = torch.tensor([False, True])[:, None].expand(2, 16)
        ends = torch.ones(16, dtype=torch.bool)
        first = dni.Window(inputs[:1], targets[:1], mask[:1])
        second = dni.Window(inputs[1:], targets[1:], mask[1:], ends)
        for window in dni.with_lookahead([first, second], 1):
            result = trainer.step(
                window.inputs, window.targets, mask=window.mask, ends=window.ends, lookahead=window.lookahead
            )
        errors.append(result.loss.item())
    return sum(errors[-20:]) / 20


class Recall(nn.Module):
    """An LSTM of 8 units that reads and says one number a step; what it reads leaves no trace before it has learned to."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(1, 8)
        self.readout = nn.Linear(8, 1)
        nn.init.zeros_(self.lstm.weight_ih_l0)

    def initial_state(self, lanes):
        zeros = torch.zeros(1, lanes, 8)
        return zeros, zeros.clone()

    def forward(self, inputs, state):
        hidden, state = self.lstm(inputs, state)
        return self.readout(hidden), state


def recall_loss(outputs, targets):
    return (outputs - targets).square().mean(-1)


def ahead_of(model):
    def future(size):
        return dni.FutureModel(size, 1, inputs=nn.Linear(1, 4), inputs_width=4, outputs=1, loss_fn=recall_loss, units=16)

    return dni.FutureGradient(model.initial_state(1), future, window=1, cells=dni.LSTM_CELLS)


def test_it_teaches_what_truncated_bptt_cannot_learn():
    """Recalling a bit that was read a window before: without credit it is never stored, and the error is its variance, 1."""
    assert left_by(lambda model: None) > 0.9
    assert left_by(ahead_of) < 0.02
