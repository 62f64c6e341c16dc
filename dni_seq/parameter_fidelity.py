"""gradient_fidelity: compares the parameter gradients of a trainer with those of full BPTT.

Legend: T = window length in steps, B = lanes.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from dni_seq.core import states
from dni_seq.core.snapshot import undo_runs
from dni_seq.core.traces import Trace
from dni_seq.core.windows import Window, first_tensor
from dni_seq.credit.fidelity import cosine
from dni_seq.credit.replay import unrolled_losses
from dni_seq.trainer import SequenceTrainer


class ParameterFidelity(NamedTuple):
    """Comparison of the estimated gradient of a parameter with the exact gradient.

    Attributes:
        cosine: the cosine between the two gradients, from -1 to 1; 0 if either gradient is zero.
        norm_ratio: norm of the estimated gradient / norm of the exact gradient; NaN if the exact gradient is zero.
    """

    cosine: float
    norm_ratio: float


class GradientFidelity(NamedTuple):
    """How well the gradient that a trainer accumulates over a sequence matches that of full BPTT.

    Attributes:
        cosine: the cosine between the two gradients of all parameters together, from -1 to 1; see `ParameterFidelity`.
        norm_ratio: norm of the trainer's gradient / norm of the gradient of full BPTT, over all parameters together.
        parameters: cosine and norm ratio of each parameter that requires a gradient, by name.
    """

    cosine: float
    norm_ratio: float
    parameters: dict[str, ParameterFidelity]


def gradient_fidelity(
    trainer: SequenceTrainer, windows: Iterable[Window], start: states.State | None = None
) -> GradientFidelity:
    """Compares the gradient that a trainer accumulates over a sequence with that of full BPTT, for frozen parameters.

    The trainer steps through the windows with its own method: truncated BPTT, `backward_windows`, traces or the messages of
    a synthesizer. The gradients of its steps are summed. Full BPTT computes the gradient of the sum of all windows' losses
    through one graph, which holds all windows in memory. The model runs in `eval()`. Afterwards the trainer and the random
    state are as they were before the call.

    Source: ours.

    Args:
        trainer: a trainer of a single process, without `parallel`.
        windows: consecutive windows, with a lookahead if the trainer's synthesizer needs one.
        start: the state before the first window. No gradient flows into this state, and its traces are set to zero.
            Default: the trainer's initial state.

    Returns:
        Cosine and norm ratio, of all parameters together and of each parameter.

    Raises:
        ValueError: there are no windows, or the trainer shares its lanes with other ranks.
    """
    sequence = list(windows)
    if not sequence:
        raise ValueError("gradient_fidelity needs at least one window")
    if trainer.parallel.size > 1:
        raise ValueError("gradient_fidelity works in one process: use a trainer without parallel=")
    device = first_tensor(sequence[0].inputs).device
    with undo_runs(trainer.model, device):
        trainer.model.eval()
        with _frozen(trainer):
            if start is not None:
                start = states.map_tensors(_without_past, start)
                trainer.state = start
            estimate = _estimated(trainer, sequence)
        exact = _exact(trainer, sequence, start)
    rows = {
        name: _compared(estimate[name], exact[name])
        for name, parameter in trainer.model.named_parameters()
        if parameter.requires_grad
    }
    together = [torch.cat([gradient.flatten() for gradient in found.values()]) for found in (estimate, exact)]
    return GradientFidelity(*_compared(*together), rows)


@contextmanager
def _frozen(trainer: SequenceTrainer) -> Iterator[None]:
    """Lets the trainer step without changing a parameter in the block, and restores the trainer's state after the block."""
    saved, state = copy.deepcopy(trainer.state_dict()), trainer.state
    clip, accumulate = trainer.clip, trainer.accumulate
    credit = trainer.credit
    optimizers = [trainer.optimizer, *([] if credit is None or credit.optimizer is None else [credit.optimizer])]
    for group in (group for optimizer in optimizers for group in optimizer.param_groups):
        group["lr"] = 0.0
    trainer.clip, trainer.accumulate = None, 1
    trainer._gradients.restart()
    trainer.reset()
    try:
        yield
    finally:
        trainer.clip, trainer.accumulate = clip, accumulate
        trainer.load_state_dict(saved)
        if state is not None:
            first = states.flatten(state)[0]
            dim = states.broadcast_to_leaves(trainer.runner.state_batch_dim, state, "state_batch_dim")[0]
            trainer._stream.restore(state, first.shape[dim])


def _estimated(trainer: SequenceTrainer, windows: list[Window]) -> dict[str, Tensor]:
    """Returns the sum of the gradients of all windows, by parameter, float64."""
    total = {name: torch.zeros_like(p, dtype=torch.float64) for name, p in trainer.model.named_parameters()}
    for window in windows:
        for parameter in trainer.model.parameters():  # a step clears only the gradients of its optimizers' parameters
            parameter.grad = None
        trainer.step(window.inputs, window.targets, ends=window.ends, mask=window.mask, lookahead=window.lookahead)
        for name, parameter in trainer.model.named_parameters():
            if parameter.grad is not None:
                total[name] += parameter.grad.to_dense() if parameter.grad.is_sparse else parameter.grad
    return total


def _without_past(leaf: Tensor) -> Tensor:
    return torch.zeros_like(leaf) if isinstance(leaf, Trace) else leaf.detach()


def _exact(trainer: SequenceTrainer, windows: list[Window], start: states.State | None) -> dict[str, Tensor]:
    """Returns the gradient of the sum of all windows' losses through one graph, by parameter, float64."""
    runner = trainer.runner
    first = first_tensor(windows[0].inputs)
    state = runner.initial_state(first.shape[runner.batch_dim]) if start is None else start
    total = torch.stack(unrolled_losses(runner, windows, state)).sum()
    names, parameters = zip(*trainer.model.named_parameters(), strict=True)
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    found = iter(torch.autograd.grad(total, trained, allow_unused=True))
    gradients = [next(found) if parameter.requires_grad else None for parameter in parameters]
    return {
        name: torch.zeros_like(p, dtype=torch.float64) if g is None else g.to_dense().double()
        for name, p, g in zip(names, parameters, gradients, strict=True)
    }


def _compared(estimate: Tensor, exact: Tensor) -> ParameterFidelity:
    size, other = float(estimate.norm()), float(exact.norm())
    return ParameterFidelity(float(cosine([estimate], [exact])), size / other if other else float("nan"))
