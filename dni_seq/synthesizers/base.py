"""Synthesizers: (trigger, context) -> message, learned by regression.

A synthesizer is any `torch.nn.Module` with `forward(trigger, context)`. The trigger is a tensor or a nested state, the
message has its shape, and its unit is the raw gradient of the scalar that the user backpropagates. Two further methods are
optional, and the functions `predict` and `regress` of this module supply them for modules that have none:

- `predict(trigger, context)`: a list of messages, one a horizon; `forward` is their weighted sum.
- `regress(trigger, context, targets)`: the loss of one regression step towards one target a horizon.

Source: Jaderberg et al. 2017, "Decoupled Neural Interfaces using Synthetic Gradients", arXiv 1608.05343, section 2 and
appendix. We differ in the regression loss, which is one mean over all elements for triggers of any rank, and in `Normalized`
and `GatedCells`, which the paper does not have.

Legend: B = lanes, H = hidden units, L = layers, N = horizons.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dni_seq.core import states
from dni_seq.core.states import State


class AcrossRanks(Protocol):
    """What running statistics need of the ranks of a run, which have equally many lanes (`DataParallel.synchronize`)."""

    @property
    def size(self) -> int:
        """Number of ranks."""

    def mean(self, tensors: Sequence[Any]) -> list[Any]:
        """Each tensor's mean over all ranks; None where it is None."""

    def sums(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Each tensor's sum over all ranks."""


LSTM_CELLS = (False, True)
"""`cells` for the state (h, c) of `torch.nn.LSTM` and `torch.nn.LSTMCell`."""


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


def learns_ahead(synthesizer: nn.Module) -> bool:
    """Whether it learns where it predicts, from its context, so that targets only measure it; its `learns_ahead` says so."""
    return bool(getattr(synthesizer, "learns_ahead", False))


def learn_ahead(synthesizer: nn.Module, trigger: State, context: Any) -> tuple[list[State], Tensor]:
    """What `predict` gives, and the loss, 0-d, that a synthesizer which learns ahead has added the gradients of."""
    own: Callable[[State, Any], tuple[list[State], Tensor]] = synthesizer.learn_ahead  # type: ignore[assignment]
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


class BasicSynthesizer(nn.Module):
    """A multi-layer perceptron with ReLU between its layers; its last layer starts at zero, so that training does too.

    The trigger's leaves are joined on their last dimension, which `trigger_dim` counts, and the output is split back. Layers
    of a stacked state [L, B, H] share it, without an index. A ForwardInterface's message, whose last dimension `output_dim`
    counts, may differ from its trigger, which then is a single tensor.

    Args:
        output_dim: size of the message's last dimension, over all leaves.
        n_hidden: number of hidden layers; 0 is a linear map.
        hidden_dim: size of the hidden layers, `output_dim` where it is None.
        trigger_dim: size of the trigger's last dimension, over all leaves, `output_dim` where it is None.
        context_dim: size of the context's last dimension; None for a synthesizer without context.

    Raises:
        ValueError: a size is not positive; at a call, a context is missing or given where none is expected, or a size
            differs from what was announced.
    """

    def __init__(
        self,
        output_dim: int,
        n_hidden: int = 0,
        hidden_dim: int | None = None,
        trigger_dim: int | None = None,
        context_dim: int | None = None,
    ) -> None:
        super().__init__()
        hidden_dim = output_dim if hidden_dim is None else hidden_dim
        trigger_dim = output_dim if trigger_dim is None else trigger_dim
        sizes = {
            "output_dim": output_dim,
            "hidden_dim": hidden_dim,
            "trigger_dim": trigger_dim,
            "context_dim": context_dim,
        }
        for name, size in sizes.items():
            if size is not None and size < 1:
                raise ValueError(f"BasicSynthesizer: {name} must be positive, got {size}")
        if n_hidden < 0:
            raise ValueError(f"BasicSynthesizer: n_hidden must be 0 or more, got {n_hidden}")
        self.output_dim, self.trigger_dim, self.context_dim = output_dim, trigger_dim, context_dim
        first = hidden_dim if n_hidden else output_dim
        self.input_trigger = nn.Linear(trigger_dim, first)
        self.input_context = None if context_dim is None else nn.Linear(context_dim, first)
        self.layers = nn.ModuleList(
            nn.Linear(hidden_dim, output_dim if last else hidden_dim)
            for last in [i == n_hidden - 1 for i in range(n_hidden)]
        )
        for layer in [self.layers[-1]] if n_hidden else [self.input_trigger, self.input_context]:
            zero_(layer)

    def forward(self, trigger: State, context: Any = None) -> State:
        """The message for `trigger` [..., trigger_dim], tensor or nest; `context` [..., context_dim] broadcasts over it."""
        leaves = states.floating(trigger)
        joined = leaves[0] if len(leaves) == 1 else torch.cat(leaves, dim=-1)
        self._check(joined, context)
        z = self.input_trigger(joined)
        if self.input_context is not None:
            z = z + self.input_context(context)
        for layer in self.layers:
            z = layer(F.relu(z))
        if len(leaves) == 1:
            return states.with_floating(trigger, [z])
        return states.with_floating(trigger, torch.split(z, [leaf.shape[-1] for leaf in leaves], dim=-1))

    def _check(self, joined: Tensor, context: Any) -> None:
        if joined.shape[-1] != self.trigger_dim:
            raise ValueError(
                f"BasicSynthesizer: the trigger's last dimension is {joined.shape[-1]}, trigger_dim is {self.trigger_dim}"
            )
        self._check_dtype("trigger", joined)
        if self.context_dim is None:
            if context is not None:
                raise ValueError("BasicSynthesizer: a context is given; build the synthesizer with context_dim to use it")
            return
        if not isinstance(context, Tensor):
            raise ValueError(
                f"BasicSynthesizer: built with context_dim={self.context_dim}, it needs a tensor as context: wrap the call "
                "in `with dni_seq.synthesizer_context(context):`"
            )
        if context.dim() == 0 or context.shape[-1] != self.context_dim:
            raise ValueError(
                f"BasicSynthesizer: the context has shape {tuple(context.shape)}, its last dimension must be "
                f"context_dim={self.context_dim} (class labels go in as one-hot vectors)"
            )
        sizes = zip(reversed(context.shape[:-1]), reversed(joined.shape[:-1]), strict=False)
        if context.dim() > joined.dim() or any(own not in (1, size) for own, size in sizes):
            raise ValueError(
                f"BasicSynthesizer: the context's shape {tuple(context.shape)} does not broadcast over the trigger's, "
                f"{tuple(joined.shape)}; but for the last dimension they must agree or the context's be 1"
            )
        self._check_dtype("context", context)

    def _check_dtype(self, name: str, tensor: Tensor) -> None:
        expected = self.input_trigger.weight.dtype
        if tensor.dtype != expected and not torch.is_autocast_enabled(tensor.device.type):
            raise ValueError(
                f"BasicSynthesizer: the {name} has dtype {tensor.dtype}, the synthesizer's parameters {expected}: convert "
                "one with .to(dtype); interfaces hand half-precision tensors over in float32"
            )


def zero_(layer: nn.Module | None) -> None:
    """Set every parameter of `layer` to zero, biases too, so that messages start at exactly zero."""
    if layer is not None:
        for parameter in layer.parameters():
            nn.init.zeros_(parameter)


class GatedCells(nn.Module):
    """Keep an LSTM's cell state in range: the synthesizer sees tanh(c), and its c-message is multiplied by 1 - tanh²(c).

    The true gradient of a saturated cell vanishes. A predicted one does not by itself, and an RNN that follows it lets its
    cell state grow without bound (docs/synthetic-gradients.md).

    Args:
        synthesizer: the module to wrap.
        cells: which leaves of the trigger are cell states: a nest of bools shaped like the state, such as `LSTM_CELLS`.
    """

    def __init__(self, synthesizer: nn.Module, cells: Any = LSTM_CELLS) -> None:
        super().__init__()
        self.synthesizer = synthesizer
        self.cells = cells

    def predict(self, trigger: State, context: Any) -> list[State]:
        """One message a horizon, gated."""
        marks = states.spread(self.cells, trigger, "cells")
        leaves = states.flatten(trigger)
        bounded = [leaf.tanh() if mark else leaf for leaf, mark in zip(leaves, marks, strict=True)]
        gates = [1 - leaf.square() if mark else None for leaf, mark in zip(bounded, marks, strict=True)]
        gated = []
        for message in predict(self.synthesizer, states.unflatten(trigger, bounded), context):
            pairs = zip(states.flatten(message), gates, strict=True)
            gated.append(states.unflatten(trigger, [m if gate is None else m * gate for m, gate in pairs]))
        return gated

    def forward(self, trigger: State, context: Any = None) -> State:
        """The gated message of a synthesizer of one horizon."""
        (message,) = self.predict(trigger, context)
        return message


class RunningRMS(nn.Module):
    """A running root mean square of every target: of each horizon, leaf and layer.

    A leaf [L, B, H] has one for each layer, any other leaf has one in all. The mean is over all targets seen, until these
    are 1 / (1 - decay); from there on it forgets exponentially. Statistics are buffers, made at the first update or when a
    state dict is loaded.

    Args:
        decay: share of the statistics that an update keeps, in the long run.
    """

    def __init__(self, decay: float = 0.99) -> None:
        super().__init__()
        self.decay = decay
        self.across_ranks: AcrossRanks | None = None

    def update(self, like: list[Tensor], targets: list[Tensor | None]) -> None:
        """Take `targets` into the mean, one tensor or None for every leaf of every horizon; `like` gives their shapes."""
        with torch.no_grad():
            fresh = [None if target is None else _mean_square(target) for target in targets]
            if self.across_ranks is not None:
                fresh = self.across_ranks.mean(fresh)
            for i, (leaf, square) in enumerate(zip(like, fresh, strict=True)):
                if f"mean_square_{i}" not in self._buffers:
                    self.register_buffer(f"mean_square_{i}", torch.zeros_like(_mean_square(leaf)))
                    self.register_buffer(f"count_{i}", leaf.new_zeros(()))
                if square is not None:
                    mean, count = self.get_buffer(f"mean_square_{i}"), self.get_buffer(f"count_{i}")
                    count += 1
                    mean.lerp_(square, torch.clamp(1 / count, min=1 - self.decay))

    def scales(self) -> list[Tensor] | None:
        """The root mean square of every leaf of every horizon, broadcasting over it; None before the first update."""
        count = len(self._buffers) // 2
        return [self.get_buffer(f"mean_square_{i}").sqrt() for i in range(count)] or None

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, metadata: dict[str, Any], strict: bool, *others: Any
    ) -> None:
        for key, value in state_dict.items():
            name = key.removeprefix(prefix)
            if key.startswith((prefix + "mean_square_", prefix + "count_")) and name not in self._buffers:
                self.register_buffer(name, torch.zeros_like(value))
        for name in [name for name in self._buffers if strict and prefix + name not in state_dict]:
            del self._buffers[name]  # saved before there was a target
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, *others)


def _mean_square(leaf: Tensor) -> Tensor:
    """The mean square of a leaf: [L, 1, 1] for [L, B, H], a scalar for any other rank."""
    if leaf.dim() == 3:
        return leaf.square().mean(dim=(1, 2), keepdim=True)
    return leaf.square().mean()


class Normalized(nn.Module):
    """A synthesizer that regresses in units of its targets' running root mean square.

    Raw gradients of a state are 1e-5 to 1e-2 a unit and drift tenfold in a run, too small for an optimizer's epsilon and
    dependent on the number of lanes. Outside of this module messages stay raw: targets are divided by the running root mean
    square, messages are multiplied by it.

    Args:
        synthesizer: the module to wrap.
        decay: how much of the statistics an update keeps.
        limit: the largest number in a message, in units of the running root mean square of what it predicts; larger ones
            are cut to it. None for no limit.

    Raises:
        ValueError: `limit` is not positive.
    """

    tiny = 1e-30

    def __init__(self, synthesizer: nn.Module, decay: float = 0.99, limit: float | None = None) -> None:
        super().__init__()
        self.synthesizer = synthesizer
        self.rms = RunningRMS(decay)
        self.limit = checked_limit(limit)

    def predict(self, trigger: State, context: Any) -> list[State]:
        """One message a horizon, raw; exactly zero before the first regression."""
        messages = predict(self.synthesizer, trigger, context)
        scales = self.rms.scales()
        if scales is None:
            return [states.map_floating(torch.zeros_like, message) for message in messages]
        source = iter(scales)
        return [states.map_floating(lambda leaf: limited(leaf, self.limit) * next(source), message) for message in messages]

    def forward(self, trigger: State, context: Any = None) -> State:
        """The raw message of a synthesizer of one horizon."""
        (message,) = self.predict(trigger, context)
        return message

    def regress(self, trigger: State, context: Any, targets: list[State | None]) -> Regression:
        """Mean squared error in normalised units; takes the targets into the statistics first."""
        messages = predict(self.synthesizer, trigger, context)
        like = [leaf for message in messages for leaf in states.floating(message)]
        width = len(like) // len(messages)
        leaves = [leaf for t in targets for leaf in ([None] * width if t is None else states.floating(t))]
        self.rms.update(like, leaves)
        scales = [scale.clamp_min(self.tiny) for scale in self.rms.scales() or []]
        normal = [
            None if target is None else _divided(target, scales[i * width : (i + 1) * width])
            for i, target in enumerate(targets)
        ]
        return mean_squared(messages, normal)


def checked_limit(limit: float | None) -> float | None:
    """A limit of messages, or a ValueError where it is not positive."""
    if limit is not None and not limit > 0:
        raise ValueError(f"limit must be positive, or None for no limit, got {limit}")
    return limit


def limited(message: Tensor, limit: float | None) -> Tensor:
    """`message`, in normalised units, with its numbers cut to what `limit` allows."""
    return message if limit is None else message.clamp(-limit, limit)


def _divided(state: State, scales: list[Tensor]) -> State:
    leaves = [leaf / scale for leaf, scale in zip(states.floating(state), scales, strict=True)]
    return states.with_floating(state, leaves)
