"""The settings of credit assignment in force in a run. `CreditOptions.resolve` makes them from the options."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class ResolvedCredit:
    """The settings of credit assignment in force at one window length. No attribute is None.

    The learning rate of the synthesizer is not among them: the options themselves hold it.

    Attributes:
        bptt: T, the window length in steps.
        synthesizer: the kind, one of `SYNTHESIZERS`.
        fit: how messages are made: "future", "least-squares" or "descent". "future" excludes `tail` for multi-horizon, and
            needs normalised targets and a lookahead.
        horizons: K.
        tail: whether there is one more head, or a synthesizer after the exact steps.
        draw_horizon: whether one randomly drawn head trains per window.
        lookahead: future steps that the learned synthesizer sees; 0 for a kind that sees none. The steps of exact are not
            among them.
        next_input_only: whether the lookahead is the next step's input without its target: paper by default.
        normalize: whether targets are divided by their running root mean square.
        gate: whether LSTM cell states are bounded.
        synthesizer_hidden: units per hidden layer.
        synthesizer_layers: number of hidden layers.
        future_units: units of the future model, 0 for none.
        message_clip: see `message_limit`.
        exact_steps: future steps whose gradient exact computes.
        synthetic_scale: c, a number or "auto".
        discount: γ.
        targets: "bootstrap" or "lambda".
        lam: λ of lambda targets.
        replay_windows: windows per replay.
        regress_every: mean number of windows from one computation of targets to the next.
        target_network: windows between two copies of the synthesizer, 0 for no copies.
        fidelity_every: windows between comparisons with exact gradients, those for an automatic scale included; 0 for none.
        predict: what the predictor predicts, one of `PREDICTIONS`.
        predict_steps: m, steps of the future, the past or both that it predicts, if that is not the next windows.
        message_every: steps between two states of a window that get messages; T or more for the last state alone.
        message_at_end: whether the last state gets its message.
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
        """Largest value in a message, in units of its targets' running root mean square. None for no limit."""
        return self.message_clip or None

    @property
    def window_lookahead(self) -> int:
        """Number of lookahead steps that windows must carry: the steps of exact, then those that its tail sees."""
        return self.lookahead + (self.exact_steps if self.synthesizer == "exact" else 0)

    @property
    def state_products(self) -> float:
        """Mean number of state-only vector-Jacobian products per window, by which the LSTM kernel is chosen."""
        if self.synthesizer == "none":
            return 0
        regressed = self.fit != "future"
        by_horizon = self.synthesizer == "multi-horizon" and self.targets == "bootstrap"
        heads = self.message_count if by_horizon else 1
        if by_horizon and heads == 1 and self.regress_every > 1 and not self.auxiliary and regressed:
            return 0  # injection is skipped at such a window: see `SequenceTrainer`, regress_every
        return (1 if self.draw_horizon and regressed else heads) / self.regress_every
