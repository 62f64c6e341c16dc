"""Kinds of states: dicts in any order, every mapping, NamedTuples, complex numbers, None; what is not a state is refused."""

from __future__ import annotations

import copy
import dataclasses
from collections import OrderedDict, UserDict, deque
from typing import NamedTuple

import pytest
import torch
from torch import nn

import dni_seq as dni
from tests import problems
from tests.credit.trainers import KINDS, make_trainer, windows_of
from tests.nests import assert_same
from tests.training import LANES, sequence_trainer

UNITS = 5


class Model(nn.Module):
    """An LSTM whose state is a dict; `kept` is the order of its initial state, `given` that of the states it returns."""

    cells = {"c": True, "h": False}
    state_batch_dim = {"c": 1, "h": 1}

    def __init__(self, kept="hc", given="hc"):
        super().__init__()
        self.kept, self.given = kept, given
        self.embedding = nn.Embedding(problems.VOCABULARY, 4)
        self.rnn = nn.LSTM(4, UNITS)
        self.readout = nn.Linear(UNITS, problems.VOCABULARY)

    def initial_state(self, lanes):
        weight = self.readout.weight
        starts = {"h": weight.new_full((1, lanes, UNITS), 0.3), "c": weight.new_full((1, lanes, UNITS), -0.2)}
        return {key: starts[key] for key in self.kept}

    def forward(self, tokens, state):
        outputs, (h, c) = self.rnn(self.embedding(tokens), (state["h"], state["c"]))
        last = {"h": h, "c": c}
        return self.readout(outputs), {key: last[key] for key in self.given}


def make_model(*orders, seed=0):
    torch.manual_seed(seed)
    return Model(*orders).double()


def basic_trainer(model, **settings):
    torch.manual_seed(7)
    synthesizer = dni.Normalized(dni.GatedCells(dni.BasicSynthesizer(2 * UNITS, n_hidden=1), model.cells)).double()
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    settings = {"synthesizer": synthesizer, "synthetic_scale": 0.5, "state_batch_dim": model.state_batch_dim} | settings
    return sequence_trainer(model, optimizer, problems.mean, **settings)


def plain_trainer(model, **settings):
    return basic_trainer(model, synthesizer=None, synthetic_scale=None, **settings)


def auxiliary_trainer(model):
    torch.manual_seed(8)
    return basic_trainer(model, auxiliary=dni.AuxiliaryTask(model.initial_state(1)).double())


def state_synthesizer(model):
    encoder = dni.LookaheadEncoder(1, nn.Embedding(problems.VOCABULARY, 2), nn.Embedding(problems.VOCABULARY, 2))
    return dni.StateSynthesizer(model.initial_state(1), cells=model.cells, hidden=(8,), encoder=encoder).double()


def exact_trainer(model):
    torch.manual_seed(9)
    tail = state_synthesizer(model)
    return basic_trainer(model, synthesizer=dni.ExactFuture(model, problems.unreduced, steps=2, tail=tail))


MAKERS = {
    "none": plain_trainer,
    "basic": basic_trainer,
    "basic, auxiliary task": auxiliary_trainer,
    "basic, lambda": lambda model: basic_trainer(model, targets="lambda", replay_windows=3, target_network=2),
    "basic, fidelity": lambda model: basic_trainer(model, fidelity_every=2),
    "exact": exact_trainer,
    **{kind: lambda model, kind=kind: make_trainer(model, kind, initial_state=None) for kind in KINDS},
}

SEES_NOTHING = (dni.BasicSynthesizer, dni.GatedCells, dni.Normalized)


def steps(trainer, windows):
    """Results of all windows, with their lookahead if the synthesizer takes one."""
    blind = trainer.credit is None or isinstance(trainer.credit.synthesizer, SEES_NOTHING)
    return [trainer.step(w.inputs, w.targets, ends=w.ends, lookahead=None if blind else w.lookahead) for w in windows]


ENDS = {3: [1], 5: [0, 2], 8: [2]}


def numbers(results):
    return [(r.loss, r.gradient_norm, None if r.synthetic is None else tuple(r.synthetic)) for r in results]


@pytest.mark.parametrize("kind", MAKERS)
def test_a_dict_in_another_order_at_each_window_trains_as_if_in_one(kind):
    """To the bit, with lanes that end: every second window returns its keys in another order."""
    windows = windows_of(3 * 12, ENDS)
    one = MAKERS[kind](make_model())
    expected = numbers(steps(one, windows))
    other = MAKERS[kind](make_model())
    found = []
    for i, window in enumerate(windows):
        other.model.given = "ch" if i % 2 else "hc"
        found += numbers(steps(other, [window]))
    assert_same(found, expected)
    assert_same(other.state_dict(), one.state_dict())


def without_paths(saved):
    """A checkpoint as older versions wrote it: without the paths of leaves and the order of synthesizers."""
    if isinstance(saved, dict):
        dropped = [key for key in saved if key in ("state_paths", "start_paths") or str(key).endswith("order.keys")]
        return {key: without_paths(value) for key, value in saved.items() if key not in dropped}
    return [without_paths(value) for value in saved] if isinstance(saved, list) else saved


@pytest.mark.parametrize("at", [1, 4, 7])
@pytest.mark.parametrize("kind", MAKERS)
def test_a_checkpoint_of_an_older_version_resumes_bit_identically(kind, at, tmp_path):
    windows = windows_of(3 * 10, ENDS)
    whole = MAKERS[kind](make_model())
    steps(whole, windows[:at])
    saved = without_paths(whole.state_dict())
    torch.save(saved, tmp_path / "trainer.pt")
    second = MAKERS[kind](make_model(seed=3))
    second.load_state_dict(torch.load(tmp_path / "trainer.pt", weights_only=True), LANES)
    assert_same(numbers(steps(second, windows[at:])), numbers(steps(whole, windows[at:])))
    assert_same(second.state_dict(), whole.state_dict())


@pytest.mark.parametrize("restored", ["now", "at the next step"])
@pytest.mark.parametrize("kind", ["none", "basic", "basic, lambda", "basic, fidelity"])
def test_a_checkpoint_is_read_by_key_into_a_model_with_another_order(kind, restored, tmp_path):
    """Close and not bit-identical: norms over leaves are summed in another order."""
    windows = windows_of(3 * 10, ENDS)
    whole = MAKERS[kind](make_model("hc", "ch"))
    steps(whole, windows[:5])
    torch.save(whole.state_dict(), tmp_path / "trainer.pt")
    second = MAKERS[kind](make_model("ch", "ch", seed=3))
    second.load_state_dict(torch.load(tmp_path / "trainer.pt", weights_only=True), LANES if restored == "now" else None)
    pairs = zip(steps(second, windows[5:]), steps(whole, windows[5:]), strict=True)
    for one, two in pairs:
        torch.testing.assert_close(one.loss, two.loss, rtol=1e-12, atol=0)
    for key, value in whole.state.items():
        torch.testing.assert_close(second.state[key], value, rtol=1e-10, atol=1e-12)


def test_a_checkpoint_with_other_keys_is_refused_by_name():
    first, second = plain_trainer(make_model()), plain_trainer(make_model())
    steps(first, windows_of(3))
    second.model.initial_state = lambda lanes: {"h": torch.zeros(1, lanes, UNITS), "cell": torch.zeros(1, lanes, UNITS)}
    with pytest.raises(ValueError, match=r"saved state and the model's state .* missing .*cell.*, unexpected .*'c'"):
        second.load_state_dict(first.state_dict(), LANES)


def test_a_synthesizer_of_an_example_in_another_order_is_refused_by_name():
    saved = make_trainer(make_model("hc"), "bootstrap", initial_state=None).state_dict()
    other = make_trainer(make_model("ch"), "bootstrap", initial_state=None)
    with pytest.raises(
        RuntimeError, match=r"the entries \['h'\], \['c'\] in this order, this one \['c'\], \['h'\]: build it"
    ):
        other.load_state_dict(saved)


@pytest.mark.parametrize("wrap", [lambda s: s, dni.Normalized], ids=["basic", "normalized"])
def test_a_synthesizer_keeps_its_order_in_its_state_dict(wrap):
    """Loaded into a new process, whose first trigger has another order, it gives the same message by key."""
    torch.manual_seed(0)
    make = lambda: wrap(dni.BasicSynthesizer(2 * UNITS, n_hidden=1))  # noqa: E731
    h, c = torch.randn(2, 1, LANES, UNITS)
    first = make()
    nn.init.normal_((first if wrap is not dni.Normalized else first.synthesizer).layers[-1].weight)
    interface = dni.BackwardInterface(first)
    interface.send({"h": h.square(), "c": c + 4}, {"h": h, "c": c})
    expected = interface.receive({"h": h, "c": c})
    assert expected["h"].any()
    second = make()
    second.load_state_dict(first.state_dict())
    for interface in (dni.BackwardInterface(first), dni.BackwardInterface(second)):
        found = interface.receive({"c": c, "h": h})
        assert list(found) == ["c", "h"]
        assert_same(found, expected)
    with pytest.raises(ValueError, match=r"missing .*'h'.*, unexpected .*'x'"):
        dni.BackwardInterface(second).receive({"x": h, "c": c})


class ByKey(nn.Module):
    """A user's synthesizer, whose message has an order of its own: the h of the trigger for h, twice its c for c."""

    def __init__(self):
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(1.0))

    def forward(self, trigger, context=None):
        return {"c": 2 * trigger["c"] * self.factor, "h": trigger["h"] * self.factor}


def test_a_users_message_is_matched_by_key():
    h, c = torch.randn(2, 1, LANES, UNITS)
    trigger = {"h": h.clone().requires_grad_(), "c": c.clone().requires_grad_()}
    interface = dni.BackwardInterface(ByKey())
    interface.backward({key: leaf * 1.0 for key, leaf in trigger.items()})
    assert torch.equal(trigger["h"].grad, h)
    assert torch.equal(trigger["c"].grad, 2 * c)
    regression = interface.send({"c": 2 * c, "h": h}, {"h": h, "c": c})
    assert regression.loss == 0


def test_other_keys_are_refused_by_name_at_the_step_that_brings_them():
    one = plain_trainer(make_model())
    steps(one, windows_of(3))
    hook = one.model.register_forward_hook(lambda *call: (call[2][0], {"h": call[2][1]["h"], "cell": call[2][1]["c"]}))
    before = copy.deepcopy(one.state_dict())
    with pytest.raises(ValueError, match=r"last state and the state before it .*: missing 'c', unexpected 'cell'"):
        steps(one, windows_of(3))
    assert_same(one.state_dict(), before)
    hook.remove()
    steps(one, windows_of(3))


def test_a_tuple_of_marks_for_a_dict_is_refused_by_name():
    model = make_model()
    synthesizer = dni.GatedCells(dni.BasicSynthesizer(2 * UNITS)).double()
    with pytest.raises(ValueError, match="cells is a tuple, the state has the keys 'h', 'c': give a dict"):
        steps(basic_trainer(model, synthesizer=synthesizer), windows_of(3))
    with pytest.raises(ValueError, match=r"state_batch_dim and the state .* missing 'c'"):
        steps(basic_trainer(model, state_batch_dim={"h": 1}), windows_of(3, {0: [1]}))


class Pair(NamedTuple):
    h: object
    c: object


class AttributeDict(dict):
    __getattr__ = dict.__getitem__


class Kind(Model):
    """The same with a state of another class, which the model insists on."""

    def __init__(self, kind):
        super().__init__()
        self.kind = kind

    def initial_state(self, lanes):
        return self.kind(**super().initial_state(lanes))

    def forward(self, tokens, state):
        assert isinstance(state, self.kind)
        pair = {"h": state.h, "c": state.c} if isinstance(state, Pair) else dict(state)
        outputs, last = super().forward(tokens, pair)
        return outputs, self.kind(**last)


@pytest.mark.parametrize("kind", ["none", "basic", "basic, lambda", "basic, fidelity"])
@pytest.mark.parametrize("cls", [OrderedDict, AttributeDict, UserDict, Pair])
def test_every_class_of_state_trains_as_a_dict_does(cls, kind):
    windows = windows_of(3 * 10, ENDS)
    torch.manual_seed(0)
    model = Kind(cls).double()
    if cls is Pair:
        model.cells, model.state_batch_dim = Pair(False, True), Pair(1, 1)
    one, other = MAKERS[kind](model), MAKERS[kind](make_model())
    assert_same(numbers(steps(one, windows)), numbers(steps(other, windows)))
    assert type(one.state) is cls


@dataclasses.dataclass
class Dataclass:
    h: torch.Tensor
    c: torch.Tensor


class Sequence(deque):
    def __init__(self, h, c):
        super().__init__([h, c])


@pytest.mark.parametrize("make", [plain_trainer, basic_trainer])
@pytest.mark.parametrize("given", [True, False])
@pytest.mark.parametrize("cls", [Dataclass, Sequence])
def test_what_is_no_nest_is_refused_by_name_at_the_first_step(cls, given, make):
    class Other(Model):
        def initial_state(self, lanes):
            return cls(**super().initial_state(lanes)) if given else None

        def forward(self, tokens, state):
            outputs, (h, c) = self.rnn(self.embedding(tokens))
            return self.readout(outputs), cls(h, c)

    where = "the state that a window starts from" if given else "the model's last state"
    with pytest.raises(TypeError, match=f"{where} holds a {cls.__name__}: use tensors, or tuples"):
        steps(make(Other().double(), state_batch_dim=1), windows_of(3))


class Complex(nn.Module):
    """A diagonal linear RNN, whose state [B, H] turns in the complex plane; `real` carries it as [B, H, 2]."""

    cells = False
    state_batch_dim = 0

    def __init__(self, real=False):
        super().__init__()
        self.real = real
        self.angle = nn.Parameter(torch.rand(UNITS, dtype=torch.float64))
        self.embedding = nn.Embedding(problems.VOCABULARY, UNITS, dtype=torch.float64)
        self.readout = nn.Linear(2 * UNITS, problems.VOCABULARY, dtype=torch.float64)

    def initial_state(self, lanes):
        state = torch.zeros(lanes, UNITS, dtype=torch.complex128)
        return torch.view_as_real(state) if self.real else state

    def forward(self, tokens, state):
        state = torch.view_as_complex(state) if self.real else state
        seen, turn = [], torch.polar(torch.full_like(self.angle, 0.9), self.angle)
        for x in self.embedding(tokens):
            state = turn * state + x
            seen.append(torch.view_as_real(state).flatten(-2))
        return self.readout(torch.stack(seen)), torch.view_as_real(state) if self.real else state


def make_complex(*args):
    torch.manual_seed(0)
    return Complex(*args)


def test_a_complex_state_trains_as_the_plain_loop_does():
    windows = windows_of(3 * 8, ENDS)
    one = plain_trainer(make_complex())
    found = [r.loss for r in steps(one, windows)]
    model = make_complex()
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    state, expected = model.initial_state(LANES), []
    for window in windows:
        outputs, last = model(window.inputs, state)
        loss = problems.mean(outputs, window.targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        state = torch.where(window.ends[:, None], 0, last.detach())
        expected.append(loss.detach())
    assert_same(found, expected)
    assert_same(dict(one.model.named_parameters()), dict(model.named_parameters()))


def test_a_synthesizer_refuses_a_complex_state_and_says_what_to_carry():
    settings = {"synthesizer": dni.BasicSynthesizer(2).double()}
    with pytest.raises(ValueError, match=r"complex tensor, .*view_as_real"):
        steps(basic_trainer(make_complex(), **settings), windows_of(3))
    with pytest.raises(ValueError, match=r"the example holds a complex tensor, .*view_as_real"):
        dni.StateSynthesizer(make_complex().initial_state(1))
    real = basic_trainer(make_complex(True), **settings)
    assert all(r.loss.isfinite() for r in steps(real, windows_of(12)))


class Mixed(nn.Module):
    """An LSTM's (h, c) [1, B, H] below a GRU cell's state [B, 4]."""

    cells = ((False, True), False)
    state_batch_dim = ((1, 1), 0)

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(problems.VOCABULARY, 4)
        self.lower, self.upper = nn.LSTM(4, UNITS), nn.GRUCell(UNITS, 4)
        self.readout = nn.Linear(4, problems.VOCABULARY)

    def initial_state(self, lanes):
        zeros = self.readout.weight.new_zeros
        return (zeros(1, lanes, UNITS), zeros(1, lanes, UNITS)), zeros(lanes, 4)

    def forward(self, tokens, state):
        outputs, lower = self.lower(self.embedding(tokens), state[0])
        upper, seen = state[1], []
        for x in outputs:
            upper = self.upper(x, upper)
            seen.append(upper)
        return self.readout(torch.stack(seen)), (lower, upper)


def test_leaves_of_several_ranks_train_or_are_refused_with_what_to_use():
    windows = windows_of(3 * 8, ENDS)
    assert all(r.loss.isfinite() for r in steps(make_trainer(Mixed().double(), "bootstrap", initial_state=None), windows))
    synthesizer = dni.BasicSynthesizer(2 * UNITS + 4, n_hidden=1).double()
    with pytest.raises(ValueError, match=r"\[1, 3, 5\], \[1, 3, 5\], \[3, 4\] differ .*: use StateSynthesizer"):
        steps(basic_trainer(Mixed().double(), synthesizer=synthesizer), windows)


class Lazy(Model):
    """Its initial cell is None, which stands for zeros; a second entry is always None."""

    cells = (False, True, False)
    state_batch_dim = 1

    def initial_state(self, lanes):
        return self.readout.weight.new_zeros(1, lanes, UNITS), self.start(lanes), None

    def start(self, lanes):
        return None

    def forward(self, tokens, state):
        h, c, nothing = state
        assert nothing is None
        outputs, last = super().forward(tokens, {"h": h, "c": torch.zeros_like(h) if c is None else c})
        return outputs, (last["h"], last["c"], None)


class Eager(Lazy):
    def start(self, lanes):
        return self.readout.weight.new_zeros(1, lanes, UNITS)


def test_none_in_a_state_trains_as_zeros_do():
    windows = windows_of(3 * 8, ENDS)
    losses = []
    for cls in (Lazy, Eager):
        torch.manual_seed(0)
        losses.append([r.loss for r in steps(plain_trainer(cls().double()), windows)])
    assert_same(*losses)


def test_a_synthesizer_for_a_state_with_none_says_what_differs():
    torch.manual_seed(0)
    one = basic_trainer(Eager().double())
    assert all(r.loss.isfinite() for r in steps(one, windows_of(3 * 8, ENDS)))
    heads = state_synthesizer(Eager().double())
    with pytest.raises(ValueError, match="the state has 1 floating-point tensors, the synthesizer's example 2"):
        steps(basic_trainer(Lazy().double(), synthesizer=heads), windows_of(3))
