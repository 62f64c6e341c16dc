"""The credit-assignment options that all scripts share, and what follows from them and a window's length."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any, Literal, TypeVar

from dni_seq.app.runs.options import above_zero, at_least, fraction, option

GROUP = "credit assignment"

SYNTHESIZERS = ("none", "basic", "paper", "state", "multi-horizon", "exact")
"""basic: one message, from each layer's state alone; paper: as published (`published.py`); state: the network of
multi-horizon with one message for all windows; exact: the gradient itself."""

STANDS_IN = "what stands in for the gradient from behind the window"
"""What `--synthesizer` is, for --help."""

SCALES: Mapping[str, str] = MappingProxyType(
    {"basic": "auto", "paper": "0.1", "state": "auto", "multi-horizon": "auto", "exact": "1"}
)
DISCOUNTS: Mapping[str, float] = MappingProxyType(
    {"basic": 0.9, "paper": 0.1, "state": 0.9, "multi-horizon": 1.0, "exact": 0.9}
)
"""Defaults by synthesizer. One message for all windows to come bootstraps on itself and needs discounting; horizons that are
trusted one by one do not."""

REGRESS_EVERY: Mapping[str, int] = MappingProxyType({"basic": 1, "paper": 1, "state": 3, "multi-horizon": 4, "exact": 1})
"""Defaults by synthesizer: those that predict well cost something to train (docs/performance.md)."""

HORIZONS, LEAST_STEPS = 2, 4
"""Of multi-horizon where messages are a model's gradient and nothing else is asked for: so many windows at least, of one
copying learns less; and as many as so many steps take, of fewer text learns less at T = 1 (docs/synthetic-gradients.md).
Together they weigh no more than `HORIZONS` do: see `default_scale`."""

MEASURE_EVERY = 100
"""Windows between two targets of what learns without them, which measure its messages."""

AUTO_FIDELITY_EVERY = 47
"""Windows between two comparisons of an automatic scale. A prime: sequences of 2, 5 or 10 windows would be compared at the
same place every time otherwise, at their first state, say, whose gradient is zero in a copying task."""

FUTURE_UNITS = 256
"""Default units of the model of what is ahead."""


def scale(value: str) -> float | Literal["auto"]:
    """A `--synthetic-scale`.

    Raises:
        ValueError: it is neither a number of 0 or more nor "auto".
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
    """How gradients reach back over the window's start; the options of each script inherit these."""

    synthesizer: str = option("multi-horizon", STANDS_IN, group=GROUP, choices=SYNTHESIZERS)
    synthetic_scale: str | None = option(
        None,
        "share of the synthetic gradient that is injected; auto: what comparisons with exact gradients find right",
        group=GROUP,
        check=_is_scale,
        metavar="C|auto",
        shown=_by_synthesizer({**SCALES, "multi-horizon": f"1, of K > {HORIZONS} horizons {HORIZONS}/K, fitted auto"}),
    )
    discount: float | None = option(
        None, "weight of each further window", group=GROUP, check=fraction, shown=_by_synthesizer(DISCOUNTS)
    )
    horizons: int | None = option(
        None,
        "windows ahead that multi-horizon predicts one by one; paper: from 2 on",
        group=GROUP,
        check=at_least(1),
        shown=f"multi-horizon {HORIZONS}, or as many as {LEAST_STEPS} steps take; by words or sentencepiece, fitted, "
        "or with a lookahead that is given 1",
    )
    tail: bool = option(
        False,
        "multi-horizon, paper: one more head for all windows behind the horizons; exact: a synthesizer for what is behind "
        "its steps",
        group=GROUP,
    )
    draw_horizon: bool = option(False, "fitted heads, or those of paper: train one a window, drawn at random", group=GROUP)
    lookahead: int | None = option(
        None,
        "steps ahead that paper, state and multi-horizon see",
        group=GROUP,
        check=at_least(0),
        shown="--horizons times --bptt, paper the next step's input",
    )
    normalize: bool | None = option(
        None, "train the synthesizer in units of its targets' size", group=GROUP, shown="yes, paper no"
    )
    gate: bool | None = option(
        None, "bound what the synthesizer sees and says of an LSTM's cells", group=GROUP, shown="yes, paper no"
    )
    synthesizer_hidden: int = option(
        128, "units of the hidden layers of fitted state and multi-horizon", group=GROUP, check=at_least(1)
    )
    synthesizer_layers: int = option(1, "hidden layers of fitted state and multi-horizon", group=GROUP, check=at_least(0))
    future_units: int | None = option(
        None,
        "units of a model of the steps ahead, whose gradient is the message, or what fitted ones start from; 0 for none",
        group=GROUP,
        check=at_least(0),
        shown=str(FUTURE_UNITS),
    )
    fit: str | None = option(
        None,
        "what messages of state, multi-horizon and exact's tail are: future (not of state), the gradient of the model of "
        "the steps ahead; fitted to targets, a last layer solved from the latest windows or learned by descent",
        group=GROUP,
        choices=("future", "least-squares", "descent"),
        shown="multi-horizon and exact's tail future, where it can be; else least-squares, --no-normalize descent",
    )
    message_clip: float = option(
        10.0,
        "largest number in a message, in units of the running root mean square of its targets, 0 for no limit",
        group=GROUP,
        check=at_least(0),
    )
    exact_steps: int = option(4, "exact: steps ahead whose gradient is computed", group=GROUP, check=at_least(1))
    targets: str = option(
        "bootstrap", "what the synthesizer is trained towards", group=GROUP, choices=("bootstrap", "lambda")
    )
    lam: float = option(
        0.9, "lambda targets: 0 bootstrapped, 1 exact over the replayed windows", group=GROUP, check=fraction
    )
    replay_windows: int = option(8, "windows in a replay", group=GROUP, check=at_least(1))
    regress_every: int | None = option(
        None,
        "compute targets at one window of so many, drawn at random; all but --fit future are trained there alone",
        group=GROUP,
        check=at_least(1),
        shown=_by_synthesizer(
            {**REGRESS_EVERY, "multi-horizon": f"{MEASURE_EVERY}, fitted {REGRESS_EVERY['multi-horizon']}"}
        ),
    )
    auxiliary: float = option(
        0.0, "weight of the loss of predicting the next synthetic gradient, 0 for off", group=GROUP, check=at_least(0)
    )
    target_network: int = option(
        0, "windows between copies of the synthesizer that bootstrap the targets, 0 for off", group=GROUP, check=at_least(0)
    )
    fidelity_every: int = option(
        0, "windows between comparisons with exact gradients, 0 for none (auto scale: 47)", group=GROUP, check=at_least(0)
    )
    synthesizer_lr: float = option(1e-3, "the synthesizer's learning rate", group=GROUP, check=above_zero)
    synthesizer_clip: float | None = option(
        None,
        "largest norm of the synthesizer's gradient, 0 for no limit",
        group=GROUP,
        check=at_least(0),
        shown="1, --fit future 0",
    )


CreditOptionsT = TypeVar("CreditOptionsT", bound=CreditOptions)


def resolve(options: CreditOptions, bptt: int) -> CreditOptions:
    """The options with `fit` and `horizons` decided: by the model of what is ahead where that can be and is not ruled out.

    Args:
        options: as given.
        bptt: T.

    Raises:
        ValueError: that model is asked for where it cannot be, or a last layer solved from targets that are not normalised.
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
        and (options.synthesizer == "state" or _may_learn_ahead(options))
    ):
        raise ValueError("--fit least-squares solves for normalised targets: leave out --no-normalize, or --fit descent")
    return replace(options, fit=fit, horizons=horizons_of(options, bptt))


def why_fitted(options: CreditOptions, bptt: int) -> str | None:
    """What made messages fitted to targets where nobody asked for that, as text; None where it is not so.

    Args:
        options: as given.
        bptt: T.
    """
    if options.fit is not None or not _may_learn_ahead(options):
        return None
    return next(iter(_all_hindrances(options, bptt)), None)


def _may_learn_ahead(options: CreditOptions) -> bool:
    """Whether it is of a kind whose messages can be the gradient of the model of what is ahead."""
    return options.synthesizer == "multi-horizon" or (options.synthesizer == "exact" and options.tail)


def _all_hindrances(options: CreditOptions, bptt: int) -> list[str]:
    """What rules out that messages are the gradient of the model of what is ahead."""
    found, steps = _hindrances(options), tail_lookahead(options, bptt)
    if not steps:
        found.append("--lookahead 0")
    elif options.synthesizer == "multi-horizon" and steps % horizons_of(options, bptt):
        found.append(f"--lookahead {options.lookahead}, no multiple of --horizons")
    return found


def _hindrances(options: CreditOptions) -> list[str]:
    """The same, but for the steps that the model would see, which depend on what this says."""
    learned = _may_learn_ahead(options)
    hindrances = {
        f"--synthesizer {options.synthesizer}": not learned,
        "no model of the steps ahead, --future-units 0": not future_units(options),
        "--no-normalize": options.normalize is False,
        "--tail": options.tail and options.synthesizer == "multi-horizon",
        "--targets lambda": options.targets != "bootstrap",
        "--target-network": options.target_network > 0,
    }
    return [name for name, hinders in hindrances.items() if hinders]


def horizons_of(options: CreditOptions, bptt: int) -> int:
    """K, given or by default: one where messages are fitted, and where a lookahead that is given says how far they reach.

    Args:
        options: as given.
        bptt: T.
    """
    if options.horizons is not None:
        return options.horizons
    usual = options.synthesizer == "multi-horizon" and options.lookahead is None and options.fit in (None, "future")
    return default_horizons(bptt) if usual and not _hindrances(options) else 1


def resolved_horizons(options: CreditOptions) -> int:
    """K of options as `resolve`."""
    assert options.horizons is not None
    return options.horizons


def default_horizons(bptt: int) -> int:
    """K where messages are a model's gradient, of windows of T = `bptt` steps."""
    return max(HORIZONS, math.ceil(LEAST_STEPS / bptt))


def default_scale(horizons: int) -> float:
    """c of so many horizons of a model's gradient: four that were each sent whole did worse than four halves."""
    return min(1.0, HORIZONS / horizons)


def without_resolved(
    config: Mapping[str, Any], options: CreditOptionsT, with_default_sizes: Callable[[CreditOptionsT], CreditOptionsT]
) -> dict[str, Any]:
    """A run's configuration as it was given: without the sizes that only followed from its other options.

    They are on record so that a run which is resumed keeps them; a new run with some other options has its own.

    Args:
        config: the options on record, by name.
        options: those options.
        sized: fills the sizes that are None.
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
    """The share of the synthetic gradient that is injected, given or by default; options as `resolve`."""
    if options.synthetic_scale is not None:
        return scale(options.synthetic_scale)
    if options.fit != "future":
        return scale(SCALES.get(options.synthesizer, "0"))
    return default_scale(resolved_horizons(options)) if options.synthesizer == "multi-horizon" else 1.0


def normalizes(options: CreditOptions) -> bool:
    """Whether messages are in units of their targets' size, given or by default."""
    return options.synthesizer != "paper" if options.normalize is None else options.normalize


def future_units(options: CreditOptions) -> int:
    """The units of the model of what is ahead, 0 for none."""
    return FUTURE_UNITS if options.future_units is None else options.future_units


def state_products(options: CreditOptions) -> float:
    """The vector-Jacobian products to the state alone that a window takes on average, which decides the LSTM's kernel."""
    if options.synthesizer == "none":
        return 0
    apart = regressions_apart(options)
    by_horizon = options.synthesizer == "multi-horizon" and options.targets == "bootstrap"
    heads = resolved_horizons(options) + options.tail if by_horizon else 1
    if by_horizon and heads == 1 and apart > 1 and not options.auxiliary and options.fit != "future":
        return 0  # its window keeps quiet: see `SequenceTrainer`, regress_every
    return (1 if options.draw_horizon and options.fit != "future" else heads) / apart


def regressions_apart(options: CreditOptions) -> int:
    """The windows from one regression to the next, on average."""
    if options.regress_every is None and options.fit == "future":
        return MEASURE_EVERY
    return options.regress_every or REGRESS_EVERY.get(options.synthesizer, 1)


def lookahead_of(options: CreditOptions, bptt: int) -> int:
    """The steps of lookahead that the windows must carry."""
    if options.synthesizer == "exact":
        return options.exact_steps + (tail_lookahead(options, bptt) if options.tail else 0)
    return tail_lookahead(options, bptt) if options.synthesizer in ("paper", "state", "multi-horizon") else 0


def tail_lookahead(options: CreditOptions, bptt: int) -> int:
    """The steps that a learned synthesizer sees."""
    if options.lookahead is not None:
        return options.lookahead
    return 1 if options.synthesizer == "paper" else horizons_of(options, bptt) * bptt
