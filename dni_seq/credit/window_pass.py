"""Runs one window of a trainer forward and backward, and sums its gradients over ranks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dni_seq.core import states
from dni_seq.core.deferred_backward import backward, defer_backward
from dni_seq.core.snapshot import TensorSnapshot, buffers_of
from dni_seq.core.states import State
from dni_seq.core.windows import Context, first_tensor
from dni_seq.credit.inner_messages import InnerStates
from dni_seq.credit.past_inputs import WindowContexts
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
    context: Context,
    around: WindowContexts,
    bound: bool,
) -> tuple[Tensor, Any, State, ScopeExchange | None]:
    """Runs a window and one backward pass through it; returns loss, outputs, last state and the synthesizer's exchange.

    Args:
        runner: runs the model.
        credit: injects a message, or None.
        stream: the hidden state of the stream, with a learned initial state and earlier windows.
        window: the window.
        context: the synthesizer's context at the first state.
        around: the contexts at the window's states.
        bound: whether `credit.bind` was called at an earlier window; if not, it is called now.
    """
    exchange, buffers = None, None
    traced: list[nn.Parameter] = []
    without_message: tuple[Tensor | None, ...] = ()
    with defer_backward() as scope:
        start = window.start
        trigger = states.detach(start) if credit is None or start is None else credit.make_trigger(start, context)
        outputs, early, last, loss, inner = _run(runner, credit, window, stream.attach(trigger, window), around)
        if runner.checkpoint_every is not None:
            buffers = TensorSnapshot(buffers_of([runner.model])).keep()
        first = first_tensor(window.inputs)
        runner.check_lanes(last, first.shape[runner.batch_dim])
        backward(loss)
        if credit is not None:
            if not bound:
                credit.bind(len(first), last)
            exchange = credit.inject(scope, loss, last, window.ends, around.at_end, inner)
            if (own := credit.auxiliary_loss(early, exchange)) is not None:
                backward(own)
            traced = [parameter for parameter in runner.traced if parameter.requires_grad]
            if traced:
                total = loss if own is None else loss + own
                without_message = torch.autograd.grad(total, traced, retain_graph=True, allow_unused=True)
    # The traces at the next window bring the gradient of later losses to these parameters. A message would bring it a
    # second time.
    for parameter, gradient in zip(traced, apart(without_message), strict=True):
        parameter.grad = gradient
    if buffers is not None:  # the backward pass has run the model again
        buffers.restore()
    return loss.detach(), outputs, last, exchange


def apart(gradients: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Returns the gradients, with a copy in place of a tensor that has occurred before.

    `torch.autograd.grad` may return one tensor for two parameters, such as two biases that are added. Clipping in place
    would scale this tensor twice.
    """
    found: list[Tensor | None] = []
    for gradient in gradients:
        occurred = gradient is not None and any(gradient is other for other in found)
        found.append(gradient.clone() if gradient is not None and occurred else gradient)
    return found


class _Pass(NamedTuple):
    """A window's forward pass.

    Attributes:
        outputs: of the model.
        early: the state after the first step, for an auxiliary task; the last state if there is no such task.
        last: the last state.
        loss: 0-d.
        inner: states inside the window that get messages; None if no state does.
    """

    outputs: Any
    early: State
    last: State
    loss: Tensor
    inner: InnerStates | None = None


def _run(
    runner: WindowRunner,
    credit: SyntheticCredit | None,
    window: RecordedWindow,
    state: State | None,
    around: WindowContexts,
) -> _Pass:
    """Runs a window from `state`: in chunks, in parts between messages, in two parts for an auxiliary task, or whole."""
    steps = None if credit is None else credit.settings.message_every
    if runner.checkpoint_every is not None:
        parts = (window.inputs, window.targets, window.mask, state)
        outputs, last, loss = run_in_chunks(runner, *parts, runner.checkpoint_every)
        return _Pass(outputs, last, last, loss)
    if steps is not None and around.known and steps < len(first_tensor(window.inputs)):
        outputs, (*inner, last) = runner.run_in_parts(window.inputs, state, steps)
        contexts = [around.after(steps * (part + 1)) for part in range(len(inner))]
        loss = runner.loss(outputs, window.targets, window.mask)
        return _Pass(outputs, last, last, loss, InnerStates(inner, contexts))
    auxiliary = credit is not None and credit.auxiliary is not None
    run = runner.run_in_two_parts if auxiliary else runner.run_whole
    outputs, early, last = run(window.inputs, state)
    return _Pass(outputs, early, last, runner.loss(outputs, window.targets, window.mask))


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
