"""Nested recurrent states: a tensor, or any nest of tuples, NamedTuples, lists and dicts of tensors.

Leaves that are not floating-point tensors, such as step counters, are kept as they are and never receive gradients.

Legend: B = lanes, H = hidden units, L = layers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

State = Any
"""A nest of tensors, which Python's type system cannot describe more exactly."""

SEE_CHECK = "dni_seq.check_model(model, inputs) shows what the model does"
"""The end of messages about states that do not fit."""


def flatten(state: State) -> list[Any]:
    """Returns the leaves of `state` in a fixed order: by position, and by insertion in dicts."""
    if isinstance(state, dict):
        state = state.values()
    elif not isinstance(state, (tuple, list)):
        return [state]
    leaves: list[Any] = []
    for value in state:
        # Tensors need no recursive call, whose cost is noticeable several times a step.
        leaves += [value] if isinstance(value, Tensor) else flatten(value)
    return leaves


def unflatten(like: State, leaves: Sequence[Any]) -> State:
    """Returns a nest shaped like `like` that holds `leaves`.

    Raises:
        ValueError: `like` has another number of leaves.
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
    if isinstance(state, dict):
        return {key: _mapped(function, value) for key, value in state.items()}
    if isinstance(state, (tuple, list)):
        found = [function(value) if isinstance(value, Tensor) else _mapped(function, value) for value in state]
        return type(state)(*found) if hasattr(state, "_fields") else type(state)(found)
    return function(state)


HALF = (torch.float16, torch.bfloat16)
"""Half-precision dtypes. Interfaces convert them to float32 for synthesizers."""


def to_float32(leaf: Tensor) -> Tensor:
    """Returns `leaf`, converted to float32 if it has half precision."""
    return leaf.float() if leaf.dtype in HALF else leaf


def is_floating(leaf: Any) -> bool:
    """Returns whether `leaf` is a floating-point tensor, which can receive a gradient."""
    return isinstance(leaf, Tensor) and leaf.is_floating_point()


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
    return _map_tensors(Tensor.detach, state)


def clone(state: State) -> State:
    """Returns `state` with every tensor copied to new memory; gradients flow through the copies."""
    return _map_tensors(Tensor.clone, state)


def detach_clone(state: State) -> State:
    """Returns `state` detached from its graph and copied to new memory."""
    return _map_tensors(lambda leaf: leaf.detach().clone(), state)


def _map_tensors(function: Callable[[Tensor], Tensor], state: State) -> State:
    return _mapped(lambda leaf: function(leaf) if isinstance(leaf, Tensor) else leaf, state)


def broadcast_to_leaves(setting: Any, state: State, name: str) -> list[Any]:
    """Returns one value of `setting` for every leaf of `state`; `setting` is one value, or a nest shaped like the state.

    Raises:
        ValueError: `setting` is a nest with another number of leaves than the state.
    """
    count = len(flatten(state))
    if not isinstance(setting, (tuple, list, dict)):
        return [setting] * count
    values = flatten(setting)
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

    Other lanes are bit-identical. `batch_dim` is an int, or a nest of ints shaped like the state.

    Raises:
        ValueError: `initial` or `batch_dim` is not nested like `state`.
    """
    leaves = flatten(state)
    starts = [None] * len(leaves) if initial is None else flatten(initial)
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
