"""Handles SIGINT and SIGTERM: the first signal requests a stop, the second one kills the process."""

from __future__ import annotations

import signal
from types import FrameType, TracebackType
from typing import Any


class StopSignals:
    """A context that records the first SIGINT or SIGTERM.

    The first signal restores the system's default handlers, so a second signal ends the process at once. Enter the context
    in the main thread, where Python handles signals.

    Attributes:
        received: number of the signal that requested the stop, None before.
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
        """The conventional exit status after a signal: 130 for SIGINT, 143 for SIGTERM, 0 without a signal."""
        return 0 if self.received is None else 128 + self.received

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.received = number
        for each in self.SIGNALS:
            signal.signal(each, signal.SIG_DFL)
