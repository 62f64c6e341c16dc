"""The protocol of synthesizers: `(trigger, context) -> message`, and the regression that trains them.

Legend: B = lanes, N = horizons.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dni_seq.core import states
from dni_seq.core.states import State


class Collective(Protocol):
    """What running statistics need of the ranks of a run, which have equally many lanes (`DataParallel.synchronize`)."""

    @property
    def size(self) -> int:
        """Number of ranks."""

    def mean(self, tensors: Sequence[Any]) -> list[Any]:
        """Each tensor's mean over all ranks; None where it is None."""

    def sums(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Each tensor's sum over all ranks."""


class Regression(NamedTuple):
    """One regression step of a synthesizer, before its backward pass.

    Attributes:
        loss: 0-d, mean squared error over all elements of all horizons, in the unit the synthesizer regresses in; what it
            learns by instead, where it learns ahead.
        error: [N], the mean squared error of each horizon, detached.
        power: [N], the mean square of each horizon's target in the same unit; R² is 1 - error / power.
        cosine: [N], the cosine between prediction and target, over all elements of a horizon; 0 where one is zero.
    """

    loss: Tensor
    error: Tensor
    power: Tensor
    cosine: Tensor


def predict(synthesizer: nn.Module, trigger: State, context: Any) -> list[State]:
    """The messages of `synthesizer` by horizon; one for a module that knows of no horizons."""
    by_horizon: Callable[[State, Any], list[State]] | None = getattr(synthesizer, "predict", None)
    return [synthesizer(trigger, context)] if by_horizon is None else by_horizon(trigger, context)


def regress(synthesizer: nn.Module, trigger: State, context: Any, targets: list[State | None]) -> Regression:
    """The regression of `synthesizer` at a trigger (cut from its graph) towards its targets, one a horizon.

    A horizon whose target is None is left alone.
    """
    own_regress: Callable[..., Regression] | None = getattr(synthesizer, "regress", None)
    if own_regress is not None:
        return own_regress(trigger, context, targets)
    return mean_squared(predict(synthesizer, trigger, context), targets)


def self_supervised(synthesizer: nn.Module) -> bool:
    """Returns whether the synthesizer trains on its context as it predicts, so that targets only measure it."""
    return bool(getattr(synthesizer, "self_supervised", False))


def predict_and_train(synthesizer: nn.Module, trigger: State, context: Any) -> tuple[list[State], Tensor]:
    """What `predict` gives, and the loss, 0-d, that a synthesizer which learns ahead has added the gradients of."""
    own: Callable[[State, Any], tuple[list[State], Tensor]] = synthesizer.predict_and_train  # type: ignore[assignment]
    return own(trigger, context)


def mean_squared(predictions: list[State], targets: list[State | None]) -> Regression:
    """Mean squared error over all elements, the one rule for regression, with its diagnostics.

    Raises:
        ValueError: a prediction has not the shape of its target.
    """
    errors: list[Tensor] = []
    powers: list[Tensor] = []
    cosines: list[Tensor] = []
    for prediction, target in zip(predictions, targets, strict=True):
        if target is None:
            unknown = states.floating(prediction)[0].new_full((), float("nan"))
            for values in (errors, powers, cosines):
                values.append(unknown)
            continue
        p, t = states.floating(prediction), states.floating(target)
        check_like(p, t, "synthesizer's message", "real one")
        flat_p = torch.cat([leaf.reshape(-1) for leaf in p])
        flat_t = torch.cat([leaf.reshape(-1) for leaf in t])
        errors.append(F.mse_loss(flat_p, flat_t))
        with torch.no_grad():
            powers.append(flat_t.square().mean())
            cosines.append(F.cosine_similarity(flat_p, flat_t, dim=0))
    error = torch.stack(errors)
    loss = torch.stack([e for e, target in zip(errors, targets, strict=True) if target is not None]).mean()
    return Regression(loss, error.detach(), torch.stack(powers), torch.stack(cosines))


def check_like(messages: list[Tensor], triggers: list[Tensor], name: str, other: str = "trigger") -> None:
    """Hold messages (or predictions) to the shapes and dtypes of their triggers (or targets).

    Raises:
        ValueError: they differ; the text names both sides.
    """
    if len(messages) != len(triggers):
        raise ValueError(f"the {name} has {len(messages)} tensors, the {other} {len(triggers)}: they must correspond")
    for message, trigger in zip(messages, triggers, strict=True):
        if message.shape != trigger.shape:
            raise ValueError(
                f"the {name} has shape {tuple(message.shape)}, the {other} {tuple(trigger.shape)}: they must "
                "agree (the last dimension of a BasicSynthesizer's message is its output_dim)"
            )
        if message.dtype != trigger.dtype:
            raise ValueError(
                f"the {name} has dtype {message.dtype}, the {other} {trigger.dtype}: convert the synthesizer or the "
                "tensor with .to(dtype)"
            )
