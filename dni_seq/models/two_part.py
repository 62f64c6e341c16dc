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
"""Tokens, the present one included, from which the synthetic input of a language model's second layer is made."""


class TwoPartNetwork(NamedTuple):
    """A network in two parts.

    Attributes:
        a: from inputs and a state (None where the part has none, or at first) to the message and the state.
        b: from the message and a state to logits and the state.
        interface: between them; the trigger of the synthetic message is what part A reads.
    """

    a: nn.Module
    b: nn.Module
    interface: BidirectionalInterface


class Stateless(nn.Module):
    """A feed-forward part in the place of a recurrent one."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.Sequential(*layers)

    def forward(self, inputs: Tensor, state: None = None) -> tuple[Tensor, None]:
        """The layers' output, and no state."""
        return self.layers(inputs), None


class Recurrent(nn.Module):
    """An LSTM layer with what is before and behind it."""

    def __init__(self, before: nn.Module, rnn: nn.LSTM, behind: nn.Module) -> None:
        super().__init__()
        self.before, self.rnn, self.behind = before, rnn, behind

    def forward(self, inputs: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        """Run T steps from `state`, None for zeros; the state is cut from the graph."""
        outputs, state = self.rnn(self.before(inputs), state)
        return self.behind(outputs), tuple(leaf.detach() for leaf in state)


class RecentTokens(nn.Module):
    """A synthetic activation [T B, H] from tokens [T, B]: each step sees the last `SEEN` tokens of its window."""

    def __init__(self, vocabulary_size: int, hidden: int, embed: int = 32) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary_size, embed)
        self.recent = nn.Conv1d(embed, hidden, SEEN)
        self.output = nn.Linear(hidden, hidden)
        zero_(self.output)

    def forward(self, tokens: Tensor, context: Any = None) -> Tensor:
        """The message; the context, which holds the targets, must not be seen here."""
        steps = self.embedding(tokens).permute(1, 2, 0)  # [B, E, T]
        recent = F.relu(self.recent(F.pad(steps, (SEEN - 1, 0))))
        return self.output(recent.permute(2, 0, 1).flatten(0, 1))


class TargetGradient(nn.Module):
    """A synthetic gradient for an activation [T B, H], given the targets [T, B] of its steps as the context."""

    def __init__(self, vocabulary_size: int, hidden: int, embed: int = 32) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary_size, embed)
        self.hidden = nn.Linear(hidden + embed, hidden)
        self.output = nn.Linear(hidden, hidden)
        zero_(self.output)

    def forward(self, activation: Tensor, targets: Tensor) -> Tensor:
        """The message, of the activation's shape."""
        seen = torch.cat([activation, self.embedding(targets.flatten())], dim=-1)
        return self.output(F.relu(self.hidden(seen)))


def two_part_digits(hidden: int) -> TwoPartNetwork:
    """A perceptron for images [N, 784]: a hidden layer in each part; the context is the label, one-hot."""
    pixels = SIDE * SIDE
    synthetic_input = WithoutContext(BasicSynthesizer(hidden, 1, hidden, trigger_dim=pixels))
    gradient = Normalized(BasicSynthesizer(hidden, 1, hidden, context_dim=CLASSES))
    return TwoPartNetwork(
        Stateless(nn.Linear(pixels, hidden), nn.ReLU()),
        Stateless(nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, CLASSES)),
        BidirectionalInterface(synthetic_input, gradient),
    )


def two_part_language_model(vocabulary_size: int, hidden: int, lanes: int) -> TwoPartNetwork:
    """A stacked LSTM for tokens [T, B]: embedding and first layer, second layer and projection; the context is targets.

    The message is [T B, H]: of a tensor of three dimensions `Normalized` would take the first for layers, and the last
    window of an epoch has fewer steps.
    """
    gradient = Normalized(TargetGradient(vocabulary_size, hidden))
    return TwoPartNetwork(
        Recurrent(nn.Embedding(vocabulary_size, hidden), nn.LSTM(hidden, hidden), nn.Flatten(0, 1)),
        Recurrent(nn.Unflatten(0, (-1, lanes)), nn.LSTM(hidden, hidden), nn.Linear(hidden, vocabulary_size)),
        BidirectionalInterface(RecentTokens(vocabulary_size, hidden), gradient),
    )
