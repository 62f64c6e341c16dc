"""Networks in two parts, A and B, with an interface between them: a perceptron on digits, a stacked LSTM on text.

Legend: N = images, T = window length, B = lanes, H = hidden units, V = vocabulary size, E = size of an embedding.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dni_seq.interfaces.forward import BidirectionalInterface
from dni_seq.models.feedforward import CLASSES, SIDE, WithoutContext
from dni_seq.synthesizers.mlp import BasicSynthesizer, zero_
from dni_seq.synthesizers.normalization import Normalized

SEEN = 8
"""Number of recent tokens, the current one included, that a language model's synthetic input depends on."""


class TwoPartNetwork(NamedTuple):
    """A network in two parts, A and B, with a bidirectional interface between them.

    Attributes:
        a: part A, `a(inputs, state) -> (message, state)`. The state is None at first, and always None for a feed-forward
            part.
        b: part B, `b(message, state) -> (logits, state)`. Its state is None in the same cases as the state of part A.
        interface: the interface between the parts; the trigger of its synthetic message is the input of part A.
    """

    a: nn.Module
    b: nn.Module
    interface: BidirectionalInterface


class Stateless(nn.Module):
    """A feed-forward part with the interface of a recurrent one: it takes and returns a state, which is None."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.Sequential(*layers)

    def forward(self, inputs: Tensor, state: None = None) -> tuple[Tensor, None]:
        """Returns the output of the layers, and None as the state."""
        return self.layers(inputs), None


class Recurrent(nn.Module):
    """An LSTM with a module before it and a module after it."""

    def __init__(self, before: nn.Module, rnn: nn.LSTM, behind: nn.Module) -> None:
        super().__init__()
        self.before, self.rnn, self.behind = before, rnn, behind

    def forward(self, inputs: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        """Runs T steps from `state` (None for zeros); returns the output, and the state detached from the graph."""
        outputs, state = self.rnn(self.before(inputs), state)
        return self.behind(outputs), tuple(leaf.detach() for leaf in state)


class RecentTokens(nn.Module):
    """Predicts an activation [T · B, H] from tokens [T, B]; each step sees the last `SEEN` tokens of its window."""

    def __init__(self, vocabulary_size: int, hidden: int, embed: int = 32) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary_size, embed)
        self.recent = nn.Conv1d(embed, hidden, SEEN)
        self.output = nn.Linear(hidden, hidden)
        zero_(self.output)

    def forward(self, tokens: Tensor, context: Any = None) -> Tensor:
        """Returns the message for `tokens`; ignores the context, because it holds the targets."""
        steps = self.embedding(tokens).permute(1, 2, 0)  # [B, E, T]
        recent = F.relu(self.recent(F.pad(steps, (SEEN - 1, 0))))
        return self.output(recent.permute(2, 0, 1).flatten(0, 1))


class TargetGradient(nn.Module):
    """Predicts the gradient with respect to an activation [T · B, H]; its context is the labels [T, B] of these steps."""

    def __init__(self, vocabulary_size: int, hidden: int, embed: int = 32) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary_size, embed)
        self.hidden = nn.Linear(hidden + embed, hidden)
        self.output = nn.Linear(hidden, hidden)
        zero_(self.output)

    def forward(self, activation: Tensor, targets: Tensor) -> Tensor:
        """Returns the message, which has the shape of `activation`."""
        seen = torch.cat([activation, self.embedding(targets.flatten())], dim=-1)
        return self.output(F.relu(self.hidden(seen)))


def two_part_digits(hidden: int) -> TwoPartNetwork:
    """Returns a perceptron for images [N, 784] with a hidden layer in each part; the context is the one-hot label."""
    pixels = SIDE * SIDE
    synthetic_input = WithoutContext(BasicSynthesizer(hidden, 1, hidden, trigger_dim=pixels))
    gradient = Normalized(BasicSynthesizer(hidden, 1, hidden, context_dim=CLASSES))
    return TwoPartNetwork(
        Stateless(nn.Linear(pixels, hidden), nn.ReLU()),
        Stateless(nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, CLASSES)),
        BidirectionalInterface(synthetic_input, gradient),
    )


def two_part_language_model(vocabulary_size: int, hidden: int, lanes: int) -> TwoPartNetwork:
    """Returns a stacked LSTM for tokens [T, B]; the context is the targets [T, B].

    Part A is the embedding and the first LSTM layer, part B the second LSTM layer and the projection. The message is
    flattened from [T, B, H] to [T · B, H]. `Normalized` keeps one statistic for each index of the first dimension of a
    three-dimensional tensor, here for each of T steps, but the last window of an epoch has fewer steps.
    """
    gradient = Normalized(TargetGradient(vocabulary_size, hidden))
    return TwoPartNetwork(
        Recurrent(nn.Embedding(vocabulary_size, hidden), nn.LSTM(hidden, hidden), nn.Flatten(0, 1)),
        Recurrent(nn.Unflatten(0, (-1, lanes)), nn.LSTM(hidden, hidden), nn.Linear(hidden, vocabulary_size)),
        BidirectionalInterface(RecentTokens(vocabulary_size, hidden), gradient),
    )
