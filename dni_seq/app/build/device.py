"""Selects the device of a run and moves windows to it."""

from __future__ import annotations

import torch

from dni_seq.core.windows import Lookahead, Window


def device_of(name: str | None) -> torch.device:
    """Returns the device of that name. None selects the GPU if CUDA is available, else the CPU.

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


def on_device(window: Window, device: torch.device) -> Window:
    """Returns the window with all its tensors on `device`."""
    inputs, targets, mask, ends, lookahead = window
    if lookahead is not None:
        lookahead = Lookahead(*(None if field is None else field.to(device) for field in lookahead))  # type: ignore[arg-type]
    return Window(
        inputs.to(device),
        targets.to(device),
        None if mask is None else mask.to(device),
        None if ends is None else ends.to(device),
        lookahead,
    )
