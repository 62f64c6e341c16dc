"""Checks a window before it trains, and finds windows in which nothing counts.

Legend: T = window length in steps, B = lanes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dni_seq.core import nonfinite, states
from dni_seq.core.states import State
from dni_seq.core.windows import Nest, Window, finite_inputs, finite_targets, named_tensors


def check_window(window: Window, batch_dim: int) -> None:
    """Checks the kinds and shapes of a window's tensors, and that gradients are enabled.

    Raises:
        ValueError: shapes do not match, or gradients are disabled.
        TypeError: inputs or targets hold something else than tensors, or the mask is not bool.
    """
    inputs, targets, mask, ends, lookahead = window
    if not torch.is_grad_enabled():
        raise ValueError("step needs gradients: call it outside of torch.no_grad() and torch.inference_mode()")
    lanes, of_targets = lanes_of(inputs, "inputs", batch_dim), lanes_of(targets, "targets", batch_dim)
    if of_targets != lanes:
        raise ValueError(f"inputs have {lanes} lanes, targets {of_targets}: they must agree")
    if ends is not None and (ends.shape != (lanes,) or ends.dtype != torch.bool):
        raise ValueError(f"ends must be a bool tensor [{lanes}], got {ends.dtype} {list(ends.shape)}")
    if mask is not None and mask.dtype != torch.bool:
        raise ValueError(f"mask must be a bool tensor, True for steps that count, got {mask.dtype}")
    if batch_dim != 1 and lookahead is not None:
        raise ValueError("a lookahead needs time-major windows [T, B, ...]: transpose inputs and targets, with batch_dim=1")


def lanes_of(nest: Nest, name: str, batch_dim: int) -> int:
    """Returns B, the number of lanes of inputs or targets.

    Args:
        nest: a tensor [T, B, ...], or a nest of such tensors.
        name: what errors call it.
        batch_dim: the dimension of the lanes.

    Raises:
        ValueError: a tensor has no such dimension or no steps, or the tensors of a nest differ in T or B.
        TypeError: a leaf of a nest is not a tensor.
    """
    found = named_tensors(nest, name)
    for place, tensor in found:
        if tensor.dim() <= batch_dim:
            raise ValueError(f"{place} has shape {tuple(tensor.shape)}, and no dimension batch_dim={batch_dim}")
        if tensor.shape[0] == 0:
            raise ValueError(f"{place} has no steps: a window needs at least one")
    first, like = found[0]
    for place, tensor in found[1:]:
        if tensor.shape[0] != like.shape[0] or tensor.shape[batch_dim] != like.shape[batch_dim]:
            shapes = f"{place} has shape {tuple(tensor.shape)}, {first} {tuple(like.shape)}"
            raise ValueError(f"{shapes}: they must agree in steps (dimension 0) and lanes (dimension {batch_dim})")
    return like.shape[batch_dim]


def finite_window(window: Window, batch_dim: int = 1) -> Window:
    """Returns the window with zeros in place of NaNs and infinities at places on which no loss that counts depends."""
    inputs, targets, mask, ends, lookahead = window
    if mask is not None and all(
        leaf.shape[:2] == mask.shape for leaf in (*states.floating(inputs), *states.floating(targets))
    ):  # the loss rejects other masks
        window = window._replace(inputs=finite_inputs(inputs, mask, ends, batch_dim), targets=finite_targets(targets, mask))
    if lookahead is not None and lookahead.mask is not None:
        counts = lookahead.counts
        inputs, targets = (finite_targets(part, counts) for part in (lookahead.inputs, lookahead.targets))
        window = window._replace(lookahead=lookahead._replace(inputs=inputs, targets=targets))
    return window


def lane_dims(state: State, lanes: int, larger: State | None) -> Any:
    """Returns the dimension of the lanes in a state's leaves: one int, or a nest like the state.

    Args:
        state: a state of `lanes` lanes.
        lanes: B.
        larger: a state of the model with B + 1 lanes, or None. If several dimensions of a leaf have size B, the lanes are
            the dimension that has another size in `larger`.

    Raises:
        ValueError: no dimension of a leaf, or more than one, can be that of the lanes.
    """
    others = [None] * len(states.flatten(state)) if larger is None else states.flatten(larger)
    dims = []
    for leaf, other in zip(states.flatten(state), others, strict=True):
        if not isinstance(leaf, Tensor) or leaf.dim() == 0:
            dims.append(0)
            continue
        found = [dim for dim, size in enumerate(leaf.shape) if size == lanes]
        if len(found) > 1 and isinstance(other, Tensor):
            found = [dim for dim in found if other.shape[dim] != lanes]
        if len(found) > 1 and lanes == 1:  # all dimensions of size 1 hold the one lane
            found = [1 if leaf.dim() == 3 and 1 in found else found[0]]
        if len(found) != 1:
            many = f"{len(found)} dimensions" if found else "no dimension"
            raise ValueError(
                f"the inputs have {lanes} lanes, and a state's leaf of shape {list(leaf.shape)} has {many} of that size: "
                "pass state_batch_dim, the dimension of its lanes (nn.LSTM: 1, nn.LSTMCell: 0)"
            )
        dims.append(found[0])
    return dims[0] if len(set(dims)) == 1 else states.unflatten(state, dims)


def check_lanes(state: State, lanes: int, state_batch_dim: Any) -> None:
    """Raises a ValueError if a leaf of a state has another number of lanes than the inputs."""
    dims = states.broadcast_to_leaves(state_batch_dim, state, "state_batch_dim")
    for leaf, dim in zip(states.flatten(state), dims, strict=True):
        if isinstance(leaf, Tensor) and -leaf.dim() <= dim < leaf.dim() and leaf.shape[dim] != lanes:
            raise ValueError(
                f"the inputs have {lanes} lanes, the state has {leaf.shape[dim]} (dimension {dim} of a leaf "
                f"{list(leaf.shape)}): drop a last batch of another size, call reset() before a new stream, or correct "
                "state_batch_dim"
            )


def check_ignored(losses: Tensor, targets: Any, mask: Tensor | None) -> None:
    """Raises a ValueError if unreduced losses of ignored targets would be averaged as steps of loss 0.

    A mean loss of PyTorch excludes steps whose target is `ignore_index`. Unreduced losses are 0 at these steps, and their
    mean would include the zeros. On a GPU nothing is checked, because the host would wait for the targets.
    """
    if mask is not None or not isinstance(targets, Tensor) or targets.is_floating_point() or losses.shape != targets.shape:
        return
    if nonfinite.readable_without_sync(targets) and int(targets.min()) < 0 and not losses[targets < 0].any():
        raise ValueError(
            "targets hold ignored steps (negative ids), which would count as steps with loss 0: pass mask=targets >= 0"
        )


def nothing_counts(loss: Tensor, targets: Any) -> Tensor:
    """Returns whether no step of a window counts in its loss: the loss is NaN and all targets are negative ids, 0-d bool.

    A mean loss of PyTorch is NaN if all targets are `ignore_index`, which is -100 by default.

    Args:
        loss: 0-d, the window's loss.
        targets: [T, B, ...], the window's targets.
    """
    if not isinstance(targets, Tensor) or targets.is_floating_point():
        return torch.zeros_like(loss, dtype=torch.bool)
    return loss.isnan() & (targets < 0).all()
