"""How far a synthesizer is trusted: what comparisons with exact gradients say of each horizon, and running R².

Legend: N = horizons.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

DECAY = 0.9
"""Share of the evidence on a horizon that a new comparison keeps."""

CONFIDENCE_STD_ERRORS = 2.0
"""Standard errors that are taken off the share of a message that comparisons find right."""

LEAST_COMPARISONS = 3
"""Comparisons before the first share that is not zero: fewer say nothing of their own error."""

LEAST_EXPLAINED = 0.01
"""Share of the exact gradient's power below which a message is not sent, however sure the little is that it tells. It would
bring nothing, and what is left of a synthesizer that tells nothing is alike in all lanes and windows, so that an optimizer
makes much of it."""

COLUMNS = 6
"""Numbers that are kept of a horizon."""


class AutoScale:
    """The share of each horizon's message to inject, from 0 to 1, as comparisons with exact gradients find it.

    A horizon's overlap with the exact gradient, divided by the message's power, is the share with which its messages come
    nearest to the exact gradients. `CONFIDENCE_STD_ERRORS` standard errors are subtracted, because messages without
    information have an estimate above zero as often as below. Below `LEAST_EXPLAINED` the share is 0.

    Attributes:
        shares: one number a horizon, None before the first comparison.
    """

    def __init__(self) -> None:
        self._evidence: Tensor | None = None
        self._comparisons = 0
        self.shares: list[float] | None = None

    def update(self, found: Tensor) -> None:
        """Take in a comparison: overlap, power, and the exact gradient's, of each horizon, [N, 3] float64.

        Where one is not finite it is not taken in.

        Sums are pooled before they are divided, so that states whose exact gradient is zero, as in a task that is not scored
        yet, do not count as failures of the synthesizer.
        """
        overlap, power, _ = found.unbind(1)
        squares = torch.stack([overlap * overlap, overlap * power, power * power], dim=1)
        products = torch.cat([found, squares], dim=1)
        if not products.isfinite().all():
            return
        previous = torch.zeros_like(products) if self._evidence is None else self._evidence
        self._evidence = torch.lerp(products, previous, DECAY)
        self._comparisons += 1
        self.shares = self._found()

    def _found(self) -> list[float] | None:
        if self._evidence is None:
            return None
        if self._comparisons < LEAST_COMPARISONS:
            return [0.0] * len(self._evidence)
        certainty = 1 - DECAY**self._comparisons
        overlap, power, exact, *products = (self._evidence / certainty).unbind(1)
        share = torch.where(power > 0, overlap / power, torch.zeros_like(power))
        residual = products[0] - 2 * share * products[1] + share.square() * products[2]
        # Where comparisons agree it is rounding, whose root would be far more than rounding.
        residual = torch.where(residual > 1e-12 * products[0], residual, 0)
        squared_weights = (1 - DECAY) / (1 + DECAY) * (1 - DECAY ** (2 * self._comparisons))
        number = certainty**2 / squared_weights  # of comparisons of equal weight that would say as much
        error = torch.where(power > 0, (residual / number).sqrt() / power, torch.zeros_like(power))
        tells = overlap.square() >= LEAST_EXPLAINED * power * exact
        found = torch.where(tells, (share - CONFIDENCE_STD_ERRORS * error).clamp(0, 1), 0)
        return [certainty * value for value in found.tolist()]

    def state_dict(self) -> dict[str, Any]:
        """The evidence, and the number of comparisons."""
        return {"evidence": self._evidence, "comparisons": self._comparisons}

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Take over what `state_dict` gave."""
        self._evidence, self._comparisons = saved["evidence"], saved["comparisons"]
        if self._evidence is not None and self._evidence.shape[1] != COLUMNS:  # older versions kept fewer numbers
            self._evidence, self._comparisons = None, 0
        self.shares = self._found()


class RunningFidelity:
    """R² by horizon over running sums, since that of a single window is noise."""

    decay = 0.98

    def __init__(self) -> None:
        self._error: Tensor | None = None
        self._power: Tensor | None = None

    def update(self, error: Tensor, power: Tensor) -> None:
        """Take in the squared error and the squared target of each horizon, [N] each; what is not finite is left out."""
        if self._error is None or self._power is None:
            self._error, self._power = torch.zeros_like(error), torch.zeros_like(power)
        known = error.isfinite() & power.isfinite()
        self._error = torch.where(known, torch.lerp(error, self._error, self.decay), self._error)
        self._power = torch.where(known, torch.lerp(power, self._power, self.decay), self._power)

    def r2(self, horizons: int) -> Tensor:
        """[N]: 1 - squared error / squared target; NaN for each of the `horizons` before there was a target."""
        if self._error is None or self._power is None:
            return torch.full((horizons,), float("nan"))
        return 1 - self._error / self._power

    def state_dict(self) -> dict[str, Any]:
        """The running sums."""
        return {"error": self._error, "power": self._power}

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Take over what `state_dict` gave."""
        self._error, self._power = saved["error"], saved["power"]
