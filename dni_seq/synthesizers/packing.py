"""Packing: converts a nested recurrent state to one vector per lane, and back.

Legend: B = lanes, H = hidden units, L = layers, S = numbers in one lane's state, G = segments.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dni_seq.core import states
from dni_seq.core.states import State
from dni_seq.synthesizers.key_order import KeyOrder


class Packing(nn.Module):
    """Converts a state's floating-point leaves to one vector per lane, and back.

    A segment is a part of the vector that shares one scale: a layer of a leaf [L, B, H], or a whole leaf of any other rank.
    In the vector, the entries of a dict have the order of `example`, whatever their order in a state.

    Args:
        example: a state with leaves [L, B, H] or [B, H]; only structure and shapes are used, except B.
        batch_dim: dimension of the lanes in the state's leaves, an int or a nest. Default: 1 in leaves [L, B, H], 0 in
            leaves [B, H].

    Attributes:
        size: the width of a lane's packed state.
        segment: buffer [S], the segment of each number, 0 to G - 1.
        lengths: buffer [G], the number of elements of each segment.

    Raises:
        ValueError: a leaf is complex, or has another number of dimensions than 2 or 3 and `batch_dim` is not given.
    """

    segment: Tensor
    lengths: Tensor

    def __init__(self, example: State, batch_dim: Any = None) -> None:
        super().__init__()
        states.check_real(example, "the example")
        self._structure = states.structure(example)
        self.order = KeyOrder(example)
        if batch_dim is None:
            dims = [usual_lane_dim(leaf) for leaf in states.flatten(example)]
        else:
            dims = states.broadcast_to_leaves(batch_dim, example, "batch_dim")
        self._leaves = [states.is_floating(leaf) for leaf in states.flatten(example)]
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

    def bind(self, *, window: int, reduction: str | None, state_batch_dim: Any, state: State) -> None:
        """Checks the lanes' dimensions and the sizes against the trainer's; see `dni_seq.synthesizers.binding.bind`.

        Raises:
            ValueError: the trainer's states have their lanes in another dimension than `example`, or have other sizes.
        """
        dims = states.broadcast_to_leaves(state_batch_dim, self._structure, "state_batch_dim")
        shapes = iter(self._shapes)
        found = [d % (len(next(shapes)) + 1) for d, there in zip(dims, self._leaves, strict=True) if there]
        if found != self._dims:
            raise ValueError(
                f"the synthesizer was built for states with lanes along the dimensions {self._dims}, the trainer's "
                f"state_batch_dim says {found}: pass batch_dim={state_batch_dim!r} to the synthesizer, or correct "
                "state_batch_dim"
            )
        sizes = [list(leaf.movedim(d, 0).shape[1:]) for leaf, d in zip(states.floating(state), found, strict=True)]
        expected = [list(shape) for shape in self._shapes]
        if sizes != expected:
            raise ValueError(
                f"the synthesizer was built for a state whose leaves have the sizes {expected} in each lane, this model's "
                f"have {sizes}: build it from a state of this model"
            )

    def leaves(self, state: State) -> list[Tensor]:
        """Returns the floating-point leaves of `state` in the order of the example.

        Raises:
            ValueError: the state has other keys or another number of floating-point tensors than the example.
        """
        found = states.floating(self.order.arrange(state))
        if len(found) != len(self._dims):
            count = len(self._dims)
            raise ValueError(f"the state has {len(found)} floating-point tensors, the synthesizer's example {count}")
        return found

    def pack(self, leaves: Sequence[Tensor]) -> Tensor:
        """Concatenates a state's floating-point leaves, given in the order of the example, to [B, S]."""
        moved = [leaf.movedim(d, 0) for leaf, d in zip(leaves, self._dims, strict=True)]
        flat = [leaf.flatten(1) if leaf.dim() > 1 else leaf[:, None] for leaf in moved]
        return torch.cat(flat, dim=1)

    def unpack(self, packed: Tensor, like: State) -> State:
        """Returns `packed` [B, S] in the structure of `like`; leaves are contiguous, because they are read several times."""
        pieces = zip(packed.split(self._sizes, dim=1), self._shapes, self._dims, strict=True)
        leaves = [p.view(len(packed), *shape).movedim(0, d).contiguous() for p, shape, d in pieces]
        return states.with_floating(self.order.arrange(like), leaves)

    def spans(self, setting: Any, example: State, name: str) -> list[slice]:
        """Returns the slices of the packed vector that hold the leaves which `setting`, a bool or a nest of bools, marks."""
        values = states.broadcast_to_leaves(setting, example, name)
        chosen = [bool(v) for v, leaf in zip(values, states.flatten(example), strict=True) if states.is_floating(leaf)]
        ends = list(itertools.accumulate(self._sizes))
        pieces = zip(chosen, self._sizes, ends, strict=True)
        return [slice(end - size, end) for mark, size, end in pieces if mark]

    def segment_means(self, values: Tensor) -> Tensor:
        """Returns the mean of `values` [N, S] over each segment, [N, G]."""
        sums = values.new_zeros(len(values), len(self.lengths)).index_add_(1, self.segment, values)
        return sums / self.lengths


def usual_lane_dim(leaf: Any) -> int:
    """Returns the lanes' dimension in a leaf of PyTorch's recurrent modules: 1 in [L, B, H], 0 in [B, H].

    Raises:
        ValueError: a floating-point leaf has another number of dimensions.
    """
    if states.is_floating(leaf) and leaf.dim() not in (2, 3):
        raise ValueError(f"a state's leaf has shape {tuple(leaf.shape)}: pass batch_dim, the dimension of its lanes")
    return 1 if isinstance(leaf, Tensor) and leaf.dim() == 3 else 0
