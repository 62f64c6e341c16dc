"""An optimizer's step with its gradients clipped, in as few passes over the gradients as the optimizer allows."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .guard import decided_here


def gradient_norm(optimizer: torch.optim.Optimizer) -> Tensor:
    """The norm of the gradients of `optimizer`'s parameters together, 0-d; 0 where none has a gradient."""
    return nn.utils.get_total_norm([p.grad for p in _parameters(optimizer) if p.grad is not None])


def clipped_step(optimizer: torch.optim.Optimizer, limit: float | None, norm: Tensor, good: Tensor) -> None:
    """Scale gradients of that `norm` down to `limit`, None for no limit, and take the optimizer's step, where `good` holds.

    A fused optimizer divides by the factor as it reads the gradients, the others after one more pass over them: the numbers
    are those of `torch.nn.utils.clip_grad_norm_` and a step, up to rounding. A fused optimizer on a GPU leaves a step out by
    itself, so that nobody waits to read `good`, 0-d bool.
    """
    handed: dict[str, Tensor] = {}
    if decided_here(good) or not leaves_out_by_itself(optimizer):
        if not good:
            return
    else:
        handed["found_inf"] = (~good).to(torch.float32)
    if limit is not None:
        if norm.dtype == torch.float32 and leaves_out_by_itself(optimizer):  # the kernels read a float32 factor
            handed["grad_scale"] = ((norm + 1e-6) / limit).clamp_min(1.0)
        else:
            nn.utils.clip_grads_with_norm_(_parameters(optimizer), limit, norm)
    # The attributes by which torch.amp.GradScaler hands its scale and its finding to the same kernels.
    for name, value in handed.items():
        setattr(optimizer, name, value)
    try:
        optimizer.step()
    finally:
        for name in handed:
            delattr(optimizer, name)


def leaves_out_by_itself(optimizer: torch.optim.Optimizer) -> bool:
    """Whether the optimizer's kernels take a factor and can leave a step out on the device: fused ones."""
    return all(group.get("fused") for group in optimizer.param_groups) and hasattr(optimizer, "_step_supports_amp_scaling")


def _parameters(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]
