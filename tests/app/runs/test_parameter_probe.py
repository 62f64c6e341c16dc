"""The parameters' gradient beside full BPTT, in a run: at which windows, from which state, and that it changes nothing."""

from __future__ import annotations

import pytest
import torch

import dni_seq as dni
from dni_seq.app.lm import train as train_lm
from dni_seq.app.runs.checkpoint import load_checkpoint
from dni_seq.app.runs.parameter_probe import KEY, ParameterProbe
from dni_seq.core import states
from tests import problems
from tests.events import layout, points
from tests.nests import assert_same
from tests.test_traces import model_of, trainer_of

TINY = ("--embed", "8", "--hidden", "8", "--bptt", "5", "--batch-size", "64", "--eval-tokens", "2048", "--max-steps", "25")
HARD = ("--synthesizer", "none", "--model", "lru", "--traces", "exact", "--dropout", "0.1", "--accumulate", "2")


def windows(count, length):
    text = problems.tokens(count * length, 3)
    return list(problems.cut(text, length))


@pytest.mark.parametrize(("length", "needed"), [(1, 40), (4, 10), (7, 8)])
def test_a_comparison_covers_the_windows_from_the_nth_on(length, needed):
    trainer = trainer_of(model_of("lru"), lr=0.01)
    probe, found, at_start = ParameterProbe(trainer, 3), {}, {}
    some = windows(2 * needed + 7, length)
    for number, window in enumerate(some, start=1):
        at_start[number] = states.clone(trainer.state)
        before = trainer.steps
        value = probe.observe(window)
        assert trainer.steps == before
        if value:
            found[number] = float(value[KEY])
            start = number - needed + 1
            by_hand = dni.gradient_fidelity(trainer, some[start - 1 : number], at_start[start])
            assert found[number] == pytest.approx(by_hand.cosine)
        trainer.step(window.inputs, window.targets)
    first = 3 + needed - 1
    again = 3 * (first // 3 + 1) + needed - 1
    assert list(found) == [first, again]
    assert all(0 < cosine < 1 for cosine in found.values())


def test_nothing_is_compared_unless_it_is_asked_for():
    trainer = trainer_of(model_of("lru"))
    probe = ParameterProbe(trainer, 0)
    assert not probe.active
    for window in windows(60, 1):
        assert probe.observe(window) == {}
    assert probe.state_dict()["windows"] == []


def test_windows_that_cannot_be_trained_on_end_no_run():
    trainer = trainer_of(model_of("lru"), lr=0.0)
    probe = ParameterProbe(trainer, 1)
    with torch.no_grad():
        trainer.model.readout.bias.fill_(float("nan"))
    for window in windows(40, 1):
        assert probe.observe(window) == {}
    assert trainer.skipped == 0


@pytest.mark.usefixtures("one_thread")
def test_a_run_is_the_same_with_and_without_it(tmp_path):
    """Bit by bit, in the middle of updates and of a schedule."""
    found = {}
    for every in (0, 4):
        run = tmp_path / str(every)
        options = (*TINY, *HARD, "--schedule", "cosine", "--fidelity-every", str(every), "--run-dir", str(run))
        assert train_lm.main(options) == 0
        found[every] = load_checkpoint(run / "checkpoints" / "last.pt")
        assert bool(found[every]["probe"]["windows"]) == bool(every)
        assert (KEY in points(run)) == bool(every)
        assert ("estimator" in layout(run)) == bool(every)
    for part in ("trainer", "stream", "random"):
        assert_same(found[0][part], found[4][part])
