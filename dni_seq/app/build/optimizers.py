"""The optimizers of the commands."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import nn

from dni_seq.app.build.optimization_options import OptimizationOptions
from dni_seq.core.optimizer_step import has_fused_kernel


def adam(parameters: list[nn.Parameter], lr: float) -> torch.optim.Adam:
    """Returns Adam, with the fused kernel on the CPU and on CUDA."""
    return torch.optim.Adam(parameters, lr=lr, fused=has_fused_kernel(parameters))


_KINDS: Mapping[str, Callable[..., torch.optim.Optimizer]] = MappingProxyType(
    {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW, "sgd": torch.optim.SGD}
)


def build_optimizer(parameters: list[nn.Parameter], options: OptimizationOptions, lr: float) -> torch.optim.Optimizer:
    """Returns the optimizer that the options name, with the fused kernel on the CPU and on CUDA."""
    settings: dict[str, Any] = {"lr": lr, "weight_decay": options.weight_decay, "fused": has_fused_kernel(parameters)}
    if options.optimizer == "sgd":
        settings["momentum"] = options.momentum
    return _KINDS[options.optimizer](parameters, **settings)
