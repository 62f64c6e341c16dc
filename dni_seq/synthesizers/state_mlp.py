"""Perceptrons on packed states: features, and messages from them.

Legend: B = lanes, S = numbers in one lane's state, N = horizons.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dni_seq.core import states
from dni_seq.core.states import State
from dni_seq.synthesizers.future_model import FutureModel
from dni_seq.synthesizers.mlp import zero_
from dni_seq.synthesizers.packing import Packing


class StateTrunk(nn.Module):
    """Hidden layers that see the whole state of a lane, every tensor and layer at once, and what it has ahead.

    Args:
        example: a state; leaves [L, B, H] or [B, H], shapes but for B are taken from it.
        horizons: N, number of messages.
        hidden: sizes of the hidden layers.
        batch_dim: where the lanes lie in the state's leaves, an int or a nest.
        encoder: context encoder with an attribute `features`, None for a synthesizer without context.
        future: makes a model of what is ahead from S, whose features join those of the hidden layers; None for none.

    Attributes:
        width: of what the hidden layers give (that of their inputs where there are none), and of the future's features.

    Raises:
        ValueError: `horizons` is not positive; at a call, a context is given that no encoder would read.
    """

    def __init__(
        self,
        example: State,
        horizons: int = 1,
        *,
        hidden: Sequence[int] = (256,),
        batch_dim: Any = 1,
        encoder: nn.Module | None = None,
        future: Callable[[int], FutureModel] | None = None,
    ) -> None:
        super().__init__()
        if horizons < 1:
            raise ValueError(f"horizons must be positive, got {horizons}")
        self.packing = Packing(example, batch_dim)
        self.horizons = horizons
        self.encoder = encoder
        ahead = 0 if encoder is None else int(encoder.features)  # type: ignore[arg-type]
        widths = [self.packing.size + ahead, *hidden]
        self.trunk = nn.ModuleList(nn.Linear(a, b) for a, b in itertools.pairwise(widths))
        self.future = None if future is None else future(self.packing.size)
        self.width = widths[-1] + (0 if self.future is None else self.future.features)

    def features(self, flat: Tensor, context: Any) -> tuple[Tensor, Tensor | None]:
        """[B, width] of packed states [B, S], and the loss, 0-d, of the model of what is ahead, where there is one."""
        if self.encoder is None and self.future is None and context is not None:
            raise ValueError("a context is given; build the synthesizer with an encoder (LookaheadEncoder) to use it")
        found = flat if self.encoder is None else torch.cat([flat, self.encoder(context)], dim=1)
        for layer in self.trunk:
            found = F.gelu(layer(found))
        if self.future is None:
            return found, None
        product, loss = self.future(flat, context)
        return torch.cat([found, product], dim=1), loss


class StateNetwork(StateTrunk):
    """A trunk, and for each tensor of each layer of each horizon a head of its own, so that a layer needs no index.

    Heads start at zero. Arguments are those of `StateTrunk`.
    """

    def __init__(self, example: State, horizons: int = 1, **settings: Any) -> None:
        super().__init__(example, horizons, **settings)
        self.heads = nn.Linear(self.width, horizons * self.packing.size)
        zero_(self.heads)

    def packed(self, flat: Tensor, context: Any) -> tuple[Tensor, Tensor | None]:
        """[B, N, S] of packed states [B, S], in the unit that this network is trained in, and the loss of `features`."""
        features, loss = self.features(flat, context)
        return self.heads(features).unflatten(1, (self.horizons, self.packing.size)), loss

    def predict(self, trigger: State, context: Any) -> list[State]:
        """One message for each horizon, in the unit that this network is trained in."""
        messages, _ = self.packed(self.packing.pack(states.floating(trigger)), context)
        return [self.packing.unpack(message, trigger) for message in messages.unbind(1)]

    def forward(self, trigger: State, context: Any = None) -> State:
        """The message of a network of one horizon."""
        (message,) = self.predict(trigger, context)
        return message
