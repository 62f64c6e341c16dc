"""DivergenceMonitor: counts rejected messages and regressions, and decides when a synthesizer has diverged."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from dni_seq.core import nonfinite
from dni_seq.core.nonfinite import SkipCounter
from dni_seq.core.snapshot import Restorable

BAD_WINDOWS = 3
"""Number of windows in a row with a rejected message or regression after which the synthesizer is reset."""

READ_EVERY = 20
"""Number of windows between two reads of the GPU's counts."""

RESETS = 3
"""Number of resets after which the next divergence disables the synthesizer."""


class DivergenceMonitor(Restorable):
    """Counts windows with a rejected message or regression, and the resets of the synthesizer.

    Attributes:
        resets: number of times that the synthesizer has diverged and was reset.
        disabled: True after one more divergence than `RESETS`; nothing is then injected or trained any longer.
    """

    def __init__(self) -> None:
        self._rejected = SkipCounter()
        self._events: list[str] = []
        self.resets = 0
        self.disabled = False

    @property
    def total(self) -> int:
        """Number of windows so far whose message or regression was rejected; reading it waits for a GPU."""
        return self._rejected.total

    def diverged(self, valid: Tensor, steps: int) -> bool:
        """Counts a window; returns whether `BAD_WINDOWS` windows in a row were rejected.

        On a GPU the counts are read only every `READ_EVERY` windows; in between the result is False.

        Args:
            valid: 0-d bool, whether the window's message and regression were valid.
            steps: the window's number, counted from 1.
        """
        if self.disabled:
            return False
        self._rejected.add(valid)
        if not nonfinite.readable_without_sync(valid) and steps % READ_EVERY:
            return False
        row = self._rejected.in_a_row
        if row:
            self._events.append(f"skipped a synthetic message or regression, not finite or too large ({row} in a row)")
        return row >= BAD_WINDOWS

    def count_reset(self) -> None:
        """Counts a reset of the synthesizer; disables it if it was reset `RESETS` times before."""
        self.disabled = self.resets == RESETS
        self.resets += not self.disabled
        then = "disabled" if self.disabled else f"reset, {self.resets} of {RESETS} times"
        self._events.append(f"the synthesizer has diverged and was {then}")
        self._rejected.end_row()

    def take_events(self, step: int) -> tuple[str, ...]:
        """Returns the messages for the user since the last call."""
        if not self._events:
            return ()
        events, self._events = tuple(f"step {step}: {event}" for event in self._events), []
        return events

    def state_dict(self) -> dict[str, Any]:
        """Returns the counts."""
        return {"bad": self._rejected.state_dict(), "resets": self.resets, "disabled": self.disabled}

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Restores what `state_dict` returned."""
        self._rejected.load_state_dict(saved["bad"])
        self.resets, self.disabled = saved["resets"], saved["disabled"]
