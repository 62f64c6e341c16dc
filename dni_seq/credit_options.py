"""The credit-assignment options that all scripts share, and the trainer's parts built from them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn

from .exact_future import ExactFuture
from .future_gradient import FutureGradient
from .future_model import FutureModel
from .least_squares import LeastSquaresHeads
from .options import above_zero, at_least, fraction, option
from .published import NextInput, PublishedSynthesizer
from .state_network import StateNetwork
from .state_synthesizers import AuxiliaryTask, Horizons, LookaheadEncoder, PackedSynthesizer, StateHeads
from .states import State, floating
from .synthesizers import BasicSynthesizer, GatedCells, Normalized
from .windows import Reduction

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

HORIZONS = 2
"""Of multi-horizon where messages are a model's gradient and nothing else is asked for: of one, copying learns less."""

MEASURE_EVERY = 100
"""Windows between two targets of what learns without them, which measure its messages."""

AUTO_FIDELITY_EVERY = 47
"""Windows between two comparisons of an automatic scale. A prime: sequences of 2, 5 or 10 windows would be compared at the
same place every time otherwise, at their first state, say, whose gradient is zero in a copying task."""

LossFn = Callable[[Any, Tensor], Tensor]
"""`loss_fn(outputs, targets)`, unreduced losses [T, B]."""

FUTURE_UNITS = 256
"""Default units of the model of what is ahead."""

TOLD_APART = 500
"""Most entries of a vocabulary that a synthesizer tells apart, in what it reads and in what it predicts. Of a larger one the
last ids, which are the rare entries, are one to it: told apart they cost as much as the network's own first and last layer,
and teach less. (SentencePiece's ids begin with its 256 bytes, so that of its pieces it tells some 240 apart.)"""

EMBED = 32
"""Size of the synthesizer's own embedding of a token."""


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
        shown=_by_synthesizer({**SCALES, "multi-horizon": "1, fitted auto"}),
    )
    discount: float | None = option(
        None, "weight of each further window", group=GROUP, check=fraction, shown=_by_synthesizer(DISCOUNTS)
    )
    horizons: int | None = option(
        None,
        "windows ahead that multi-horizon predicts one by one; paper: from 2 on",
        group=GROUP,
        check=at_least(1),
        shown=f"multi-horizon {HORIZONS}; by words or sentencepiece, fitted, or with a lookahead that is given 1",
    )
    tail: bool = option(False, "with horizons: one more head for all windows behind them", group=GROUP)
    draw_horizon: bool = option(False, "with horizons: train one head a window, drawn at random", group=GROUP)
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
        "what messages of state and multi-horizon are: future, the gradient of the model of the steps ahead; fitted to "
        "targets, a last layer solved from the latest windows or learned by descent",
        group=GROUP,
        choices=("future", "least-squares", "descent"),
        shown="least-squares; multi-horizon future, where it can be",
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


def decided(options: CreditOptions, bptt: int) -> CreditOptions:
    """The options with `fit` and `horizons` decided: by the model of what is ahead where that can be and is not ruled out.

    Args:
        options: as given.
        bptt: T.

    Raises:
        ValueError: that model is asked for where it cannot be.
    """
    steps, horizons = tail_lookahead(options, bptt), horizons_of(options)
    found = _hindrances(options)
    if not steps:
        found.append("--lookahead 0")
    elif steps % horizons:
        found.append(f"--lookahead {options.lookahead}, no multiple of --horizons")
    if options.fit is None:
        return replace(options, fit="least-squares" if found else "future", horizons=horizons)
    if options.fit == "future" and found:
        raise ValueError(f"--fit future is not possible with {found[0]}")
    return replace(options, horizons=horizons)


def _hindrances(options: CreditOptions) -> list[str]:
    """What rules out that messages are the gradient of the model of what is ahead, but for the steps that it would see."""
    learned = options.synthesizer == "multi-horizon" or (options.synthesizer == "exact" and options.tail)
    hindrances = {
        f"--synthesizer {options.synthesizer}": not learned,
        "no model of the steps ahead, --future-units 0": not future_units(options),
        "--no-normalize": options.normalize is False,
        "--tail": options.tail and options.synthesizer == "multi-horizon",
        "--targets lambda": options.targets != "bootstrap",
        "--target-network": options.target_network > 0,
    }
    return [name for name, hinders in hindrances.items() if hinders]


def horizons_of(options: CreditOptions) -> int:
    """K, given or by default: one where messages are fitted, and where a lookahead that is given says how far they reach."""
    if options.horizons is not None:
        return options.horizons
    usual = options.synthesizer == "multi-horizon" and options.lookahead is None and options.fit in (None, "future")
    return HORIZONS if usual and not _hindrances(options) else 1


def unsettled(
    config: Mapping[str, Any], options: CreditOptionsT, sized: Callable[[CreditOptionsT], CreditOptionsT]
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
        if getattr(sized(free), name) == getattr(options, name):
            options = free
            followed.append(name)
    return {name: value for name, value in config.items() if name not in followed}


def future_units(options: CreditOptions) -> int:
    """The units of the model of what is ahead, 0 for none."""
    return FUTURE_UNITS if options.future_units is None else options.future_units


def state_products(options: CreditOptions) -> float:
    """The vector-Jacobian products to the state alone that a window takes on average, which decides the LSTM's kernel."""
    if options.synthesizer == "none":
        return 0
    apart = regressions_apart(options)
    by_horizon = options.synthesizer == "multi-horizon" and options.targets == "bootstrap"
    heads = horizons_of(options) + options.tail if by_horizon else 1
    if by_horizon and heads == 1 and apart > 1 and not options.auxiliary and options.fit != "future":
        return 0  # its window keeps quiet: see `SequenceTrainer`, regress_every
    return (1 if options.draw_horizon else heads) / apart


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
    return 1 if options.synthesizer == "paper" else horizons_of(options) * bptt


def build_synthesizer(
    options: CreditOptions,
    model: nn.Module,
    loss_fn: LossFn,
    *,
    bptt: int,
    example: State,
    cells: Any,
    encode: Callable[[], tuple[nn.Module, nn.Module]],
    outputs: int,
    reduction: Reduction = "mean",
    share: Callable[[LossFn], LossFn] | None = None,
) -> nn.Module | None:
    """The synthesizer of the options, None for plain truncated BPTT.

    Args:
        options: which one, and its sizes.
        model: that the exact future runs.
        loss_fn: unreduced losses [T, B]. With more than `TOLD_APART` outputs its targets are ids, the rare ones last.
        bptt: T.
        example: a state of the model, leaves [L, B, H].
        cells: which of its leaves are LSTM cells.
        encode: makes the lookahead's encoders of inputs and targets, each `EMBED` wide.
        outputs: the width of the model's outputs.
        reduction: the trainer's.
        share: makes of the loss what this rank adds to that of all ranks; None where there is one process.
    """
    if options.synthesizer == "none":
        return None
    options = decided(options, bptt)
    learned = None
    if options.synthesizer != "exact" or options.tail:
        future = future_model(options, tail_lookahead(options, bptt), loss_fn, encode, outputs)
        learned = build_learned(options, bptt, example, cells, encode, future, reduction)
    if options.synthesizer != "exact":
        return learned
    shared = loss_fn if share is None else share(loss_fn)
    return ExactFuture(model, shared, steps=options.exact_steps, window=bptt, reduction=reduction, tail=learned)


def future_model(
    options: CreditOptions,
    steps: int,
    loss_fn: LossFn,
    encode: Callable[[], tuple[nn.Module, nn.Module]],
    outputs: int,
) -> Callable[[int], FutureModel] | None:
    """Makes the model of what is ahead from the size of a lane's state; None without one. Arguments as above."""
    units = future_units(options)
    if not units or not steps:
        return None
    if outputs > TOLD_APART:
        loss_fn, outputs = among_the_first(loss_fn, TOLD_APART), TOLD_APART
    by_part = options.fit == "future" and options.synthesizer == "multi-horizon"

    def make(size: int) -> FutureModel:
        sizes = {"inputs_width": EMBED, "outputs": outputs, "units": units, "parts": horizons_of(options) if by_part else 1}
        return FutureModel(size, steps, inputs=encode()[0], loss_fn=loss_fn, **sizes)

    return make


def among_the_first(loss_fn: LossFn, count: int) -> LossFn:
    """`loss_fn` of classes, for outputs that tell `count` of them apart: from the last one on they are one."""

    def losses(outputs: Any, targets: Tensor) -> Tensor:
        return loss_fn(outputs, targets.clamp(max=count - 1))

    return losses


def build_learned(
    options: CreditOptions,
    bptt: int,
    example: State,
    cells: Any,
    encode: Callable[[], tuple[nn.Module, nn.Module]],
    future: Callable[[int], FutureModel] | None,
    reduction: Reduction,
) -> nn.Module:
    """A synthesizer that learns; that of exact's tail is a multi-horizon one of one horizon. Arguments as above."""
    kind = options.synthesizer
    horizons, tail = (1, False) if kind == "exact" else (horizons_of(options), options.tail)
    normalize = kind != "paper" if options.normalize is None else options.normalize
    if not (kind != "paper" if options.gate is None else options.gate):
        cells = False
    limit = options.message_clip or None
    if kind == "basic":
        width = sum(leaf.shape[-1] for leaf in floating(example))
        return dressed(BasicSynthesizer(width, n_hidden=1), cells, normalize, limit)
    steps = tail_lookahead(options, bptt)
    if kind == "paper":
        return build_published(options, example, steps, cells, normalize, encode)
    if options.fit == "future" and future is not None:
        ahead = FutureGradient(example, future, window=bptt, reduction=reduction, cells=cells, limit=limit)
        return Horizons(ahead, horizons=horizons, draw=options.draw_horizon) if kind == "multi-horizon" else ahead
    encoder = LookaheadEncoder(steps, *encode()) if steps else None
    count = 1 if kind == "state" else horizons + tail
    hidden = [options.synthesizer_hidden] * options.synthesizer_layers
    size: dict[str, Any] = {"hidden": hidden, "encoder": encoder, "future": future}
    if normalize:
        if options.fit == "least-squares" and encoder is None and not options.synthesizer_layers:
            raise ValueError(
                "--fit least-squares needs features to learn: give --synthesizer-layers or --lookahead, or --fit descent"
            )
        kinds: dict[str, type[PackedSynthesizer]] = {"least-squares": LeastSquaresHeads, "descent": StateHeads}
        heads: nn.Module = kinds[options.fit or "least-squares"](example, count, cells=cells, limit=limit, **size)
    else:
        if options.future_units:
            raise ValueError("--future-units needs normalised targets: leave --no-normalize out, or --future-units")
        # What learns from raw targets has no place for a second loss, without which that model would not learn.
        heads = GatedCells(StateNetwork(example, count, **size | {"future": None}), cells)
    return heads if kind == "state" else Horizons(heads, horizons=horizons, tail=tail, draw=options.draw_horizon)


def build_published(
    options: CreditOptions,
    example: State,
    steps: int,
    cells: Any,
    normalize: bool,
    encode: Callable[[], tuple[nn.Module, nn.Module]],
) -> nn.Module:
    """The recipe as published, and what is added to it: a lookahead that is asked for sees targets too."""
    leaves = floating(example)
    encoder: nn.Module | None = None
    if options.lookahead is None:
        encoder = NextInput(encode()[0], EMBED + 1)
    elif steps:
        encoder = LookaheadEncoder(steps, *encode())
    horizons = horizons_of(options)
    count = horizons + options.tail
    width = sum(leaf.shape[-1] for leaf in leaves)
    network = PublishedSynthesizer(width, hidden=leaves[0].shape[-1], encoder=encoder, horizons=count)
    heads = dressed(network, cells, normalize, options.message_clip or None)
    if count == 1:
        return heads
    return Horizons(heads, horizons=horizons, tail=options.tail, draw=options.draw_horizon)


def dressed(network: nn.Module, cells: Any, normalize: bool, limit: float | None) -> nn.Module:
    """A network with its cells bounded, and normalised, its messages limited, where that is wanted."""
    gated = GatedCells(network, cells)
    return Normalized(gated, limit=limit) if normalize else gated


def build_auxiliary(options: CreditOptions, example: State) -> nn.Module | None:
    """The auxiliary task of the options, None where it is off."""
    return AuxiliaryTask(example) if options.auxiliary and options.synthesizer != "none" else None


def trainer_settings(options: CreditOptions) -> dict[str, Any]:
    """The keyword arguments of `SequenceTrainer` that the options decide, but for the synthesizer and its optimizer."""
    usual = "1" if options.fit == "future" else SCALES.get(options.synthesizer, "0")
    chosen = scale(usual if options.synthetic_scale is None else options.synthetic_scale)
    discount = DISCOUNTS.get(options.synthesizer, 1.0) if options.discount is None else options.discount
    usual_clip = 0.0 if options.fit == "future" else 1.0
    clip = usual_clip if options.synthesizer_clip is None else options.synthesizer_clip
    every = options.fidelity_every or (AUTO_FIDELITY_EVERY if chosen == "auto" else 0)
    return {
        "synthetic_scale": chosen,
        "discount": discount,
        "targets": options.targets,
        "lam": options.lam,
        "replay_windows": options.replay_windows,
        "regress_every": regressions_apart(options),
        "target_network": options.target_network,
        "fidelity_every": every,
        "auxiliary_weight": options.auxiliary,
        "synthesizer_clip": clip or None,
    }


def learning_parameters(*parts: nn.Module | None) -> list[torch.nn.Parameter]:
    """The parameters of those parts that are there, for one optimizer."""
    return [parameter for part in parts if part is not None for parameter in part.parameters()]
