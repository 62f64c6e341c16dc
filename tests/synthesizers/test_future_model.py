"""The model of what is ahead: its features are its own exact gradient, and they tell of the network's."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import dni_seq as dni
from dni_seq.synthesizers.multi_horizon import Horizons
from tests import problems, reference
from tests.training import LANES, sequence_trainer, trainer_initial

SIZE, STEPS, WIDTH = 9, 6, 4


def vectors_loss(outputs, targets):
    return (outputs - targets).square().sum(-1)


def make(kind="tokens", steps=STEPS, parts=1):
    """A future model of tokens or of vectors, a state and what lies ahead of it, lanes that end among it."""
    torch.manual_seed(0)
    valid = torch.ones(steps, LANES, dtype=torch.bool)
    valid[steps // 2 :, 1] = False
    mask = torch.rand(steps, LANES) > 0.3
    common = {"inputs_width": WIDTH, "units": 11, "parts": parts}
    if kind == "tokens":
        embedding = nn.Embedding(problems.VOCABULARY, WIDTH)
        outputs = problems.VOCABULARY
        model = dni.FutureModel(SIZE, steps, inputs=embedding, outputs=outputs, loss_fn=problems.unreduced, **common)
        inputs, targets = (problems.tokens(steps, LANES, seed=seed) for seed in (1, 2))
    else:
        model = dni.FutureModel(SIZE, steps, inputs=nn.Linear(3, WIDTH), outputs=2, loss_fn=vectors_loss, **common)
        inputs, targets = torch.randn(steps, LANES, 3).double(), torch.randn(steps, LANES, 2).double()
    nn.init.normal_(model.from_step)
    return model.double(), torch.randn(LANES, SIZE).double(), dni.Lookahead(inputs, targets, valid, mask)


@pytest.mark.parametrize("kind", ["tokens", "vectors"])
@pytest.mark.parametrize(("steps", "parts"), [(1, 1), (2, 1), (2, 2), (STEPS, 1), (STEPS, STEPS)])
def test_features_are_the_exact_gradient_of_its_own_loss(kind, steps, parts):
    model, flat, ahead = make(kind, steps, parts)
    for context in (ahead, ahead._replace(mask=None)):
        expected = reference.future_features(model, flat, context)
        learning, _ = model(flat, context)
        with torch.no_grad():
            found, _ = model(flat, context)
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
        assert torch.equal(learning.detach(), found)


def test_no_step_sees_the_inputs_after_it():
    """An input of a language model is the target of the step before it."""
    model, flat, ahead = make()
    for step in range(STEPS):
        only = torch.zeros(STEPS, LANES, dtype=torch.bool)
        only[step] = True
        context = ahead._replace(mask=only)
        changed = ahead.inputs.clone()
        changed[step + 1 :] = (changed[step + 1 :] + 1) % problems.VOCABULARY
        assert torch.equal(model(flat, context)[0], model(flat, context._replace(inputs=changed))[0])
        changed[step] = (changed[step] + 1) % problems.VOCABULARY
        assert not torch.equal(model(flat, context)[0], model(flat, context._replace(inputs=changed))[0])


def test_a_step_sees_its_own_input_and_the_three_before_it():
    model, flat, ahead = make()
    changed = ahead.inputs.clone()
    changed[0] = (changed[0] + 1) % problems.VOCABULARY
    for step in range(STEPS):
        only = torch.zeros(STEPS, LANES, dtype=torch.bool)
        only[step] = True
        context = ahead._replace(mask=only, valid=torch.ones_like(only))
        same = torch.equal(model(flat, context)[0], model(flat, context._replace(inputs=changed))[0])
        assert same == (step > 3), step


def test_steps_after_the_end_have_no_effect():
    model, flat, ahead = make("vectors")
    ended = ~ahead.valid[..., None]
    noise = ahead._replace(inputs=torch.where(ended, 1e3, ahead.inputs), targets=torch.where(ended, 1e3, ahead.targets))
    for one, other in zip(model(flat, ahead), model(flat, noise), strict=True):
        assert torch.equal(one, other)
    nothing = ahead._replace(valid=torch.zeros_like(ahead.valid))
    features, loss = model(flat, nothing)
    assert features.abs().max() == 0
    assert loss == 0


def test_its_loss_is_the_mean_over_steps_and_lanes_and_trains_it():
    model, flat, ahead = make("vectors")
    ahead = ahead._replace(valid=torch.ones_like(ahead.valid), mask=None)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(60):
        _, loss = model(flat, ahead)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    with torch.no_grad():
        _, outputs = model._expected(flat[None], ahead)
    assert model(flat, ahead)[1].item() == pytest.approx(vectors_loss(outputs, ahead.targets).mean().item())
    assert losses[-1] < 0.3 * losses[0]


def share_explained(future):
    """R² of the messages for a frozen network after few windows, all of them of new text."""
    torch.manual_seed(0)
    model = problems.make_model("lstm")
    for parameter in model.readout.parameters():
        parameter.data *= 6  # certain of some outputs, so that what it expects counts
    embedding = nn.Embedding(problems.VOCABULARY, WIDTH)
    encoder = dni.LookaheadEncoder(1, embedding, embedding)

    def make_future(size):
        return dni.FutureModel(
            size,
            1,
            inputs=embedding,
            inputs_width=WIDTH,
            outputs=problems.VOCABULARY,
            loss_fn=problems.unreduced,
            units=32,
        )

    heads = dni.LeastSquaresHeads(
        trainer_initial(model),
        1,
        cells=model.cells,
        hidden=(16,) if future else (48,),
        encoder=encoder,
        future=make_future if future else None,
    )
    trainer = sequence_trainer(
        model,
        problems.frozen(model),
        problems.mean,
        synthesizer=Horizons(heads.double(), horizons=1),
        synthetic_scale=0.0,
        initial_state=lambda lanes: trainer_initial(model),
    )
    windows = dni.with_lookahead(problems.cut(problems.tokens(500, LANES), 1), 1)
    results = [trainer.step(w.inputs, w.targets, lookahead=w.lookahead) for w in windows]
    return float(results[-1].synthetic.r2[0])


def test_it_learns_what_a_perceptron_of_its_size_does_not():
    assert share_explained(True) > share_explained(False) + 0.05


def test_unsupported_cases_are_reported():
    model, flat, ahead = make()
    with pytest.raises(ValueError, match="6 steps ahead"):
        model(flat, ahead.span(0, 2))
    with pytest.raises(ValueError, match="units must be positive"):
        dni.FutureModel(SIZE, 1, inputs=nn.Identity(), inputs_width=3, outputs=2, loss_fn=problems.unreduced, units=0)
