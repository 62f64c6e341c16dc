"""A step on a GPU never waits for a number: with the switch set as there, no operation that would wait runs."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

import dni_seq as dni
from dni_seq.app.gpu_check import learners
from dni_seq.models.language_model import LanguageModel
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
    return list(dni.with_lookahead(found, learners.LOOKAHEAD))


def inside(model, steps):
    """Messages of future and past at every state of a window."""
    synthesizer = learners.future(model, steps, predict="both", predict_steps=5)
    return {"synthesizer": synthesizer, "config": dni.SyntheticGradientConfig(message_every=1)}


def drawn_heads(model, steps):
    """Two regressed heads, of which each window trains one."""
    settings = learners.heads(model, steps)
    settings["synthesizer"].draw = True
    return settings


KINDS = {**learners.KINDS, "both, inside": inside, "a drawn head": drawn_heads}


def trainer_of(kind):
    torch.manual_seed(0)
    model = LanguageModel(VOCABULARY, embed=6, hidden=8, layers=2)
    return learners.trainer_of(KINDS[kind], model, T, torch.device("cpu"))


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """The switch as on a GPU. The one draw of a step is of the host's own generator, on the CPU there too."""

    def on_the_host(choices, count):
        with _disable_current_modes():
            return drawn(choices, count)

    monkeypatch.setattr("dni_seq.core.nonfinite.readable_without_sync", lambda flag: False)
    monkeypatch.setattr("dni_seq.credit.synthetic_gradient.drawn", on_the_host)
    monkeypatch.setattr("dni_seq.synthesizers.multi_horizon.drawn", on_the_host)


def steps(trainer, some):
    for window in some:
        learners.step(trainer, window)


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
