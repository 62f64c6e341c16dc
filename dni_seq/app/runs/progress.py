"""Shows the progress of a run: a bar on a terminal, otherwise log lines, soon after the start and at growing intervals."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

FIRST_STEPS = 10
"""Steps of a session after which the first line is written, unless `FIRST_INTERVAL` is over before."""

FIRST_INTERVAL = 10.0
"""Shortest time between two log lines, in seconds."""
SHARE_OF_RUN = 0.05
"""A later line is written after this share of the elapsed time: about a hundred lines in a run of hours."""


class Progress:
    """Shows the steps done and the latest figures on stderr, and other messages on stdout.

    Args:
        total: number of steps of the run, None if unknown.
        done: steps done by earlier sessions.
        clock: returns the time in seconds, monotonic.
    """

    quiet = False

    def __init__(self, total: int | None, done: int, clock: Callable[[], float] = time.monotonic):
        from tqdm import tqdm

        self._clock = clock
        self._total, self._done = total, done
        self._tokens = 0
        self._begin = self._shown = clock()
        self._first_at: int | None = done + FIRST_STEPS
        # None: no bar if stderr is not a terminal.
        disable = True if self.quiet else None
        self._bar = tqdm(total=total, initial=done, unit="step", disable=disable, dynamic_ncols=True, mininterval=0.5)

    def step(self, tokens: int, figures: Callable[[], str]) -> None:
        """Counts a step of `tokens`. Calls `figures` for its text only if something is shown."""
        self._done += 1
        self._tokens += tokens
        if not self._bar.disable:
            if self._bar.update():
                self._bar.set_postfix_str(f"{figures()}, {self.tokens_per_second():,.0f} tokens/s", refresh=False)
            return
        now = self._clock()
        if self._done == self._first_at or now - self._shown >= max(FIRST_INTERVAL, SHARE_OF_RUN * (now - self._begin)):
            self._shown, self._first_at = now, None
            of = f"/{self._total}" if self._total is not None else ""
            print(
                f"step {self._done}{of}: {figures()}, {self.tokens_per_second():,.0f} tokens/s",
                file=sys.stderr,
                flush=True,
            )

    def tokens_per_second(self) -> float:
        """Returns the tokens per second of this session."""
        return self._tokens / max(self._clock() - self._begin, 1e-9)

    def write_line(self, text: str) -> None:
        """Prints `text` on stdout, above the bar if there is one."""
        self._bar.write(text, file=sys.stdout)
        sys.stdout.flush()

    def close(self) -> None:
        """Closes the bar and leaves it on the terminal."""
        self._bar.close()


class NullProgress(Progress):
    """Counts steps and shows nothing. For ranks other than the first, whose lines would be duplicates."""

    quiet = True

    def step(self, tokens: int, figures: Callable[[], str]) -> None:
        """Counts a step of `tokens`."""
        self._done += 1
        self._tokens += tokens

    def write_line(self, text: str) -> None:
        """Does nothing."""
