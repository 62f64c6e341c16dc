"""Messages inside windows: the gradient of an auxiliary objective, held to autograd through one graph in float64."""

from __future__ import annotations

import copy

import pytest
import torch

import dni_seq as dni
from dni_seq.core import states
from dni_seq.synthesizers.multi_horizon import Horizons
from dni_seq.synthesizers.packing import Packing
from tests import problems, reference
from tests.credit.trainers import future_gradient
from tests.nests import assert_same
from tests.training import LANES, trainer_initial
from tests.training import assert_same as assert_close

T, M = 6, 3
EXACT = {"rtol": 1e-11, "atol": 1e-13}


def made(name="lstm", loss_fn=problems.unreduced, lr=0.0, scale=0.7, horizons=1, limit=None, **config):
    model = problems.make_model(name)
    torch.manual_seed(5)
    synthesizer = future_gradient(model, horizons, limit=limit)
    parameters = list(synthesizer.parameters())
    return dni.SequenceTrainer(
        model,
        torch.optim.SGD(model.parameters(), lr),
        loss_fn,
        synthesizer=synthesizer,
        synthesizer_optimizer=torch.optim.SGD(parameters, lr),
        config=dni.SyntheticGradientConfig(synthetic_scale=scale, regress_every=1000, **config),
        initial_state=lambda lanes: trainer_initial(model),
        state_batch_dim=model.state_batch_dim,
    )


def windows(count=3, length=T, ends=None, masked=False):
    found = list(dni.with_lookahead(problems.cut(problems.tokens(count * length, LANES), length, ends), M))
    if not masked:
        return found
    generator = torch.Generator().manual_seed(2)
    marked = [w._replace(mask=torch.rand(w.inputs.shape, generator=generator) < 0.7, lookahead=None) for w in found]
    return list(dni.with_lookahead(marked, M))


def step(trainer, some):
    return [trainer.step(w.inputs, w.targets, ends=w.ends, mask=w.mask, lookahead=w.lookahead) for w in some]


def predictor_loss(trainer, state, ahead):
    """The sum over steps and lanes of the predictor's losses at a state, with the state in the graph."""
    heads = trainer.credit.synthesizer.heads
    flat = heads.packing.pack(states.floating(state))
    cell = torch.zeros(flat.shape[1], dtype=torch.bool)
    for span in heads.cells:
        cell[span] = True
    return heads.model.loss(torch.where(cell, flat.tanh(), flat), ahead) * ahead.valid.numel()


def by_hand(trainer, window, state, every, at_end=True):
    """Gradients of l + c w sum over states of L, every state in the window's graph."""
    model, total, inner, outputs = trainer.model, 0.0, 0.0, []
    mask = torch.ones_like(window.inputs, dtype=torch.bool) if window.mask is None else window.mask
    after = window.lookahead
    inputs, targets = torch.cat([window.inputs, after.inputs]), torch.cat([window.targets, after.targets])
    valid, counts = torch.cat([torch.ones_like(mask), after.valid]), torch.cat([mask, after.counts])
    length = len(window.inputs)
    for begin in range(0, length, every):
        output, state = model(window.inputs[begin : begin + every], state)
        outputs.append(output)
        end = min(begin + every, length)
        span = slice(end, end + M)
        if end < length or at_end:
            ahead = dni.Lookahead(inputs[span], targets[span], valid[span], counts[span])
            inner = inner + predictor_loss(trainer, state, ahead)
    losses = torch.where(mask, problems.unreduced(torch.cat(outputs), window.targets), 0)
    total = losses.sum() / mask.sum() + 0.7 * inner / (T * LANES)
    found = torch.autograd.grad(total, list(model.parameters()))
    return {name: g for (name, _), g in zip(model.named_parameters(), found, strict=True)}


@pytest.mark.parametrize("name", problems.MODELS)
@pytest.mark.parametrize("every", [1, 2, 4, 5])
@pytest.mark.parametrize("masked", [False, True])
def test_the_gradient_is_that_of_the_losses_of_all_states(name, every, masked):
    trainer = made(name, message_every=every)
    state = trainer_initial(trainer.model)
    for window in windows(masked=masked, ends={1: [0]}):
        result = trainer.step(window.inputs, window.targets, ends=window.ends, mask=window.mask, lookahead=window.lookahead)
        expected = by_hand(trainer, window, states.detach(state), every)
        assert_close(problems.gradients(trainer.model), expected, **EXACT)
        assert not result.skipped
        state = trainer.state


def test_the_message_at_the_end_may_be_left_out():
    trainer = made(message_every=2, message_at_end=False)
    (window, *_) = windows()
    step(trainer, [window])
    expected = by_hand(trainer, window, trainer_initial(trainer.model), 2, at_end=False)
    assert_close(problems.gradients(trainer.model), expected, **EXACT)
    whole = by_hand(trainer, window, trainer_initial(trainer.model), 2)
    assert any((whole[name] - expected[name]).norm() > 1e-3 * expected[name].norm() for name in expected)


@pytest.mark.parametrize("every", [2, T, 100])
def test_a_window_without_a_state_inside_gets_no_message_if_none_is_sent_at_the_end(every):
    """A window of `every` steps or fewer, such as the short last window of a stream; its predictor still learns."""
    trainer = made(message_every=every, message_at_end=False)
    first, second, third, _ = windows(4)
    short = second._replace(inputs=second.inputs[:2], targets=second.targets[:2], lookahead=third.lookahead)
    for window in (first, short):
        start = trainer_initial(trainer.model) if trainer.state is None else trainer.state
        (result,) = step(trainer, [window])
        expected = by_hand(trainer, window, states.detach(start), every, at_end=False)
        assert_close(problems.gradients(trainer.model), expected, **EXACT)
        parameters = trainer.credit.synthesizer.parameters()
        assert any(p.grad is not None and p.grad.any() for p in parameters)
        assert result.synthetic.loss.isfinite()


@pytest.mark.parametrize("every", [T, T + 1, 100])
def test_at_the_end_alone_it_is_what_it_was(every):
    one, other = made(lr=0.1, message_every=every), made(lr=0.1)
    assert_same([r.loss for r in step(one, windows())], [r.loss for r in step(other, windows())])
    assert_same(one.state_dict(), other.state_dict())


def test_the_predictor_learns_from_all_states_in_one_call():
    """Its gradient is that of its mean loss over the states and their steps."""
    trainer = made(message_every=2)
    calls = []
    model = trainer.credit.synthesizer.heads.model
    original = model.learn
    model.learn = lambda flat, context: calls.append(len(flat)) or original(flat, context)
    (window, *_) = windows()
    found = step(trainer, [window])[0].synthetic.loss
    assert calls == [3 * LANES]
    state, total = trainer_initial(trainer.model), 0.0
    for begin in (0, 2, 4):
        _, state = trainer.model(window.inputs[begin : begin + 2], state)
        text = torch.cat([window.inputs, window.lookahead.inputs]), torch.cat([window.targets, window.lookahead.targets])
        ahead = dni.Lookahead(*(part[begin + 2 : begin + 2 + M] for part in text), torch.ones(M, LANES, dtype=torch.bool))
        total = total + predictor_loss(trainer, states.detach(state), ahead)
    mean = total / (3 * M * LANES)
    torch.testing.assert_close(found, mean.detach(), **EXACT)
    parameters = [p for p in trainer.credit.synthesizer.parameters() if p.grad is not None]
    for mine, expected in zip(parameters, torch.autograd.grad(mean, parameters), strict=True):
        torch.testing.assert_close(mine.grad, expected, **EXACT)


@pytest.mark.parametrize("settings", [{"horizons": 1}, {"horizons": 3}, {"limit": 10.0}, {"accumulate": 2}], ids=str)
def test_resuming_is_exact(settings):
    def trainer_of():
        given = dict(settings)
        accumulate = given.pop("accumulate", 1)
        trainer = made(lr=0.05, message_every=2, **given)
        trainer.accumulate = accumulate
        return trainer

    def finish(interrupted):
        trainer = trainer_of()
        some = windows(6, ends={2: [1]})
        step(trainer, some[:3])
        if interrupted:
            saved = copy.deepcopy(trainer.state_dict())
            trainer = trainer_of()
            trainer.load_state_dict(saved)
        step(trainer, some[3:])
        return trainer.state_dict()

    assert_same(finish(True), finish(False))


def test_a_bad_message_is_left_out_everywhere(decides):
    """A NaN in the predictor reaches no state of the window."""
    trainer = made(message_every=2)
    plain = made(scale=0.0)
    with torch.no_grad():
        next(trainer.credit.synthesizer.parameters()).fill_(float("nan"))
    (window, *_) = windows()
    step(trainer, [window])
    step(plain, [window])
    assert_close(problems.gradients(trainer.model), problems.gradients(plain.model), **EXACT)


def test_settings_that_do_not_go_together():
    model = problems.make_model("lstm")
    regressed = dni.StateSynthesizer(trainer_initial(model), cells=model.cells)
    config = dni.SyntheticGradientConfig(message_every=2)
    with pytest.raises(ValueError, match="message_every needs a synthesizer that learns from the next steps"):
        dni.SequenceTrainer(
            model, torch.optim.SGD(model.parameters(), 0.1), problems.unreduced, synthesizer=regressed, config=config
        )
    with pytest.raises(ValueError, match="message_every does not work with an auxiliary task"):
        dni.SyntheticGradientConfig(message_every=2, auxiliary=dni.AuxiliaryTask(trainer_initial(model)))
    trainer = made(message_every=2)
    with pytest.raises(ValueError, match="checkpoint_every does not work with message_every"):
        trainer.checkpoint_every = 3
    assert isinstance(trainer.credit.synthesizer, Horizons)


class Oracle(dni.Predictor):
    """Knows the losses of the next m steps: it runs the model itself. It predicts at a window's last state alone."""

    steps = 2 * T

    def __init__(self, model, packing):
        super().__init__()
        self.known = [model, packing]  # no submodules
        self.unused = torch.nn.Parameter(torch.zeros((), dtype=torch.float64))

    def losses(self, flats, context):
        model, packing = self.known
        state = packing.unpack(flats[0], states.map_tensors(lambda leaf: torch.zeros_like(leaf), self.like(flats)))
        fixed = {name: parameter.detach() for name, parameter in model.named_parameters()}
        outputs, _ = torch.func.functional_call(model, fixed, (context.inputs, state))
        losses = problems.unreduced(outputs, context.targets)
        at_the_end = torch.arange(losses.shape[1]) >= losses.shape[1] - LANES
        return dni.StepLosses(losses + 0 * self.unused, context.counts & at_the_end)

    def like(self, flats):
        model, _ = self.known
        found = trainer_initial(model)
        dims = states.broadcast_to_leaves(model.state_batch_dim, found, "dims")
        count = flats.shape[1] // LANES
        leaves = [torch.cat([leaf] * count, dim) for leaf, dim in zip(states.flatten(found), dims, strict=True)]
        return states.unflatten(found, leaves)


@pytest.mark.parametrize("name", problems.MODELS)
def test_an_oracle_at_the_end_gives_full_bptt_beside_messages_inside(name):
    """Three windows, with frozen parameters: the summed gradients are those of one graph over all of them."""
    model = problems.make_model(name)
    synthesizer = dni.FutureGradient(
        trainer_initial(model),
        lambda size: Oracle(model, Packing(trainer_initial(model), model.state_batch_dim)),
        batch_dim=model.state_batch_dim,
    ).double()
    trainer = dni.SequenceTrainer(
        model,
        problems.frozen(model),
        problems.unreduced,
        synthesizer=synthesizer,
        synthesizer_optimizer=torch.optim.SGD(synthesizer.parameters(), 0.0),
        config=dni.SyntheticGradientConfig(synthetic_scale=1.0, message_every=2, regress_every=1000),
        initial_state=lambda lanes: trainer_initial(model),
        state_batch_dim=model.state_batch_dim,
    )
    some = list(dni.with_lookahead(problems.cut(problems.tokens(3 * T, LANES), T), 2 * T))
    total = {name: torch.zeros_like(parameter) for name, parameter in model.named_parameters()}
    for window in some:
        step(trainer, [window])
        total = {name: found + total[name] for name, found in problems.gradients(model).items()}
    expected = reference.full_bptt(model, problems.mean, some, trainer_initial(model), model.state_batch_dim)
    assert_close(total, expected, rtol=1e-10, atol=1e-12)
