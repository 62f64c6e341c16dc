"""The protocol of synthesizers, `(trigger, context) -> message`, and the regression that trains them.

A trigger is the state (or activation) at which a gradient is predicted, a context is additional input such as a `Lookahead`,
and a message is the predicted gradient. A synthesizer with several horizons also has `predict`, which returns one message
for each horizon.

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
    """Reduces running statistics over all ranks of a run, which have equally many lanes; see `DataParallel.synchronize`."""

    @property
    def size(self) -> int:
        """Number of ranks."""

    def mean(self, tensors: Sequence[Any]) -> list[Any]:
        """Returns each tensor's mean over all ranks; an entry that is None stays None."""

    def sums(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Returns each tensor's sum over all ranks."""


class Regression(NamedTuple):
    """The loss and the diagnostics of one regression step of a synthesizer, before its backward pass.

    N is the number of horizons. A horizon without a target has NaN in `error`, `power` and `cosine`. All are floating-point
    tensors.

    Attributes:
        loss: 0-d, the loss to backpropagate. For a synthesizer that fits targets: the mean squared error over all elements
            of all horizons with a target, plus the loss of a `FutureModel` if one provides features to the synthesizer. For
            a self-supervised synthesizer: the loss of its predictor. `Normalized`, `StateHeads` and `LeastSquaresHeads`
            divide targets by their running root mean square first; others use gradients as they are.
        error: [N], the mean squared error of each horizon, detached. Targets are divided as above; `FutureGradient` divides
            them too.
        power: [N], the mean square of each horizon's target, divided in the same way. R² is 1 - error / power.
        cosine: [N], the cosine between prediction and target over all elements of a horizon, 0 if either is zero.
    """

    loss: Tensor
    error: Tensor
    power: Tensor
    cosine: Tensor


class Recommended(NamedTuple):
    """The settings that a synthesizer recommends to the trainer, which uses them for settings that the user leaves open.

    The defaults hold for synthesizers without recommendations.

    Attributes:
        synthetic_scale: c, the share of the message that is injected.
        discount: γ.
        synthesizer_clip: largest norm of the synthesizer's gradient, infinite for no limit.
        regress_every: number of windows from one computation of targets to the next, on average.
    """

    synthetic_scale: float = 0.1
    discount: float = 0.9
    synthesizer_clip: float = 1.0
    regress_every: int = 1


def recommended(synthesizer: nn.Module) -> Recommended:
    """Returns the attribute `recommended` of a synthesizer or of the module that it wraps, else the defaults."""
    own: Recommended | None = getattr(synthesizer, "recommended", None)
    if own is not None:
        return own
    wrapped = getattr(synthesizer, "synthesizer", None)
    return recommended(wrapped) if isinstance(wrapped, nn.Module) else Recommended()


def past_steps(synthesizer: nn.Module) -> int:
    """Returns how many inputs before a state a synthesizer and its submodules read at most; 0 if they read none."""
    return max((int(getattr(part, "past_steps", 0)) for part in synthesizer.modules()), default=0)


def supports_auto_scale(synthesizer: nn.Module) -> bool:
    """Returns whether comparisons with exact gradients may set the injected share; False for exact messages."""
    return bool(getattr(synthesizer, "supports_auto_scale", True))


def predict(synthesizer: nn.Module, trigger: State, context: Any) -> list[State]:
    """Returns the messages of `synthesizer`, one for each horizon; a module without `predict` has one horizon."""
    by_horizon: Callable[[State, Any], list[State]] | None = getattr(synthesizer, "predict", None)
    return [synthesizer(trigger, context)] if by_horizon is None else by_horizon(trigger, context)


def regress(synthesizer: nn.Module, trigger: State, context: Any, targets: list[State | None]) -> Regression:
    """Computes one regression of `synthesizer` towards `targets`, without its backward pass.

    Args:
        synthesizer: the module. If it has a method `regress`, that method is used, else `mean_squared`.
        trigger: the state at which the targets were computed, detached.
        context: the context that belongs to the trigger.
        targets: one for each horizon. A horizon whose target is None is not trained.

    Raises:
        ValueError: a message and its target differ in structure, shape or dtype.
    """
    own_regress: Callable[..., Regression] | None = getattr(synthesizer, "regress", None)
    if own_regress is not None:
        return own_regress(trigger, context, targets)
    return mean_squared(predict(synthesizer, trigger, context), targets)


def self_supervised(synthesizer: nn.Module) -> bool:
    """Returns whether the synthesizer trains on its context when it predicts; targets then only evaluate its messages."""
    return bool(getattr(synthesizer, "self_supervised", False))


def predict_and_train(synthesizer: nn.Module, trigger: State, context: Any) -> tuple[list[State], Tensor]:
    """Predicts with a self-supervised synthesizer and adds the gradients of its own loss to its parameters.

    Returns:
        The messages as `predict` returns them, one for each horizon, and the loss, 0-d.
    """
    own: Callable[[State, Any], tuple[list[State], Tensor]] = synthesizer.predict_and_train  # type: ignore[assignment]
    return own(trigger, context)


def match_message(message: State, trigger: State) -> State:
    """Returns `message`, or a target, with its keys in the order of `trigger`.

    Raises:
        ValueError: the keys differ, or one of the two has a mapping where the other has none.
    """
    return states.match_keys(message, trigger, "the message", "the trigger")


def mean_squared(predictions: list[State], targets: list[State | None]) -> Regression:
    """Computes the mean squared error between predictions and targets, with its diagnostics.

    Each horizon's error is a mean over all its elements; the loss is the mean over the horizons that have a target.

    Args:
        predictions: one state for each horizon.
        targets: one state for each horizon, None for a horizon without a target.

    Raises:
        ValueError: a prediction and its target differ in their keys, the number of tensors, a shape or a dtype.
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
        target = states.match_keys(target, prediction, "the target", "the synthesizer's message")
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
    """Raises a ValueError if messages (or predictions) differ from their triggers (or targets) in shape or dtype.

    Args:
        messages: the floating-point leaves of the message.
        triggers: the floating-point leaves of the trigger.
        name: what the error calls `messages`.
        other: what the error calls `triggers`.

    Raises:
        ValueError: the number of tensors, a shape or a dtype differs.
    """
    if len(messages) != len(triggers):
        raise ValueError(f"the {name} has {len(messages)} tensors, the {other} {len(triggers)}: the numbers must agree")
    for message, trigger in zip(messages, triggers, strict=True):
        if message.shape != trigger.shape:
            raise ValueError(
                f"the {name} has shape {tuple(message.shape)}, the {other} {tuple(trigger.shape)}: the shapes "
                "must agree (output_dim sets the last dimension of a BasicSynthesizer's message)"
            )
        if message.dtype != trigger.dtype:
            raise ValueError(
                f"the {name} has dtype {message.dtype}, the {other} {trigger.dtype}: convert the synthesizer or the "
                "tensor with .to(dtype)"
            )
