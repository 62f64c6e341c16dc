"""Clipping and stepping in one, against the plain way."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch import nn

from dni_seq.core.optimizer_step import (
    JoinedOptimizer,
    check_moments,
    clear_optimizer_state,
    clipped_step,
    gradient_norm,
    total_norm,
)

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


def test_total_norm_is_that_of_all_numbers():
    tensors = [torch.tensor([3.0]), torch.tensor([[4.0], [0.0]]), torch.tensor([12.0], dtype=torch.float64), torch.ones(0)]
    found = total_norm(tensors)
    assert (found.item(), found.dtype) == (13, torch.float64)
    assert total_norm([]).item() == 0
    assert not total_norm([torch.ones(2, requires_grad=True)]).requires_grad


class Words(nn.Module):
    """An embedding and a layer behind it."""

    def __init__(self, sparse: bool) -> None:
        super().__init__()
        self.embedding = nn.Embedding(6, 4, sparse=sparse, dtype=torch.float64)
        self.layer = nn.Linear(4, 2, dtype=torch.float64)

    def forward(self, tokens):
        return self.layer(self.embedding(tokens)).square().sum()


def joined(words, lr=1e-2, eps=1e-8):
    dense = torch.optim.Adam(words.layer.parameters(), lr, eps=eps, fused=True)
    return JoinedOptimizer([dense, torch.optim.SparseAdam([words.embedding.weight], lr, eps=eps)])


@pytest.mark.parametrize("limit", [None, 0.1])
def test_where_all_rows_are_read_a_joined_step_is_that_of_adam(limit):
    """One of them twice, so that its gradient is a sum that the norm has to see as one.

    SparseAdam has another place for epsilon, so that it is next to nothing here.
    """
    torch.manual_seed(0)
    words, twin = Words(sparse=True), Words(sparse=False)
    twin.load_state_dict(words.state_dict())
    optimizer, plain = joined(words, eps=1e-30), torch.optim.Adam(twin.parameters(), 1e-2, eps=1e-30)
    tokens = torch.tensor([0, 1, 2, 3, 4, 5, 2])
    for _ in range(3):
        for net, its in ((words, optimizer), (twin, plain)):
            its.zero_grad()
            net(tokens).backward()
        norm = gradient_norm(optimizer)
        torch.testing.assert_close(norm, gradient_norm(plain), rtol=1e-12, atol=0)
        clipped_step(optimizer, limit, norm, torch.tensor(True))
        clipped_step(plain, limit, norm, torch.tensor(True))
        for found, wanted in zip(words.parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-13)


def test_rows_that_are_not_read_stay_and_their_moments_too():
    words = Words(sparse=True)
    optimizer = joined(words)
    for tokens in (torch.tensor([0, 1]), torch.tensor([1, 2])):
        before = words.embedding.weight.detach().clone()
        optimizer.zero_grad()
        words(tokens).backward()
        clipped_step(optimizer, None, gradient_norm(optimizer), torch.tensor(True))
        changed = (words.embedding.weight != before).any(dim=1)
        assert changed.nonzero().flatten().tolist() == tokens.tolist()


def test_a_joined_optimizer_resumes_from_what_it_saved():
    words = Words(sparse=True)
    optimizer = joined(words)
    tokens = torch.tensor([0, 3])

    def step(net, its):
        its.zero_grad()
        net(tokens).backward()
        its.step()

    step(words, optimizer)
    twin = copy.deepcopy(words)
    other = joined(twin, lr=1.0)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert [group["lr"] for group in other.param_groups] == [1e-2, 1e-2]
    for net, its in ((words, optimizer), (twin, other)):
        step(net, its)
    for found, wanted in zip(twin.parameters(), words.parameters(), strict=True):
        assert torch.equal(found, wanted)
    other.param_groups[1]["lr"] = 0.0
    before = twin.embedding.weight.detach().clone()
    step(twin, other)
    assert torch.equal(twin.embedding.weight, before)
    with pytest.raises(ValueError, match="0 parts, this one 2"):
        other.load_state_dict(torch.optim.Adam(twin.layer.parameters()).state_dict())


def test_a_joined_optimizer_names_its_parts_to_a_new_group():
    optimizer = joined(Words(sparse=True))
    with pytest.raises(ValueError, match=r"parts\[0\] is Adam, parts\[1\] is SparseAdam.*new JoinedOptimizer"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2))]})
    assert len(optimizer.param_groups) == 2


def test_hooks_and_schedules_see_the_clipped_steps_of_a_joined_optimizer():
    words = Words(sparse=True)
    optimizer = joined(words)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    seen = []
    optimizer.register_step_post_hook(lambda *_: seen.append(1))
    words(torch.tensor([0, 1])).backward()
    clipped_step(optimizer, 0.1, gradient_norm(optimizer), torch.tensor(True))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # PyTorch warns of a schedule that is stepped before its optimizer
        schedule.step()
    assert seen == [1]


def test_clearing_reaches_all_joined_optimizers():
    parameters = [nn.Parameter(torch.ones(2)) for _ in range(2)]
    joined = JoinedOptimizer([torch.optim.Adam([parameter]) for parameter in parameters])
    for parameter in parameters:
        parameter.grad = torch.ones(2)
    joined.step()
    assert all(part.state for part in joined.parts)
    clear_optimizer_state(joined)
    assert not any(part.state for part in joined.parts)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("exp_avg", torch.zeros(3)),
        ("exp_avg_sq", torch.zeros(4, 5, dtype=torch.int64)),
        ("exp_avg", None),
        ("step", torch.zeros(2)),
    ],
)
def test_moments_that_do_not_fit_are_refused(name, value):
    """The fused kernel would write beyond them."""
    weight = nn.Parameter(torch.ones(4, 5))
    optimizer = JoinedOptimizer([torch.optim.Adam([weight], fused=True)])
    weight.grad = torch.ones(4, 5)
    optimizer.step()
    check_moments(optimizer)
    check_moments(torch.optim.SGD([weight], momentum=0.5))
    optimizer.parts[0].state[weight][name] = value
    with pytest.raises(ValueError, match=f"the saved optimizer has {name} of shape"):
        check_moments(optimizer)


def test_complex_moments_fit():
    weight = nn.Parameter(torch.ones(2, dtype=torch.complex64))
    optimizer = torch.optim.Adam([weight])
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    check_moments(optimizer)
