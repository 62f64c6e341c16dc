"""Handles SIGINT, SIGTERM and SIGHUP: the first signal requests a stop, a second SIGINT or SIGTERM kills the process."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType, TracebackType
from typing import Any

INTERRUPTED = 128 + signal.SIGINT
"""Exit status after Ctrl-C: 130, by convention."""

_HANGUP = getattr(signal, "SIGHUP", None)
"""The signal of a terminal that closes; None on Windows."""


class StopSignals:
    """A context that records the first SIGINT, SIGTERM or SIGHUP.

    The first SIGINT or SIGTERM restores the system's default handlers of these two signals, so a second SIGINT or SIGTERM
    ends the process at once. A second SIGHUP does not end it, because a terminal that closes can send several. If SIGHUP is
    ignored when the context begins, as under nohup, it stays ignored. Enter the context in the main thread, where Python
    handles signals.

    Attributes:
        received: number of the signal that requested the stop, None if no signal has arrived.
    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self) -> None:
        self.received: int | None = None
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopSignals:
        self._before = {number: signal.signal(number, self._receive) for number in self.SIGNALS}
        if _HANGUP is not None and signal.getsignal(_HANGUP) != signal.SIG_IGN:
            self._before[_HANGUP] = signal.signal(_HANGUP, self._receive)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    @property
    def exit_status(self) -> int:
        """The conventional exit status after a signal: 130 SIGINT, 143 SIGTERM, 129 SIGHUP, 0 without a signal."""
        return 0 if self.received is None else 128 + self.received

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self.received is None:
            self.received = number
        if number == _HANGUP:
            return
        for each in self.SIGNALS:
            signal.signal(each, signal.SIG_DFL)


@contextmanager
def interrupt_exits(line: str) -> Iterator[None]:
    """Ctrl-C inside the context ends the process at once, with `line` on stderr and status 130.

    Use it while a program starts and has nothing to clean up. A KeyboardInterrupt can be lost during imports: imports run
    callbacks, and an exception in a callback is ignored. Enter the context in the main thread.
    """

    def end(number: int, frame: FrameType | None) -> None:
        with suppress(OSError):
            os.write(2, f"{line}\n".encode())
        os._exit(INTERRUPTED)

    before = signal.getsignal(signal.SIGINT)
    if before is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
