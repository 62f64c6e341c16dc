"""Traces: exact credit from before a window for the own parameters of diagonal cells, held to full BPTT in float64."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import dni_seq as dni
from dni_seq.core import states
from dni_seq.core.traces import Trace
from dni_seq.models.cells import CELLS, DIAGONAL
from dni_seq.models.diagonal_cells import LRU, MinGRU
from dni_seq.models.recurrent import build_rnn
from tests import problems, reference
from tests.nests import assert_same
from tests.training import assert_same as assert_close
from tests.training import summed_gradients

LANES, STEPS = 3, 12
CUTS = {"T = 1": [1] * 12, "T = 3": [3] * 4, "random": [5, 1, 4, 2]}
EXACT = {"rtol": 1e-12, "atol": 1e-12}


class Tokens(nn.Module):
    """An embedding, a diagonal network and a readout."""

    def __init__(self, kind, layers=1, traces="exact", width=5):
        super().__init__()
        self.embedding = nn.Embedding(problems.VOCABULARY, 4)
        self.rnn = build_rnn(kind, 4, width, layers, traces=traces or None)
        self.readout = nn.Linear(width, problems.VOCABULARY)

    def initial_state(self, lanes):
        return self.rnn.initial_state(lanes)

    def forward(self, tokens, state):
        outputs, state = self.rnn(self.embedding(tokens), state)
        return self.readout(outputs), state


def model_of(kind, layers=1, traces="exact"):
    torch.manual_seed(0)
    model = Tokens(kind, layers, traces).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    return model


def windows(cuts, ends=()):
    """Windows of the given lengths; `ends` are (step, lane) pairs after which the lane's sequence ends, at a cut."""
    text = problems.tokens(STEPS, LANES)
    found, i = [], 0
    for length in cuts:
        marks = torch.zeros(LANES, dtype=torch.bool)
        marks[[lane for step, lane in ends if step == i + length]] = True
        found.append(dni.Window(text[i : i + length], text[i + 1 : i + length + 1], ends=marks))
        i += length
    return found


def trainer_of(model, lr=0.0, **settings):
    optimizer = torch.optim.SGD(model.parameters(), lr)
    return dni.SequenceTrainer(model, optimizer, problems.unreduced, reduction="sum", state_batch_dim=1, **settings)


def gradients(trainer, some):
    found = []
    for window in some:
        trainer.step(window.inputs, window.targets, ends=window.ends, lookahead=window.lookahead)
        found.append({n: p.grad.clone() for n, p in trainer.model.named_parameters()})
    return summed_gradients(found)


def full(kind, layers, ends):
    """Full BPTT, by windows of one step whose graph is one."""
    model = model_of(kind, layers, traces=False)
    return reference.full_bptt(model, problems.summed, windows([1] * STEPS, ends), model.initial_state(LANES), 1)


def differs(one, other, names):
    return {name for name in names if (one[name] - other[name]).norm() > 1e-3 * other[name].norm()}


ENDS = {"T = 1": [(2, 0), (7, 1), (7, 2)], "T = 3": [(3, 0), (9, 1)], "random": [(6, 2), (5, 0)]}


# --- the cells ---


@pytest.mark.parametrize("traces", [False, True])
@pytest.mark.parametrize("length", [1, 2, 7, 70])
def test_cells_are_their_equations(length, traces):
    torch.manual_seed(1)
    inputs = torch.randn(length, LANES, 4, dtype=torch.float64)
    for cell in (MinGRU(4, 5).double(), LRU(4, 5).double()):
        state = torch.randn(LANES, cell.width, dtype=torch.float64)
        found = []
        for mine in (True, False):
            x, s = inputs.clone().requires_grad_(), state.clone().requires_grad_()
            carried = cell.initial_traces(LANES) if traces else ()
            if isinstance(cell, MinGRU):
                outputs = cell(x, s, carried)[0] if mine else reference.min_gru(cell, x, s)
                last = outputs[-1]
            else:
                outputs, last = cell(x, s, carried)[:2] if mine else reference.lru(cell, x, s)
            loss = (outputs**3).sum() + (last**2).sum()
            found.append([outputs, last, *torch.autograd.grad(loss, [x, s, *cell.parameters()])])
        for mine, other in zip(*found, strict=True):
            torch.testing.assert_close(mine, other, **EXACT)


@pytest.mark.parametrize("kind", DIAGONAL)
def test_windows_follow_each_other_as_one_sequence(kind):
    model = model_of(kind, 2, traces=False)
    text = problems.tokens(STEPS, LANES)[:-1]
    whole, last = model(text, model.initial_state(LANES))
    state, parts = model.initial_state(LANES), []
    for window in windows(CUTS["random"]):
        outputs, state = model(window.inputs, state)
        parts.append(outputs)
    torch.testing.assert_close(torch.cat(parts), whole, **EXACT)
    torch.testing.assert_close(state, last, **EXACT)
    torch.testing.assert_close(model(text, None)[0], whole, **EXACT)


# --- exact credit ---


@pytest.mark.parametrize("kind", DIAGONAL)
@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("ends", [False, True])
def test_one_layer_gives_full_bptt_for_its_own_parameters_and_those_after_it(kind, cut, ends):
    marks = ENDS[cut] if ends else ()
    expected = full(kind, 1, marks)
    found = gradients(trainer_of(model_of(kind)), windows(CUTS[cut], marks))
    without = gradients(trainer_of(model_of(kind, traces=False)), windows(CUTS[cut], marks))
    before = {name for name in expected if name.startswith(("embedding", "rnn.enter", "rnn.blocks.0.norm"))}
    own = {name for name in expected if "cell" in name}
    assert_close(
        {n: found[n] for n in found if n not in before}, {n: v for n, v in expected.items() if n not in before}, **EXACT
    )
    assert differs(without, expected, own)  # what traces bring
    assert differs(found, expected, before) == differs(without, expected, before) != set()  # what they do not


@pytest.mark.parametrize("kind", DIAGONAL)
def test_of_two_layers_the_second_is_exact_and_the_first_loses_what_crosses_the_second(kind):
    expected = full(kind, 2, ())
    found = gradients(trainer_of(model_of(kind, 2)), windows(CUTS["T = 1"]))
    without = gradients(trainer_of(model_of(kind, 2, traces=False)), windows(CUTS["T = 1"]))
    last = {n for n in expected if n.startswith(("rnn.blocks.1.cell", "rnn.blocks.1.m", "readout", "rnn.norm"))}
    assert_close(found, {n: expected[n] for n in last}, **EXACT)
    first = {n for n in expected if n.startswith("rnn.blocks.0.cell") and "skip" not in n and "out" not in n}

    def error(gradient):
        return sum((gradient[n] - expected[n]).square().sum() for n in first)

    assert 0 < error(found) < 0.6 * error(without)


@pytest.mark.parametrize("kind", DIAGONAL)
@pytest.mark.parametrize("cut", CUTS)
def test_with_an_oracles_messages_every_parameter_has_full_bptt(kind, cut):
    """Parameters with a trace get no message, all others do: no credit is counted twice, none is lost."""
    marks = ENDS[cut]
    model = model_of(kind)
    trainer = trainer_of(model, synthesizer=reference.Oracle(model, problems.unreduced), synthetic_scale=1.0)
    some = list(dni.with_lookahead(windows(CUTS[cut], marks), STEPS))
    assert_close(gradients(trainer, some), full(kind, 1, marks), **EXACT)


def oracle_trainer(model, lr, **settings):
    return trainer_of(model, lr, synthesizer=reference.Oracle(model, problems.unreduced), synthetic_scale=1.0, **settings)


@pytest.mark.parametrize("fused", [False, True])
def test_two_biases_that_are_added_are_each_clipped_once(fused):
    """Autograd returns one tensor as the gradient of both biases."""
    dtype = torch.float32 if fused else torch.float64  # a fused kernel that clips reads a float32 norm
    window = next(iter(dni.with_lookahead(windows([1] * 2), 1)))
    model = model_of("lstm", traces="factored").to(dtype)
    start = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    trainer = oracle_trainer(model, 0.0)
    expected = gradients(trainer, [window])
    trainer.reset()
    trainer.optimizer = torch.optim.SGD(model.parameters(), 1.0, fused=fused)
    trainer.clip = 0.1 * float(torch.cat([gradient.flatten() for gradient in expected.values()]).norm())
    trainer.step(window.inputs, window.targets, lookahead=window.lookahead)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(start[name] - parameter, 0.1 * expected[name], rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("kind", ["lstm", "lru"])
@pytest.mark.parametrize("all_of_them", [False, True])
def test_parameters_with_traces_can_be_frozen_between_two_steps(kind, all_of_them):
    """With an oracle's messages the parameters that still train get what they get if nothing is frozen."""
    found = []
    for freeze in (False, True):
        model = model_of(kind, traces="factored" if kind == "lstm" else "exact")
        trainer = oracle_trainer(model, 0.0)
        some = list(dni.with_lookahead(windows([3] * 4), STEPS))
        gradients(trainer, some[:2])
        frozen = trainer.runner.traced if all_of_them else trainer.runner.traced[-1:]
        for parameter in frozen:
            parameter.requires_grad_(not freeze)
        rest = {name for name, parameter in model.named_parameters() if all(parameter is not other for other in frozen)}
        for window in some[2:]:
            trainer.step(window.inputs, window.targets, lookahead=window.lookahead)
            found.append({name: p.grad.clone() for name, p in model.named_parameters() if name in rest})
            assert all((p.grad is None) == (freeze and name not in rest) for name, p in model.named_parameters())
    for one, other in zip(found[:2], found[2:], strict=True):
        assert_close(one, other, **EXACT)


@pytest.mark.parametrize("settings", [{"checkpoint_every": 2}, {"backward_windows": 2}, {"backward_windows": 4}], ids=str)
def test_parts_of_a_window_and_earlier_windows_are_not_counted_twice(settings):
    for kind in DIAGONAL:
        trainer = trainer_of(model_of(kind))
        for name, value in settings.items():
            setattr(trainer, name, value)
        own = {n for n, _ in trainer.model.named_parameters() if "cell" in n}
        found, expected = gradients(trainer, windows(CUTS["T = 3"])), full(kind, 1, ())
        assert_close(found, {n: expected[n] for n in own}, **EXACT)


@pytest.mark.parametrize("kind", DIAGONAL)
def test_in_a_users_own_loop(kind):
    model = model_of(kind)
    state = model.initial_state(LANES)
    for window in windows(CUTS["random"]):
        outputs, state = model(window.inputs, dni.core.states.detach(state))
        problems.summed(outputs, window.targets).backward()  # adds to the gradients
    expected = full(kind, 1, ())
    for name, parameter in model.rnn.named_parameters():
        if "cell" in name:
            torch.testing.assert_close(parameter.grad, expected[f"rnn.{name}"], **EXACT)


# --- as a part of the state ---


@pytest.mark.parametrize("kind", DIAGONAL)
def test_resuming_is_exact(kind, tmp_path):
    def finish(interrupted):
        trainer = trainer_of(model_of(kind, 2), lr=0.02)
        some = windows(CUTS["T = 1"], ENDS["T = 1"])
        gradients(trainer, some[:5])
        if interrupted:
            torch.save(trainer.state_dict(), tmp_path / "state.pt")
            trainer = trainer_of(model_of(kind, 2), lr=0.02)
            trainer.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
        gradients(trainer, some[5:])
        return trainer.state_dict()

    assert_same(finish(True), finish(False))


def test_a_trace_is_carried_and_reset_but_never_receives_a_gradient():
    for kind in DIAGONAL:
        model = model_of(kind)
        trainer = trainer_of(model)
        gradients(trainer, windows([4, 4], [(8, 1)]))
        hidden, carried = trainer.state
        assert all(isinstance(trace, Trace) and not trace.requires_grad for trace in carried)
        assert states.floating(trainer.state) == [hidden] or len(states.floating(trainer.state)) == 1
        for trace in carried:
            assert not trace[:, 1].any()
            assert trace[:, 0].any()
            assert trace[:, 2].any()


def test_a_model_may_write_into_its_traces():
    """The trainer keeps its own copy of the state, as of every leaf."""

    class Writing(Tokens):
        def forward(self, tokens, state):
            for leaf in states.flatten(state):
                leaf.detach().zero_()
            return super().forward(tokens, state)

    torch.manual_seed(0)
    model = Writing("lru").double()
    trainer = trainer_of(model)
    before = states.map_tensors(torch.ones_like, model.initial_state(LANES))
    trainer.runner.run(problems.tokens(2, LANES)[:-1], before)
    leaves = states.flatten(before)
    assert any(isinstance(leaf, Trace) for leaf in leaves)
    assert all(leaf.eq(1).all() for leaf in leaves)


def test_without_gradients_traces_stay_as_they_are():
    model = model_of("lru")
    state = model.initial_state(LANES)
    _, state = model(windows([4])[0].inputs, state)
    state = states.detach(state)
    with torch.no_grad():
        _, after = model(windows([4])[0].inputs, state)
    assert_same(list(after[1]), list(state[1]))
    for parameter in model.rnn.parameters():
        parameter.requires_grad_(False)
    outputs, after = model(windows([4])[0].inputs, state)
    outputs.sum().backward()
    assert_same(list(after[1]), list(state[1]))


@pytest.mark.parametrize("kind", DIAGONAL)
def test_synthesizers_see_the_state_without_its_traces(kind):
    model = model_of(kind)
    start = model.initial_state(LANES)
    synthesizer = dni.StateSynthesizer(start, hidden=(8,)).double()
    trainer = trainer_of(model, lr=0.01, synthesizer=synthesizer, synthetic_scale=0.5)
    gradients(trainer, windows(CUTS["T = 1"], ENDS["T = 1"]))
    before = copy.deepcopy(trainer.state_dict())
    assert sum(p.numel() for p in synthesizer.parameters()) < 2000
    assert_same(before, trainer.state_dict())


def test_cells_that_mix_units_have_no_exact_traces():
    for kind in set(CELLS) - set(DIAGONAL):
        with pytest.raises(ValueError, match=f"exact traces need a diagonal cell .*the recurrence of {kind} mixes units"):
            build_rnn(kind, 3, 4, 1, traces="exact")
    with pytest.raises(ValueError, match="cell must be one of lstm, gru, mingru, lru, got 'rnn'"):
        build_rnn("rnn", 3, 4, 1)
