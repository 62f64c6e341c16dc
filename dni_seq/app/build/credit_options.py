"""The credit-assignment options that all commands share. `CreditOptions.resolve` derives the settings in force from them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from types import MappingProxyType
from typing import Any, Literal, TypeVar

from dni_seq.app.build.resolved_credit import ResolvedCredit
from dni_seq.app.runs.options import above_zero, at_least, fraction, option
from dni_seq.synthesizers.defaults import (
    HORIZONS,
    LEAST_STEPS,
    LONG_WINDOW,
    MEASURE_EVERY,
    PREDICTIONS,
    REACH,
    default_horizons,
    default_scale,
)

GROUP = "credit assignment"

SYNTHESIZERS = ("none", "basic", "paper", "state", "multi-horizon", "exact")
"""basic: one message, from each layer's state alone; paper: as published (`jaderberg2017.py`); state: the network of
multi-horizon with one message for all future windows; exact: the exact gradient of the next steps."""

STANDS_IN = "source of the injected gradient of later windows"
"""The help text of `--synthesizer`."""

SCALES: Mapping[str, str] = MappingProxyType(
    {"basic": "auto", "paper": "0.1", "state": "auto", "multi-horizon": "auto", "exact": "1"}
)
DISCOUNTS: Mapping[str, float] = MappingProxyType(
    {"basic": 0.9, "paper": 0.1, "state": 0.9, "multi-horizon": 1.0, "exact": 0.9}
)
"""Defaults of c and γ by synthesizer. A target for all future windows contains the message itself, so it needs γ below 1.
Horizons need no γ below 1, because each horizon has a scale of its own, which is set automatically."""

REGRESS_EVERY: Mapping[str, int] = MappingProxyType({"basic": 1, "paper": 1, "state": 3, "multi-horizon": 4, "exact": 1})
"""Defaults of `--regress-every` by synthesizer: a large synthesizer is costly to train."""

AUTO_FIDELITY_EVERY = 47
"""Windows between two comparisons for an automatic scale. A prime, because with a multiple of the sequence length every
comparison would fall on the same state of the sequence, for example the first, whose gradient is zero in a copy task."""

FUTURE_UNITS = 256
"""Default units of the future model."""


def scale(value: str) -> float | Literal["auto"]:
    """Returns a `--synthetic-scale` as a number or "auto".

    Raises:
        ValueError: `value` is neither a finite number of 0 or more nor "auto".
    """
    if value == "auto":
        return "auto"
    try:
        number = float(value)
    except ValueError:
        number = -1.0
    if not 0 <= number < float("inf"):
        raise ValueError(f'--synthetic-scale must be 0 or more, or "auto", got {value!r}')
    return number


def _is_scale(value: str) -> str | None:
    try:
        scale(value)
    except ValueError:
        return '0 or more, or "auto"'
    return None


def _by_synthesizer(defaults: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in defaults.items())


@dataclass(frozen=True)
class CreditOptions:
    """The options of credit assignment across windows, as given. The options of each command inherit from this class.

    Many options are None if they are not given, which means a default that depends on other options and on the window
    length T. `resolve` fills them in.
    """

    synthesizer: str = option("multi-horizon", STANDS_IN, group=GROUP, choices=SYNTHESIZERS)
    synthetic_scale: str | None = option(
        None,
        "share c of the message that is injected; auto: adapted by comparisons with exact gradients",
        group=GROUP,
        check=_is_scale,
        metavar="C|auto",
        shown=_by_synthesizer({**SCALES, "multi-horizon": f"1 ({HORIZONS}/K if K > {HORIZONS}; auto if regressed)"}),
    )
    discount: float | None = option(
        None, "discount γ for each further window", group=GROUP, check=fraction, shown=_by_synthesizer(DISCOUNTS)
    )
    horizons: int | None = option(
        None,
        "K, number of future windows predicted separately; by multi-horizon, or by paper if K > 1",
        group=GROUP,
        check=at_least(1),
        shown=f"multi-horizon max({HORIZONS}, ceil({LEAST_STEPS}/T)); 1 for words, sentencepiece, text from T = "
        f"{LONG_WINDOW} on, regressed messages, or a given --lookahead",
    )
    tail: bool = option(
        False,
        "multi-horizon, paper: one more head for all windows after the horizons; exact: a synthesizer after its steps",
        group=GROUP,
    )
    draw_horizon: bool = option(False, "regressed heads, or paper's: train one randomly drawn head per window", group=GROUP)
    lookahead: int | None = option(
        None,
        "future steps that paper, state, multi-horizon and the tail of exact see",
        group=GROUP,
        check=at_least(0),
        shown=f"--horizons times --bptt; text from T = {LONG_WINDOW} on: {LEAST_STEPS}; paper: the next step's input",
    )
    normalize: bool | None = option(
        None,
        "divide the synthesizer's targets by their running root mean square",
        group=GROUP,
        shown="yes; paper: no",
    )
    gate: bool | None = option(
        None, "bound LSTM cell states in the synthesizer's input and message", group=GROUP, shown="yes; paper: no"
    )
    synthesizer_hidden: int = option(
        128, "units per hidden layer of regressed state and multi-horizon synthesizers", group=GROUP, check=at_least(1)
    )
    synthesizer_layers: int = option(
        1, "hidden layers of regressed state and multi-horizon synthesizers", group=GROUP, check=at_least(0)
    )
    future_units: int | None = option(
        None,
        "units of the predictor, whose gradient is the message or a feature for regression; 0: none",
        group=GROUP,
        check=at_least(0),
        shown=str(FUTURE_UNITS),
    )
    fit: str | None = option(
        None,
        "messages: gradient of the future model (not for state), or regressed by least-squares heads or by descent",
        group=GROUP,
        choices=("future", "least-squares", "descent"),
        shown="multi-horizon and exact's tail: future if possible; else least-squares, descent with --no-normalize",
    )
    message_clip: float = option(
        10.0,
        "largest value in a message, in units of its targets' running root mean square; 0: no limit",
        group=GROUP,
        check=at_least(0),
    )
    predict: str = option(
        "horizons",
        "what the predictor of --fit future predicts: the next K windows, the next m steps, the last m inputs, or both",
        group=GROUP,
        choices=PREDICTIONS,
    )
    predict_steps: int | None = option(
        None, "m of --predict future, past or both, in steps", group=GROUP, check=at_least(1), shown=str(REACH)
    )
    message_every: int | None = option(
        None,
        "steps between two states of a window that get messages, by multi-horizon with --fit future",
        group=GROUP,
        check=at_least(1),
        shown="the last state alone",
    )
    message_at_end: bool = option(True, "send the message at the last state; no only with --message-every", group=GROUP)
    exact_steps: int = option(4, "exact: future steps whose gradient is computed", group=GROUP, check=at_least(1))
    targets: str = option("bootstrap", "training targets of the synthesizer", group=GROUP, choices=("bootstrap", "lambda"))
    lam: float = option(
        0.9, "λ of lambda targets: 0 bootstrapped, 1 exact over the replayed windows", group=GROUP, check=fraction
    )
    replay_windows: int = option(8, "windows per replay for lambda targets and comparisons", group=GROUP, check=at_least(1))
    regress_every: int | None = option(
        None,
        "compute targets at one randomly drawn window of this many; regressed messages train only there",
        group=GROUP,
        check=at_least(1),
        shown=_by_synthesizer(
            {**REGRESS_EVERY, "multi-horizon": f"{MEASURE_EVERY} ({REGRESS_EVERY['multi-horizon']} if regressed)"}
        ),
    )
    auxiliary: float = option(
        0.0,
        "weight of the auxiliary loss for predicting the next synthetic gradient; 0: off",
        group=GROUP,
        check=at_least(0),
    )
    target_network: int = option(
        0,
        "windows between two copies of the synthesizer used for bootstrapped targets; 0: off",
        group=GROUP,
        check=at_least(0),
    )
    fidelity_every: int = option(
        0,
        "windows between comparisons of the parameters' gradient and of messages with exact ones; 0: none (auto scale: "
        "messages every 47)",
        group=GROUP,
        check=at_least(0),
    )
    synthesizer_lr: float = option(1e-3, "learning rate of the synthesizer", group=GROUP, check=above_zero)
    synthesizer_clip: float | None = option(
        None,
        "largest gradient norm of the synthesizer; 0: no limit",
        group=GROUP,
        check=at_least(0),
        shown="1; --fit future: 0",
    )

    def resolve(self, bptt: int) -> ResolvedCredit:
        """Returns the settings in force, with every default filled in. The default fit is "future" if it is possible.

        Args:
            bptt: T, the window length in steps.

        Raises:
            ValueError: options contradict each other, for example `--fit future` and `--no-normalize`.
        """
        kind, fit, horizons = self.synthesizer, self._fit_at(bptt), self.horizons_at(bptt)
        check_regression(self, fit, bptt)
        check_messages(self, fit, bptt)
        check_prediction(self, fit, bptt)
        synthetic_scale = self._scale(fit, horizons)
        return ResolvedCredit(
            bptt=bptt,
            synthesizer=kind,
            fit=fit,
            horizons=horizons,
            tail=self.tail,
            draw_horizon=self.draw_horizon,
            lookahead=self.lookahead_at(bptt),
            next_input_only=kind == "paper" and self.lookahead is None,
            normalize=_filled(self.normalize, kind != "paper"),
            gate=_filled(self.gate, kind != "paper"),
            synthesizer_hidden=self.synthesizer_hidden,
            synthesizer_layers=self.synthesizer_layers,
            future_units=_filled(self.future_units, FUTURE_UNITS),
            message_clip=self.message_clip,
            exact_steps=self.exact_steps,
            synthetic_scale=synthetic_scale,
            discount=_filled(self.discount, DISCOUNTS.get(kind, 1.0)),
            targets=self.targets,
            lam=self.lam,
            replay_windows=self.replay_windows,
            regress_every=_filled(self.regress_every, MEASURE_EVERY if fit == "future" else REGRESS_EVERY.get(kind, 1)),
            target_network=self.target_network,
            fidelity_every=self.fidelity_every or (AUTO_FIDELITY_EVERY if synthetic_scale == "auto" else 0),
            predict=self.predict,
            predict_steps=_filled(self.predict_steps, REACH),
            message_every=_filled(self.message_every, bptt),
            message_at_end=self.message_at_end,
            auxiliary=self.auxiliary,
            synthesizer_clip=_filled(self.synthesizer_clip, 0.0 if fit == "future" else 1.0),
        )

    # `horizons_at` and `lookahead_at` do not raise for options that contradict each other. A configuration file may hold
    # such options if the command line changes one of them.

    def horizons_at(self, bptt: int) -> int:
        """Returns K, given or by default. The default is `default_horizons(T)` if `has_default_reach`, else 1.

        Args:
            bptt: T, the window length in steps.
        """
        if self.horizons is not None:
            return self.horizons
        return default_horizons(bptt) if self.has_default_reach else 1

    @property
    def has_default_reach(self) -> bool:
        """Whether a model of the next windows makes the messages, and neither `horizons` nor `lookahead` gives its reach."""
        return (
            self.synthesizer == "multi-horizon"
            and self.predict == "horizons"
            and self.horizons is None
            and self.lookahead is None
            and self.fit in (None, "future")
            and not self._hindrances()
        )

    def lookahead_at(self, bptt: int) -> int:
        """Returns the number of future steps that a learned synthesizer sees, given or by default; 0 if its kind sees none.

        Args:
            bptt: T, the window length in steps.
        """
        if self.synthesizer == "paper":
            return _filled(self.lookahead, 1)
        return _filled(self.lookahead, self.usual_lookahead(bptt)) if self.has_state_network else 0

    def usual_lookahead(self, bptt: int) -> int:
        """Returns the number of future steps that the synthesizer sees by default, 0 if it predicts the past."""
        if self.predict == "horizons":
            return self.horizons_at(bptt) * bptt
        return 0 if self.predict == "past" else _filled(self.predict_steps, REACH)

    def why_regressed(self, bptt: int) -> str | None:
        """Returns as text the option that makes messages regressed although `--fit` is not given; None if no option does."""
        if self.fit is not None or not self._can_use_future_model:
            return None
        return next(iter(self._hindrances_at(bptt)), None)

    @property
    def has_state_network(self) -> bool:
        """Whether the synthesizer is a network over all layers' states and the lookahead, sized by K and the lookahead."""
        return self.synthesizer == "state" or self._can_use_future_model

    @property
    def _can_use_future_model(self) -> bool:
        """Whether the synthesizer is of a kind whose messages can be the gradient of a future model."""
        return self.synthesizer == "multi-horizon" or (self.synthesizer == "exact" and self.tail)

    def _fit_at(self, bptt: int) -> str:
        """Returns `fit`, given or by default. Raises a ValueError if "future" is given and another option rules it out."""
        found = self._hindrances_at(bptt)
        if self.fit is None:
            return "descent" if self.normalize is False else "least-squares" if found else "future"
        if self.fit == "future" and found:
            raise ValueError(f"--fit future is not possible with {found[0]}")
        return self.fit

    def _hindrances_at(self, bptt: int) -> list[str]:
        """Returns the options that rule out `--fit future`, as texts."""
        found, steps = self._hindrances(), self.lookahead_at(bptt)
        if self.predict == "past":
            return found
        if not steps:
            found.append("--lookahead 0")
        elif self.synthesizer == "multi-horizon" and steps % self.horizons_at(bptt):
            found.append(f"--lookahead {self.lookahead}, which is not a multiple of --horizons")
        return found

    def _hindrances(self) -> list[str]:
        """Returns the texts of `_hindrances_at` except those on the lookahead, whose default depends on the other texts."""
        hindrances = {
            f"--synthesizer {self.synthesizer}": not self._can_use_future_model,
            "--future-units 0 (no future model)": self.future_units == 0,
            "--no-normalize": self.normalize is False,
            "--tail": self.tail and self.synthesizer == "multi-horizon",
            "--targets lambda": self.targets != "bootstrap",
            "--target-network": self.target_network > 0,
        }
        return [name for name, hinders in hindrances.items() if hinders]

    def _scale(self, fit: str, horizons: int) -> float | Literal["auto"]:
        """Returns c, the share of the message that is injected, given or by default."""
        if self.synthetic_scale is not None:
            return scale(self.synthetic_scale)
        if fit != "future":
            return scale(SCALES.get(self.synthesizer, "0"))
        return default_scale(horizons) if self.synthesizer == "multi-horizon" else 1.0


def check_regression(options: CreditOptions, fit: str, bptt: int) -> None:
    """Raises a ValueError if messages are to be regressed by a `fit` that the other options do not allow."""
    if not options.has_state_network:
        return
    raw_targets = options.normalize is False
    if raw_targets and fit == "least-squares":
        raise ValueError("--fit least-squares needs normalised targets: remove --no-normalize, or use --fit descent")
    if raw_targets and options.future_units:
        raise ValueError("--future-units needs normalised targets: remove --no-normalize or --future-units")
    if fit == "least-squares" and not options.lookahead_at(bptt) and not options.synthesizer_layers:
        raise ValueError(
            "--fit least-squares needs features to learn: set --synthesizer-layers or --lookahead, or use --fit descent"
        )


def check_messages(options: CreditOptions, fit: str, bptt: int) -> None:
    """Raises a ValueError if messages inside a window are not possible with the other options."""
    if not options.message_at_end and _filled(options.message_every, bptt) >= bptt:
        raise ValueError("--no-message-at-end needs --message-every below --bptt: else nothing is injected")
    if options.message_every is None:
        return
    if options.synthesizer != "none" and (options.synthesizer, fit) != ("multi-horizon", "future"):
        raise ValueError("--message-every needs --synthesizer multi-horizon with --fit future")
    if options.auxiliary:
        raise ValueError("--message-every does not work with --auxiliary: remove one of them")


def check_prediction(options: CreditOptions, fit: str, bptt: int) -> None:
    """Raises a ValueError if the predictor cannot predict what `predict` names with the other options."""
    if options.predict == "horizons":
        return
    if options.synthesizer != "none" and (options.synthesizer, fit) != ("multi-horizon", "future"):
        raise ValueError(f"--predict {options.predict} needs --synthesizer multi-horizon with --fit future")
    if options.horizons not in (None, 1):
        raise ValueError(f"--horizons {options.horizons} needs --predict horizons: the others predict all steps together")
    if options.lookahead not in (None, options.usual_lookahead(bptt)) and options.synthesizer != "none":
        raise ValueError(f"--predict {options.predict} has a reach of its own: use --predict-steps in place of --lookahead")


CreditOptionsT = TypeVar("CreditOptionsT", bound=CreditOptions)
Value = TypeVar("Value")


def _filled(value: Value | None, default: Value) -> Value:
    """Returns the value of an option that may be None, which means the default."""
    return default if value is None else value


def default_values(
    options: CreditOptionsT,
    as_given: Callable[[Mapping[str, Any]], Mapping[str, Any]],
    by_setting: Mapping[str, Any],
) -> dict[str, Any]:
    """Returns for each option the value that it would have if it were not given and the other options were as they are.

    Without a synthesizer, the options of credit assignment other than `synthesizer` and `fidelity_every` have no effect. For
    these ineffective options, returns the values in `options`.

    Args:
        options: options with their missing values filled in.
        as_given: removes the sizes that are filled in from other options, see `without_resolved`.
        by_setting: the defaults that depend on other options, by name.
    """
    values = {entry.name: getattr(options, entry.name) for entry in fields(options)}
    derived = values.keys() - as_given(values).keys()
    if options.synthesizer == "none":
        derived |= {entry.name for entry in fields(CreditOptions)} - {"synthesizer", "fidelity_every"}
    kept = {name: values[name] for name in derived}
    return {entry.name: entry.default for entry in fields(options)} | dict(by_setting) | kept


def without_resolved(
    config: Mapping[str, Any], options: CreditOptionsT, with_default_sizes: Callable[[CreditOptionsT], CreditOptionsT]
) -> dict[str, Any]:
    """Returns a run's configuration without the `lookahead` and `horizons` that were filled in from its other options.

    A run records both numbers to keep them when it is resumed. A new run with this configuration derives the numbers anew.

    Args:
        config: the recorded options, by name.
        options: the same options as an object.
        with_default_sizes: fills the sizes that are None.
    """
    for names in (("lookahead", "horizons"), ("lookahead",), ("horizons",)):  # a default lookahead follows from K
        nobody_gave: dict[str, Any] = dict.fromkeys(names)
        free = replace(options, **nobody_gave)
        derived = with_default_sizes(free)
        if all(getattr(derived, name) == getattr(options, name) for name in names):
            return {name: value for name, value in config.items() if name not in names}
    return dict(config)
