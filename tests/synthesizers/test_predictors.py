"""Predictors of far steps: their losses are those of slow references, and the message is the gradient of the loss."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn

import dni_seq as dni
from dni_seq.core.windows import Past, Surroundings
from dni_seq.streams.algorithmic_tasks import input_losses
from dni_seq.synthesizers.for_model import class_losses, squared_error
from dni_seq.synthesizers.gated_predictors import (
    LARGEST_WEIGHT,
    GatedFuture,
    GatedPast,
    JointPredictor,
    Offsets,
    stretches,
)
from tests import problems, reference
from tests.training import trainer_initial

M, LANES, SIZE, VOCABULARY = 5, 3, 6, 7
EXACT = {"rtol": 1e-12, "atol": 1e-13}


def future(draws=None):
    embedding = nn.Embedding(VOCABULARY, 4)
    sizes = {"inputs_width": 4, "outputs": VOCABULARY, "units": 8}
    return GatedFuture(SIZE, M, inputs=embedding, loss_fn=class_losses, draws=draws, **sizes).double()


def past(draws=None, steps=M):
    return GatedPast(SIZE, steps, outputs=VOCABULARY, loss_fn=class_losses, units=8, draws=draws).double()


def squared_outputs(outputs, targets):
    return (outputs - targets).square().mean(-1)


def past_of_two():
    """Predicts fewer numbers than there are lanes, which is computed in another order."""

    def losses(outputs, inputs):
        return (outputs - inputs[..., None]).square().mean(-1)

    return GatedPast(SIZE, M, outputs=2, loss_fn=losses, units=8).double()


def surroundings(steps=M):
    generator = torch.Generator().manual_seed(4)
    before, inputs, targets = (torch.randint(VOCABULARY, (steps, LANES), generator=generator) for _ in range(3))
    counts = torch.rand(steps, LANES, generator=generator) < 0.7
    started = torch.tensor([steps, 3, 0])  # inputs since the start of each lane's sequence
    valid = torch.arange(steps)[:, None] < started
    lookahead = dni.Lookahead(inputs, targets, torch.ones(steps, LANES, dtype=torch.bool), counts)
    return Surroundings(Past(before, valid), lookahead)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def history_of(past):
    return [[past.inputs[ago, b] for ago in reversed(range(M)) if past.valid[ago, b]] for b in range(LANES)]


def expected_total(predictor, flat, around):
    if isinstance(predictor, JointPredictor):
        return sum(expected_total(part, flat, around) for part in predictor.predictors)
    if isinstance(predictor, GatedPast):
        return reference.gated_past_losses(predictor, flat, history_of(around.past))
    ahead = around.lookahead
    return reference.gated_future_losses(predictor, flat, ahead.inputs, ahead.targets, ahead.counts)


@pytest.mark.parametrize(
    "make",
    [future, past, past_of_two, lambda: JointPredictor([future(), past()])],
    ids=["future", "past", "past of two", "both"],
)
def test_loss_and_message_are_those_of_the_slow_reference(make):
    predictor, around = make(), surroundings()
    flat = torch.randn(LANES, SIZE, dtype=torch.float64, requires_grad=True)
    total = expected_total(predictor, flat, around)
    parameters = list(predictor.parameters())
    message, *of_weights = torch.autograd.grad(total, [flat, *parameters])
    losses = predictor.predicted * LANES
    torch.testing.assert_close(predictor.loss(flat.detach(), around), (total / losses).detach(), **EXACT)
    torch.testing.assert_close(predictor.gradients(flat.detach(), around), message[None], **EXACT)
    found, mean = predictor.learn(flat.detach(), around)
    torch.testing.assert_close(found * losses, message[None], **EXACT)
    torch.testing.assert_close(mean, (total / losses).detach(), **EXACT)
    for parameter, gradient in zip(parameters, of_weights, strict=True):
        torch.testing.assert_close(parameter.grad * losses, gradient, **EXACT)


@pytest.mark.parametrize("steps_and_count", [(40, 40), (40, 8), (1000, 20), (5, 3), (10, 1), (100, 99)], ids=str)
def test_stretches_cover_the_reach_and_grow(steps_and_count):
    steps, count = steps_and_count
    bounds = stretches(steps, count)
    lengths = [b - a for a, b in itertools.pairwise(bounds)]
    assert (bounds[0], bounds[-1], len(lengths)) == (0, steps, count)
    assert min(lengths) >= 1
    assert lengths[-1] == max(lengths)


def test_drawn_steps_estimate_the_loss_of_all():
    """The mean over draws is the loss of all steps, with each stretch's steps drawn equally often and none weighing more
    than the limit."""
    around = surroundings(12)
    flat = torch.randn(LANES, SIZE, dtype=torch.float64)
    some = past(draws=4, steps=12)
    whole = GatedPast(SIZE, 12, outputs=VOCABULARY, loss_fn=class_losses, units=8).double()
    whole.load_state_dict(some.state_dict())
    assert max(some.offsets.lengths) <= LARGEST_WEIGHT
    draws = torch.stack([some.losses(flat[None], around).total for _ in range(4000)]).detach()
    expected = whole.losses(flat[None], around).total.detach()
    assert abs(draws.mean() - expected) < 4 * draws.std() / 4000**0.5
    assert draws.std() > 0
    far = Offsets(1000, 10)
    chosen, weights = far()
    assert weights.max() == LARGEST_WEIGHT
    assert ((far.first <= chosen) & (chosen < far.first + far.lengths)).all()


@pytest.mark.parametrize("draws", [2, None])
def test_messages_agree_with_finite_differences_of_the_loss(draws):
    predictor, around = JointPredictor([future(draws), past(draws)]), surroundings()
    flat, direction = torch.randn(2, LANES, SIZE, dtype=torch.float64)
    state = torch.get_rng_state()

    def loss(at):
        torch.set_rng_state(state)
        return float(predictor.losses(at[None], around).total.detach())

    torch.set_rng_state(state)
    (message,) = predictor.gradients(flat, around)
    slope = (loss(flat + 1e-6 * direction) - loss(flat - 1e-6 * direction)) / 2e-6
    assert float((message * direction).sum()) == pytest.approx(slope, rel=1e-6)


def test_wrong_use_says_what_to_change():
    with pytest.raises(ValueError, match="GatedPast: steps must be positive"):
        past(steps=0)
    with pytest.raises(ValueError, match="draws must be between 1 and the 5 steps"):
        past(draws=6)
    with pytest.raises(ValueError, match="one predictor or more, with one part each"):
        JointPredictor([])
    around = surroundings()
    flat = torch.zeros(LANES, SIZE, dtype=torch.float64)
    with pytest.raises(ValueError, match="predicts 5 steps of the past, but its context is Lookahead"):
        past().loss(flat, around.lookahead)
    with pytest.raises(ValueError, match="looks 5 steps ahead, but its context is NoneType"):
        future().loss(flat, around._replace(lookahead=None))
    short = GatedPast(SIZE, 9, outputs=VOCABULARY, loss_fn=class_losses).double()
    with pytest.raises(ValueError, match="predicts 9 steps of the past, but its context is 5 steps"):
        short.loss(flat, around)
    with pytest.raises(ValueError, match=r"loss_fn must return unreduced losses \[5, 3\]"):
        GatedPast(SIZE, M, outputs=2, loss_fn=lambda outputs, inputs: outputs.mean()).double().loss(flat, around)


@pytest.mark.parametrize("predict", ["future", "past", "both"])
@pytest.mark.parametrize("tokens", [True, False])
def test_for_model_builds_them_for_tokens_and_vectors(predict, tokens):
    model = problems.make_model("lstm")
    kind = {"vocabulary": VOCABULARY} if tokens else {"outputs": 2}
    inputs = torch.zeros(3, LANES, dtype=torch.int64) if tokens else torch.zeros(3, LANES, 4)
    settings = {"predict": predict, "predict_steps": 9, "state": trainer_initial(model)}
    made = dni.FutureGradient.for_model(model, problems.unreduced, example_inputs=inputs, **kind, **settings)
    assert (made.lookahead, made.past_steps) == {"future": (9, 0), "past": (0, 9), "both": (9, 9)}[predict]
    assert made.network.horizons == 1
    assert made.recommended.synthetic_scale == 1.0


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"predict": "everything"}, "predict must be one of"),
        ({"predict": "past", "horizons": 2}, 'horizons needs predict="horizons"'),
        ({"predict_steps": 5, "horizons": 2}, "steps must be a multiple of parts, got 5 steps and 2 parts"),
        ({"past_loss_fn": class_losses}, 'past_loss_fn needs predict="past" or "both"'),
        ({"past_loss_fn": class_losses, "predict": "past"}, "past token ids are always predicted by cross-entropy"),
    ],
)
def test_for_model_refuses_what_does_not_go_together(given, message):
    model = problems.make_model("lstm")
    inputs = torch.zeros(3, LANES, dtype=torch.int64)
    with pytest.raises(ValueError, match=message):
        dni.FutureGradient.for_model(model, problems.unreduced, example_inputs=inputs, vocabulary=VOCABULARY, **given)


@pytest.mark.parametrize("predict", ["past", "both"])
def test_the_loss_of_past_vectors_may_be_chosen(predict):
    """Bits have a cross-entropy, other vectors the mean squared error."""
    model = problems.make_model("lstm")
    bits, valid = torch.randint(2, (M, LANES, 4)).double(), torch.ones(M, LANES, dtype=torch.bool)
    around = Surroundings(Past(bits, valid), dni.Lookahead(bits, torch.zeros(M, LANES, 2).double(), valid))
    given = {"outputs": 2, "predict": predict, "predict_steps": M, "state": trainer_initial(model)}
    found = []
    for own, expected in (({}, squared_error), ({"past_loss_fn": input_losses}, input_losses)):
        torch.manual_seed(1)
        made = dni.FutureGradient.for_model(model, squared_outputs, example_inputs=bits, **own, **given).double()
        model_of_past = made.model if predict == "past" else made.model.predictors[1]
        model_of_past.output.weight.data.zero_()  # so every prediction is the bias
        predicted = model_of_past.output.bias.expand(M, LANES, 4)
        flats = torch.randn(1, LANES, model_of_past.read.in_features, dtype=torch.float64)
        losses = made.model.losses(flats, around).losses[-M:]
        assert torch.equal(losses, expected(predicted, bits))
        found.append(losses)
    assert not torch.equal(*found)


def test_the_next_steps_may_be_fewer_than_a_window():
    """For messages inside windows; the weight of a step is still that of the window."""
    model = problems.make_model("lstm")
    inputs = torch.zeros(12, LANES, dtype=torch.int64)
    made = dni.FutureGradient.for_model(
        model, problems.unreduced, example_inputs=inputs, vocabulary=VOCABULARY, predict_steps=4, horizons=2
    )
    assert (made.lookahead, made.network.horizons, made.step_weight.window) == (4, 2, 12)
