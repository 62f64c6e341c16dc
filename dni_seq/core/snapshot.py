"""A step happens whole or not at all: what to put back where code or numbers fail, and how failures are counted.

On the CPU a 0-d tensor is read for nothing, and a bad step is left out there and then. On a GPU nobody waits for it: fused
optimizers leave a step out by themselves, states and buffers are chosen by `torch.where`, and the counts are read now and
then.

Legend: B = lanes.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dni_seq.core import states
from dni_seq.core.states import State

LARGE = 1 << 16
"""Elements of a buffer above which it is copied only when its version has changed; `.data` writes there go unseen."""


class NonFiniteError(ArithmeticError):
    """NaNs or infinities at too many windows in a row; the text says where they first appeared."""


def decided_here(flag: Tensor) -> bool:
    """Whether `flag` can be read without waiting for a device."""
    return flag.device.type == "cpu"


def all_finite(one: Tensor, other: Tensor) -> Tensor:
    """0-d bool: whether two 0-d numbers are finite, in three operations (`torch.isfinite` takes four for one number)."""
    total = one + other
    return total - total == 0


def choose(good: Tensor, new: State, old: State) -> State:
    """`new` where `good` (0-d bool) holds, else `old`, leaf by leaf, on the device."""
    pairs = zip(states.flatten(new), states.flatten(old), strict=True)
    return states.unflatten(new, [torch.where(good, n, o.to(n)) if isinstance(n, Tensor) else n for n, o in pairs])


class Tally:
    """How often a flag was False: in all, and in a row up to now. Counted where the flag is."""

    def __init__(self) -> None:
        self._total: int | Tensor = 0
        self._in_a_row: int | Tensor = 0

    def add(self, good: Tensor) -> None:
        """Count one flag, 0-d bool."""
        if decided_here(good):
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


class _Entry(NamedTuple):
    """A tensor of a module, its version, and a copy of what it held."""

    tensor: Tensor
    version: int
    copy: Tensor


class Kept:
    """Tensors of modules as they were at the latest `keep`, to be put back in their places.

    Args:
        tables: the modules' own dicts of tensors: see `buffers_of`, `parameters_of`. Entries may come and go.
    """

    def __init__(self, tables: Sequence[dict[str, Tensor | None]]) -> None:
        self._tables = tables
        self._entries: list[dict[str, _Entry | None]] = [{} for _ in tables]

    def keep(self) -> Kept:
        """Copy what the tensors hold now."""
        for i, table in enumerate(self._tables):
            if table or self._entries[i]:
                before = self._entries[i]
                self._entries[i] = {name: _entry(tensor, before.get(name)) for name, tensor in table.items()}
        return self

    @torch.no_grad()
    def restore(self) -> None:
        """Put back what was kept; entries that came since go, those that went come back."""
        for table, entries in zip(self._tables, self._entries, strict=True):
            for name in table.keys() - entries.keys():
                del table[name]
            for name, entry in entries.items():
                table[name] = None if entry is None else entry.tensor.copy_(entry.copy)

    @torch.no_grad()
    def restore_unless(self, good: Tensor) -> None:
        """The same where `good` (0-d bool) does not hold, on the device; entries that came since become zeros."""
        for table, entries in zip(self._tables, self._entries, strict=True):
            for name, tensor in table.items():
                if tensor is not None:
                    entry = entries.get(name)
                    tensor.copy_(torch.where(good, tensor, 0 if entry is None else entry.copy))


def _entry(tensor: Tensor | None, before: _Entry | None) -> _Entry | None:
    if tensor is None:
        return None
    same = before is not None and before.tensor is tensor and before.version == tensor._version
    if same and tensor.numel() > LARGE:
        return before
    return _Entry(tensor, tensor._version, tensor.detach().clone())


def buffers_of(modules: Iterable[nn.Module | None]) -> list[dict[str, Tensor | None]]:
    """The dicts of buffers of modules and all that is in them."""
    return [part._buffers for module in modules if module is not None for part in module.modules()]


@contextmanager
def buffers_apart(model: nn.Module) -> Iterator[None]:
    """In the block the model has copies of its buffers, which are dropped behind it: those of training stay as they are.

    The originals are not written to, since a graph of training may still read them.
    """
    tables = buffers_of([model])
    kept = [dict(table) for table in tables]
    copies: dict[int, Tensor] = {}
    for table in tables:
        for name, tensor in table.items():
            if tensor is not None:
                table[name] = copies.setdefault(id(tensor), tensor.clone())
    try:
        yield
    finally:
        for table, entries in zip(tables, kept, strict=True):
            table.clear()
            table.update(entries)


def parameters_of(modules: Iterable[nn.Module | None]) -> list[dict[str, Tensor | None]]:
    """The dicts of parameters of modules and all that is in them."""
    return [
        part._parameters  # type: ignore[misc]
        for module in modules
        if module is not None
        for part in module.modules()
    ]


class Whole:
    """Modules and their optimizers, to be put back after steps of the optimizers: a copy of everything.

    Args:
        modules: whose parameters and buffers to keep.
        optimizers: whose state to keep.
    """

    def __init__(self, modules: Sequence[nn.Module | None], optimizers: Iterable[torch.optim.Optimizer | None]) -> None:
        self._tensors = Kept([*parameters_of(modules), *buffers_of(modules)]).keep()
        self._optimizers = [(each, copy.deepcopy(each.state_dict())) for each in optimizers if each is not None]

    def restore(self) -> None:
        """Put everything back."""
        self._tensors.restore()
        for optimizer, state in self._optimizers:
            optimizer.load_state_dict(state)


class Randomness(NamedTuple):
    """torch's random state: of the CPU, and of one GPU where `device` is one."""

    device: torch.device
    cpu: Tensor
    gpu: Tensor | None

    @classmethod
    def now(cls, device: torch.device) -> Randomness:
        """As it is."""
        return cls(device, torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None)

    def restore(self) -> None:
        """As it was."""
        torch.set_rng_state(self.cpu)
        if self.gpu is not None:
            torch.cuda.set_rng_state(self.gpu, self.device)


class Alone:
    """A context that only one caller is in at a time.

    Args:
        message: of the RuntimeError for a second one.
    """

    def __init__(self, message: str) -> None:
        self._message = message
        self._inside = False

    def __enter__(self) -> None:
        if self._inside:
            raise RuntimeError(self._message)
        self._inside = True

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._inside = False


def broken_lanes(state: State, batch_dim: Any) -> Tensor | None:
    """[B] bool, the lanes in which the state has a NaN or an infinity; None where it has none."""
    broken = None
    for leaf, dim in zip(states.flatten(state), states.spread(batch_dim, state, "state_batch_dim"), strict=True):
        if states.is_floating(leaf) and leaf.dim() and not leaf.isfinite().all():
            bad = ~leaf.isfinite().movedim(dim, 0).reshape(leaf.shape[dim], -1).all(dim=1)
            broken = bad if broken is None else broken | bad
    return broken


def first_not_finite(named: Iterable[tuple[str, Any]]) -> tuple[int, str]:
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
