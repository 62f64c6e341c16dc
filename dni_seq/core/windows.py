"""Windows of T steps of B lanes, which a stream passes to the trainer, and lookaheads, which hold the steps after a window.

A window is time-major: `inputs` [T, B, ...], `targets` [T, B, ...]. Its lookahead holds the m steps after the window in each
lane. The lookahead is context for the synthesizer at the window's last state; the model never reads it.

Inputs and targets may each be one tensor, or a nest of tuples, lists and dicts of tensors that agree in T and B.

Legend: T = window length in steps, B = lanes, m = lookahead in steps.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from dni_seq.core import states

Nest = Any
"""A tensor, or a nest of tuples, lists and dicts of tensors. Python's type system has no more exact type for such a nest."""


Reduction = Literal["mean", "lane-mean", "sum"]
"""How a window's losses become one number; see `window_runner.window_loss`."""

REDUCTIONS: tuple[Reduction, ...] = get_args(Reduction)


class Lookahead(NamedTuple):
    """For each lane, the m steps that follow a state: the context of a synthesizer that sees the future.

    Attributes:
        inputs: [m, B, ...], the model's inputs, a tensor or a nest of tensors.
        targets: [m, B, ...], the targets of the loss, a tensor or a nest of tensors.
        valid: [m, B] bool, False after the end of the lane's sequence or of the stream. The values of `inputs` and
            `targets` are undefined at steps that are not valid.
        mask: [m, B] bool, True for steps that count in the loss; None if all valid steps count.
    """

    inputs: Nest
    targets: Nest
    valid: Tensor
    mask: Tensor | None = None

    @property
    def counts(self) -> Tensor:
        """[m, B] bool, True for valid steps that count in the loss."""
        return self.valid if self.mask is None else self.valid & self.mask

    def span(self, start: int, stop: int | None) -> Lookahead:
        """Returns the steps from `start` to before `stop`, or to the end if `stop` is None, as a lookahead."""
        return self.map(lambda tensor: tensor[start:stop])

    def map(self, function: Callable[[Tensor], Tensor]) -> Lookahead:
        """Returns the lookahead with `function` applied to every tensor, each of them [m, B, ...]."""
        mask = None if self.mask is None else function(self.mask)
        inputs, targets = states.map_tensors(function, self.inputs), states.map_tensors(function, self.targets)
        return Lookahead(inputs, targets, function(self.valid), mask)


class Past(NamedTuple):
    """For each lane, the m inputs before a state, the latest first.

    Attributes:
        inputs: [m, B, ...], the model's inputs, a tensor or a nest of tensors. Entry 0 is the input that led to the state.
        valid: [m, B] bool, False before the start of the lane's sequence. The values of `inputs` are undefined at steps that
            are not valid.
    """

    inputs: Nest
    valid: Tensor


class Surroundings(NamedTuple):
    """The steps before and after a state: the context of a synthesizer that predicts the past.

    Attributes:
        past: the inputs before the state.
        lookahead: the steps after the state; None if the synthesizer needs none.
    """

    past: Past
    lookahead: Lookahead | None = None

    def map(self, function: Callable[[Tensor], Tensor]) -> Surroundings:
        """Returns the surroundings with `function` applied to every tensor, each of them [m, B, ...]."""
        past = Past(states.map_tensors(function, self.past.inputs), function(self.past.valid))
        return Surroundings(past, None if self.lookahead is None else self.lookahead.map(function))


Context = Lookahead | Surroundings | None
"""What a trainer passes to a synthesizer beside a state."""


def named_tensors(nest: Nest, name: str) -> list[tuple[str, Tensor]]:
    """Returns the tensors of inputs or targets, each with its name for error messages, such as "inputs['tokens']".

    Raises:
        TypeError: a leaf is not a tensor.
        ValueError: there is no tensor.
    """
    if isinstance(nest, Tensor):
        return [(name, nest)]
    if isinstance(nest, PackedSequence):
        raise TypeError(f"{name} is a PackedSequence: pass a padded tensor [T, B, ...], and mask= for the steps that count")
    found = list(zip(states.paths(nest, name), states.flatten(nest), strict=True))
    if not found:
        raise ValueError(f"{name} holds no tensor")
    for place, leaf in found:
        if not isinstance(leaf, Tensor):
            kind = type(leaf).__name__
            raise TypeError(f"{place} is a {kind}: pass a tensor [T, B, ...], or a tuple, list or dict of such tensors")
    return found


def first_tensor(nest: Nest) -> Tensor:
    """Returns the first tensor of inputs or targets, from which T, B and the device are read.

    Raises:
        TypeError: a leaf is not a tensor.
        ValueError: there is no tensor.
    """
    return nest if isinstance(nest, Tensor) else named_tensors(nest, "inputs")[0][1]


def next_steps(context: Any, steps: int) -> Lookahead:
    """Returns the first `steps` steps of a synthesizer's context.

    Raises:
        ValueError: the context is not a `Lookahead` of at least that many steps.
    """
    if isinstance(context, Surroundings):
        context = context.lookahead
    if not isinstance(context, Lookahead) or len(first_tensor(context.inputs)) < steps:
        seen = f"{len(first_tensor(context.inputs))} steps" if isinstance(context, Lookahead) else type(context).__name__
        raise ValueError(
            f"the synthesizer looks {steps} steps ahead, but its context is {seen}: pass windows through "
            f"dni_seq.with_lookahead(windows, {steps}) and pass lookahead=window.lookahead to the trainer"
        )
    return context if len(first_tensor(context.inputs)) == steps else context.span(0, steps)


def previous_steps(context: Any, steps: int) -> Past:
    """Returns the last `steps` inputs before a state, from a synthesizer's context.

    Raises:
        ValueError: the context is not `Surroundings` with at least that many inputs.
    """
    if not isinstance(context, Surroundings) or len(context.past.valid) < steps:
        seen = f"{len(context.past.valid)} steps" if isinstance(context, Surroundings) else type(context).__name__
        raise ValueError(
            f"the synthesizer predicts {steps} steps of the past, but its context is {seen}: use it in a SequenceTrainer, "
            "which keeps them, or pass dni_seq.Surroundings"
        )
    past = context.past
    if len(past.valid) == steps:
        return past
    return Past(states.map_tensors(lambda tensor: tensor[:steps], past.inputs), past.valid[:steps])


def check_unreduced(losses: Tensor, lookahead: Lookahead) -> None:
    """Raises a ValueError if `losses` are not unreduced, one for each step and lane of `lookahead`, [m, B]."""
    if losses.shape != lookahead.valid.shape:
        raise ValueError(f"loss_fn must return unreduced losses {list(lookahead.valid.shape)}, got {list(losses.shape)}")


def step_weight(reduction: Reduction, window: int, lanes: int) -> float:
    """Returns the weight of one step of one lane in the loss of a window of `window` steps and `lanes` lanes.

    All steps of the window count: there is no mask.

    Raises:
        ValueError: `window` is not positive, or `reduction` is not one of `REDUCTIONS`.
    """
    if window < 1 or reduction not in REDUCTIONS:
        raise ValueError(f"window must be positive and reduction one of {REDUCTIONS}, got {window} and {reduction!r}")
    return 1 / {"mean": lanes * window, "lane-mean": lanes, "sum": 1}[reduction]


class Window(NamedTuple):
    """A window of a stream: T steps of B lanes, time-major.

    Attributes:
        inputs: [T, B, ...], the model's inputs, a tensor or a nest of tensors.
        targets: [T, B, ...], the targets of the loss, a tensor or a nest of tensors.
        mask: [T, B] bool, True for steps that count in the loss; None if all count.
        ends: [B] bool, True for lanes whose sequence ends with this window; None if no sequence ends.
        lookahead: the steps after the window, or None.
    """

    inputs: Nest
    targets: Nest
    mask: Tensor | None = None
    ends: Tensor | None = None
    lookahead: Lookahead | None = None


def finite_targets(targets: Any, counts: Tensor) -> Any:
    """Returns targets with zeros in place of NaNs and infinities at steps that do not count.

    The loss at such a step has the weight 0, but its gradient would be 0 times NaN, which is NaN.

    Args:
        targets: [T, B, ...], a tensor or a nest of tensors.
        counts: [T, B] bool, True for steps that count.
    """
    return states.map_floating(lambda leaf: torch.where(over(counts, leaf) | leaf.isfinite(), leaf, 0), targets)


def finite_inputs(inputs: Any, counts: Tensor, ends: Tensor | None, batch_dim: int = 1) -> Any:
    """Returns inputs with zeros in place of NaNs and infinities after the last step that counts, in lanes that end.

    No loss that counts depends on these steps. At all other steps a NaN stays, because later steps depend on the input.

    Args:
        inputs: [T, B, ...], a tensor or a nest of tensors; [B, T, ...] if `batch_dim` is 0.
        counts: [T, B] bool, True for steps that count; [B, T] if `batch_dim` is 0.
        ends: [B] bool, True for lanes whose sequence ends with the window; None if no sequence ends.
        batch_dim: the dimension of the lanes.
    """
    if ends is None:
        return inputs
    time, ended = (1, ends[:, None]) if batch_dim == 0 else (0, ends)
    needed = counts.flip(time).cumsum(time).flip(time).bool() | ~ended  # this step or a later one counts
    return states.map_floating(lambda leaf: torch.where(over(needed, leaf) | leaf.isfinite(), leaf, 0), inputs)


def over(counts: Tensor, leaf: Tensor) -> Tensor:
    """Returns `counts` [T, B] in a shape that broadcasts over `leaf` [T, B, ...]."""
    return counts.reshape(*counts.shape, *(1 for _ in range(leaf.dim() - 2)))


def counted(window: Window) -> Tensor:
    """Returns which steps of `window` count in the loss, [T, B] bool."""
    if window.mask is not None:
        return window.mask
    inputs = first_tensor(window.inputs)
    return torch.ones(inputs.shape[:2], dtype=torch.bool, device=inputs.device)


def on_device(window: Window, device: torch.device) -> Window:
    """Returns the window with all its tensors on `device`."""
    moved: Window = states.map_tensors(lambda tensor: tensor.to(device), window)
    return moved


def with_lookahead(windows: Iterable[Window | tuple[Any, ...]], steps: int) -> Iterator[Window]:
    """Yields each window with a lookahead, the `steps` steps after the window, read from the next windows.

    Steps of the lookahead after the end of a lane's sequence, or after the end of the stream, are marked as not valid. The
    iterator reads only as many windows in advance as the lookahead spans. All windows must have the same B.

    Args:
        windows: consecutive windows of a stream, as `Window` or as tuples of its first fields, such as (inputs, targets).
        steps: m, the number of steps in each lookahead.

    Raises:
        ValueError: `steps` is negative, or the inputs or targets of two windows differ in their structure.
        TypeError: inputs or targets hold something else than tensors.
    """
    if steps < 0:
        raise ValueError(f"lookahead must be 0 or more steps, got {steps}")
    source = iter(windows)
    pending: deque[Window] = deque()
    for window in source:
        pending.append(window if isinstance(window, Window) else Window(*window))
        while sum(len(first_tensor(w.inputs)) for w in list(pending)[1:]) >= steps:
            yield _attach(pending, steps)
            pending.popleft()
            if not pending:
                break
    while pending:
        yield _attach(pending, steps)
        pending.popleft()


def _attach(pending: deque[Window], steps: int) -> Window:
    """Returns the first window of `pending`, with its lookahead read from the windows after it."""
    first, *after = pending
    inputs = first_tensor(first.inputs)
    lanes = inputs.shape[1]
    alive = ~first.ends if first.ends is not None else torch.ones(lanes, dtype=torch.bool)
    alive = alive.to(inputs.device)
    valid, masks = [], []
    for window in after:
        valid.append(alive.expand(len(first_tensor(window.inputs)), lanes))
        masks.append(counted(window))
        if window.ends is not None:
            alive = alive & ~window.ends
    return first._replace(
        lookahead=Lookahead(
            inputs=_first_steps([first.inputs, *(w.inputs for w in after)], steps, "the inputs"),
            targets=_first_steps([first.targets, *(w.targets for w in after)], steps, "the targets"),
            valid=_first_steps([counted(first), *valid], steps, "the steps"),
            mask=_first_steps([counted(first), *masks], steps, "the mask"),
        )
    )


def _first_steps(nests: list[Nest], steps: int, name: str) -> Nest:
    """Returns the first `steps` steps of all nests but the first, [steps, B, ...]; steps that are missing are zeros.

    The first nest gives the structure and the shapes.
    """
    return states.map_together(lambda leaves: _joined(leaves[0], leaves[1:], steps), nests, name)


def _joined(like: Tensor, pieces: list[Tensor], steps: int) -> Tensor:
    joined = torch.cat(pieces)[:steps] if pieces else like[:0]
    missing = steps - len(joined)
    if missing == 0:
        return joined
    return torch.cat([joined, like.new_zeros((missing, *like.shape[1:]))])
