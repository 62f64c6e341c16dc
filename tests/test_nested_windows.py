"""Nests of tensors as inputs and targets train bit-identically to one tensor; what is no such nest is refused by name."""

from __future__ import annotations

import copy
from collections import OrderedDict
from typing import NamedTuple

import pytest
import torch
from torch import nn

import dni_seq as dni
from dni_seq.distributed.process_group import Ranks
from tests import problems
from tests.credit.trainers import KINDS, T, make_trainer, steps, windows_of
from tests.nests import assert_same
from tests.training import LANES, sequence_trainer

ENDS = {3: [1], 5: [0, 2]}


class Tokens(nn.Module):
    """An encoder of nests, made of one of tokens."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, inputs):
        assert torch.equal(inputs["features"][0], inputs["tokens"][..., None] * 2.0)
        return self.module(inputs["tokens"])


class First(nn.Module):
    """An encoder of tuples, made of one of their first entry."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, targets):
        return self.module(targets[0])


class NestModel(problems.StackedLSTM):
    """Its inputs are a dict, its outputs another one."""

    def forward(self, inputs, state):
        assert torch.equal(inputs["features"][0], inputs["tokens"][..., None] * 2.0)
        logits, state = super().forward(inputs["tokens"], state)
        return {"logits": logits, "again": [logits]}, state


def of_nests(loss_fn):
    def losses(outputs, targets):
        assert torch.equal(targets[1], targets[0] * 2)
        return loss_fn(outputs["logits"], targets[0])

    return losses


def nested(window, swap=False):
    """The window in nests, its dict in another order if `swap`."""
    parts = {"tokens": window.inputs, "features": (window.inputs[..., None] * 2.0,)}
    parts = dict(reversed(parts.items())) if swap else parts
    return window._replace(inputs=parts, targets=(window.targets, window.targets * 2), lookahead=None)


def nested_windows(steps_):
    windows = [nested(window, swap=i % 2 == 1) for i, window in enumerate(windows_of(steps_, ENDS))]
    return list(dni.with_lookahead(windows, T))


def make_models():
    return problems.make_model("lstm"), with_same_parameters(NestModel)


def with_same_parameters(cls):
    model = cls().double()
    model.load_state_dict(problems.make_model("lstm").state_dict())
    return model


def trainers(kind, **settings):
    """A trainer for tensors and one for nests, with the same parameters."""
    plain, nest = make_models()
    one, other = make_trainer(plain, kind, **settings), make_trainer(nest, kind, **settings)
    other.runner.loss_fn = of_nests(other.runner.loss_fn)
    for module in other.credit.modules:
        for part in list(module.modules()):
            if isinstance(part, dni.LookaheadEncoder):
                part.inputs, part.targets = Tokens(part.inputs), First(part.targets)
            if isinstance(part, dni.FutureModel):
                part.inputs, part.loss_fn = Tokens(part.inputs), first_target(part.loss_fn)
    return one, other


def first_target(loss_fn):
    return lambda outputs, targets: loss_fn(outputs, targets[0])


def numbers(results):
    return [(r.loss, r.gradient_norm, tuple(r.synthetic)) for r in results]


@pytest.mark.parametrize("kind", KINDS)
def test_nests_train_as_tensors_do(kind):
    one, other = trainers(kind)
    assert_same(numbers(steps(other, nested_windows(3 * 9))), numbers(steps(one, windows_of(3 * 9, ENDS))))
    assert_same(list(other.model.parameters()), list(one.model.parameters()))


@pytest.mark.parametrize("kind", ["lambda", "auto", "multi-horizon-lambda"])
def test_recorded_nests_are_saved_and_resume_bit_identically(kind, tmp_path):
    windows = nested_windows(3 * 12)
    whole, second = trainers(kind)[1], trainers(kind)[1]
    steps(whole, windows[:6])
    saved = whole.state_dict()["credit"]
    assert saved["ring"] or saved["probe_windows"]
    torch.save(whole.state_dict(), tmp_path / "trainer.pt")
    second.load_state_dict(torch.load(tmp_path / "trainer.pt", weights_only=True))
    assert_same(numbers(steps(second, windows[6:])), numbers(steps(whole, windows[6:])))


def test_nests_without_a_synthesizer_and_with_an_auxiliary_task():
    """The auxiliary task runs a window in two parts and joins the outputs."""
    for auxiliary in (False, True):
        results = []
        for i, model in enumerate(make_models()):
            torch.manual_seed(0)
            settings = {}
            if auxiliary:
                synthesizer = dni.Normalized(dni.BasicSynthesizer(10, n_hidden=1)).double()
                settings = {"synthesizer": synthesizer, "auxiliary": dni.AuxiliaryTask(model.initial_state(1)).double()}
            loss_fn = of_nests(problems.mean) if i else problems.mean
            one = sequence_trainer(model, torch.optim.Adam(model.parameters(), 1e-2), loss_fn, **settings)
            windows = nested_windows(3 * 6) if i else windows_of(3 * 6, ENDS)
            results.append([one.step(w.inputs, w.targets, ends=w.ends) for w in windows])
        assert_same([r.loss for r in results[0]], [r.loss for r in results[1]])
        assert torch.equal(results[0][-1].outputs, results[1][-1].outputs["again"][0])
        assert not results[1][-1].outputs["logits"].requires_grad


def test_the_exact_future_of_nests():
    results = []
    for i, model in enumerate(make_models()):
        losses = of_nests(problems.unreduced) if i else problems.unreduced
        exact = dni.ExactFuture(model, losses, steps=T)
        optimizer = torch.optim.Adam(model.parameters(), 1e-2)
        one = sequence_trainer(model, optimizer, losses, synthesizer=exact, fidelity_every=2)
        results.append(numbers(steps(one, nested_windows(3 * 8) if i else windows_of(3 * 8, ENDS))))
    assert_same(*results)


class TwoRanks(Ranks):
    """The second of two ranks; `window` communicates nothing."""

    def __init__(self):
        super().__init__()
        self.rank, self.size = 1, 2


def test_a_rank_takes_its_lanes_of_every_tensor():
    x = torch.arange(3 * 4).view(3, 4)
    ends = torch.tensor([True, False, True, False])
    window = dni.Window({"a": x, "b": [x[..., None] + 1]}, (x + 2,), x > 3, ends)
    window = next(dni.with_lookahead([window, window], 2))
    own = dni.DataParallel(TwoRanks()).window(window)
    assert torch.equal(own.inputs["a"], x[:, 2:])
    assert torch.equal(own.inputs["b"][0], x[:, 2:, None] + 1)
    assert torch.equal(own.targets[0], x[:, 2:] + 2)
    assert torch.equal(own.ends, ends[2:])
    assert torch.equal(own.mask, x[:, 2:] > 3)
    assert torch.equal(own.lookahead.inputs["b"][0], x[:2, 2:, None] + 1)
    assert torch.equal(own.lookahead.valid, torch.tensor([[False, True]] * 2))


def test_a_nan_in_a_nest_skips_the_step_and_is_named():
    model = with_same_parameters(NestModel)
    optimizer = torch.optim.Adam(model.parameters())
    one = dni.SequenceTrainer(model, optimizer, lambda outputs, targets: outputs["logits"].mean() + targets["x"][0].mean())
    result = one.step(nested_windows(3)[0].inputs, {"x": [torch.full((T, LANES), float("nan"))]})
    assert result.skipped
    assert "first NaN or infinity in the targets (nan at index [0, 0]" in result.events[0]


X = torch.zeros(T, LANES)


class Batch(NamedTuple):
    tokens: torch.Tensor
    features: object


REFUSED = {
    "packed": (
        nn.utils.rnn.pack_padded_sequence(X[..., None], torch.tensor([3, 2, 1])),
        TypeError,
        "a PackedSequence: pass",
    ),
    "text": ({"a": X, "b": "text"}, TypeError, r"\['b'\] is a str: pass a tensor \[T, B, \.\.\.\], or a tuple"),
    "none": ((X, None), TypeError, r"\[1\] is a NoneType"),
    "empty": ({}, ValueError, "holds no tensor"),
    "object": (object(), TypeError, "is a object"),
    "steps": (
        {"a": X, "b": X[:2]},
        ValueError,
        r"\['b'\] has shape \(2, 3\), \w+\['a'\] \(3, 3\): they must agree",
    ),
    "lanes": ([X, [X[:, :2]]], ValueError, r"\[1\]\[0\] has shape \(3, 2\), \w+\[0\] \(3, 3\): they must agree"),
    "no lanes": ([X, X[:, 0]], ValueError, r"\[1\] has shape \(3,\), and no dimension batch_dim=1"),
    "no steps": ([X[:0]], ValueError, r"\[0\] has no steps"),
}


@pytest.mark.parametrize("place", ["inputs", "targets"])
@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_no_nest_of_windows_is_refused_by_name(kind, place):
    nest, error, text = REFUSED[kind]
    one = trainers("bootstrap")[1]
    before = copy.deepcopy(one.state_dict())
    with pytest.raises(error, match=f"{place}.*{text}"):
        one.step(*((nest, X) if place == "inputs" else (X, nest)))
    assert_same(one.state_dict(), before)


def test_inputs_and_targets_must_agree_in_lanes():
    with pytest.raises(ValueError, match="inputs have 3 lanes, targets 2: they must agree"):
        trainers("bootstrap")[1].step({"a": X}, (X[:, :2],))


@pytest.mark.parametrize("cls", [OrderedDict, Batch])
def test_containers_that_a_checkpoint_cannot_hold_are_refused_when_windows_are_recorded(cls):
    """A NamedTuple as inputs trains, but a window with one cannot wait for its replay."""

    class Model(NestModel):
        def forward(self, inputs, state):
            assert isinstance(inputs, cls)
            return super().forward(inputs._asdict() if isinstance(inputs, Batch) else inputs, state)

    for settings in ({}, {"fidelity_every": 1}):
        model = with_same_parameters(Model)
        synthesizer = dni.Normalized(dni.BasicSynthesizer(10)).double()
        optimizer = torch.optim.Adam(model.parameters(), 1e-2)
        one = sequence_trainer(model, optimizer, of_nests(problems.mean), synthesizer=synthesizer, **settings)
        for window in nested_windows(3 * 3):
            inputs = cls(**window.inputs)
            if settings and cls is Batch:
                with pytest.raises(ValueError, match="inputs in a Batch cannot be recorded for a replay: use a dict"):
                    one.step(inputs, window.targets)
            else:
                assert one.step(inputs, window.targets).loss.isfinite()


def test_for_model_refuses_a_nest_and_says_what_to_build():
    model = NestModel()
    with pytest.raises(ValueError, match="example_inputs is a dict, for_model needs a tensor: build a FutureModel"):
        dni.FutureGradient.for_model(model, problems.unreduced, example_inputs={"tokens": X.long()}, vocabulary=7)
