"""Finds NaN and infinity in a step, counts the steps that were skipped for them, and selects without a host synchronisation.

Legend: B = lanes.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from dni_seq.core import states
from dni_seq.core.states import State


class NonFiniteError(ArithmeticError):
    """NaNs or infinities at too many windows in a row; the text says where they first appeared."""


def readable_without_sync(flag: Tensor) -> bool:
    """Whether `flag` can be read without waiting for a device."""
    return flag.device.type == "cpu"


def both_finite(one: Tensor, other: Tensor) -> Tensor:
    """0-d bool: whether two 0-d numbers are finite, in three operations (`torch.isfinite` takes four for one number)."""
    total = one + other
    return total - total == 0


def select_where(good: Tensor, new: State, old: State) -> State:
    """`new` where `good` (0-d bool) holds, else `old`, leaf by leaf, on the device."""
    pairs = zip(states.flatten(new), states.flatten(old), strict=True)
    return states.unflatten(new, [torch.where(good, n, o.to(n)) if isinstance(n, Tensor) else n for n, o in pairs])


class SkipCounter:
    """How often a flag was False: in all, and in a row up to now. Counted where the flag is."""

    def __init__(self) -> None:
        self._total: int | Tensor = 0
        self._in_a_row: int | Tensor = 0

    def add(self, good: Tensor) -> None:
        """Count one flag, 0-d bool."""
        if readable_without_sync(good):
            self._in_a_row = 0 if good else int(self._in_a_row) + 1
            self._total = int(self._total) + (self._in_a_row > 0)
        else:
            self._in_a_row = torch.where(good, 0, self._in_a_row + 1)
            self._total = self._total + ~good

    @property
    def total(self) -> int:
        """How often in all; this waits for the device."""
        return int(self._total)

    @property
    def in_a_row(self) -> int:
        """How often in a row up to now; this waits for the device."""
        return int(self._in_a_row)

    def end_row(self) -> None:
        """Begin a new row."""
        self._in_a_row = 0

    def state_dict(self) -> dict[str, int]:
        """Both counts."""
        return {"total": self.total, "in_a_row": self.in_a_row}

    def load_state_dict(self, saved: dict[str, int]) -> None:
        """Take over what `state_dict` gave."""
        self._total, self._in_a_row = saved["total"], saved["in_a_row"]


def broken_lanes(state: State, batch_dim: Any) -> Tensor | None:
    """[B] bool, the lanes in which the state has a NaN or an infinity; None where it has none."""
    broken = None
    for leaf, dim in zip(
        states.flatten(state), states.broadcast_to_leaves(batch_dim, state, "state_batch_dim"), strict=True
    ):
        if states.is_floating(leaf) and leaf.dim() and not leaf.isfinite().all():
            bad = ~leaf.isfinite().movedim(dim, 0).reshape(leaf.shape[dim], -1).all(dim=1)
            broken = bad if broken is None else broken | bad
    return broken


def first_nonfinite(named: Iterable[tuple[str, Any]]) -> tuple[int, str]:
    """Which nest of tensors, of those given with their names in the order of computation, first holds a NaN or an infinity.

    Returns its place in that order, and a text that names it, with the index and the value of its first such element.
    """
    place = 0
    for place, (name, nest) in enumerate(named):
        for leaf in states.floating(states.detach(nest)):
            if leaf.isfinite().all():
                continue
            index = [int(i) for i in (~leaf.isfinite()).nonzero()[0]]
            value = float(leaf[tuple(index)])
            where = f" at index {index} of shape {list(leaf.shape)}" if index else ""
            return place, f"{name} ({value}{where})"
    return place + 1, "the norm of the gradient, whose elements are finite: it overflows"
