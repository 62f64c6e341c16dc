"""A step on a GPU never waits for a number: with the switch set as there, no operation that would wait runs."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

import dni_seq as dni
from dni_seq.models.language_model import LanguageModel, token_losses
from dni_seq.synthesizers.target_rule import drawn

T, LANES, VOCABULARY = 3, 4, 11

WAITS = {
    torch.ops.aten._local_scalar_dense,
    torch.ops.aten.nonzero,
    torch.ops.aten.equal,
    torch.ops.aten.masked_select,
    torch.ops.aten.is_nonzero,
}
"""Operations whose result the host must read before it can go on."""


class NoWaiting(TorchDispatchMode):
    """Raises where an operation would make the host wait for a GPU."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket in WAITS:
            raise AssertionError(f"{func} waits for the device")
        return func(*args, **(kwargs or {}))


def windows(count, masked=False):
    text = torch.randint(VOCABULARY, (count * T + 1, LANES), generator=torch.Generator().manual_seed(1))
    found = []
    for i in range(count):
        mask = torch.rand(T, LANES, generator=torch.Generator().manual_seed(i)) < 0.8 if masked else None
        ends = torch.arange(LANES) == i % (LANES + 1) if masked else None
        found.append(dni.Window(text[i * T : (i + 1) * T], text[i * T + 1 : (i + 1) * T + 1], mask, ends))
    return list(dni.with_lookahead(found, 2 * T))


def for_model(model, **given):
    example = torch.zeros(T, LANES, dtype=torch.int64)
    return dni.FutureGradient.for_model(model, token_losses, example_inputs=example, vocabulary=VOCABULARY, **given)


def encoder():
    return dni.LookaheadEncoder(T, nn.Embedding(VOCABULARY, 4), nn.Embedding(VOCABULARY, 4))


KINDS = {
    "none": lambda model: {},
    "basic": lambda model: {"synthesizer": dni.Normalized(dni.BasicSynthesizer(16, n_hidden=1))},
    "future": lambda model: {"synthesizer": for_model(model, horizons=2)},
    "past": lambda model: {"synthesizer": for_model(model, predict="past", predict_steps=5)},
    "both, inside": lambda model: {
        "synthesizer": for_model(model, predict="both", predict_steps=5),
        "config": dni.SyntheticGradientConfig(message_every=1),
    },
    "horizons": lambda model: {
        "synthesizer": dni.MultiHorizonSynthesizer(
            model.initial_state(1), horizons=2, tail=True, cells=dni.LSTM_CELLS, hidden=(6,), encoder=encoder()
        )
    },
    "exact": lambda model: {"synthesizer": dni.ExactFuture(model, token_losses, steps=4)},
    "target network": lambda model: {
        "synthesizer": dni.StateSynthesizer(model.initial_state(1), hidden=(6,), encoder=encoder()),
        "config": dni.SyntheticGradientConfig(target_network=2, synthetic_scale=0.5),
    },
}


def trainer_of(kind):
    torch.manual_seed(0)
    model = LanguageModel(VOCABULARY, embed=6, hidden=8, layers=2)
    optimizer = torch.optim.Adam(model.parameters(), 1e-3, fused=True)
    settings = KINDS[kind](model)
    if any(p.requires_grad for p in settings.get("synthesizer", nn.Identity()).parameters()):
        learned = settings["synthesizer"].parameters()
        settings["synthesizer_optimizer"] = torch.optim.Adam(learned, 1e-3, fused=True)
    return dni.SequenceTrainer(model, optimizer, token_losses, clip=1.0, **settings)


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """The switch as on a GPU. The one draw of a step is of the host's own generator, on the CPU there too."""

    def on_the_host(choices, count):
        with _disable_current_modes():
            return drawn(choices, count)

    monkeypatch.setattr("dni_seq.core.nonfinite.readable_without_sync", lambda flag: False)
    monkeypatch.setattr("dni_seq.credit.synthetic_gradient.drawn", on_the_host)


def steps(trainer, some):
    looks = trainer.credit is not None and not isinstance(trainer.credit.synthesizer, dni.Normalized)
    for window in some:
        lookahead = window.lookahead if looks else None
        trainer.step(window.inputs, window.targets, mask=window.mask, ends=window.ends, lookahead=lookahead)


@pytest.mark.usefixtures("as_on_a_gpu")
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_a_step_does_not_wait(kind, masked):
    """The first step may, and one in ten, which reads how many were skipped."""
    trainer = trainer_of(kind)
    first, *others = windows(9, masked)
    steps(trainer, [first])
    with NoWaiting():
        steps(trainer, others)
    assert trainer.steps == 9


@pytest.mark.usefixtures("as_on_a_gpu")
def test_one_read_would_be_seen(monkeypatch):
    trainer = trainer_of("none")
    first, second, *_ = windows(3)
    steps(trainer, [first])
    run = trainer.model.forward
    monkeypatch.setattr(
        trainer.model, "forward", lambda *parts: (run(*parts), trainer.model.projection.bias.sum().item())[0]
    )
    with NoWaiting(), pytest.raises(AssertionError, match="_local_scalar_dense"):
        steps(trainer, [second])
