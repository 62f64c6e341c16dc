"""The share of a message that comparisons find right."""

from __future__ import annotations

import pytest
import torch

from dni_seq.credit.auto_scale import AutoScale, RunningFidelity


def comparisons(count: int, slope: float, noise: float, seed: int = 0) -> list[torch.Tensor]:
    """Messages of 200 numbers and exact gradients that are `slope` times as large, and noise."""
    draw = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(count):
        message, rest = torch.randn(2, 200, generator=draw, dtype=torch.float64)
        exact = slope * message + noise * rest
        found.append(torch.stack([(exact * message).sum(), message.square().sum(), exact.square().sum()])[None])
    return found


def shares(found: list[torch.Tensor]) -> float:
    reliability = AutoScale()
    for each in found:
        reliability.update(each)
    assert reliability.shares is not None
    return reliability.shares[0]


@pytest.mark.parametrize("slope", [0.3, 0.8, 1.0])
def test_the_share_comes_near_the_slope_from_below(slope):
    found = shares(comparisons(60, slope, 0.5))
    assert slope - 0.1 < found <= slope + 0.01


def test_nothing_is_sent_before_there_are_comparisons_enough():
    for count in (1, 2):
        assert shares(comparisons(count, 1.0, 0.0)) == 0
    assert shares(comparisons(3, 1.0, 0.0)) > 0.2


@pytest.mark.parametrize("seed", range(20))
def test_messages_that_explain_nothing_are_never_sent(seed):
    reliability = AutoScale()
    for each in comparisons(100, 0.0, 1.0, seed):
        reliability.update(each)
        assert reliability.shares == [0.0]


def test_messages_that_explain_little_are_not_sent():
    """A slope of 1 beside noise of 12 times the size explains less than a hundredth, and is beyond doubt."""
    assert shares(comparisons(400, 1.0, 12.0)) == 0
    assert shares(comparisons(400, 1.0, 5.0)) > 0.3


def test_it_resumes_from_what_was_saved():
    found = comparisons(12, 0.7, 0.5)
    one, other = AutoScale(), AutoScale()
    for each in found[:6]:
        one.update(each)
    other.load_state_dict(one.state_dict())
    for each in found[6:]:
        one.update(each)
        other.update(each)
    assert one.shares == other.shares


@pytest.mark.parametrize("evidence", [None, torch.ones(1, 5)], ids=["none yet", "of an older version"])
def test_what_was_saved_takes_the_place_of_what_there_was(evidence):
    reliability = AutoScale()
    for each in comparisons(5, 1.0, 0.1):
        reliability.update(each)
    reliability.load_state_dict({"evidence": evidence, "comparisons": 0 if evidence is None else 9})
    assert reliability.shares is None
    assert reliability.state_dict() == {"evidence": None, "comparisons": 0}


def test_running_r2_survives_an_error_that_is_not_finite():
    """One overflowing message must not be the last thing that is known of a synthesizer."""
    running = RunningFidelity()
    running.update(torch.tensor([1.0, 1.0]), torch.tensor([4.0, 4.0]))
    running.update(torch.tensor([torch.inf, 2.0]), torch.tensor([4.0, torch.inf]))
    running.update(torch.tensor([1.0, torch.nan]), torch.tensor([4.0, 4.0]))
    torch.testing.assert_close(running.r2(2), torch.tensor([0.75, 0.75]))
