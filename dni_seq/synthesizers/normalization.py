"""Wrappers for synthesizers: Normalized regresses in units of a running root mean square, GatedCells bounds LSTM cells.

Legend: B = lanes, H = hidden units, L = layers.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from dni_seq.core import states
from dni_seq.core.states import State
from dni_seq.synthesizers.base import Collective, Regression, match_message, mean_squared, predict
from dni_seq.synthesizers.key_order import KeyOrder

LSTM_CELLS = (False, True)
"""The value of `cells` for the state (h, c) of `torch.nn.LSTM` and `torch.nn.LSTMCell`: only c is a cell state."""


class GatedCells(nn.Module):
    """Wraps a synthesizer for LSTM states: it sees tanh(c), and its message for c is multiplied by 1 - tanh²(c).

    The true gradient of a saturated cell vanishes, but a predicted one does not, and an RNN that follows the prediction lets
    its cell state grow without bound.

    Source: ours.

    Args:
        synthesizer: the module to wrap.
        cells: which leaves of the trigger are cell states: one bool, or a nest of bools with the state's structure, such as
            `LSTM_CELLS`.

    Attributes:
        synthesizer: the wrapped module.
    """

    def __init__(self, synthesizer: nn.Module, cells: Any = LSTM_CELLS) -> None:
        super().__init__()
        self.synthesizer = synthesizer
        self.cells = cells

    def predict(self, trigger: State, context: Any) -> list[State]:
        """Returns one message for each horizon of the wrapped synthesizer, with cells bounded as in `forward`.

        Raises:
            ValueError: `cells` is a nest whose keys or number of leaves differ from the trigger's.
        """
        marks = states.broadcast_to_leaves(self.cells, trigger, "cells")
        leaves = states.flatten(trigger)
        marks = [mark and states.is_floating(leaf) for mark, leaf in zip(marks, leaves, strict=True)]
        bounded = [leaf.tanh() if mark else leaf for leaf, mark in zip(leaves, marks, strict=True)]
        gates = [1 - leaf.square() if mark else None for leaf, mark in zip(bounded, marks, strict=True)]
        gated = []
        for message in predict(self.synthesizer, states.unflatten(trigger, bounded), context):
            pairs = zip(states.flatten(match_message(message, trigger)), gates, strict=True)
            gated.append(states.unflatten(trigger, [m if gate is None else m * gate for m, gate in pairs]))
        return gated

    def forward(self, trigger: State, context: Any = None) -> State:
        """Calls the wrapped `forward` with tanh(c) in place of c, and multiplies its message for c by 1 - tanh²(c)."""
        (message,) = self.predict(trigger, context)
        return message


class RunningRMS(nn.Module):
    """Tracks the running root mean square of the targets of each horizon, leaf and layer.

    A leaf [L, B, H] has one value for each layer; any other leaf has one value. The mean square is a plain mean over the
    first 1 / (1 - decay) updates and decays exponentially afterwards. The statistics are buffers, which are created at the
    first update or when a state dict is loaded.

    Args:
        decay: share of the mean square that an update keeps, after the first 1 / (1 - decay) updates.

    Attributes:
        across_ranks: a `Collective` that averages the statistics over all ranks, or None.
    """

    def __init__(self, decay: float = 0.99) -> None:
        super().__init__()
        self.decay = decay
        self.across_ranks: Collective | None = None

    def update(self, like: list[Tensor], targets: list[Tensor | None]) -> None:
        """Adds targets to the running mean squares.

        Args:
            like: one tensor of the target's shape for each leaf of each horizon.
            targets: one tensor for each leaf of each horizon; None for a leaf without a target.
        """
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
        """Returns the root mean square of each leaf of each horizon, broadcastable to it; None before the first update."""
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
            del self._buffers[name]  # the state dict was saved before the first target
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, *others)


def _mean_square(leaf: Tensor) -> Tensor:
    """Returns the mean square of a leaf: [L, 1, 1] for a leaf [L, B, H], 0-d for any other rank."""
    if leaf.dim() == 3:
        return leaf.square().mean(dim=(1, 2), keepdim=True)
    return leaf.square().mean()


class Normalized(nn.Module):
    """Wraps a synthesizer so that it regresses in units of its targets' running root mean square.

    Targets are divided by the running root mean square and messages are multiplied by it, so messages and targets are raw
    gradients outside of this module. The raw gradient at one hidden unit is between 1e-5 and 1e-2, and changes tenfold
    during a training run. Such gradients are too small for an optimizer's epsilon. If the loss is a mean over lanes, they
    also depend on the number of lanes.

    Source: ours; docs/results/characters.md compares it with the published recipe.

    Args:
        synthesizer: the module to wrap. Its messages are in normalised units.
        decay: factor of the old value in the running mean of squared targets. The first 1 / (1 - decay) updates form a
            plain mean instead.
        limit: the largest absolute value in a message, in units of the running root mean square of its targets; larger
            values are clamped. None for no limit.

    Attributes:
        synthesizer: the wrapped module.
        rms: the `RunningRMS` of the targets.
        tiny: the smallest root mean square by which a target is divided, 1e-30.

    Raises:
        ValueError: `limit` is not positive.
    """

    tiny = 1e-30

    def __init__(self, synthesizer: nn.Module, decay: float = 0.99, limit: float | None = None) -> None:
        super().__init__()
        self.synthesizer = synthesizer
        self.rms = RunningRMS(decay)
        self.order = KeyOrder()
        self.limit = checked_limit(limit)

    def predict(self, trigger: State, context: Any) -> list[State]:
        """Returns one message for each horizon, in the unit of the targets; exactly zero before the first regression."""
        messages = [self.order.arrange(message) for message in predict(self.synthesizer, trigger, context)]
        scales = self.rms.scales()
        if scales is None:
            return [states.map_floating(torch.zeros_like, message) for message in messages]
        source = iter(scales)
        return [states.map_floating(lambda leaf: limited(leaf, self.limit) * next(source), message) for message in messages]

    def forward(self, trigger: State, context: Any = None) -> State:
        """Returns the message of a synthesizer with one horizon, in the unit of the targets."""
        (message,) = self.predict(trigger, context)
        return message

    def regress(self, trigger: State, context: Any, targets: list[State | None]) -> Regression:
        """Updates the running root mean square of the targets, and computes the mean squared error after dividing by it.

        Args:
            trigger: the state.
            context: the context at that state, as `forward` takes it.
            targets: one for each horizon: a gradient of the trainer's loss, or None for a horizon without a target.

        Raises:
            ValueError: a target and its message differ in their keys, the number of tensors, a shape or a dtype.
        """
        messages = [self.order.arrange(message) for message in predict(self.synthesizer, trigger, context)]
        targets = [None if target is None else self.order.arrange(target) for target in targets]
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
    """Returns `limit`; raises a ValueError if it is not positive."""
    if limit is not None and not limit > 0:
        raise ValueError(f"limit must be positive, or None for no limit, got {limit}")
    return limit


def limited(message: Tensor, limit: float | None) -> Tensor:
    """Returns `message`, in normalised units, clamped to [-limit, limit]; unchanged if `limit` is None."""
    return message if limit is None else message.clamp(-limit, limit)


def _divided(state: State, scales: list[Tensor]) -> State:
    leaves = [leaf / scale for leaf, scale in zip(states.floating(state), scales, strict=True)]
    return states.with_floating(state, leaves)
