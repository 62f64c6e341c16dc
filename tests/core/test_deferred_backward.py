"""Scopes of deferred backpropagation: one pass, nested, per thread, safe under exceptions."""

from __future__ import annotations

import asyncio
import gc
import threading
import weakref

import pytest
import torch

import dni_seq as dni
from dni_seq.core.deferred_backward import current_scope


def weight():
    return torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64, requires_grad=True)


def test_outside_of_a_scope_it_backpropagates_at_once():
    w = weight()
    dni.backward((w**2).sum())
    assert torch.equal(w.grad, 2 * w.detach())


def test_a_scope_runs_one_pass_at_its_end():
    """Two roots that share a graph, which two passes could not go through: both gradients are there."""
    w = weight()
    shared = w.exp()
    with dni.defer_backward():
        dni.backward(shared.sum())
        dni.backward(shared, torch.full((3,), 2.0, dtype=torch.float64))
        assert w.grad is None
    assert torch.equal(w.grad, 3 * w.detach().exp())


def test_scopes_nest_and_each_delivers_its_own():
    w, v = weight(), weight()
    with dni.defer_backward():
        dni.backward(w.sum())
        with dni.defer_backward():
            dni.backward(v.sum())
        assert v.grad is not None
        assert w.grad is None
    assert w.grad is not None


def test_an_exception_delivers_nothing_and_forgets():
    w = weight()
    loss = (w**2).sum()
    alive = weakref.ref(loss)
    with pytest.raises(KeyError), dni.defer_backward() as scope:  # noqa: PT012
        dni.backward(loss)
        raise KeyError
    del loss
    gc.collect()
    assert alive() is None, "the scope holds on to the graph"
    assert w.grad is None
    assert current_scope() is None
    scope.deliver()
    assert w.grad is None
    with dni.defer_backward():
        dni.backward(w.sum())
    assert torch.equal(w.grad, torch.ones_like(w)), "the next scope delivers its own gradient alone"


def test_an_exception_in_an_inner_scope_leaves_the_outer_one_whole():
    w, v = weight(), weight()
    with dni.defer_backward():
        dni.backward(w.sum())
        with pytest.raises(KeyError), dni.defer_backward():  # noqa: PT012
            dni.backward(v.sum())
            raise KeyError
        dni.backward(w.sum())
    assert torch.equal(w.grad, torch.full_like(w, 2.0))
    assert v.grad is None


def test_a_failing_pass_is_forgotten_too():
    w = weight()
    loss = (w**2).sum()
    loss.backward()
    with pytest.raises(RuntimeError, match="defer_backward"), dni.defer_backward() as scope:
        dni.backward(loss)
    before = w.grad.clone()
    scope.deliver()
    assert torch.equal(w.grad, before)


def test_scopes_belong_to_their_thread():
    """Two threads hold a scope open at the same time; each gets the gradient of its own, when its own ends."""
    mine, other = weight(), weight()
    opened, closed = threading.Barrier(2, timeout=10), threading.Barrier(2, timeout=10)
    seen = {}

    def work():
        seen["at start"] = current_scope()
        with dni.defer_backward():
            opened.wait()
            dni.backward((2 * other).sum())
        seen["gradient"] = other.grad.clone()
        closed.wait()

    thread = threading.Thread(target=work)
    with dni.defer_backward():
        thread.start()
        opened.wait()
        dni.backward(mine.sum())
        closed.wait()
        assert mine.grad is None, "the other thread's scope has delivered ours"
    thread.join()
    assert seen["at start"] is None
    assert torch.equal(seen["gradient"], torch.full_like(other, 2.0))
    assert torch.equal(mine.grad, torch.ones_like(mine))


def test_scopes_belong_to_their_asyncio_task():
    weights = [weight(), weight()]

    async def work(w, factor):
        with dni.defer_backward():
            await asyncio.sleep(0)
            dni.backward((factor * w).sum())
            await asyncio.sleep(0)

    async def both():
        await asyncio.gather(*(work(w, i + 1) for i, w in enumerate(weights)))

    asyncio.run(both())
    for i, w in enumerate(weights):
        assert torch.equal(w.grad, torch.full_like(w, i + 1.0))


def test_a_graph_that_is_freed_already_says_what_to_do():
    w = weight()
    shared = w.exp()
    dni.backward(shared.sum())
    with pytest.raises(RuntimeError, match=r"freed.*with dni_seq\.defer_backward\(\)"):
        dni.backward((shared**2).sum())


def test_other_errors_of_a_backward_pass_stay_as_they_are():
    w = weight()
    doubled = w * 2
    squared = doubled**2
    with torch.no_grad():
        doubled += 1
    with pytest.raises(RuntimeError, match="inplace operation"):
        dni.backward(squared.sum())


@pytest.mark.parametrize("in_scope", [False, True])
@pytest.mark.parametrize(
    ("tensor", "gradient", "error", "match"),
    [
        (torch.zeros(()), None, RuntimeError, "requires_grad"),
        (weight() * 2, None, ValueError, "pass its gradient"),
        (weight() * 2, torch.zeros(2), ValueError, r"shape \(2,\).*\(3,\)"),
    ],
    ids=["needs-no-gradient", "no-scalar", "shapes"],
)
def test_bad_input_is_refused_where_it_is_given(in_scope, tensor, gradient, error, match):
    if not in_scope:
        with pytest.raises(error, match=match):
            dni.backward(tensor, gradient)
        return
    with pytest.raises(KeyError), dni.defer_backward():  # noqa: PT012 - the refusal comes at the call, not at the end
        with pytest.raises(error, match=match):
            dni.backward(tensor, gradient)
        raise KeyError


def test_an_empty_scope_does_nothing():
    with dni.defer_backward():
        pass
    assert current_scope() is None
