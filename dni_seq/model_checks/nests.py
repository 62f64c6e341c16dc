"""Names and texts for nested states: the path of each leaf, and what a nest consists of."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from dni_seq.core import states
from dni_seq.core.states import State

LONGEST = 240
"""Number of characters after which the text of a nest is cut."""


def paths(state: State, name: str = "state") -> list[str]:
    """Returns the path of each leaf, such as `state["units"][0]`, in the order of `states.flatten`."""
    count = len(states.flatten(state))
    found = [f"leaf {i} of {name}" for i in range(count)]

    def visit(nest: Any, path: str) -> None:
        if isinstance(nest, Mapping):
            for key, value in nest.items():
                visit(value, f"{path}[{key!r}]")
        elif isinstance(nest, (tuple, list)):
            fields = getattr(nest, "_fields", None)
            for i, value in enumerate(nest):
                visit(value, f"{path}.{fields[i]}" if fields else f"{path}[{i}]")
        elif isinstance(nest, int):
            found[nest] = path

    visit(states.unflatten(state, list(range(count))), name)
    return found


def named(state: State, name: str = "state") -> dict[str, Any]:
    """Returns the leaves of `state` by their paths."""
    return dict(zip(paths(state, name), states.flatten(state), strict=True))


def in_order_of(nest: State, like: State) -> State:
    """Returns `nest` with the keys of its dicts in the order of `like`; a dict with other keys is unchanged."""
    if isinstance(nest, dict) and isinstance(like, dict) and nest.keys() == like.keys():
        return {key: in_order_of(nest[key], like[key]) for key in like}
    if isinstance(nest, (tuple, list)) and isinstance(like, (tuple, list)) and len(nest) == len(like):
        found = [in_order_of(one, other) for one, other in zip(nest, like, strict=True)]
        return type(nest)(*found) if hasattr(nest, "_fields") else type(nest)(found)
    return nest


def describe(leaf: Any) -> str:
    """Returns the dtype and shape of a tensor, such as "float32 [2, 3]", or the type and value of anything else."""
    if isinstance(leaf, Tensor):
        return f"{str(leaf.dtype).removeprefix('torch.')} {list(leaf.shape)}"
    return repr(leaf) if isinstance(leaf, (int, float, str, type(None))) else f"a {type(leaf).__name__}"


def describe_nest(state: State, leaf_text: Callable[[Any], str] = describe) -> str:
    """Returns the nest as text, such as "(float32 [1, 3, 5], float32 [1, 3, 5])"; dicts are sorted by key."""
    text = _nest_text(state, leaf_text)
    return text if len(text) <= LONGEST else text[: LONGEST - 3] + "..."


def _nest_text(state: State, leaf_text: Callable[[Any], str]) -> str:
    if isinstance(state, Mapping):
        items = sorted(state.items(), key=lambda item: repr(item[0]))
        return "{" + ", ".join(f"{key!r}: {_nest_text(value, leaf_text)}" for key, value in items) + "}"
    if not isinstance(state, (tuple, list)):
        return leaf_text(state)
    parts = [_nest_text(value, leaf_text) for value in state]
    if isinstance(state, list):
        return f"[{', '.join(parts)}]"
    fields = getattr(state, "_fields", None)
    if fields:
        return f"{type(state).__name__}({', '.join(f'{f}={part}' for f, part in zip(fields, parts, strict=True))})"
    return f"({', '.join(parts)}{',' * (len(parts) == 1)})"


def difference(first: State, last: State) -> tuple[str | None, bool]:
    """Compares two states' nesting, shapes and dtypes.

    Returns:
        A text that says what differs, or None; and whether nesting and shapes agree, so that the leaves can be compared.
    """
    kinds = [_nest_text(state, lambda _: "leaf") for state in (first, last)]
    before, after = named(first), named(last)
    if kinds[0] != kinds[1] or before.keys() != after.keys():
        return f"the first state is {describe_nest(first)}, the last {describe_nest(last)}", False
    for path, leaf in before.items():
        other = after[path]
        if isinstance(leaf, Tensor) != isinstance(other, Tensor) or (isinstance(leaf, Tensor) and leaf.shape != other.shape):
            return f"{path} is {describe(leaf)} in the first state and {describe(other)} in the last", False
    for path, leaf in before.items():
        other = after[path]
        if isinstance(leaf, Tensor) and leaf.dtype != other.dtype:
            text = f"{path} is {describe(leaf)} in the first state and {describe(other)} in the last"
            return text, states.is_floating(leaf) and states.is_floating(other)
    return None, True
