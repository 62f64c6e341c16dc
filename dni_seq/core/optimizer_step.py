"""Clips gradients and steps an optimizer, in as few passes over the gradients as the optimizer allows.

`JoinedOptimizer` makes one optimizer of several, for embeddings with row-sparse gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from dni_seq.core import nonfinite


class JoinedOptimizer(torch.optim.Optimizer):
    """Steps several optimizers, each with its own parameters, as one optimizer.

    `param_groups` holds the groups of all parts, so that learning rates can be set there. Models with
    `nn.Embedding(sparse=True)` need two parts: `torch.optim.SparseAdam` updates only the rows of the embedding that were
    read, and a fused Adam steps all other parameters.

    Args:
        parts: the optimizers.

    Raises:
        ValueError: a parameter is in more than one part.
    """

    def __init__(self, parts: Sequence[torch.optim.Optimizer]) -> None:
        self.parts = list(parts)
        self._joined = False
        super().__init__([group for part in self.parts for group in part.param_groups], {})
        self._joined = True

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Raises a ValueError: the group must be added to the part that is to train it."""
        if self._joined:
            names = ", ".join(f"parts[{i}] is {type(part).__name__}" for i, part in enumerate(self.parts))
            raise ValueError(
                f"a JoinedOptimizer trains the parameters of its parts ({names}): add the group to one of them and make "
                "a new JoinedOptimizer of the parts"
            )
        super().add_param_group(param_group)

    @torch.no_grad()
    def step(
        self,
        closure: Callable[[], Any] | None = None,
        step_part: Callable[[torch.optim.Optimizer], Any] = lambda part: part.step(),
    ) -> Any:
        """Steps every part by `step_part`; `closure`, if given, computes loss and gradients first. Returns the loss."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for part in self.parts:
            step_part(part)
        return loss

    def state_dict(self) -> dict[str, Any]:
        """Returns the state dicts of the parts."""
        return {"parts": [part.state_dict() for part in self.parts]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores what `state_dict` returned.

        Raises:
            ValueError: the saved optimizer has another number of parts, or a part of it has other parameter groups.
        """
        saved = state_dict.get("parts", [])
        if len(saved) != len(self.parts):
            raise ValueError(f"the saved optimizer has {len(saved)} parts, this one {len(self.parts)}")
        for part, state in zip(self.parts, saved, strict=True):
            part.load_state_dict(state)
        self.param_groups = [group for part in self.parts for group in part.param_groups]


def parts_of(optimizer: torch.optim.Optimizer) -> list[torch.optim.Optimizer]:
    """Returns the parts of a `JoinedOptimizer`, or the optimizer itself in a list."""
    return optimizer.parts if isinstance(optimizer, JoinedOptimizer) else [optimizer]


def gradient_norm(optimizer: torch.optim.Optimizer) -> Tensor:
    """Returns the norm of all gradients of `optimizer`'s parameters, 0-d; 0 if no parameter has a gradient."""
    return total_norm([_numbers(p, p.grad) for p in _parameters(optimizer) if p.grad is not None])


@torch.no_grad()
def total_norm(tensors: Sequence[Tensor]) -> Tensor:
    """Returns the norm of all `tensors` together, 0-d; 0 for an empty list.

    The result is that of `torch.nn.utils.get_total_norm`, which groups tensors by device and dtype first. On the CPU the
    grouping saves no kernel launches and costs too much at short windows, so it is skipped there.
    """
    if not tensors or any(tensor.device.type != "cpu" for tensor in tensors):
        return nn.utils.get_total_norm(tensors)
    norms = [torch.linalg.vector_norm(tensor) for tensor in tensors]
    return torch.linalg.vector_norm(torch.stack(norms))


def clipped_step(optimizer: torch.optim.Optimizer, limit: float | None, norm: Tensor, good: Tensor) -> None:
    """Clips and steps `optimizer`, or each part of a `JoinedOptimizer`; see `_clipped_step`."""
    if isinstance(optimizer, JoinedOptimizer):  # by its own step, whose hooks a learning-rate schedule needs
        optimizer.step(step_part=partial(_clipped_step, limit=limit, norm=norm, good=good))
    else:
        _clipped_step(optimizer, limit, norm, good)


def _clipped_step(optimizer: torch.optim.Optimizer, limit: float | None, norm: Tensor, good: Tensor) -> None:
    """Clips the gradients to `limit` and steps the optimizer if `good` (0-d bool) is true.

    The result is that of `torch.nn.utils.clip_grad_norm_` and a step, up to rounding. A fused optimizer divides by the
    clipping factor as it reads the gradients; other optimizers need one more pass. A fused optimizer on a GPU skips the step
    on the device, so that the host does not wait for `good`.

    Args:
        optimizer: the optimizer.
        limit: largest norm of the gradients, None for no limit.
        norm: the norm of the gradients, 0-d.
        good: 0-d bool, whether to step.
    """
    handed: dict[str, Tensor] = {}
    if nonfinite.readable_without_sync(good) or not supports_found_inf(optimizer):
        if not good:
            return
    else:
        handed["found_inf"] = (~good).to(torch.float32)
    # A division by 1 changes nothing, but the kernel would write all gradients again, which costs a fifth of the kernel's
    # time.
    if limit is not None and not (nonfinite.readable_without_sync(norm) and norm + 1e-6 <= limit):
        if norm.dtype == torch.float32 and supports_found_inf(optimizer):  # the kernels read a float32 factor
            handed["grad_scale"] = ((norm + 1e-6) / limit).clamp_min(1.0)
        else:
            nn.utils.clip_grads_with_norm_(_parameters(optimizer), limit, norm)
    # torch.amp.GradScaler passes its scale and found_inf to the same kernels by these attributes.
    for name, value in handed.items():
        setattr(optimizer, name, value)
    try:
        optimizer.step()
    finally:
        for name in handed:
            delattr(optimizer, name)


def clear_optimizer_state(optimizer: torch.optim.Optimizer) -> None:
    """Clears the state (moments) of `optimizer`, or of each part of a `JoinedOptimizer`."""
    for part in parts_of(optimizer):
        part.state.clear()


def check_moments(optimizer: torch.optim.Optimizer) -> None:
    """Checks the moments that an Adam optimizer has loaded.

    The fused kernel of Adam would write beyond the memory of a moment that is smaller than its parameter.

    Raises:
        ValueError: a moment does not have its parameter's shape, a count of steps is not one number, or one of these is not
            a floating-point or complex tensor.
    """
    for part in parts_of(optimizer):
        if not isinstance(part, torch.optim.Adam):
            continue
        for parameter, state in part.state.items():
            for name, value in state.items():
                found = tuple(value.shape) if isinstance(value, Tensor) else None
                wanted = () if name == "step" else tuple(parameter.shape)
                if found != wanted or not (value.is_floating_point() or value.is_complex()):
                    raise ValueError(f"the saved optimizer has {name} of shape {found}, where {wanted} belongs")


def has_fused_kernel(parameters: Iterable[Tensor]) -> bool:
    """Returns whether PyTorch has fused kernels of Adam and SGD for all parameters: real ones on the CPU or on CUDA.

    On the CPU such a kernel saves 6 to 63 % of the time of a training step at T = 1 or 2.
    """
    return all(one.is_floating_point() and one.device.type in ("cpu", "cuda") for one in parameters)


def supports_found_inf(optimizer: torch.optim.Optimizer) -> bool:
    """Returns whether the optimizer is fused: its kernels then scale gradients and can skip a step on the device."""
    return all(group.get("fused") for group in optimizer.param_groups) and hasattr(optimizer, "_step_supports_amp_scaling")


def _numbers(parameter: Tensor, gradient: Tensor) -> Tensor:
    """Returns the values of a parameter's gradient. A row-sparse gradient may hold a row twice, so it is coalesced first."""
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
            f"{len(shared)} parameters are in both optimizers: give the model's to one, the synthesizer's to the other"
        )
