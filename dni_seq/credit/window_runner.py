"""WindowRunner: runs a model on a window and computes its loss, in training and in replays.

Legend: T = window length in steps, B = lanes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from dni_seq.core import states
from dni_seq.core.states import State
from dni_seq.core.traces import traced_parameters
from dni_seq.core.windows import REDUCTIONS, Lookahead, Nest, Reduction, first_tensor, over
from dni_seq.credit.window_checks import check_ignored, check_lanes, lane_dims
from dni_seq.distributed.data_parallel import DataParallel, SingleProcess


@dataclass
class WindowRunner:
    """Runs a model on windows and reduces the losses of a window to a scalar, in training and in replays.

    Attributes:
        model: `model(inputs, state) -> (outputs, state)`.
        loss_fn: `loss_fn(outputs, targets)`, a scalar or unreduced losses [T, B].
        reduction: how losses [T, B] are reduced. "mean": over all steps that the mask marks; "lane-mean": their sum over
            time, averaged over lanes; "sum": their sum.
        autocast: dtype of `torch.autocast`, or None for full precision.
        batch_dim: the lanes' dimension in inputs and targets.
        state_batch_dim: the lanes' dimension in the state's leaves, an int, or ints nested like the state. With None,
            `check_lanes` finds the dimensions at the first state and sets this attribute.
        start: the initial state with all lanes, a function that makes it from the number of lanes, or None for
            `model.initial_state`.
        parallel: the `DataParallel` of this rank, or a `SingleProcess`.
        traced: the parameters to which traces bring the gradients of later losses. Messages do not reach these parameters.
        checkpoint_every: length in steps of the chunks whose activations are computed again in the backward pass; None to
            keep all activations.
        reduces: whether `loss_fn` returned unreduced losses at the latest window. If it returns a scalar, `reduction` has no
            effect.

    Raises:
        ValueError: the reduction is unknown, or the model is wrapped in DistributedDataParallel.
    """

    model: nn.Module
    loss_fn: Callable[[Any, Any], Tensor]
    reduction: Reduction = "mean"
    autocast: torch.dtype | None = None
    batch_dim: int = 1
    state_batch_dim: Any = 1
    start: State | Callable[[int], State] | None = None
    parallel: DataParallel = field(default_factory=SingleProcess)
    traced: list[nn.Parameter] = field(init=False)
    checkpoint_every: int | None = field(default=None, init=False)
    reduces: bool = field(default=True, init=False)

    def __post_init__(self) -> None:
        """Checks the model and the reduction."""
        if self.reduction not in REDUCTIONS:
            raise ValueError(f'reduction must be "mean", "lane-mean" or "sum", got {self.reduction!r}')
        if self.batch_dim != 1 and self.reduction == "lane-mean":
            raise ValueError('reduction="lane-mean" needs time-major windows [T, B, ...]: use batch_dim=1')
        if isinstance(self.model, nn.parallel.DistributedDataParallel):
            raise ValueError("SequenceTrainer reduces gradients itself: pass the bare model, not DDP, and parallel=")
        self.traced = traced_parameters(self.model)

    def initial_state(self, lanes: int) -> State | None:
        """Returns the initial state of `lanes` sequences, or None if the model creates it itself when called with None."""
        if callable(self.start):
            return self.start(lanes)
        if self.start is not None:
            return self.start
        of_model: Callable[[int], State] | None = getattr(self.model, "initial_state", None)
        return None if of_model is None else of_model(lanes)

    def run(self, inputs: Nest, state: State | None) -> tuple[Any, State]:
        """Runs the model on a copy of `state`, into which the model may write; returns outputs and last state.

        The keys of the last state are in the order of `state`, whatever their order in the model.

        Raises:
            TypeError: the last state holds something else than tensors.
            ValueError: the last state has other keys than `state`.
        """
        with self._autocast(inputs):
            outputs, last = self.model(inputs, None if state is None else states.clone(state))
        return outputs, self._checked(last, state)

    def _checked(self, last: State, before: State | None) -> State:
        """Returns a state of the model with its keys in the order of the state before it."""
        states.check_leaves(last, "the model's last state")
        return last if before is None else states.match_keys(last, before, "the model's last state", "the state before it")

    def run_whole(self, inputs: Nest, state: State | None) -> tuple[Any, State, State]:
        """Runs a window as `run` does; returns the outputs, and the last state twice, in the form of `run_in_two_parts`."""
        outputs, last = self.run(inputs, state)
        return outputs, last, last

    def run_in_two_parts(self, inputs: Nest, state: State | None) -> tuple[Any, State, State]:
        """Runs step 0 and then steps 1 to T - 1, so that the state after step 0 is available for an `AuxiliaryTask`.

        Returns:
            The outputs, concatenated along time, the state after step 0, and the last state. With T = 1 both states are the
            same.
        """
        outputs, found = self._run_parts(inputs, state, [1, len(first_tensor(inputs))])
        return outputs, found[0], found[-1]

    def run_in_parts(self, inputs: Nest, state: State | None, steps: int) -> tuple[Any, list[State]]:
        """Runs a window `steps` steps at a time; returns the outputs of the window and the state after each part.

        If the model has a method `run_in_parts(inputs, state, steps)` and is not compiled, that method runs the window,
        which may cost less than several calls of the model. Otherwise the model is called once for each part.
        """
        own = getattr(self.model, "run_in_parts", None)
        total = len(first_tensor(inputs))
        if own is None or getattr(self.model, "_compiled_call_impl", None) is not None:
            return self._run_parts(inputs, state, [*range(steps, total, steps), total])
        with self._autocast(inputs):
            outputs, found = own(inputs, None if state is None else states.clone(state), steps)
        return outputs, [self._checked(each, state) for each in found]

    def _run_parts(self, inputs: Nest, state: State | None, ends: list[int]) -> tuple[Any, list[State]]:
        """Runs the parts of a window that end after `ends` steps; returns its outputs and the state after each part."""
        if ends[0] == len(first_tensor(inputs)):
            outputs, last = self.run(inputs, state)
            return outputs, [last]
        pieces, found = [], []
        for begin, end in zip([0, *ends], ends, strict=False):
            output, state = self.run(states.map_tensors(partial(cut, slice(begin, end)), inputs), state)
            pieces.append(output)
            found.append(state)
        return states.map_together(torch.cat, pieces, "the model's outputs"), found

    def loss(self, outputs: Any, targets: Nest, mask: Tensor | None) -> Tensor:
        """Returns the window's loss, 0-d; on several ranks this rank's contribution to the loss of all lanes.

        Raises:
            ValueError: `loss_fn` returns a scalar although a mask is given, or unreduced losses of another shape than the
                mask or the reduction needs; or targets hold negative ids, and a mean would count their steps with loss 0.
        """
        return self.reduce(self.losses(outputs, targets, mask), targets, mask)

    def losses(self, outputs: Any, targets: Nest, mask: Tensor | None) -> Tensor:
        """Returns what `loss_fn` returns for the outputs of a window, or of a part of a window.

        With a mask, NaNs and infinities in the gradient are replaced by 0 at steps that do not count.
        """
        with self._autocast(targets):
            return self.loss_fn(outputs if mask is None else finite_gradients(outputs, mask), targets)

    def reduce(self, losses: Tensor, targets: Nest, mask: Tensor | None) -> Tensor:
        """Returns the loss of a window from its `losses`; see `loss`."""
        with self._autocast(targets):
            check_ignored(losses, targets, mask)
            self.reduces = losses.dim() > 0
            loss = window_loss(losses, mask, self.reduction)
            if self.reduction == "sum" and losses.dim() > 0:
                return loss
            return self.parallel.share_of_mean(loss, mask if self.reduction == "mean" else None)

    def reset(self, state: State, ends: Tensor | None, *, detached: bool = True) -> State:
        """Returns `state` with the lanes that `ends` [B] marks set to the initial state; unchanged if `ends` is None.

        With `detached=False` the graph of a learned initial state is kept.
        """
        if ends is None:
            return state
        initial = self.initial_state(len(ends))
        if detached and initial is not None:
            initial = states.detach(initial)
        return states.reset_lanes(state, ends, initial, self.state_batch_dim)

    def check_lanes(self, state: State, lanes: int) -> None:
        """Raises a ValueError if state and inputs differ in their number of lanes. Sets `state_batch_dim` if it is None.

        `lanes` is B, the number of lanes of the inputs. If `state_batch_dim` is None, the lanes of each leaf are the
        dimension of size B. If several dimensions of a leaf have this size, the lanes are the dimension whose size differs
        in the initial state of B + 1 lanes; with B = 1 any of them serves. If this does not decide, a ValueError is raised.
        """
        if self.state_batch_dim is None:
            try:
                self.state_batch_dim = lane_dims(state, lanes, None)
            except ValueError:
                larger = self._larger_state(lanes)
                if larger is None:
                    raise
                self.state_batch_dim = lane_dims(state, lanes, larger)
        check_lanes(state, lanes, self.state_batch_dim)

    def _larger_state(self, lanes: int) -> State | None:
        """Returns the initial state of `lanes` + 1 lanes; None if the initial state is fixed or unknown."""
        if self.start is not None and not callable(self.start):
            return None
        with torch.random.fork_rng():
            return self.initial_state(lanes + 1)

    @torch.no_grad()
    def state_template(self, inputs: Nest, lanes: int) -> State:
        """Returns a state with the structure and shapes of the model's state for `lanes` lanes; its values are meaningless.

        Without an initial state it runs the model on `inputs` once.
        """
        initial = self.initial_state(lanes)
        if initial is None:
            with torch.random.fork_rng():
                initial = self.run(inputs, None)[1]
        return initial

    def check_saved(self, saved: State, template: State) -> None:
        """Raises a ValueError if a saved leaf does not have the shape of its leaf in `template`.

        Args:
            saved: a saved hidden state, nested like `template`, with the lanes of all ranks.
            template: a state with this rank's lanes.
        """
        dims = states.broadcast_to_leaves(self.state_batch_dim, template, "state_batch_dim")
        for leaf, like, dim in zip(states.flatten(saved), states.flatten(template), dims, strict=True):
            if not isinstance(like, Tensor):
                continue
            expected = list(like.shape)
            if expected:
                expected[dim] *= self.parallel.size
            found = list(leaf.shape) if isinstance(leaf, Tensor) else type(leaf).__name__
            if found != expected:
                raise ValueError(f"the saved hidden state has a leaf {found}, this model's has {expected}")

    def _autocast(self, like: Nest) -> contextlib.AbstractContextManager[Any]:
        if self.autocast is None:
            return contextlib.nullcontext()
        return torch.autocast(first_tensor(like).device.type, dtype=self.autocast)


def cut(span: slice, tensor: Tensor) -> Tensor:
    """Returns the steps `span` of a tensor [T, ...]."""
    return tensor[span]


def finite_gradients(outputs: Any, mask: Tensor) -> Any:
    """Returns outputs whose gradients are 0, not NaN or infinite, at steps that do not count.

    Such a step has the weight 0 in the window's loss, but the derivative of the step's loss may be infinite, and 0 times
    infinity is NaN.

    Args:
        outputs: [T, B, ...], a tensor or a nest of tensors.
        mask: [T, B] bool, True for steps that count.
    """

    def guarded(leaf: Tensor) -> Tensor:
        if leaf.requires_grad and leaf.shape[:2] == mask.shape:
            leaf = leaf.view_as(leaf)  # a hook on the model's own tensor would stay with it
            leaf.register_hook(lambda gradient: torch.where(over(mask, gradient) | gradient.isfinite(), gradient, 0))
        return leaf

    return states.map_floating(guarded, outputs)


def window_loss(losses: Tensor, mask: Tensor | None, reduction: Reduction) -> Tensor:
    """Returns the loss of a window, 0-d, from a scalar or from unreduced losses [T, B].

    Args:
        losses: the result of `loss_fn`; a scalar is returned unchanged.
        mask: [T, B] bool, True for steps that count; None if all count.
        reduction: "mean" over the steps that count, "lane-mean" for the sum over time and mean over lanes, or "sum".

    Raises:
        ValueError: a mask is given for a scalar or has another shape than the losses, or "lane-mean" has no [T, B] losses.
    """
    if losses.dim() == 0:
        if mask is not None:
            raise ValueError("mask needs a loss_fn that returns unreduced losses [T, B], this one returned a scalar")
        return losses
    if mask is not None:
        if mask.shape != losses.shape:
            raise ValueError(f"mask has shape {tuple(mask.shape)}, unreduced losses {tuple(losses.shape)}: they must agree")
        losses = torch.where(mask, losses, 0)
    if reduction == "lane-mean" and losses.dim() < 2:
        raise ValueError(f'"lane-mean" needs unreduced losses [T, B], this loss_fn returned shape {list(losses.shape)}')
    if reduction == "mean":
        return losses.mean() if mask is None else losses.sum() / mask.sum().clamp_min(1)
    return losses.sum() / losses.shape[1] if reduction == "lane-mean" else losses.sum()


def lookahead_at_start(inputs: Nest, targets: Nest, mask: Tensor | None, lookahead: Lookahead) -> Lookahead:
    """Returns the lookahead at a window's first state: m steps, first those of the window, then those of `lookahead`."""
    steps = len(first_tensor(lookahead.inputs))
    counts = torch.ones_like(lookahead.valid[:1]).expand(len(first_tensor(inputs)), -1) if mask is None else mask
    after = lookahead.valid if lookahead.mask is None else lookahead.mask

    def first_steps(leaves: list[Tensor]) -> Tensor:
        return torch.cat(leaves)[:steps]

    return Lookahead(
        inputs=states.map_together(first_steps, [inputs, lookahead.inputs], "the inputs"),
        targets=states.map_together(first_steps, [targets, lookahead.targets], "the targets"),
        valid=torch.cat([torch.ones_like(counts), lookahead.valid])[:steps],
        mask=torch.cat([counts, after])[:steps],
    )
