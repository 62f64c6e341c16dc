"""Code written from the README of dni-pytorch alone, line for line in its use of the API, but for its two slips.

The slips: a network that defines `bidirectional_interface` and calls `backward_interface`, and `torch.nn.module`. Around the
lines quoted there stands what the README leaves out with `# ...`.
"""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

import dni_seq as dni

input_dim, activation_dim, context_dim, hidden_dim = 6, 8, 3, 5


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def digits(count=16):
    """Separable classes, so that gradients are large and training lowers the loss."""
    y = torch.arange(count) % context_dim
    return torch.randn(count, input_dim) * 0.1 + F.one_hot(y, input_dim), y


def train(model, loss_of, steps=100):
    """First and last loss; every parameter, those of the synthesizers too, must have moved."""
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-2)
    before = [parameter.clone() for parameter in model.parameters()]
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = loss_of(model)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    for (name, after), start in zip(model.named_parameters(), before, strict=True):
        assert not torch.equal(after, start), name
    return losses[0], losses[-1]


def test_synthetic_gradient_for_feed_forward_networks():
    class Network(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.part_a = torch.nn.Linear(input_dim, activation_dim)
            self.part_b = torch.nn.Linear(activation_dim, context_dim)
            self.backward_interface = dni.BackwardInterface(dni.BasicSynthesizer(output_dim=activation_dim, n_hidden=1))

        def forward(self, x):
            x = F.relu(self.part_a(x))
            x = self.backward_interface(x)
            return self.part_b(x)

    x, y = digits()
    first, last = train(Network(), lambda model: F.cross_entropy(model(x), y))
    assert last < 0.5 * first


def test_context():
    class Network(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.part_a = torch.nn.Linear(input_dim, activation_dim)
            self.part_b = torch.nn.Linear(activation_dim, context_dim)
            self.backward_interface = dni.BackwardInterface(
                dni.BasicSynthesizer(output_dim=activation_dim, n_hidden=1, context_dim=context_dim)
            )

        def forward(self, x, y):
            x = F.relu(self.part_a(x))
            with dni.synthesizer_context(y):
                x = self.backward_interface(x)
            return self.part_b(x)

    x, y = digits()
    one_hot = F.one_hot(y, context_dim).float()
    first, last = train(Network(), lambda model: F.cross_entropy(model(x, one_hot), y))
    assert last < 0.5 * first


def test_complete_unlock_for_feed_forward_networks():
    class Network(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.part_a = torch.nn.Linear(input_dim, activation_dim)
            self.part_b = torch.nn.Linear(activation_dim, context_dim)
            self.bidirectional_interface = dni.BidirectionalInterface(
                dni.BasicSynthesizer(output_dim=activation_dim, n_hidden=1, trigger_dim=input_dim),
                dni.BasicSynthesizer(output_dim=activation_dim, n_hidden=1),
            )

        def forward(self, input):
            x = input
            x = F.relu(self.part_a(x))
            x = self.bidirectional_interface(x, input)
            return self.part_b(x)

    x, y = digits()
    model = Network()
    first, last = train(model, lambda model: F.cross_entropy(model(x), y))
    assert last < 0.5 * first
    model.eval()
    assert F.cross_entropy(model(x), y) < 0.5 * first  # with the real activation


class CustomSynthesizer(torch.nn.Module):
    """A CNN, as the paper uses for a CNN."""

    def __init__(self):
        super().__init__()
        self.contexts = []
        self.layers = torch.nn.Sequential(
            torch.nn.Conv2d(4, 4, 3, padding=1), torch.nn.ReLU(), torch.nn.Conv2d(4, 4, 3, padding=1)
        )

    def forward(self, trigger, context):
        self.contexts.append(context)
        message = self.layers(trigger)
        return message  # noqa: RET504 - as in the README


@pytest.mark.parametrize("context", [None, "whatever is passed"])
def test_custom_synthesizer(context):
    class Network(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.part_a = torch.nn.Conv2d(1, 4, 3, padding=1)
            self.part_b = torch.nn.Linear(4 * 16, 2)
            self.backward_interface = dni.BackwardInterface(CustomSynthesizer())

        def forward(self, x):
            x = F.relu(self.part_a(x))
            if context is None:
                x = self.backward_interface(x)
            else:
                with dni.synthesizer_context(context):
                    x = self.backward_interface(x)
            return self.part_b(x.flatten(1))

    x, y = torch.randn(8, 1, 4, 4), torch.arange(8) % 2
    x[y == 1] += 1
    model = Network()
    first, last = train(model, lambda model: F.cross_entropy(model(x), y))
    assert last < 0.5 * first
    assert set(model.backward_interface.synthesizer.contexts) == {context}


def test_synthetic_gradient_for_recurrent_networks():
    class Network(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.backward_interface = dni.BackwardInterface(dni.BasicSynthesizer(output_dim=hidden_dim, n_hidden=1))
            self.rnn = torch.nn.GRU(context_dim, hidden_dim)
            self.readout = torch.nn.Linear(hidden_dim, context_dim)

        def forward(self, input, hidden):
            hidden = self.backward_interface.make_trigger(hidden)
            (output, hidden) = self.rnn(input, hidden)
            self.backward_interface.backward(hidden)
            return self.readout(output), hidden

    model = Network()
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-2)
    criterion = torch.nn.CrossEntropyLoss()
    tokens = torch.arange(4 * 100 + 1) % context_dim
    text = torch.stack([tokens, tokens.roll(1)], dim=1)  # [steps, lanes]
    before = [parameter.clone() for parameter in model.parameters()]
    hidden, losses = torch.zeros(1, 2, hidden_dim), []
    for i in range(0, len(text) - 1, 4):
        input, target = F.one_hot(text[i : i + 4], context_dim).float(), text[i + 1 : i + 5]
        optimizer.zero_grad()
        with dni.defer_backward():
            (output, hidden) = model(input, hidden)
            loss = criterion(output.flatten(0, 1), target.flatten())
            dni.backward(loss)
        optimizer.step()
        losses.append(loss.item())
    for (name, after), start in zip(model.named_parameters(), before, strict=True):
        assert not torch.equal(after, start), name
    assert losses[-1] < 0.5 * losses[0]


def test_distributed_training_with_a_complete_unlock():
    class PartA(torch.nn.Module):
        def __init__(self, bidirectional_interface):
            super().__init__()
            self.layer = torch.nn.Linear(input_dim, activation_dim)
            self.bidirectional_interface = bidirectional_interface

        def forward(self, input):
            x = input
            x = F.relu(self.layer(x))
            self.bidirectional_interface.send(x, input)

    class PartB(torch.nn.Module):
        def __init__(self, bidirectional_interface):
            super().__init__()
            self.layer = torch.nn.Linear(activation_dim, context_dim)
            self.bidirectional_interface = bidirectional_interface

        def forward(self, input):
            x = self.bidirectional_interface.receive(input)
            return self.layer(x)

    def interface():
        return dni.BidirectionalInterface(
            dni.BasicSynthesizer(output_dim=activation_dim, n_hidden=1, trigger_dim=input_dim),
            dni.BasicSynthesizer(output_dim=activation_dim, n_hidden=1),
        )

    def trained(copy, sender):
        return (copy.forward_interface if sender else copy.backward_interface).synthesizer.state_dict()

    a, b = PartA(interface()), PartB(interface())
    optimizers = [torch.optim.Adam(part.parameters(), lr=1e-2) for part in (a, b)]
    x, y = digits()
    losses, before = [], a.layer.weight.clone()
    for _ in range(100):
        for optimizer in optimizers:
            optimizer.zero_grad()
        a(x)
        loss = F.cross_entropy(b(x), y)
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
        # "parameters are synchronized once in a while": each copy gets what the other end has trained
        b.bidirectional_interface.forward_interface.synthesizer.load_state_dict(trained(a.bidirectional_interface, True))
        a.bidirectional_interface.backward_interface.synthesizer.load_state_dict(trained(b.bidirectional_interface, False))
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    assert not torch.equal(a.layer.weight, before), "part A has learned from synthetic gradients alone"


@pytest.mark.parametrize("name", ["Backward", "Forward", "Bidirectional"])
def test_terminology(name):
    """Every interface has `send` and `receive`; what was sent for a trigger is what is received for it in the end."""
    trigger, message = torch.randn(4, activation_dim), torch.randn(4, activation_dim)
    synthesizer = dni.BasicSynthesizer(activation_dim, n_hidden=1, hidden_dim=32)
    if name == "Bidirectional":
        interface = dni.BidirectionalInterface(synthesizer, dni.BasicSynthesizer(activation_dim))
        message.requires_grad_()  # part A's activation, which learns
    else:
        interface = getattr(dni, name + "Interface")(synthesizer)
    optimizer = torch.optim.Adam(interface.parameters(), lr=1e-2)
    for _ in range(300):
        optimizer.zero_grad()
        interface.send(message, trigger)
        optimizer.step()
    torch.testing.assert_close(interface.receive(trigger), message, atol=0.05, rtol=0)
