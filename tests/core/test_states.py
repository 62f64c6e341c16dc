"""Nested states: order, nests of every kind, lanes."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch

from dni_seq.core import states


class Pair(NamedTuple):
    first: torch.Tensor
    second: torch.Tensor


def nest():
    return {"b": Pair(torch.zeros(2, 3), torch.ones(3)), "a": [torch.arange(3), (torch.full((1,), 2.0),)], "none": None}


def test_flatten_goes_by_position_and_insertion():
    leaves = states.flatten(nest())
    assert [None if leaf is None else tuple(leaf.shape) for leaf in leaves] == [(2, 3), (3,), (3,), (1,), None]


def test_unflatten_gives_the_nest_back_type_by_type():
    state = nest()
    again = states.unflatten(state, states.flatten(state))
    assert list(again) == ["b", "a", "none"]
    assert isinstance(again["b"], Pair)
    assert isinstance(again["a"], list)
    assert isinstance(again["a"][1], tuple)
    assert all(one is other for one, other in zip(states.flatten(again), states.flatten(state), strict=True))


def test_leaves_that_are_not_floating_are_carried_along():
    state = nest()
    doubled = states.map_floating(lambda t: t * 2, state)
    assert torch.equal(doubled["b"].second, torch.full((3,), 2.0))
    assert doubled["a"][0] is state["a"][0]
    assert doubled["none"] is None
    assert len(states.floating(state)) == 3


def test_with_floating_replaces_the_floating_leaves_alone():
    state = nest()
    fresh = [torch.full_like(leaf, 7.0) for leaf in states.floating(state)]
    replaced = states.with_floating(state, fresh)
    assert states.floating(replaced)[2] is fresh[2]
    assert replaced["a"][0] is state["a"][0]


def test_detach_cuts_every_leaf_and_shares_memory():
    weight = torch.ones(3, requires_grad=True)
    state = (weight * 2, [weight * 3])
    cut = states.detach(state)
    assert not any(leaf.requires_grad for leaf in states.flatten(cut))
    assert cut[0].data_ptr() == state[0].data_ptr()


@pytest.mark.parametrize("function", [states.unflatten, states.with_floating])
def test_a_wrong_number_of_leaves_is_refused(function):
    with pytest.raises(ValueError, match="the state has 2"):
        function((torch.zeros(1), torch.zeros(1)), [torch.zeros(1)])


def test_spread_takes_one_value_or_a_nest_of_them():
    state = (torch.zeros(1), {"x": torch.zeros(1)})
    assert states.broadcast_to_leaves(3, state, "batch_dim") == [3, 3]
    assert states.broadcast_to_leaves((1, {"x": 0}), state, "batch_dim") == [1, 0]
    with pytest.raises(ValueError, match="batch_dim has 3 leaves, the state has 2"):
        states.broadcast_to_leaves((1, 2, 3), state, "batch_dim")


@pytest.mark.parametrize("batch_dim", [0, 1, -1])
def test_reset_lanes_touches_the_marked_lanes_alone(batch_dim):
    ends = torch.tensor([True, False, True])
    shape = [2, 2]
    shape.insert(batch_dim if batch_dim >= 0 else 2, 3)
    state, initial = torch.rand(shape) + 1, torch.rand(shape) - 2
    for start in (initial, None):
        fresh = states.reset_lanes(state, ends, start, batch_dim)
        for lane, end in enumerate(ends.tolist()):
            zeros_or_start = torch.zeros_like(state) if start is None else start
            expected = zeros_or_start if end else state
            assert torch.equal(fresh.select(batch_dim, lane), expected.select(batch_dim, lane))


def test_reset_lanes_says_what_to_set():
    state, ends = torch.zeros(2, 3, 4), torch.zeros(3, dtype=torch.bool)
    with pytest.raises(ValueError, match="state_batch_dim"):
        states.reset_lanes(state, ends, None, 0)
    with pytest.raises(ValueError, match="state_batch_dim"):
        states.reset_lanes(state, ends, None, 3)
    with pytest.raises(ValueError, match=r"set state_batch_dim; dni_seq\.check_model\(model, inputs\) shows"):
        states.reset_lanes(state, ends, None, 0)
    with pytest.raises(ValueError, match="initial state has 2 leaves"):
        states.reset_lanes(state, ends, (state, state), 1)


def test_reset_lanes_resets_counters_too():
    """Leaves that are not floating belong to a lane as well; what is no tensor has no lanes."""
    ends = torch.tensor([False, True])
    state = (torch.tensor([5, 6]), "label")
    assert states.reset_lanes(state, ends, None, 0)[0].tolist() == [5, 0]
    assert states.reset_lanes(state, ends, None, 0)[1] == "label"
