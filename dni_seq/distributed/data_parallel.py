"""Data-parallel training: splits the B lanes of one run over several ranks. The updates equal those of a single process.

Every rank reads the same text into the same B lanes and trains on its slice of the lanes. A rank backpropagates its share of
the window's loss: the losses of all ranks add up to the loss over all lanes. Gradients are therefore summed over the ranks,
not averaged. The raw messages of a synthesizer have the same unit as in a single process, so a run may be resumed with
another number of ranks.

Legend: T = window length in steps, B = lanes of the run, W = ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dni_seq.core import states
from dni_seq.core.windows import Window, first_tensor
from dni_seq.distributed.process_group import Ranks


class DataParallel:
    """Splits B lanes over several ranks and sums gradients, for `SequenceTrainer(parallel=...)` or your own training loop.

    Methods that communicate are collective calls: all ranks must call them in the same order.

    Args:
        ranks: the ranks that share the lanes, as `dni_seq.distributed.process_group.init_distributed` yields them.
    """

    def __init__(self, ranks: Ranks) -> None:
        self.ranks = ranks

    def __deepcopy__(self, memo: dict[int, Any]) -> DataParallel:
        return self

    def lanes(self, total: int) -> slice:
        """Returns this rank's slice of `total` lanes.

        Raises:
            ValueError: `total` is not a multiple of the number of ranks.
        """
        size, rank = self.ranks.size, self.ranks.rank
        if total % size:
            raise ValueError(f"{total} lanes cannot be divided among {size} ranks: make the batch size a multiple of {size}")
        each = total // size
        return slice(rank * each, (rank + 1) * each)

    def window(self, window: Window) -> Window:
        """Returns this rank's lanes of a window with all B lanes.

        Raises:
            ValueError: B is not a multiple of the number of ranks.
        """
        mine = self.lanes(first_tensor(window.inputs).shape[1])
        own: Window = states.map_tensors(lambda tensor: tensor[:, mine], window._replace(ends=None))
        return own if window.ends is None else own._replace(ends=window.ends[mine])

    def own(self, leaf: Tensor, dim: int) -> Tensor:
        """Returns this rank's lanes of a tensor that has all B lanes along `dim`."""
        mine = self.lanes(leaf.shape[dim])
        return leaf.narrow(dim, mine.start, mine.stop - mine.start)

    def all(self, leaf: Tensor, dim: int) -> Tensor:
        """Returns all B lanes of a tensor that has this rank's lanes along `dim`; a collective call."""
        return self.ranks.all_gather_cat(leaf, dim)

    @property
    def size(self) -> int:
        """Number of ranks, W."""
        return self.ranks.size

    def share(self, loss_fn: Callable[[Any, Any], Tensor]) -> Callable[[Any, Any], Tensor]:
        """Returns `loss_fn` divided by W, the number of ranks: the ranks' means then add up to the mean over all lanes.

        Pass the result to `ExactFuture` as its loss if the trainer's reduction is "mean" or "lane-mean", because
        `ExactFuture` knows nothing of ranks. The trainer scales its own loss by itself.
        """
        size = self.ranks.size
        return lambda outputs, targets: loss_fn(outputs, targets) / size

    def share_of_mean(self, loss: Tensor, mask: Tensor | None) -> Tensor:
        """Scales a mean over this rank's lanes so that the ranks' results add up to the mean over all lanes.

        The factor is 1 / W without a mask. With a mask it is the number of counted steps of this rank, divided by the
        number of counted steps of all ranks.

        Args:
            loss: 0-d, the mean over this rank's lanes; with a mask, over this rank's counted steps.
            mask: [T, B / W] bool, True for steps that count, or None. With a mask this is a collective call.
        """
        if mask is None:
            return loss / self.ranks.size
        own = mask.sum().to(loss.dtype)
        return loss * own / self.ranks.sum_(own.clone()).clamp_min(1)

    def sum(self, tensor: Tensor) -> Tensor:
        """Returns the sum of `tensor` over all ranks; a collective call."""
        return self.ranks.sum_(tensor.detach().clone())

    def norm(self, own: Tensor) -> Tensor:
        """Combines the ranks' L2 norms into the norm of the whole tensor, sqrt(Σ own²); a collective call.

        Args:
            own: 0-d, the L2 norm of this rank's part.
        """
        return self.sum(own.double().square()).sqrt().to(own.dtype)

    def sums(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Returns new tensors: each tensor's sum over all ranks, with a single all-reduce; a collective call."""
        flat = self.ranks.sum_(torch.cat([tensor.detach().reshape(-1) for tensor in tensors]))
        pieces = flat.split([tensor.numel() for tensor in tensors])
        return [piece.view_as(tensor) for piece, tensor in zip(pieces, tensors, strict=True)]

    def mean(self, tensors: Sequence[Any]) -> list[Any]:
        """Returns new tensors: each tensor's mean over all ranks, with a single all-reduce; a collective call.

        An entry that is None stays None, and must be None on all ranks.
        """
        there = [tensor for tensor in tensors if tensor is not None]
        if not there:
            return list(tensors)
        sums = iter(self.sums(there))
        return [None if tensor is None else next(sums) / self.size for tensor in tensors]

    def synchronize(self, module: nn.Module) -> None:
        """Makes the running statistics of the synthesizers in `module` cover the lanes of all ranks from now on.

        Running statistics are the root mean squares of targets and the sums of `LeastSquaresHeads`. BatchNorm does not
        change. Call this method once, before the synthesizers are first used.
        """
        for part in module.modules():
            if hasattr(part, "across_ranks"):
                part.across_ranks = self  # type: ignore[assignment]

    def first(self, place: int, text: str) -> str:
        """Returns the text of the rank with the lowest `place`, followed by "on rank" and its number; a collective call.

        The trainer reports the first NaN with this method. All ranks get the same text. If ranks have the same `place`, the
        text of the lowest rank is returned.

        Args:
            place: position of this rank's finding in the order of the checks.
            text: what this rank has found.
        """
        found = self.ranks.gather((place, text))
        rank = min(range(self.size), key=lambda i: found[i][0])
        return f"{found[rank][1]} on rank {rank}"

    def average_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Averages the gradients of `parameters` over all ranks with a single all-reduce; a collective call.

        Use it for a synthesizer in a training loop of your own. The regression loss is a mean over this rank's lanes, so the
        averaged gradient is that of the mean over all lanes. A gradient that is missing on some ranks counts as zero there.
        """
        learning = list(parameters)
        self.divide_gradients(learning)
        self.sum_gradients(learning)

    def divide_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Divides gradients by W, the number of ranks, in place, without communication.

        The sum over the ranks, `sum_gradients`, is then a mean. `average_gradients` calls both methods.
        """
        for parameter in parameters:
            if parameter.grad is not None:
                parameter.grad /= self.ranks.size

    def sum_gradients(self, parameters: Iterable[nn.Parameter], numbers: Sequence[Tensor] = ()) -> None:
        """Sums gradients, and `numbers` in place, over all ranks with a single all-reduce; a collective call.

        A gradient that is missing on some ranks counts as zero on these ranks. A gradient that is missing on all ranks stays
        None.

        Args:
            parameters: the parameters whose gradients to sum, in the same order on all ranks.
            numbers: further tensors, which are overwritten with their sums.
        """
        learning = [parameter for parameter in parameters if parameter.requires_grad]
        there = [parameter.grad is not None for parameter in learning]
        pieces = [torch.zeros_like(p) if p.grad is None else p.grad for p in learning] + list(numbers)
        if not pieces:
            return
        dtype = pieces[0].dtype
        flags = torch.tensor(there, dtype=dtype, device=pieces[0].device)
        # Zeros for missing gradients give the buffer one length on all ranks; the flags count the ranks with a gradient.
        flat = self.ranks.sum_(torch.cat([piece.reshape(-1).to(dtype) for piece in [*pieces, flags]]))
        *sums, counts = flat.split([*(piece.numel() for piece in pieces), len(flags)])
        for parameter, total, count in zip(learning, sums, counts.tolist(), strict=False):
            if count:
                parameter.grad = total.view_as(parameter).to(parameter.dtype)
        for number, total in zip(numbers, sums[len(learning) :], strict=True):
            number.copy_(total.view_as(number))


class SingleProcess(DataParallel):
    """The `DataParallel` of a process that holds all lanes: methods return tensors unchanged, and communicate nothing."""

    def __init__(self) -> None:
        pass

    @property
    def size(self) -> int:
        """Number of ranks, 1."""
        return 1

    def lanes(self, total: int) -> slice:
        """Returns the slice of all `total` lanes."""
        return slice(0, total)

    def window(self, window: Window) -> Window:
        """Returns the window."""
        return window

    def own(self, leaf: Tensor, dim: int) -> Tensor:
        """Returns `leaf`."""
        return leaf

    def all(self, leaf: Tensor, dim: int) -> Tensor:
        """Returns `leaf`."""
        return leaf

    def share(self, loss_fn: Callable[[Any, Any], Tensor]) -> Callable[[Any, Any], Tensor]:
        """Returns `loss_fn`."""
        return loss_fn

    def share_of_mean(self, loss: Tensor, mask: Tensor | None) -> Tensor:
        """Returns `loss`."""
        return loss

    def sum(self, tensor: Tensor) -> Tensor:
        """Returns `tensor`."""
        return tensor

    def norm(self, own: Tensor) -> Tensor:
        """Returns `own`."""
        return own

    def sums(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Returns the tensors."""
        return list(tensors)

    def mean(self, tensors: Sequence[Any]) -> list[Any]:
        """Returns the tensors."""
        return list(tensors)

    def synchronize(self, module: nn.Module) -> None:
        """Leaves the module as it is: its statistics cover all lanes already."""

    def first(self, place: int, text: str) -> str:
        """Returns `text`."""
        return text

    def divide_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Leaves the gradients as they are."""

    def sum_gradients(self, parameters: Iterable[nn.Parameter], numbers: Sequence[Tensor] = ()) -> None:
        """Leaves the gradients and numbers as they are."""
