"""Lookahead over any windows, against steps looked up one by one."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dni_seq.core.windows import Window, counted, with_lookahead

LANES = 3


def make_windows(lengths: list[int], ends: dict[int, list[bool]], mask: bool = False) -> list[Window]:
    """Windows of one long stream whose inputs and targets are all different; `ends` by window."""
    torch.manual_seed(0)
    windows, start = [], 0
    for index, length in enumerate(lengths):
        inputs = torch.arange(start, start + length * LANES).reshape(length, LANES)
        windows.append(
            Window(
                inputs,
                inputs + 1000,
                torch.rand(length, LANES) < 0.5 if mask else None,
                torch.tensor(ends[index]) if index in ends else None,
            )
        )
        start += length * LANES
    return windows


def expected(windows: list[Window], index: int, steps: int) -> list[list[tuple[int, int, bool] | None]]:
    """[steps][lane]: input, target and mask of each step behind a window, None behind the end of the sequence."""
    rows: list[list[tuple[int, int, bool] | None]] = [[None] * LANES for _ in range(steps)]
    for lane in range(LANES):
        behind = []
        for number, window in enumerate(windows):
            if number > index:
                triples = zip(window.inputs[:, lane], window.targets[:, lane], counted(window)[:, lane], strict=True)
                behind += [(int(i), int(t), bool(c)) for i, t, c in triples]
            if number >= index and window.ends is not None and window.ends[lane]:
                break
        for step, triple in enumerate(behind[:steps]):
            rows[step][lane] = triple
    return rows


CASES = {
    "no ends": ([4, 4, 4], {}),
    "ragged": ([4, 4, 1], {2: [True] * 3}),
    "one lane ends": ([2, 2, 2, 2], {1: [False, True, False]}),
    "first ends": ([3, 3, 3], {0: [True, False, False], 1: [False, False, True]}),
    "one window": ([5], {0: [True] * 3}),
    "single steps": ([1] * 6, {3: [True, False, True]}),
}


@pytest.mark.parametrize("mask", [False, True])
@pytest.mark.parametrize("steps", [0, 1, 3, 4, 7, 30])
@pytest.mark.parametrize("case", CASES)
def test_lookahead_is_the_steps_that_follow(case: str, steps: int, mask: bool) -> None:
    windows = make_windows(*CASES[case], mask)
    seen = list(with_lookahead(windows, steps))
    assert len(seen) == len(windows)
    for index, (window, plain) in enumerate(zip(seen, windows, strict=True)):
        assert torch.equal(window.inputs, plain.inputs)
        ahead = window.lookahead
        assert ahead is not None
        assert ahead.mask is not None
        assert ahead.inputs.shape == ahead.valid.shape == (steps, LANES)
        for step, row in enumerate(expected(windows, index, steps)):
            for lane, triple in enumerate(row):
                assert bool(ahead.valid[step, lane]) == (triple is not None)
                if triple is not None:
                    got = (ahead.inputs[step, lane], ahead.targets[step, lane], ahead.mask[step, lane])
                    assert tuple(map(int, got)) == tuple(map(int, triple))


def test_lookahead_reads_no_further_than_it_spans() -> None:
    read = 0

    def source():
        nonlocal read
        for window in make_windows([2] * 10, {}):
            read += 1
            yield window

    windows = with_lookahead(source(), 3)
    next(windows)
    assert read == 3  # the window itself and two more
    next(windows)
    assert read == 4


def test_features_are_carried_along() -> None:
    inputs = torch.randn(4, LANES, 5)
    windows = [Window(inputs, inputs[..., 0]), Window(inputs + 1, inputs[..., 0] + 1)]
    ahead = next(iter(with_lookahead(windows, 6))).lookahead
    assert ahead is not None
    assert ahead.inputs.shape == (6, LANES, 5)
    assert torch.equal(ahead.inputs[:4], inputs + 1)
    assert not ahead.valid[4:].any()


def test_counted_is_the_mask_or_everything() -> None:
    plain, masked = (make_windows([2], {}, mask)[0] for mask in (False, True))
    assert counted(plain).all()
    assert isinstance(masked.mask, Tensor)
    assert torch.equal(counted(masked), masked.mask)


def test_a_negative_lookahead_is_refused() -> None:
    with pytest.raises(ValueError, match="0 or more"):
        next(with_lookahead([], -1))
