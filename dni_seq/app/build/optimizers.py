"""The optimizers of the commands."""

from __future__ import annotations

import torch
from torch import nn


def adam(parameters: list[nn.Parameter], lr: float, device: torch.device) -> torch.optim.Adam:
    """Returns Adam, fused on CPU and CUDA. On the CPU the fused kernel saves a third of a short window's step."""
    return torch.optim.Adam(parameters, lr=lr, fused=device.type in ("cpu", "cuda"))
