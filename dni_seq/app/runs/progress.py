"""How a run shows that it moves: a bar on a terminal, now and then a line of log elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

FIRST_INTERVAL = 10.0
"""Seconds between two lines of log at first."""
SHARE_OF_RUN = 0.05
"""Later lines come after this share of the time gone by: about a hundred lines in a run of hours."""


class Progress:
    """Steps done and the latest figures, on stderr; other messages on stdout.

    Args:
        total: steps that the run will do, None where nobody knows.
        done: steps done by earlier sessions.
        clock: seconds, monotonic.
    """

    quiet = False

    def __init__(self, total: int | None, done: int, clock: Callable[[], float] = time.monotonic):
        from tqdm import tqdm

        self._clock = clock
        self._total, self._done = total, done
        self._tokens = 0
        self._begin = self._shown = clock()
        # None: no bar where stderr is not a terminal.
        disable = True if self.quiet else None
        self._bar = tqdm(total=total, initial=done, unit="step", disable=disable, dynamic_ncols=True, mininterval=0.5)

    def step(self, tokens: int, figures: Callable[[], str]) -> None:
        """Count a step of `tokens`; `figures` is asked for text only when something is shown."""
        self._done += 1
        self._tokens += tokens
        if not self._bar.disable:
            if self._bar.update():
                self._bar.set_postfix_str(f"{figures()}, {self.tokens_per_second():,.0f} tokens/s", refresh=False)
            return
        now = self._clock()
        if now - self._shown >= max(FIRST_INTERVAL, SHARE_OF_RUN * (now - self._begin)):
            self._shown = now
            of = f"/{self._total}" if self._total is not None else ""
            print(
                f"step {self._done}{of}: {figures()}, {self.tokens_per_second():,.0f} tokens/s",
                file=sys.stderr,
                flush=True,
            )

    def tokens_per_second(self) -> float:
        """Tokens of this session over its time so far."""
        return self._tokens / max(self._clock() - self._begin, 1e-9)

    def write_line(self, text: str) -> None:
        """Print `text` on stdout, above the bar where there is one."""
        self._bar.write(text, file=sys.stdout)
        sys.stdout.flush()

    def close(self) -> None:
        """Leave the bar as it is."""
        self._bar.close()


class NullProgress(Progress):
    """Progress that counts and shows nothing, of a rank whose lines would repeat those of another."""

    quiet = True

    def step(self, tokens: int, figures: Callable[[], str]) -> None:
        """Count a step of `tokens`."""
        self._done += 1
        self._tokens += tokens

    def write_line(self, text: str) -> None:
        """Nothing."""
