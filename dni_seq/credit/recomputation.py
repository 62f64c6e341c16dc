"""Runs a window in chunks whose activations are computed again in the backward pass, for long windows in little memory.

Source: Chen et al. 2016, "Training Deep Nets with Sublinear Memory Cost", arXiv 1604.06174, section 3, and Gruslys et al.
2016, "Memory-Efficient Backpropagation Through Time", arXiv 1606.03401, section 3.1. Chunks have a fixed length here. Losses
are computed inside the chunks, so that the activations of a large vocabulary exist for one chunk at a time.

Legend: T = window length in steps, B = lanes.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from dni_seq.core import states
from dni_seq.core.states import State
from dni_seq.core.windows import Nest, first_tensor
from dni_seq.credit.window_runner import WindowRunner, cut


def run_in_chunks(
    runner: WindowRunner,
    inputs: Nest,
    targets: Nest,
    mask: Tensor | None,
    state: State | None,
    steps: int,
) -> tuple[Any, State, Tensor]:
    """Runs a window chunk by chunk; returns the outputs without a graph, the last state and the loss, 0-d.

    A chunk keeps only its first state. The backward pass runs the chunk again, with the same random numbers. The model then
    writes its buffers a second time, so the caller must restore them.

    Args:
        runner: runs the model.
        inputs: [T, B, ...].
        targets: [T, B, ...].
        mask: [T, B] bool, or None.
        state: the state before the window.
        steps: length of a chunk; the last chunk may be shorter.

    Raises:
        ValueError: `loss_fn` returns a scalar. The window's loss can be computed only from unreduced losses of the chunks.
    """

    def run_chunk(chunk: tuple[Nest, Nest, Tensor | None], start: State | None) -> tuple[Any, State, Tensor]:
        outputs, last = runner.run(chunk[0], start)
        return outputs, last, runner.losses(outputs, chunk[1], chunk[2])

    losses: list[Tensor] = []
    whole: Any = None
    total = len(first_tensor(inputs))
    for begin in range(0, total, steps):
        span = slice(begin, begin + steps)
        chunk = states.map_tensors(partial(cut, span), (inputs, targets, mask))
        outputs, state, loss = recomputed(run_chunk, chunk, state)
        if loss.dim() == 0:
            raise ValueError(
                "checkpoint_every needs a loss_fn that returns unreduced losses [T, B], this one returned a scalar"
            )
        losses.append(loss)
        whole = _written(whole, states.detach(outputs), begin, total)
    return whole, state, runner.reduce(torch.cat(losses), targets, mask)


def recomputed(function: Callable[..., Any], *arguments: Any) -> Any:
    """Returns `function(*arguments)`; the backward pass computes it again, with the same random numbers."""
    return checkpoint(function, *arguments, use_reentrant=False)


def _written(whole: Any, part: Any, begin: int, total: int) -> Any:
    """Writes a chunk's outputs into the window's outputs `whole`, which the first chunk creates; returns `whole`."""
    if whole is None:
        whole = states.map_tensors(lambda leaf: leaf.new_empty((total, *leaf.shape[1:])), part)
    for target, source in zip(states.flatten(whole), states.flatten(part), strict=True):
        target[begin : begin + len(source)] = source
    return whole
