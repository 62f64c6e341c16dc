"""What interfaces in both directions share: a synthesizer, predicted with and regressed towards messages."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from dni_seq.core import states
from dni_seq.core.states import State
from dni_seq.synthesizers.base import Regression, predict, predict_and_train, regress


class Interface(nn.Module):
    """What both directions share: a synthesizer, predicted with and regressed towards messages."""

    def __init__(self, synthesizer: nn.Module) -> None:
        super().__init__()
        self.synthesizer = synthesizer

    @property
    def learns(self) -> bool:
        """Whether the synthesizer has anything to train."""
        return any(parameter.requires_grad for parameter in self.synthesizer.parameters())

    @torch.no_grad()
    def messages(self, trigger: State, context: Any, synthesizer: nn.Module | None = None) -> list[State]:
        """The messages by horizon at `trigger`, of the interface's synthesizer or another, without a graph."""
        with _full_precision(trigger) as cast:
            messages = predict(synthesizer or self.synthesizer, cast(states.detach(trigger)), cast(context))
        return [_like(message, trigger) for message in messages]

    def _predict_and_train(self, trigger: State, context: Any) -> tuple[list[State], Tensor]:
        """The messages of a synthesizer that learns ahead, without a graph, and its loss, which it has learned from."""
        with _full_precision(trigger) as cast:
            messages, loss = predict_and_train(self.synthesizer, cast(states.detach(trigger)), cast(context))
        return [_like(message, trigger) for message in messages], loss

    def measure(self, trigger: State, context: Any, targets: list[State | None]) -> Regression:
        """What a regression would say of the synthesizer's messages; its statistics take the targets in, nothing learns.

        With a graph where one is recorded.
        """
        with _full_precision(trigger) as cast:
            numeric = [None if target is None else cast(target) for target in targets]
            trigger, context = cast(states.detach(trigger)), cast(states.detach(context))
            return regress(self.synthesizer, trigger, context, numeric)

    def regress(self, trigger: State, context: Any, targets: list[State | None]) -> Regression:
        """One regression step: the gradients of its loss are added to the synthesizer's parameters, to no others."""
        with torch.enable_grad():
            regression = self.measure(trigger, context, targets)
        if not regression.loss.requires_grad:
            raise RuntimeError(
                "the synthesizer has trainable parameters, but its message does not depend on them: its forward must not "
                "detach, or run under torch.no_grad()"
            )
        regression.loss.backward()
        return regression._replace(loss=regression.loss.detach())


@contextmanager
def _full_precision(trigger: State) -> Iterator[Any]:
    """Synthesizers work outside of autocast; half-precision triggers and contexts are handed to them in float32."""
    leaves = states.floating(trigger)
    device = leaves[0].device.type if leaves else "cpu"

    def cast(state: State) -> State:
        return states.map_floating(states.to_float32, state)

    with torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext():
        yield cast


def _like(message: State, trigger: State) -> State:
    """`message` in the half precision of its trigger, leaf by leaf where they correspond, else by the first leaf.

    A trigger without numbers, such as tokens, asks for none.
    """
    leaves, dtypes = states.floating(message), [leaf.dtype for leaf in states.floating(trigger)]
    if not any(dtype in states.HALF for dtype in dtypes):
        return message
    if len(dtypes) != len(leaves):
        dtypes = dtypes[:1] * len(leaves)
    pairs = zip(leaves, dtypes, strict=True)
    return states.with_floating(message, [leaf.to(dtype) if dtype in states.HALF else leaf for leaf, dtype in pairs])
