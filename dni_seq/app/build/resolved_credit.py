"""The settings of credit assignment in force in a run. `CreditOptions.resolve` makes them from the options."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class ResolvedCredit:
    """The settings of credit assignment in force at one window length. No attribute is None.

    The learning rate of the synthesizer is not among these settings; `CreditOptions` holds it.

    Attributes:
        bptt: T, the window length in steps.
        synthesizer: the kind, one of `SYNTHESIZERS`.
        fit: how messages are made. "future": as gradients of a future model. "least-squares" and "descent": regressed, by
            heads that least squares or gradient descent fits. "future" excludes `tail` for multi-horizon, and needs
            normalised targets and a lookahead.
        horizons: K.
        tail: for exact, whether a synthesizer predicts the gradient of later steps than the exact ones; for other kinds,
            whether one more head predicts a message for all windows after the K horizons.
        draw_horizon: whether only one head, drawn at random for each window, trains.
        lookahead: number of future steps that the learned synthesizer reads, 0 for no lookahead. The steps of `exact_steps`
            do not count.
        next_input_only: whether the lookahead is only the input of the next step, without its target, as paper has it by
            default.
        normalize: whether targets are divided by their running root mean square.
        gate: whether the synthesizer reads LSTM cells through a function that bounds them.
        synthesizer_hidden: units per hidden layer.
        synthesizer_layers: number of hidden layers.
        future_units: units of the future model, 0 for none.
        message_clip: largest absolute value in a message, as a multiple of the targets' running root mean square; 0 for no
            limit.
        exact_steps: number of future steps whose gradient the kind "exact" computes.
        synthetic_scale: c, a number or "auto".
        discount: γ.
        targets: "bootstrap" or "lambda".
        lam: λ of lambda targets.
        replay_windows: number of windows that are replayed together.
        regress_every: mean number of windows from one computation of targets to the next.
        target_network: windows between two copies of the synthesizer, 0 for no copies.
        fidelity_every: windows between two comparisons with exact gradients, 0 for no comparisons. An automatic scale needs
            comparisons.
        predict: what the predictor predicts, one of `PREDICTIONS`.
        predict_steps: m, the number of steps that the predictor predicts: of the future, of the past, or m of each. Without
            effect if `predict` is "horizons".
        message_every: steps between two states of a window that get messages; T or more if only the last state gets one.
        message_at_end: whether the last state of a window gets a message.
        auxiliary: weight of the auxiliary loss, 0 for none.
        synthesizer_clip: largest gradient norm of the synthesizer, 0 for no limit.
    """

    bptt: int
    synthesizer: str
    fit: str
    horizons: int
    tail: bool
    draw_horizon: bool
    lookahead: int
    next_input_only: bool
    normalize: bool
    gate: bool
    synthesizer_hidden: int
    synthesizer_layers: int
    future_units: int
    message_clip: float
    exact_steps: int
    synthetic_scale: float | Literal["auto"]
    discount: float
    targets: str
    lam: float
    replay_windows: int
    regress_every: int
    target_network: int
    fidelity_every: int
    predict: str
    predict_steps: int
    message_every: int
    message_at_end: bool
    auxiliary: float
    synthesizer_clip: float

    @property
    def message_count(self) -> int:
        """Number of messages that the learned synthesizer predicts at a state."""
        if self.predict != "horizons":
            return 1
        return self.horizons + self.tail if self.synthesizer in ("multi-horizon", "paper") else 1

    @property
    def message_limit(self) -> float | None:
        """Largest absolute value in a message, as a multiple of the targets' running root mean square. None for no limit."""
        return self.message_clip or None

    @property
    def window_lookahead(self) -> int:
        """Number of lookahead steps that windows must carry. For exact: `exact_steps` plus the steps that its tail reads."""
        return self.lookahead + (self.exact_steps if self.synthesizer == "exact" else 0)

    @property
    def state_products(self) -> float:
        """Mean number per window of backward passes to the state alone, besides the main one; see `native_up_to`.

        The LSTM kernel is chosen by this number.
        """
        if self.synthesizer == "none":
            return 0
        regressed = self.fit != "future"
        by_horizon = self.synthesizer == "multi-horizon" and self.targets == "bootstrap"
        heads = self.message_count if by_horizon else 1
        if by_horizon and heads == 1 and self.regress_every > 1 and not self.auxiliary and regressed:
            return 0  # injection is skipped at a window that regresses; see `regress_every` of `SyntheticGradientConfig`
        return (1 if self.draw_horizon and regressed else heads) / self.regress_every
