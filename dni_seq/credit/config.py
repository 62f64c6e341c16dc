"""CreditSettings: the settings of synthetic gradients in training."""

from __future__ import annotations

import math
from typing import Literal, NamedTuple


class CreditSettings(NamedTuple):
    """Settings of synthetic gradients; `SequenceTrainer` describes each of them and its range."""

    scale: float | Literal["auto"] = 0.1
    discount: float = 0.9
    clip: float | None = 1.0
    targets: Literal["bootstrap", "lambda"] = "bootstrap"
    lam: float = 0.9
    replay_windows: int = 8
    regress_every: int = 1
    target_network: int = 0
    fidelity_every: int = 0

    def check(self) -> None:
        """Raises a ValueError if a setting is out of its range."""
        if self.scale != "auto" and not (isinstance(self.scale, (int, float)) and 0 <= self.scale < math.inf):
            raise ValueError(f'synthetic_scale must be 0 or more, or "auto", got {self.scale!r}')
        for name, value in (("discount", self.discount), ("lam", self.lam)):
            if not 0 <= value <= 1:
                raise ValueError(f"{name} must be between 0 and 1, got {value}")
        if self.clip is not None and not self.clip > 0:
            raise ValueError(f"synthesizer_clip must be positive, or None for no limit, got {self.clip}")
        if self.targets not in ("bootstrap", "lambda"):
            raise ValueError(f'targets must be "bootstrap" or "lambda", got {self.targets!r}')
        for name, count in (("replay_windows", self.replay_windows), ("regress_every", self.regress_every)):
            if count < 1:
                raise ValueError(f"{name} must be positive, got {count}")
        for name, count in (("target_network", self.target_network), ("fidelity_every", self.fidelity_every)):
            if count < 0:
                raise ValueError(f"{name} must be 0 (off) or more windows, got {count}")
        if self.scale == "auto" and self.fidelity_every == 0:
            raise ValueError('synthetic_scale="auto" needs comparisons with exact gradients: set fidelity_every, e.g. to 50')
