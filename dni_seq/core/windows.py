"""What a stream hands to the trainer: windows of T steps of B lanes, and a look at the steps behind them.

A window is time-major: `inputs` [T, B, ...], `targets` [T, B, ...]. Its lookahead holds the first m steps that follow the
window in each lane; it is context for the synthesizer of the window's last state, never input of the model.

Legend: T = window length in steps, B = lanes, m = lookahead in steps.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

Reduction = Literal["mean", "lane-mean", "sum"]
"""How a window's losses become one number; see `trainer.window_loss`."""

REDUCTIONS: tuple[Reduction, ...] = get_args(Reduction)


class Lookahead(NamedTuple):
    """The m steps that follow a state, lane by lane.

    Attributes:
        inputs: [m, B, ...], the model's inputs.
        targets: [m, B, ...], the loss's targets.
        valid: [m, B] bool, False behind the end of the lane's sequence or of the stream; what `inputs` and `targets`
            hold there is without meaning.
        mask: [m, B] bool, the steps that count in the loss, or None where all valid ones do.
    """

    inputs: Tensor
    targets: Tensor
    valid: Tensor
    mask: Tensor | None = None

    @property
    def counts(self) -> Tensor:
        """[m, B] bool: the steps that are there and count in the loss."""
        return self.valid if self.mask is None else self.valid & self.mask

    def span(self, start: int, stop: int | None) -> Lookahead:
        """The steps from `start` to before `stop`, as slices do."""
        mask = None if self.mask is None else self.mask[start:stop]
        return Lookahead(self.inputs[start:stop], self.targets[start:stop], self.valid[start:stop], mask)


def next_steps(context: Any, steps: int) -> Lookahead:
    """The first `steps` steps of a synthesizer's context.

    Raises:
        ValueError: it is no `Lookahead` of as many.
    """
    if not isinstance(context, Lookahead) or len(context.inputs) < steps:
        seen = f"{len(context.inputs)} steps" if isinstance(context, Lookahead) else type(context).__name__
        raise ValueError(
            f"the synthesizer looks {steps} steps ahead, its context is {seen}: pass windows through "
            f"dni_seq.with_lookahead(windows, {steps}), and lookahead=window.lookahead to the trainer"
        )
    return context if len(context.inputs) == steps else context.span(0, steps)


def check_unreduced(losses: Tensor, ahead: Lookahead) -> None:
    """ValueError where `losses` are not those of the single steps and lanes of `ahead`, [m, B]."""
    if losses.shape != ahead.valid.shape:
        raise ValueError(f"loss_fn must return unreduced losses {list(ahead.valid.shape)}, got {list(losses.shape)}")


def step_weight(reduction: Reduction, window: int, lanes: int) -> float:
    """What one step of one lane weighs in the loss of a full window of `window` steps and `lanes` lanes.

    Raises:
        ValueError: `window` is not positive, or the reduction is none.
    """
    if window < 1 or reduction not in REDUCTIONS:
        raise ValueError(f"window must be positive and reduction one of {REDUCTIONS}, got {window} and {reduction!r}")
    return 1 / {"mean": lanes * window, "lane-mean": lanes, "sum": 1}[reduction]


class Window(NamedTuple):
    """T steps of B lanes.

    Attributes:
        inputs: [T, B, ...].
        targets: [T, B, ...].
        mask: [T, B] bool, the steps that count in the loss, or None for all.
        ends: [B] bool, True where the lane's sequence ends with this window, or None for nowhere.
        lookahead: the steps behind the window, or None.
    """

    inputs: Tensor
    targets: Tensor
    mask: Tensor | None = None
    ends: Tensor | None = None
    lookahead: Lookahead | None = None


def counted(window: Window) -> Tensor:
    """[T, B] bool: the steps of `window` that count in the loss."""
    if window.mask is not None:
        return window.mask
    return torch.ones(window.inputs.shape[:2], dtype=torch.bool, device=window.inputs.device)


def with_lookahead(windows: Iterable[Window], steps: int) -> Iterator[Window]:
    """Add to each window the first `steps` steps that follow it, across as many windows as that takes.

    A lane whose sequence ends sees nothing behind that end. The iterator reads at most as many windows ahead as the
    lookahead spans. All windows must have the same B.

    Raises:
        ValueError: `steps` is negative.
    """
    if steps < 0:
        raise ValueError(f"lookahead must be 0 or more steps, got {steps}")
    source = iter(windows)
    ahead: deque[Window] = deque()
    for window in source:
        ahead.append(window)
        while sum(len(w.inputs) for w in list(ahead)[1:]) >= steps:
            yield _attach(ahead, steps)
            ahead.popleft()
            if not ahead:
                break
    while ahead:
        yield _attach(ahead, steps)
        ahead.popleft()


def _attach(ahead: deque[Window], steps: int) -> Window:
    """The first window of `ahead` with its lookahead cut from the ones behind it."""
    first, *behind = ahead
    lanes = first.inputs.shape[1]
    alive = ~first.ends if first.ends is not None else torch.ones(lanes, dtype=torch.bool)
    alive = alive.to(first.inputs.device)
    valid, masks = [], []
    for window in behind:
        valid.append(alive.expand(len(window.inputs), lanes))
        masks.append(counted(window))
        if window.ends is not None:
            alive = alive & ~window.ends
    return first._replace(
        lookahead=Lookahead(
            inputs=_first_steps([w.inputs for w in behind], steps, first.inputs),
            targets=_first_steps([w.targets for w in behind], steps, first.targets),
            valid=_first_steps(valid, steps, counted(first)),
            mask=_first_steps(masks, steps, counted(first)),
        )
    )


def _first_steps(pieces: list[Tensor], steps: int, like: Tensor) -> Tensor:
    """The first `steps` steps of `pieces` joined along time, with zeros where they are fewer; [steps, B, ...]."""
    joined = torch.cat(pieces)[:steps] if pieces else like[:0]
    missing = steps - len(joined)
    if missing == 0:
        return joined
    return torch.cat([joined, like.new_zeros((missing, *like.shape[1:]))])
