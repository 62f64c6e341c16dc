"""Makes a training step atomic: snapshots of tensors, optimizers and random state for rollback."""

from __future__ import annotations

import copy
import random
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

LARGE = 1 << 16
"""A tensor with more elements than this is copied again only if its version counter has changed since the last copy.

Writes through `.data` do not change the version counter, so they are missed in such a tensor."""


class _Entry(NamedTuple):
    """A tensor of a module, its version, and a copy of its values."""

    tensor: Tensor
    version: int
    copy: Tensor


class TensorSnapshot:
    """Copies the tensors of modules at each `keep`, and restores them in place.

    Args:
        tables: the modules' own dicts of tensors; see `buffers_of` and `parameters_of`. Entries may be added and removed.
    """

    def __init__(self, tables: Sequence[dict[str, Tensor | None]]) -> None:
        self._tables = tables
        self._entries: list[dict[str, _Entry | None]] = [{} for _ in tables]

    def keep(self) -> TensorSnapshot:
        """Copies the current values; returns self."""
        for i, table in enumerate(self._tables):
            if table or self._entries[i]:
                before = self._entries[i]
                self._entries[i] = {name: _entry(tensor, before.get(name)) for name, tensor in table.items()}
        return self

    @torch.no_grad()
    def restore(self) -> None:
        """Restores the kept values; removes entries added since `keep`, and brings back entries removed since then."""
        for table, entries in zip(self._tables, self._entries, strict=True):
            for name in table.keys() - entries.keys():
                del table[name]
            for name, entry in entries.items():
                table[name] = None if entry is None else entry.tensor.copy_(entry.copy)

    @torch.no_grad()
    def restore_unless(self, good: Tensor) -> None:
        """If `good` (0-d bool) is false, restores the kept values on the device and zeroes entries added since `keep`."""
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
    """Returns the dicts of buffers of all modules and their submodules."""
    return [part._buffers for module in modules if module is not None for part in module.modules()]


@contextmanager
def buffers_apart(model: nn.Module) -> Iterator[None]:
    """Gives the model copies of its buffers in the block, and puts the originals back after it.

    The originals are not written to, because a graph of training may still read them.
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


@contextmanager
def undo_runs(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Undoes after the block what forward and backward passes of `model` change, except values of parameters.

    Restores buffers, `.grad`, training mode, all other attributes of its modules, and the random state of torch and Python.
    In the block all `.grad` are None.

    Args:
        model: the model.
        device: the device whose random state is restored besides the CPU's.
    """
    randomness, python_randomness = RNGState.now(device), random.getstate()
    attributes = [(vars(part), dict(vars(part))) for part in model.modules()]
    gradients = [(parameter, parameter.grad) for parameter in model.parameters()]
    for parameter, _ in gradients:
        parameter.grad = None
    try:
        with buffers_apart(model):
            yield
    finally:
        for table, kept in attributes:
            table.clear()
            table.update(kept)
        for parameter, gradient in gradients:
            parameter.grad = gradient
        randomness.restore()
        random.setstate(python_randomness)


def parameters_of(modules: Iterable[nn.Module | None]) -> list[dict[str, Tensor | None]]:
    """Returns the dicts of parameters of all modules and their submodules."""
    return [
        part._parameters  # type: ignore[misc]
        for module in modules
        if module is not None
        for part in module.modules()
    ]


class TrainingSnapshot:
    """Copies modules and their optimizers in full, so that optimizer steps can be undone.

    Args:
        modules: their parameters and buffers are copied.
        optimizers: their states are copied.
    """

    def __init__(self, modules: Sequence[nn.Module | None], optimizers: Iterable[torch.optim.Optimizer | None]) -> None:
        self._tensors = TensorSnapshot([*parameters_of(modules), *buffers_of(modules)]).keep()
        self._optimizers = [(each, copy.deepcopy(each.state_dict())) for each in optimizers if each is not None]

    def restore(self) -> None:
        """Restores all parameters, buffers and optimizer states."""
        self._tensors.restore()
        for optimizer, state in self._optimizers:
            optimizer.load_state_dict(state)


class Restorable:
    """Base class of objects that a training step changes, so that the step can be undone.

    A snapshot covers every attribute. There is no list of names in which a new attribute could be forgotten. For an
    attribute that is `Restorable`, the snapshot covers that object's attributes too. Lists, deques, dicts and sets are
    copied, one level deep. Numbers, texts, tuples and tensors are kept by reference, so a subclass must assign a new tensor
    and never write into the old one. `check_attributes` rejects attributes of all other types, except those that the class
    lists in `UNCHANGING`.
    """

    UNCHANGING: ClassVar[tuple[type, ...]] = ()
    """Further types of attributes that a step does not change, or that other code copies and restores."""

    def snapshot(self) -> dict[str, Any]:
        """Returns the values of all attributes, for `restore`."""
        return {name: _kept(value) for name, value in vars(self).items()}

    def restore(self, kept: dict[str, Any]) -> None:
        """Restores what `snapshot` returned; removes attributes added since then. May be called several times.

        Raises:
            RuntimeError: a tensor of the snapshot was written to in place.
        """
        attributes = vars(self)
        for name in attributes.keys() - kept.keys():
            del attributes[name]
        for name, value in kept.items():
            attributes[name] = _restored(value, f"{type(self).__name__}.{name}")

    def check_attributes(self) -> None:
        """Raises a TypeError if an attribute has a type that a snapshot does not cover."""
        for name, value in vars(self).items():
            if isinstance(value, Restorable):
                value.check_attributes()
            elif not isinstance(value, (*_BY_REFERENCE, *_CONTAINERS, *self.UNCHANGING)):
                raise TypeError(
                    f"{type(self).__name__}.{name} is a {type(value).__name__}, which a snapshot does not cover: make it "
                    "Restorable, or name its type in UNCHANGING if a step does not change it"
                )


_CONTAINERS = (list, deque, dict, set)

_BY_REFERENCE = (bool, int, float, str, type(None), tuple, Tensor, nn.Module, torch.optim.Optimizer)
"""Types of attributes that are kept by reference. `TensorSnapshot` and `TrainingSnapshot` copy modules and optimizers."""


class _Nested(NamedTuple):
    """A `Restorable` attribute and its snapshot."""

    part: Restorable
    kept: dict[str, Any]


class _Versioned(NamedTuple):
    """A tensor and its version counter, which every write in place increases."""

    tensor: Tensor
    version: int


def _kept(value: Any) -> Any:
    if isinstance(value, Restorable):
        return _Nested(value, value.snapshot())
    if isinstance(value, _CONTAINERS):
        return copy.copy(value)
    return _Versioned(value, value._version) if isinstance(value, Tensor) else value


def _restored(kept: Any, name: str) -> Any:
    if isinstance(kept, _Nested):
        kept.part.restore(kept.kept)
        return kept.part
    if isinstance(kept, _CONTAINERS):
        return copy.copy(kept)
    if isinstance(kept, _Versioned):
        if kept.tensor._version != kept.version:
            raise RuntimeError(f"{name} was written to in place, so that the step cannot be undone: assign a new tensor")
        return kept.tensor
    return kept


class RNGState(NamedTuple):
    """The random state of torch on the CPU, and on `device` if that is a GPU."""

    device: torch.device
    cpu: Tensor
    gpu: Tensor | None

    @classmethod
    def now(cls, device: torch.device) -> RNGState:
        """Returns the current random state."""
        return cls(device, torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None)

    def restore(self) -> None:
        """Restores the random state."""
        torch.set_rng_state(self.cpu)
        if self.gpu is not None:
            torch.cuda.set_rng_state(self.gpu, self.device)


class ReentrancyGuard:
    """A context manager that raises a RuntimeError if it is entered while it is active.

    Args:
        message: the text of the RuntimeError.
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
