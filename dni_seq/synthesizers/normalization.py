"""Synthesizers in units of their targets: running root mean squares, bounded LSTM cells, limited messages.

Legend: B = lanes, H = hidden units, L = layers.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from dni_seq.core import states
from dni_seq.core.states import State
from dni_seq.synthesizers.base import Collective, Regression, mean_squared, predict

LSTM_CELLS = (False, True)
"""`cells` for the state (h, c) of `torch.nn.LSTM` and `torch.nn.LSTMCell`."""


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
        marks = states.broadcast_to_leaves(self.cells, trigger, "cells")
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
        self.across_ranks: Collective | None = None

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
