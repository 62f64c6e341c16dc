"""Write your own synthesizer: a module with forward(trigger, context) that returns a message shaped like the trigger.

The synthesizer of this program reads the next window backwards, from its last step to its first, as the gradient flows. It
is compared with `BasicSynthesizer`, which sees only the state, and with truncated BPTT, which has no synthesizer. Both
synthesizers predict the gradient of the next window's loss for an LSTM that learns the text of Python's documentation by
characters. Every 10 windows, messages are compared with exact gradients. A cosine of 1 means that a message has the exact
direction, a cosine of 0 that its direction is no better than a random one. In so short a run all three methods
have about the same loss.
"""

from __future__ import annotations

from pydoc_data.topics import topics
from statistics import mean

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import dni_seq as dni

WINDOW, LANES, UNITS = 4, 32, 64


class ReadsBack(nn.Module):
    """Maps (h, c), each [1, B, UNITS], and the next WINDOW steps to a message of the shapes of (h, c)."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.inputs, self.targets = nn.Embedding(vocabulary, 16), nn.Embedding(vocabulary, 16)
        self.reader = nn.GRU(32, UNITS)
        self.hidden = nn.Linear(3 * UNITS, 2 * UNITS)
        self.message = nn.Linear(2 * UNITS, 2 * UNITS)
        nn.init.zeros_(self.message.weight)  # the first messages are zeros: no synthetic gradient
        nn.init.zeros_(self.message.bias)

    def forward(self, trigger: tuple[Tensor, Tensor], context: dni.Lookahead) -> tuple[Tensor, ...]:
        steps = torch.cat([self.inputs(context.inputs), self.targets(context.targets)], dim=-1)  # [m, B, 32]
        _, read = self.reader(steps.flip(0))  # [1, B, UNITS]
        return self.message(F.gelu(self.hidden(torch.cat([*trigger, read], dim=-1)))).chunk(2, dim=-1)


class Model(nn.Module):
    """Maps characters to logits of the next character."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.embedding, self.rnn = nn.Embedding(vocabulary, 32), nn.LSTM(32, UNITS)
        self.readout = nn.Linear(UNITS, vocabulary)

    def forward(self, tokens: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        outputs, state = self.rnn(self.embedding(tokens), state)
        return self.readout(outputs), state

    def initial_state(self, lanes: int) -> tuple[Tensor, Tensor]:
        return torch.zeros(1, lanes, UNITS), torch.zeros(1, lanes, UNITS)


def losses(logits: Tensor, targets: Tensor) -> Tensor:
    """Returns the cross-entropy of each step and lane, [T, B], in nats."""
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view_as(targets)


def train(text: Tensor, vocabulary: int, network: nn.Module | None, windows: int) -> tuple[float, float]:
    """Trains a model, with a synthesizer if given; returns the last fifth's mean loss and the last half's mean cosine."""
    model = Model(vocabulary)
    # `Normalized` scales messages to the size of gradients. `GatedCells` shrinks the message for saturated cells.
    synthesizer = None if network is None else dni.Normalized(dni.GatedCells(network, dni.LSTM_CELLS))
    config = dni.SyntheticGradientConfig(synthetic_scale="auto", discount=0.0, fidelity_every=10, replay_windows=1)
    options = {} if synthesizer is None else {"synthesizer": synthesizer, "config": config}
    trainer = dni.SequenceTrainer(model, torch.optim.Adam(model.parameters(), lr=2e-3), losses, clip=1.0, **options)
    pieces = [dni.Window(text[i : i + WINDOW], text[i + 1 : i + 1 + WINDOW]) for i in range(0, windows * WINDOW, WINDOW)]
    history, cosines = [], []
    for window in dni.with_lookahead(pieces, WINDOW):
        context = window.lookahead if isinstance(network, ReadsBack) else None
        result = trainer.step(window.inputs, window.targets, lookahead=context)
        history.append(float(result.loss))
        if result.synthetic is not None and result.synthetic.fidelity is not None:
            cosines.append(float(result.synthetic.fidelity.horizons[0].cosine))
    return mean(history[-windows // 5 :]), mean(cosines[len(cosines) // 2 :] or [0.0])


def main(windows: int = 400) -> None:
    torch.set_num_threads(1)  # tensors are small: a second thread would only wait
    characters = sorted(set("".join(topics.values())))
    ids = torch.tensor([characters.index(c) for c in "".join(topics.values())[: LANES * (windows * WINDOW + 1)]])
    text = ids.view(LANES, -1).t()  # [steps, B]
    vocabulary = len(characters)
    torch.manual_seed(0)
    print(f"truncated BPTT: {train(text, vocabulary, None, windows)[0]:.2f} nats a character")
    for name, network in (
        ("the state alone", dni.BasicSynthesizer(2 * UNITS, n_hidden=1)),
        ("reads back", ReadsBack(vocabulary)),
    ):
        torch.manual_seed(0)
        loss, cosine = train(text, vocabulary, network, windows)
        print(f"{name}: {loss:.2f} nats a character, cosine with the exact gradient of the next window {cosine:.2f}")


if __name__ == "__main__":
    main()
