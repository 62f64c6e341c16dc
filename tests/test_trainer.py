"""SequenceTrainer against plain loops and full BPTT: the identities of synthetic-gradient BPTT, in float64."""

from __future__ import annotations

import copy
import gc

import pytest
import torch
from torch import nn

import dni_seq as dni
from dni_seq.core import states
from dni_seq.credit.window_runner import lookahead_at_start
from dni_seq.synthesizers.base import Regression, predict
from tests import problems, reference
from tests.training import CLOSE, LANES, STEPS, assert_same, run, sequence_trainer, summed_gradients, trainer_initial


def zero_synthesizer(model: nn.Module) -> nn.Module:
    """A fresh library synthesizer, whose messages start at exactly zero."""
    state = model.initial_state(2) if hasattr(model, "initial_state") else torch.zeros(1, 2, 5)
    size = sum(leaf.shape[-1] for leaf in states.floating(state))
    basic = dni.BasicSynthesizer(size, n_hidden=1).double()
    return dni.Normalized(dni.GatedCells(basic, cells=model.cells))


@pytest.mark.parametrize("name", problems.MODELS)
def test_zero_synthesizer_is_truncated_bptt_bit_for_bit(name):
    """Identity 1; the synthesizer's own learning rate is 0, the RNN's is not."""
    text = problems.tokens(STEPS, LANES)
    model = problems.make_model(name)
    plain = copy.deepcopy(model)
    initial = trainer_initial(plain)
    expected = reference.truncated_bptt(
        plain, problems.mean, torch.optim.Adam(plain.parameters(), 1e-2), problems.cut(text, 3), initial, clip=0.5
    )
    synthesizer = zero_synthesizer(model)
    trainer = sequence_trainer(
        model,
        torch.optim.Adam(model.parameters(), 1e-2),
        problems.mean,
        synthesizer=synthesizer,
        synthesizer_optimizer=torch.optim.SGD(synthesizer.parameters(), lr=0.0),
        clip=0.5,
        state_batch_dim=model.state_batch_dim,
    )
    for window, (loss, gradients) in zip(problems.cut(text, 3), expected, strict=True):
        result = trainer.step(window.inputs, window.targets, ends=window.ends)
        assert result.loss.item() == loss
        assert_same(problems.gradients(model), gradients, rtol=0, atol=0)


def oracle_trainer(model, loss_fn=problems.summed, **settings):
    return sequence_trainer(
        model,
        problems.frozen(model),
        loss_fn,
        synthesizer=reference.Oracle(model, problems.unreduced),
        synthetic_scale=1.0,
        discount=1.0,
        state_batch_dim=model.state_batch_dim,
        **settings,
    )


@pytest.mark.parametrize("name", problems.MODELS)
@pytest.mark.parametrize("ends", [{}, {0: [1], 2: [0, 1]}], ids=["one-sequence", "lanes-end"])
def test_oracle_gives_full_bptt(name, ends):
    """Identity 2, with lanes that end too."""
    text = problems.tokens(STEPS, LANES)
    model = problems.make_model(name)
    windows = list(problems.cut(text, 3, ends))
    expected = reference.full_bptt(model, problems.summed, windows, trainer_initial(model), model.state_batch_dim)
    found = summed_gradients(run(oracle_trainer(model), dni.with_lookahead(windows, STEPS)))
    assert_same(found, expected, **CLOSE)
    truncated = reference.truncated_bptt(model, problems.summed, problems.frozen(model), windows, trainer_initial(model))
    short = summed_gradients([gradients for _, gradients in truncated])
    assert not torch.allclose(short["embedding.weight"], expected["embedding.weight"]), "the future must matter"


def test_windows_of_any_length_give_the_same_with_an_oracle():
    """Identity 6: a summed loss, and 11 steps, so that the last window is ragged."""
    text = problems.tokens(STEPS, LANES)
    model = problems.make_model("lstm")
    whole = summed_gradients(run(oracle_trainer(model), dni.with_lookahead(problems.cut(text, STEPS), STEPS)))
    for length in (1, 2, 4, 10):
        found = summed_gradients(run(oracle_trainer(model), dni.with_lookahead(problems.cut(text, length), STEPS)))
        assert_same(found, whole, **CLOSE)


class Recorder(nn.Module):
    """A linear synthesizer that keeps what it is asked and trained towards; its messages are large."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.linear = nn.Linear(size, size).double()
        self.messages, self.targets = [], []

    def forward(self, trigger, context):
        self.messages.append(states.map_floating(lambda t: t.new_full(t.shape, 0.7), trigger))
        return self.messages[-1]

    def regress(self, trigger, context, targets):
        self.targets += targets
        error = self.linear.weight.sum() ** 2
        return Regression(error, error.detach()[None], error.detach()[None], error.detach()[None])


def test_ended_lanes_inject_nothing_and_take_nothing_in():
    """Identity 5: an ended lane's target is its window's own gradient to the bit, the others' is not."""
    text = problems.tokens(6, LANES)
    model = problems.make_model("lstm")

    def targets(ends, scale, discount):
        recorder = Recorder(5)
        trainer = sequence_trainer(
            model, problems.frozen(model), problems.summed, synthesizer=recorder, synthetic_scale=scale, discount=discount
        )
        history = run(trainer, problems.cut(text, 3, ends))
        return recorder.targets[0], history[0]

    for scale, discount in ((0.5, 0.5), (0.5, 0.9)):  # one pass brings the target, or a product of its own does
        (h, c), with_message = targets({0: [0, 2]}, scale, discount)
        (h0, c0), _ = targets({0: [0, 1, 2]}, scale, discount)
        for found, silent in ((h, h0), (c, c0)):
            assert torch.equal(found[:, [0, 2]], silent[:, [0, 2]])
            assert not torch.allclose(found[:, 1], silent[:, 1])
        _, all_ended = targets({0: [0, 1, 2]}, scale, discount)
        _, no_message = targets({0: [0, 1, 2]}, 0.0, 0.0)
        assert_same(all_ended, no_message, rtol=0, atol=0)
        assert not torch.allclose(with_message["embedding.weight"], all_ended["embedding.weight"])


@pytest.mark.parametrize("name", problems.MODELS)
def test_a_reset_lane_changes_no_other_lane(name):
    """Identity 5: states and outputs of the lanes that go on are the same to the bit; the reset lane starts anew."""
    text = problems.tokens(9, LANES)
    model = problems.make_model(name)

    def outputs(ends):
        trainer = sequence_trainer(model, problems.frozen(model), problems.mean, state_batch_dim=model.state_batch_dim)
        return [trainer.step(w.inputs, w.targets, ends=w.ends).outputs for w in problems.cut(text, 3, ends)]

    free, reset = outputs({}), outputs({0: [1]})
    for a, b in zip(free, reset, strict=True):
        assert torch.equal(a[:, [0, 2]], b[:, [0, 2]])
    assert not torch.allclose(free[1][:, 1], reset[1][:, 1])
    fresh, _ = model(text[3:6], trainer_initial(model))
    assert torch.equal(reset[1][:, 1], fresh[:, 1])


@pytest.mark.parametrize("name", problems.MODELS)
def test_duplicated_lanes_change_nothing(name):
    """Identity 7: mean loss, twice the lanes, a synthesizer that learns meanwhile."""
    text = problems.tokens(24, LANES)

    def history(text):
        model = problems.make_model(name)
        synthesizer = zero_synthesizer(model)
        trainer = sequence_trainer(
            model,
            problems.frozen(model),
            problems.mean,
            synthesizer=synthesizer,
            synthesizer_optimizer=torch.optim.SGD(synthesizer.parameters(), lr=0.1),
            synthetic_scale=0.5,
            discount=0.8,
            state_batch_dim=model.state_batch_dim,
        )
        gradients = run(trainer, problems.cut(text, 3))
        message = predict(synthesizer.synthesizer, trainer.state, None)[0]
        return gradients, states.floating(message)

    once, message_once = history(text)
    twice, message_twice = history(torch.cat([text, text], dim=1))
    for a, b in zip(once, twice, strict=True):
        assert_same(b, a, rtol=1e-8, atol=1e-12)  # one division by a small root mean square more than CLOSE allows for
    for a, b, dim in zip(message_once, message_twice, lane_dims(problems.make_model(name)), strict=True):
        assert a.abs().max() > 1e-3, "the messages must have been learned"
        torch.testing.assert_close(b.narrow(dim, 0, LANES), a, rtol=1e-8, atol=1e-12)
        torch.testing.assert_close(b.narrow(dim, LANES, LANES), a, rtol=1e-8, atol=1e-12)


def lane_dims(model):
    return [1] * 2 if model.cells == dni.LSTM_CELLS else [0] * 3 if isinstance(model.cells, dict) else [1]


def test_no_graph_outlives_its_window():
    """Identity 8: as many live tensors after 2,000 windows as after 10, with no garbage collection."""
    torch.manual_seed(0)
    model = nn.RNN(1, 1)
    synthesizer = dni.Normalized(dni.BasicSynthesizer(1, n_hidden=1))
    trainer = sequence_trainer(
        model,
        torch.optim.SGD(model.parameters(), 1e-3),
        nn.functional.mse_loss,
        synthesizer=synthesizer,
        synthetic_scale=0.1,
        discount=0.9,
    )
    x, y = torch.randn(2, 2, 1), torch.randn(2, 2, 1)

    def live():
        return sum(issubclass(type(item), torch.Tensor) for item in gc.get_objects())

    gc.collect()
    gc.disable()
    try:
        for _ in range(10):
            trainer.step(x, y)
        after_ten = live()
        for _ in range(1_990):
            trainer.step(x, y)
        assert live() == after_ten
    finally:
        gc.enable()
    assert states.floating(trainer.state)[0].grad_fn is None


def test_separate_scale_and_discount_equal_their_definitions():
    """Target a + γ Jᵀ M and update with c M, against two plain backward passes."""
    text = problems.tokens(3, LANES)
    model = problems.make_model("lstm")
    start = model.initial_state(LANES)
    recorder = Recorder(5)
    trainer = sequence_trainer(
        model, problems.frozen(model), problems.summed, synthesizer=recorder, synthetic_scale=0.3, discount=0.8
    )
    window = next(problems.cut(text, 3))
    trainer.step(window.inputs, window.targets)
    message = [torch.full_like(leaf, 0.7) for leaf in start]

    def gradients(share):
        leaves = [leaf.clone().requires_grad_() for leaf in start]
        outputs, last = model(window.inputs, tuple(leaves))
        loss = problems.summed(outputs, window.targets)
        objective = loss + sum((share * m * s).sum() for m, s in zip(message, last, strict=True))
        found = torch.autograd.grad(objective, [*leaves, *model.parameters()])
        return found[:2], found[2:]

    target, _ = gradients(0.8)
    _, update = gradients(0.3)
    for found, expected in zip(recorder.targets[0], target, strict=True):
        torch.testing.assert_close(found, expected, **CLOSE)
    for parameter, expected in zip(model.parameters(), update, strict=True):
        torch.testing.assert_close(parameter.grad, expected, **CLOSE)


@pytest.mark.parametrize("with_synthesizer", [False, True])
@pytest.mark.parametrize("name", problems.MODELS)
def test_saved_and_loaded_resumes_bit_identically(name, with_synthesizer, tmp_path):
    text = problems.tokens(24, LANES)

    def make():
        model = problems.make_model(name)
        return sequence_trainer(
            model,
            torch.optim.Adam(model.parameters(), 1e-2),
            problems.mean,
            synthesizer=zero_synthesizer(model) if with_synthesizer else None,
            state_batch_dim=model.state_batch_dim,
        )

    windows = list(problems.cut(text, 3))
    whole = make()
    expected = [whole.step(w.inputs, w.targets).loss.item() for w in windows][4:]
    first = make()
    for window in windows[:4]:
        first.step(window.inputs, window.targets)
    torch.save(first.state_dict(), tmp_path / "trainer.pt")
    second = make()
    second.load_state_dict(torch.load(tmp_path / "trainer.pt", weights_only=True))
    again = second.state_dict()["state"]  # saving before the first step keeps the loaded hidden state
    assert all(torch.equal(a, b) for a, b in zip(again, first.state_dict()["state"], strict=True))
    assert [second.step(w.inputs, w.targets).loss.item() for w in windows[4:]] == expected
    assert second.steps == len(windows)


def test_the_first_state_sees_the_windows_own_steps_and_those_after_it():
    inputs = torch.arange(3)[:, None].expand(3, 2)
    mask = torch.tensor([[True, True], [False, True], [True, False]])
    valid = torch.tensor([[True, False], [True, False]])
    behind = dni.Lookahead(inputs[:2] + 10, inputs[:2] + 20, valid, None)
    ahead = lookahead_at_start(
        inputs, inputs + 5, mask, dni.Lookahead(*(torch.cat([field, field]) for field in behind[:3]), None)
    )
    assert ahead.inputs[:, 0].tolist() == [0, 1, 2, 10]
    assert ahead.targets[:, 0].tolist() == [5, 6, 7, 20]
    assert ahead.valid.tolist() == [[True, True]] * 3 + [[True, False]]
    assert ahead.mask.tolist() == [*mask.tolist(), [True, False]]
    assert lookahead_at_start(inputs, inputs + 5, None, behind).mask.all()


def test_mask_counts_its_steps_alone():
    text = problems.tokens(4, LANES)
    model = problems.make_model("lstm")
    window = next(problems.cut(text, 4))
    mask = torch.zeros(4, LANES, dtype=torch.bool)
    mask[1, 0] = mask[3, 2] = True
    losses = problems.unreduced(model(window.inputs, None)[0], window.targets)
    counted = losses[mask]
    expected = {"mean": counted.mean(), "sum": counted.sum(), "lane-mean": counted.sum() / LANES}
    for reduction, value in expected.items():
        trainer = sequence_trainer(model, problems.frozen(model), problems.unreduced, reduction=reduction)
        result = trainer.step(window.inputs, window.targets, mask=mask)
        torch.testing.assert_close(result.loss, value.detach(), **CLOSE)


def test_a_summed_scalar_and_its_unreduced_form_agree():
    text = problems.tokens(4, LANES)
    window = next(problems.cut(text, 4))
    model = problems.make_model("gru")
    losses = []
    for loss_fn, reduction in ((problems.summed, "mean"), (problems.unreduced, "sum")):
        trainer = sequence_trainer(model, problems.frozen(model), loss_fn, reduction=reduction)
        losses.append(trainer.step(window.inputs, window.targets).loss)
    torch.testing.assert_close(*losses, **CLOSE)


def test_initial_state_argument_is_where_lanes_start_and_restart():
    text = problems.tokens(6, LANES)
    model = problems.make_model("gru")
    start = torch.full((1, LANES, 5), 0.3, dtype=torch.float64)
    trainer = sequence_trainer(model, problems.frozen(model), problems.mean, initial_state=start)
    first, second = problems.cut(text, 3, {0: [0, 1, 2]})
    outputs = [trainer.step(w.inputs, w.targets, ends=w.ends).outputs for w in (first, second)]
    for window, found in zip((first, second), outputs, strict=True):
        assert torch.equal(found, model(window.inputs, start)[0])


BAD_SETTINGS = {
    "synthetic_scale": -0.1,
    "discount": 1.5,
    "clip": 0.0,
    "synthesizer_clip": -1.0,
    "reduction": "average",
}


@pytest.mark.parametrize("name", BAD_SETTINGS)
def test_settings_are_checked_at_construction(name):
    model = problems.make_model("gru")
    with pytest.raises(ValueError, match=name):
        sequence_trainer(model, problems.frozen(model), problems.mean, **{name: BAD_SETTINGS[name]})


def test_one_parameter_in_both_optimizers_is_refused():
    model = problems.make_model("gru")
    synthesizer = zero_synthesizer(model)
    both = torch.optim.SGD([*model.parameters(), *synthesizer.parameters()], lr=0.1)
    with pytest.raises(ValueError, match="both optimizers"):
        sequence_trainer(
            model,
            both,
            problems.mean,
            synthesizer=synthesizer,
            synthesizer_optimizer=torch.optim.Adam(synthesizer.parameters()),
        )


def test_bad_windows_are_refused_and_change_nothing():
    model = problems.make_model("lstm")
    trainer = sequence_trainer(model, torch.optim.Adam(model.parameters()), problems.mean)
    window = next(problems.cut(problems.tokens(3, LANES), 3))
    before = copy.deepcopy(trainer.state_dict())
    with pytest.raises(ValueError, match="lanes"):
        trainer.step(window.inputs, window.targets[:, :2])
    with pytest.raises(ValueError, match="ends"):
        trainer.step(window.inputs, window.targets, ends=torch.zeros(LANES + 1, dtype=torch.bool))
    with pytest.raises(ValueError, match="no steps"):
        trainer.step(window.inputs[:0], window.targets[:0])
    with pytest.raises(ValueError, match="unreduced"):
        trainer.step(window.inputs, window.targets, mask=torch.ones(3, LANES, dtype=torch.bool))
    after = trainer.state_dict()
    assert after["steps"] == 0
    assert all(torch.equal(after["model"][key], value) for key, value in before["model"].items())


def test_another_trainers_state_is_refused():
    model = problems.make_model("gru")
    plain = sequence_trainer(model, problems.frozen(model), problems.mean)
    other = sequence_trainer(model, problems.frozen(model), problems.mean, synthesizer=zero_synthesizer(model))
    with pytest.raises(ValueError, match="synthesizer"):
        other.load_state_dict(plain.state_dict())


def test_bfloat16_autocast_keeps_the_synthesizer_in_float32():
    torch.manual_seed(0)
    model = problems.PlainGRU()
    synthesizer = dni.Normalized(dni.BasicSynthesizer(5, n_hidden=1))
    trainer = sequence_trainer(
        model, torch.optim.Adam(model.parameters(), 1e-2), problems.mean, synthesizer=synthesizer, autocast=torch.bfloat16
    )
    text = problems.tokens(30, LANES)
    losses = [trainer.step(w.inputs, w.targets) for w in problems.cut(text, 3)]
    assert all(parameter.dtype == torch.float32 for parameter in synthesizer.parameters())
    assert all(torch.isfinite(result.loss) for result in losses)
    assert torch.isfinite(losses[-1].synthetic.r2).all()
