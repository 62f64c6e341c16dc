"""Counts that decide what a synthesizer does next: the same numbers with and without reading them from a device."""

from __future__ import annotations

import copy

import pytest
import torch

import dni_seq as dni
from dni_seq.synthesizers.least_squares import LeastSquaresHeads
from tests import problems
from tests.nests import assert_same
from tests.training import sequence_trainer

LANES = 3


def on_a_gpu(monkeypatch):
    monkeypatch.setattr("dni_seq.core.nonfinite.readable_without_sync", lambda flag: False)


def heads(model):
    state = model.initial_state(LANES)
    return LeastSquaresHeads(state, 1, cells=model.cells, hidden=(8,), solve_every=3).double()


def trainer():
    torch.manual_seed(0)
    model = problems.make_model("lstm")
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    return sequence_trainer(model, optimizer, problems.mean, synthesizer=heads(model), synthetic_scale=1.0)


def step(trainer, windows):
    for window in windows:
        trainer.step(window.inputs, window.targets)


def windows(count):
    return list(problems.cut(problems.tokens(2 * count + 1, LANES), 2))


def fails(*_, **__):
    raise RuntimeError("on purpose")


def run_with_a_failure_and_a_reset():
    """Steps, one that fails after its regression was counted, and a synthesizer that begins again."""
    one = trainer()
    text = windows(21)
    first, second, third = text[:7], text[7:14], text[14:21]
    step(one, first)
    one.optimizer.step, works = fails, one.optimizer.step
    with pytest.raises(RuntimeError, match="on purpose"):
        step(one, second[:1])
    one.optimizer.step = works
    step(one, second)
    one.credit._reset_synthesizer()
    assert one.credit.synthesizer.regressions == 0
    step(one, third)
    return one


def test_failures_and_resets_count_the_same_on_a_gpu(monkeypatch):
    there = run_with_a_failure_and_a_reset()
    on_a_gpu(monkeypatch)
    here = run_with_a_failure_and_a_reset()
    assert there.credit.synthesizer.regressions == 7
    assert there.credit.synthesizer.solution.any(), "solved once at least"
    assert_same(here.credit.synthesizer.state_dict(), there.credit.synthesizer.state_dict())
    assert_same(here.model.state_dict(), there.model.state_dict())


def counted(model, times, state):
    for _ in range(times):
        model.regress(state, None, [state])


def test_a_count_is_saved_and_loaded_as_a_tensor(monkeypatch):
    on_a_gpu(monkeypatch)
    model = problems.make_model("lstm")
    state = model.initial_state(LANES)
    first, second = heads(model), heads(model)
    counted(first, 4, state)
    saved = copy.deepcopy(first.state_dict())
    assert saved["regressions"].dtype == torch.int64
    assert saved["regressions"].shape == ()
    assert saved["regressions"] == 4
    counted(second, 1, state)
    second.load_state_dict(saved)
    counted(second, 1, state)
    assert second._count() == second.regressions == 5


def test_a_regression_of_a_skipped_step_counts_on_a_gpu(monkeypatch):
    """The device puts the old count back; what is saved is the count that decides."""
    on_a_gpu(monkeypatch)
    model = problems.make_model("lstm")
    state = model.initial_state(LANES)
    one = heads(model)
    counted(one, 2, state)
    one.regressions.fill_(1)
    assert one.state_dict()["regressions"] == 2
    one.regressions.fill_(1)
    counted(one, 1, state)
    assert one.regressions == 3


def test_after_a_move_to_the_cpu_the_buffer_is_the_count(monkeypatch):
    model = problems.make_model("lstm")
    state = model.initial_state(LANES)
    one = heads(model)
    with monkeypatch.context() as there:
        on_a_gpu(there)
        counted(one, 2, state)
    counted(one, 1, state)
    assert one.state_dict()["regressions"] == 3
    on_a_gpu(monkeypatch)
    counted(one, 1, state)
    assert one.state_dict()["regressions"] == 4


def test_horizons_count_draws_likewise(monkeypatch):
    on_a_gpu(monkeypatch)
    state = torch.randn(1, LANES, 5)
    one = dni.MultiHorizonSynthesizer(state, horizons=3, hidden=(4,), draw=True)
    drawn = []
    for _ in range(12):
        one.regress(state, None, [state] * 3)
        drawn.append(one.target_rule(1.0, 1.0).active)
    fresh = dni.MultiHorizonSynthesizer(state, horizons=3, hidden=(4,), draw=True)
    fresh.load_state_dict(one.state_dict())
    assert fresh.target_rule(1.0, 1.0) == one.target_rule(1.0, 1.0)
    assert len({tuple(active) for active in drawn}) == 3
    assert one.draws == 12
