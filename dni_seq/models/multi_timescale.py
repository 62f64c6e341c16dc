"""Two recurrent networks at two time scales: a fast network runs at every step, a slow one ticks every T steps.

Source: Jaderberg et al. 2017, arXiv 1608.05343, section 3.2. At each tick the slow network reads the fast network's last
output. The gradient of the slow network's loss with respect to that output is known only at the end of the slow network's
window of K ticks. The fast network is updated every T steps, so it uses a synthetic gradient instead. We differ in three
points. The task is another one. No message goes from the slow network to the fast network. The context of the synthesizer
is the symbol counts of the last T steps.

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
    """The T steps between two ticks, with the targets at their end.

    Attributes:
        symbols: int64 [T, B], uniformly random.
        fast: float32 [B], the number of `FAST_SYMBOL` in these T steps, divided by T, minus its expectation.
        slow: float32 [B], the number of `SLOW_SYMBOL` in the last K T steps, divided by T, minus its expectation.
        counts: float32 [B, S], the number of each symbol in these T steps, divided by T.
    """

    symbols: Tensor
    fast: Tensor
    slow: Tensor
    counts: Tensor


class Counting:
    """Generates random symbols for a counting task.

    The fast network must count one symbol over T steps, the slow network another symbol over K T steps.

    Args:
        steps: T, the number of steps in a tick.
        ticks: K, the number of ticks over which the slow network counts.
        lanes: B, the batch size.
        seed: seed of the symbols.
    """

    def __init__(self, steps: int, ticks: int, lanes: int, seed: int) -> None:
        self.steps, self.ticks, self.lanes = steps, ticks, lanes
        self._generator = torch.Generator().manual_seed(seed)
        self._past = [torch.full((lanes,), 1 / SYMBOLS)] * ticks

    def block(self) -> Block:
        """Returns the next T steps."""
        symbols = torch.randint(SYMBOLS, (self.steps, self.lanes), generator=self._generator)
        counts = F.one_hot(symbols, SYMBOLS).float().mean(0)
        self._past = [*self._past[1:], counts[:, SLOW_SYMBOL]]
        slow = torch.stack([each - 1 / SYMBOLS for each in self._past]).sum(0)
        return Block(symbols, counts[:, FAST_SYMBOL] - 1 / SYMBOLS, slow, counts)


class MultiTimescale:
    """Trains a fast and a slow LSTM on a counting task, with synthetic gradients from the slow one to the fast one.

    Args:
        hidden: H, the number of hidden units of each network.
        ticks: K, the number of ticks in a window of the slow network.
        joint: the connection of the networks. "synthetic": the fast network sends messages and gets synthetic gradients.
            "message": the fast network sends messages and gets no gradient. "none": only the fast network is trained, on
            both counts, by truncated BPTT over T steps.
        lr: learning rate of Adam.

    Attributes:
        fast, fast_readout: the fast nn.LSTM, and its linear readout of both counts.
        slow, slow_readout: the slow nn.LSTM, and the linear readout of the slow network's count.
        interface: the `BackwardInterface` that predicts the slow network's gradient.

    Raises:
        ValueError: `joint` is unknown.
    """

    def __init__(self, hidden: int, ticks: int, joint: str, lr: float) -> None:
        if joint not in JOINTS:
            raise ValueError(f"joint must be one of {', '.join(JOINTS)}, got {joint!r}")
        self.ticks, self.joint = ticks, joint
        self.fast = nn.LSTM(SYMBOLS, hidden)
        self.fast_readout = nn.Linear(hidden, 2)  # the fast count; with joint "none" also the slow count
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
        """Updates the fast network, and every K ticks the slow network.

        Returns:
            Mean squared errors, scalars without a graph. "fast" is that of this block. "slow" is the mean of the last K
            blocks, and is missing if the slow network was not updated. With joint "none" it is always that of this block.
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
        with synthesizer_context(block.counts):  # the synthesizer is trained with this context when the gradient arrives
            self._window.append((self.interface.make_trigger(message), block.slow))
        if len(self._window) == self.ticks:
            found["slow"] = self._update_slow()
        return found

    def _update_slow(self) -> Tensor:
        """Updates the slow network on its window of K ticks; its gradients at the messages train the synthesizer."""
        messages, targets = zip(*self._window, strict=True)
        self._window = []
        self._slow_optimizer.zero_grad()
        outputs, state = self.slow(torch.stack(messages), self._slow_state)
        loss = F.mse_loss(self.slow_readout(outputs).squeeze(-1), torch.stack(targets))
        loss.backward()
        self._slow_optimizer.step()
        self._slow_state = tuple(leaf.detach() for leaf in state)
        return loss.detach()
