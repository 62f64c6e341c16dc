"""Two recurrent networks at two time scales: a fast one at every step, a slow one that ticks every T steps.

Source: Jaderberg et al. 2017, arXiv 1608.05343, section 3.2. The slow network reads the fast one's state at each of its
ticks. The gradient of its loss there is known only when its own window of K ticks is over, K T steps later, while the fast
network is updated every T steps: a synthetic gradient stands in for it. We differ in the task, in that no message goes back
from the slow network to the fast one, and in that the synthesizer is given what the last T steps held as its context.

Legend: T = steps of a tick, K = ticks of the slow network's window, B = lanes, S = symbols, H = hidden units.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dni_seq.core.deferred_backward import backward, defer_backward
from dni_seq.interfaces.backward import BackwardInterface
from dni_seq.interfaces.context import synthesizer_context
from dni_seq.synthesizers.mlp import BasicSynthesizer
from dni_seq.synthesizers.normalization import Normalized

SYMBOLS = 4
FAST_SYMBOL, SLOW_SYMBOL = 0, 1
JOINTS = ("synthetic", "message", "none")


class Block(NamedTuple):
    """T steps between two ticks, with what is to be told at their end.

    Attributes:
        symbols: [T, B], drawn at random.
        fast: [B], how many of them are `FAST_SYMBOL`, over T, less what is expected.
        slow: [B], how many of the last K T are `SLOW_SYMBOL`, over T, less what is expected.
        counts: [B, S], how often each came in the T steps, over T.
    """

    symbols: Tensor
    fast: Tensor
    slow: Tensor
    counts: Tensor


class Counting:
    """Random symbols; the fast network has to count one kind over T steps, the slow one another over K T steps."""

    def __init__(self, steps: int, ticks: int, lanes: int, seed: int) -> None:
        self.steps, self.ticks, self.lanes = steps, ticks, lanes
        self._generator = torch.Generator().manual_seed(seed)
        self._past = [torch.full((lanes,), 1 / SYMBOLS)] * ticks

    def block(self) -> Block:
        """The next T steps."""
        symbols = torch.randint(SYMBOLS, (self.steps, self.lanes), generator=self._generator)
        counts = F.one_hot(symbols, SYMBOLS).float().mean(0)
        self._past = [*self._past[1:], counts[:, SLOW_SYMBOL]]
        slow = torch.stack([each - 1 / SYMBOLS for each in self._past]).sum(0)
        return Block(symbols, counts[:, FAST_SYMBOL] - 1 / SYMBOLS, slow, counts)


class MultiTimescale:
    """The two networks and their training.

    Args:
        hidden: H, of both.
        ticks: K.
        joint: what joins them: "synthetic" for messages, and synthetic gradients back; "message" for messages without a
            gradient; "none" for the fast network alone, which is trained on both counts, by truncated BPTT over T steps.
        lr: learning rate of Adam.

    Raises:
        ValueError: the joint is unknown.
    """

    def __init__(self, hidden: int, ticks: int, joint: str, lr: float) -> None:
        if joint not in JOINTS:
            raise ValueError(f"joint must be one of {', '.join(JOINTS)}, got {joint!r}")
        self.ticks, self.joint = ticks, joint
        self.fast = nn.LSTM(SYMBOLS, hidden)
        self.fast_readout = nn.Linear(hidden, 2)  # its own count, and alone the other one
        self.slow = nn.LSTM(hidden, hidden)
        self.slow_readout = nn.Linear(hidden, 1)
        gradient = Normalized(BasicSynthesizer(hidden, 1, hidden, context_dim=SYMBOLS))
        self.interface = BackwardInterface(gradient)
        parts = [self.fast, self.fast_readout]
        self._fast_optimizer = torch.optim.Adam([p for part in parts for p in part.parameters()], lr=lr)
        parts = [self.slow, self.slow_readout, self.interface]
        self._slow_optimizer = torch.optim.Adam([p for part in parts for p in part.parameters()], lr=lr)
        self._fast_state: Any = None
        self._slow_state: Any = None
        self._window: list[tuple[Tensor, Tensor]] = []

    def step(self, block: Block) -> dict[str, Tensor]:
        """One update of the fast network, and every K ticks one of the slow network.

        Returns the squared errors of this block's counts by network, those of the slow one when it has been updated.
        """
        self._fast_optimizer.zero_grad()
        with defer_backward():
            outputs, state = self.fast(F.one_hot(block.symbols, SYMBOLS).float(), self._fast_state)
            message = outputs[-1]  # [B, H]
            own, both = self.fast_readout(message).unbind(-1)
            loss = F.mse_loss(own, block.fast)
            if self.joint == "none":
                slow_loss = F.mse_loss(both, block.slow)
                backward(loss + slow_loss)
            else:
                backward(loss)
            if self.joint == "synthetic":
                with synthesizer_context(block.counts):
                    self.interface.backward(message)
        self._fast_optimizer.step()
        self._fast_state = tuple(leaf.detach() for leaf in state)
        found = {"fast": loss.detach()}
        if self.joint == "none":
            return {**found, "slow": slow_loss.detach()}
        with synthesizer_context(block.counts):  # what the synthesizer is trained with when the gradient arrives
            self._window.append((self.interface.make_trigger(message), block.slow))
        if len(self._window) == self.ticks:
            found["slow"] = self._update_slow()
        return found

    def _update_slow(self) -> Tensor:
        """The slow network's window of K ticks: its gradients at the messages train the synthesizer."""
        messages, targets = zip(*self._window, strict=True)
        self._window = []
        self._slow_optimizer.zero_grad()
        outputs, state = self.slow(torch.stack(messages), self._slow_state)
        loss = F.mse_loss(self.slow_readout(outputs).squeeze(-1), torch.stack(targets))
        loss.backward()
        self._slow_optimizer.step()
        self._slow_state = tuple(leaf.detach() for leaf in state)
        return loss.detach()
