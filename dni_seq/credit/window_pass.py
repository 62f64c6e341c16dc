"""Runs one window of a trainer forward and backward, and sums its gradients over ranks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dni_seq.core import states
from dni_seq.core.deferred_backward import backward, defer_backward
from dni_seq.core.states import State
from dni_seq.core.windows import Lookahead, first_tensor
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
    exchange = None
    auxiliary = credit is not None and credit.auxiliary is not None
    with defer_backward() as scope:
        start = window.start
        trigger = states.detach(start) if credit is None or start is None else credit.make_trigger(start, context)
        run = runner.run_in_two_parts if auxiliary else runner.run_whole
        outputs, early, last = run(window.inputs, stream.attach(trigger))
        first = first_tensor(window.inputs)
        runner.check_lanes(last, first.shape[runner.batch_dim])
        loss = runner.loss(outputs, window.targets, window.mask)
        backward(loss)
        if credit is not None:
            if not bound:
                credit.bind(len(first), last)
            exchange = credit.inject(scope, loss, last, window.ends, lookahead)
            if (own := credit.auxiliary_loss(early, exchange)) is not None:
                backward(own)
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
