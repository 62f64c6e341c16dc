"""The device of a run, and windows on it."""

from __future__ import annotations

import torch

from dni_seq.core.windows import Lookahead, Window


def device_of(name: str | None) -> torch.device:
    """The device of that name; None for a GPU where there is one, else the CPU.

    Raises:
        ValueError: there is no such device here.
    """
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros((), device=device)
    # An unknown name, a torch without CUDA and a missing driver all raise differently.
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"--device {name} cannot be used here, cpu always can: {reason}") from error
    return device


def on_device(window: Window, device: torch.device) -> Window:
    """The window with all its tensors on `device`."""
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
