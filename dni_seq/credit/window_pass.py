"""Runs one window of a trainer forward and backward, and sums its gradients over ranks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dni_seq.core import states
from dni_seq.core.deferred_backward import backward, defer_backward
from dni_seq.core.snapshot import TensorSnapshot, buffers_of
from dni_seq.core.states import State
from dni_seq.core.windows import Lookahead, first_tensor
from dni_seq.credit.recomputation import run_in_chunks
from dni_seq.credit.replay import RecordedWindow
from dni_seq.credit.stream_state import StreamState
from dni_seq.credit.synthetic_gradient import SyntheticCredit
from dni_seq.credit.window_runner import WindowRunner
from dni_seq.distributed.data_parallel import DataParallel
from dni_seq.interfaces.exchange import ScopeExchange


def run_and_backpropagate(
    runner: WindowRunner,
    credit: SyntheticCredit | None,
    stream: StreamState,
    window: RecordedWindow,
    context: Lookahead | None,
    lookahead: Lookahead | None,
    bound: bool,
) -> tuple[Tensor, Any, State, ScopeExchange | None]:
    """Runs a window and one backward pass through it; returns loss, outputs, last state and the synthesizer's exchange.

    Args:
        runner: runs the model.
        credit: injects a message, or None.
        stream: knows where sequences start.
        window: the window.
        context: the synthesizer's context at the first state.
        lookahead: its context at the last state.
        bound: whether the synthesizer knows how it is trained; it is told at the first window.
    """
    exchange, buffers = None, None
    auxiliary = credit is not None and credit.auxiliary is not None
    with defer_backward() as scope:
        start = window.start
        trigger = states.detach(start) if credit is None or start is None else credit.make_trigger(start, context)
        first_state = stream.attach(trigger)
        if runner.checkpoint_every is not None:
            parts = (window.inputs, window.targets, window.mask, first_state)
            outputs, last, loss = run_in_chunks(runner, *parts, runner.checkpoint_every)
            buffers = TensorSnapshot(buffers_of([runner.model])).keep()
            early = last  # of the auxiliary task, which does not work with chunks
        else:
            run = runner.run_in_two_parts if auxiliary else runner.run_whole
            outputs, early, last = run(window.inputs, first_state)
            loss = runner.loss(outputs, window.targets, window.mask)
        first = first_tensor(window.inputs)
        runner.check_lanes(last, first.shape[runner.batch_dim])
        backward(loss)
        if credit is not None:
            if not bound:
                credit.bind(len(first), last)
            exchange = credit.inject(scope, loss, last, window.ends, lookahead)
            if (own := credit.auxiliary_loss(early, exchange)) is not None:
                backward(own)
    if buffers is not None:  # the backward pass has run the model again
        buffers.restore()
    return loss.detach(), outputs, last, exchange


def sum_over_ranks(
    parallel: DataParallel,
    optimizer: torch.optim.Optimizer,
    credit: SyntheticCredit | None,
    loss: Tensor,
    exchange: ScopeExchange | None,
) -> Tensor:
    """Sums gradients, the loss and the regressions over the ranks by one all-reduce; returns the loss of all lanes."""
    if parallel.size == 1:
        return loss
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    numbers = [loss.clone()]
    if credit is not None and exchange is not None:
        if credit.auxiliary is not None:
            parameters += credit.auxiliary.parameters()
        parameters += credit.synthesizer.parameters()
        numbers += credit.share_regressions(exchange)
    parallel.sum_gradients(parameters, numbers)
    return numbers[0]
