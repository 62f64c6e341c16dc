"""A predictor of the past in a trainer: it reads the inputs that led to each state, whatever happens between windows."""

from __future__ import annotations

import copy

import pytest
import torch

import dni_seq as dni
from dni_seq.core import states
from dni_seq.synthesizers.for_model import class_losses
from dni_seq.synthesizers.gated_predictors import GatedFuture, GatedPast, JointPredictor
from tests import problems, reference
from tests.training import LANES, trainer_initial
from tests.training import assert_same as assert_close

M = 5
EXACT = {"rtol": 1e-11, "atol": 1e-13}


def past(size):
    return GatedPast(size, M, outputs=problems.VOCABULARY, loss_fn=class_losses, units=8)


def both(size):
    future = GatedFuture(
        size,
        3,
        inputs=torch.nn.Embedding(problems.VOCABULARY, 4),
        inputs_width=4,
        outputs=problems.VOCABULARY,
        loss_fn=class_losses,
        units=8,
    )
    return JointPredictor([future, past(size)])


def made(name="lstm", predictor=past, lr=0.0, scale=0.7, **config):
    model = problems.make_model(name)
    torch.manual_seed(5)
    synthesizer = dni.FutureGradient(
        trainer_initial(model), predictor, cells=model.cells, batch_dim=model.state_batch_dim
    ).double()
    return dni.SequenceTrainer(
        model,
        torch.optim.SGD(model.parameters(), lr),
        problems.unreduced,
        synthesizer=synthesizer,
        synthesizer_optimizer=torch.optim.SGD(synthesizer.parameters(), lr),
        config=dni.SyntheticGradientConfig(**{"synthetic_scale": scale, "regress_every": 1000, **config}),
        initial_state=lambda lanes: trainer_initial(model),
        state_batch_dim=model.state_batch_dim,
    )


def step(trainer, some):
    return [trainer.step(w.inputs, w.targets, ends=w.ends, mask=w.mask, lookahead=w.lookahead) for w in some]


def windows(count=4, length=2, ends=None):
    return list(problems.cut(problems.tokens(count * length, LANES), length, ends))


def message_loss(trainer, state, history):
    heads = trainer.credit.synthesizer
    flat = heads.packing.pack(states.floating(state))
    cell = torch.zeros(flat.shape[1], dtype=torch.bool)
    for span in heads.cells:
        cell[span] = True
    return reference.gated_past_losses(heads.model, torch.where(cell, flat.tanh(), flat), history)


@pytest.mark.parametrize("name", problems.MODELS)
@pytest.mark.parametrize("length", [1, 3, 8])
@pytest.mark.parametrize("every", [None, 2])
def test_the_gradient_is_that_of_the_losses_with_the_inputs_of_each_lane(name, length, every):
    """At the end of each window and at states inside it; lane 0 ends with the second window and starts anew."""
    trainer = made(name, message_every=every)
    history = [[] for _ in range(LANES)]
    state = trainer_initial(trainer.model)
    for window in windows(4, length, ends={1: [0]}):
        step(trainer, [window])
        inner, outputs, at = 0.0, [], states.detach(state)
        bounds = [*range(every or length, length, every or length), length]
        for begin, end in zip([0, *bounds], bounds, strict=False):
            output, at = trainer.model(window.inputs[begin:end], at)
            outputs.append(output)
            for lane in range(LANES):
                history[lane] += list(window.inputs[begin:end, lane])
            ended = end == length and window.ends is not None
            seen = [[] if ended and bool(window.ends[lane]) else history[lane] for lane in range(LANES)]
            inner = inner + message_loss(trainer, at, seen)
        losses = problems.unreduced(torch.cat(outputs), window.targets)
        found = torch.autograd.grad(losses.mean() + 0.7 * inner / (length * LANES), list(trainer.model.parameters()))
        expected = {name: g for (name, _), g in zip(trainer.model.named_parameters(), found, strict=True)}
        assert_close(problems.gradients(trainer.model), expected, **EXACT)
        state = trainer.state
        if window.ends is not None:
            history = [[] if bool(window.ends[lane]) else history[lane] for lane in range(LANES)]


def test_states_after_the_end_of_a_sequence_have_no_past():
    """In a lane that ends, steps behind the last that counts are padding; a state there learns nothing."""
    trainer = made(message_every=1)
    (window,) = windows(1, 4)
    mask = torch.ones(4, LANES, dtype=torch.bool)
    mask[2:, 1] = False
    ends = torch.tensor([lane == 1 for lane in range(LANES)])
    seen = []
    model = trainer.credit.synthesizer.model
    learn = model.learn
    model.learn = lambda flat, context: seen.append(context.past.valid) or learn(flat, context)
    step(trainer, [window._replace(mask=mask, ends=ends)])
    by_state = seen[0].reshape(M, 4, LANES)
    assert by_state[:, :, 1].sum(0).tolist() == [1, 2, 0, 0]
    assert by_state[:, :, 0].sum(0).tolist() == [1, 2, 3, 4]


@pytest.mark.parametrize("predictor", [past, both])
@pytest.mark.parametrize("settings", [{}, {"message_every": 1}, {"fidelity_every": 2, "replay_windows": 2}], ids=str)
def test_resuming_is_exact(predictor, settings):
    def trainer_of():
        return made(predictor=predictor, lr=0.05, **{"regress_every": 2, **settings})

    def finish(interrupted):
        trainer = trainer_of()
        some = list(dni.with_lookahead(windows(8, ends={2: [1]}), 3))
        step(trainer, some[:3])
        if interrupted:
            saved = copy.deepcopy(trainer.state_dict())
            trainer = trainer_of()
            trainer.load_state_dict(saved)
        step(trainer, some[3:])
        return trainer.state_dict()

    assert_close(finish(True), finish(False), rtol=0, atol=0)


def valid_after(change):
    trainer = made(lr=0.05)
    first, second, third, *_ = windows(4)
    step(trainer, [first])
    change(trainer, second)
    trainer.step(third.inputs, third.targets)
    return trainer.state_dict()["past_inputs"]["valid"].sum(0).tolist()


def test_what_breaks_the_stream_breaks_the_past():
    """Two steps a window. A reset, a state of the user's, and a lane that ends start anew; a skipped window adds nothing."""

    def skipped(trainer, window):
        with torch.no_grad():
            trainer.model.readout.bias.add_(torch.nan)
        assert trainer.step(window.inputs, window.targets).skipped
        with torch.no_grad():
            trainer.model.readout.bias.zero_()

    def replaced(trainer, window):
        trainer.state = trainer_initial(trainer.model)

    def failing(trainer, window):
        with pytest.raises(ValueError, match="lanes"):
            trainer.step(window.inputs[:, :1], window.targets[:, :1])

    assert valid_after(lambda trainer, window: step(trainer, [window])) == [M] * LANES
    assert valid_after(skipped) == [4] * LANES
    assert valid_after(failing) == [4] * LANES
    assert valid_after(lambda trainer, window: trainer.reset()) == [2] * LANES
    assert valid_after(replaced) == [2] * LANES
    ends = torch.tensor([lane == 0 for lane in range(LANES)])
    assert valid_after(lambda trainer, window: step(trainer, [window._replace(ends=ends)])) == [2, *[M] * (LANES - 1)]


def test_it_needs_no_lookahead_and_a_state_learns_to_remember():
    """With the predictor of the past alone, a GRU whose loss asks for nothing keeps its inputs better and better."""
    torch.manual_seed(0)
    model = torch.nn.GRU(4, 16)
    predictor = dni.FutureGradient.for_model(
        model,
        lambda outputs, targets: 0 * (outputs.mean(-1) - targets),
        example_inputs=torch.zeros(1, 8, 4),
        outputs=16,
        predict="past",
        predict_steps=4,
    )
    trainer = dni.SequenceTrainer(
        model,
        torch.optim.Adam(model.parameters(), 1e-2),
        lambda outputs, targets: 0 * (outputs.mean(-1) - targets),
        synthesizer=predictor,
        synthesizer_optimizer=torch.optim.Adam(predictor.parameters(), 1e-2),
    )
    losses = [float(trainer.step(torch.randn(1, 8, 4), torch.zeros(1, 8)).synthetic.loss) for _ in range(400)]
    assert sum(losses[-50:]) < 0.7 * sum(losses[50:100])


def test_batch_first_inputs_are_refused():
    model = problems.make_model("lstm")
    synthesizer = dni.FutureGradient(trainer_initial(model), past, cells=model.cells).double()
    with pytest.raises(ValueError, match="reads the past needs time-major windows"):
        dni.SequenceTrainer(
            model, torch.optim.SGD(model.parameters(), 0.1), problems.unreduced, synthesizer=synthesizer, batch_dim=0
        )


def test_it_is_no_tail_of_an_exact_future():
    model = problems.make_model("lstm")
    tail = dni.FutureGradient(trainer_initial(model), past, cells=model.cells).double()
    with pytest.raises(ValueError, match="the tail predicts the past"):
        dni.ExactFuture(model, problems.unreduced, steps=2, tail=tail)
