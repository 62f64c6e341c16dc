"""UORO, a reference for estimators with traces: unbiased, and noisier than SnAp-1 is biased."""

from __future__ import annotations

import math

import torch

from dni_seq.core import states
from dni_seq.models.dense_cells import gru_step
from dni_seq.models.recurrent import build_rnn
from tests import reference


def problem(units, inputs, steps):
    """A GRU, its inputs for one lane, a loss of each state, and the gradient of all losses by full BPTT."""
    torch.manual_seed(0)
    rnn = build_rnn("gru", inputs, units, 1, traces="snap1").double()
    with torch.no_grad():
        for parameter in rnn.parameters():
            parameter *= 2
    text = torch.randn(steps, inputs, dtype=torch.float64)
    wanted = torch.randn(steps, units, dtype=torch.float64)

    def loss(state, t):
        return (state * wanted[t]).sum()

    outputs = rnn.rnn(text[:, None])[0][:, 0]
    exact = torch.autograd.grad(sum(loss(outputs[t], t) for t in range(steps)), list(rnn.rnn.parameters()))
    return rnn, text, loss, torch.cat([gradient.flatten() for gradient in exact])


def estimates(rnn, text, loss, draws, **more):
    weights = [weight.detach() for weight in rnn.rnn.all_weights[0]]
    start = torch.zeros(1, rnn.rnn.hidden_size, dtype=torch.float64)
    return reference.uoro(gru_step, text, start, weights, loss, draws, torch.Generator().manual_seed(4), **more)


def z_scores(found, exact):
    error = found.std(0) / math.sqrt(len(found))
    return ((found.mean(0) - exact) / error)[error > 1e-12 * exact.abs().max()]


def test_its_mean_over_draws_is_the_gradient_of_full_bptt():
    rnn, text, loss, exact = problem(4, 3, 6)
    z = z_scores(estimates(rnn, text, loss, 2000), exact)
    assert len(z) > 100
    assert z.abs().max() < 5
    assert 0.7 < z.square().mean() < 1.4


def test_without_its_trace_it_is_another_gradient():
    rnn, text, loss, exact = problem(4, 3, 6)
    assert z_scores(estimates(rnn, text, loss, 2000, traced=False), exact).abs().max() > 5


def by_single_steps(rnn, text, loss, **traces):
    """The summed gradients of single steps, by a network with the parameters of `rnn` and with `traces` or none."""
    plain = rnn.rnn
    used = build_rnn("gru", plain.input_size, plain.hidden_size, 1, **traces).double()
    (used.rnn if traces else used).load_state_dict(plain.state_dict())
    state = None
    for t, x in enumerate(text):
        outputs, state = used(x[None, None], None if state is None else states.detach(state))
        loss(outputs[0, 0], t).backward()
    return torch.cat([parameter.grad.flatten() for parameter in used.parameters()])


def test_traces_are_nearer_to_the_gradient_than_truncation_and_a_draw_of_uoro():
    """64 units, 20 single steps, cosine of the summed gradients; docs/estimators.md has the order."""
    rnn, text, loss, exact = problem(64, 8, 20)
    kinds = {"SnAp-1": {"traces": "snap1"}, "truncated": {}}
    kinds |= {f"factored, {decay}": {"traces": "factored", "trace_decay": decay} for decay in (0.0, 0.2, 0.9)}
    gradients = {kind: by_single_steps(rnn, text, loss, **traces) for kind, traces in kinds.items()}
    found = {kind: float(torch.cosine_similarity(gradient, exact, dim=0)) for kind, gradient in gradients.items()}
    cosines = torch.cosine_similarity(estimates(rnn, text, loss, 20), exact[None], dim=1)
    print(found, f"UORO {float(cosines.mean()):.3f} +- {float(cosines.std()):.3f}")
    assert found["SnAp-1"] == max(found.values())
    assert found["truncated"] == min(found.values())
    assert found["truncated"] > float(cosines.max())
