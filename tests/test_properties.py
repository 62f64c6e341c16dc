"""Properties that hold for any nest, batch dimension, dtype, window length, pattern of ends and reduction.

hypothesis draws the cases, always the same ones, and shrinks a case that fails.
"""

from __future__ import annotations

import copy
from typing import NamedTuple

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

import dni_seq as dni
from dni_seq.core import states
from dni_seq.credit.window_runner import window_loss
from tests import problems
from tests.nests import assert_same
from tests.training import sequence_trainer

FEW = settings(max_examples=25, deadline=None, derandomize=True, database=None)
MANY = settings(max_examples=100, deadline=None, derandomize=True, database=None)


class Pair(NamedTuple):
    """A nest of the user's own."""

    left: object
    right: object


class Spec(NamedTuple):
    """One leaf of a state: its shape without lanes, where the lanes go, and whether it is a counter of steps."""

    shape: tuple[int, ...]
    dim: int
    counter: bool


@st.composite
def specs(draw, counters=True):
    shape = draw(st.lists(st.integers(1, 3), max_size=2).map(tuple))
    return Spec(shape, draw(st.integers(0, len(shape))), counters and draw(st.booleans()))


def nests(leaves):
    """Nests of at most a few of these leaves, of every container."""
    return st.recursive(
        leaves,
        lambda inner: st.one_of(
            st.lists(inner, min_size=1, max_size=2),
            st.lists(inner, min_size=1, max_size=2).map(tuple),
            st.dictionaries(st.sampled_from("abc"), inner, min_size=1, max_size=2),
            st.builds(Pair, inner, inner),
        ),
        max_leaves=4,
    )


def leaves_of(nest):
    """The `Spec`s of a nest; a Spec is a tuple, which `states.flatten` would take apart."""
    if isinstance(nest, Spec):
        return [nest]
    values = nest.values() if isinstance(nest, dict) else nest
    return [leaf for value in values for leaf in leaves_of(value)]


def fill(nest, make):
    """The nest with `make(spec)` for every leaf."""
    if isinstance(nest, Spec):
        return make(nest)
    if isinstance(nest, dict):
        return {key: fill(value, make) for key, value in nest.items()}
    if isinstance(nest, Pair):
        return Pair(*(fill(value, make) for value in nest))
    return type(nest)(fill(value, make) for value in nest)


def tensor(spec, lanes, dtype=torch.float64, generator=None):
    shape = (*spec.shape[: spec.dim], lanes, *spec.shape[spec.dim :])
    if spec.counter:
        return torch.zeros(shape, dtype=torch.int64)
    return torch.randn(shape, dtype=dtype, generator=generator) if generator else torch.zeros(shape, dtype=dtype)


class NestModel(nn.Module):
    """A network with any nest as its state: each leaf is squashed, mixed with the input and with the leaf before it."""

    def __init__(self, nest, dtype):
        super().__init__()
        self.nest = nest
        self.specs = leaves_of(nest)
        floating = [spec for spec in self.specs if not spec.counter]
        self.embedding = nn.Embedding(problems.VOCABULARY, 1 + len(floating), dtype=dtype)
        self.decay = nn.Parameter(torch.randn(1 + len(floating), dtype=dtype))
        self.readout = nn.Linear(1 + len(floating), problems.VOCABULARY, dtype=dtype)
        self.dtype = dtype

    def initial_state(self, lanes):
        return fill(self.nest, lambda spec: tensor(spec, lanes, self.dtype))

    def forward(self, tokens, state):
        leaves = states.flatten(state)
        outputs = []
        for x in self.embedding(tokens):  # [B, features]
            features, fresh, i = [x[:, 0]], [], 0
            for spec, leaf in zip(self.specs, leaves, strict=True):
                if spec.counter:
                    fresh.append(leaf + 1)
                    continue
                i += 1
                own = x[:, i] + features[-1] * 0.5
                view = own.reshape([-1 if d == spec.dim else 1 for d in range(leaf.dim())])
                fresh.append((leaf * self.decay[i] + view).tanh())
                features.append(fresh[-1].movedim(spec.dim, 0).reshape(len(own), -1).mean(1))
            leaves = fresh
            outputs.append(self.readout(torch.stack(features, dim=1)))
        return torch.stack(outputs), states.unflatten(state, leaves)


def unreduced(outputs, targets):
    return F.cross_entropy(outputs.flatten(0, 1), targets.flatten(), reduction="none").view_as(targets)


class Case(NamedTuple):
    """A model, its windows, and how their losses become one number."""

    nest: object
    dtype: torch.dtype
    windows: list[dni.Window]
    reduction: str
    lanes: int


@st.composite
def cases(draw, least=1, most=5):
    lanes = draw(st.integers(1, 3))
    dtype = draw(st.sampled_from([torch.float32, torch.float64]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 100)))
    drawn = []
    for _ in range(draw(st.integers(least, most))):
        steps = draw(st.integers(1, 4))
        text = torch.randint(problems.VOCABULARY, (steps + 1, lanes), generator=generator)
        ends = draw(st.none() | st.lists(st.booleans(), min_size=lanes, max_size=lanes))
        mask = draw(st.none() | st.lists(st.booleans(), min_size=steps * lanes, max_size=steps * lanes))
        drawn.append(
            dni.Window(
                text[:-1],
                text[1:],
                None if mask is None else torch.tensor(mask).view(steps, lanes),
                None if ends is None else torch.tensor(ends),
            )
        )
    reduction = draw(st.sampled_from(["mean", "lane-mean", "sum"]))
    return Case(draw(nests(specs())), dtype, drawn, reduction, lanes)


def make(case, synthesizer=None, **more):
    torch.manual_seed(0)
    model = NestModel(case.nest, case.dtype)
    return sequence_trainer(
        model,
        torch.optim.SGD(model.parameters(), 0.1, momentum=0.5),
        unreduced,
        synthesizer=synthesizer,
        state_batch_dim=fill(case.nest, lambda spec: spec.dim),
        reduction=case.reduction,
        **more,
    )


def step(trainer, window):
    return trainer.step(window.inputs, window.targets, mask=window.mask, ends=window.ends)


def has_gradients(case):
    return any(not spec.counter for spec in leaves_of(case.nest))


class Blind(nn.Module):
    """A synthesizer for any nest: a learned number for every leaf, at first zero."""

    def __init__(self, case):
        super().__init__()
        self.numbers = nn.Parameter(torch.zeros(len(leaves_of(case.nest)), dtype=case.dtype))

    def forward(self, trigger, context):
        leaves = states.floating(trigger)
        return states.with_floating(trigger, [leaf * 0 + self.numbers[i] for i, leaf in enumerate(leaves)])


@FEW
@given(cases())
def test_the_trainer_is_the_plain_loop(case):
    """Parameters to the bit those of a loop with its own resets and its own reduction."""
    trainer = make(case)
    torch.manual_seed(0)
    model = NestModel(case.nest, case.dtype)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.5)
    state = model.initial_state(case.lanes)
    for window in case.windows:
        outputs, last = model(window.inputs, state)
        losses = unreduced(outputs, window.targets)
        if window.mask is not None:
            losses = torch.where(window.mask, losses, 0)
        count = {
            "mean": losses.numel() if window.mask is None else max(1, int(window.mask.sum())),
            "lane-mean": case.lanes,
            "sum": 1,
        }[case.reduction]
        loss = losses.mean() if case.reduction == "mean" and window.mask is None else losses.sum() / count
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        leaves = []
        for spec, leaf in zip(leaves_of(case.nest), states.flatten(last), strict=True):
            fresh = leaf.detach().clone()
            for lane in range(case.lanes):
                if window.ends is not None and window.ends[lane]:
                    fresh.select(spec.dim, lane).zero_()
            leaves.append(fresh)
        state = states.unflatten(last, leaves)
        result = step(trainer, window)
        assert torch.equal(result.loss, loss.detach())
    for name, value in model.state_dict().items():
        assert torch.equal(trainer.model.state_dict()[name], value), name
    for found, expected in zip(states.flatten(trainer.state), leaves, strict=True):
        assert torch.equal(found, expected)


@FEW
@given(cases().filter(has_gradients))
def test_a_synthesizer_that_sends_zeros_changes_nothing(case):
    plain, silent = make(case), make(case, Blind(case), synthesizer_optimizer=None, synthetic_scale=0.5)
    silent.credit.step_optimizer.optimizer = None  # so that it says nothing in later windows too
    for window in case.windows:
        assert torch.equal(step(plain, window).loss, step(silent, window).loss)
    for name, value in plain.model.state_dict().items():
        assert torch.equal(silent.model.state_dict()[name], value), name


@FEW
@given(
    cases(3, 6).filter(has_gradients),
    st.integers(1, 5),
    st.sampled_from([{}, {"targets": "lambda", "replay_windows": 2}, {"target_network": 2}, {"fidelity_every": 1}]),
)
def test_saved_at_any_window_it_resumes_bit_identically(case, at, more):
    whole, first = (make(case, Blind(case), synthetic_scale=0.5, **more) for _ in range(2))
    losses = [step(whole, window).loss for window in case.windows]
    for window in case.windows[:at]:
        step(first, window)
    second = make(case, Blind(case), synthetic_scale=0.5, **more)
    second.load_state_dict(copy.deepcopy(first.state_dict()), case.lanes)
    rest = [step(second, window).loss for window in case.windows[at:]]
    assert all(torch.equal(a, b) for a, b in zip(rest, losses[at:], strict=True))
    assert_same(second.state_dict(), whole.state_dict())


@FEW
@given(cases(2, 6).filter(has_gradients), st.sets(st.integers(0, 5)), st.sampled_from([float("nan"), float("inf")]))
def test_bad_windows_are_as_if_they_had_not_been(case, bad, value):
    """At any places, for any state; those without ends, since ends are obeyed."""
    case = case._replace(windows=[window._replace(ends=None, mask=None) for window in case.windows])
    one, other = (make(case, Blind(case), synthetic_scale=0.5) for _ in range(2))
    loss_fn = one.runner.loss_fn
    for i, window in enumerate(case.windows):
        one.runner.loss_fn = (lambda outputs, targets: loss_fn(outputs, targets) * value) if i in bad else loss_fn
        result = step(one, window)
        assert bool(result.skipped) == (i in bad)
        if i not in bad:
            assert torch.equal(result.loss, step(other, window).loss)
    for name in ("model", "optimizer", "synthesizer", "synthesizer_optimizer", "state"):
        if other.steps or name != "state":
            assert_same(one.state_dict()[name], other.state_dict()[name])


@MANY
@given(nests(specs()), st.integers(1, 3), st.data())
def test_lanes_that_end_are_reset_and_no_others(nest, lanes, data):
    ends = torch.tensor(data.draw(st.lists(st.booleans(), min_size=lanes, max_size=lanes)))
    generator = torch.Generator().manual_seed(1)
    state = fill(nest, lambda spec: tensor(spec, lanes, generator=generator) + 1)
    initial = fill(nest, lambda spec: tensor(spec, lanes, generator=generator))
    for start in (initial, None):
        fresh = states.reset_lanes(state, ends, start, fill(nest, lambda spec: spec.dim))
        zeros = states.unflatten(state, [torch.zeros_like(leaf) for leaf in states.flatten(state)])
        rows = zip(
            leaves_of(nest), *(states.flatten(s) for s in (fresh, state, zeros if start is None else start)), strict=True
        )
        for spec, found, before, begin in rows:
            for lane in range(lanes):
                expected = begin if ends[lane] else before
                assert torch.equal(found.select(spec.dim, lane), expected.select(spec.dim, lane))


@MANY
@given(nests(specs()), st.integers(1, 3))
def test_a_nest_comes_back_from_its_leaves(nest, lanes):
    state = fill(nest, lambda spec: tensor(spec, lanes))
    again = states.unflatten(state, states.flatten(state))
    assert_same(again, state)
    assert str(again) == str(state)
    copies = states.clone(state)
    assert_same(copies, state)
    for one, two in zip(states.flatten(copies), states.flatten(state), strict=True):
        assert one.data_ptr() != two.data_ptr() or not one.numel()
    assert len(states.floating(state)) == sum(not spec.counter for spec in leaves_of(nest))
    doubled = states.map_floating(lambda leaf: leaf + 2, state)
    for spec, leaf in zip(leaves_of(nest), states.flatten(doubled), strict=True):
        assert (leaf == (0 if spec.counter else 2)).all()


@MANY
@given(
    st.integers(1, 4),
    st.integers(1, 4),
    st.sampled_from(["mean", "lane-mean", "sum"]),
    st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
    st.booleans(),
    st.data(),
)
def test_reductions_count_what_the_mask_says(steps, lanes, reduction, dtype, masked, data):
    """Whole numbers, so that sums are exact in every dtype; NaNs behind the mask count nothing."""
    numbers = data.draw(st.lists(st.integers(0, 7), min_size=steps * lanes, max_size=steps * lanes))
    marks = (
        data.draw(st.lists(st.booleans(), min_size=steps * lanes, max_size=steps * lanes))
        if masked
        else [True] * len(numbers)
    )
    losses = torch.tensor(numbers, dtype=dtype).view(steps, lanes)
    mask = torch.tensor(marks).view(steps, lanes)
    total = sum(number for number, mark in zip(numbers, marks, strict=True) if mark)
    expected = {"mean": total / max(1, sum(marks)), "lane-mean": total / lanes, "sum": total}[reduction]
    found = window_loss(losses.masked_fill(~mask, float("nan")) if masked else losses, mask if masked else None, reduction)
    assert found.dtype == dtype
    assert (
        torch.equal(found, torch.tensor(expected, dtype=torch.float64).to(dtype))
        or abs(float(found) - expected) < 0.02 * expected
    )


@FEW
@given(st.integers(1, 12), st.lists(st.integers(1, 5), min_size=1, max_size=6), st.integers(0, 7))
def test_a_lookahead_is_the_next_text(extra, lengths, steps):
    """For windows of any lengths: what follows the window, and zeros marked as such behind the end."""
    total = sum(lengths)
    text = torch.arange(1, total + 2)[:, None] * torch.tensor([[1, 100]])
    cut, at = [], 0
    for length in lengths:
        cut.append(dni.Window(text[at : at + length], text[at + 1 : at + length + 1]))
        at += length
    at = 0
    for window, length in zip(dni.with_lookahead(cut, steps), lengths, strict=True):
        at += length
        there = min(steps, total - at)
        ahead = window.lookahead
        assert torch.equal(ahead.inputs[:there], text[at : at + there])
        assert torch.equal(ahead.targets[:there], text[at + 1 : at + there + 1])
        assert ahead.valid[:there].all()
        assert not ahead.valid[there:].any()
        assert len(ahead.inputs) == steps
