"""Perceptrons on packed states: StateTrunk computes features, StateNetwork adds heads that compute messages.

Legend: B = lanes, S = numbers in one lane's state, N = horizons.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dni_seq.core.states import State
from dni_seq.synthesizers.future_model import FutureModel
from dni_seq.synthesizers.mlp import zero_
from dni_seq.synthesizers.packing import Packing


class StateTrunk(nn.Module):
    """Computes features of a lane's whole state (all tensors and layers at once) and of its encoded context.

    Args:
        example: a state with leaves [L, B, H] or [B, H]; only structure and shapes are used, except B.
        horizons: N, number of messages.
        hidden: sizes of the hidden layers, with GELU after each. Empty for no hidden layer.
        batch_dim: dimension of the lanes in the state's leaves, an int or a nest. Default: 1 in [L, B, H], 0 in [B, H].
        encoder: module from a context to [B, E] with an attribute `features` = E. None for no encoded context.
        future: function that makes a `FutureModel` from S; its features are concatenated to those of the hidden layers.
            None for no future model.

    Attributes:
        packing: the `Packing` of the state.
        horizons: the number of messages.
        future: the `FutureModel`, or None.
        width: number of features: the last hidden size (S + E if `hidden` is empty) plus those of the future model.

    Raises:
        ValueError: `horizons` is not positive.
    """

    def __init__(
        self,
        example: State,
        horizons: int = 1,
        *,
        hidden: Sequence[int] = (256,),
        batch_dim: Any = None,
        encoder: nn.Module | None = None,
        future: Callable[[int], FutureModel] | None = None,
    ) -> None:
        super().__init__()
        if horizons < 1:
            raise ValueError(f"horizons must be positive, got {horizons}")
        self.packing = Packing(example, batch_dim)
        self.horizons = horizons
        self.encoder = encoder
        lookahead = 0 if encoder is None else int(encoder.features)  # type: ignore[arg-type]
        widths = [self.packing.size + lookahead, *hidden]
        self.trunk = nn.ModuleList(nn.Linear(a, b) for a, b in itertools.pairwise(widths))
        self.future = None if future is None else future(self.packing.size)
        self.width = widths[-1] + (0 if self.future is None else self.future.features)

    def features(self, flat: Tensor, context: Any) -> tuple[Tensor, Tensor | None]:
        """Returns the features [B, width] of packed states [B, S], and the future model's loss, 0-d (None without a model).

        Raises:
            ValueError: a context is given, but there is neither an encoder nor a future model to read it.
        """
        if self.encoder is None and self.future is None and context is not None:
            raise ValueError("a context is given; build the synthesizer with an encoder, e.g. LookaheadEncoder, to use it")
        found = flat if self.encoder is None else torch.cat([flat, self.encoder(context)], dim=1)
        for layer in self.trunk:
            found = F.gelu(layer(found))
        if self.future is None:
            return found, None
        product, loss = self.future(flat, context)
        return torch.cat([found, product], dim=1), loss


class StateNetwork(StateTrunk):
    """Predicts messages with a `StateTrunk` and a linear head for each horizon.

    Each tensor and each layer of the state has its own rows of the head, so the network needs no layer index. The heads
    start at zero.

    Args:
        example: see `StateTrunk`.
        horizons: see `StateTrunk`.
        **settings: `hidden`, `batch_dim`, `encoder` and `future`; see `StateTrunk`.
    """

    def __init__(self, example: State, horizons: int = 1, **settings: Any) -> None:
        super().__init__(example, horizons, **settings)
        self.heads = nn.Linear(self.width, horizons * self.packing.size)
        zero_(self.heads)

    def packed(self, flat: Tensor, context: Any) -> tuple[Tensor, Tensor | None]:
        """Returns messages [B, N, S], one for each of N horizons, for packed states [B, S], and the loss of `features`.

        The messages are in the unit in which the network is trained, not yet that of gradients.
        """
        features, loss = self.features(flat, context)
        return self.heads(features).unflatten(1, (self.horizons, self.packing.size)), loss

    def predict(self, trigger: State, context: Any) -> list[State]:
        """Returns one message for each horizon, in the unit in which the network is trained."""
        messages, _ = self.packed(self.packing.pack(self.packing.leaves(trigger)), context)
        return [self.packing.unpack(message, trigger) for message in messages.unbind(1)]

    def forward(self, trigger: State, context: Any = None) -> State:
        """Returns the message of a network with one horizon."""
        (message,) = self.predict(trigger, context)
        return message
