"""Burn-in: the first steps of a sequence update the state and count in no loss.

Source: Kapturowski et al. 2019, "Recurrent Experience Replay in Distributed Reinforcement Learning" (R2D2), section 3. There
the stored state of a replayed sequence may be out of date, and the first steps of the sequence update the state. In a
forecast the first steps fill a state that starts at zero.

Legend: T = window length in steps, B = lanes, m = lookahead in steps.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch

from dni_seq.core.windows import Window, counted, first_tensor


def burn_in(windows: Iterable[Window | tuple[Any, ...]], steps: int) -> Iterator[Window]:
    """Yields each window with a mask that is False in the first `steps` steps of every sequence.

    The first window starts a sequence in every lane. A window whose `ends` is True for a lane ends the lane's sequence; the
    next window starts another. A burn-in may be longer than a window. Steps that a window's own mask excludes stay
    excluded, and count as steps of the burn-in. Lookaheads are masked in the same way, so `with_lookahead` may come before
    or after `burn_in`.

    The model runs through the burn-in as through all other steps. Losses of later steps in the same window send gradients
    back through the burn-in. If `steps` is a multiple of T, the burn-in ends at the end of a window. Truncated BPTT then
    cuts the gradient at the end of the burn-in, as R2D2 does. A window in which no step counts has loss 0.

    Every call of `burn_in` counts the steps of each sequence from 0, because the saved position of a stream does not include
    these counts. After a resume within a sequence the burn-in therefore runs once more.

    Source: Kapturowski et al. 2019 (R2D2), section 3.

    Args:
        windows: consecutive windows of a stream, as `Window` or as tuples of its first fields, such as (inputs, targets).
        steps: the length of the burn-in; 0 returns every window unchanged.

    Raises:
        ValueError: `steps` is negative, or two windows differ in B.
    """
    if steps < 0:
        raise ValueError(f"burn-in must be 0 or more steps, got {steps}")
    return _masked((window if isinstance(window, Window) else Window(*window) for window in windows), steps)


def _masked(windows: Iterator[Window], steps: int) -> Iterator[Window]:
    """Yields the windows with their masks."""
    passed = None  # [B], steps of each lane's sequence before the window
    for window in windows:
        if steps == 0:
            yield window
            continue
        inputs = first_tensor(window.inputs)
        length, lanes = inputs.shape[:2]
        if passed is None:
            passed = torch.zeros(lanes, dtype=torch.int64, device=inputs.device)
        elif len(passed) != lanes:
            raise ValueError(f"a window has {lanes} lanes, the one before it {len(passed)}: they must agree")
        mask = counted(window) & _after(passed, length, steps)
        passed = passed + length
        lookahead = window.lookahead
        if lookahead is not None:
            lookahead = lookahead._replace(mask=lookahead.counts & _after(passed, len(lookahead.valid), steps))
        if window.ends is not None:
            passed = torch.where(window.ends.to(passed.device), 0, passed)
        yield window._replace(mask=mask, lookahead=lookahead)


def _after(passed: torch.Tensor, length: int, steps: int) -> torch.Tensor:
    """Returns which of a window's `length` steps come after the burn-in, [length, B] bool.

    Args:
        passed: [B], the number of steps of each lane's sequence before the window.
        length: number of steps in the window.
        steps: length of the burn-in.
    """
    return passed + torch.arange(length, device=passed.device)[:, None] >= steps
