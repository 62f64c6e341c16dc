"""Finds NaNs and infinities in a step, counts skipped steps, and selects tensors without a host synchronisation.

Legend: B = lanes.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from dni_seq.core import states
from dni_seq.core.snapshot import Restorable
from dni_seq.core.states import State


class NonFiniteError(ArithmeticError):
    """Raised by `SequenceTrainer.step` if too many windows in a row were skipped.

    The message names the first tensor, in the order of computation, that held a NaN or an infinity in the last of these
    windows. The parameters have the values from before the first of them. `SequenceTrainer.skip_limit` sets how many windows
    are too many.
    """


def readable_without_sync(flag: Tensor) -> bool:
    """Returns whether the host can read `flag` without waiting for a device; True for a tensor on the CPU."""
    return flag.device.type == "cpu"


def both_finite(one: Tensor, other: Tensor) -> Tensor:
    """Returns whether both of two 0-d numbers are finite, a 0-d bool.

    This runs three operations for the two numbers; `torch.isfinite` runs four operations for one number.
    """
    total = one + other
    return total - total == 0


def all_finite(nest: Any) -> bool:
    """Returns whether no floating-point tensor of a nest holds a NaN or an infinity; waits for a GPU."""
    return all(bool(leaf.detach().isfinite().all()) for leaf in states.floating(nest))


def module_is_finite(module: nn.Module) -> bool:
    """Returns whether no parameter or buffer of a module holds a NaN or an infinity; waits for a GPU."""
    return all(bool(tensor.isfinite().all()) for tensor in (*module.parameters(), *module.buffers()))


def select_where(good: Tensor, new: State, old: State) -> State:
    """Returns `new` if `good` (0-d bool) is true, else `old`; selects leaf by leaf on the device.

    If a leaf is a tensor in `new` and None in `old`, the old leaf counts as zeros.
    """
    old = states.match_keys(old, new, "the old state", "the new state")
    pairs = zip(states.flatten(new), states.flatten(old), strict=True)
    return states.unflatten(new, [_select(good, n, o) if isinstance(n, Tensor) else n for n, o in pairs])


def _select(good: Tensor, new: Tensor, old: Tensor | None) -> Tensor:
    return torch.where(good, new, 0 if old is None else old.to(new))


class SkipCounter(Restorable):
    """Counts how often a flag was False, in total and in a row, on the device of the flag."""

    def __init__(self) -> None:
        self._total: int | Tensor = 0
        self._in_a_row: int | Tensor = 0

    def add(self, good: Tensor) -> None:
        """Counts one flag, 0-d bool."""
        if readable_without_sync(good):
            self._in_a_row = 0 if good else int(self._in_a_row) + 1
            self._total = int(self._total) + (self._in_a_row > 0)
        else:
            self._in_a_row = torch.where(good, 0, self._in_a_row + 1)
            self._total = self._total + ~good

    @property
    def total(self) -> int:
        """How often the flag was False in total; reading it waits for the device."""
        return int(self._total)

    @property
    def in_a_row(self) -> int:
        """How often the flag was False in a row up to now; reading it waits for the device."""
        return int(self._in_a_row)

    def end_row(self) -> None:
        """Sets the count in a row to 0."""
        self._in_a_row = 0

    def state_dict(self) -> dict[str, int]:
        """Returns both counts."""
        return {"total": self.total, "in_a_row": self.in_a_row}

    def load_state_dict(self, saved: dict[str, int]) -> None:
        """Restores what `state_dict` returned."""
        self._total, self._in_a_row = saved["total"], saved["in_a_row"]


def has_nonfinite(leaf: Any) -> bool:
    """Returns whether `leaf` is a tensor, real or complex, that holds a NaN or an infinity."""
    return is_numeric(leaf) and not bool(leaf.isfinite().all())


def is_numeric(leaf: Any) -> bool:
    """Returns whether `leaf` is a tensor of real or complex numbers, which may be NaN or infinite."""
    return isinstance(leaf, Tensor) and (leaf.is_floating_point() or leaf.is_complex())


def broken_lanes(state: State, batch_dim: Any) -> Tensor | None:
    """Returns the lanes whose state holds a NaN or an infinity, [B] bool, or None if no lane does."""
    broken = nonfinite_lanes(state, batch_dim)
    return None if broken is None or not bool(broken.any()) else broken


def nonfinite_lanes(state: State, batch_dim: Any) -> Tensor | None:
    """Returns for each lane whether its state holds a NaN or an infinity, [B] bool, on the device.

    None if no leaf of the state is a tensor of numbers, real or complex, with a dimension of lanes.
    """
    broken = None
    dims = states.broadcast_to_leaves(batch_dim, state, "state_batch_dim")
    for leaf, dim in zip(states.flatten(state), dims, strict=True):
        if is_numeric(leaf) and leaf.dim():
            bad = ~leaf.isfinite().movedim(dim, 0).reshape(leaf.shape[dim], -1).all(dim=1)
            broken = bad if broken is None else broken | bad
    return broken


def first_nonfinite(named: Iterable[tuple[str, Any]]) -> tuple[int, str]:
    """Returns the first nest of tensors that holds a NaN or an infinity.

    Args:
        named: (name, nest of tensors) in the order of computation.

    Returns:
        The nest's position in `named`, and a text with its name and the value and index of its first element that is not
        finite. If all elements are finite, the position after the last nest, and a text that says that the gradient norm has
        overflowed.
    """
    place = 0
    for place, (name, nest) in enumerate(named):
        for leaf in states.flatten(states.detach(nest)):
            if not has_nonfinite(leaf):
                continue
            index = [int(i) for i in (~leaf.isfinite()).nonzero()[0]]
            value = leaf[tuple(index)].item()
            where = f" at index {index} of shape {list(leaf.shape)}" if index else ""
            return place, f"{name} ({value}{where})"
    return place + 1, "the gradient norm, which overflows although all elements are finite"
