"""Nested recurrent states: a tensor, or any nest of tuples, NamedTuples, lists, dicts and other mappings of tensors.

Leaves that are not floating-point tensors, such as step counters, are kept as they are and never receive gradients. Entries
of two mappings belong together if they have the same key. `match_keys` brings the entries of two nests into one order before
their leaves are paired.

Legend: B = lanes, H = hidden units, L = layers.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

from dni_seq.core.traces import Trace

State = Any
"""A nest of tensors. Python's type system has no more exact type for such a nest."""

SEE_CHECK = "dni_seq.check_model(model, inputs) shows what the model does"
"""The end of error messages about a state whose shapes or structure are not the expected ones."""

PLAIN = (type(None), bool, int, float, complex, str, bytes)
"""Types of leaves, besides tensors, that a state may hold. They are carried from window to window unchanged."""


def flatten(state: State) -> list[Any]:
    """Returns the leaves of `state` in a fixed order: by position, and by insertion in mappings."""
    if isinstance(state, dict):
        state = state.values()
    elif not isinstance(state, (tuple, list)):
        if isinstance(state, Tensor) or not isinstance(state, Mapping):
            return [state]
        state = state.values()
    leaves: list[Any] = []
    for value in state:
        # Tensors need no recursive call, whose cost is noticeable several times a step.
        leaves += [value] if isinstance(value, Tensor) else flatten(value)
    return leaves


def unflatten(like: State, leaves: Sequence[Any]) -> State:
    """Returns a nest shaped like `like` that holds `leaves`, given in the order of `flatten(like)`.

    Raises:
        ValueError: `like` and `leaves` differ in the number of leaves.
    """
    expected = len(flatten(like))
    if len(leaves) != expected:
        raise ValueError(f"the state has {expected} leaves, got {len(leaves)}")
    source = iter(leaves)
    return _mapped(lambda _: next(source), like)


def _mapped(function: Callable[[Any], Any], state: State) -> State:
    """Returns `state` with `function` applied to every leaf, in the order of `flatten`."""
    if isinstance(state, Tensor):
        return function(state)
    if isinstance(state, (tuple, list)):
        return _sequence_like(
            state, [function(value) if isinstance(value, Tensor) else _mapped(function, value) for value in state]
        )
    if isinstance(state, Mapping):
        return _mapping_like(state, {key: _mapped(function, value) for key, value in state.items()})
    return function(state)


def _sequence_like(sequence: Any, entries: list[Any]) -> Any:
    kind = type(sequence)
    return kind(*entries) if hasattr(sequence, "_fields") else kind(entries)


def _mapping_like(mapping: Any, entries: dict[Any, Any]) -> Any:
    """Returns `entries` in a mapping of the type of `mapping`.

    Raises:
        TypeError: the type can neither be copied and filled nor be called with a dict.
    """
    kind = type(mapping)
    if kind is dict:
        return entries
    for build in (_filled_copy, lambda _, wanted: kind(wanted)):
        with suppress(Exception):  # whatever a user's class raises
            found = build(mapping, entries)
            if list(found) == list(entries) and all(found[key] is value for key, value in entries.items()):
                return found
    raise TypeError(f"a {kind.__name__} can neither be copied and filled nor be made from a dict: use a dict in its place")


def _filled_copy(mapping: Any, entries: dict[Any, Any]) -> Any:
    found = copy.copy(mapping)
    found.clear()
    for key, value in entries.items():
        found[key] = value
    return found


def has_keys(state: State) -> bool:
    """Returns whether `state` holds a mapping."""
    if isinstance(state, (tuple, list)):
        return any(map(has_keys, [value for value in state if not isinstance(value, Tensor)]))
    return not isinstance(state, Tensor) and isinstance(state, Mapping)


def match_keys(nest: State, like: State, name: str, other: str) -> State:
    """Returns `nest` with the entries of its mappings in the order of `like`.

    Nests without mappings are returned as they are.

    Args:
        nest: the nest to reorder.
        like: a nest with the same keys.
        name: what errors call `nest`.
        other: what errors call `like`.

    Raises:
        ValueError: the keys differ, or one nest has a mapping where the other has none.
    """
    if isinstance(nest, Tensor) and isinstance(like, Tensor):
        return nest
    return _matched(nest, like, name, other) if has_keys(nest) or has_keys(like) else nest


def _matched(nest: State, like: State, name: str, other: str) -> State:
    if isinstance(like, Mapping) and isinstance(nest, Mapping):
        check_keys(list(nest), list(like), name, other)
        found = {key: _matched(nest[key], like[key], f"{name}[{key!r}]", f"{other}[{key!r}]") for key in like}
        same = list(nest) == list(found) and all(nest[key] is value for key, value in found.items())
        return nest if same else _mapping_like(nest, found)
    if isinstance(like, Mapping):
        kind = type(nest).__name__
        raise ValueError(f"{name} is a {kind}, {other} has the keys {_listed(like)}: give a dict with these keys")
    if isinstance(nest, Mapping):
        raise ValueError(f"{name} has the keys {_listed(nest)}, {other} has none: both need one structure")
    if isinstance(like, (tuple, list)) and isinstance(nest, (tuple, list)) and len(like) == len(nest):
        pairs = enumerate(zip(nest, like, strict=True))
        return _sequence_like(nest, [_matched(n, v, f"{name}[{i}]", f"{other}[{i}]") for i, (n, v) in pairs])
    return nest


def check_keys(found: Sequence[Any], expected: Sequence[Any], name: str, other: str) -> None:
    """Raises a ValueError that names the missing and the unexpected keys of `found`, if there are any."""
    missing = [key for key in expected if key not in found]
    unexpected = [key for key in found if key not in expected]
    parts = [f"{word} {_listed(keys)}" for word, keys in (("missing", missing), ("unexpected", unexpected)) if keys]
    if parts:
        raise ValueError(f"{name} and {other} must have the same keys; in {name}: {', '.join(parts)}")


def _listed(keys: Any) -> str:
    return ", ".join(repr(key) for key in keys)


def paths(state: State, start: str = "") -> list[str]:
    """Returns the place of every leaf, such as "['lstm'][0]", in the order of `flatten`; each begins with `start`."""
    if isinstance(state, Tensor):
        return [start]
    if isinstance(state, Mapping):
        return [path for key, value in state.items() for path in paths(value, f"{start}[{key!r}]")]
    if isinstance(state, (tuple, list)):
        return [path for i, value in enumerate(state) for path in paths(value, f"{start}[{i}]")]
    return [start]


def order_by_paths(state: State, places: Sequence[str], start: str = "") -> State:
    """Returns `state` with the entries of its mappings in the order in which their paths appear in `places`.

    `start` is the path of `state` itself, with which the paths of its entries begin; see `paths`.
    """
    if isinstance(state, Tensor):
        return state
    if isinstance(state, Mapping):
        first = {key: _first_with(places, f"{start}[{key!r}]") for key in state}
        keys = sorted(state, key=first.__getitem__)
        return _mapping_like(state, {key: order_by_paths(state[key], places, f"{start}[{key!r}]") for key in keys})
    if isinstance(state, (tuple, list)):
        return _sequence_like(state, [order_by_paths(v, places, f"{start}[{i}]") for i, v in enumerate(state)])
    return state


def _first_with(places: Sequence[str], prefix: str) -> int:
    return next((i for i, place in enumerate(places) if place.startswith(prefix)), len(places))


def structure(state: State) -> State:
    """Returns the nesting of `state` in dicts and lists, with None for every leaf."""
    if isinstance(state, Tensor):
        return None
    if isinstance(state, Mapping):
        return {key: structure(value) for key, value in state.items()}
    return [structure(value) for value in state] if isinstance(state, (tuple, list)) else None


def key_paths(state: State) -> list[str] | None:
    """Returns the `paths` of a state that holds a mapping, for a checkpoint to save with the leaves; else None."""
    return paths(state) if has_keys(state) else None


def saved_leaves(state: State) -> list[Any]:
    """Returns the leaves of `state` in the order of `flatten`, with traces as plain tensors, which a checkpoint can hold."""
    return [leaf.as_subclass(Tensor) if isinstance(leaf, Trace) else leaf for leaf in flatten(state)]


def from_saved(leaves: Sequence[Any], places: Sequence[str] | None, like: State) -> State:
    """Returns a saved state, nested like `like`.

    Args:
        leaves: what `saved_leaves` has returned.
        places: what `key_paths` has returned. None for leaves in the order of `flatten(like)`, as older versions saved them.
        like: a state of the model.

    Raises:
        ValueError: `like` has other keys than the saved state, or another number of leaves.
    """
    if places is not None:
        expected = paths(like)
        check_keys(places, expected, "the saved state", "the model's state")
        by_place = dict(zip(places, leaves, strict=True))
        leaves = [by_place[place] for place in expected]
    pairs = zip(leaves, flatten(like), strict=False)  # `unflatten` checks the number of leaves
    wrapped = [leaf.as_subclass(Trace) if isinstance(own, Trace) else leaf for leaf, own in pairs]
    return unflatten(like, [*wrapped, *leaves[len(wrapped) :]])


def check_leaves(state: State, name: str) -> None:
    """Raises a TypeError if a leaf of `state`, which could hide tensors, is neither a tensor nor of a type in `PLAIN`."""
    for leaf in flatten(state):
        if not isinstance(leaf, Tensor) and not isinstance(leaf, PLAIN):
            kind = type(leaf).__name__
            raise TypeError(f"{name} holds a {kind}: use tensors, or tuples, NamedTuples, lists and dicts of tensors")


def check_real(state: State, name: str) -> None:
    """Raises a ValueError if a leaf of `state` is a complex tensor, which receives no synthetic gradient."""
    for leaf in flatten(state):
        if isinstance(leaf, Tensor) and leaf.is_complex():
            raise ValueError(
                f"{name} holds a complex tensor, whose gradient synthesizers do not predict: carry "
                "torch.view_as_real(state) from window to window instead"
            )


HALF = (torch.float16, torch.bfloat16)
"""Half-precision dtypes. Interfaces convert them to float32 for synthesizers."""


def to_float32(leaf: Tensor) -> Tensor:
    """Returns `leaf`, converted to float32 if it has half precision."""
    return leaf.float() if leaf.dtype in HALF else leaf


def is_floating(leaf: Any) -> bool:
    """Returns whether `leaf` is a floating-point tensor that can receive a gradient; a `Trace` cannot."""
    return isinstance(leaf, Tensor) and leaf.is_floating_point() and not isinstance(leaf, Trace)


def floating(state: State) -> list[Tensor]:
    """Returns the floating-point leaves of `state`, in the order of `flatten`."""
    return [leaf for leaf in flatten(state) if is_floating(leaf)]


def with_floating(state: State, tensors: Sequence[Tensor]) -> State:
    """Returns `state` with its floating-point leaves replaced by `tensors`.

    Raises:
        ValueError: the state has another number of floating-point leaves.
    """
    expected = len(floating(state))
    if len(tensors) != expected:
        raise ValueError(f"the state has {expected} floating-point leaves, got {len(tensors)} tensors")
    source = iter(tensors)
    return map_floating(lambda _: next(source), state)


def map_floating(function: Callable[[Tensor], Tensor], state: State) -> State:
    """Returns `state` with `function` applied to its floating-point leaves."""
    return _mapped(lambda leaf: function(leaf) if is_floating(leaf) else leaf, state)


def detach(state: State) -> State:
    """Returns `state` detached from its graph; the leaves share memory with those of `state`."""
    return map_tensors(Tensor.detach, state)


def clone(state: State) -> State:
    """Returns `state` with every tensor copied to new memory; gradients flow through the copies."""
    return map_tensors(Tensor.clone, state)


def detach_clone(state: State) -> State:
    """Returns `state` detached from its graph and copied to new memory."""
    return map_tensors(lambda leaf: leaf.detach().clone(), state)


def map_tensors(function: Callable[[Tensor], Tensor], state: State) -> State:
    """Returns `state` with `function` applied to every tensor."""
    return _mapped(lambda leaf: function(leaf) if isinstance(leaf, Tensor) else leaf, state)


def map_together(function: Callable[[list[Any]], Any], nests: Sequence[State], name: str) -> State:
    """Returns a nest shaped like the first of `nests`; each leaf is `function` of the leaves at this place in all nests.

    Args:
        function: maps a list with one leaf of each nest to the new leaf.
        nests: at least one nest.
        name: what errors call a nest.

    Raises:
        ValueError: the nests differ in their keys or in their number of leaves.
    """
    first = nests[0]
    if all(isinstance(nest, Tensor) for nest in nests):
        return function(list(nests))
    rows = [flatten(match_keys(nest, first, name, f"{name} before them")) for nest in nests]
    counts = sorted({len(row) for row in rows})
    if len(counts) > 1:
        raise ValueError(f"{name} must always have the same number of tensors, got {counts[0]} and {counts[-1]}")
    return unflatten(first, [function(list(column)) for column in zip(*rows, strict=True)])


def broadcast_to_leaves(setting: Any, state: State, name: str) -> list[Any]:
    """Returns one value of `setting` for every leaf of `state`; `setting` is one value, or a nest shaped like the state.

    Raises:
        ValueError: `setting` is a nest with other keys or another number of leaves than the state.
    """
    count = len(flatten(state))
    if not isinstance(setting, (tuple, list, Mapping)):
        return [setting] * count
    values = flatten(match_keys(setting, state, name, "the state"))
    if len(values) != count:
        raise ValueError(f"{name} has {len(values)} leaves, the state has {count}: give one value, or one for every leaf")
    return values


def lane_mask(keep: Tensor, leaf: Tensor, batch_dim: int) -> Tensor:
    """Returns `keep` [B] in a shape that broadcasts over `leaf`, whose lanes lie along `batch_dim`.

    Raises:
        ValueError: the leaf has no dimension `batch_dim`, or not as many lanes as `keep`.
    """
    if leaf.dim() == 0 or not -leaf.dim() <= batch_dim < leaf.dim():
        raise ValueError(
            f"a state of shape {tuple(leaf.shape)} has no dimension {batch_dim}: set state_batch_dim; {SEE_CHECK}"
        )
    if leaf.shape[batch_dim] != keep.shape[0]:
        raise ValueError(
            f"ends has {keep.shape[0]} lanes, the state of shape {tuple(leaf.shape)} has {leaf.shape[batch_dim]} "
            f"along dimension {batch_dim}: set state_batch_dim; {SEE_CHECK}"
        )
    shape = [1] * leaf.dim()
    shape[batch_dim] = -1
    return keep.reshape(shape)


def reset_lanes(state: State, ends: Tensor, initial: State | None, batch_dim: Any = 1) -> State:
    """Returns `state` with the lanes that `ends` [B] marks set to `initial`, or to zeros if `initial` is None.

    The other lanes keep their values. `batch_dim` is an int, or a nest of ints shaped like the state.

    Raises:
        ValueError: `initial` or `batch_dim` is not nested like `state`.
    """
    leaves = flatten(state)
    starts = [None] * len(leaves)
    if initial is not None:
        starts = flatten(match_keys(initial, state, "the initial state", "the state"))
    if len(starts) != len(leaves):
        raise ValueError(f"the initial state has {len(starts)} leaves, the state has {len(leaves)}; {SEE_CHECK}")
    fresh = []
    for leaf, start, dim in zip(leaves, starts, broadcast_to_leaves(batch_dim, state, "state_batch_dim"), strict=True):
        if not isinstance(leaf, Tensor):
            fresh.append(leaf)
            continue
        start = torch.zeros_like(leaf) if start is None else start.to(leaf)
        fresh.append(torch.where(lane_mask(ends, leaf, dim), start, leaf))
    return unflatten(state, fresh)


def map_lanes(function: Callable[[Tensor, int], Tensor], state: State, batch_dim: Any) -> State:
    """Returns `state` with `function(leaf, dim)` applied to every tensor; `dim` is the dimension of its lanes."""
    dims = broadcast_to_leaves(batch_dim, state, "state_batch_dim")
    pairs = zip(flatten(state), dims, strict=True)
    return unflatten(state, [function(leaf, dim) if isinstance(leaf, Tensor) else leaf for leaf, dim in pairs])
