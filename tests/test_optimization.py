"""Clipping and stepping in one, against the plain way."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from dni_seq.optimization import clipped_step, gradient_norm

OPTIMIZERS = {
    "fused Adam": lambda parameters: torch.optim.Adam(parameters, lr=1e-2, fused=True),
    "fused AdamW": lambda parameters: torch.optim.AdamW(parameters, lr=1e-2, fused=True),
    "fused SGD": lambda parameters: torch.optim.SGD(parameters, lr=1e-2, momentum=0.9, fused=True),
    "plain Adam": lambda parameters: torch.optim.Adam(parameters, lr=1e-2, fused=False),
    "plain SGD": lambda parameters: torch.optim.SGD(parameters, lr=1e-2),
}


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
@pytest.mark.parametrize("limit", [None, 0.1, 1e6])
@pytest.mark.parametrize(("dtype", "rounding"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_clipped_step_is_clip_grad_norm_and_step(make, limit, dtype, rounding):
    torch.manual_seed(0)
    model = nn.Linear(5, 3).to(dtype)
    model.register_parameter("unused", nn.Parameter(torch.ones(2, dtype=dtype)))
    twin = copy.deepcopy(model)
    optimizer, plain = make(model.parameters()), make(twin.parameters())
    for _ in range(3):
        x = torch.randn(7, 5, dtype=dtype)
        for net in (model, twin):
            net.zero_grad()
            net(x).square().sum().backward()
        norm = gradient_norm(optimizer)
        clipped_step(optimizer, limit, norm, torch.tensor(True))
        expected = nn.utils.clip_grad_norm_(twin.parameters(), float("inf") if limit is None else limit)
        plain.step()
        assert norm > 0.1  # so the smallest limit cuts, and the largest does not
        torch.testing.assert_close(norm, expected, rtol=rounding, atol=0)
        for found, wanted in zip(model.parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(found, wanted, rtol=rounding, atol=rounding / 100)
    assert not hasattr(optimizer, "grad_scale")
