"""The interfaces: identity 9, one scale for every regression, the seed's defects, bad input, and mixed use."""

from __future__ import annotations

import gc
import threading
import weakref
from contextlib import nullcontext

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

import dni_seq as dni
from dni_seq.core.deferred_backward import current_scope
from dni_seq.interfaces.context import current_context

# Sums of products in another order, of gradients of size 1: a hundred times float64's epsilon.
CLOSE = {"rtol": 1e-10, "atol": 1e-12}

WIDTH, CLASSES, BATCH = 5, 3, 4


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def batch():
    return torch.randn(BATCH, WIDTH, dtype=torch.float64), torch.arange(BATCH) % CLASSES


def layers(count):
    """Tanh layers with weights large enough that gradients differ from example to example, and a readout."""
    parts = [nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh()) for _ in range(count)]
    return nn.ModuleList([*parts, nn.Linear(WIDTH, CLASSES)]).double()


class Oracle(nn.Module):
    """The exact gradient of the loss behind its place; the context holds the labels. It has nothing to train."""

    def __init__(self, behind):
        super().__init__()
        self.call = lambda x: nn.Sequential(*behind)(x)  # held, not registered

    def forward(self, trigger, context):
        with torch.enable_grad():
            x = trigger.detach().requires_grad_()
            return torch.autograd.grad(F.cross_entropy(self.call(x), context), x)[0]


def synthesizer(random=True, **settings):
    made = dni.BasicSynthesizer(WIDTH, **settings).double()
    if random:  # messages that are not zero, so that a leak or a wrong scale shows
        for parameter in made.parameters():
            nn.init.normal_(parameter)
    return made


def gradients(module):
    return [parameter.grad.clone() for parameter in module.parameters()]


@pytest.mark.parametrize("deferred", [False, True])
@pytest.mark.parametrize("count", [1, 3])
def test_an_oracle_gives_the_gradients_of_plain_backprop(count, deferred):
    """Identity 9."""
    parts, (x, y) = layers(count), batch()
    F.cross_entropy(nn.Sequential(*parts)(x), y).backward()
    expected = gradients(parts)
    parts.zero_grad()
    modules = []
    for i, part in enumerate(parts[:-1]):
        modules += [part, dni.BackwardInterface(Oracle(parts[i + 1 :]))]
    network = nn.Sequential(*modules, parts[-1])

    def run():
        with dni.synthesizer_context(y):
            dni.backward(F.cross_entropy(network(x), y))

    if deferred:
        with dni.defer_backward():
            run()
    else:
        run()
    for found, value in zip(gradients(parts), expected, strict=True):
        assert value.abs().max() > 1e-3
        torch.testing.assert_close(found, value, **CLOSE)


SHAPES = [(WIDTH,), (4, WIDTH), (2, 4, WIDTH), (2, 3, 4, WIDTH)]


@pytest.mark.parametrize("shape", SHAPES)
def test_one_regression_loss_for_send_and_triggers_of_any_rank(shape):
    """A mean over all elements: not 2/size(0), which for a state [L, B, H] is B times the mean over lanes."""
    trigger, message = torch.randn(2, *shape, dtype=torch.float64).unbind()
    interface = dni.BackwardInterface(synthesizer(n_hidden=1))
    F.mse_loss(interface.synthesizer(trigger), message).backward()
    expected = gradients(interface)

    def send():
        interface.send(message, trigger)

    def at_a_trigger():
        interface.make_trigger(trigger).backward(message)

    def at_a_trigger_in_a_scope():
        with dni.defer_backward():
            dni.backward(interface.make_trigger(trigger), message)

    def of_a_forward_interface():
        dni.ForwardInterface(interface.synthesizer).send(message, trigger)

    for way in (send, at_a_trigger, at_a_trigger_in_a_scope, of_a_forward_interface):
        interface.zero_grad()
        way()
        for found, value in zip(gradients(interface), expected, strict=True):
            torch.testing.assert_close(found, value, msg=lambda text, way=way: f"{way.__name__}: {text}", **CLOSE)


def test_a_nest_regresses_as_its_joined_leaves_do():
    h, c, dh, dc = torch.randn(4, 2, 3, WIDTH, dtype=torch.float64).unbind()
    interface = dni.BackwardInterface(dni.BasicSynthesizer(2 * WIDTH, n_hidden=1).double())
    joined = interface.synthesizer(torch.cat([h, c], -1))
    F.mse_loss(joined, torch.cat([dh, dc], -1)).backward()
    expected = gradients(interface)
    interface.zero_grad()
    first, second = interface.make_trigger((h, c))
    torch.autograd.backward([first, second], [dh, dc])
    for found, value in zip(gradients(interface), expected, strict=True):
        torch.testing.assert_close(found, value, **CLOSE)


@pytest.mark.parametrize("way", ["send", "make_trigger", "in a scope", "forward send"])
def test_no_gradient_goes_to_whoever_produced_trigger_message_or_context(way):
    producer = nn.Linear(WIDTH, WIDTH).double()
    made = producer(torch.randn(BATCH, WIDTH, dtype=torch.float64))
    interface = dni.BackwardInterface(synthesizer(n_hidden=1, context_dim=WIDTH))
    with dni.synthesizer_context(made * 3):
        if way == "send":
            interface.send(made * 2, made)
        elif way == "forward send":
            dni.ForwardInterface(interface.synthesizer).send(made * 2, made)
        elif way == "make_trigger":
            interface.make_trigger(made).sum().backward()
        else:
            with dni.defer_backward():
                dni.backward(interface.make_trigger(made).sum())
    assert all(gradient.abs().max() > 0 for gradient in gradients(interface)), "the synthesizer must have learned"
    assert all(parameter.grad is None for parameter in producer.parameters())
    made.sum().backward()  # its graph is whole


@pytest.mark.parametrize("n_hidden", [0, 1, 3])
@pytest.mark.parametrize("context_dim", [None, 2])
def test_training_starts_with_messages_of_exactly_zero(n_hidden, context_dim):
    """Biases of the output layer included, whatever goes in."""
    fresh = dni.BasicSynthesizer(WIDTH, n_hidden=n_hidden, context_dim=context_dim)
    context = None if context_dim is None else torch.randn(BATCH, context_dim)
    assert torch.count_nonzero(fresh(torch.randn(BATCH, WIDTH), context)) == 0


@pytest.mark.parametrize("n_hidden", [0, 1, 2])
def test_a_basic_synthesizer_learns_from_zero(n_hidden):
    """Zero output layers must not block the gradient of all the others for good."""
    interface = dni.BackwardInterface(dni.BasicSynthesizer(WIDTH, n_hidden=n_hidden, hidden_dim=32, context_dim=CLASSES))
    optimizer = torch.optim.Adam(interface.parameters(), lr=1e-2)
    trigger, labels = torch.randn(64, WIDTH), F.one_hot(torch.arange(64) % CLASSES).float()
    message = trigger * 2 + labels @ torch.randn(CLASSES, WIDTH)
    for _ in range(300):
        optimizer.zero_grad()
        with dni.synthesizer_context(labels):
            regression = interface.send(message, trigger)
        optimizer.step()
    assert regression.loss < 0.05 * message.square().mean()
    assert regression.cosine.shape == (1,)
    assert regression.cosine > 0.95


def test_the_synthesizer_learns_from_the_real_gradient_and_part_a_from_the_synthetic_one():
    """Against their definitions, in one go."""
    parts, (x, y) = layers(1), batch()
    interface = dni.BackwardInterface(synthesizer())
    h = parts[0](x)
    real = torch.autograd.grad(F.cross_entropy(parts[1](h), y), h, retain_graph=True)[0]
    message = interface.receive(h)
    expected_a = torch.autograd.grad(h, list(parts[0].parameters()), message)
    loss = F.mse_loss(interface.synthesizer(h.detach()), real)
    expected_m = torch.autograd.grad(loss, list(interface.parameters()))
    F.cross_entropy(parts[1](interface(parts[0](x))), y).backward()
    for module, expected in ((parts[0], expected_a), (interface, expected_m)):
        for found, value in zip(gradients(module), expected, strict=True):
            torch.testing.assert_close(found, value, **CLOSE)


def test_eval_and_no_grad_pass_the_input_through():
    x, given = torch.randn(2, BATCH, WIDTH, dtype=torch.float64).unbind()
    backward = dni.BackwardInterface(synthesizer())
    forward = dni.ForwardInterface(synthesizer())
    both = dni.BidirectionalInterface(synthesizer(), synthesizer())
    for interface in (backward, forward, both):
        interface.eval()
    state = (x, (given,))
    assert backward(x) is x
    assert backward.make_trigger(state) is state
    assert forward(x, given) is x
    assert both(x, given) is x
    x.requires_grad_()
    backward.backward(x)
    for interface in (backward, forward):
        assert interface.send(x.detach(), given) is None
    both.send(x, given)
    assert x.grad is None
    assert all(parameter.grad is None for parameter in both.parameters())
    backward.train()
    with torch.no_grad():
        assert backward(x) is x
    with torch.inference_mode():
        assert backward(x) is x


def test_factor_scales_what_is_injected():
    interface = dni.BackwardInterface(synthesizer())
    x = torch.randn(BATCH, WIDTH, dtype=torch.float64)
    found = []
    for factor in (1, 0.25, 0):
        leaf = x.clone().requires_grad_()
        interface.backward(leaf * 2, factor)
        found.append(leaf.grad)
    torch.testing.assert_close(found[0], 2 * interface.receive(2 * x), **CLOSE)
    torch.testing.assert_close(found[1], 0.25 * found[0], **CLOSE)
    assert torch.count_nonzero(found[2]) == 0


def test_ends_silence_lanes():
    interface = dni.BackwardInterface(synthesizer())
    x = torch.randn(2, BATCH, WIDTH, dtype=torch.float64, requires_grad=True)
    ends = torch.tensor([True, False, True, False])
    interface.backward(x * 1, ends=ends)
    assert torch.count_nonzero(x.grad[:, ends]) == 0
    assert torch.count_nonzero(x.grad[:, ~ends]) > 0


def test_a_nest_is_backpropagated_in_one_pass_outside_of_a_scope():
    """h and c of an LSTM share a graph."""
    rnn = nn.LSTM(WIDTH, WIDTH).double()
    interface = dni.BackwardInterface(dni.BasicSynthesizer(2 * WIDTH).double())
    nn.init.normal_(interface.synthesizer.input_trigger.weight)
    x = torch.randn(3, BATCH, WIDTH, dtype=torch.float64)
    _, last = rnn(x)
    messages = interface.receive(last)
    expected = torch.autograd.grad(last, list(rnn.parameters()), messages, retain_graph=True)
    interface.backward(last)
    for found, value in zip(gradients(rnn), expected, strict=True):
        torch.testing.assert_close(found, value, **CLOSE)


def test_contexts_nest_and_belong_to_their_block_and_thread():
    seen = []
    with dni.synthesizer_context("outer"):
        with pytest.raises(KeyError), dni.synthesizer_context("inner"):  # noqa: PT012
            seen.append(current_context())
            raise KeyError
        seen.append(current_context())
        thread = threading.Thread(target=lambda: seen.append(current_context()))
        thread.start()
        thread.join()
        with dni.synthesizer_context(None):
            seen.append(current_context())
    seen.append(current_context())
    assert seen == ["inner", "outer", None, None, None]


@pytest.mark.parametrize("deferred", [False, True])
def test_the_context_is_that_of_the_moment_the_trigger_is_made(deferred):
    class Witness(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(WIDTH, WIDTH).double()
            self.contexts = []

        def forward(self, trigger, context):
            self.contexts.append(context)
            return self.linear(trigger)

    witness = Witness()
    interface = dni.BackwardInterface(witness)
    x = torch.randn(BATCH, WIDTH, dtype=torch.float64)

    def run():
        with dni.synthesizer_context("at the trigger"):
            trigger = interface.make_trigger(x)
        with dni.synthesizer_context("later"):
            dni.backward(trigger.sum())

    if deferred:
        with dni.defer_backward():
            run()
    else:
        run()
    assert witness.contexts == ["at the trigger"]


def test_an_exception_in_a_scope_forgets_triggers_and_messages():
    interface = dni.BackwardInterface(synthesizer())
    part = nn.Linear(WIDTH, WIDTH).double()
    x = torch.randn(BATCH, WIDTH, dtype=torch.float64)
    alive = []
    with pytest.raises(KeyError), dni.defer_backward():  # noqa: PT012
        h = part(interface.make_trigger(x))
        interface.backward(h)
        alive.append(weakref.ref(h))
        raise KeyError
    del h
    gc.collect()
    assert alive[0]() is None
    assert all(p.grad is None for p in [*part.parameters(), *interface.parameters()])
    with dni.defer_backward():
        interface.backward(part(x))
    assert all(p.grad is None for p in interface.parameters()), "there was no trigger in this scope"
    assert all(p.grad is not None for p in part.parameters())


def test_threads_do_not_see_each_others_scopes():
    interface = dni.BackwardInterface(synthesizer())
    x = torch.randn(BATCH, WIDTH, dtype=torch.float64)
    expected = synthesizer_gradient(interface, x, 2.0)
    interface.zero_grad()
    barrier = threading.Barrier(2, timeout=10)

    def work():
        barrier.wait()
        interface.make_trigger(x).backward(torch.full_like(x, 2.0))  # regresses at once: no scope is open here
        barrier.wait()

    thread = threading.Thread(target=work)
    with dni.defer_backward():
        thread.start()
        barrier.wait()
        barrier.wait()
        for found, value in zip(gradients(interface), expected, strict=True):
            torch.testing.assert_close(found, value, **CLOSE)
    thread.join()


def synthesizer_gradient(interface, trigger, value):
    interface.zero_grad()
    F.mse_loss(interface.synthesizer(trigger), torch.full_like(trigger, value)).backward()
    return gradients(interface)


def test_triggers_outside_of_a_scope_are_freed_with_their_graph():
    interface = dni.BackwardInterface(synthesizer())
    x = torch.randn(BATCH, WIDTH, dtype=torch.float64)
    gc.collect()
    gc.disable()
    try:
        trigger = interface.make_trigger((x, x.clone()))[0]
        alive = weakref.ref(trigger)
        del trigger
        assert alive() is None
    finally:
        gc.enable()


def test_an_interface_used_twice_takes_the_following_message_in():
    """Shared by two layers in one scope, the first one's target is J^T M of the second, as defined."""
    interface = dni.BackwardInterface(synthesizer())
    first, second = layers(1)[0], layers(1)[0]
    x = torch.randn(BATCH, WIDTH, dtype=torch.float64)
    h = first(x).detach().requires_grad_()
    target = torch.autograd.grad(second(h), h, interface.receive(second(h)))[0]
    last = second(h).detach()
    loss = F.mse_loss(interface.synthesizer(h.detach()), target) + F.mse_loss(
        interface.synthesizer(last), torch.full_like(last, 1.0)
    )
    expected = torch.autograd.grad(loss, list(interface.parameters()))
    with dni.defer_backward():
        dni.backward(interface(second(interface(first(x)))).sum())
    for found, value in zip(gradients(interface), expected, strict=True):
        torch.testing.assert_close(found, value, **CLOSE)


# Bad input


class Returns(nn.Module):
    """A synthesizer that returns what `make` makes of its trigger times its one parameter."""

    def __init__(self, make):
        super().__init__()
        self.weight = nn.Parameter(torch.ones((), dtype=torch.float64))
        self.make = make

    def forward(self, trigger, context):
        return self.make(trigger * self.weight)


def x64(*shape, grad=False):
    return torch.randn(*(shape or (BATCH, WIDTH)), dtype=torch.float64, requires_grad=grad)


@pytest.mark.parametrize("method", ["backward", "receive", "send", "forward"])
def test_context_without_context_dim(method):
    interface = dni.BackwardInterface(synthesizer())
    arguments = (x64(), x64()) if method == "send" else (x64(grad=True),)
    with dni.synthesizer_context(x64()), pytest.raises(ValueError, match=r"context is given.*context_dim"):
        getattr(interface, method)(*arguments)


@pytest.mark.parametrize("method", ["backward", "receive", "send", "forward"])
def test_no_context_with_context_dim(method):
    interface = dni.BackwardInterface(synthesizer(context_dim=2))
    arguments = (x64(), x64()) if method == "send" else (x64(grad=True),)
    with pytest.raises(ValueError, match=r"context_dim=2.*synthesizer_context"):
        getattr(interface, method)(*arguments)


@pytest.mark.parametrize(
    ("context", "match"),
    [
        (x64(BATCH, 3), r"shape \(4, 3\).*context_dim=2"),
        (x64(BATCH + 1, 2), r"\(5, 2\) does not broadcast"),
        (x64(1, BATCH, 2), r"\(1, 4, 2\) does not broadcast"),
        (torch.zeros(()), r"context_dim=2"),
        (torch.zeros(BATCH, 2, dtype=torch.int64), r"context has dtype torch.int64.*\.to\(dtype\)"),
        ("labels", r"needs a tensor as context"),
    ],
    ids=["size", "lanes", "rank", "scalar", "dtype", "no-tensor"],
)
def test_a_context_that_does_not_fit(context, match):
    interface = dni.BackwardInterface(synthesizer(context_dim=2))
    with dni.synthesizer_context(context), pytest.raises(ValueError, match=match):
        interface.receive(x64())


@pytest.mark.parametrize("method", ["backward", "receive", "forward"])
@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda m: m[:, :2], r"message has shape \(4, 2\), the trigger \(4, 5\)"),
        (lambda m: m.float(), r"message has dtype torch.float32, the trigger torch.float64.*\.to\(dtype\)"),
        (lambda m: (m, m), "message has 2 tensors, the trigger 1"),
    ],
    ids=["shape", "dtype", "nest"],
)
def test_a_message_that_does_not_fit_its_trigger(method, make, match):
    interface = dni.BackwardInterface(Returns(make))
    x = x64(grad=True)
    with pytest.raises(ValueError, match=match):
        getattr(interface, method)(x * 1)
    assert x.grad is None


@pytest.mark.parametrize(
    ("message", "match"),
    [
        (x64(BATCH, WIDTH + 1), r"message has shape \(4, 6\), the trigger \(4, 5\)"),
        (torch.zeros(BATCH, WIDTH), r"message has dtype torch.float32, the trigger torch.float64"),
        ((x64(), x64()), "message has 2 tensors, the trigger 1"),
    ],
    ids=["shape", "dtype", "nest"],
)
def test_a_sent_message_that_does_not_fit_its_trigger(message, match):
    interface = dni.BackwardInterface(synthesizer())
    with pytest.raises(ValueError, match=match):
        interface.send(message, x64())
    assert all(p.grad is None for p in interface.parameters())


def test_a_sent_activation_that_does_not_fit_the_synthesizer():
    interface = dni.ForwardInterface(synthesizer())
    with pytest.raises(ValueError, match=r"synthesizer's message has shape \(4, 5\), the real one \(4, 6\)"):
        interface.send(x64(BATCH, 6), x64())
    with pytest.raises(ValueError, match=r"synthesizer's message has dtype torch.float64, the real one torch.float32"):
        interface.send(x64().float(), x64())


def test_a_trigger_that_does_not_fit_the_synthesizer():
    interface = dni.BackwardInterface(synthesizer())
    with pytest.raises(ValueError, match=r"trigger's last dimension is 6, trigger_dim is 5"):
        interface.receive(x64(BATCH, 6))
    with pytest.raises(ValueError, match=r"trigger has dtype torch.float32.*\.to\(dtype\)"):
        interface.receive(x64().float())


def test_a_trigger_that_needs_no_gradient():
    """`backward` has nowhere to send it; `make_trigger`, and a call as a module, take it gladly."""
    interface = dni.BackwardInterface(synthesizer())
    with pytest.raises(ValueError, match=r"does not require a gradient.*make_trigger"):
        interface.backward(x64())
    for trigger in (interface.make_trigger(x64()), interface(x64())):
        assert trigger.requires_grad
        trigger.sum().backward()
        assert all(gradient.abs().max() > 0 for gradient in gradients(interface))
        interface.zero_grad()
    with pytest.raises(ValueError, match="no floating-point tensor"):
        interface.make_trigger(torch.arange(3))


def test_a_trigger_consumed_twice_in_a_scope():
    interface = dni.BackwardInterface(synthesizer())
    x = x64(grad=True)
    h = x * 2
    with dni.defer_backward():
        interface.backward(h)
        with pytest.raises(ValueError, match=r"already given a synthetic gradient in this defer_backward scope"):
            interface.backward(h)
    torch.testing.assert_close(x.grad, 2 * interface.receive(h), **CLOSE)  # once


def test_backward_of_a_graph_that_is_freed():
    interface = dni.BackwardInterface(synthesizer())
    h = x64(grad=True).exp()
    interface.backward(h)
    with pytest.raises(RuntimeError, match=r"freed.*with dni_seq\.defer_backward\(\)"):
        interface.backward(h)


@pytest.mark.parametrize("way", ["send", "scope", "hook"])
def test_a_synthesizer_that_detaches_its_message(way):
    interface = dni.BackwardInterface(Returns(lambda m: m.detach()))

    def run():
        if way == "send":
            interface.send(x64(), x64())
        elif way == "hook":
            interface.make_trigger(x64()).sum().backward()
        else:
            with dni.defer_backward():
                dni.backward(interface.make_trigger(x64()).sum())

    with pytest.raises(RuntimeError, match=r"trainable parameters.*detach"):
        run()


@pytest.mark.parametrize("way", ["call", "send", "hook", "scope"])
def test_an_exception_of_the_synthesizer_passes(way):
    """As it is, wherever the synthesizer is called; and no scope or context stays behind."""

    def fails(message):
        raise KeyError("mine")

    interface = dni.BackwardInterface(Returns(fails))

    def run():
        if way == "call":
            interface(x64(grad=True) * 1)
        elif way == "send":
            interface.send(x64(), x64())
        elif way == "hook":
            interface.make_trigger(x64()).sum().backward()
        else:
            with dni.defer_backward():
                dni.backward(interface.make_trigger(x64()).sum())

    with pytest.raises(KeyError, match="mine"), dni.synthesizer_context("labels"):
        run()
    assert current_scope() is None
    assert current_context() is None


def test_a_frozen_synthesizer_is_used_and_not_trained():
    interface = dni.BackwardInterface(synthesizer())
    interface.requires_grad_(False)
    x = x64(grad=True)
    interface(x * 1).sum().backward()
    torch.testing.assert_close(x.grad, interface.receive(x), **CLOSE)
    assert interface.send(x64(), x64()) is None


BAD_SIZES = [{"output_dim": 0}, {"hidden_dim": 0}, {"trigger_dim": -1}, {"context_dim": 0}, {"n_hidden": -1}]


@pytest.mark.parametrize("settings", BAD_SIZES, ids=lambda s: next(iter(s)))
def test_sizes_are_checked_at_construction(settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        dni.BasicSynthesizer(**({"output_dim": 3} | settings))


# Mixed use


def test_several_interfaces_in_one_sequential():
    """Two kinds of place and a scope or none: every synthesizer and every part gets its gradient."""
    for scoped in (False, True):
        parts, (x, y) = layers(3), batch()
        interfaces = [dni.BackwardInterface(synthesizer(n_hidden=n)) for n in range(3)]
        network = nn.Sequential(*(m for pair in zip(parts, interfaces, strict=False) for m in pair), parts[-1])
        assert len(network) == 7
        if scoped:
            with dni.defer_backward():
                dni.backward(F.cross_entropy(network(x), y))
        else:
            F.cross_entropy(network(x), y).backward()
        for name, parameter in network.named_parameters():
            assert parameter.grad is not None, name
            assert parameter.grad.abs().max() > 0, name


@pytest.mark.parametrize("scoped", [False, True])
def test_skips_around_an_interface_meet_in_a_scope(scoped):
    """A trigger that two ways lead away from: autograd sums them before the synthesizer sees the gradient."""
    interface = dni.BackwardInterface(synthesizer())
    x = x64()
    expected = synthesizer_gradient(interface, x, 3.0)
    interface.zero_grad()
    trigger = interface.make_trigger(x)
    dni.backward((trigger + trigger * 2).sum())
    for found, value in zip(gradients(interface), expected, strict=True):
        torch.testing.assert_close(found, value, **CLOSE)


@pytest.mark.parametrize("where", ["part", "synthesizer"])
def test_parametrized_weights(where):
    class Symmetric(nn.Module):
        def forward(self, weight):
            return weight + weight.T

    part, interface, x = nn.Linear(WIDTH, WIDTH).double(), dni.BackwardInterface(synthesizer(n_hidden=1)), x64()
    part_weight = part if where == "part" else interface.synthesizer.input_trigger
    parametrize.register_parametrization(part_weight, "weight", Symmetric())
    interface(part(x)).square().sum().backward()
    for module in (part, interface):
        for name, parameter in module.named_parameters():
            assert parameter.grad is not None, name
            assert parameter.grad.abs().max() > 0, name


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("what", ["parts", "network"])
def test_compiled(what, backend):
    """Compiled parts around an interface, or a compiled network with one inside: gradients of the uncompiled one.

    A graph break is allowed, an error is not.
    """
    torch._dynamo.reset()
    parts, (x, y) = layers(1), batch()
    interface = dni.BackwardInterface(synthesizer(n_hidden=1, context_dim=CLASSES))
    labels = F.one_hot(y, CLASSES).double()
    plain = nn.Sequential(parts[0], interface, parts[1])

    def run(network):
        plain.zero_grad()
        for _ in range(2):
            with dni.synthesizer_context(labels):
                F.cross_entropy(network(x), y).backward()
        return gradients(plain)

    expected = run(plain)
    if what == "network":
        found = run(torch.compile(plain, backend=backend))
    else:
        compiled = [torch.compile(part, backend=backend) for part in parts]
        found = run(nn.Sequential(compiled[0], interface, compiled[1]))
    for one, value in zip(found, expected, strict=True):
        torch.testing.assert_close(one, value, **CLOSE)


# Dynamo itself looks at the .grad of every tensor that a graph break hands on.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_compiled_recurrent_network_in_a_scope():
    torch._dynamo.reset()
    cell = nn.GRUCell(WIDTH, WIDTH).double()
    interface = dni.BackwardInterface(synthesizer(n_hidden=1))
    inputs = x64(3, BATCH, WIDTH)

    def window(hidden):
        hidden = interface.make_trigger(hidden)
        for x in inputs:
            hidden = cell(x, hidden)
        interface.backward(hidden)
        return hidden

    def run(function):
        cell.zero_grad()
        interface.zero_grad()
        hidden = torch.zeros(BATCH, WIDTH, dtype=torch.float64)
        for _ in range(2):
            with dni.defer_backward():
                hidden = function(hidden)
                dni.backward(hidden.square().mean())
        return gradients(cell) + gradients(interface)

    expected = run(window)
    for one, value in zip(run(torch.compile(window, backend="aot_eager")), expected, strict=True):
        torch.testing.assert_close(one, value, **CLOSE)


def test_autocast():
    """Half-precision activations and contexts, a float32 synthesizer, messages in the trigger's dtype."""
    part_a, part_b = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, CLASSES)
    interface = dni.BackwardInterface(dni.BasicSynthesizer(WIDTH, n_hidden=1, context_dim=WIDTH))
    nn.init.normal_(interface.synthesizer.layers[0].weight)
    x, y = torch.randn(BATCH, WIDTH), torch.arange(BATCH) % CLASSES
    with torch.autocast("cpu", dtype=torch.bfloat16):
        h = part_a(x)
        assert h.dtype == torch.bfloat16
        with dni.synthesizer_context(h):
            assert interface.receive(h).dtype == torch.bfloat16
            loss = F.cross_entropy(part_b(interface(h)), y)
    loss.backward()
    for module in (part_a, part_b, interface):
        for gradient in gradients(module):
            assert gradient.dtype == torch.float32
            assert gradient.isfinite().all()
            assert gradient.abs().max() > 0


def test_autocast_with_a_nest_of_two_precisions():
    interface = dni.BackwardInterface(dni.BasicSynthesizer(2 * WIDTH))
    h, c = torch.randn(BATCH, WIDTH).bfloat16().requires_grad_(), torch.randn(BATCH, WIDTH, requires_grad=True)
    assert [leaf.dtype for leaf in interface.receive([h, c.bfloat16()])] == [torch.bfloat16] * 2


def test_channels_last_activations():
    """Messages and gradients keep the layout and the values are those of contiguous tensors."""
    convolution = nn.Conv2d(4, 4, 3, padding=1).double()
    part_a = nn.Conv2d(2, 4, 3, padding=1).double()

    class Synthesizer(nn.Module):
        def __init__(self):
            super().__init__()
            self.convolution = convolution

        def forward(self, trigger, context):
            return self.convolution(trigger)

    interface = dni.BackwardInterface(Synthesizer())
    x = x64(3, 2, 6, 6)

    def run(layout):
        for module in (part_a, interface):
            module.zero_grad()
            module.to(memory_format=layout)
        arrived = []
        h = part_a(x.to(memory_format=layout))
        h.register_hook(arrived.append)
        trigger = interface(h)
        trigger.register_hook(arrived.append)
        trigger.square().sum().backward()
        for tensor in (h, trigger, *arrived, interface.receive(h)):
            assert tensor.is_contiguous(memory_format=layout)
        return gradients(part_a) + gradients(interface)

    for found, value in zip(run(torch.channels_last), run(torch.contiguous_format), strict=True):
        torch.testing.assert_close(found, value, **CLOSE)


def test_a_batch_norm_network_with_a_full_unlock_trains_and_evaluates_its_real_path():
    """Bidirectional: part B is trained on synthetic inputs and evaluated on real ones."""
    x = torch.randn(64, WIDTH)
    y = (x[:, 0] > 0).long()
    part_a, part_b = nn.Sequential(nn.Linear(WIDTH, 16), nn.BatchNorm1d(16), nn.ReLU()), nn.Linear(16, 2)
    interface = dni.BidirectionalInterface(
        dni.BasicSynthesizer(16, n_hidden=1, hidden_dim=32, trigger_dim=WIDTH), dni.BasicSynthesizer(16, n_hidden=1)
    )
    modules = nn.ModuleList([part_a, part_b, interface])
    optimizer = torch.optim.Adam(modules.parameters(), lr=1e-2)
    for _ in range(200):
        optimizer.zero_grad()
        F.cross_entropy(part_b(interface(part_a(x), x)), y).backward()
        optimizer.step()
    modules.eval()
    error = (part_b(interface(part_a(x), x)).argmax(1) != y).double().mean()
    assert error < 0.1


@pytest.mark.parametrize("scoped", [True, False])
@pytest.mark.parametrize("attached", [True, False])
def test_an_attached_trigger_hands_the_true_gradient_on(scoped, attached):
    """A decoder that starts from an encoder's state: the encoder learns as it does without the interface."""
    torch.manual_seed(0)
    encoder, decoder = nn.Linear(3, WIDTH).double(), nn.GRU(2, WIDTH).double()
    before, inputs = torch.randn(1, 4, 3).double(), torch.randn(5, 4, 2).double()
    interface = dni.BackwardInterface(synthesizer())

    def loss(state):
        return decoder(inputs, state)[0].square().mean()

    expected = torch.autograd.grad(loss(torch.tanh(encoder(before))), list(encoder.parameters()))
    with dni.defer_backward() if scoped else nullcontext():
        found = loss(interface.make_trigger(torch.tanh(encoder(before)), attached=attached))
        dni.backward(found) if scoped else found.backward()
    if attached:
        for parameter, gradient in zip(encoder.parameters(), expected, strict=True):
            torch.testing.assert_close(parameter.grad, gradient)
    else:
        assert all(parameter.grad is None for parameter in encoder.parameters())
    assert any(parameter.grad is not None and parameter.grad.any() for parameter in interface.parameters())


def test_an_attached_trigger_may_hold_infinities():
    """States in log space: the value is that of the trigger, and so is the gradient."""
    logits = torch.randn(4, WIDTH, dtype=torch.float64, requires_grad=True)
    masked = torch.where(torch.arange(WIDTH) == 0, -torch.inf, logits)
    weights = torch.arange(1.0, WIDTH + 1).double()
    (expected,) = torch.autograd.grad((masked.exp() * weights).sum(), logits, retain_graph=True)
    interface = dni.BackwardInterface(synthesizer())
    with dni.defer_backward():
        state = interface.make_trigger(masked, watched=False, attached=True)
        assert torch.equal(state, masked)
        dni.backward((state.exp() * weights).sum())
    torch.testing.assert_close(logits.grad, expected, rtol=1e-12, atol=0)
