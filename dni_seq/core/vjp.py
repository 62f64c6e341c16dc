"""Vector-Jacobian products with respect to the state only."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from dni_seq.core.snapshot import buffers_apart


@contextmanager
def without_parameter_gradients(model: nn.Module) -> Iterator[None]:
    """Excludes the model's parameters from graphs made in the block.

    Changes of buffers and of the random state are undone after the block.
    """
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    with torch.random.fork_rng(devices=sorted({p.get_device() for p in learning if p.is_cuda})), buffers_apart(model):
        for parameter in learning:
            parameter.requires_grad_(False)
        try:
            yield
        finally:
            for parameter in learning:
                parameter.requires_grad_(True)
