"""PastInputs: the last m inputs of each lane, for a synthesizer that predicts the past; WindowContexts: all around a state.

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
    """Holds the inputs that led to the state of each lane; a lane that starts a sequence has none.

    Args:
        runner: knows the lanes of the run.
        steps: m; 0 to keep nothing.
    """

    UNCHANGING = (WindowRunner,)

    def __init__(self, runner: WindowRunner, steps: int) -> None:
        self._runner = runner
        self.steps = steps
        self._past: Past | None = None

    def around(self, window: RecordedWindow, lookahead: Lookahead | None) -> WindowContexts:
        """Returns what surrounds the states of the next window.

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
        """Adds the inputs of a window, unless `passed` (0-d bool) is false, and forgets those of lanes that end with it."""
        if around.past is not None:
            self._past = select_where(passed, around.past_at_end, around.past)
            self.forget(around.window.ends)

    def forget(self, lanes: Tensor | None) -> None:
        """Forgets the inputs of some lanes, [B] bool; of none if it is None."""
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
    """What surrounds the states of a window: the synthesizer's context at each of them.

    Attributes:
        window: the window.
        lookahead: the steps after its last state; None if the synthesizer does not read them.
        past: the m inputs before its first state; None if the synthesizer does not read the past.
        past_at_end: the m inputs before its last state; None likewise.
    """

    window: RecordedWindow
    lookahead: Lookahead | None
    past: Past | None = None
    past_at_end: Past | None = None

    @property
    def known(self) -> bool:
        """Whether there is anything around the states."""
        return self.past is not None or self.lookahead is not None

    @property
    def at_end(self) -> Context:
        """The context at the last state."""
        return self.lookahead if self.past_at_end is None else Surroundings(self.past_at_end, self.lookahead)

    def after(self, steps: int) -> Context:
        """Returns the context at the state after the first `steps` steps of the window, fewer than all."""
        ahead = None if self.lookahead is None else lookahead_after(self.window, steps, self.lookahead)
        return ahead if self.past is None else Surroundings(past_after(self.window, steps, self.past), ahead)


def lookahead_after(window: RecordedWindow, steps: int, lookahead: Lookahead) -> Lookahead:
    """Returns the m steps after the first `steps` of a window: the rest of it, then those after it."""
    rest = partial(cut, slice(steps, None))
    mask = None if window.mask is None else rest(window.mask)
    inputs, targets = (states.map_tensors(rest, nest) for nest in (window.inputs, window.targets))
    return lookahead_at_start(inputs, targets, mask, lookahead)


def past_after(window: RecordedWindow, steps: int, past: Past) -> Past:
    """Returns the m inputs before the state after the first `steps` of a window: those of the window, then earlier ones.

    In a lane that ends with the window, a state after the last step that counts is no state of the sequence: it has no past.
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
    """Returns the past of lanes that start a sequence, m = `steps` steps of which none is valid."""
    first = first_tensor(inputs)
    zeros = states.map_tensors(lambda tensor: tensor.new_zeros(steps, *tensor.shape[1:]), inputs)
    return Past(zeros, torch.zeros(steps, first.shape[1], dtype=torch.bool, device=first.device))
