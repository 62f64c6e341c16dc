"""SyntheticGradientConfig: how a trainer uses a synthesizer; CreditSettings: these settings with all defaults resolved."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

from torch import nn

from dni_seq.synthesizers.base import Recommended


class CreditSettings(NamedTuple):
    """The settings that are in force; `SyntheticGradientConfig` describes each of them."""

    scale: float | Literal["auto"]
    discount: float
    clip: float | None
    targets: Literal["bootstrap", "lambda"]
    lam: float
    replay_windows: int
    regress_every: int
    target_network: int
    fidelity_every: int
    message_every: int | None
    message_at_end: bool


@dataclass(frozen=True)
class SyntheticGradientConfig:
    """Settings of synthetic gradients for `SequenceTrainer`.

    If `synthetic_scale`, `discount`, `synthesizer_clip` or `regress_every` is None, the trainer uses the value that the
    synthesizer recommends.

    Raises:
        ValueError: a setting is out of its range, or needs another setting that is missing.
    """

    synthetic_scale: float | Literal["auto"] | None = None
    """c, the share of the message that is injected. "auto" starts with the share 0 and sets the share of each horizon by
    comparisons with exact gradients; it needs `fidelity_every`."""

    discount: float | None = None
    """γ. A synthesizer with one bootstrapped message has this target at a window's first state: the gradient of the window's
    loss, plus γ times the message at the window's last state, backpropagated through the window. With several horizons, the
    message of horizon n = 1, 2, ... is injected with the factor γ^(n-1)."""

    synthesizer_clip: float | None = None
    """Largest norm of the synthesizer's gradient; `math.inf` for no limit."""

    targets: Literal["bootstrap", "lambda"] = "bootstrap"
    """"bootstrap": a target holds the synthesizer's message at the window's last state. "lambda": every `replay_windows`
    windows these windows are replayed to compute λ-targets."""

    lam: float = 0.9
    """λ of λ-targets. With 0 they are bootstrapped targets. With 1 they are gradients of BPTT over the replayed windows,
    plus the message at the end of these windows."""

    replay_windows: int = 8
    """K, the number of windows that are replayed for λ-targets. A bootstrapped message predicts the gradient of all later
    windows; in a comparison with exact gradients, K windows stand for all later ones."""

    regress_every: int | None = None
    """n: targets are computed at one window in n, chosen at random. A regressed synthesizer trains only at these windows.
    `FutureGradient` needs no targets and trains at every window. λ-targets are computed every `replay_windows` windows
    instead."""

    target_network: int = 0
    """Number of windows between updates of a frozen copy of the synthesizer, whose messages are used in targets; 0 for no
    copy."""

    fidelity_every: int = 0
    """Number of windows between comparisons of messages with exact gradients; 0 for none."""

    message_every: int | None = None
    """n: messages are also injected at the states after n, 2n, ... steps inside a window, as an auxiliary objective. None:
    messages are injected at the last state only. A number needs a self-supervised synthesizer such as `FutureGradient`. The
    model is then called once for every n steps, unless it has a method `run_in_parts`."""

    message_at_end: bool = True
    """Whether the message at the last state, which is credit from later steps, is injected. False needs `message_every`."""

    auxiliary: nn.Module | None = None
    """An `AuxiliaryTask`: the task's loss is added to the window's loss, and the synthesizer's optimizer trains the task's
    parameters. The model's outputs must be one time-major tensor."""

    auxiliary_weight: float = 0.1
    """Weight of the auxiliary task's loss."""

    def __post_init__(self) -> None:
        """Checks every field."""
        scale = self.synthetic_scale
        if scale is not None and scale != "auto" and not (isinstance(scale, (int, float)) and 0 <= scale < math.inf):
            raise ValueError(f'synthetic_scale must be 0 or more, or "auto", got {scale!r}')
        for name, value in (("discount", self.discount), ("lam", self.lam)):
            if value is not None and not 0 <= value <= 1:
                raise ValueError(f"{name} must be between 0 and 1, got {value}")
        if self.synthesizer_clip is not None and not self.synthesizer_clip > 0:
            raise ValueError(f"synthesizer_clip must be positive, or math.inf for no limit, got {self.synthesizer_clip}")
        if self.targets not in ("bootstrap", "lambda"):
            raise ValueError(f'targets must be "bootstrap" or "lambda", got {self.targets!r}')
        for name, count in (("replay_windows", self.replay_windows), ("regress_every", self.regress_every)):
            if count is not None and count < 1:
                raise ValueError(f"{name} must be positive, got {count}")
        if self.targets == "lambda" and self.regress_every not in (None, 1):
            raise ValueError('regress_every has no effect with targets="lambda": set replay_windows, remove regress_every')
        for name, count in (("target_network", self.target_network), ("fidelity_every", self.fidelity_every)):
            if count < 0:
                raise ValueError(f"{name} must be 0 (off) or more windows, got {count}")
        if self.message_every is not None and self.message_every < 1:
            raise ValueError(f"message_every must be 1 or more steps, got {self.message_every}")
        if self.message_every is not None and self.auxiliary is not None:
            raise ValueError("message_every does not work with an auxiliary task: remove one of them")
        if not self.message_at_end and self.message_every is None:
            raise ValueError("message_at_end=False needs message_every, else nothing is injected: use no synthesizer")
        if scale == "auto" and self.fidelity_every == 0:
            raise ValueError('synthetic_scale="auto" needs comparisons with exact gradients: set fidelity_every, e.g. to 50')
        if not 0 <= self.auxiliary_weight < math.inf:
            raise ValueError(f"auxiliary_weight must be 0 or more, got {self.auxiliary_weight}")

    def resolve(self, recommended: Recommended) -> CreditSettings:
        """Returns the settings with the synthesizer's recommendations in place of None."""
        clip = recommended.synthesizer_clip if self.synthesizer_clip is None else self.synthesizer_clip
        return CreditSettings(
            scale=recommended.synthetic_scale if self.synthetic_scale is None else self.synthetic_scale,
            discount=recommended.discount if self.discount is None else self.discount,
            clip=None if clip == math.inf else clip,
            targets=self.targets,
            lam=self.lam,
            replay_windows=self.replay_windows,
            regress_every=recommended.regress_every if self.regress_every is None else self.regress_every,
            target_network=self.target_network,
            fidelity_every=self.fidelity_every,
            message_every=self.message_every,
            message_at_end=self.message_at_end,
        )
