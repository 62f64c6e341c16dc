"""Replays: exact gradients of several windows, λ-targets against eligibility traces, fidelity."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import nn

import dni_seq as dni
from dni_seq.core import states
from dni_seq.credit import fidelity as diagnostics
from dni_seq.credit.replay import RecordedWindow, exact_gradients, lambda_targets
from dni_seq.credit.window_runner import WindowRunner
from dni_seq.synthesizers.base import predict
from dni_seq.synthesizers.target_rule import bootstrapped, increments
from tests import problems, reference
from tests.training import CLOSE, LANES, trainer_initial

T, WINDOWS = 3, 4


def runner_of(model):
    return WindowRunner(
        model, problems.summed, "sum", state_batch_dim=model.state_batch_dim, start=lambda lanes: trainer_initial(model)
    )


def past_of(model, windows, context=None):
    """The windows as a trainer would have kept them, each with the state it started from."""
    state, past = trainer_initial(model), []
    for window in windows:
        past.append(RecordedWindow(window.inputs, window.targets, None, window.ends, states.detach(state), context))
        with torch.no_grad():
            _, state = model(window.inputs, state)
        state = states.reset_lanes(state, window.ends, trainer_initial(model), model.state_batch_dim)
    return past, state


def exact_future(model, windows, k):
    """The slow truth: gradient of all windows from k on with respect to the state that window k starts from."""
    past, _ = past_of(model, windows)
    steps = [(x, y) for w in windows[k:] for x, y in zip(w.inputs, w.targets, strict=True)]
    alive, valid = torch.ones(LANES, dtype=torch.bool), []
    for window in windows[k:]:
        valid += [alive] * len(window.inputs)
        alive = alive & ~window.ends
    context = dni.Lookahead(torch.stack([x for x, _ in steps]), torch.stack([y for _, y in steps]), torch.stack(valid))
    return states.floating(reference.Oracle(model, problems.unreduced)(past[k].start, context))


def make(name, ends=None):
    model = problems.make_model(name)
    windows = list(problems.cut(problems.tokens(T * WINDOWS, LANES), T, ends))
    return model, windows


ENDS = [None, {1: [0], 2: [0, 2]}]


@pytest.mark.parametrize("name", problems.MODELS)
@pytest.mark.parametrize("ends", ENDS, ids=["one-sequence", "lanes-end"])
def test_exact_gradients_sum_to_the_future(name, ends):
    model, windows = make(name, ends)
    past, _ = past_of(model, windows)
    gradients = exact_gradients(runner_of(model), past[1:])
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    total = [sum(column) for column in zip(*gradients, strict=True)]
    for found, expected in zip(total, exact_future(model, windows, 1), strict=True):
        torch.testing.assert_close(found, expected, **CLOSE)
    assert total[0].abs().max() > 1e-2, "the future must matter"


@pytest.mark.parametrize("name", problems.MODELS)
@pytest.mark.parametrize("ends", ENDS, ids=["one-sequence", "lanes-end"])
def test_lambda_one_is_bptt_over_the_replay_buffer(name, ends):
    """Identity 4, second half: λ = 1 and nothing behind the last window."""
    model, windows = make(name, ends)
    past, last = past_of(model, windows)
    nothing = [states.map_floating(torch.zeros_like, last)]
    targets = lambda_targets(runner_of(model), past, nothing, bootstrapped(1.0, 1.0), lambda past: [past.start], 1.0)
    for k, (target,) in enumerate(targets):
        for found, expected in zip(states.floating(target), exact_future(model, windows, k), strict=True):
            torch.testing.assert_close(found, expected, **CLOSE)


def test_lambda_one_of_increments_is_exact_horizon_by_horizon():
    model, windows = make("lstm")
    past, last = past_of(model, windows)
    nothing = [states.map_floating(torch.zeros_like, last)] * 2
    rule = increments(1.0, 1.0, [1.0, 1.0], False)
    targets = lambda_targets(runner_of(model), past, nothing, rule, lambda past: [past.start] * 2, 1.0)
    exact = exact_gradients(runner_of(model), past[1:3])
    for horizon, gradients in zip(targets[1], exact, strict=True):
        for found, expected in zip(states.floating(horizon), gradients, strict=True):
            torch.testing.assert_close(found, expected, **CLOSE)


class Linear(nn.Module):
    """M(s) = A s for a GRU's state [1, 1, H]."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.map = nn.Linear(hidden, hidden, bias=False).double()

    def forward(self, trigger, context=None):
        return self.map(trigger)


@pytest.mark.parametrize("lam", [0.0, 0.6, 1.0])
def test_lambda_targets_equal_eligibility_traces(lam):
    """Identity 4, first half: the summed regression gradient equals that of the online trace recursion, M frozen.

    The trace e_k = ∂M(s_k)/∂φ + γλ J_{k-1} e_{k-1}, of D times |φ| numbers a lane, meets the error
    δ_k = a_k + γ J_kᵀ M(s_{k+1}) - M(s_k) at every window.
    """
    discount, lanes, hidden = 0.8, 1, 5
    model = problems.make_model("gru")
    synthesizer = Linear(hidden)
    windows = list(problems.cut(problems.tokens(T * 5, lanes), T))
    state, past = torch.zeros(1, lanes, hidden, dtype=torch.float64), []
    trace, update, previous = 0.0, 0.0, None
    for window in windows:
        start = state.clone().requires_grad_()
        past.append(RecordedWindow(window.inputs, window.targets, None, window.ends, state, None))
        outputs, last = model(window.inputs, start)
        own = torch.autograd.grad(problems.summed(outputs, window.targets), start, retain_graph=True)[0].flatten()
        jacobian = torch.stack([torch.autograd.grad(x, start, retain_graph=True)[0].flatten() for x in last.flatten()])
        message, behind = synthesizer(state).detach().flatten(), synthesizer(last).detach().flatten()
        # ∂(A s)_i / ∂A_jl = δ_ij s_l
        sensitivity = torch.einsum("ij,l->ijl", torch.eye(hidden, dtype=torch.float64), state.flatten())
        trace = sensitivity + (
            discount * lam * torch.einsum("di,ijl->djl", previous, trace) if previous is not None else 0.0
        )
        error = own + discount * jacobian.T @ behind - message
        update = update + torch.einsum("d,djl->jl", error, trace)
        previous, state = jacobian, last.detach()
    with torch.no_grad():
        targets = lambda_targets(
            runner_without_start(model),
            past,
            [synthesizer(state)],
            bootstrapped(1.0, discount),
            lambda past: predict(synthesizer, past.start, None),
            lam,
        )
    loss = sum(
        0.5 * (synthesizer(window.start) - target).square().sum() for window, (target,) in zip(past, targets, strict=True)
    )
    loss.backward()
    assert update.abs().max() > 1e-2
    torch.testing.assert_close(-synthesizer.map.weight.grad, update, **CLOSE)


def runner_without_start(model):
    return WindowRunner(model, problems.summed, "sum")


def test_bptt_gradients_of_the_first_window_reach_over_all():
    """Windows' gradients with all credit, summed, are full BPTT's."""
    model, windows = make("lstm", {1: [0]})
    past, _ = past_of(model, windows)
    runner = runner_of(model)
    summed = [
        sum(column) for column in zip(*(diagnostics.bptt_gradients(runner, past[k:]) for k in range(WINDOWS)), strict=True)
    ]
    expected = reference.full_bptt(model, problems.summed, windows, trainer_initial(model), 1)
    for found, value in zip(summed, expected.values(), strict=True):
        torch.testing.assert_close(found, value, **CLOSE)
    assert diagnostics.cosine(summed, list(expected.values())) == pytest.approx(1.0)
    assert diagnostics.cosine(summed, [-2 * value for value in expected.values()]) == pytest.approx(-1.0)


@pytest.mark.parametrize("name", problems.MODELS)
def test_fidelity_of_exact_halved_and_opposite_messages(name):
    model, windows = make(name)
    past, _ = past_of(model, windows)
    runner = runner_of(model)
    exact = exact_gradients(runner, past[:2])
    for factor, cosine, r2, slope in (
        (1.0, 1.0, 1.0, 1.0),
        (0.5, 1.0, 0.75, 2.0),
        (-1.0, -1.0, -3.0, -1.0),
        (0.0, 0.0, 0.0, 0.0),
    ):
        messages = [states.with_floating(past[0].start, [factor * leaf for leaf in leaves]) for leaves in exact]
        found = diagnostics.fidelity(runner, past[:2], messages, 0.9)
        for part in [*found.horizons, found.total]:
            assert part.cosine == pytest.approx(cosine, abs=1e-9)
            assert part.r2 == pytest.approx(r2, abs=1e-9)
            assert part.slope == pytest.approx(slope, abs=1e-9)
            assert part.norm_ratio == pytest.approx(abs(factor), abs=1e-9)
    layers = {"lstm": 4, "gru": 1, "odd-nest": 3}
    assert len(found.parts) == layers[name]


def test_fidelity_of_one_message_for_all_windows_is_discounted():
    model, windows = make("gru")
    past, _ = past_of(model, windows)
    runner = runner_of(model)
    exact = exact_gradients(runner, past)
    total = sum(0.7**n * leaves[0] for n, leaves in enumerate(exact))
    found = diagnostics.fidelity(runner, past, [total], 0.7, bootstrapped=True)
    assert found.horizons[0].r2 == pytest.approx(1.0)
    with pytest.raises(ValueError, match="as many windows"):
        diagnostics.fidelity(runner, past[:1], [total, total])


def test_fidelity_of_a_tail_is_against_all_after_the_horizons():
    """A tail that says exactly what the windows behind it send is perfect; it is not what one window sends."""
    model, windows = make("lstm")
    past, _ = past_of(model, windows)
    runner = runner_of(model)
    first, *behind = exact_gradients(runner, past)
    tail = [sum(0.7**n * leaves[i] for n, leaves in enumerate(behind)) for i in range(2)]
    messages = [states.with_floating(past[0].start, leaves) for leaves in (first, tail)]
    found = diagnostics.fidelity(runner, past, messages, 0.7, bootstrapped=True)
    for part in [*found.horizons, found.total]:
        assert part.r2 == pytest.approx(1.0)
    assert diagnostics.fidelity(runner, past, messages, 0.7).horizons[1].r2 < 0.9


def test_fidelity_takes_lanes_counted_from_the_end():
    model, windows = make("lstm")
    past, _ = past_of(model, windows)
    runner = runner_of(model)
    messages = [states.with_floating(past[0].start, exact_gradients(runner, past[:1])[0])]
    behind = dataclasses.replace(runner, state_batch_dim=-2)
    found, expected = (diagnostics.fidelity(how, past[:1], messages) for how in (behind, runner))
    assert found == expected
    assert len(found.parts) == 4
