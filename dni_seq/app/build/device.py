"""Selects the device of a run."""

from __future__ import annotations

import torch


def device_of(name: str | None) -> torch.device:
    """Returns the device called `name`. None selects the GPU if CUDA is available, else the CPU.

    Raises:
        ValueError: the device is not available.
    """
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros((), device=device)
    # An unknown name, a torch without CUDA and a missing driver raise different exceptions.
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"--device {name} cannot be used here: {reason}; use --device cpu") from error
    return device
