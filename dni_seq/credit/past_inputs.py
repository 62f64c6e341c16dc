"""PastInputs: the last m inputs of each lane, for a synthesizer of the past; WindowContexts: contexts at a window's states.

Legend: T = window length in steps, B = lanes, m = steps kept.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dni_seq.core import states
from dni_seq.core.nonfinite import select_where
from dni_seq.core.snapshot import Restorable
from dni_seq.core.windows import Context, Lookahead, Nest, Past, Surroundings, first_tensor
from dni_seq.credit.replay import RecordedWindow, check_loadable
from dni_seq.credit.window_runner import WindowRunner, cut, lookahead_at_start


class PastInputs(Restorable):
    """Holds the last m inputs that led to the state of each lane; a lane that starts a sequence has none.

    Args:
        runner: its `parallel` gathers and divides the lanes of all ranks.
        steps: m; 0 to keep nothing.
    """

    UNCHANGING = (WindowRunner,)

    def __init__(self, runner: WindowRunner, steps: int) -> None:
        self._runner = runner
        self.steps = steps
        self._past: Past | None = None

    def around(self, window: RecordedWindow, lookahead: Lookahead | None) -> WindowContexts:
        """Returns the contexts at the states of `window`, the next window.

        Raises:
            ValueError: a checkpoint could not hold the window's inputs.
        """
        if not self.steps:
            return WindowContexts(window, lookahead)
        past = self._past
        if past is None:
            check_loadable(window.inputs, "inputs")
            past = nothing_before(window.inputs, self.steps)
        return WindowContexts(window, lookahead, past, past_after(window, len(first_tensor(window.inputs)), past))

    def advance(self, around: WindowContexts, passed: Tensor) -> None:
        """Updates the inputs after a window.

        Args:
            around: the contexts of the window.
            passed: 0-d bool, false if the window was skipped. Its inputs are then not added. In both cases, lanes whose
                sequence ends with the window forget all their inputs.
        """
        if around.past is not None:
            self._past = select_where(passed, around.past_at_end, around.past)
            self.forget(around.window.ends)

    def forget(self, lanes: Tensor | None) -> None:
        """Forgets the inputs of the lanes that `lanes`, [B] bool, marks; does nothing if `lanes` is None."""
        if lanes is not None and self._past is not None:
            self._past = self._past._replace(valid=self._past.valid & ~lanes)

    def clear(self) -> None:
        """Forgets the inputs of all lanes."""
        self._past = None

    def state_dict(self) -> dict[str, Any] | None:
        """Returns the inputs with the lanes of all ranks; a collective call on several ranks."""
        if self._past is None:
            return None
        gathered: Past = states.map_tensors(lambda tensor: self._runner.parallel.all(tensor, 1), self._past)
        return gathered._asdict()

    def load_state_dict(self, saved: dict[str, Any] | None) -> None:
        """Restores what `state_dict` returned."""
        self._past = None
        if saved is not None:
            self._past = states.map_tensors(lambda tensor: self._runner.parallel.own(tensor, 1), Past(**saved))


class WindowContexts(NamedTuple):
    """The steps before and after a window, from which the synthesizer's context at each state of the window is made.

    Attributes:
        window: the window.
        lookahead: the steps after the window; None if the window came without a lookahead.
        past: the m inputs before the window's first state; None if the synthesizer does not read the past.
        past_at_end: the m inputs before the window's last state; None if the synthesizer does not read the past.
    """

    window: RecordedWindow
    lookahead: Lookahead | None
    past: Past | None = None
    past_at_end: Past | None = None

    @property
    def known(self) -> bool:
        """Whether there is a lookahead or a past."""
        return self.past is not None or self.lookahead is not None

    @property
    def at_end(self) -> Context:
        """The context at the last state."""
        return self.lookahead if self.past_at_end is None else Surroundings(self.past_at_end, self.lookahead)

    def after(self, steps: int) -> Context:
        """Returns the context at the state after the first `steps` steps of the window; `steps` is less than T."""
        ahead = None if self.lookahead is None else lookahead_after(self.window, steps, self.lookahead)
        return ahead if self.past is None else Surroundings(past_after(self.window, steps, self.past), ahead)


def lookahead_after(window: RecordedWindow, steps: int, lookahead: Lookahead) -> Lookahead:
    """Returns the m steps after the first `steps` steps of a window: the rest of the window, then steps of `lookahead`."""
    rest = partial(cut, slice(steps, None))
    mask = None if window.mask is None else rest(window.mask)
    inputs, targets = (states.map_tensors(rest, nest) for nest in (window.inputs, window.targets))
    return lookahead_at_start(inputs, targets, mask, lookahead)


def past_after(window: RecordedWindow, steps: int, past: Past) -> Past:
    """Returns the m inputs before the state after `steps` steps of a window: inputs of the window, then those of `past`.

    In a lane whose sequence ends with the window, steps after the last step that counts are padding. A state after padding
    does not belong to the sequence, so its past is marked as not valid.
    """
    if steps == 0:
        return past
    reach = len(past.valid)

    def latest(leaves: list[Tensor]) -> Tensor:
        inside, before = leaves
        return torch.cat([inside[:steps].flip(0), before])[:reach]

    valid = torch.cat([torch.ones_like(past.valid[:1]).expand(steps, -1), past.valid])[:reach]
    if window.ends is not None and window.mask is not None:
        valid = valid & (window.mask[steps - 1 :].any(0) | ~window.ends)
    return Past(states.map_together(latest, [window.inputs, past.inputs], "the inputs"), valid)


def nothing_before(inputs: Nest, steps: int) -> Past:
    """Returns the past of lanes that start a sequence: m = `steps` inputs, all marked as not valid."""
    first = first_tensor(inputs)
    zeros = states.map_tensors(lambda tensor: tensor.new_zeros(steps, *tensor.shape[1:]), inputs)
    return Past(zeros, torch.zeros(steps, first.shape[1], dtype=torch.bool, device=first.device))
