"""Data-parallel training: the B lanes of one run over several ranks, with the numbers of one process.

Every rank reads the same text into the same B lanes and trains on its slice of them. What it backpropagates is its share of
the one loss of the window, so that gradients are *summed*, and raw messages of a synthesizer keep the unit that they have
in one process: a run may go on with another number of ranks.

Legend: T = window length in steps, B = lanes of the run, W = ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dni_seq.core.windows import Lookahead, Window
from dni_seq.distributed.process_group import Ranks


class DataParallel:
    """This rank's part in training on B lanes; give it to `SequenceTrainer(parallel=...)`, or use its parts in a loop.

    Args:
        ranks: those that share the lanes.

    Attributes:
        ranks: the same.
    """

    def __init__(self, ranks: Ranks) -> None:
        self.ranks = ranks

    def __deepcopy__(self, memo: dict[int, Any]) -> DataParallel:
        return self

    def lanes(self, total: int) -> slice:
        """This rank's slice of `total` lanes.

        Raises:
            ValueError: the ranks cannot have equally many lanes.
        """
        size, rank = self.ranks.size, self.ranks.rank
        if total % size:
            raise ValueError(f"{total} lanes cannot be divided among {size} ranks: make the batch size a multiple of {size}")
        each = total // size
        return slice(rank * each, (rank + 1) * each)

    def window(self, window: Window) -> Window:
        """This rank's lanes of a window of all B."""
        mine = self.lanes(window.inputs.shape[1])
        ahead = window.lookahead
        if ahead is not None:
            mask = None if ahead.mask is None else ahead.mask[:, mine]
            ahead = Lookahead(ahead.inputs[:, mine], ahead.targets[:, mine], ahead.valid[:, mine], mask)
        return Window(
            window.inputs[:, mine],
            window.targets[:, mine],
            None if window.mask is None else window.mask[:, mine],
            None if window.ends is None else window.ends[mine],
            ahead,
        )

    def own(self, leaf: Tensor, dim: int) -> Tensor:
        """This rank's lanes of a tensor with all B along `dim`."""
        mine = self.lanes(leaf.shape[dim])
        return leaf.narrow(dim, mine.start, mine.stop - mine.start)

    def all(self, leaf: Tensor, dim: int) -> Tensor:
        """The B lanes of all ranks, of a tensor with this rank's along `dim`; a collective."""
        return self.ranks.all_gather_cat(leaf, dim)

    @property
    def size(self) -> int:
        """W."""
        return self.ranks.size

    def share(self, loss_fn: Callable[[Any, Tensor], Tensor]) -> Callable[[Any, Tensor], Tensor]:
        """`loss_fn` divided by W: a mean over this rank's lanes then is its share of the mean over all.

        For `ExactFuture` beside a trainer with the reduction "mean" or "lane-mean".
        """
        size = self.ranks.size
        return lambda outputs, targets: loss_fn(outputs, targets) / size

    def share_of_mean(self, loss: Tensor, mask: Tensor | None) -> Tensor:
        """This rank's share of the mean over all lanes, from the mean over its own; a mask [T, B / W] counts its steps."""
        if mask is None:
            return loss / self.ranks.size
        own = mask.sum().to(loss.dtype)
        return loss * own / self.ranks.sum_(own.clone()).clamp_min(1)

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum of `tensor` over all ranks."""
        return self.ranks.sum_(tensor.detach().clone())

    def norm(self, own: Tensor) -> Tensor:
        """The norm over the lanes of all ranks, of something whose norm over this rank's is `own`, 0-d."""
        return self.sum(own.double().square()).sqrt().to(own.dtype)

    def sums(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Each tensor's sum over all ranks, by one all-reduce."""
        flat = self.ranks.sum_(torch.cat([tensor.detach().reshape(-1) for tensor in tensors]))
        pieces = flat.split([tensor.numel() for tensor in tensors])
        return [piece.view_as(tensor) for piece, tensor in zip(pieces, tensors, strict=True)]

    def mean(self, tensors: Sequence[Any]) -> list[Any]:
        """Each tensor's mean over all ranks, by one all-reduce; None where it is None, on all ranks alike."""
        there = [tensor for tensor in tensors if tensor is not None]
        if not there:
            return list(tensors)
        sums = iter(self.sums(there))
        return [None if tensor is None else next(sums) / self.size for tensor in tensors]

    def synchronize(self, module: nn.Module) -> None:
        """Let the running statistics in `module` count the lanes of all ranks from now on, before they are used."""
        for part in module.modules():
            if hasattr(part, "across_ranks"):
                part.across_ranks = self  # type: ignore[assignment]

    def first(self, place: int, text: str) -> str:
        """The text of the rank with the lowest place, and its number; a collective."""
        found = self.ranks.gather((place, text))
        rank = min(range(self.size), key=lambda i: found[i][0])
        return f"{found[rank][1]} on rank {rank}"

    def average_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Average gradients over all ranks, by one all-reduce: those of a regression, whose loss is a mean over lanes."""
        learning = list(parameters)
        self.divide_gradients(learning)
        self.sum_gradients(learning)

    def divide_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Divide gradients by W, so that their sum over the ranks is a mean."""
        for parameter in parameters:
            if parameter.grad is not None:
                parameter.grad /= self.ranks.size

    def sum_gradients(self, parameters: Iterable[nn.Parameter], numbers: Sequence[Tensor] = ()) -> None:
        """Sum gradients over all ranks, and `numbers` in place, by one flattened all-reduce.

        A parameter without a gradient anywhere keeps none; without one on some ranks it counts as zero there.
        """
        learning = [parameter for parameter in parameters if parameter.requires_grad]
        there = [parameter.grad is not None for parameter in learning]
        pieces = [torch.zeros_like(p) if p.grad is None else p.grad for p in learning] + list(numbers)
        if not pieces:
            return
        dtype = pieces[0].dtype
        flags = torch.tensor(there, dtype=dtype, device=pieces[0].device)
        # The flags keep the buffer as long on every rank as on the others.
        flat = self.ranks.sum_(torch.cat([piece.reshape(-1).to(dtype) for piece in [*pieces, flags]]))
        *sums, counts = flat.split([*(piece.numel() for piece in pieces), len(flags)])
        for parameter, total, count in zip(learning, sums, counts.tolist(), strict=False):
            if count:
                parameter.grad = total.view_as(parameter).to(parameter.dtype)
        for number, total in zip(numbers, sums[len(learning) :], strict=True):
            number.copy_(total.view_as(number))
