"""Nested states: order, nests of every kind, lanes."""

from __future__ import annotations

import dataclasses
from collections import OrderedDict, UserDict, defaultdict, deque
from types import MappingProxyType
from typing import NamedTuple

import numpy
import pytest
import torch

from dni_seq.core import nonfinite, states


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


class AttributeDict(dict):
    __getattr__ = dict.__getitem__


class TwoArguments(dict):
    """A mapping that nobody can rebuild: it can neither be copied nor be made from a dict."""

    def __init__(self, one, two):
        super().__init__(one=one, two=two)

    def __copy__(self):
        raise NotImplementedError

    def clear(self):
        raise NotImplementedError


@dataclasses.dataclass
class Dataclass:
    h: torch.Tensor


MAPPINGS = {
    "dict": lambda **entries: entries,
    "OrderedDict": OrderedDict,
    "AttributeDict": AttributeDict,
    "defaultdict": lambda **entries: defaultdict(list, entries),
    "UserDict": UserDict,
    "MappingProxyType": lambda **entries: MappingProxyType(entries),
}


def numbers(nest):
    return [leaf.item() for leaf in states.flatten(nest)]


def pair(kind=MAPPINGS["dict"], swap=False):
    h, c = torch.tensor(1.0), torch.tensor(2.0)
    return kind(c=c, h=h) if swap else kind(h=h, c=c)


@pytest.mark.parametrize("kind", MAPPINGS)
def test_every_mapping_is_a_nest_and_keeps_its_type(kind):
    state = pair(MAPPINGS[kind])
    assert numbers(state) == [1, 2]
    doubled = states.map_floating(lambda leaf: leaf * 2, state)
    assert type(doubled) is type(state)
    assert (doubled["h"], doubled["c"]) == (2, 4)
    assert numbers(state) == [1, 2]
    if kind == "defaultdict":
        assert doubled["new"] == []
    if kind == "AttributeDict":
        assert doubled.h == 2


def test_a_mapping_that_cannot_be_rebuilt_is_refused_by_name():
    with pytest.raises(TypeError, match="a TwoArguments can neither be copied"):
        states.detach(TwoArguments(torch.zeros(1), torch.zeros(1)))


@pytest.mark.parametrize("kind", MAPPINGS)
def test_match_keys_reorders_entries_and_nothing_else(kind):
    make = MAPPINGS[kind]
    nest = (pair(make, swap=True), [pair(make)])
    found = states.match_keys(nest, (pair(), [pair()]), "one", "other")
    assert numbers(found) == [1, 2, 1, 2]
    assert type(found[0]) is type(nest[0])
    assert found[1][0] is nest[1][0]  # was in order
    assert numbers(nest) == [2, 1, 1, 2]


def test_match_keys_names_what_differs():
    like = {"a": pair(), "b": torch.zeros(1)}
    with pytest.raises(ValueError, match=r"other\['a'\] must .* in one\['a'\]: missing 'c', unexpected 'cell', 7"):
        states.match_keys({"a": {"h": 0, "cell": 0, 7: 0}, "b": 0}, like, "one", "other")
    with pytest.raises(ValueError, match=r"one\['a'\] is a tuple, other\['a'\] has the keys 'h', 'c': give a dict"):
        states.match_keys({"a": (0, 0), "b": 0}, like, "one", "other")
    with pytest.raises(ValueError, match=r"one\['b'\] has the keys 'x', other\['b'\] has none"):
        states.match_keys({"a": pair(), "b": {"x": 0}}, like, "one", "other")


def test_settings_are_matched_by_key():
    state = {"h": torch.zeros(1, 3, 2), "c": torch.zeros(3, 2)}
    assert states.broadcast_to_leaves({"c": 0, "h": 1}, state, "state_batch_dim") == [1, 0]
    with pytest.raises(ValueError, match=r"state_batch_dim and the state must have the same keys; .*: missing 'c'"):
        states.broadcast_to_leaves({"h": 1}, state, "state_batch_dim")
    with pytest.raises(ValueError, match="cells is a tuple, the state has the keys 'h', 'c'"):
        states.broadcast_to_leaves((False, True), state, "cells")


def test_reset_lanes_matches_the_initial_state_by_key():
    state = {"h": torch.full((2, 3), 5.0), "c": torch.full((2, 3), 6.0)}
    initial = {"c": torch.full((2, 3), 2.0), "h": torch.full((2, 3), 1.0)}
    fresh = states.reset_lanes(state, torch.tensor([True, False]), initial, 0)
    assert (fresh["h"][:, 0].tolist(), fresh["c"][:, 0].tolist()) == ([1, 5], [2, 6])
    with pytest.raises(ValueError, match=r"the initial state and the state must .* missing 'c', unexpected 'cell'"):
        states.reset_lanes(state, torch.tensor([True, False]), {"h": state["h"], "cell": state["c"]}, 0)


@pytest.mark.parametrize("good", [True, False])
def test_select_where_matches_by_key(good):
    new, old = pair(), {"c": torch.tensor(4.0), "h": torch.tensor(3.0)}
    found = nonfinite.select_where(torch.tensor(good), new, old)
    assert (found["h"], found["c"]) == ((1, 2) if good else (3, 4))
    with pytest.raises(ValueError, match="missing 'c'"):
        nonfinite.select_where(torch.tensor(good), new, {"h": torch.tensor(3.0)})


def test_select_where_takes_none_as_zeros():
    found = nonfinite.select_where(torch.tensor(False), (torch.ones(2), None), (None, None))
    assert found[0].tolist() == [0, 0]
    assert found[1] is None


def test_nan_in_complex_states_is_found():
    bad = torch.tensor([[1j, 2], [float("nan"), 0]])
    assert nonfinite.broken_lanes({"s": bad}, 0).tolist() == [False, True]
    assert nonfinite.broken_lanes({"s": bad}, 1).tolist() == [True, False]
    assert nonfinite.broken_lanes({"s": torch.ones(2, dtype=torch.cfloat)}, 0) is None
    assert nonfinite.first_nonfinite([("the state", bad)])[1].startswith("the state (")


def test_saved_leaves_are_found_again_by_their_paths():
    saved = {"x": [pair()], "y": torch.tensor(3.0)}
    like = {"y": torch.zeros(()), "x": [pair(OrderedDict, swap=True)]}
    paths = states.key_paths(saved)
    assert paths == ["['x'][0]['h']", "['x'][0]['c']", "['y']"]
    found = states.from_saved(states.flatten(saved), paths, like)
    assert list(found) == ["y", "x"]
    assert isinstance(found["x"][0], OrderedDict)
    assert (found["x"][0]["h"], found["x"][0]["c"], found["y"]) == (1, 2, 3)
    with pytest.raises(ValueError, match=r"the saved state and the model's state .* missing .*'z'.*, unexpected .*'y'"):
        states.from_saved(states.flatten(saved), paths, {"x": [pair()], "z": torch.zeros(())})


def test_saved_leaves_without_paths_are_read_by_position():
    assert states.key_paths((torch.zeros(1), [torch.zeros(1)])) is None
    found = states.from_saved([torch.tensor(1.0), torch.tensor(2.0)], None, pair(swap=True))
    assert (found["c"], found["h"]) == (1, 2)


@pytest.mark.parametrize(
    ("leaf", "name"),
    [(Dataclass(torch.zeros(1)), "Dataclass"), (deque([torch.zeros(1)]), "deque"), (numpy.zeros(1), "ndarray")],
)
def test_leaves_that_could_hold_tensors_unseen_are_refused_by_name(leaf, name):
    with pytest.raises(TypeError, match=f"the last state holds a {name}: use tensors"):
        states.check_leaves({"h": torch.zeros(1), "x": (leaf,)}, "the last state")


def test_plain_leaves_are_allowed():
    states.check_leaves((torch.zeros(1), None, 1, 0.5, True, "a", b"b", 1j, {"x": []}), "the state")


def test_complex_leaves_are_refused_where_a_gradient_is_predicted():
    states.check_real((torch.zeros(1), torch.zeros(1, dtype=torch.int64), None), "the trigger")
    with pytest.raises(ValueError, match=r"the trigger holds a complex tensor.*view_as_real"):
        states.check_real((torch.zeros(1), [torch.zeros(1, dtype=torch.cdouble)]), "the trigger")


def test_map_together_joins_nests_by_key():
    found = states.map_together(torch.stack, [(pair(), torch.tensor(0.0)), (pair(swap=True), torch.tensor(9.0))], "inputs")
    assert (found[0]["h"].tolist(), found[0]["c"].tolist(), found[1].tolist()) == ([1, 1], [2, 2], [0, 9])
    with pytest.raises(ValueError, match="inputs and inputs before them must have the same keys; in inputs: missing 'c'"):
        states.map_together(torch.stack, [pair(), {"h": torch.zeros(())}], "inputs")
    with pytest.raises(ValueError, match="inputs must always have the same number of tensors, got 1 and 2"):
        states.map_together(torch.stack, [(torch.zeros(1),) * 2, torch.zeros(1)], "inputs")
