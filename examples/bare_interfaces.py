"""Use the interfaces without a trainer, in a training loop of your own.

First in time: an LSTM reads the text of Python's documentation in windows of four characters, and a synthetic gradient is
injected at the end of each window. A factor of 0 injects nothing, which is truncated BPTT. The synthesizer sees only the
state, from which the gradient of later windows can hardly be predicted. Here the loss is slightly larger than without
injection. `custom_synthesizer.py` has a synthesizer that sees more.

Then in depth: a network consists of two halves, and the first half gets its gradient before the second half has run.
"""

from __future__ import annotations

from pydoc_data.topics import topics

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import dni_seq as dni

WINDOW, LANES, UNITS = 4, 32, 64


def recurrent(text: Tensor, vocabulary: int, factor: float) -> float:
    """Trains on text [steps, LANES]; returns the mean loss over its last tenth, in nats per character."""
    torch.manual_seed(0)
    embedding, rnn, readout = nn.Embedding(vocabulary, 32), nn.LSTM(32, UNITS), nn.Linear(UNITS, vocabulary)
    interface = dni.BackwardInterface(dni.Normalized(dni.BasicSynthesizer(2 * UNITS, n_hidden=1)))
    optimizer = torch.optim.Adam(nn.ModuleList([embedding, rnn, readout, interface]).parameters(), lr=3e-3)
    state = (torch.zeros(1, LANES, UNITS), torch.zeros(1, LANES, UNITS))
    losses = []
    for i in range(0, len(text) - WINDOW, WINDOW):
        inputs, targets = text[i : i + WINDOW], text[i + 1 : i + 1 + WINDOW]
        optimizer.zero_grad()
        with dni.defer_backward():  # a single backward pass, at the end of the block
            state = interface.make_trigger(state)  # detached; the gradient that arrives here is the synthesizer's target
            outputs, state = rnn(embedding(inputs), state)
            interface.backward(state, factor)  # injects a message for h and c, the predicted gradient of later windows
            loss = F.cross_entropy(readout(outputs).flatten(0, 1), targets.flatten())
            dni.backward(loss)
        optimizer.step()
        losses.append(float(loss.detach()))
    late = losses[-len(losses) // 10 :]
    return sum(late) / len(late)


def decoupled(synthetic: bool, updates: int) -> float:
    """Trains a network of two halves; returns the share of fresh points for which it finds the right one of three rings."""
    torch.manual_seed(0)
    first, second = nn.Sequential(nn.Linear(2, 64), nn.ReLU()), nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 3))
    interface = dni.BackwardInterface(dni.Normalized(dni.BasicSynthesizer(64, n_hidden=1, context_dim=3)))
    optimizer = torch.optim.Adam(nn.ModuleList([first, second, interface]).parameters(), lr=3e-3)
    for _ in range(updates):
        points, ring = rings(200)
        optimizer.zero_grad()
        with dni.synthesizer_context(F.one_hot(ring, 3).float()):  # the synthesizer knows the label, the network does not
            # The interface backpropagates a synthetic gradient at once, and returns a detached copy.
            middle = interface(first(points)) if synthetic else first(points)
        F.cross_entropy(second(middle), ring).backward()
        optimizer.step()
    points, ring = rings(2000)
    return float((second(first(points)).argmax(-1) == ring).float().mean())


def rings(number: int) -> tuple[Tensor, Tensor]:
    """Returns points [number, 2] on three rings around the origin, and the ring of each point, [number]."""
    ring = torch.randint(3, (number,))
    radius = 1 + ring + 0.2 * torch.randn(number)
    angle = 6.2832 * torch.rand(number)
    return torch.stack([radius * angle.cos(), radius * angle.sin()], dim=-1), ring


def main(windows: int = 600, updates: int = 400) -> None:
    torch.set_num_threads(1)  # tensors are small: a second thread would only wait
    characters = "".join(topics.values())[: LANES * (windows * WINDOW + 1)]
    alphabet = sorted(set(characters))
    text = torch.tensor([alphabet.index(c) for c in characters]).view(LANES, -1).t()
    for factor in (0.0, 0.1):
        print(f"in time, factor {factor}: {recurrent(text, len(alphabet), factor):.3f} nats a character")
    for synthetic, name in ((False, "backpropagation"), (True, "a synthetic gradient between two halves")):
        print(f"in depth, {name}: {decoupled(synthetic, updates):.1%} right")


if __name__ == "__main__":
    main()
