"""Mistakes in a user's own loop give the right numbers, or one line that says what to change."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import dni_seq as dni
from tests import problems
from tests.credit.trainers import T, future_gradient
from tests.nests import assert_same

LANES, HIDDEN = 4, 6


class Regressor(nn.Module):
    """A GRU on vectors [T, B, 2] with one output [T, B]."""

    def __init__(self, layers: int = 1) -> None:
        super().__init__()
        self.rnn, self.out = nn.GRU(2, HIDDEN, layers), nn.Linear(HIDDEN, 1)

    def forward(self, inputs, state):
        hidden, state = self.rnn(inputs, state)
        return self.out(hidden)[..., 0], state


class Tagger(nn.Module):
    """An RNN on ids [T, B] with logits [T, B, 12]."""

    def __init__(self, rnn: type[nn.Module] = nn.GRU, **settings) -> None:
        super().__init__()
        self.embedding, self.rnn, self.out = nn.Embedding(12, 4), rnn(4, HIDDEN, **settings), nn.Linear(HIDDEN, 12)

    def forward(self, ids, state):
        hidden, state = self.rnn(self.embedding(ids), state)
        return self.out(hidden), state


def trainer_of(model, loss_fn, lr=0.1, **settings):
    return dni.SequenceTrainer(model, torch.optim.SGD(model.parameters(), lr), loss_fn, **settings)


def unreduced(outputs, targets):
    return F.cross_entropy(outputs.flatten(0, 1), targets.flatten(), reduction="none").view_as(targets)


def ids(steps=5, lanes=LANES, seed=0):
    return torch.randint(12, (steps, lanes), generator=torch.Generator().manual_seed(seed))


# NaN behind a mask

LOSSES = {
    "squared": lambda o, t: (o - t) ** 2,
    "absolute": lambda o, t: (o - t).abs(),
    "huber": lambda o, t: F.huber_loss(o, t, reduction="none"),
    "gaussian": lambda o, t: F.gaussian_nll_loss(o, t, torch.ones_like(o), reduction="none"),
    "bits": lambda o, t: F.binary_cross_entropy_with_logits(o, t, reduction="none"),
    # Infinite at the target 0, which stands for a missing one.
    "relative": lambda o, t: (o - t) ** 2 / t,
}


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("reduction", ["mean", "lane-mean", "sum"])
def test_a_target_that_is_missing_has_no_gradient(name, reduction):
    torch.manual_seed(0)
    model, loss = Regressor(), LOSSES[name]
    inputs, targets = torch.randn(5, LANES, 2), torch.rand(5, LANES) + 0.1
    targets[2, 1] = float("nan")
    there = ~targets.isnan()
    losses = loss(model(inputs, None)[0][there], targets[there])
    scalar = {"mean": losses.mean(), "lane-mean": losses.sum() / LANES, "sum": losses.sum()}[reduction]
    expected = torch.autograd.grad(scalar, list(model.parameters()))
    trainer = trainer_of(model, loss, reduction=reduction)
    result = trainer.step(inputs, targets, mask=there)
    assert not result.skipped
    torch.testing.assert_close(result.loss, scalar.detach())
    for parameter, gradient in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)


def test_padding_after_the_last_step_may_be_nan():
    """Where a sequence ends before its window does, inputs and targets of the rest do not matter."""
    inputs, targets = torch.randn(5, LANES, 2), torch.rand(5, LANES)
    mask, ends = torch.ones(5, LANES, dtype=torch.bool), torch.tensor([False, True, False, False])
    mask[3:, 1] = False

    def gradients(fill):
        torch.manual_seed(0)
        model = Regressor()
        a, b = inputs.clone(), targets.clone()
        a[3:, 1], b[3:, 1] = fill, fill
        result = trainer_of(model, LOSSES["squared"]).step(a, b, mask=mask, ends=ends)
        assert not result.skipped
        return problems.gradients(model)

    assert_same(gradients(float("nan")), gradients(0.0))
    assert_same(gradients(float("inf")), gradients(0.0))


def test_a_missing_input_on_which_later_steps_depend_is_no_padding():
    inputs, targets = torch.randn(5, LANES, 2), torch.rand(5, LANES)
    mask = torch.ones(5, LANES, dtype=torch.bool)
    mask[2, 1] = False
    inputs[2, 1] = float("nan")
    result = trainer_of(Regressor(), LOSSES["squared"]).step(inputs, targets, mask=mask, ends=torch.ones(LANES).bool())
    assert result.skipped
    assert "first NaN or infinity in the inputs" in result.events[0]


def test_the_future_model_does_not_see_a_missing_target():
    torch.manual_seed(0)
    model = Regressor()
    inputs, targets = torch.randn(2 * T, LANES, 2), torch.rand(2 * T, LANES)
    mask = torch.ones(2 * T, LANES, dtype=torch.bool)
    mask[T, 1] = False

    def after(value):
        torch.manual_seed(0)
        own = copy.deepcopy(model)
        synthesizer = dni.FutureGradient.for_model(
            own, lambda o, t: (o[..., 0] - t) ** 2, example_inputs=inputs[:T], outputs=1, horizons=1
        )
        trainer = trainer_of(own, LOSSES["squared"], synthesizer=synthesizer)
        spoiled = targets.clone()
        spoiled[T, 1] = value
        pieces = [dni.Window(inputs[i : i + T], spoiled[i : i + T], mask[i : i + T]) for i in (0, T)]
        for window in dni.with_lookahead(pieces, T):
            result = trainer.step(window.inputs, window.targets, mask=window.mask, lookahead=window.lookahead)
            assert not result.skipped
            assert trainer.credit.monitor.total == 0
        return {**own.state_dict(), **synthesizer.state_dict()}

    assert_same(after(float("nan")), after(0.0))


# targets that are ignored


def test_windows_of_ignored_targets_are_no_failures():
    torch.manual_seed(0)
    model = Tagger()
    trainer = trainer_of(model, lambda o, t: F.cross_entropy(o.flatten(0, 1), t.flatten(), ignore_index=-100))
    trainer.step(ids(), ids(seed=1))
    before = copy.deepcopy(model.state_dict())
    state = trainer.state
    for _ in range(12):
        result = trainer.step(ids(), torch.full((5, LANES), -100))
        assert result.skipped
        assert result.events == ()
        _, state = model(ids(), state)
        assert torch.equal(trainer.state, state)  # the text has been read
    assert_same(dict(model.state_dict()), dict(before))
    assert (trainer.steps, trainer.skipped) == (13, 0)


def test_on_a_device_they_are_no_failures_either(monkeypatch):
    monkeypatch.setattr("dni_seq.core.nonfinite.readable_without_sync", lambda flag: False)
    model = Tagger()
    optimizer = torch.optim.Adam(model.parameters(), fused=True)
    trainer = dni.SequenceTrainer(
        model,
        optimizer,
        lambda o, t: F.cross_entropy(o.flatten(0, 1), t.flatten()),
        initial_state=torch.zeros(1, LANES, HIDDEN),
    )
    trainer.step(ids(), ids(seed=1))
    before = copy.deepcopy(model.state_dict())
    for _ in range(12):
        trainer.step(ids(), torch.full((5, LANES), -100))
    assert_same(dict(model.state_dict()), dict(before))
    assert trainer.skipped == 0


def test_unreduced_losses_need_a_mask_for_ignored_targets():
    """They would count with loss 0, and the mean would be too small; with a mask it is PyTorch's."""
    model, targets = Tagger(), ids(seed=1)
    targets[:2] = -100
    with pytest.raises(ValueError, match=r"pass mask=targets >= 0"):
        trainer_of(model, unreduced).step(ids(), targets)
    result = trainer_of(model, unreduced, lr=0.0).step(ids(), targets, mask=targets >= 0)
    expected = F.cross_entropy(model(ids(), None)[0].flatten(0, 1), targets.flatten())
    torch.testing.assert_close(result.loss, expected.detach())


def test_negative_integers_may_be_targets():
    """Of a regression they are not ignored: their losses are not zero."""
    model = Regressor()
    targets = torch.full((5, LANES), -3)
    assert trainer_of(model, LOSSES["squared"]).step(torch.randn(5, LANES, 2), targets).loss > 0


# a learned initial state


class Learned(Tagger):
    def __init__(self):
        super().__init__()
        self.first = nn.Parameter(torch.full((1, 1, HIDDEN), 0.1))

    def initial_state(self, lanes):
        return self.first.expand(1, lanes, HIDDEN).contiguous()


@pytest.mark.parametrize("synthesizer", [None, "zero"])
def test_a_learned_initial_state_gets_the_gradient_of_the_windows_that_start_from_it(synthesizer):
    """Lanes end at different windows; the plain loop keeps, for each lane, the graph to the initial state it starts from."""
    ends = [torch.tensor([i % 2 == 0, i % 3 == 0, False, True]) for i in range(6)]
    moved = []
    for plain in (False, True):
        torch.manual_seed(0)
        model = Learned().double()
        optimizer = torch.optim.SGD(model.parameters(), 0.5)
        zero = dni.BasicSynthesizer(HIDDEN).double() if synthesizer else None
        scale = None if zero is None else 0.0
        trainer = (
            None if plain else dni.SequenceTrainer(model, optimizer, unreduced, synthesizer=zero, synthetic_scale=scale)
        )
        state, fresh = None, torch.ones(LANES, dtype=torch.bool)
        for i, end in enumerate(ends):
            x, y = ids(seed=i), ids(seed=i + 50)
            if trainer is not None:
                trainer.step(x, y, ends=end)
                continue
            optimizer.zero_grad()
            initial = model.initial_state(LANES)
            start = initial if state is None else torch.where(fresh[None, :, None], initial, state)
            outputs, state = model(x, start)
            unreduced(outputs, y).mean().backward()
            optimizer.step()
            state, fresh = state.detach(), end
        moved.append({name: value.clone() for name, value in model.state_dict().items()})
    for name, value in moved[0].items():
        torch.testing.assert_close(value, moved[1][name], rtol=1e-12, atol=1e-14)
    assert (moved[0]["first"] - 0.1).abs().max() > 1e-3


def test_a_learned_initial_state_survives_resuming_and_bad_windows():
    def run(interrupted):
        torch.manual_seed(0)
        model = Learned()
        trainer = trainer_of(model, unreduced)
        for i in range(6):
            if interrupted and i == 3:
                saved = copy.deepcopy(trainer.state_dict())
                torch.manual_seed(5)
                model = Learned()
                trainer = trainer_of(model, unreduced)
                trainer.load_state_dict(saved)
            trainer.step(ids(seed=i), ids(seed=i + 50), ends=torch.tensor([True, False, True, False]))
        return model.state_dict()

    assert_same(dict(run(True)), dict(run(False)))
    torch.manual_seed(0)
    model = Learned()
    poison = [1.0]
    trainer = trainer_of(model, lambda o, t: unreduced(o, t) * poison[0])
    end = torch.tensor([True, False, False, False])
    trainer.step(ids(), ids(seed=1), ends=end)
    poison[0] = float("nan")
    assert trainer.step(ids(), ids(seed=1)).skipped
    assert trainer.state_dict()["fresh"].tolist() == end.tolist()  # its window has not been trained on yet
    poison[0] = 1.0
    trainer.step(ids(), ids(seed=1))
    assert model.first.grad.any()


# lanes


@pytest.mark.parametrize(
    ("model", "state", "expected"),
    [
        (Tagger(nn.LSTM), None, 1),
        (Tagger(nn.LSTM), (torch.zeros(1, LANES, HIDDEN),) * 2, 1),
        (Regressor(), torch.zeros(1, LANES, HIDDEN), 1),
    ],
)
def test_the_lanes_of_a_state_are_found(model, state, expected):
    trainer = trainer_of(model, lambda o, t: o.square().mean(), initial_state=state)
    inputs = torch.randn(5, LANES, 2) if isinstance(model, Regressor) else ids()
    trainer.step(inputs, ids(), ends=torch.ones(LANES).bool())
    assert trainer.runner.state_batch_dim == expected


class Cell(nn.Module):
    """One step after the other, with a state [B, H]."""

    def __init__(self, hidden=HIDDEN):
        super().__init__()
        self.embedding, self.cell, self.out = nn.Embedding(12, 4), nn.GRUCell(4, hidden), nn.Linear(hidden, 12)

    def forward(self, tokens, state):
        outputs = []
        for token in tokens:
            state = self.cell(self.embedding(token), state)
            outputs.append(state)
        return self.out(torch.stack(outputs)), state


def test_a_cell_needs_no_state_batch_dim():
    trainer = trainer_of(Cell(), unreduced)
    end = torch.tensor([True, False, False, True])
    trainer.step(ids(), ids(), ends=end)
    trainer.step(ids(), ids(), ends=end)
    assert trainer.runner.state_batch_dim == 0
    assert not trainer.state[end].any()
    assert trainer.state[~end].any(1).all()


def test_as_many_lanes_as_units_are_asked_for():
    """Any of the two dimensions may be that of the lanes: zeroing a unit of all lanes would be silent."""
    trainer = trainer_of(Cell(hidden=LANES), unreduced)
    with pytest.raises(ValueError, match=r"\[4, 4\] has 2 dimensions of that size: pass state_batch_dim"):
        trainer.step(ids(), ids())
    trainer = trainer_of(Cell(hidden=LANES), unreduced, state_batch_dim=0)
    end = torch.tensor([True, False, False, True])
    trainer.step(ids(), ids(), ends=end)
    assert not trainer.state[end].any()
    assert trainer.state[~end].all()


def test_an_initial_state_for_any_number_of_lanes_decides():
    trainer = trainer_of(Cell(hidden=LANES), unreduced, initial_state=lambda lanes: torch.zeros(lanes, LANES))
    trainer.step(ids(), ids(), ends=torch.tensor([True, False, False, True]))
    assert trainer.runner.state_batch_dim == 0


def test_one_lane_is_one_lane():
    for model, expected in ((Cell(), 0), (Tagger(), 1)):
        trainer = trainer_of(model, unreduced)
        trainer.step(ids(lanes=1), ids(lanes=1), ends=torch.tensor([True]))
        assert trainer.runner.state_batch_dim == expected
        assert not trainer.state.any()


def test_as_many_steps_as_lanes_are_no_error():
    trainer = trainer_of(Tagger(), unreduced)
    for _ in range(2):
        assert not trainer.step(ids(steps=LANES), ids(steps=LANES), ends=torch.ones(LANES).bool()).skipped


@pytest.mark.parametrize(("first", "second"), [(4, 3), (1, 4)])
def test_a_batch_of_another_size_is_refused(first, second):
    """Also where the model would broadcast the one lane's state to four."""

    class Broadcasting(Cell):
        def forward(self, tokens, state):
            state = torch.zeros(tokens.shape[1], HIDDEN) if state is None else state
            outputs = []
            for token in tokens:
                state = torch.tanh(self.embedding(token).mean(-1, keepdim=True) + state)
                outputs.append(state)
            return self.out(torch.stack(outputs)), state

    trainer = trainer_of(Broadcasting(), unreduced, state_batch_dim=0)
    trainer.step(ids(lanes=first), ids(lanes=first))
    before = copy.deepcopy(trainer.state_dict())
    with pytest.raises(ValueError, match=f"the inputs have {second} lanes, the state has {first} .*drop a last batch"):
        trainer.step(ids(lanes=second), ids(lanes=second))
    assert_same(trainer.state_dict(), before)
    trainer.reset()
    trainer.step(ids(lanes=second), ids(lanes=second))


def test_a_state_that_is_not_the_inputs_is_refused():
    """A model with batch_first=True on time-major windows: its states have T lanes."""
    with pytest.raises(ValueError, match=r"have 4 lanes, and a state's leaf of shape \[1, 5, 6\] has no dimension"):
        trainer_of(Tagger(batch_first=True), unreduced).step(ids(), ids())


# time-major windows


def test_batch_first_windows_train_where_they_can():
    """With the mean over all steps the layout does not matter."""
    losses = []
    for batch_first in (False, True):
        torch.manual_seed(0)
        model = Tagger(batch_first=batch_first)
        trainer = trainer_of(model, unreduced, batch_dim=0 if batch_first else 1)
        x, y = ids(), ids(seed=1)
        losses.append([trainer.step(*((x.T, y.T) if batch_first else (x, y))).loss for _ in range(3)])
    torch.testing.assert_close(losses[0], losses[1])


class Reader(nn.Module):
    """Reads vectors and predicts one number at each step."""

    def __init__(self, batch_first: bool) -> None:
        super().__init__()
        self.rnn, self.readout = nn.GRU(2, HIDDEN, batch_first=batch_first), nn.Linear(HIDDEN, 1)

    def forward(self, inputs, state):
        outputs, state = self.rnn(inputs, state)
        return self.readout(outputs), state


@pytest.mark.parametrize("steps", [LANES, LANES + 2])
def test_padding_behind_the_end_of_a_sequence_may_be_nan_in_both_layouts(steps):
    """With as many steps as lanes a mistake in the dimension would not show in a shape."""
    torch.manual_seed(1)
    x, y = torch.randn(steps, LANES, 2), torch.randn(steps, LANES, 1)
    mask = torch.ones(steps, LANES, dtype=torch.bool)
    ends = torch.arange(LANES) == 0
    mask[-2:, 0] = False
    x[-2:, 0] = y[-2:, 0] = math.nan
    losses = []
    for batch_first in (False, True):
        torch.manual_seed(0)
        trainer = trainer_of(Reader(batch_first), lambda o, t: (o - t).square().mean(-1), batch_dim=0 if batch_first else 1)
        turned = (tensor.transpose(0, 1) if batch_first else tensor for tensor in (x, y, mask))
        inputs, targets, marked = turned
        results = [trainer.step(inputs, targets, mask=marked, ends=ends) for _ in range(2)]
        assert not any(result.skipped for result in results)
        losses.append([result.loss for result in results])
    torch.testing.assert_close(losses[0], losses[1])


def test_batch_first_windows_are_refused_where_they_cannot():
    model = Tagger(batch_first=True)
    with pytest.raises(ValueError, match="checkpoint_every needs time-major windows"):
        trainer_of(model, unreduced, batch_dim=0).checkpoint_every = 2
    with pytest.raises(ValueError, match='reduction="lane-mean" needs time-major windows'):
        trainer_of(model, unreduced, batch_dim=0, reduction="lane-mean")
    lookahead = next(dni.with_lookahead([(ids(), ids())] * 2, 5)).lookahead
    with pytest.raises(ValueError, match="a lookahead needs time-major windows"):
        trainer_of(model, unreduced, batch_dim=0).step(ids(), ids(), lookahead=lookahead)
    config = dni.SyntheticGradientConfig(auxiliary=dni.AuxiliaryTask(torch.zeros(1, 1, HIDDEN)))
    with pytest.raises(ValueError, match="an auxiliary task needs time-major windows"):
        trainer_of(model, unreduced, batch_dim=0, synthesizer=dni.BasicSynthesizer(HIDDEN), config=config)


# gradients of others


def test_gradients_that_a_step_would_discard_are_refused():
    model = Tagger()
    trainer = trainer_of(model, unreduced)
    x, y = ids(), ids(seed=1)
    trainer.step(x, y)
    trainer.step(x, y)  # its own gradients are no foreign ones
    model.out.weight.square().sum().backward()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r"the parameter out\.weight has a gradient that this trainer did not compute"):
        trainer.step(x, y)
    assert_same(dict(model.state_dict()), dict(before))
    trainer.optimizer.zero_grad()
    trainer.step(x, y)


def test_gradients_before_the_first_step_are_refused_too():
    model = Tagger()
    unreduced(model(ids(), None)[0], ids()).mean().backward()
    with pytest.raises(ValueError, match=r"set trainer\.accumulate = n"):
        trainer_of(model, unreduced).step(ids(), ids())
    for parameter in model.parameters():
        parameter.grad.zero_()
    trainer_of(model, unreduced).step(ids(), ids())
    trainer_of(model, unreduced).step(ids(), ids())  # another trainer's gradients have been used


def test_a_synthesizers_gradients_are_watched_too():
    model = Tagger()
    synthesizer = dni.BasicSynthesizer(HIDDEN, n_hidden=1)
    trainer = trainer_of(model, unreduced, synthesizer=synthesizer)
    trainer.step(ids(), ids())
    synthesizer(torch.zeros(1, LANES, HIDDEN), None).sum().backward()
    with pytest.raises(ValueError, match="a parameter of the synthesizer has a gradient"):
        trainer.step(ids(), ids())


# arguments of another kind

MODEL = Tagger()
SGD = torch.optim.SGD(MODEL.parameters(), 0.1)


@pytest.mark.parametrize(
    ("arguments", "settings", "message"),
    [
        ((MODEL, unreduced, SGD), {}, "optimizer must be an optimizer of the model's parameters, got function"),
        ((SGD, MODEL, unreduced), {}, "model must be an nn.Module, got SGD"),
        ((MODEL, SGD, "mse"), {}, "loss_fn must be a function of outputs and targets, got 'mse'"),
        ((MODEL, SGD, unreduced), {"synthesizer": "multi-horizon"}, r"FutureGradient.for_model\(...\), got 'multi-horizon'"),
        ((MODEL, SGD, unreduced), {"autocast": True}, "autocast must be a dtype such as torch.bfloat16, got True"),
        ((MODEL, SGD, unreduced), {"config": {"discount": 1.0}}, "config must be a SyntheticGradientConfig, got dict"),
        ((MODEL, SGD, unreduced), {"synthesizer_optimizer": 1e-3}, "synthesizer_optimizer must be an optimizer"),
    ],
)
def test_an_argument_of_another_kind_is_named(arguments, settings, message):
    with pytest.raises(TypeError, match=message):
        dni.SequenceTrainer(*arguments, **settings)


def test_a_synthesizer_of_another_dtype_is_named():
    model = problems.make_model("lstm")  # float64
    synthesizer = future_gradient(model).float()
    windows = list(dni.with_lookahead(problems.cut(problems.tokens(2 * T, 3), T), T))
    trainer = dni.SequenceTrainer(model, problems.frozen(model), problems.mean, synthesizer=synthesizer)
    with pytest.raises(ValueError, match=r"are torch.float32, the model's state is torch.float64: call synthesizer"):
        trainer.step(windows[0].inputs, windows[0].targets, lookahead=windows[0].lookahead)


def test_a_synthesizer_of_another_size_is_named():
    model = Tagger()
    synthesizer = dni.StateSynthesizer(torch.zeros(1, 1, 9))
    with pytest.raises(ValueError, match=r"the sizes \[\[1, 9\]\] in each lane, this model's have \[\[1, 6\]\]"):
        trainer_of(model, unreduced, synthesizer=synthesizer).step(ids(), ids())


def test_a_mask_of_numbers_is_named():
    with pytest.raises(ValueError, match=r"mask must be a bool tensor, True for steps that count, got torch.float32"):
        trainer_of(Tagger(), unreduced).step(ids(), ids(), mask=torch.ones(5, LANES))
