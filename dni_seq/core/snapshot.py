"""Snapshots that make a training step atomic: what a step may change, and how it is put back."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import NamedTuple

import torch
from torch import Tensor, nn

LARGE = 1 << 16
"""Elements of a buffer above which it is copied only when its version has changed; `.data` writes there go unseen."""


class _Entry(NamedTuple):
    """A tensor of a module, its version, and a copy of what it held."""

    tensor: Tensor
    version: int
    copy: Tensor


class TensorSnapshot:
    """Tensors of modules as they were at the latest `keep`, to be put back in their places.

    Args:
        tables: the modules' own dicts of tensors: see `buffers_of`, `parameters_of`. Entries may come and go.
    """

    def __init__(self, tables: Sequence[dict[str, Tensor | None]]) -> None:
        self._tables = tables
        self._entries: list[dict[str, _Entry | None]] = [{} for _ in tables]

    def keep(self) -> TensorSnapshot:
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


class TrainingSnapshot:
    """Modules and their optimizers, to be put back after steps of the optimizers: a copy of everything.

    Args:
        modules: whose parameters and buffers to keep.
        optimizers: whose state to keep.
    """

    def __init__(self, modules: Sequence[nn.Module | None], optimizers: Iterable[torch.optim.Optimizer | None]) -> None:
        self._tensors = TensorSnapshot([*parameters_of(modules), *buffers_of(modules)]).keep()
        self._optimizers = [(each, copy.deepcopy(each.state_dict())) for each in optimizers if each is not None]

    def restore(self) -> None:
        """Put everything back."""
        self._tensors.restore()
        for optimizer, state in self._optimizers:
            optimizer.load_state_dict(state)


class RNGState(NamedTuple):
    """torch's random state: of the CPU, and of one GPU where `device` is one."""

    device: torch.device
    cpu: Tensor
    gpu: Tensor | None

    @classmethod
    def now(cls, device: torch.device) -> RNGState:
        """As it is."""
        return cls(device, torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None)

    def restore(self) -> None:
        """As it was."""
        torch.set_rng_state(self.cpu)
        if self.gpu is not None:
            torch.cuda.set_rng_state(self.gpu, self.device)


class ReentrancyGuard:
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
