"""Default numbers that a command's help shows. They are here, without torch, so that the help need not import it."""

from __future__ import annotations

import math

HORIZONS, LEAST_STEPS = 2, 4
"""The default K is at least HORIZONS, and at least LEAST_STEPS / T. With fewer horizons copy tasks learn less
(docs/results/copying.md); with fewer steps text learns less at T = 1 (docs/results/characters.md)."""

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


def default_scale(horizons: int) -> float:
    """Returns the default c for K = `horizons`, min(1, 2 / K): with K = 4, c = 0.5 was better than 1."""
    return min(1.0, HORIZONS / horizons)
