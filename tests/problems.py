"""Small named problems that tests share. All in float64, all with losses whose gradients are far from zero."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import dni_seq as dni

VOCABULARY = 7


class StackedLSTM(nn.Module):
    """A two-layer LSTM over tokens; state (h, c), each [2, B, 5]."""

    cells = dni.LSTM_CELLS
    state_batch_dim = 1

    def __init__(self, layers: int = 2, hidden: int = 5) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, 4)
        self.rnn = nn.LSTM(4, hidden, layers)
        self.readout = nn.Linear(hidden, VOCABULARY)
        self.layers, self.hidden = layers, hidden

    def initial_state(self, lanes: int) -> tuple[Tensor, Tensor]:
        zeros = self.readout.weight.new_zeros(self.layers, lanes, self.hidden)
        return zeros, zeros.clone()

    def forward(self, tokens: Tensor, state: tuple[Tensor, Tensor] | None) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        outputs, state = self.rnn(self.embedding(tokens), state)
        return self.readout(outputs), state


class PlainGRU(nn.Module):
    """A GRU whose state is one tensor [1, B, 5], without `initial_state`."""

    cells = False
    state_batch_dim = 1

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, 4)
        self.rnn = nn.GRU(4, 5)
        self.readout = nn.Linear(5, VOCABULARY)

    def forward(self, tokens: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor]:
        outputs, state = self.rnn(self.embedding(tokens), state)
        return self.readout(outputs), state


class OddNest(nn.Module):
    """Two cells, the state a dict of a tuple, a list and a step counter, lanes along dimension 0."""

    cells = {"lstm": (False, True), "plain": [False], "steps": False}
    state_batch_dim = {"lstm": (0, 0), "plain": [0], "steps": 0}

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, 4)
        self.lstm = nn.LSTMCell(4, 5)
        self.plain = nn.RNNCell(5, 3)
        self.readout = nn.Linear(3, VOCABULARY)

    def initial_state(self, lanes: int) -> dict:
        weight = self.readout.weight
        zeros = weight.new_zeros(lanes, 5)
        return {
            "lstm": (zeros, zeros.clone()),
            "plain": [weight.new_zeros(lanes, 3)],
            "steps": torch.zeros(lanes, dtype=torch.int64),
        }

    def forward(self, tokens: Tensor, state: dict) -> tuple[Tensor, dict]:
        (h, c), (plain,), steps = state["lstm"], state["plain"], state["steps"]
        outputs = []
        for x in self.embedding(tokens):
            h, c = self.lstm(x, (h, c))
            plain = self.plain(h, plain)
            outputs.append(self.readout(plain))
            steps = steps + 1
        return torch.stack(outputs), {"lstm": (h, c), "plain": [plain], "steps": steps}


MODELS = {"lstm": StackedLSTM, "gru": PlainGRU, "odd-nest": OddNest}


def make_model(name: str, seed: int = 0) -> nn.Module:
    """A problem's model in float64, its weights three times the usual so that states and gradients are large."""
    torch.manual_seed(seed)
    model = MODELS[name]().double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter *= 3
    return model


def tokens(steps: int, lanes: int, seed: int = 1) -> Tensor:
    """[steps + 1, lanes] random tokens."""
    return torch.randint(VOCABULARY, (steps + 1, lanes), generator=torch.Generator().manual_seed(seed))


def cut(text: Tensor, length: int, ends: dict[int, list[int]] | None = None) -> Iterator[dni.Window]:
    """`text` in windows of `length`, the last one ragged; `ends` names the lanes that end with a window."""
    lanes = text.shape[1]
    for k, i in enumerate(range(0, len(text) - 1, length)):
        inputs, targets = text[:-1][i : i + length], text[1:][i : i + length]
        marks = torch.zeros(lanes, dtype=torch.bool)
        marks[(ends or {}).get(k, [])] = True
        yield dni.Window(inputs, targets, ends=marks)


def summed(outputs: Tensor, targets: Tensor) -> Tensor:
    """Cross entropy summed over steps and lanes, nats."""
    return F.cross_entropy(outputs.flatten(0, 1), targets.flatten(), reduction="sum")


def mean(outputs: Tensor, targets: Tensor) -> Tensor:
    """Cross entropy a step, nats."""
    return F.cross_entropy(outputs.flatten(0, 1), targets.flatten())


def unreduced(outputs: Tensor, targets: Tensor) -> Tensor:
    """[T, B] cross entropies, nats."""
    return F.cross_entropy(outputs.flatten(0, 1), targets.flatten(), reduction="none").view_as(targets)


def frozen(model: nn.Module) -> torch.optim.Optimizer:
    """An optimizer that moves nothing, so that gradients can be compared window by window."""
    return torch.optim.SGD(model.parameters(), lr=0.0)


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """The parameters' gradients by name."""
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
