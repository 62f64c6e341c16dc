"""Stop a run from outside: the first SIGINT or SIGTERM asks, the second one kills."""

from __future__ import annotations

import signal
from types import FrameType, TracebackType
from typing import Any


class StopSignals:
    """Inside the context, `received` is the number of the signal that asked to stop, None before.

    After the first signal the system's own handling is back, so that a second one ends the process at once. Signals are
    the main thread's: enter the context there.
    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self) -> None:
        self.received: int | None = None
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopSignals:
        self._before = {number: signal.signal(number, self._receive) for number in self.SIGNALS}
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    @property
    def exit_status(self) -> int:
        """The conventional status of a process that a signal ended: 130 for SIGINT, 143 for SIGTERM; 0 without one."""
        return 0 if self.received is None else 128 + self.received

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.received = number
        for each in self.SIGNALS:
            signal.signal(each, signal.SIG_DFL)
