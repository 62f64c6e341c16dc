"""Interface: the base class of interfaces in both directions."""

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
    """Predicts messages with a synthesizer and trains it by regression; the base class of interfaces in both directions.

    Args:
        synthesizer: the module that predicts.
    """

    def __init__(self, synthesizer: nn.Module) -> None:
        super().__init__()
        self.synthesizer = synthesizer

    @property
    def learns(self) -> bool:
        """Whether the synthesizer has a trainable parameter."""
        return any(parameter.requires_grad for parameter in self.synthesizer.parameters())

    @torch.no_grad()
    def messages(self, trigger: State, context: Any, synthesizer: nn.Module | None = None) -> list[State]:
        """Returns the messages at `trigger`, one for each horizon, without a graph.

        If `synthesizer` is given, it predicts in place of the interface's synthesizer.
        """
        with _full_precision(trigger) as cast:
            messages = predict(synthesizer or self.synthesizer, cast(states.detach(trigger)), cast(context))
        return [self._adapted(message, trigger) for message in messages]

    def _adapted(self, message: State, trigger: State) -> State:
        """Returns `message` converted to half precision if its trigger has half precision."""
        return _like(message, trigger)

    def _predict_and_train(self, trigger: State, context: Any) -> tuple[list[State], Tensor]:
        """Returns the messages of a self-supervised synthesizer, without a graph, and its loss, already backpropagated."""
        with _full_precision(trigger) as cast:
            messages, loss = predict_and_train(self.synthesizer, cast(states.detach(trigger)), cast(context))
        return [self._adapted(message, trigger) for message in messages], loss

    def measure(self, trigger: State, context: Any, targets: list[State | None]) -> Regression:
        """Returns the regression of the synthesizer's messages towards `targets`, without a backward pass.

        Running statistics of the synthesizer are updated. The loss has a graph if gradients are enabled.
        """
        with _full_precision(trigger) as cast:
            numeric = [None if target is None else cast(target) for target in targets]
            trigger, context = cast(states.detach(trigger)), cast(states.detach(context))
            return regress(self.synthesizer, trigger, context, numeric)

    def regress(self, trigger: State, context: Any, targets: list[State | None]) -> Regression:
        """Adds the gradients of a regression's loss to the synthesizer's parameters; returns the regression.

        Raises:
            RuntimeError: the synthesizer's message does not depend on its trainable parameters.
        """
        with torch.enable_grad():
            regression = self.measure(trigger, context, targets)
        if not regression.loss.requires_grad:
            raise RuntimeError(
                "the synthesizer has trainable parameters, but its message does not depend on them: its forward must not "
                "call detach() or run under torch.no_grad()"
            )
        regression.loss.backward()
        return regression._replace(loss=regression.loss.detach())


@contextmanager
def _full_precision(trigger: State) -> Iterator[Any]:
    """Disables autocast in the block; yields a function that converts half-precision leaves of a nest to float32."""
    leaves = states.floating(trigger)
    device = leaves[0].device.type if leaves else "cpu"

    def cast(state: State) -> State:
        return states.map_floating(states.to_float32, state)

    with torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext():
        yield cast


def _like(message: State, trigger: State) -> State:
    """Returns `message` converted to half precision if its trigger has half precision.

    Each leaf of the message gets the dtype of the corresponding leaf of the trigger, if that is a half-precision dtype. If
    the numbers of leaves differ, the dtype of the trigger's first leaf counts for all leaves. If no leaf of the trigger has
    half precision, as for a trigger of tokens, the message is returned unchanged.
    """
    leaves, dtypes = states.floating(message), [leaf.dtype for leaf in states.floating(trigger)]
    if not any(dtype in states.HALF for dtype in dtypes):
        return message
    if len(dtypes) != len(leaves):
        dtypes = dtypes[:1] * len(leaves)
    pairs = zip(leaves, dtypes, strict=True)
    return states.with_floating(message, [leaf.to(dtype) if dtype in states.HALF else leaf for leaf, dtype in pairs])
