"""An optimizer's step with its gradients clipped, in as few passes over the gradients as the optimizer allows.

And one optimizer made of two, for embeddings whose gradients are row-sparse.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dni_seq.core import nonfinite


class JoinedOptimizer(torch.optim.Optimizer):
    """Several optimizers of parameters of their own that step as one; learning rates are set in any of its groups.

    Made for `nn.Embedding(sparse=True)`: its gradient holds the rows that were read, which `torch.optim.SparseAdam` alone
    updates, while a fused Adam steps all the other parameters.

    Args:
        parts: the optimizers.

    Raises:
        ValueError: a parameter is in more than one of them.
    """

    def __init__(self, parts: Sequence[torch.optim.Optimizer]) -> None:
        self.parts = list(parts)
        super().__init__([group for part in self.parts for group in part.param_groups], {})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of each; `closure`, as everywhere, computes loss and gradients first."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for part in self.parts:
            part.step()
        return loss

    def state_dict(self) -> dict[str, Any]:
        """Those of the parts."""
        return {"parts": [part.state_dict() for part in self.parts]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over what `state_dict` gave.

        Raises:
            ValueError: it is that of another optimizer.
        """
        saved = state_dict.get("parts", [])
        if len(saved) != len(self.parts):
            raise ValueError(f"the saved optimizer has {len(saved)} parts, this one {len(self.parts)}")
        for part, state in zip(self.parts, saved, strict=True):
            part.load_state_dict(state)
        self.param_groups = [group for part in self.parts for group in part.param_groups]


def gradient_norm(optimizer: torch.optim.Optimizer) -> Tensor:
    """The norm of the gradients of `optimizer`'s parameters together, 0-d; 0 where none has a gradient."""
    return total_norm([_numbers(p, p.grad) for p in _parameters(optimizer) if p.grad is not None])


@torch.no_grad()
def total_norm(tensors: Sequence[Tensor]) -> Tensor:
    """The norm of `tensors` together, 0-d; 0 for none.

    It is that of `torch.nn.utils.get_total_norm`, which sorts tensors by device and type first; on the CPU, where there is
    one of each and no launch to save, that takes longer than a short window can spare.
    """
    if not tensors or any(tensor.device.type != "cpu" for tensor in tensors):
        return nn.utils.get_total_norm(tensors)
    norms = [torch.linalg.vector_norm(tensor) for tensor in tensors]
    return torch.linalg.vector_norm(torch.stack(norms))


def clipped_step(optimizer: torch.optim.Optimizer, limit: float | None, norm: Tensor, good: Tensor) -> None:
    """The step of `optimizer`, or of each of the parts that it is joined of; see `_clipped_step`."""
    for part in optimizer.parts if isinstance(optimizer, JoinedOptimizer) else [optimizer]:
        _clipped_step(part, limit, norm, good)


def _clipped_step(optimizer: torch.optim.Optimizer, limit: float | None, norm: Tensor, good: Tensor) -> None:
    """Scale gradients of that `norm` down to `limit`, None for no limit, and take the optimizer's step, where `good` holds.

    A fused optimizer divides by the factor as it reads the gradients, the others after one more pass over them: the numbers
    are those of `torch.nn.utils.clip_grad_norm_` and a step, up to rounding. A fused optimizer on a GPU leaves a step out by
    itself, so that nobody waits to read `good`, 0-d bool.
    """
    handed: dict[str, Tensor] = {}
    if nonfinite.readable_without_sync(good) or not supports_found_inf(optimizer):
        if not good:
            return
    else:
        handed["found_inf"] = (~good).to(torch.float32)
    # Divided by 1 the numbers stay, but the kernel would write them all anew: a fifth of its time.
    if limit is not None and not (nonfinite.readable_without_sync(norm) and norm + 1e-6 <= limit):
        if norm.dtype == torch.float32 and supports_found_inf(optimizer):  # the kernels read a float32 factor
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


def clear_optimizer_state(optimizer: torch.optim.Optimizer) -> None:
    """Drop the moments of `optimizer`, or of each of the parts that it is joined of."""
    for part in optimizer.parts if isinstance(optimizer, JoinedOptimizer) else [optimizer]:
        part.state.clear()


def supports_found_inf(optimizer: torch.optim.Optimizer) -> bool:
    """Whether the optimizer's kernels take a factor and can leave a step out on the device: fused ones."""
    return all(group.get("fused") for group in optimizer.param_groups) and hasattr(optimizer, "_step_supports_amp_scaling")


def _numbers(parameter: Tensor, gradient: Tensor) -> Tensor:
    """The numbers of a parameter's gradient; a row-sparse one is coalesced, since the same row may be there twice."""
    if not gradient.is_sparse:
        return gradient
    parameter.grad = gradient.coalesce()
    return parameter.grad.values()


def _parameters(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def check_disjoint(optimizer: torch.optim.Optimizer, other: torch.optim.Optimizer | None) -> None:
    """Raises a ValueError if a parameter is in both the model's optimizer and the synthesizer's."""
    if other is None:
        return
    shared = {id(parameter) for parameter in _parameters(optimizer)} & {id(parameter) for parameter in _parameters(other)}
    if shared:
        raise ValueError(
            f"{len(shared)} parameters are in both optimizers: give the model's to one and the synthesizer's to the other"
        )
