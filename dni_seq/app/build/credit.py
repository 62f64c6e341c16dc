"""Builds the synthesizer, the auxiliary task and the trainer's settings from the resolved settings of credit assignment."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from torch import Tensor, nn

from dni_seq.app.build.optimizers import adam
from dni_seq.app.build.resolved_credit import ResolvedCredit
from dni_seq.core.states import State, floating
from dni_seq.credit.config import SyntheticGradientConfig
from dni_seq.synthesizers.auxiliary import AuxiliaryTask
from dni_seq.synthesizers.exact_future import ExactFuture
from dni_seq.synthesizers.for_model import EMBED, Text, predictor_for
from dni_seq.synthesizers.future_gradient import FutureGradient
from dni_seq.synthesizers.jaderberg2017 import Jaderberg2017Synthesizer, NextInput
from dni_seq.synthesizers.least_squares import LeastSquaresHeads
from dni_seq.synthesizers.lookahead import LookaheadEncoder
from dni_seq.synthesizers.mlp import BasicSynthesizer
from dni_seq.synthesizers.multi_horizon import Horizons
from dni_seq.synthesizers.normalization import GatedCells, Normalized
from dni_seq.synthesizers.state_heads import StateHeads
from dni_seq.synthesizers.state_mlp import StateNetwork
from dni_seq.synthesizers.token_classes import among_the_first

LossFn = Callable[[Any, Tensor], Tensor]
"""`loss_fn(outputs, targets)`, unreduced losses [T, B]."""


@dataclass(frozen=True)
class ModelSpec:
    """What the builders need to know of the model and of the trainer's loss.

    Attributes:
        model: the model that `ExactFuture` runs.
        loss_fn: `loss_fn(outputs, targets)`, unreduced losses [T, B].
        example: a state of the model, leaves [L, B, H].
        cells: which leaves of the state are LSTM cells.
        encode: makes two encoders, one of the lookahead's inputs and one of its targets, each with outputs of width `EMBED`.
        outputs: width of the model's outputs.
        past_loss: `past_loss(outputs, inputs)`, unreduced losses [m, B] of a predictor of past inputs.
        inputs: width of the outputs from which `past_loss` predicts an input.
        max_classes: number of classes that a future model distinguishes, None for all outputs. Ids from max_classes - 1 on
            share one class; targets must then be integers.
        share: scales a local loss to this rank's contribution to the global loss; None for one process.
    """

    model: nn.Module
    loss_fn: LossFn
    example: State
    cells: Any
    encode: Callable[[], tuple[nn.Module, nn.Module]]
    outputs: int
    past_loss: LossFn
    inputs: int
    max_classes: int | None = None
    share: Callable[[LossFn], LossFn] | None = None

    @property
    def state_width(self) -> int:
        """Number of units of one layer, summed over the state's leaves: 2 H for an LSTM, H for a GRU."""
        return sum(leaf.shape[-1] for leaf in floating(self.example))


def build_synthesizer(credit: ResolvedCredit, spec: ModelSpec) -> nn.Module | None:
    """Returns the synthesizer, None for plain truncated BPTT. `BUILDERS` has a function for each kind.

    Args:
        credit: the kind of synthesizer and its sizes.
        spec: the model and its loss.
    """
    return None if credit.synthesizer == "none" else BUILDERS[credit.synthesizer](credit, spec)


def build_basic(credit: ResolvedCredit, spec: ModelSpec) -> nn.Module:
    """Returns an MLP with one hidden layer, which is applied to each layer's state."""
    return wrap_network(BasicSynthesizer(spec.state_width, n_hidden=1), credit, spec)


def build_paper(credit: ResolvedCredit, spec: ModelSpec) -> nn.Module:
    """Returns the synthesizer of Jaderberg et al. 2017 with the extensions that `credit` selects.

    By default the synthesizer reads the next step's input. If a lookahead is given, it reads the lookahead's targets too.
    """
    encoder: nn.Module | None = None
    if credit.next_input_only:
        encoder = NextInput(spec.encode()[0], EMBED + 1)
    elif credit.lookahead:
        encoder = LookaheadEncoder(credit.lookahead, *spec.encode())
    count = credit.message_count
    hidden = floating(spec.example)[0].shape[-1]
    network = Jaderberg2017Synthesizer(spec.state_width, hidden=hidden, encoder=encoder, horizons=count)
    heads = wrap_network(network, credit, spec)
    if count == 1:
        return heads
    return Horizons(heads, horizons=credit.horizons, tail=credit.tail, draw=credit.draw_horizon)


def build_state(credit: ResolvedCredit, spec: ModelSpec) -> nn.Module:
    """Returns the network of "multi-horizon" with regressed heads, but with one message for all future windows."""
    return build_heads(credit, spec)


def build_multi_horizon(credit: ResolvedCredit, spec: ModelSpec) -> nn.Module:
    """Returns a synthesizer with one message per horizon. The messages are gradients of a future model, or regressed."""
    heads = build_future_gradient(credit, spec) if credit.fit == "future" else build_heads(credit, spec)
    return Horizons(heads, horizons=credit.horizons, tail=credit.tail, draw=credit.draw_horizon)


def build_exact(credit: ResolvedCredit, spec: ModelSpec) -> nn.Module:
    """Returns a synthesizer of the next steps' exact gradient. With `tail`, adds a learned message of the steps after."""
    tail: nn.Module | None = None
    if credit.tail and credit.fit == "future":
        tail = build_future_gradient(credit, spec)
    elif credit.tail:
        tail = Horizons(build_heads(credit, spec), horizons=1, draw=credit.draw_horizon)
    loss_fn = spec.loss_fn if spec.share is None else spec.share(spec.loss_fn)
    return ExactFuture(spec.model, loss_fn, steps=credit.exact_steps, tail=tail)


BUILDERS: Mapping[str, Callable[[ResolvedCredit, ModelSpec], nn.Module]] = MappingProxyType(
    {
        "basic": build_basic,
        "paper": build_paper,
        "state": build_state,
        "multi-horizon": build_multi_horizon,
        "exact": build_exact,
    }
)
"""The function that builds a synthesizer, by kind."""


def build_future_gradient(credit: ResolvedCredit, spec: ModelSpec) -> FutureGradient:
    """Returns a synthesizer whose messages are gradients of a future model's loss."""
    return FutureGradient(
        spec.example,
        predictor(credit, spec),
        cells=gated_cells(credit, spec),
        limit=credit.message_limit,
    )


def build_heads(credit: ResolvedCredit, spec: ModelSpec) -> nn.Module:
    """Returns regressed heads, one per message, on a network that reads the state and the lookahead."""
    encoder = LookaheadEncoder(credit.lookahead, *spec.encode()) if credit.lookahead else None
    hidden = [credit.synthesizer_hidden] * credit.synthesizer_layers
    if not credit.normalize:
        # Without normalised targets there is no future model: `StateNetwork` has no loss that would train it.
        network = StateNetwork(spec.example, credit.message_count, hidden=hidden, encoder=encoder)
        return GatedCells(network, gated_cells(credit, spec))
    heads: type[LeastSquaresHeads | StateHeads] = LeastSquaresHeads if credit.fit == "least-squares" else StateHeads
    return heads(
        spec.example,
        credit.message_count,
        hidden=hidden,
        encoder=encoder,
        future=predictor(credit, spec) if credit.future_units and credit.lookahead else None,
        cells=gated_cells(credit, spec),
        limit=credit.message_limit,
    )


def predictor(credit: ResolvedCredit, spec: ModelSpec) -> Callable[[int], Any]:
    """Returns a function that makes the future model (or the model of the past) from the size of a lane's packed state."""
    loss_fn, outputs = first_classes(spec, spec.loss_fn, spec.outputs)
    past_loss, inputs = first_classes(spec, spec.past_loss, spec.inputs)
    # A future model whose gradient is the message has one part per message. The tail of "exact" is one message.
    parts = credit.message_count if credit.fit == "future" else 1
    text = Text(lambda: spec.encode()[0], loss_fn, outputs, past_loss, inputs, parts, credit.lookahead)
    steps = None if credit.predict == "horizons" else credit.predict_steps
    units = max(credit.future_units, 2) if credit.predict == "both" else credit.future_units
    return predictor_for(text, credit.bptt, credit.predict, steps, None, units)


def first_classes(spec: ModelSpec, loss_fn: LossFn, width: int) -> tuple[LossFn, int]:
    """Returns `loss_fn` restricted to the `max_classes` classes that a predictor distinguishes, and the outputs' width.

    Returns both unchanged if the predictor distinguishes all classes.
    """
    if spec.max_classes is None or spec.max_classes >= width:
        return loss_fn, width
    return among_the_first(loss_fn, spec.max_classes), spec.max_classes


def wrap_network(network: nn.Module, credit: ResolvedCredit, spec: ModelSpec) -> nn.Module:
    """Returns the network wrapped in `GatedCells` and, if targets are normalised, in `Normalized` with a message limit."""
    gated = GatedCells(network, gated_cells(credit, spec))
    return Normalized(gated, limit=credit.message_limit) if credit.normalize else gated


def gated_cells(credit: ResolvedCredit, spec: ModelSpec) -> Any:
    """Returns which leaves are cells that the synthesizer reads through a bounding function, False for no leaves."""
    return spec.cells if credit.gate else False


def build_auxiliary(credit: ResolvedCredit, spec: ModelSpec) -> nn.Module | None:
    """Returns the auxiliary task; None if its weight is 0 or there is no synthesizer."""
    return AuxiliaryTask(spec.example) if credit.auxiliary and credit.synthesizer != "none" else None


def trainer_settings(credit: ResolvedCredit) -> dict[str, Any]:
    """Returns the fields of `SyntheticGradientConfig`, without the auxiliary task."""
    return {
        "synthetic_scale": credit.synthetic_scale,
        "discount": credit.discount,
        "targets": credit.targets,
        "lam": credit.lam,
        "replay_windows": credit.replay_windows,
        "regress_every": None if credit.targets == "lambda" else credit.regress_every,
        "target_network": credit.target_network,
        "fidelity_every": credit.fidelity_every,
        "auxiliary_weight": credit.auxiliary,
        "message_every": credit.message_every if credit.message_every < credit.bptt else None,
        "message_at_end": credit.message_at_end,
        "synthesizer_clip": credit.synthesizer_clip or math.inf,
    }


def synthetic_arguments(credit: ResolvedCredit, spec: ModelSpec, lr: float) -> dict[str, Any]:
    """Returns the arguments of `SequenceTrainer` for synthetic gradients: the synthesizer, its optimizer, and the config.

    The synthesizer and the auxiliary task have the device and the dtype of the state `spec.example`.

    Args:
        credit: the kind of synthesizer and its sizes.
        spec: the model and its loss.
        lr: learning rate of the synthesizer and the auxiliary task.
    """
    synthesizer, auxiliary = build_synthesizer(credit, spec), build_auxiliary(credit, spec)
    like = floating(spec.example)[0]
    parts = [part.to(like.device, like.dtype) for part in (synthesizer, auxiliary) if part is not None]
    learning = [parameter for part in parts for parameter in part.parameters()]
    return {
        "synthesizer": synthesizer,
        "synthesizer_optimizer": adam(learning, lr) if learning else None,
        "config": SyntheticGradientConfig(auxiliary=auxiliary, **trainer_settings(credit)),
    }
