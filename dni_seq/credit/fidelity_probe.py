"""FidelityProbe: compares the messages at a state with exact gradients, after the windows that follow the state have run.

Legend: N = horizons.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from dni_seq.core import states
from dni_seq.core.snapshot import Restorable
from dni_seq.core.states import State
from dni_seq.credit.config import CreditSettings
from dni_seq.credit.fidelity import StateFidelity, fidelity
from dni_seq.credit.replay import RecordedWindow, gather_lanes, own_lanes, pack, recorded, unpack
from dni_seq.credit.window_runner import WindowRunner
from dni_seq.synthesizers.base import match_message


class FidelityProbe(Restorable):
    """Every `fidelity_every` windows, compares the messages at a state with exact gradients of the windows after the state.

    Args:
        runner: replays the windows.
        settings: `fidelity_every`, `replay_windows` and `discount`.
    """

    UNCHANGING = (WindowRunner,)

    def __init__(self, runner: WindowRunner, settings: CreditSettings) -> None:
        self._runner = runner
        self._settings = settings
        self._messages: list[State] | None = None
        self._windows: list[RecordedWindow] = []

    def due(self, steps: int) -> bool:
        """Returns whether `measure` does anything for the window number `steps`, counted from 1."""
        every = self._settings.fidelity_every
        return self._messages is not None or (every > 0 and steps % every == 0)

    def measure(
        self, window: RecordedWindow, steps: int, predict: Callable[[], list[State]], *, bootstrapped: bool
    ) -> StateFidelity | None:
        """Records a window if a comparison is due; returns the comparison when enough windows are recorded, else None.

        Args:
            window: the latest window.
            steps: the window's number, counted from 1.
            predict: returns the messages at the window's first state, by horizon.
            bootstrapped: whether the last message predicts the gradient of all later windows, as a tail does.
                `replay_windows` windows then stand for all later windows.

        Raises:
            ValueError: a checkpoint could not hold the window's inputs or targets.
        """
        every = self._settings.fidelity_every
        if not every:
            return None
        if not self._windows and steps % every == 0:
            self._messages = predict()
        if self._messages is None:
            return None
        self._windows.append(recorded(window))
        horizons = len(self._messages)
        needed = horizons - 1 + self._settings.replay_windows if bootstrapped else horizons
        if len(self._windows) < needed:
            return None
        discount = self._settings.discount
        found = fidelity(self._runner, self._windows, self._messages, discount, bootstrapped=bootstrapped)
        self.clear()
        return found

    def clear(self) -> None:
        """Drops an unfinished comparison. To be called if the next window does not follow the recorded ones."""
        self._messages, self._windows = None, []

    def state_dict(self) -> dict[str, Any]:
        """Returns messages and windows with the lanes of all ranks; a collective call on several ranks."""
        gather, dims = self._runner.parallel.all, self._runner.state_batch_dim
        messages = None
        if self._messages is not None:
            start = self._windows[0].start  # all messages get the order of its leaves
            matched = [match_message(message, start) for message in self._messages]
            messages = [states.saved_leaves(states.map_lanes(gather, message, dims)) for message in matched]
        windows = [pack(gather_lanes(window, self._runner)) for window in self._windows]
        return {"probe_windows": windows, "probe_messages": messages}

    def load_state_dict(self, saved: dict[str, Any], like: State) -> None:
        """Restores what `state_dict` returned; hidden states are nested like `like`."""
        own, dims = self._runner.parallel.own, self._runner.state_batch_dim
        messages = saved["probe_messages"]
        if messages is not None:
            places = saved["probe_windows"][0].get("start_paths")
            messages = [states.map_lanes(own, states.from_saved(leaves, places, like), dims) for leaves in messages]
        self._messages = messages
        self._windows = [own_lanes(unpack(window, like), self._runner) for window in saved["probe_windows"]]
