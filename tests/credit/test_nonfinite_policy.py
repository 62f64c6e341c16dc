"""NonFinitePolicy: raises after too many skipped windows in a row, and reports each skipped window once."""

from __future__ import annotations

import pytest
import torch

from dni_seq.core.nonfinite import NonFiniteError
from dni_seq.credit.nonfinite_policy import NonFinitePolicy

GOOD, BAD = torch.tensor(True), torch.tensor(False)


def nowhere() -> str:
    return "nowhere"


def counted(limit: int, *flags: torch.Tensor) -> NonFinitePolicy:
    policy = NonFinitePolicy(limit)
    for flag in flags:
        policy.count(flag)
    return policy


def test_it_raises_at_the_limit():
    message = r"3 windows in a row were skipped, from step 4 on; first NaN or infinity in nowhere\. "
    with pytest.raises(NonFiniteError, match=message):
        counted(3, GOOD, GOOD, GOOD, BAD, BAD, BAD).read_counts(6, nowhere)
    counted(3, BAD, BAD, GOOD, BAD, BAD).read_counts(6, nowhere)
    policy = counted(3)
    for step in (1, 2):
        policy.count_skipped(torch.tensor(True), step, "nowhere")
    with pytest.raises(NonFiniteError, match="3 windows in a row were skipped, from step 1 on"):
        policy.count_skipped(torch.tensor(True), 3, "nowhere")


def test_skips_are_reported_once_and_every_limit_windows():
    policy = counted(2, BAD)
    assert policy.read_counts(1, nowhere) == ()
    policy.count(GOOD)
    assert policy.read_counts(2, nowhere) == ("1 of the last 2 steps skipped because of a NaN or an infinity",)
    for flag in (GOOD, GOOD):
        policy.count(flag)
    assert policy.read_counts(4, nowhere) == ()


def test_a_window_skipped_by_the_host_is_not_reported_again():
    """Its step has reported it. On a GPU the host skips for optimizers that cannot skip by themselves."""
    policy = counted(3, GOOD)
    policy.count_skipped(torch.tensor(True), 2, "nowhere")
    policy.count(GOOD)
    assert policy.total == 1
    assert policy.read_counts(3, nowhere) == ()


def test_windows_skipped_before_a_checkpoint_are_not_reported_again():
    policy = NonFinitePolicy(2)
    policy.load_state_dict(counted(2, BAD, GOOD, BAD, GOOD).state_dict())
    assert policy.total == 2
    for flag in (GOOD, BAD):
        policy.count(flag)
    assert policy.read_counts(6, nowhere) == ("1 of the last 2 steps skipped because of a NaN or an infinity",)
