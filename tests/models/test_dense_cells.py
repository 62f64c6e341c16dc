"""LSTM and GRU as loops: PyTorch's numbers, and approximate traces held to slow versions in float64."""

from __future__ import annotations

import pytest
import torch

from dni_seq.core import states
from dni_seq.core.traces import Trace
from dni_seq.models.cells import APPROXIMATE
from dni_seq.models.dense_cells import Factored, gru_step, lstm_step
from dni_seq.models.factored_lstm import FactoredLSTM, unpack
from dni_seq.models.recurrent import build_rnn, state_cells
from tests import reference

LANES, INPUTS, UNITS = 2, 3, 8
STEP = {"lstm": lstm_step, "gru": gru_step}
EXACT = {"rtol": 1e-12, "atol": 1e-12}


def network(kind, traces, layers=1, decay=None):
    torch.manual_seed(0)
    rnn = build_rnn(kind, INPUTS, UNITS, layers, traces=traces, trace_decay=decay).double()
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


def test_factored_traces_of_a_gru_are_their_equations():
    """ξ and ε by hand; a trace is contracted as the product of the two."""
    rnn = network("gru", "factored", decay=0.7)
    inputs = text()
    _, state = rnn(inputs, rnn.initial_state(LANES))
    weights = [weight.detach() for weight in rnn.rnn.all_weights[0]]
    now = torch.zeros(LANES, UNITS, dtype=torch.float64)
    xi_x, xi_h, xi_one = torch.zeros_like(inputs[0]), torch.zeros_like(now), 0.0
    eps = torch.zeros(2, LANES, len(weights[0]), dtype=torch.float64)
    for x in inputs:
        step = gru_step(x, (now,), weights)
        xi_x, xi_h, xi_one = 0.7 * xi_x + x, 0.7 * xi_h + now, 0.7 * xi_one + 1
        moved = torch.zeros_like(eps)
        for p, slopes in enumerate((step.of_inputs, step.of_hidden)):
            for g in range(eps.shape[-1]):
                moved[p, :, g] = 0.7 * step.jacobian[0, 0, :, g % UNITS] * eps[p, :, g] + 0.3 * slopes[0, :, g]
        eps, (now,) = moved, step.state
    found = [leaf.detach().as_subclass(torch.Tensor)[0] for leaf in state[1:]]
    expected = [xi_x, xi_h, torch.full_like(now[:, :1], xi_one), *(each[:, None] for each in eps)]
    for mine, other in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, other, **EXACT)
    gradient = torch.randn(LANES, UNITS, dtype=torch.float64)
    rows = [gradient.repeat(1, 3) * each for each in eps]
    by_hand = [torch.einsum("bg,bd->gd", row, xi) for row, xi in zip(rows, (xi_x, xi_h), strict=True)]
    by_hand += [xi_one * row.sum(0) for row in rows]
    for mine, other in zip(Factored.contract([gradient], [leaf[None] for leaf in found]), by_hand, strict=True):
        torch.testing.assert_close(mine, other, **EXACT)


@pytest.mark.parametrize("decay", [0.0, 0.7])
def test_factored_traces_of_an_lstm_are_their_equations(decay):
    """The slopes of one step by autograd, the running means by hand."""
    rnn = network("lstm", "factored", decay=decay)
    inputs = text()
    _, state = rnn(inputs, rnn.initial_state(LANES))
    found = unpack(state[2].detach().as_subclass(torch.Tensor)[0], UNITS)
    h, c = (torch.zeros(LANES, UNITS, dtype=torch.float64) for _ in range(2))
    xi_x, xi_h, xi_one = torch.zeros_like(inputs[0]), torch.zeros_like(h), 0.0
    eps = torch.zeros(LANES, 3, UNITS, dtype=torch.float64)
    for x in inputs:
        forget, of_cell, of_output, through = lstm_slopes(x, h, c, rnn.rnn.all_weights[0])
        xi_x, xi_h, xi_one = decay * xi_x + x, decay * xi_h + h, decay * xi_one + 1
        eps = decay * forget[:, None] * eps + of_cell
        _, last = rnn.rnn(x[None], (h[None], c[None]))
        h, c = (leaf[0].detach() for leaf in last)
    expected = [xi_x, xi_h, torch.full_like(h[:, :1], xi_one)]
    expected.append(torch.cat([eps, of_output[:, None], through[:, None]], 1))
    for mine, other in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, other, **EXACT)


def lstm_slopes(x, h, c, weights):
    """∂c/∂c of a unit, ∂c/∂y of the input, forget and cell gates, ∂h/∂y of the output gate, and ∂h/∂c of the same step."""

    def step(pre, cell):
        i, f, g, o = pre.chunk(4, -1)
        cell = f.sigmoid() * cell + i.sigmoid() * g.tanh()
        return o.sigmoid() * cell.tanh(), cell

    pre = (x @ weights[0].T + weights[2] + h @ weights[1].T + weights[3]).detach().requires_grad_()
    cell = c.clone().requires_grad_()
    hidden, after = step(pre, cell)
    of_pre, forget = torch.autograd.grad(after.sum(), [pre, cell], retain_graph=True)
    of_output = torch.autograd.grad(hidden.sum(), pre)[0].chunk(4, -1)[3]
    through = torch.autograd.functional.jvp(
        lambda c: pre.chunk(4, -1)[3].sigmoid() * c.tanh(), after.detach(), torch.ones_like(c)
    )
    return forget, of_pre.unflatten(-1, (4, -1))[:, :3], of_output, through[1].detach()


def contracted(rnn, arrived, carried):
    """The gradients that the traces `carried` turn those which arrive at their state into, from the equations."""
    if not isinstance(rnn._layer, FactoredLSTM):
        return rnn._layer.rule.contract(arrived, carried)
    of_h, of_c = (gradient * (1 - rnn._layer.decay) for gradient in arrived)
    xi_x, xi_h, ones, slopes = unpack(carried[0][0], UNITS)
    of_cell = (of_c + of_h * slopes[:, 4])[:, None] * slopes[:, :3]
    rows = torch.cat([of_cell.flatten(1), of_h * slopes[:, 3]], 1)
    biases = torch.einsum("bg,b->g", rows, ones[:, 0])
    return [torch.einsum("bg,bd->gd", rows, xi_x), torch.einsum("bg,bd->gd", rows, xi_h), biases, biases]


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
    older = contracted(rnn, arrived, carried)
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
    for traces in (None, "snap1"):
        with pytest.raises(ValueError, match=f"trace_decay needs factored traces, got traces={traces!r}"):
            build_rnn("lstm", 3, 4, 1, traces=traces, trace_decay=0.5)
    for wrong in (1.0, -0.1):
        with pytest.raises(ValueError, match=f"trace_decay must be from 0 to below 1, got {wrong}"):
            build_rnn("gru", 3, 4, 1, traces="factored", trace_decay=wrong)
