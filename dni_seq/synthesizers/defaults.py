"""Default numbers that a command's help shows. They are here, without torch, so that the help need not import it."""

from __future__ import annotations

import math

HORIZONS, LEAST_STEPS = 2, 4
"""The default K is at least HORIZONS, and at least LEAST_STEPS / T. With fewer horizons copy tasks learn less
(docs/results/copying.md); with fewer steps text learns less at T = 1 (docs/results/characters.md)."""

LONG_WINDOW = 8
"""From this T on a predictor of token ids looks LEAST_STEPS steps ahead, in one horizon: with the next two windows text is
learned no better or worse, for more time (docs/results/words.md, docs/results/characters.md)."""

MEASURE_EVERY = 100
"""Windows between two targets of a self-supervised synthesizer. Its targets serve only to evaluate messages."""


PREDICTIONS = ("horizons", "future", "past", "both")
"""What a predictor predicts: the next K windows, each with weights of its own; the next m steps; the last m inputs; or both
of these."""

REACH = 40
"""Default m of predictors of the future, the past or both."""


def default_horizons(window: int) -> int:
    """Returns the default K for windows of T = `window` steps."""
    return max(HORIZONS, math.ceil(LEAST_STEPS / window))


def token_reach(window: int, few: bool) -> tuple[int, int]:
    """Returns the default K and m of a predictor of token ids.

    Args:
        window: T.
        few: whether it distinguishes all tokens, as for characters. Else one horizon is better than several.
    """
    if window >= LONG_WINDOW:
        return 1, LEAST_STEPS
    horizons = default_horizons(window) if few else 1
    return horizons, horizons * window


def default_scale(horizons: int) -> float:
    """Returns the default c for K = `horizons`, min(1, 2 / K): with K = 4, c = 0.5 was better than 1."""
    return min(1.0, HORIZONS / horizons)
