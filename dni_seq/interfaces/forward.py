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
    """Gives part B of a network a prediction of the activation that the part before it, A, would send.

    Training the synthesizer adds gradients to its parameters; the caller steps the synthesizer's optimizer. In `eval()` a
    call returns the real activation.

    Source: Jaderberg et al. 2017, arXiv 1608.05343, section 2 (synthetic inputs); names and arguments are those of
    dni-pytorch.

    Args:
        synthesizer: any module with `forward(trigger, context)` that returns a message of the activation's shape and dtype.

    Raises:
        ValueError: in a call: message and activation differ in shape or dtype, or a context is missing or not expected.
    """

    @uncompiled
    def forward(self, message: State, trigger: State) -> State:
        """Returns the activation predicted from `trigger`, and trains the synthesizer to predict the real activation.

        Gradients are added to the synthesizer's parameters; the caller steps the synthesizer's optimizer. In `eval()` the
        real activation is returned.

        Args:
            message: the real activation.
            trigger: what the synthesizer predicts from.
        """
        if not self.training:
            return message
        self.send(message, trigger)
        return self.receive(trigger)

    @uncompiled
    def send(self, message: State, trigger: State) -> Regression | None:
        """Trains the synthesizer to predict `message`, a real activation, at `trigger`.

        Gradients are added to the synthesizer's parameters only; the caller steps the synthesizer's optimizer.

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
        """Returns the activation predicted from `trigger`, detached; it does not require a gradient."""
        (message,) = self.messages(trigger, current_context())
        return message


class BidirectionalInterface(nn.Module):
    """Decouples two parts of a network, A feeding B: B gets a predicted activation, A a predicted gradient.

    Neither part waits for the other. Part A calls `send` and part B calls `receive`. A call of the module runs both methods
    in one process.

    In `eval()` nothing is trained: a call returns the real activation, and `receive` returns the predicted one.

    Source: Jaderberg et al. 2017, arXiv 1608.05343, section 2 (full unlock); names and arguments are those of dni-pytorch.

    Args:
        forward_synthesizer: predicts A's activation from a trigger available to both parts, such as the network's input.
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
        """Runs `send` and then `receive` in one process; returns the activation predicted from `trigger`.

        The arguments are those of `send`. In `eval()` the result is `message`, the real activation.
        """
        if not self.training:
            return message
        self.send(message, trigger)
        return self.receive(trigger)

    @uncompiled
    def send(self, message: State, trigger: State) -> Regression | None:
        """Called by part A: trains A with a predicted gradient, and the forward synthesizer with A's real activation.

        Args:
            message: A's activation, attached to A's graph; the gradient that the backward synthesizer predicts for it is
                backpropagated into A.
            trigger: what the forward synthesizer predicts the activation from.

        Returns:
            The `Regression` of the forward synthesizer. None in `eval()`, under `torch.no_grad()`, or if the forward
            synthesizer has no trainable parameter.

        Raises:
            ValueError: `message` does not require a gradient, or a prediction has another shape or dtype than `message`.
        """
        regression = self.forward_interface.send(message, trigger)
        self.backward_interface.backward(message)
        return regression

    @uncompiled
    def receive(self, trigger: State) -> State:
        """Called by part B: returns the activation predicted from `trigger`, a leaf that requires a gradient.

        In B's backward pass, the gradient that reaches this leaf trains the backward synthesizer at this activation.
        """
        return self.backward_interface.make_trigger(self.forward_interface.receive(trigger))
