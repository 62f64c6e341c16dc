"""Memory of a training step: the process's peak, and what autograd keeps."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks


def reset_peak() -> None:
    """Lets the kernel count the process's peak memory anew (Linux)."""
    Path("/proc/self/clear_refs").write_text("5")


def peak_mib() -> int:
    """Peak memory of the process since `reset_peak`."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:"))
    return round(int(line.split()[1]) / 1024)


def saved_bytes(step: Callable[[], object], modules: Iterable[nn.Module]) -> int:
    """Runs a step and returns the bytes that it saves for its backward passes, of all graphs that it builds.

    Two views of one storage count once, and the modules' own parameters and buffers do not count. The number depends on the
    shapes alone, so it is the same on every run.

    Args:
        step: one training step.
        modules: the modules that it trains.
    """
    kept: dict[int, torch.UntypedStorage] = {}  # alive until the end, so that no address is used twice

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        step()
    own = {part.untyped_storage().data_ptr() for module in modules for part in (*module.parameters(), *module.buffers())}
    return sum(storage.nbytes() for address, storage in kept.items() if address not in own)
