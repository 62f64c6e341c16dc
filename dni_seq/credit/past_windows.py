"""PastWindows: the windows through which the loss of the newest window is propagated back.

Truncated BPTT with k1 != k2 updates every k1 steps with the gradient of the latest losses over the last k2 steps. A graph
cannot be kept over an update, since the update overwrites parameters that its backward pass needs. So the windows before the
newest one run again, with the current parameters, from the state k2 steps ago.

Source: Williams and Peng 1990, "An Efficient Gradient-Based Algorithm for On-Line Training of Recurrent Network
Trajectories", Neural Computation 2(4), BPTT(h; h'). They keep activations that were computed with old parameters. We compute
the activations again with the current parameters, which costs one more forward pass. The gradient is then that of the loss
as a function of the current parameters.

Legend: n = windows of a backward pass.
"""

from __future__ import annotations

from collections import deque
from functools import partial
from typing import Any

import torch
from torch import Tensor

from dni_seq.core import states
from dni_seq.core.nonfinite import select_where
from dni_seq.core.snapshot import Restorable, buffers_apart
from dni_seq.core.states import State
from dni_seq.credit.recomputation import recomputed
from dni_seq.credit.replay import RecordedWindow, check_loadable, gather_lanes, own_lanes, pack, recorded, unpack
from dni_seq.credit.window_runner import WindowRunner


class PastWindows(Restorable):
    """Holds the last n - 1 windows, and runs them again to give the newest window's first state a graph.

    Args:
        runner: runs the model.

    Attributes:
        count: n; 1 for truncated BPTT with k1 = k2.
    """

    UNCHANGING = (WindowRunner,)

    def __init__(self, runner: WindowRunner) -> None:
        self._runner = runner
        self._count = 1
        self._windows: deque[RecordedWindow] = deque()
        self._accepted: deque[Tensor] = deque()

    @property
    def count(self) -> int:
        """n, the number of windows through which a loss is propagated back."""
        return self._count

    @count.setter
    def count(self, count: int) -> None:
        if count < 1:
            raise ValueError(f"backward_windows must be 1 or more, got {count}")
        self._count = count
        self._shorten()

    def run(self, start: State | None) -> State | None:
        """Returns the state after the windows, with a graph over all of them; `start` if there are none.

        The state is computed with the current parameters, so after an update its values differ from those of `start`.
        """
        self._shorten()  # a checkpoint may hold more windows than are run now
        if not self._windows:
            return start
        state = self._windows[0].start
        run = self._runner.run if self._runner.checkpoint_every is None else partial(recomputed, self._runner.run)
        with buffers_apart(self._runner.model):  # each window has changed the model's buffers once already
            for window, accepted in zip(self._windows, self._accepted, strict=True):
                _, last = run(window.inputs, state)
                if state is not None:  # a window that was skipped on the device has left the state as it was
                    last = select_where(accepted, last, state)
                state = self._runner.reset(last, window.ends)
        return state

    @staticmethod
    def check(window: RecordedWindow) -> None:
        """Raises a ValueError if a checkpoint could not hold the window's inputs or targets."""
        check_loadable(window.inputs, "inputs")
        check_loadable(window.targets, "targets")

    def add(self, window: RecordedWindow, accepted: Tensor) -> None:
        """Records a copy of the newest window.

        Args:
            window: the window, which has passed `check`.
            accepted: 0-d bool, False if the window was skipped.
        """
        if self._count == 1:
            self.clear()  # windows of a checkpoint do not precede the window after this one
            return
        self._windows.append(recorded(window))
        self._accepted.append(accepted)
        self._shorten()

    def _shorten(self) -> None:
        while len(self._windows) >= self._count:
            self._windows.popleft()
            self._accepted.popleft()

    def clear(self) -> None:
        """Removes all windows. To be called if the next window does not follow them."""
        self._windows.clear()
        self._accepted.clear()

    def state_dict(self) -> dict[str, Any]:
        """Returns the windows with the lanes of all ranks; a collective call on several ranks."""
        windows = [pack(gather_lanes(window, self._runner)) for window in self._windows]
        return {"windows": windows, "accepted": list(self._accepted)}

    def load_state_dict(self, saved: dict[str, Any], like: State) -> None:
        """Restores what `state_dict` returned; hidden states are nested like `like`."""
        self._windows = deque(own_lanes(unpack(window, like), self._runner) for window in saved["windows"])
        device = states.floating(like)[0].device
        self._accepted = deque(torch.as_tensor(accepted, device=device) for accepted in saved["accepted"])
