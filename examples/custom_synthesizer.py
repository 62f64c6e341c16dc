"""Write your own synthesizer: a module with forward(trigger, context) that returns a message shaped like the trigger.

This one reads what comes next from its far end back to the state, as the gradient itself travels. Against it stands
`BasicSynthesizer`, which sees the state alone. Both predict the gradient of the window to come for an LSTM that learns the
text of Python's documentation by characters; every 10 windows messages are compared with exact gradients. A cosine of 1
would be the exact direction; of 0, a guess.
"""

from __future__ import annotations

from pydoc_data.topics import topics

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import dni_seq as dni

WINDOW, LANES, UNITS = 4, 32, 64


class ReadsBack(nn.Module):
    """From (h, c), each [1, B, UNITS], and the next WINDOW steps to a message of the same shapes."""

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
    """Characters to logits of the next one."""

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
    """[T, B], nats."""
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view_as(targets)


def train(text: Tensor, vocabulary: int, network: nn.Module, windows: int) -> float:
    """Train both the model and the synthesizer; mean cosine of the last half's comparisons."""
    # Gradients are small numbers, and a cell's gradient fades where it is saturated: two wrappers see to that.
    synthesizer = dni.Normalized(dni.GatedCells(network, dni.LSTM_CELLS))
    model = Model(vocabulary)
    config = dni.SyntheticGradientConfig(synthetic_scale="auto", discount=0.0, fidelity_every=10, replay_windows=1)
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    trainer = dni.SequenceTrainer(model, optimizer, losses, synthesizer=synthesizer, config=config, clip=1.0)
    pieces = [dni.Window(text[i : i + WINDOW], text[i + 1 : i + 1 + WINDOW]) for i in range(0, windows * WINDOW, WINDOW)]
    cosines = []
    for window in dni.with_lookahead(pieces, WINDOW):
        context = window.lookahead if isinstance(network, ReadsBack) else None
        result = trainer.step(window.inputs, window.targets, lookahead=context)
        if result.synthetic.fidelity is not None:
            cosines.append(float(result.synthetic.fidelity.horizons[0].cosine))
    return sum(cosines[len(cosines) // 2 :]) / len(cosines[len(cosines) // 2 :])


def main(windows: int = 400) -> None:
    torch.set_num_threads(1)  # tensors are small: a second thread would only wait
    characters = sorted(set("".join(topics.values())))
    ids = torch.tensor([characters.index(c) for c in "".join(topics.values())[: LANES * (windows * WINDOW + 1)]])
    text = ids.view(LANES, -1).t()  # [steps, B]
    vocabulary = len(characters)
    for name, network in (
        ("the state alone", dni.BasicSynthesizer(2 * UNITS, n_hidden=1)),
        ("reads back", ReadsBack(vocabulary)),
    ):
        torch.manual_seed(0)
        print(f"{name}: cosine with the exact gradient of the next window {train(text, vocabulary, network, windows):.2f}")


if __name__ == "__main__":
    main()
