"""An MLP from a whole recurrent state to messages, in packed form: one vector a lane instead of a nest of tensors.

Short windows pay for every small operation, so what is done leaf by leaf elsewhere is done here once, on all leaves side by
side. `Packing` leads from a nest to its packed form and back.

Legend: B = lanes, H = hidden units, L = layers, S = numbers in one lane's state, G = segments of it, N = horizons.
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
from dni_seq.synthesizers.base import zero_
from dni_seq.synthesizers.future_model import FutureModel


class Packing(nn.Module):
    """How a state's leaves lie side by side in one vector a lane.

    A segment is what shares one scale: a layer of a leaf [L, B, H], or a whole leaf of any other rank.

    Args:
        example: a state; leaves [L, B, H] or [B, H], shapes but for B are taken from it.
        batch_dim: where the lanes lie in the state's leaves, an int or a nest.

    Attributes:
        size: S.
        segment: [S], the segment of each number, 0 to G - 1.
        lengths: [G], how many numbers a segment has.
    """

    segment: Tensor
    lengths: Tensor

    def __init__(self, example: State, batch_dim: Any = 1) -> None:
        super().__init__()
        dims = states.spread(batch_dim, example, "batch_dim")
        floating = [(leaf, d) for leaf, d in zip(states.flatten(example), dims, strict=True) if states.is_floating(leaf)]
        self._dims = [d % leaf.dim() for leaf, d in floating]
        self._shapes = [leaf.movedim(d, 0).shape[1:] for leaf, d in floating]
        self._sizes = [shape.numel() for shape in self._shapes]
        self.size = sum(self._sizes)
        layered = [leaf.dim() == 3 and d != 0 for leaf, d in zip(states.floating(example), self._dims, strict=True)]
        counts = [shape[0] if several else 1 for shape, several in zip(self._shapes, layered, strict=True)]
        lengths = [size // count for size, count in zip(self._sizes, counts, strict=True) for _ in range(count)]
        self.register_buffer("lengths", torch.tensor(lengths), persistent=False)
        numbers = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
        self.register_buffer("segment", numbers, persistent=False)

    def pack(self, leaves: Sequence[Tensor]) -> Tensor:
        """[B, S] of a state's floating-point leaves."""
        flat = [leaf.movedim(d, 0).flatten(1) for leaf, d in zip(leaves, self._dims, strict=True)]
        return torch.cat(flat, dim=1)

    def unpack(self, packed: Tensor, like: State) -> State:
        """The nest of `like` that holds `packed` [B, S]; contiguous leaves, since what follows reads them several times."""
        pieces = zip(packed.split(self._sizes, dim=1), self._shapes, self._dims, strict=True)
        return states.with_floating(like, [p.view(len(packed), *shape).movedim(0, d).contiguous() for p, shape, d in pieces])

    def spans(self, setting: Any, example: State, name: str) -> list[slice]:
        """Where the leaves lie that `setting`, one bool or a nest of them, marks."""
        values = states.spread(setting, example, name)
        chosen = [bool(v) for v, leaf in zip(values, states.flatten(example), strict=True) if states.is_floating(leaf)]
        ends = list(itertools.accumulate(self._sizes))
        pieces = zip(chosen, self._sizes, ends, strict=True)
        return [slice(end - size, end) for mark, size, end in pieces if mark]

    def segment_means(self, values: Tensor) -> Tensor:
        """[N, G], the mean of `values` [N, S] over each segment."""
        sums = values.new_zeros(len(values), len(self.lengths)).index_add_(1, self.segment, values)
        return sums / self.lengths


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
