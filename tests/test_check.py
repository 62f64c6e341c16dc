"""check_model: right models pass, each wrong one is found and named, and everything is left as it was."""

from __future__ import annotations

import copy
import dataclasses
import doctest
import random
import re

import pytest
import torch
from torch import nn

import dni_seq as dni
from dni_seq import check
from dni_seq.model_checks.probe import Run, set_to_eval, tolerance
from dni_seq.models.language_model import LanguageModel
from dni_seq.models.vector_rnn import VectorRNN
from tests import problems

STEPS, LANES, SIZE, UNITS = 6, 4, 3, 5


def vectors(steps=STEPS, lanes=LANES, size=SIZE):
    return torch.randn(steps, lanes, size, generator=torch.Generator().manual_seed(0))


def tokens(steps=STEPS, lanes=LANES, vocabulary=20):
    return torch.randint(vocabulary, (steps, lanes), generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


class Clocked(nn.Module):
    """A user's cell: the state is a dict of a tuple, lanes along dimension 0 and 1, and an integer clock."""

    def __init__(self):
        super().__init__()
        self.fast = nn.LSTM(SIZE, UNITS)
        self.slow = nn.Linear(2 * UNITS, UNITS)
        self.readout = nn.Linear(UNITS, 2)

    def initial_state(self, lanes):
        zeros = torch.zeros(1, lanes, UNITS)
        return {"fast": (zeros, zeros), "slow": torch.zeros(lanes, UNITS), "clock": torch.zeros(lanes, dtype=torch.int64)}

    def forward(self, inputs, state):
        hidden, fast = self.fast(inputs, state["fast"])
        slow, outputs = state["slow"], []
        for h in hidden:
            slow = self.slow(torch.cat([h, slow], dim=-1)).tanh()
            outputs.append(self.readout(slow))
        return torch.stack(outputs), {"fast": fast, "slow": slow, "clock": state["clock"] + len(inputs)}


RIGHT = {
    "LSTM": (lambda: nn.LSTM(SIZE, UNITS), vectors, 1),
    "two-layer GRU": (lambda: nn.GRU(SIZE, UNITS, 2), vectors, 1),
    "float64": (lambda: nn.LSTM(SIZE, UNITS).double(), lambda: vectors().double(), 1),
    "bfloat16": (lambda: nn.GRU(SIZE, UNITS).bfloat16(), lambda: vectors().bfloat16(), 1),
    "as many steps as lanes and units": (lambda: nn.LSTM(SIZE, 4), lambda: vectors(4), 1),
    "long window": (lambda: nn.RNN(SIZE, UNITS), lambda: vectors(300), 1),
    "dict state": (Clocked, vectors, {"fast": (1, 1), "slow": 0, "clock": 0}),
    "language model": (lambda: LanguageModel(20, embed=6, hidden=8), tokens, 1),
    "sparse embedding": (lambda: LanguageModel(20, embed=6, hidden=8, cell="gru", sparse_embedding=True), tokens, 1),
    "vector RNN": (lambda: VectorRNN(SIZE, 2, hidden=8), vectors, 1),
    "odd nest, as many lanes as units": (problems.OddNest, lambda: tokens(lanes=3, vocabulary=problems.VOCABULARY), 0),
}


@pytest.mark.parametrize("name", RIGHT)
def test_right_models_pass(name):
    make, inputs, state_batch_dim = RIGHT[name]
    report = dni.check_model(make(), inputs(), strict=True)
    assert report.ok
    assert [c.name for c in report.checks] == list(check.NAMES)
    assert not [c for c in report.checks if c.verdict == "skipped"]
    assert report.state_batch_dim == state_batch_dim
    assert {c.name for c in report.checks if c.verdict == "note"} <= {"state"}


def test_the_report_is_short_text_and_data():
    report = dni.check_model(Clocked(), vectors())
    lines = str(report).splitlines()
    assert lines[0] == "Clocked, T=6, B=4: no problem found"
    assert len(lines) == 1 + len(check.NAMES)
    assert repr(report) == str(report)
    fast, _, slow, clock = report.leaves
    assert (fast.path, fast.shape, fast.dtype, fast.floating, fast.lane_dim) == (
        "state['fast'][0]",
        (1, LANES, UNITS),
        torch.float32,
        True,
        1,
    )
    assert (slow.path, slow.lane_dim) == ("state['slow']", 0)
    assert (clock.path, clock.floating, clock.dtype) == ("state['clock']", False, torch.int64)
    assert "state['clock'] (int64 [4]) is not floating-point" in report["state"].text
    with pytest.raises(dataclasses.FrozenInstanceError):
        report.title = "other"
    with pytest.raises(KeyError, match="choose from contract, outputs"):
        report["gradients"]


def test_lanes_are_found_among_many_dimensions_of_the_same_size():
    class Stack(nn.Module):
        """Ten linear layers that carry their outputs, each [units, B] with as many units as lanes."""

        def __init__(self):
            super().__init__()
            self.weights = nn.ParameterList(torch.randn(LANES, LANES) / 2 for _ in range(10))

        def initial_state(self, lanes):
            return [torch.zeros(LANES, lanes) for _ in self.weights]

        def forward(self, inputs, state):
            outputs = []
            for x in inputs:
                state = [(weight @ leaf + x.T.mean(dim=0)).tanh() for weight, leaf in zip(self.weights, state, strict=True)]
                outputs.append(sum(state).T)
            return torch.stack(outputs), state

    assert dni.check_model(Stack(), vectors(), strict=True).state_batch_dim == 1


def test_the_trainer_accepts_the_state_batch_dim_that_is_found():
    model = Clocked()
    report = dni.check_model(model, vectors())
    trainer = dni.SequenceTrainer(
        model,
        torch.optim.SGD(model.parameters(), 0.1),
        lambda outputs, targets: (outputs - targets).square().mean(),
        state_batch_dim=report.state_batch_dim,
    )
    ends = torch.tensor([False, True, False, False])
    trainer.step(vectors(), torch.zeros(STEPS, LANES, 2), ends=ends)
    assert trainer.state["clock"].tolist() == [STEPS, 0, STEPS, STEPS]
    assert trainer.state["fast"][0].abs().sum(dim=(0, 2)).ne(0).tolist() == [True, False, True, True]


def test_a_given_state_and_another_batch_dim():
    class NoDefault(nn.GRU):
        def forward(self, inputs, state):
            if state is None:
                raise TypeError("a state is needed")
            return super().forward(inputs.movedim(2, 1), state)

    inputs = vectors().movedim(1, 2)  # [T, size, B]
    model = NoDefault(SIZE, UNITS)
    assert dni.check_model(model, inputs, torch.zeros(1, LANES, UNITS), batch_dim=2, strict=True).state_batch_dim == 1
    refused = dni.check_model(model, inputs, batch_dim=2)["contract"]
    assert refused.text == (
        "model(inputs, state) raised TypeError: a state is needed; give it initial_state(lanes), or pass its first state to "
        "check_model"
    )


def test_inputs_may_be_a_nest():
    class TwoInputs(nn.GRU):
        def forward(self, inputs, state=None):
            return super().forward(inputs["x"] + inputs["y"], state)

    assert dni.check_model(TwoInputs(SIZE, UNITS), {"x": vectors(), "y": vectors()}, strict=True).ok


class Base(nn.Module):
    """An LSTM cell in plain operations with the state (h, c), each [B, units]; wrong models override one of its methods."""

    def __init__(self):
        super().__init__()
        self.cell = nn.LSTMCell(SIZE, UNITS)
        self.readout = nn.Linear(UNITS, 2)

    def initial_state(self, lanes):
        return (torch.zeros(lanes, UNITS), torch.zeros(lanes, UNITS))

    def before(self, inputs, state):
        return inputs, state

    def each_step(self, x, state):
        return x, state

    def after(self, outputs, state):
        return outputs, state

    def forward(self, inputs, state):
        inputs, state = self.before(inputs, state)
        outputs = []
        for x in inputs:
            state = self.cell(*self.each_step(x, state))
            outputs.append(self.readout(state[0]))
        return self.after(torch.stack(outputs), state)


class DetachedState(Base):
    def after(self, outputs, state):
        return outputs, (state[0].detach(), state[1].detach())


class DetachedLeaf(Base):
    def after(self, outputs, state):
        return outputs, (state[0], state[1].detach())


class DetachedInside(Base):
    def each_step(self, x, state):
        return x, (state[0], state[1].detach())


class Double(torch.autograd.Function):
    """Doubles a tensor; its backward returns no gradient."""

    @staticmethod
    def forward(ctx, x):
        return 2 * x

    @staticmethod
    def backward(ctx, gradient):
        return None


class DroppedByKernel(Base):
    def each_step(self, x, state):
        return x, (Double.apply(state[0]), state[1])


class DroppedByKernels(Base):
    def each_step(self, x, state):
        return x, (Double.apply(state[0]), Double.apply(state[1]))


class IgnoredState(Base):
    def before(self, inputs, state):
        return inputs, self.initial_state(inputs.shape[1])


class IgnoredLeaf(Base):
    def before(self, inputs, state):
        return inputs, (state[0], torch.zeros_like(state[1]))


class UnusedState(nn.Module):
    """Passes the state on, untouched."""

    def __init__(self):
        super().__init__()
        self.readout = nn.Linear(SIZE, 2)

    def initial_state(self, lanes):
        return torch.zeros(lanes, UNITS)

    def forward(self, inputs, state):
        return self.readout(inputs), state


class LayerDropped(Base):
    def initial_state(self, lanes):
        return tuple(zeros[None] for zeros in super().initial_state(lanes))

    def before(self, inputs, state):
        return inputs, tuple(leaf.reshape(-1, UNITS) for leaf in state)


class GrowingState(nn.Module):
    """Keeps all steps so far."""

    def __init__(self):
        super().__init__()
        self.readout = nn.Linear(SIZE, 2)

    def forward(self, inputs, state=None):
        state = inputs if state is None else torch.cat([state, inputs])
        return self.readout(state)[-len(inputs) :], state


class OtherDtype(Base):
    def before(self, inputs, state):
        return inputs, (state[0].float(), state[1].float())

    def after(self, outputs, state):
        return outputs, (state[0], state[1].double())


class ListBack(Base):
    def before(self, inputs, state):
        return inputs, tuple(state)

    def after(self, outputs, state):
        return outputs, list(state)


class ComplexState(nn.Module):
    def __init__(self):
        super().__init__()
        self.angle = nn.Parameter(torch.randn(UNITS))
        self.encode = nn.Linear(SIZE, UNITS)

    def initial_state(self, lanes):
        return torch.zeros(lanes, UNITS, dtype=torch.complex64)

    def forward(self, inputs, state):
        outputs = []
        for x in self.encode(inputs):
            state = 0.9 * state * torch.polar(torch.ones_like(self.angle), self.angle) + x
            outputs.append(state.real)
        return torch.stack(outputs), state


class LastOutputOnly(Base):
    def after(self, outputs, state):
        return outputs[-1], state


class OneStepLess(Base):
    def after(self, outputs, state):
        return outputs[1:], state


class BatchMajorOutputs(Base):
    def after(self, outputs, state):
        return outputs.transpose(0, 1), state


class FlatOutputs(Base):
    def after(self, outputs, state):
        return outputs.flatten(0, 1), state


class OutputsOnly(Base):
    def after(self, outputs, state):
        return outputs


class ThreeResults(Base):
    def after(self, outputs, state):
        return outputs, *state


class DetachedOutputs(Base):
    def after(self, outputs, state):
        return outputs.detach(), state


class NaNOutputs(Base):
    def after(self, outputs, state):
        return outputs / 0 * 0, state


class NaNGradient(Base):
    """The square root of a negative number is selected away, but its gradient is not."""

    def each_step(self, x, state):
        h, c = state
        return x, (torch.where(h > 0, h.sqrt(), h), c)


class NoiseInEval(Base):
    def before(self, inputs, state):
        return nn.functional.dropout(inputs, 0.5), state


class PythonRandom(Base):
    def before(self, inputs, state):
        return inputs * random.random(), state


class HiddenAttribute(Base):
    """Keeps its last outputs in an attribute."""

    kept = 0.0

    def after(self, outputs, state):
        outputs = outputs + self.kept
        self.kept = outputs[-1].detach()
        return outputs, state


class WholeWindow(Base):
    def before(self, inputs, state):
        return inputs - inputs.mean(dim=0), state


class NoStatistics(Base):
    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(SIZE, track_running_stats=False)

    def before(self, inputs, state):
        return self.norm(inputs.flatten(0, 1)).view_as(inputs), state


class UnusedParameter(Base):
    def __init__(self):
        super().__init__()
        self.extra = nn.Linear(2, 2)


class ZeroGradient(Base):
    def __init__(self):
        super().__init__()
        self.offset = nn.Parameter(torch.ones(2))

    def after(self, outputs, state):
        return outputs + 0 * self.offset, state


class NoFloats(nn.Module):
    """The state is a counter."""

    def __init__(self):
        super().__init__()
        self.readout = nn.Linear(SIZE, 2)

    def initial_state(self, lanes):
        return torch.zeros(lanes, dtype=torch.int64)

    def forward(self, inputs, state):
        return self.readout(inputs) + state[:, None], state + len(inputs)


class SharedState(Base):
    """One state for all lanes."""

    def initial_state(self, lanes):
        return (torch.zeros(1, UNITS), torch.zeros(1, UNITS))

    def before(self, inputs, state):
        return inputs, tuple(leaf.expand(inputs.shape[1], UNITS).contiguous() for leaf in state)

    def after(self, outputs, state):
        return outputs, tuple(leaf.mean(dim=0, keepdim=True) for leaf in state)


class FixedLanes(Base):
    def after(self, outputs, state):
        return outputs, tuple(leaf.reshape(LANES, UNITS) for leaf in state)


class ObjectState(Base):
    class Box:
        def __init__(self, h, c):
            self.h, self.c = h, c

    def initial_state(self, lanes):
        return (torch.zeros(lanes, UNITS), self.Box(*super().initial_state(lanes)))

    def before(self, inputs, state):
        return inputs, (state[0], state[1].c)

    def after(self, outputs, state):
        return outputs, (state[0], self.Box(*state))


class FixedBuffer(Base):
    """Fails for another number of steps."""

    def before(self, inputs, state):
        return inputs + torch.zeros(40, 1, 1), state


WRONG = {
    "detached state": (DetachedState, "state gradient", "^the last state has no graph"),
    "detached leaf": (DetachedLeaf, "state gradient", r"^state\[1\] of the last state has no graph"),
    "detached inside": (
        DetachedInside,
        "state gradient",
        r"^the last state depends on state\[1\] of the first[^;]* no gradient[^;]*$",
    ),
    "kernel without gradient": (
        DroppedByKernel,
        "state gradient",
        r"depends on state\[0\] of the first .* no gradient reaches",
    ),
    "kernels without gradient": (
        DroppedByKernels,
        "state gradient",
        r"^state\[0\], state\[1\] of the last state depends on the first state, but no gradient flows back: [^;]*$",
    ),
    "state ignored": (IgnoredState, "state gradient", r"^the model ignores state\[0\], state\[1\] of the first state"),
    "state ignored, halves": (IgnoredState, "halves", r"differ \(in outputs, by .* % of its largest value\)"),
    "leaf ignored": (IgnoredLeaf, "state gradient", r"^the model ignores state\[1\] of the first state"),
    "state unused": (UnusedState, "state gradient", "^the outputs do not depend on the first state"),
    "state without its layer": (
        LayerDropped,
        "state",
        r"^state\[0\] is float32 \[1, 4, 5\] in the first state and float32 \[4, 5\]",
    ),
    "growing state": (
        GrowingState,
        "state",
        r"^state is float32 \[6, 4, 3\] in the first state and float32 \[12, 4, 3\] in the last",
    ),
    "other dtype": (OtherDtype, "state", r"^state\[1\] is float32 \[4, 5\] in the first state and float64"),
    "list for a tuple": (ListBack, "state", r"^the first state is \(float32 .*, the last \[float32"),
    "complex state": (ComplexState, "state", "^state is complex, .* use torch.view_as_real"),
    "state without floats": (NoFloats, "state", "no floating-point tensor"),
    "object in the state": (ObjectState, "state", r"^state\[1\] is a Box: use tensors in tuples, lists and dicts"),
    "time dropped": (LastOutputOnly, "outputs", "shape .4, 2. for .*the time dimension is missing"),
    "one step less": (OneStepLess, "outputs", "shape .5, 4, 2. for .*return one output for each of the T steps"),
    "batch-major outputs": (BatchMajorOutputs, "outputs", "they are batch-major"),
    "flat outputs": (FlatOutputs, "outputs", "time and lanes are flattened"),
    "no state returned": (OutputsOnly, "contract", "returned a Tensor: return the pair"),
    "three results": (ThreeResults, "contract", "returned a tuple of 3: return the pair"),
    "detached outputs": (DetachedOutputs, "parameter gradient", "^the outputs have no graph"),
    "NaN": (NaNOutputs, "finite values", r"NaN or infinity in the outputs \(nan at index \[0, 0, 0\] of shape \[6, 4, 2\]"),
    "NaN in the gradient": (NaNGradient, "state gradient", "is not finite"),
    "random in eval mode": (NoiseInEval, "randomness", "^the model is random in eval mode .*`if self.training`"),
    "Python's random numbers": (
        PythonRandom,
        "randomness",
        "^two runs from the same random state differ .*torch's random numbers",
    ),
    "state in an attribute": (HiddenAttribute, "randomness", "keep nothing between calls"),
    "looks over the window": (WholeWindow, "halves", r"^a window of 6 steps and two of 3 and 3 .* differ \("),
    "norm without statistics": (NoStatistics, "halves", "'norm': batch normalisation without running statistics"),
    "unused parameter": (UnusedParameter, "parameter gradient", "^no gradient reaches extra.weight, extra.bias: use it"),
    "zero gradient": (ZeroGradient, "parameter gradient", "^the gradient is zero at offset"),
    "one state for all lanes": (SharedState, "lanes", r"^no dimension has the size of the B=4 lanes in state\[0\] \[1, 5\]"),
    "fixed number of lanes": (FixedLanes, "lanes", "^with B=3 lanes instead of 4: .*RuntimeError"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_models_are_found_and_named(name):
    make, which, text = WRONG[name]
    report = dni.check_model(make(), vectors())
    assert report[which].verdict == "problem"
    assert re.search(text, report[which].text), report
    assert "\n" not in report[which].text
    with pytest.raises(ValueError, match=f"^{report.problems[0].name}: "):
        dni.check_model(make(), vectors(), strict=True)


ALONE = {
    "detached state",
    "detached leaf",
    "detached inside",
    "kernel without gradient",
    "other dtype",
    "time dropped",
    "batch-major outputs",
    "detached outputs",
    "NaN",
    "random in eval mode",
    "state in an attribute",
    "unused parameter",
    "zero gradient",
    "state unused",
    "fixed number of lanes",
    "looks over the window",
}
"""Mistakes that have one consequence."""


@pytest.mark.parametrize("name", sorted(ALONE))
def test_one_mistake_is_one_problem(name):
    make, which, _ = WRONG[name]
    report = dni.check_model(make(), vectors())
    assert [c.name for c in report.problems] == [which], report


@pytest.mark.parametrize("steps", [LANES, STEPS])
def test_batch_first_is_found_and_named(steps):
    class Inside(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn = nn.GRU(SIZE, UNITS, batch_first=True)

        def forward(self, inputs, state=None):
            return self.rnn(inputs, state)

    report = dni.check_model(Inside(), vectors(steps))
    assert not report.ok
    assert "'rnn': batch_first=True, but windows are time-major" in report.problems[0].text


def test_batch_major_outputs_are_found_with_as_many_steps_as_lanes():
    report = dni.check_model(BatchMajorOutputs(), vectors(LANES))
    assert "they are batch-major" in report["outputs"].text


def test_the_first_nan_is_named():
    inputs = vectors()
    inputs[2, 1, 0] = float("nan")
    text = dni.check_model(Base(), inputs)["finite values"].text
    assert text == "NaN or infinity in inputs (nan at index [2, 1, 0] of shape [6, 4, 3]): pass finite ones"
    assert dni.check_model(NaNOutputs(), vectors())["finite values"].text.endswith("of shape [6, 4, 2])")


def test_a_model_that_fails_is_a_problem_with_its_cause():
    report = dni.check_model(FixedBuffer(), vectors(40))
    assert report.problems[0].name == "outputs"
    assert report["outputs"].text.startswith("with T=16 steps instead of 40, model(inputs, state) raised RuntimeError: ")
    assert report["lanes"].verdict == "skipped"
    broken = Base()
    broken.initial_state = lambda lanes: 1 / 0
    with pytest.raises(ValueError, match=r"^contract: model.initial_state\(4\) raised ZeroDivisionError") as caught:
        dni.check_model(broken, vectors(), strict=True)
    assert isinstance(caught.value.__cause__, ZeroDivisionError)


class Writes(Base):
    def before(self, inputs, state):
        return inputs.clamp_(-1, 1), (state[0].clamp_(-1, 1), state[1])


def test_writes_in_place_are_said_and_no_problem():
    inputs = vectors()
    report = dni.check_model(Writes(), inputs)
    assert report.ok
    assert report["in place"].verdict == "note"
    assert "writes into its inputs in place" in report["in place"].text
    assert "writes into state[0] in place" in report["in place"].text
    assert torch.equal(inputs, vectors())
    assert dni.check_model(Base(), vectors())["in place"].verdict == "ok"


class Normed(Base):
    """Batch norm over time, batch norm within a step, and dropout."""

    def __init__(self):
        super().__init__()
        self.over_time = nn.BatchNorm1d(SIZE)
        self.within_step = nn.BatchNorm1d(2)
        self.dropout = nn.Dropout(0.5)

    def before(self, inputs, state):
        return self.dropout(self.over_time(inputs.flatten(0, 1)).view_as(inputs)), state

    def after(self, outputs, state):
        return torch.stack([self.within_step(output) for output in outputs]), state


def test_dropout_and_batch_norm_over_time_are_said():
    report = dni.check_model(Normed(), vectors())
    assert report.ok
    assert "the model is random in train mode (dropout)" in report["mode"].text
    assert "'over_time' (BatchNorm1d) normalises over the steps" in report["mode"].text
    assert "within_step" not in report["mode"].text
    in_eval = dni.check_model(Normed().eval(), vectors())
    assert (in_eval["mode"].verdict, in_eval["mode"].text) == ("ok", "the model is in eval mode")


def test_lanes_that_influence_each_other_are_said():
    class Mixed(Base):
        def each_step(self, x, state):
            return x, (state[0] - state[0].mean(dim=0), state[1])

    report = dni.check_model(Mixed(), vectors())
    assert report.ok
    assert "depends on the other lanes" in report["lanes"].text
    assert report.state_batch_dim == 0


def test_leaves_that_are_no_tensor_or_have_no_lanes_are_said():
    class Counts(Base):
        def initial_state(self, lanes):
            return {"cell": super().initial_state(lanes), "steps": torch.tensor(0), "epoch": 1, "none": None}

        def forward(self, inputs, state):
            outputs, cell = super().forward(inputs, state["cell"])
            return outputs, {**state, "cell": cell, "steps": state["steps"] + len(inputs)}

    report = dni.check_model(Counts(), vectors())
    assert report.ok
    assert "state['steps'] (int64 []) is not floating-point" in report["state"].text
    assert "state['epoch'] is 1, not a tensor" in report["state"].text
    assert "state['steps'] has no lanes, so ends= cannot reset it" in report["lanes"].text
    assert report.state_batch_dim == 0


def test_a_state_that_the_window_forgets_is_no_problem():
    class Delay(nn.Module):
        """A causal convolution of two steps, whose state is the last input."""

        def __init__(self):
            super().__init__()
            self.embed, self.mix = nn.Linear(SIZE, UNITS), nn.Linear(2 * UNITS, 2)

        def initial_state(self, lanes):
            return torch.zeros(lanes, UNITS)

        def forward(self, inputs, state):
            embedded = self.embed(inputs)
            before = torch.cat([state[None], embedded[:-1]])
            return self.mix(torch.cat([before, embedded], dim=-1)), embedded[-1]

    report = dni.check_model(Delay(), vectors())
    assert report.ok
    assert "does not depend on state of the first state: credit ends" in report["state gradient"].text


def test_a_hard_gate_is_a_note():
    class Gated(nn.Module):
        """The sign of one leaf chooses what is added to the other."""

        def __init__(self):
            super().__init__()
            self.encode = nn.Linear(SIZE, UNITS)

        def initial_state(self, lanes):
            return (torch.zeros(lanes, UNITS), torch.zeros(lanes, UNITS))

        def forward(self, inputs, state):
            (one, other), outputs = state, []
            for x in self.encode(inputs):
                one = 0.9 * one + x
                other = 0.9 * other + (one > 0) * x
                outputs.append(one + other)
            return torch.stack(outputs), (one, other)

    report = dni.check_model(Gated(), vectors())
    assert report.ok
    assert report["state gradient"].text == (
        "no gradient flows from state[1] of the last state to state[0] of the first, although its value depends on it"
    )


def test_parameters_that_only_the_state_needs_are_said():
    class Memory(Base):
        """Collects its inputs in a leaf that the outputs do not read."""

        def __init__(self):
            super().__init__()
            self.collect = nn.Linear(SIZE, UNITS, bias=False)

        def initial_state(self, lanes):
            return (*super().initial_state(lanes), torch.zeros(lanes, UNITS))

        def forward(self, inputs, state):
            *cell, memory = state
            outputs, cell = super().forward(inputs, tuple(cell))
            for x in inputs:
                memory = 0.9 * memory + self.collect(x)
            return outputs, (*cell, memory)

    report = dni.check_model(Memory(), vectors())
    assert report.ok
    assert report["parameter gradient"].text == (
        "collect.weight gets a gradient from the last state only, none from the outputs"
    )


def test_outputs_may_be_a_nest():
    class TwoOutputs(Base):
        def after(self, outputs, state):
            return {"both": (outputs, outputs.sum(dim=-1)), "size": 3}, state

    class WholeWindowInOne(Base):
        def after(self, outputs, state):
            return (outputs, outputs - outputs.mean(dim=0)), state

    report = dni.check_model(TwoOutputs(), vectors())
    assert report.ok
    assert report["outputs"].text.startswith("outputs are {'both': (float32 [6, 4, 2], float32 [6, 4]), 'size': 3}")
    assert "in outputs[1], by " in dni.check_model(WholeWindowInOne(), vectors())["halves"].text


def test_a_dict_in_another_order_is_said():
    class Reordered(Base):
        def initial_state(self, lanes):
            return dict(zip("hc", super().initial_state(lanes), strict=True))

        def before(self, inputs, state):
            return inputs, (state["h"], state["c"])

        def after(self, outputs, state):
            return outputs, {"c": state[1], "h": state[0]}

    report = dni.check_model(Reordered(), vectors())
    assert report.ok
    assert not [c for c in report.checks if c.verdict == "skipped"]
    assert "keys of its dicts come in another order" in report["state"].text
    assert report["halves"].verdict == report["state gradient"].verdict == "ok"
    assert [leaf.path for leaf in report.leaves] == ["state['h']", "state['c']"]


class Untidy(Normed):
    """Changes whatever it can reach: buffers, attributes, gradients, random numbers, its inputs and its state."""

    calls = 0

    def forward(self, inputs, state):
        self.calls += 1
        self.last_inputs = inputs
        random.random()
        if self.calls == self.fails_at:
            raise ZeroDivisionError
        inputs.mul_(0.5)
        state[0].mul_(0.5)
        outputs, state = super().forward(inputs, state)
        if torch.is_grad_enabled():
            outputs.sum().backward(retain_graph=True)
        return outputs, state

    fails_at = 0


@pytest.mark.parametrize("fails_at", [0, 1, 5, 12])
def test_everything_is_left_as_it_was(fails_at):
    model = Untidy()
    model.fails_at = fails_at
    model.dropout.eval()
    model.cell.weight_ih.grad = torch.ones_like(model.cell.weight_ih)
    inputs, state = vectors(), model.initial_state(LANES)

    def everything():
        return {
            "tensors": copy.deepcopy(model.state_dict()),
            "objects": [id(tensor) for tensor in (*model.parameters(), *model.buffers())],
            "gradients": [None if p.grad is None else p.grad.clone() for p in model.parameters()],
            "modes": [part.training for part in model.modules()],
            "attributes": sorted(vars(model)),
            "calls": model.calls,
            "random": (torch.get_rng_state(), random.getstate()),
            "arguments": (inputs.clone(), [leaf.clone() for leaf in state]),
        }

    before = everything()
    dni.check_model(model, inputs, state)
    after = everything()
    assert before.keys() == after.keys()
    for name in ("objects", "modes", "attributes", "calls"):
        assert after[name] == before[name]
    assert after["random"][1] == before["random"][1]
    for name in ("tensors", "gradients", "arguments"):
        torch.testing.assert_close(after[name], before[name], rtol=0, atol=0)
    assert torch.equal(after["random"][0], before["random"][0])


def test_recurrent_dropout_is_left_as_it_was():
    model = LanguageModel(20, embed=6, hidden=8, dropout=0.4)
    report = dni.check_model(model, tokens())
    assert report.ok
    assert report["mode"].verdict == "note"
    assert model.rnn.dropout == 0.4
    assert model.rnn.training


def test_eval_mode_keeps_what_cudnn_needs():
    """cuDNN computes gradients of recurrent layers in train mode only."""
    model = LanguageModel(20, embed=6, hidden=8, dropout=0.4)
    set_to_eval(model)
    assert (model.training, model.dropout.training) == (False, False)
    assert (model.rnn.training, model.rnn.dropout) == (True, 0.0)


def test_tolerance_is_that_of_the_least_precise_dtype():
    device, found = torch.device("cpu"), Run(torch.zeros(2), (torch.zeros(2), torch.zeros(2, dtype=torch.int64)))
    single = tolerance(found, device)
    assert 1e-6 < single < 1e-4
    assert tolerance(Run(found.outputs.double(), found.outputs.double()), device) < 1e-8
    assert tolerance(Run(found.outputs, found.outputs.bfloat16()), device) > 1e-2
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert tolerance(found, device) > 1e-2


def test_it_runs_under_no_grad_and_autocast():
    with torch.no_grad():
        assert dni.check_model(Base(), vectors(), strict=True).ok
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert dni.check_model(Base(), vectors())["halves"].verdict == "ok"


BAD_INPUTS = {
    "one step": (vectors(1), {}, "at least 2 steps and 2 lanes, got T=1 and B=4"),
    "one lane": (vectors(lanes=1), {}, "at least 2 steps and 2 lanes, got T=6 and B=1"),
    "no lanes": (torch.zeros(6), {}, "no dimension batch_dim=1"),
    "time is no lane": (vectors(), {"batch_dim": 0}, "batch_dim must be 1 or more"),
    "a list of numbers": ([1.0, 2.0], {}, "got a float"),
    "other sizes": ((vectors(6), vectors(5)), {}, r"same T and B, got \[\(5, 4\), \(6, 4\)\]"),
}


@pytest.mark.parametrize("name", BAD_INPUTS)
def test_bad_inputs_are_refused(name):
    inputs, more, text = BAD_INPUTS[name]
    with pytest.raises(ValueError, match=text):
        dni.check_model(Base(), inputs, **more)


def test_inference_mode_and_lazy_parameters_are_refused():
    with torch.inference_mode(), pytest.raises(ValueError, match=r"outside of torch\.inference_mode"):
        dni.check_model(Base(), vectors())
    with pytest.raises(ValueError, match="run it once before"):
        dni.check_model(nn.LazyLinear(3), vectors())


def test_the_example_in_the_docstring_runs():
    found = doctest.DocTestFinder().find(check.check_model, "check_model", globs={"torch": torch, "dni_seq": dni})
    runner = doctest.DocTestRunner()
    assert [runner.run(each).failed for each in found] == [0]
    assert runner.tries > 2
