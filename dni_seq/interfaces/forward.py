"""ForwardInterface predicts activations; BidirectionalInterface predicts activations and gradients.

Source: Jaderberg et al. 2017, "Decoupled Neural Interfaces using Synthetic Gradients", arXiv 1608.05343, section 2.
"""

from __future__ import annotations

import torch
from torch import nn

from dni_seq.core import states
from dni_seq.core.deferred_backward import uncompiled
from dni_seq.core.states import State
from dni_seq.interfaces.backward import BackwardInterface
from dni_seq.interfaces.base import Interface
from dni_seq.interfaces.context import current_context
from dni_seq.synthesizers.base import Regression


class ForwardInterface(Interface):
    """Gives part B of a network a prediction of the activation that part A would send (a synthetic input).

    Training the synthesizer adds gradients to its parameters; the caller steps its optimizer. In `eval()` a call returns the
    real activation.

    Args:
        synthesizer: any module with `forward(trigger, context)` that returns a message of the activation's shape.

    Attributes:
        synthesizer: the same.
    """

    @uncompiled
    def forward(self, message: State, trigger: State) -> State:
        """Trains the synthesizer on the real activation `message`; returns the synthetic one predicted from `trigger`."""
        if not self.training:
            return message
        self.send(message, trigger)
        return self.receive(trigger)

    @uncompiled
    def send(self, message: State, trigger: State) -> Regression | None:
        """Trains the synthesizer to predict `message`, a real activation, at `trigger`; the caller steps its optimizer.

        Gradients are added to the synthesizer's parameters only.

        Returns:
            The regression's loss, errors and cosines. None if nothing is trained: in `eval()`, under `torch.no_grad()`, or
            if the synthesizer has no trainable parameter.

        Raises:
            ValueError: the synthesizer's message does not have the shape and dtype of `message`.
        """
        if not self.training or not torch.is_grad_enabled() or not self.learns:
            return None
        return self.regress(trigger, current_context(), [states.detach(message)])

    @uncompiled
    def receive(self, trigger: State) -> State:
        """Returns the synthetic activation for `trigger`, without a graph."""
        (message,) = self.messages(trigger, current_context())
        return message


class BidirectionalInterface(nn.Module):
    """Sends synthetic inputs to part B and synthetic gradients to part A, so that neither part waits for the other.

    In `eval()` a call returns the real activation, and `receive` returns the synthetic input.

    Args:
        forward_synthesizer: predicts part A's activation from a trigger that both parts know, such as the network's input.
        backward_synthesizer: predicts the gradient with respect to that activation.

    Attributes:
        forward_interface: the `ForwardInterface` of the synthetic input.
        backward_interface: the `BackwardInterface` of the synthetic gradient.
    """

    def __init__(self, forward_synthesizer: nn.Module, backward_synthesizer: nn.Module) -> None:
        super().__init__()
        self.forward_interface = ForwardInterface(forward_synthesizer)
        self.backward_interface = BackwardInterface(backward_synthesizer)

    @uncompiled
    def forward(self, message: State, trigger: State) -> State:
        """Runs both ends in one process: `send`, then `receive`; returns the synthetic input."""
        if not self.training:
            return message
        self.send(message, trigger)
        return self.receive(trigger)

    @uncompiled
    def send(self, message: State, trigger: State) -> Regression | None:
        """Runs part A's end: trains the synthetic input on `message`, and backpropagates a synthetic gradient from it.

        Returns:
            The regression of the synthetic input, as `ForwardInterface.send` returns it.

        Raises:
            ValueError: `message` does not require a gradient, or a synthesizer's message does not have its shape and dtype.
        """
        regression = self.forward_interface.send(message, trigger)
        self.backward_interface.backward(message)
        return regression

    @uncompiled
    def receive(self, trigger: State) -> State:
        """Runs part B's end: returns the synthetic input for `trigger`; its true gradient trains the synthetic gradient."""
        return self.backward_interface.make_trigger(self.forward_interface.receive(trigger))
