"""What a synthesizer takes from its trainer, and what contradicts it."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import dni_seq as dni
from dni_seq.core import states
from dni_seq.models.language_model import LanguageModel, token_losses
from dni_seq.synthesizers.base import Recommended, recommended, supports_auto_scale
from dni_seq.synthesizers.binding import StepWeight, bind
from dni_seq.synthesizers.jaderberg2017 import Jaderberg2017Synthesizer
from dni_seq.synthesizers.multi_horizon import Horizons
from dni_seq.synthesizers.packing import Packing, usual_lane_dim
from tests import problems
from tests.credit.trainers import T, future_gradient, windows_of
from tests.training import trainer_initial


def trained(synthesizer, model, loss_fn=problems.unreduced, sees=True, **settings):
    trainer = dni.SequenceTrainer(
        model,
        problems.frozen(model),
        loss_fn,
        synthesizer=synthesizer,
        state_batch_dim=model.state_batch_dim,
        initial_state=lambda lanes: trainer_initial(model),
        **settings,
    )
    for window in windows_of(2 * T):
        trainer.step(window.inputs, window.targets, lookahead=window.lookahead if sees else None)
    return trainer


@pytest.mark.parametrize("reduction", ["mean", "lane-mean", "sum"])
@pytest.mark.parametrize("kind", ["future", "exact"])
def test_messages_have_the_unit_of_the_trainers_loss(kind, reduction):
    """Nobody gives T or the reduction; the message is what it is with both given."""

    def message(**given):
        model = problems.make_model("lstm")
        torch.manual_seed(0)
        if kind == "exact":
            synthesizer = dni.ExactFuture(model, problems.unreduced, steps=T, **given)
        else:
            synthesizer = future_gradient(model, **given)
            nn.init.normal_(synthesizer.heads.model.output.weight)
        trainer = trained(synthesizer, model, reduction=reduction)
        return states.floating(synthesizer(trainer.state, windows_of(2 * T)[0].lookahead))

    for found, expected in zip(message(), message(window=T, reduction=reduction), strict=True):
        assert torch.equal(found, expected)
        assert found.any()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"window": 20}, "FutureGradient was built with window=20, but the trainer's window is 3"),
        ({"reduction": "sum"}, "FutureGradient was built with reduction='sum', but the trainer's reduction is 'mean'"),
    ],
)
def test_a_future_gradient_for_other_windows_is_refused(given, message):
    model = problems.make_model("lstm")
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    with pytest.raises(ValueError, match=message):
        trained(future_gradient(model, **given), model)
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"window": 20}, "ExactFuture was built with window=20"),
        ({"reduction": "sum"}, "ExactFuture was built with reduction='sum'"),
        ({"batch_dim": 0}, "ExactFuture was built with batch_dim=0, but the trainer's state_batch_dim is 1"),
    ],
)
def test_an_exact_future_for_other_windows_is_refused(given, message):
    model = problems.make_model("lstm")
    with pytest.raises(ValueError, match=message):
        trained(dni.ExactFuture(model, problems.unreduced, steps=2, **given), model)


def test_a_scalar_loss_says_nothing_of_a_reduction():
    """The trainer reduces nothing then, so its setting contradicts nothing."""
    model = problems.make_model("lstm")
    exact = dni.ExactFuture(model, problems.unreduced, steps=2, reduction="sum")
    trained(exact, model, problems.summed)
    assert (exact.step_weight.window, exact.step_weight.reduction) == (T, "sum")


def test_lanes_elsewhere_are_refused():
    model = problems.make_model("lstm")
    synthesizer = dni.StateSynthesizer(model.initial_state(2), hidden=(4,), batch_dim=2).double()
    with pytest.raises(ValueError, match=r"along the dimensions \[2, 2\], the trainer's state_batch_dim says \[1, 1\]"):
        trained(synthesizer, model)


@pytest.mark.parametrize(
    ("example", "usual", "same", "other"),
    [
        (torch.zeros(2, 3, 5), 1, (1, -2), (0, 2, -1)),
        (torch.zeros(3, 5), 0, (0, -2), (1, -1)),
        ((torch.zeros(3, 5), torch.zeros(3, dtype=torch.int64)), 0, (0, (0, 0), (-2, -1), (0, 7)), (1, (1, 0))),
        ({"a": torch.zeros(2, 3, 5), "b": torch.zeros(3, 5)}, None, ({"a": 1, "b": 0}, {"a": -2, "b": -2}), (0, 1)),
    ],
    ids=["layers", "one layer", "with a counter", "nest"],
)
def test_lane_dimensions_are_compared_counted_from_either_end(example, usual, same, other):
    """A leaf that is not a floating-point tensor is not compared."""
    packing = Packing(example)
    if usual is not None:
        assert usual_lane_dim(states.flatten(example)[0]) == usual
    for dims in same:
        packing.bind(window=T, reduction=None, state_batch_dim=dims, state=example)
    for dims in other:
        with pytest.raises(ValueError, match="the synthesizer was built for states with lanes along the dimensions"):
            packing.bind(window=T, reduction=None, state_batch_dim=dims, state=example)


@pytest.mark.parametrize("name", problems.MODELS)
def test_lanes_of_pytorchs_states_need_not_be_given(name):
    model = problems.make_model(name)
    synthesizer = dni.StateSynthesizer(trainer_initial(model), hidden=(4,), cells=model.cells).double()
    assert trained(synthesizer, model, sees=False).steps == 2


def test_a_state_of_other_rank_needs_its_lanes():
    with pytest.raises(ValueError, match=r"a state's leaf has shape \(2, 3, 4, 5\): pass batch_dim"):
        dni.StateSynthesizer(torch.zeros(2, 3, 4, 5))


def test_copies_are_told_too():
    model = problems.make_model("gru")
    exact = dni.ExactFuture(model, problems.unreduced, steps=2, tail=dni.StateSynthesizer(trainer_initial(model)).double())
    config = dni.SyntheticGradientConfig(target_network=2)
    settings = {"synthesizer": exact, "config": config, "state_batch_dim": 1}
    trainer = dni.SequenceTrainer(model, problems.frozen(model), problems.mean, **settings)
    trainer.credit.bind(7, trainer_initial(model))
    assert trainer.credit.target_network.module.step_weight.window == exact.step_weight.window == 7


def test_a_second_trainer_may_have_other_windows():
    weight = StepWeight("It", None, None)
    for window in (3, 5):
        weight.bind(window, "sum")
        assert (weight.window, weight.reduction) == (window, "sum")


def test_a_weight_without_a_window():
    weight = StepWeight("It", None, None)
    with pytest.raises(ValueError, match="It does not know the window length: pass window="):
        weight(2)
    weight.bind(4, None)
    assert weight(2) == 1 / 8
    assert StepWeight("It", None, "lane-mean")(4) == 1 / 4
    with pytest.raises(ValueError, match="window must be positive, got 0"):
        StepWeight("It", 0, None)


def test_every_part_that_can_be_told_is():
    class Listener(nn.Module):
        def bind(self, **told):
            self.told = told

    outer = nn.Sequential(Listener(), nn.Sequential(Listener(), nn.Linear(1, 1)))
    bind(outer, window=3, reduction="sum", state_batch_dim=0, state=torch.zeros(1, 1))
    expected = {"window": 3, "reduction": "sum", "state_batch_dim": 0}
    for listener in (outer[0], outer[1][0]):
        del listener.told["state"]
    assert outer[0].told == outer[1][0].told == expected


def test_recommendations():
    model = problems.make_model("lstm")
    example = trainer_initial(model)
    future = future_gradient(model, 3)
    network = Jaderberg2017Synthesizer(10, hidden=5)
    exact = dni.ExactFuture(model, problems.unreduced, steps=2)
    with_tail = dni.ExactFuture(model, problems.unreduced, steps=2, tail=future_gradient(model).heads)
    assert recommended(future) == recommended(future.heads) == (2 / 3, 1.0, float("inf"), 100)
    assert recommended(future_gradient(model)).synthetic_scale == 1.0
    assert recommended(dni.Normalized(dni.GatedCells(network))) == recommended(network) == (0.1, 0.1, 1.0, 1)
    assert recommended(exact) == (1.0, 0.9, 1.0, 1)
    assert recommended(with_tail) == (1.0, 0.9, float("inf"), 100)
    assert recommended(Horizons(dni.StateHeads(example, 2), horizons=2)) == recommended(nn.Linear(1, 1)) == Recommended()
    assert [supports_auto_scale(each) for each in (exact, future, nn.Linear(1, 1))] == [False, True, True]
    settings = dni.SequenceTrainer(model, problems.frozen(model), problems.mean, synthesizer=future).credit.settings
    assert (settings.scale, settings.discount, settings.clip, settings.regress_every) == (2 / 3, 1.0, None, 100)
    config = dni.SyntheticGradientConfig(discount=0.5, synthesizer_clip=2.0, regress_every=4)
    settings = dni.SequenceTrainer(
        model, problems.frozen(model), problems.mean, synthesizer=future, config=config
    ).credit.settings
    assert (settings.scale, settings.discount, settings.clip, settings.regress_every) == (2 / 3, 0.5, 2.0, 4)


LENGTHS = (4, 4, 2, 4)
"""Windows of a sequence whose last one is short, and one of the next sequence."""


def small_trainer(window: int, given: bool = True, **settings) -> dni.SequenceTrainer:
    """A language model of 7 tokens in float64 with the default synthesizer, built for windows of a length, or for any."""
    torch.manual_seed(0)
    model = LanguageModel(7, embed=4, hidden=5, layers=1).double()
    example = torch.zeros(window, 1, dtype=torch.long)
    synthesizer = dni.FutureGradient.for_model(
        model, token_losses, example_inputs=example, vocabulary=7, horizons=1, predict_steps=4
    )
    if not given:
        synthesizer.step_weight = StepWeight("FutureGradient", None, None)
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    return dni.SequenceTrainer(model, optimizer, token_losses, synthesizer=synthesizer, **settings)


def read_on(trainer: dni.SequenceTrainer, lengths, at: int) -> None:
    """Trains on windows of some lengths from a step of a text on."""
    text = torch.randint(7, (60, 3), generator=torch.Generator().manual_seed(1))
    for length in lengths:
        end = at + length
        ahead = dni.Lookahead(text[end : end + 4], text[end + 1 : end + 5], torch.ones(4, 3, dtype=torch.bool))
        trainer.step(text[at:end], text[at + 1 : end + 1], lookahead=ahead)
        at = end


@pytest.mark.parametrize("given", [True, False])
def test_a_run_that_resumes_at_a_short_window_keeps_the_weight_of_a_step(given):
    whole = small_trainer(4, given)
    read_on(whole, LENGTHS, 0)
    begun, resumed = small_trainer(4, given), small_trainer(4, given)
    read_on(begun, LENGTHS[:2], 0)
    resumed.load_state_dict(copy.deepcopy(begun.state_dict()), lanes=3)
    read_on(resumed, LENGTHS[2:], 8)
    for one, two in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(one, two)


def test_a_run_may_go_on_in_windows_of_another_length():
    """The synthesizer is built for the new length; where it is not, T is set by hand."""
    begun = small_trainer(4)
    read_on(begun, (4,), 0)
    for length in (2, 6):
        for given in (True, False):
            resumed = small_trainer(length, given)
            resumed.load_state_dict(copy.deepcopy(begun.state_dict()), lanes=3)
            if not given:
                resumed.credit.window = length
            read_on(resumed, (length,), 4)
            assert (resumed.credit.window, resumed.credit.synthesizer.step_weight.window) == (length, length)


def test_the_first_window_may_be_short_where_the_length_does_not_matter():
    """At the start of a curriculum, for example."""
    for reduction in ("lane-mean", "sum"):
        read_on(small_trainer(4, reduction=reduction), (2, 4), 0)
    with pytest.raises(ValueError, match="built with window=4, but the trainer's window is 2"):
        read_on(small_trainer(4), (2,), 0)
