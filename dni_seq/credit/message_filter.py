"""MessageFilter and FilteredInterface: reject messages that are not finite, or far larger than any gradient observed.

Messages of a diverging synthesizer could destroy the RNN's parameters, or distort an optimizer's moments for a thousand
steps.

Legend: N = horizons.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from dni_seq.core import nonfinite, states
from dni_seq.core.deferred_backward import GradientAccumulator
from dni_seq.core.optimizer_step import total_norm
from dni_seq.core.snapshot import Restorable
from dni_seq.core.states import State
from dni_seq.core.windows import Context
from dni_seq.credit.inner_messages import InnerStates, join, join_contexts, split
from dni_seq.distributed.data_parallel import DataParallel
from dni_seq.interfaces.backward import BackwardInterface
from dni_seq.synthesizers.binding import several_states
from dni_seq.synthesizers.target_rule import TargetRule

LARGEST_MESSAGE = 100.0
"""Limit on the norm of an injected gradient. The unit is the largest observed norm of the gradient of a window's own loss
with respect to the window's first state."""

OBSERVED_FIRST, OBSERVED_EVERY = 100, 200
"""The gradients of the first `OBSERVED_FIRST` windows, and of every `OBSERVED_EVERY`-th window after them, are observed.

Each observation costs one vector-Jacobian product to the state."""


class MessageFilter(Restorable):
    """Accepts messages up to `LARGEST_MESSAGE` times the largest gradient of a window's own loss.

    The limit is not taken from targets, because a target that holds a message grows with the message. Before the first
    observed gradient there is no limit.

    Args:
        parallel: the `DataParallel` of this rank. Either all ranks accept a message or no rank does.

    Attributes:
        largest: the largest norm of an observed gradient; 0 before the first observation.
    """

    UNCHANGING = (DataParallel,)

    def __init__(self, parallel: DataParallel) -> None:
        self._parallel = parallel
        self.largest: float | Tensor = 0.0

    def accepts(self, norm: Tensor) -> Tensor:
        """Returns whether a message of this norm (0-d, over this rank's lanes) is injected, 0-d bool."""
        norm = self._parallel.norm(norm)
        if nonfinite.readable_without_sync(norm):
            return norm < (LARGEST_MESSAGE * self.largest or math.inf)
        limit = torch.as_tensor(LARGEST_MESSAGE * self.largest, device=norm.device)
        return norm < torch.where(limit > 0, limit, math.inf)

    def observe(self, norm: Tensor) -> None:
        """Raises `largest` to `norm` (0-d, over this rank's lanes) if `norm` is finite and larger."""
        norm = self._parallel.norm(norm)
        if nonfinite.readable_without_sync(norm):
            if norm.isfinite():
                self.largest = max(float(self.largest), float(norm))
        else:
            before = torch.as_tensor(self.largest, dtype=norm.dtype, device=norm.device)
            self.largest = torch.where(norm.isfinite(), before.maximum(norm), before)


class FilteredInterface(BackwardInterface):
    """Injects zeros in place of a message that its filter rejects because it is not finite or is too large.

    Messages of a synthesizer without trainable parameters, such as exact gradients, have no limit.

    Args:
        synthesizer: the module that predicts.
        message_filter: decides which messages are injected.

    Attributes:
        valid: 0-d bool, whether the last message was injected; False if it was rejected.
        norm: 0-d, norm of the last weighted sum of messages, before the filter, over this rank's lanes.
    """

    def __init__(self, synthesizer: nn.Module, message_filter: MessageFilter) -> None:
        super().__init__(synthesizer)
        self._filter = message_filter
        self.norm = torch.zeros(())
        self.valid = torch.ones((), dtype=torch.bool)

    def reachable(self, scope: GradientAccumulator, last: State) -> State:
        """Returns a window's last state; if it has no graph because recurrent parameters are frozen, with new leaves.

        The synthesizer still predicts and learns at the new leaves, and its message reaches no parameter. A last state
        without a graph is returned unchanged if gradients are computed at the first state: the model has detached it.

        Args:
            scope: the scope of the window.
            last: the window's last state.
        """
        if any(leaf.requires_grad for leaf in [*self.exchange(scope).inputs(), *states.floating(last)]):
            return last
        return states.map_floating(lambda leaf: leaf.detach().requires_grad_(), last)

    def send_inner(
        self,
        scope: GradientAccumulator,
        inner: InnerStates,
        last: State,
        context: Context,
        rule: TargetRule,
        batch_dim: Any,
    ) -> tuple[list[State], Tensor]:
        """Injects messages at states inside a window, and predicts the messages at its last state in the same call.

        The messages at all states are accepted or rejected together.

        Args:
            scope: the scope of the window.
            inner: the states inside the window, with the context at each of them.
            last: the window's last state.
            context: the context at the last state.
            rule: the coefficients of injection; the synthesizer must be self-supervised.
            batch_dim: the dimension of the lanes in the state's leaves, an int or a nest.

        Returns:
            The messages at the last state, one for each horizon, which are zeros if the messages are rejected; and a 0-d
            bool, whether the messages are accepted.
        """
        count = len(inner.states) + 1
        joined = join([*inner.states, last], batch_dim)
        with several_states(self.synthesizer, count):
            messages = self._predicted(joined, join_contexts([*inner.contexts, context]), rule, scope)
        by_horizon = [split(message, last, count, batch_dim) for message in messages]
        *at_inner, at_last = [list(messages) for messages in zip(*by_horizon, strict=True)]
        injected = super()._injection(messages, rule)
        valid = self._filter.accepts(total_norm(injected))
        for state, found in zip(inner.states, at_inner, strict=True):
            gradients = [torch.where(valid, leaf, 0) for leaf in super()._injection(found, rule)]
            self.exchange(scope).add_inner(states.floating(state), gradients)
        accepted = [states.map_floating(lambda leaf: torch.where(valid, leaf, 0), message) for message in at_last]
        return accepted, valid

    def _injection(self, messages: list[State], rule: TargetRule) -> list[Tensor]:
        """Returns the weighted sum of the messages if it is valid, else zeros; sets `norm` and `valid`."""
        injected = super()._injection(messages, rule)
        self.norm = total_norm(injected)
        self.valid = self._filter.accepts(self.norm)
        if not nonfinite.readable_without_sync(self.valid):
            return [torch.where(self.valid, leaf, 0) for leaf in injected]
        return injected if self.valid else [torch.zeros_like(leaf) for leaf in injected]

    def observes(self, windows: int) -> bool:
        """Returns whether to observe the gradient of the window that follows `windows` earlier windows."""
        return (windows < OBSERVED_FIRST or windows % OBSERVED_EVERY == 0) and self.learns

    def observe(self, loss: Tensor, scope: GradientAccumulator, windows: int) -> None:
        """Shows the filter the gradient that a window's loss sends to its trigger, if the window is to be observed.

        Args:
            loss: the window's loss without messages, 0-d, with its graph.
            scope: the scope in which the window's trigger was made.
            windows: the number of windows before this one.
        """
        leaves = self.exchange(scope).inputs()
        if leaves and self.observes(windows):
            found = torch.autograd.grad(loss, leaves, retain_graph=True, allow_unused=True)
            self._filter.observe(total_norm([gradient for gradient in found if gradient is not None]))
