"""LSTM and GRU as loops: PyTorch's numbers, and approximate traces held to slow versions in float64."""

from __future__ import annotations

import pytest
import torch

from dni_seq.core import states
from dni_seq.core.traces import Trace
from dni_seq.models.cells import APPROXIMATE
from dni_seq.models.dense_cells import DECAY, gru_step, lstm_step
from dni_seq.models.recurrent import build_rnn, state_cells
from tests import reference

LANES, INPUTS, UNITS = 2, 3, 8
STEP = {"lstm": lstm_step, "gru": gru_step}
EXACT = {"rtol": 1e-12, "atol": 1e-12}


def network(kind, traces, layers=1):
    torch.manual_seed(0)
    rnn = build_rnn(kind, INPUTS, UNITS, layers, traces=traces).double()
    with torch.no_grad():
        for parameter in rnn.parameters():
            parameter *= 2
    return rnn


def text(steps=6):
    return torch.randn(steps, LANES, INPUTS, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("kind", STEP)
@pytest.mark.parametrize("traces", APPROXIMATE)
@pytest.mark.parametrize("layers", [1, 2])
def test_the_loops_are_pytorchs_cells(kind, traces, layers):
    rnn = network(kind, traces, layers)
    found = []
    for mine in (True, False):
        inputs = text().requires_grad_()
        outputs, last = (rnn if mine else rnn.rnn)(inputs)
        hidden = last[: len(last) if not mine and kind == "lstm" else rnn._tensors] if mine or kind == "lstm" else [last]
        loss = (outputs**3).sum() + sum((leaf**2).sum() for leaf in hidden)
        found.append([outputs, *hidden, *torch.autograd.grad(loss, [inputs, *rnn.parameters()])])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, **EXACT)


@pytest.mark.parametrize("kind", STEP)
@pytest.mark.parametrize("cut", [[6], [1] * 6, [2, 1, 3]])
def test_snap1_is_the_dense_recursion_without_the_other_units(kind, cut):
    rnn = network(kind, "snap1")
    inputs, state, i = text(), rnn.initial_state(LANES), 0
    for length in cut:
        _, state = rnn(inputs[i : i + length], states.detach(state))
        i += length
    weights = [weight.detach() for weight in rnn.rnn.all_weights[0]]
    for lane in range(LANES):
        start = [torch.zeros(1, UNITS, dtype=torch.float64) for _ in range(rnn._tensors)]
        slow = reference.snap1(STEP[kind], inputs[:, lane], start, weights)
        for mine, expected in zip(state[rnn._tensors :], slow, strict=True):
            torch.testing.assert_close(mine.detach().as_subclass(torch.Tensor)[0, lane], expected.sum(0), **EXACT)


@pytest.mark.parametrize("kind", STEP)
def test_factored_traces_are_their_equations(kind):
    """ξ and ε by hand; a trace is contracted as the product of the two."""
    rnn = network(kind, "factored")
    inputs, state = text(), rnn.initial_state(LANES)
    _, state = rnn(inputs, state)
    weights = [weight.detach() for weight in rnn.rnn.all_weights[0]]
    tensors = rnn._tensors
    now = [torch.zeros(LANES, UNITS, dtype=torch.float64) for _ in range(tensors)]
    xi_x, xi_h = torch.zeros_like(inputs[0]), torch.zeros_like(now[0])
    eps = torch.zeros(tensors, 2, LANES, len(weights[0]), dtype=torch.float64)
    for x in inputs:
        step = STEP[kind](x, now, weights)
        xi_x, xi_h = DECAY * xi_x + x, DECAY * xi_h + now[0]
        moved = torch.zeros_like(eps)
        for s in range(tensors):
            for p, slopes in enumerate((step.of_inputs, step.of_hidden)):
                for g in range(eps.shape[-1]):
                    carried = sum(step.jacobian[s, o, :, g % UNITS] * eps[o, p, :, g] for o in range(tensors))
                    moved[s, p, :, g] = DECAY * carried + (1 - DECAY) * slopes[s, :, g]
        eps, now = moved, list(step.state)
    found = [leaf.detach().as_subclass(torch.Tensor)[0] for leaf in state[tensors:]]
    slopes = [eps[:, p].transpose(0, 1) for p in range(3 - tensors)]  # [B, S, G]; both matrices of an LSTM have the same
    torch.testing.assert_close(eps[:, 0] if kind == "lstm" else eps, eps[:, 1] if kind == "lstm" else eps, **EXACT)
    for mine, expected in zip(found, [xi_x, xi_h, found[2], *slopes], strict=True):
        torch.testing.assert_close(mine, expected, **EXACT)
    gradients = [torch.randn(LANES, UNITS, dtype=torch.float64) for _ in range(tensors)]
    expected = 0.0
    for s, gradient in enumerate(gradients):
        product = torch.einsum("bg,bd->bgd", eps[s, 1], xi_h)
        expected = expected + torch.einsum("bg,bgd->gd", gradient.repeat(1, len(weights[0]) // UNITS), product)
    contracted = rnn._rule.contract(gradients, [leaf[None] for leaf in found])
    torch.testing.assert_close(contracted[1], expected, **EXACT)
    assert [tuple(each.shape) for each in contracted] == [tuple(weight.shape) for weight in weights]


@pytest.mark.parametrize("kind", STEP)
@pytest.mark.parametrize("traces", APPROXIMATE)
@pytest.mark.parametrize("length", [1, 3])
def test_a_windows_gradient_is_its_own_and_what_arrives_times_the_trace(kind, traces, length):
    """By PyTorch's cell alone: its gradients, those at its first state, and the rule's contraction of the two."""
    rnn = network(kind, traces)
    inputs = text(7)
    _, state = rnn(inputs[:4])
    state = states.detach(state)
    window = inputs[4 : 4 + length].clone().requires_grad_()
    leaves = [leaf.detach().clone().requires_grad_() for leaf in state[: rnn._tensors]]
    outputs, last = rnn(window, (*leaves, *state[rnn._tensors :]))
    found = torch.autograd.grad((outputs**3).sum() + last[0].sum(), [window, *leaves, *rnn.parameters()])
    start = [leaf.detach().clone().requires_grad_() for leaf in leaves]
    outputs, last = rnn.rnn(window, tuple(start) if kind == "lstm" else start[0])
    loss = (outputs**3).sum() + (last[0] if kind == "lstm" else last).sum()
    own = torch.autograd.grad(loss, [window, *start, *rnn.rnn.parameters()])
    arrived = [gradient[0] for gradient in own[1 : 1 + rnn._tensors]]
    carried = [leaf.as_subclass(torch.Tensor) for leaf in state[rnn._tensors :]]
    older = rnn._rule.contract(arrived, carried)
    expected = [*own[: 1 + rnn._tensors], *(a + b for a, b in zip(own[1 + rnn._tensors :], older, strict=True))]
    for mine, other in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, other, **EXACT)
    assert any(gradient.abs().max() > 1e-3 for gradient in older)


@pytest.mark.parametrize("kind", STEP)
def test_snap1_is_nearer_to_full_bptt_than_truncation_is(kind):
    """The loss of the last step alone, over single steps: its whole credit comes from before the window."""
    rnn = network(kind, "snap1")
    weights = list(rnn.parameters())
    inputs = text(8)
    full = torch.autograd.grad(rnn.rnn(inputs)[0][-1].pow(2).sum(), weights)
    state = rnn.initial_state(LANES)
    for x in inputs:
        outputs, state = rnn(x[None], states.detach(state))
    found = torch.autograd.grad(outputs.pow(2).sum(), weights)
    plain = build_rnn(kind, INPUTS, UNITS, 1).double()
    plain.load_state_dict(rnn.rnn.state_dict())
    before = states.detach(plain(inputs[:-1])[1])
    truncated = torch.autograd.grad(plain(inputs[-1:], before)[0].pow(2).sum(), list(plain.parameters()))

    def error(gradient):
        return sum(float((a - b).square().sum()) for a, b in zip(gradient, full, strict=True))

    assert error(found) < 0.5 * error(truncated)


def test_states_are_pytorchs_and_traces_after_them():
    for kind, tensors in (("lstm", 2), ("gru", 1)):
        for traces in APPROXIMATE:
            rnn = network(kind, traces, 2)
            state = rnn.initial_state(LANES)
            assert [tuple(leaf.shape) for leaf in state[:tensors]] == [(2, LANES, UNITS)] * tensors
            assert all(isinstance(leaf, Trace) and leaf.shape[:2] == (1, LANES) for leaf in state[tensors:])
            cells = state_cells(rnn)
            assert cells is False if kind == "gru" else cells == (False, True, *[False] * (len(state) - 2))
            assert len(states.floating(state)) == tensors


def test_traces_are_made_for_their_cells():
    with pytest.raises(ValueError, match="snap1 traces are made for lstm and gru: lru is diagonal and has exact traces"):
        build_rnn("lru", 3, 4, 1, traces="snap1")
    with pytest.raises(ValueError, match="traces must be one of snap1, factored, got 'uoro'"):
        build_rnn("lstm", 3, 4, 1, traces="uoro")
