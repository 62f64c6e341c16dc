"""Interfaces for activations: ForwardInterface, and BidirectionalInterface for both directions.

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
    """Synthetic inputs: part B computes with a prediction of the activation that part A would hand on.

    In `eval()` it passes its input through.

    Args:
        synthesizer: any module with `forward(trigger, context)` that returns a message of the activation's shape.
    """

    @uncompiled
    def forward(self, message: State, trigger: State) -> State:
        """Train on the real activation `message`, hand on the synthetic one made from `trigger`."""
        if not self.training:
            return message
        self.send(message, trigger)
        return self.receive(trigger)

    @uncompiled
    def send(self, message: State, trigger: State) -> Regression | None:
        """Train the synthesizer to give `message`, a real activation, for `trigger`; its optimizer's step is the caller's.

        Returns the regression's loss and fidelity, None in `eval()` or under `torch.no_grad()`, where nothing is trained.
        Gradients go to the synthesizer alone.
        """
        if not self.training or not torch.is_grad_enabled() or not self.learns:
            return None
        return self.regress(trigger, current_context(), [states.detach(message)])

    @uncompiled
    def receive(self, trigger: State) -> State:
        """The synthetic activation for `trigger`, without a graph."""
        (message,) = self.messages(trigger, current_context())
        return message


class BidirectionalInterface(nn.Module):
    """Synthetic inputs one way, synthetic gradients the other: neither part waits for the other.

    In `eval()` a call passes its input through, and `receive` gives the synthetic input.

    Args:
        forward_synthesizer: predicts part A's activation from a trigger that both parts know, such as the network's input.
        backward_synthesizer: predicts the gradient with respect to that activation.
    """

    def __init__(self, forward_synthesizer: nn.Module, backward_synthesizer: nn.Module) -> None:
        super().__init__()
        self.forward_interface = ForwardInterface(forward_synthesizer)
        self.backward_interface = BackwardInterface(backward_synthesizer)

    @uncompiled
    def forward(self, message: State, trigger: State) -> State:
        """Both ends in one process: `send`, then `receive`."""
        if not self.training:
            return message
        self.send(message, trigger)
        return self.receive(trigger)

    @uncompiled
    def send(self, message: State, trigger: State) -> Regression | None:
        """Part A's end: learn from the synthetic gradient at `message`, train the synthetic input towards it.

        Returns the synthetic input's regression, as `ForwardInterface.send` does.
        """
        regression = self.forward_interface.send(message, trigger)
        self.backward_interface.backward(message)
        return regression

    @uncompiled
    def receive(self, trigger: State) -> State:
        """Part B's end: the synthetic input for `trigger`, which trains the synthetic gradient when the real one arrives."""
        return self.backward_interface.make_trigger(self.forward_interface.receive(trigger))
