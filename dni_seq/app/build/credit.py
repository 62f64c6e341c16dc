"""Builds the synthesizer, the auxiliary task and the trainer's settings from the options of credit assignment."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from dni_seq.app.build.credit_options import (
    AUTO_FIDELITY_EVERY,
    DISCOUNTS,
    CreditOptions,
    future_units,
    normalizes,
    regressions_apart,
    resolve,
    resolved_horizons,
    scale_of,
    tail_lookahead,
)
from dni_seq.core.states import State, floating
from dni_seq.core.windows import Reduction
from dni_seq.synthesizers.auxiliary import AuxiliaryTask
from dni_seq.synthesizers.exact_future import ExactFuture
from dni_seq.synthesizers.future_gradient import FutureGradient
from dni_seq.synthesizers.future_model import FutureModel
from dni_seq.synthesizers.jaderberg2017 import Jaderberg2017Synthesizer, NextInput
from dni_seq.synthesizers.least_squares import LeastSquaresHeads
from dni_seq.synthesizers.lookahead import LookaheadEncoder
from dni_seq.synthesizers.mlp import BasicSynthesizer
from dni_seq.synthesizers.multi_horizon import Horizons
from dni_seq.synthesizers.normalization import GatedCells, Normalized
from dni_seq.synthesizers.packed import PackedSynthesizer
from dni_seq.synthesizers.state_heads import StateHeads
from dni_seq.synthesizers.state_mlp import StateNetwork
from dni_seq.synthesizers.token_classes import among_the_first

LossFn = Callable[[Any, Tensor], Tensor]
"""`loss_fn(outputs, targets)`, unreduced losses [T, B]."""

EMBED = 32
"""Size of the synthesizer's own embedding of a token."""


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
    max_classes: int | None = None,
    reduction: Reduction = "mean",
    share: Callable[[LossFn], LossFn] | None = None,
) -> nn.Module | None:
    """Returns the synthesizer that the options describe, None for plain truncated BPTT.

    Args:
        options: the kind of synthesizer and its sizes.
        model: the model that `ExactFuture` runs.
        loss_fn: unreduced losses [T, B].
        bptt: T.
        example: a state of the model, leaves [L, B, H].
        cells: which leaves of the state are LSTM cells.
        encode: makes the lookahead's encoders of inputs and targets, each `EMBED` wide.
        outputs: width of the model's outputs.
        max_classes: number of classes that a future model distinguishes, None for all outputs. Ids from max_classes - 1 on
            share one class; targets must then be integers.
        reduction: reduction of the trainer.
        share: scales a local loss to this rank's contribution to the global loss; None for one process.

    Raises:
        ValueError: options contradict each other.
    """
    if options.synthesizer == "none":
        return None
    options = resolve(options, bptt)
    learned = None
    if options.synthesizer != "exact" or options.tail:
        future_loss_fn, width = loss_fn, outputs
        if max_classes is not None and max_classes < outputs:
            future_loss_fn, width = among_the_first(loss_fn, max_classes), max_classes
        future = future_model(options, tail_lookahead(options, bptt), future_loss_fn, encode, width)
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
    """Returns a function that makes the future model from the size of a lane's packed state, None for no future model.

    The arguments are those of `build_synthesizer`; `steps` is the number of future steps that the model predicts.
    """
    units = future_units(options)
    if not units or not steps:
        return None
    by_part = options.fit == "future" and options.synthesizer == "multi-horizon"

    def make(size: int) -> FutureModel:
        sizes = {
            "inputs_width": EMBED,
            "outputs": outputs,
            "units": units,
            "parts": resolved_horizons(options) if by_part else 1,
        }
        return FutureModel(size, steps, inputs=encode()[0], loss_fn=loss_fn, **sizes)

    return make


def build_learned(
    options: CreditOptions,
    bptt: int,
    example: State,
    cells: Any,
    encode: Callable[[], tuple[nn.Module, nn.Module]],
    future: Callable[[int], FutureModel] | None,
    reduction: Reduction,
) -> nn.Module:
    """Returns a synthesizer that learns. The tail of exact is a multi-horizon synthesizer with one horizon.

    The arguments are those of `build_synthesizer`; `future` makes the future model.

    Raises:
        ValueError: least-squares heads have no features, or a future model is given with raw targets.
    """
    kind = options.synthesizer
    horizons, tail = (1, False) if kind == "exact" else (resolved_horizons(options), options.tail)
    normalize = normalizes(options)
    if not (kind != "paper" if options.gate is None else options.gate):
        cells = False
    limit = options.message_clip or None
    if kind == "basic":
        width = sum(leaf.shape[-1] for leaf in floating(example))
        return wrap_network(BasicSynthesizer(width, n_hidden=1), cells, normalize, limit)
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
                "--fit least-squares needs features to learn: set --synthesizer-layers or --lookahead, or use --fit descent"
            )
        kinds: dict[str, type[PackedSynthesizer]] = {"least-squares": LeastSquaresHeads, "descent": StateHeads}
        heads: nn.Module = kinds[options.fit or "least-squares"](example, count, cells=cells, limit=limit, **size)
    else:
        if options.future_units:
            raise ValueError("--future-units needs normalised targets: remove --no-normalize or --future-units")
        # Raw targets leave no place for the future model's own loss, without which it would not learn.
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
    """Returns the synthesizer of Jaderberg et al. 2017 with the given extensions. A given lookahead sees targets too."""
    leaves = floating(example)
    encoder: nn.Module | None = None
    if options.lookahead is None:
        encoder = NextInput(encode()[0], EMBED + 1)
    elif steps:
        encoder = LookaheadEncoder(steps, *encode())
    horizons = resolved_horizons(options)
    count = horizons + options.tail
    width = sum(leaf.shape[-1] for leaf in leaves)
    network = Jaderberg2017Synthesizer(width, hidden=leaves[0].shape[-1], encoder=encoder, horizons=count)
    heads = wrap_network(network, cells, normalize, options.message_clip or None)
    if count == 1:
        return heads
    return Horizons(heads, horizons=horizons, tail=options.tail, draw=options.draw_horizon)


def wrap_network(network: nn.Module, cells: Any, normalize: bool, limit: float | None) -> nn.Module:
    """Returns the network wrapped in `GatedCells`, and in `Normalized` with a message limit if `normalize` is True."""
    gated = GatedCells(network, cells)
    return Normalized(gated, limit=limit) if normalize else gated


def build_auxiliary(options: CreditOptions, example: State) -> nn.Module | None:
    """Returns the auxiliary task of the options, None if it is off or there is no synthesizer."""
    return AuxiliaryTask(example) if options.auxiliary and options.synthesizer != "none" else None


def trainer_settings(options: CreditOptions) -> dict[str, Any]:
    """Returns the fields of `SyntheticGradientConfig`, without the auxiliary task."""
    chosen = scale_of(options)
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
        "synthesizer_clip": clip or math.inf,
    }


def learning_parameters(*parts: nn.Module | None) -> list[torch.nn.Parameter]:
    """Returns the parameters of all parts that are not None."""
    return [parameter for part in parts if part is not None for parameter in part.parameters()]
