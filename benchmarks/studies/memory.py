"""Memory of a training step: the peak of the process, and the tensors that autograd saves."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks


def reset_peak() -> None:
    """Resets the peak memory that Linux counts for this process."""
    Path("/proc/self/clear_refs").write_text("5")


def peak_mib() -> int:
    """Returns the peak memory of the process since `reset_peak`, in MiB."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:"))
    return round(int(line.split()[1]) / 1024)


def saved_bytes(step: Callable[[], object], modules: Iterable[nn.Module]) -> int:
    """Runs a step and returns the number of bytes that autograd saves in it for backward passes, summed over all graphs.

    Several views of one storage count once. The parameters and buffers of `modules` do not count. The number depends on
    shapes only, so it is the same on every run.

    Args:
        step: one training step.
        modules: the modules that the step trains.
    """
    kept: dict[int, torch.UntypedStorage] = {}  # keeps the storages alive, so that no address is used twice

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        step()
    own = {part.untyped_storage().data_ptr() for module in modules for part in (*module.parameters(), *module.buffers())}
    return sum(storage.nbytes() for address, storage in kept.items() if address not in own)
