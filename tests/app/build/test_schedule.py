"""Learning rates over updates: every schedule against its formula written out, and resumed at every update."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

from dni_seq.app.build.optimization_options import OptimizationOptions
from dni_seq.app.build.schedule import Schedule

LR, OTHER, TOTAL = 0.8, 0.02, 10


def made(total=TOTAL, **given) -> tuple[Schedule, list[torch.optim.Optimizer]]:
    optimizers = [
        torch.optim.SGD([nn.Parameter(torch.ones(2))], LR, momentum=0.5),
        torch.optim.Adam([nn.Parameter(torch.ones(3))], OTHER),
    ]
    return Schedule(OptimizationOptions(**given), optimizers, total), optimizers


def step(schedule, optimizers, updates, epoch=0, score=None):
    """One update with gradients of one, and what follows it."""
    for optimizer in optimizers:
        for parameter in optimizer.param_groups[0]["params"]:
            parameter.grad = torch.ones_like(parameter)
    optimizers[0].step()
    schedule.after_window(updates, epoch)
    if score is not None:
        schedule.after_validation(score)


def rates(schedule, optimizers, epochs=None, scores=None, total=TOTAL) -> list[float]:
    """The rate of every update."""
    found = []
    for update in range(total):
        found.append(optimizers[0].param_groups[0]["lr"])
        assert optimizers[1].param_groups[0]["lr"] == pytest.approx(found[-1] / LR * OTHER, rel=1e-12)
        assert schedule.rate == found[-1]
        step(schedule, optimizers, update + 1, 0 if epochs is None else epochs[update], scores and scores[update])
    return found


def near(values):
    return pytest.approx(values, rel=1e-12, abs=1e-15)


def test_linear_falls_by_the_same_amount_at_each_update():
    assert rates(*made(schedule="linear")) == near([LR * (1 - n / 10) for n in range(10)])
    assert rates(*made(schedule="linear", min_lr=0.2)) == near([0.2 + 0.6 * (1 - n / 10) for n in range(10)])


def test_the_warm_up_comes_first_and_the_fall_takes_the_rest():
    found = rates(*made(schedule="linear", warmup=4))
    assert found == near([LR * share for share in (0.25, 0.5, 0.75, 1, 1, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6)])
    assert rates(*made(schedule="constant", warmup=2, total=None)) == near([LR / 2, *[LR] * 9])


def test_cosine_is_half_a_wave():
    expected = [0.1 + 0.7 * (1 + math.cos(math.pi * n / 10)) / 2 for n in range(10)]
    assert rates(*made(schedule="cosine", min_lr=0.1)) == near(expected)


def test_a_run_that_is_longer_than_planned_keeps_the_lowest_rate():
    found = rates(*made(schedule="linear", min_lr=0.2), total=13)
    assert found[10:] == near([0.2] * 3)


def test_step_decays_after_every_epoch_but_the_first_ones():
    """As in Zaremba et al. 2014: some epochs at the full rate, then a factor after each epoch."""
    epochs = [0, 0, 1, 1, 1, 2, 2, 2, 3, 3]  # complete after each update
    expected = [1, 1, 1, 1, 1, 1, 0.5, 0.5, 0.5, 0.25]
    found = rates(*made(schedule="step", decay_after=2), epochs)
    assert found == near([LR * share for share in expected])
    floor = rates(*made(schedule="step", decay_after=2, min_lr=0.3), epochs)
    assert floor == near([max(LR * share, 0.3) for share in expected])


def test_plateau_decays_after_each_validation_that_is_not_the_best():
    scores = [5.0, None, 4.0, 4.0, 3.0, 3.5, None, 3.2, 2.9, 2.9]
    expected = [1, 1, 1, 1, 0.5, 0.5, 0.25, 0.25, 0.125, 0.125]
    assert rates(*made(schedule="plateau"), scores=scores) == near([LR * share for share in expected])
    floor = rates(*made(schedule="plateau", min_lr=0.3), scores=scores)
    assert floor == near([max(LR * share, 0.3) for share in expected])


def test_plateau_waits_for_the_end_of_the_warm_up():
    found = rates(*made(schedule="plateau", warmup=4), scores=[5.0, 6.0, 7.0, 8.0, 5.0, 6.0, 1.0, 1.0, 1.0, 1.0])
    assert found[:8] == near([LR * share for share in (0.25, 0.5, 0.75, 1, 1, 1, 0.5, 0.5)])


def test_windows_without_an_update_change_nothing():
    schedule, optimizers = made(schedule="linear")
    step(schedule, optimizers, 1)
    before = schedule.rate
    for _ in range(3):
        schedule.after_window(1, 0)
    assert schedule.rate == before


def test_validation_says_whether_it_has_lowered_the_rate():
    schedule, _ = made(schedule="plateau", min_lr=0.5)
    assert [schedule.after_validation(loss) for loss in (1.0, 0.9, 0.9, 0.9, 0.8)] == [False, False, True, False, False]
    assert not made(schedule="cosine")[0].after_validation(1.0)


@pytest.mark.parametrize(
    "given",
    [
        {"schedule": "linear", "warmup": 3},
        {"schedule": "cosine"},
        {"schedule": "step", "decay": 0.7},
        {"schedule": "plateau", "warmup": 2},
        {"schedule": "constant", "warmup": 6},
    ],
    ids=str,
)
@pytest.mark.parametrize("cut", [0, 1, 4, 7])
def test_resuming_at_any_update_is_exact(given, cut):
    scores, epochs = [3.0, 2.0, 2.5, 2.5, 1.0, 1.5, 0.5, 0.6, 0.6, 0.1], [n // 3 for n in range(TOTAL)]
    schedule, optimizers = made(**given)
    for update in range(TOTAL):
        if update == cut:
            saved = copy.deepcopy((schedule.state_dict(), [optimizer.state_dict() for optimizer in optimizers]))
        step(schedule, optimizers, update + 1, epochs[update], scores[update])
    again, resumed = made(**given)
    for optimizer, state in zip(resumed, saved[1], strict=True):
        optimizer.load_state_dict(state)
    again.load_state_dict(saved[0])
    for update in range(cut, TOTAL):
        step(again, resumed, update + 1, epochs[update], scores[update])
    assert again.state_dict() == schedule.state_dict()
    assert [o.param_groups[0]["lr"] for o in resumed] == [o.param_groups[0]["lr"] for o in optimizers]


def test_what_is_saved_is_plain(tmp_path):
    """So that a checkpoint can be read without running code."""
    for name in ("cosine", "plateau"):
        schedule, _ = made(schedule=name)
        torch.save(schedule.state_dict(), tmp_path / "state.pt")
        assert torch.load(tmp_path / "state.pt", weights_only=True) == schedule.state_dict()


def test_schedules_that_do_not_fit_the_run():
    with pytest.raises(ValueError, match=r"--schedule cosine needs the number of updates of the run.*give --max-steps"):
        made(total=None, schedule="cosine")
    with pytest.raises(ValueError, match="--warmup 10 must be shorter than the run, which has 10 updates"):
        made(schedule="linear", warmup=10)
