"""AutoScale and RunningFidelity: estimates of how good a synthesizer's messages are, for each horizon.

Legend: N = horizons.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dni_seq.core.snapshot import Restorable

DECAY = 0.9
"""Factor of the old value in a running mean at each new comparison."""

CONFIDENCE_STD_ERRORS = 2.0
"""Number of standard errors that are subtracted from the estimated share."""

LEAST_COMPARISONS = 3
"""Smallest number of comparisons at which a share may be above zero; fewer give no estimate of the standard error."""

LEAST_EXPLAINED = 0.01
"""Smallest squared cosine between messages and exact gradients at which messages are injected.

Below this value messages gain nothing, even if the standard error is small. The output of an uninformative synthesizer is
similar in all lanes and windows. An optimizer that divides gradients by their size, such as Adam, would amplify this
output."""

COLUMNS = 6
"""Number of running means for each horizon."""


class AutoScale(Restorable):
    """Estimates the share of each horizon's message to inject, from 0 to 1, by comparisons with exact gradients.

    The estimate is overlap / power, see `Fidelity`: the share with which the messages come closest to the exact gradients.
    `CONFIDENCE_STD_ERRORS` standard errors are subtracted, because messages without information have an estimate above zero
    as often as below. The share is 0 before `LEAST_COMPARISONS` comparisons, and if the squared cosine is below
    `LEAST_EXPLAINED`. All other shares are multiplied by 1 - DECAY ** comparisons, which grows from 0 to 1.

    Attributes:
        shares: the share of each horizon, a list of N numbers; None before the first comparison.
    """

    def __init__(self) -> None:
        self._evidence: Tensor | None = None
        self._comparisons = 0
        self.shares: list[float] | None = None

    def update(self, found: Tensor) -> None:
        """Adds one comparison; a comparison that is not finite is ignored.

        The running means of overlap and power are divided, not averages of ratios. A comparison at which message and exact
        gradient are near zero, as before the first scored step of a task, therefore has little weight.

        Args:
            found: [N, 3] float64, for each horizon: overlap, power of the message, power of the exact gradient.
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
        # If comparisons agree, the residual is rounding error, and its root would be much larger than rounding error.
        residual = torch.where(residual > 1e-12 * products[0], residual, 0)
        squared_weights = (1 - DECAY) / (1 + DECAY) * (1 - DECAY ** (2 * self._comparisons))
        number = certainty**2 / squared_weights  # of comparisons of equal weight with the same information
        error = torch.where(power > 0, (residual / number).sqrt() / power, torch.zeros_like(power))
        tells = overlap.square() >= LEAST_EXPLAINED * power * exact
        found = torch.where(tells, (share - CONFIDENCE_STD_ERRORS * error).clamp(0, 1), 0)
        return [certainty * value for value in found.tolist()]

    def state_dict(self) -> dict[str, Any]:
        """Returns the running means and the number of comparisons."""
        return {"evidence": self._evidence, "comparisons": self._comparisons}

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Restores what `state_dict` returned."""
        self._evidence, self._comparisons = saved["evidence"], saved["comparisons"]
        if self._evidence is not None and self._evidence.shape[1] != COLUMNS:  # older versions kept fewer numbers
            self._evidence, self._comparisons = None, 0
        self.shares = self._found()


class RunningFidelity(Restorable):
    """Computes R² of each horizon from running means; R² of a single window is mostly noise."""

    decay = 0.98

    def __init__(self) -> None:
        self._error: Tensor | None = None
        self._power: Tensor | None = None

    def update(self, error: Tensor, power: Tensor) -> None:
        """Adds the mean squared error and the mean squared target of each horizon, [N] each; ignores values not finite."""
        if self._error is None or self._power is None:
            self._error, self._power = torch.zeros_like(error), torch.zeros_like(power)
        known = error.isfinite() & power.isfinite()
        self._error = torch.where(known, torch.lerp(error, self._error, self.decay), self._error)
        self._power = torch.where(known, torch.lerp(power, self._power, self.decay), self._power)

    def r2(self, horizons: int) -> Tensor:
        """Returns 1 - squared error / squared target, [N]; before the first update NaN for each of the `horizons`."""
        if self._error is None or self._power is None:
            return torch.full((horizons,), float("nan"))
        return 1 - self._error / self._power

    def state_dict(self) -> dict[str, Any]:
        """Returns the running means."""
        return {"error": self._error, "power": self._power}

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Restores what `state_dict` returned."""
        self._error, self._power = saved["error"], saved["power"]
