"""What users' models, losses and loops do: whatever fails, the trainer is as before the step, to the bit."""

from __future__ import annotations

import copy
import threading

import pytest
import torch
from torch import nn

import dni_seq as dni
from tests import problems
from tests.atomic import LANES, run, windows
from tests.nests import assert_same
from tests.training import sequence_trainer

SETTINGS = {
    "none": {"synthesizer": None},
    "bootstrap": {},
    "auto": {"synthetic_scale": "auto", "fidelity_every": 2, "replay_windows": 2},  # compares windows 2 and 3, then 4 and 5
    "lambda": {"targets": "lambda", "replay_windows": 3},
    "target-network": {"target_network": 2},
    "auxiliary": {"auxiliary": True},
}


class Model(nn.Module):
    """An LSTM with dropout, and with a batch norm whose buffers each window changes; it fails when told to."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(problems.VOCABULARY, 4)
        self.rnn = nn.LSTM(4, 5)
        self.norm = nn.BatchNorm1d(5)
        self.readout = nn.Linear(5, problems.VOCABULARY)
        self.fail_at = 0

    def initial_state(self, lanes):
        zeros = self.readout.weight.new_zeros(1, lanes, 5)
        return (zeros, zeros)  # one tensor twice: the leaves share memory

    def forward(self, tokens, state):
        embedded = nn.functional.dropout(self.embedding(tokens), 0.3)
        outputs, state = self.rnn(embedded, state)
        outputs = self.norm(outputs.flatten(0, 1)).view_as(outputs)
        self.fail_at -= 1
        if self.fail_at == 0:
            raise ZeroDivisionError("the model's own")
        return self.readout(outputs), state


class Synthesizer(dni.Normalized):
    """Fails in a chosen call of its own."""

    def __init__(self):
        super().__init__(dni.GatedCells(dni.BasicSynthesizer(10, n_hidden=1)))
        self.fail = {}

    def count(self, name):
        if name in self.fail:
            self.fail[name] -= 1
            if self.fail[name] == 0:
                raise ZeroDivisionError("the synthesizer's own")

    def predict(self, trigger, context):
        self.count("predict")
        return super().predict(trigger, context)

    def regress(self, trigger, context, targets):
        self.count("regress")
        regression = super().regress(trigger, context, targets)
        self.count("regressed")
        return regression


def make(kind="bootstrap", model=None, loss_fn=problems.mean, **more):
    torch.manual_seed(0)
    model = Model() if model is None else model
    settings = {"synthesizer": Synthesizer()} | SETTINGS[kind] | more
    if settings.get("auxiliary"):
        settings["auxiliary"] = dni.AuxiliaryTask(model.initial_state(1))
    optimizer = settings.pop("optimizer", None) or torch.optim.Adam(model.parameters(), 1e-2)
    return sequence_trainer(model, optimizer, loss_fn, **settings)


def everything(trainer):
    return copy.deepcopy({"trainer": trainer.state_dict(), "random": torch.get_rng_state()})


PLACES = {
    "model": lambda t: setattr(t.model, "fail_at", 1),
    "model, run again": lambda t: setattr(t.model, "fail_at", 2),
    "model, run again later": lambda t: setattr(t.model, "fail_at", 4),
    "predict": lambda t: t.credit.synthesizer.fail.update(predict=1),
    "predict again": lambda t: t.credit.synthesizer.fail.update(predict=2),
    "regress": lambda t: t.credit.synthesizer.fail.update(regress=1),
    "regressed": lambda t: t.credit.synthesizer.fail.update(regressed=1),
    "regressed again": lambda t: t.credit.synthesizer.fail.update(regressed=3),
}


ALWAYS = ("model", "predict", "regress", "regressed")
REACHED = {
    "none": ("model",),
    "bootstrap": ALWAYS,
    "target-network": ALWAYS,
    "auxiliary": (*ALWAYS, "model, run again"),  # the window is run in two parts
    "auto": (*ALWAYS, "model, run again", "predict again"),  # by the comparison
    "lambda": tuple(PLACES),
}
"""The places that a kind of credit comes to, at one window at least."""


@pytest.mark.parametrize(("kind", "place"), [(kind, place) for kind, places in REACHED.items() for place in places])
def test_an_exception_anywhere_leaves_the_trainer_as_it_was(kind, place):
    """And the same window again gives what it would have given, dropout included."""
    one, other = make(kind), make(kind)
    some = windows(8)
    torch.manual_seed(3)
    expected = [r.loss for r in run(other, some)]
    ahead = everything(other)
    torch.manual_seed(3)
    raised = 0
    found = []
    for window in some:
        before = everything(one)
        PLACES[place](one)
        try:
            (result,) = run(one, [window])
        except ZeroDivisionError:
            raised += 1
            assert_same(everything(one), before)
            assert all(p.grad is None for p in one.model.parameters())
            disarm(one)
            (result,) = run(one, [window])
        disarm(one)
        found.append(result.loss)
    assert torch.equal(torch.stack(found), torch.stack(expected))
    assert_same(everything(one), ahead)
    assert raised


def disarm(trainer):
    trainer.model.fail_at = 0
    if trainer.credit is not None:
        trainer.credit.synthesizer.fail.clear()


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError])
def test_an_interruption_is_an_exception_like_others(error):
    def loss_fn(outputs, targets):
        if armed:
            raise error
        return problems.mean(outputs, targets)

    armed = []
    one = make(loss_fn=loss_fn)
    run(one, windows(2))
    before = everything(one)
    armed.append(True)
    with pytest.raises(error):
        run(one, windows(1))
    assert_same(everything(one), before)
    armed.clear()
    run(one, windows(1))


def test_an_optimizer_that_cannot_do_it_says_so_at_the_first_step():
    model = Model()
    one = make(model=model, optimizer=torch.optim.LBFGS(model.parameters()))
    before = everything(one)
    with pytest.raises(TypeError, match="closure"):
        run(one, windows(1))
    assert_same(everything(one), before)

    sparse = Model()
    sparse.embedding = nn.Embedding(problems.VOCABULARY, 4, sparse=True)
    other = make(model=sparse, optimizer=torch.optim.Adam(sparse.parameters()))
    before = everything(other)
    with pytest.raises((RuntimeError, NotImplementedError), match=r"[Ss]parse"):
        run(other, windows(1))
    assert_same(everything(other), before)


class Plain(nn.Module):
    """An RNN in plain operations; subclasses say how they treat their state."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(problems.VOCABULARY, 5)
        self.weight = nn.Parameter(torch.randn(5, 5) / 2)
        self.readout = nn.Linear(5, problems.VOCABULARY)

    def initial_state(self, lanes):
        return torch.zeros(1, lanes, 5)

    def forward(self, tokens, state):
        state = state * 0.9
        outputs = []
        for x in self.embedding(tokens):
            state = (x + state @ self.weight).tanh()
            outputs.append(state[0])
        return self.readout(torch.stack(outputs)), state


class InPlace(Plain):
    """The same, the state that it is given written in place."""

    def forward(self, tokens, state):
        state.mul_(0.9)
        outputs = []
        for x in self.embedding(tokens):
            state = (x + state @ self.weight).tanh()
            outputs.append(state[0])
        return self.readout(torch.stack(outputs)), state


class Views(Plain):
    """The same, its state a view of all hidden states, which are its outputs too, and its initial state an expanded one."""

    def initial_state(self, lanes):
        return torch.zeros(1, 1, 5).expand(1, lanes, 5)

    def forward(self, tokens, state):
        hidden = [state * 0.9]
        for x in self.embedding(tokens):
            hidden.append((x + hidden[-1] @ self.weight).tanh())
        self.all = torch.cat(hidden[1:])
        return self.readout(self.all), self.all[-1:]


@pytest.mark.parametrize("kind", ["none", "bootstrap", "auto", "lambda"])
@pytest.mark.parametrize("cls", [InPlace, Views])
def test_states_in_place_and_views_are_like_any_other(cls, kind):
    losses = []
    for each in (Plain, cls):
        torch.manual_seed(1)
        synthesizer = None if kind == "none" else dni.Normalized(dni.BasicSynthesizer(5, n_hidden=1))
        one = make(kind, model=each(), synthesizer=synthesizer)
        losses.append([])
        for window in windows(9):
            (result,) = run(one, [window])
            losses[-1].append(result.loss.item())
            if each is Views:
                one.model.all.detach().fill_(9.0)  # the user's to write to
    assert losses[0] == losses[1]


def test_an_in_place_model_that_fails_has_not_touched_the_state():
    model = InPlace()
    one = make("none", model=model)
    run(one, windows(2))
    before = everything(one)
    model.readout.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run(one, windows(1))
    assert_same(everything(one), before)


def test_outputs_and_inputs_are_the_users_to_write_to():
    """In between steps, also while windows wait for their replay."""
    losses = []
    for writes in (False, True):
        one = make("lambda", fidelity_every=1)
        losses.append([])
        torch.manual_seed(4)
        for window in windows(7):
            inputs, targets = window.inputs.clone(), window.targets.clone()
            result = one.step(inputs, targets)
            losses[-1].append(result.loss.item())
            if writes:
                result.outputs.zero_()
                inputs.zero_()
                targets.zero_()
    assert losses[0] == losses[1]


def test_a_state_with_one_tensor_twice_gets_the_gradients_of_both():
    """Against a model whose initial state is two tensors."""

    class Apart(Model):
        def initial_state(self, lanes):
            return (torch.zeros(1, lanes, 5), torch.zeros(1, lanes, 5))

    losses = []
    for cls in (Model, Apart):
        torch.manual_seed(0)
        one = make(model=cls())
        torch.manual_seed(1)
        losses.append([r.loss.item() for r in run(one, windows(6))])
    assert losses[0] == losses[1]


def test_a_state_that_passes_through_untouched():
    class Forgetful(Plain):
        def forward(self, tokens, state):
            return self.readout(self.embedding(tokens)), state

    one = make(model=Forgetful(), synthesizer=dni.Normalized(dni.BasicSynthesizer(5)))
    assert all(r.loss.isfinite() for r in run(one, windows(4)))
    assert not one.state.any()


@pytest.mark.parametrize("kind", SETTINGS)
def test_frozen_and_unused_parameters(kind):
    """Frozen ones stay; those that a window does not use stay in that window."""

    class Sometimes(Model):
        def __init__(self):
            super().__init__()
            self.extra = nn.Linear(7, 7)
            self.use = True

        def forward(self, tokens, state):
            outputs, state = super().forward(tokens, state)
            return (self.extra(outputs) if self.use else outputs), state

    model = Sometimes()
    model.embedding.weight.requires_grad_(False)
    one = make(kind, model=model)
    frozen = model.embedding.weight.clone()
    *some, last = windows(6)
    run(one, some)
    assert torch.equal(model.embedding.weight, frozen)
    assert not model.embedding.weight.requires_grad
    model.use = False
    extra, rnn = model.extra.weight.clone(), model.rnn.weight_hh_l0.clone()
    run(one, [last])
    assert torch.equal(model.extra.weight, extra)
    assert not torch.equal(model.rnn.weight_hh_l0, rnn)


def test_a_wholly_frozen_model_is_refused_in_words():
    model = Model()
    model.requires_grad_(False)
    with pytest.raises(RuntimeError, match="does not require a gradient"):
        run(make("none", model=model), windows(1))
    # A synthesizer can learn beside a frozen model.
    one = make(model=model, optimizer=torch.optim.SGD([nn.Parameter(torch.zeros(1))], 0.1))
    assert all(r.loss.isfinite() for r in run(one, windows(3)))


def test_a_detached_loss_and_no_grad_are_refused_in_words():
    one = make(loss_fn=lambda outputs, targets: problems.mean(outputs, targets).detach())
    before = everything(one)
    with pytest.raises(RuntimeError, match="does not require a gradient"):
        run(one, windows(1))
    with torch.no_grad(), pytest.raises(ValueError, match="call it outside of"):
        run(one, windows(1))
    with torch.inference_mode(), pytest.raises(ValueError, match="call it outside of"):
        run(one, windows(1))
    assert_same(everything(one), before)


def test_a_step_within_a_step_is_refused():
    def loss_fn(outputs, targets):
        if nested:
            run(one, windows(1))
        return problems.mean(outputs, targets)

    nested = []
    one = make(loss_fn=loss_fn)
    run(one, windows(2))
    before = everything(one)
    nested.append(True)
    with pytest.raises(RuntimeError, match="another step of this trainer is running"):
        run(one, windows(1))
    assert_same(everything(one), before)
    nested.clear()
    run(one, windows(1))


def test_two_threads_on_one_trainer_are_refused_and_two_trainers_are_not():
    inside, go_on = threading.Event(), threading.Event()

    def slow(outputs, targets):
        inside.set()
        go_on.wait(60)
        return problems.mean(outputs, targets)

    one = make(loss_fn=slow)
    thread = threading.Thread(target=run, args=(one, windows(1)))
    thread.start()
    assert inside.wait(60)
    with pytest.raises(RuntimeError, match="use one trainer per thread"):
        run(one, windows(1))
    other = make()
    assert run(other, windows(1))[0].loss.isfinite()
    go_on.set()
    thread.join(60)
    assert (one.steps, other.steps) == (1, 1)


def test_lanes_may_change_their_number_between_sequences():
    one = make()
    run(one, windows(2))
    window = windows(1)[0]
    with pytest.raises(ValueError, match=r"the inputs have 2 lanes, the state has 3 .* call reset\(\) before a new stream"):
        one.step(window.inputs[:, :2], window.targets[:, :2])
    one.reset()
    assert one.step(window.inputs[:, :2], window.targets[:, :2]).loss.isfinite()
    assert LANES == 3
