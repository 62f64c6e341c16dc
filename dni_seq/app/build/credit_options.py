"""The credit-assignment options that all commands share, and the settings derived from them and the window length T."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any, Literal, TypeVar

from dni_seq.app.runs.options import above_zero, at_least, fraction, option

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
"""Defaults of c and γ by synthesizer. One message for all future windows bootstraps on itself and needs a discount below 1;
horizons with their own automatic scales do not."""

REGRESS_EVERY: Mapping[str, int] = MappingProxyType({"basic": 1, "paper": 1, "state": 3, "multi-horizon": 4, "exact": 1})
"""Defaults of `--regress-every` by synthesizer: a large synthesizer is costly to train (docs/performance.md)."""

HORIZONS, LEAST_STEPS = 2, 4
"""The default K of multi-horizon with a future model is at least HORIZONS, and at least LEAST_STEPS / T. With fewer horizons
copy tasks learn less; with fewer steps text learns less at T = 1 (docs/synthetic-gradients.md). `default_scale` keeps the
total weight of more horizons at that of `HORIZONS`."""

MEASURE_EVERY = 100
"""Windows between two targets of a self-supervised synthesizer. Its targets only measure the messages."""

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
    """The options of credit assignment across windows. The options of each command inherit from this class."""

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
        "K, number of future windows predicted separately by multi-horizon, or by paper if K > 1",
        group=GROUP,
        check=at_least(1),
        shown=f"multi-horizon max({HORIZONS}, ceil({LEAST_STEPS}/T)); 1 for words or sentencepiece, regressed messages, "
        "or a given --lookahead",
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
        shown="--horizons times --bptt; paper: the next step's input",
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
        "units of the future model, whose gradient is the message or a feature for regression; 0: none",
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
        "windows between comparisons of messages with exact gradients; 0: none (auto scale: 47)",
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


CreditOptionsT = TypeVar("CreditOptionsT", bound=CreditOptions)


def resolve(options: CreditOptions, bptt: int) -> CreditOptions:
    """Returns the options with `fit` and `horizons` filled in. The default `fit` is "future" if no option rules it out.

    Args:
        options: as given by the user.
        bptt: T.

    Raises:
        ValueError: `--fit future` is given with an option that rules it out, or `--fit least-squares` with
            `--no-normalize`.
    """
    found = _all_hindrances(options, bptt)
    fit = options.fit
    if fit is None:
        fit = "descent" if options.normalize is False else "least-squares" if found else "future"
    elif fit == "future" and found:
        raise ValueError(f"--fit future is not possible with {found[0]}")
    elif (
        fit == "least-squares"
        and options.normalize is False
        and (options.synthesizer == "state" or _can_use_future_model(options))
    ):
        raise ValueError("--fit least-squares needs normalised targets: remove --no-normalize, or use --fit descent")
    return replace(options, fit=fit, horizons=horizons_of(options, bptt))


def why_fitted(options: CreditOptions, bptt: int) -> str | None:
    """Returns the option that makes messages regressed although `--fit` is not given, as text; None if there is none.

    Args:
        options: as given by the user.
        bptt: T.
    """
    if options.fit is not None or not _can_use_future_model(options):
        return None
    return next(iter(_all_hindrances(options, bptt)), None)


def _can_use_future_model(options: CreditOptions) -> bool:
    """Whether the synthesizer is of a kind whose messages can be the gradient of a future model."""
    return options.synthesizer == "multi-horizon" or (options.synthesizer == "exact" and options.tail)


def _all_hindrances(options: CreditOptions, bptt: int) -> list[str]:
    """Returns the options that rule out `--fit future`, as texts."""
    found, steps = _hindrances(options), tail_lookahead(options, bptt)
    if not steps:
        found.append("--lookahead 0")
    elif options.synthesizer == "multi-horizon" and steps % horizons_of(options, bptt):
        found.append(f"--lookahead {options.lookahead}, which is not a multiple of --horizons")
    return found


def _hindrances(options: CreditOptions) -> list[str]:
    """Returns the same texts without those about the lookahead, whose default depends on this result."""
    learned = _can_use_future_model(options)
    hindrances = {
        f"--synthesizer {options.synthesizer}": not learned,
        "--future-units 0 (no future model)": not future_units(options),
        "--no-normalize": options.normalize is False,
        "--tail": options.tail and options.synthesizer == "multi-horizon",
        "--targets lambda": options.targets != "bootstrap",
        "--target-network": options.target_network > 0,
    }
    return [name for name, hinders in hindrances.items() if hinders]


def horizons_of(options: CreditOptions, bptt: int) -> int:
    """Returns K, given or by default. The default is 1 if messages are regressed or a lookahead is given.

    Args:
        options: as given by the user.
        bptt: T.
    """
    if options.horizons is not None:
        return options.horizons
    usual = options.synthesizer == "multi-horizon" and options.lookahead is None and options.fit in (None, "future")
    return default_horizons(bptt) if usual and not _hindrances(options) else 1


def resolved_horizons(options: CreditOptions) -> int:
    """Returns K of options that `resolve` has returned."""
    assert options.horizons is not None
    return options.horizons


def default_horizons(bptt: int) -> int:
    """Returns the default K for messages of a future model and windows of T = `bptt` steps."""
    return max(HORIZONS, math.ceil(LEAST_STEPS / bptt))


def default_scale(horizons: int) -> float:
    """Returns the default c for K = `horizons` of a future model, min(1, 2 / K): with K = 4, c = 0.5 was better than 1."""
    return min(1.0, HORIZONS / horizons)


def without_resolved(
    config: Mapping[str, Any], options: CreditOptionsT, with_default_sizes: Callable[[CreditOptionsT], CreditOptionsT]
) -> dict[str, Any]:
    """Returns a run's configuration without the `lookahead` and `horizons` that were filled in from its other options.

    A run records them so that resuming it keeps them. A new run that starts from this configuration derives its own.

    Args:
        config: the recorded options, by name.
        options: the same options as an object.
        with_default_sizes: fills the sizes that are None.
    """
    followed = []
    for name in ("lookahead", "horizons"):  # a lookahead follows from horizons
        nobody_gave: dict[str, Any] = {name: None}
        free = replace(options, **nobody_gave)
        if getattr(with_default_sizes(free), name) == getattr(options, name):
            options = free
            followed.append(name)
    return {name: value for name, value in config.items() if name not in followed}


def scale_of(options: CreditOptions) -> float | Literal["auto"]:
    """Returns c, the share of the message that is injected, given or by default. `options` come from `resolve`."""
    if options.synthetic_scale is not None:
        return scale(options.synthetic_scale)
    if options.fit != "future":
        return scale(SCALES.get(options.synthesizer, "0"))
    return default_scale(resolved_horizons(options)) if options.synthesizer == "multi-horizon" else 1.0


def normalizes(options: CreditOptions) -> bool:
    """Whether targets are divided by their running root mean square, given or by default."""
    return options.synthesizer != "paper" if options.normalize is None else options.normalize


def future_units(options: CreditOptions) -> int:
    """Returns the units of the future model, 0 for none."""
    return FUTURE_UNITS if options.future_units is None else options.future_units


def state_products(options: CreditOptions) -> float:
    """Returns the mean number of state-only vector-Jacobian products per window, by which the LSTM kernel is chosen."""
    if options.synthesizer == "none":
        return 0
    apart = regressions_apart(options)
    by_horizon = options.synthesizer == "multi-horizon" and options.targets == "bootstrap"
    heads = resolved_horizons(options) + options.tail if by_horizon else 1
    if by_horizon and heads == 1 and apart > 1 and not options.auxiliary and options.fit != "future":
        return 0  # injection is skipped at such a window: see `SequenceTrainer`, regress_every
    return (1 if options.draw_horizon and options.fit != "future" else heads) / apart


def regressions_apart(options: CreditOptions) -> int:
    """Returns the mean number of windows from one computation of targets to the next."""
    if options.regress_every is None and options.fit == "future":
        return MEASURE_EVERY
    return options.regress_every or REGRESS_EVERY.get(options.synthesizer, 1)


def lookahead_of(options: CreditOptions, bptt: int) -> int:
    """Returns the number of lookahead steps that windows must carry."""
    if options.synthesizer == "exact":
        return options.exact_steps + (tail_lookahead(options, bptt) if options.tail else 0)
    return tail_lookahead(options, bptt) if options.synthesizer in ("paper", "state", "multi-horizon") else 0


def tail_lookahead(options: CreditOptions, bptt: int) -> int:
    """Returns the number of future steps that a learned synthesizer sees."""
    if options.lookahead is not None:
        return options.lookahead
    return 1 if options.synthesizer == "paper" else horizons_of(options, bptt) * bptt
