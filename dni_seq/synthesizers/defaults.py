"""Default numbers that a command's help shows. They are here, without torch, so that the help need not import it."""

from __future__ import annotations

import math

HORIZONS, LEAST_STEPS = 2, 4
"""The default K is the larger of HORIZONS and LEAST_STEPS / T, rounded up. With one horizon, models solve shorter copy tasks
(docs/results/copying.md). At T = 1 with fewer future steps, the validation loss of text is higher
(docs/results/characters.md)."""

LONG_WINDOW = 8
"""From this T on a predictor of token ids predicts the next LEAST_STEPS steps, in one horizon. If it predicts the next two
windows instead, the loss of text is not lower and training takes longer (docs/results/words.md,
docs/results/characters.md)."""

MEASURE_EVERY = 100
"""A self-supervised synthesizer gets targets at one window in MEASURE_EVERY, drawn at random. The targets serve only to
evaluate messages."""


PREDICTIONS = ("horizons", "future", "past", "both")
"""What a predictor predicts: the next K windows, each with separate weights; the next m steps; the last m inputs; or the
next m steps and the last m inputs."""

REACH = 40
"""Default m of predictors of the future, the past or both."""


def default_horizons(window: int) -> int:
    """Returns the default K for windows of T = `window` steps."""
    return max(HORIZONS, math.ceil(LEAST_STEPS / window))


def token_reach(window: int, few: bool) -> tuple[int, int]:
    """Returns the default K and m of a predictor of token ids.

    Args:
        window: T.
        few: whether the predictor distinguishes all tokens, as for characters. If not, as for words, K is 1, because one
            horizon was better than several.
    """
    if window >= LONG_WINDOW:
        return 1, LEAST_STEPS
    horizons = default_horizons(window) if few else 1
    return horizons, horizons * window


def default_scale(horizons: int) -> float:
    """Returns the default c for K = `horizons`, which is min(1, 2 / K).

    At T = 1 with K = 4, the validation loss was lower with c = 0.5 than with c = 1 (docs/results/characters.md).
    """
    return min(1.0, HORIZONS / horizons)
