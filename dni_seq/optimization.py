"""An optimizer's step with its gradients clipped, in as few passes over the gradients as the optimizer allows."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def clipped_step(optimizer: torch.optim.Optimizer, limit: float | None) -> Tensor:
    """Scale the gradients of `optimizer`'s parameters down to norm `limit`, None for no limit, and take its step.

    A fused optimizer divides by the factor as it reads the gradients, the others after one more pass over them: the numbers
    are those of `torch.nn.utils.clip_grad_norm_` and a step, up to rounding.

    Returns:
        The norm that the gradients had, 0-d.
    """
    gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    norm = nn.utils.get_total_norm(gradients)
    if limit is None:
        optimizer.step()
    elif norm.dtype == torch.float32 and _divides_gradients(optimizer):  # the kernels read a float32 factor
        # The attribute by which torch.amp.GradScaler hands its scale to the same kernels.
        optimizer.grad_scale = ((norm + 1e-6) / limit).clamp_min(1.0)  # type: ignore[attr-defined]
        try:
            optimizer.step()
        finally:
            del optimizer.grad_scale  # type: ignore[attr-defined]
    else:
        nn.utils.clip_grads_with_norm_([p for group in optimizer.param_groups for p in group["params"]], limit, norm)
        optimizer.step()
    return norm


def _divides_gradients(optimizer: torch.optim.Optimizer) -> bool:
    return all(group.get("fused") for group in optimizer.param_groups) and hasattr(optimizer, "_step_supports_amp_scaling")
