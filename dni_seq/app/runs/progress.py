"""Shows the progress of a run: a bar on a terminal, otherwise log lines at growing intervals, the first after 10 steps."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

FIRST_STEPS = 10
"""The first line is written after this many steps of a session, or after `FIRST_INTERVAL` seconds if that is earlier."""

FIRST_INTERVAL = 10.0
"""Shortest time between two log lines, in seconds."""
SHARE_OF_RUN = 0.05
"""A further line is written when the time since the last line is this share of the session's time, at least 10 seconds.

A run of hours has about a hundred lines.
"""


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
        # With `disable=None`, tqdm shows no bar if stderr is not a terminal.
        disable = True if self.quiet else None
        self._bar = tqdm(total=total, initial=done, unit="step", disable=disable, dynamic_ncols=True, mininterval=0.5)

    def step(self, tokens: int, figures: Callable[[], str]) -> None:
        """Counts a step of `tokens` tokens. Calls `figures`, which returns the text to show, only if something is shown."""
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
        """Closes the bar. The bar stays visible on the terminal."""
        self._bar.close()


class NullProgress(Progress):
    """Counts steps and shows nothing. For all ranks but the first, because they would print the same lines again."""

    quiet = True

    def step(self, tokens: int, figures: Callable[[], str]) -> None:
        """Counts a step of `tokens` tokens."""
        self._done += 1
        self._tokens += tokens

    def write_line(self, text: str) -> None:
        """Does nothing."""
