"""ReplayBuffer: collects the latest windows until there are enough to replay.

Legend: K = windows in a replay.
"""

from __future__ import annotations

from collections import deque
from typing import Any

from dni_seq.core.snapshot import Restorable
from dni_seq.core.states import State
from dni_seq.credit.replay import RecordedWindow, gather_lanes, own_lanes, pack, recorded, unpack
from dni_seq.credit.window_runner import WindowRunner


class ReplayBuffer(Restorable):
    """Holds up to K - 1 consecutive windows; the K-th completes them.

    Args:
        runner: knows the dimensions and the ranks of the lanes, for the state dict.
        size: K.
    """

    UNCHANGING = (WindowRunner,)

    def __init__(self, runner: WindowRunner, size: int) -> None:
        self._runner = runner
        self._size = size
        self._windows: deque[RecordedWindow] = deque()

    @property
    def fills(self) -> bool:
        """Whether the next window completes the buffer."""
        return len(self._windows) + 1 >= self._size

    def add(self, window: RecordedWindow) -> list[RecordedWindow]:
        """Records a copy of a window; returns the K windows, oldest first, if this is the K-th, else an empty list.

        The buffer is empty after it has returned K windows.

        Raises:
            ValueError: a checkpoint could not hold the window's inputs or targets.
        """
        self._windows.append(recorded(window))
        if len(self._windows) < self._size:
            return []
        windows = list(self._windows)
        self._windows.clear()
        return windows

    def clear(self) -> None:
        """Removes all windows. To be called if the next window does not follow them."""
        self._windows.clear()

    def state_dict(self) -> dict[str, Any]:
        """Returns the windows with the lanes of all ranks; a collective call on several ranks."""
        return {"ring": [pack(gather_lanes(window, self._runner)) for window in self._windows]}

    def load_state_dict(self, saved: dict[str, Any], like: State) -> None:
        """Restores what `state_dict` returned; hidden states are nested like `like`."""
        self._windows = deque(own_lanes(unpack(window, like), self._runner) for window in saved["ring"])
