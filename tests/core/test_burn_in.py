"""Burn-in, against steps counted one by one and a loop that leaves these losses out."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import dni_seq as dni
from dni_seq.core.windows import Lookahead, Window, counted

LANES = 3
ENDS = {1: [False, True, False], 3: [True, False, False], 4: [False, True, True]}
"""Lanes that end with a window, by its index: sequences of several lengths, one of a single window."""


def make_windows(masked: bool, lengths: tuple[int, ...] = (4, 4, 2, 4, 3, 4, 4)) -> list[Window]:
    generator = torch.Generator().manual_seed(0)
    windows = []
    for index, length in enumerate(lengths):
        inputs, targets = torch.randn(2, length, LANES, 2, dtype=torch.float64, generator=generator)
        mask = torch.rand(length, LANES, generator=generator) < 0.6 if masked else None
        windows.append(Window(inputs, targets, mask, torch.tensor(ENDS[index]) if index in ENDS else None))
    return windows


def expected_masks(windows: list[Window], steps: int) -> list[Tensor]:
    """The mask of each window, from a count for each lane."""
    passed, masks = [0] * LANES, []
    for window in windows:
        mask = counted(window).clone()
        for step in range(len(mask)):
            for lane in range(LANES):
                if passed[lane] < steps:
                    mask[step, lane] = False
                passed[lane] += 1
        for lane in range(LANES):
            if window.ends is not None and window.ends[lane]:
                passed[lane] = 0
        masks.append(mask)
    return masks


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("steps", [1, 3, 4, 6, 9, 100])
def test_masks_are_those_of_a_count_by_lane(steps: int, masked: bool) -> None:
    windows = make_windows(masked)
    seen = list(dni.burn_in(windows, steps))
    for window, plain, mask in zip(seen, windows, expected_masks(windows, steps), strict=True):
        assert torch.equal(window.mask, mask)
        assert window.inputs is plain.inputs
        assert window.ends is plain.ends


def test_no_steps_leave_every_window_as_it_is() -> None:
    windows = make_windows(False)
    assert all(window is plain for window, plain in zip(dni.burn_in(windows, 0), windows, strict=True))


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("steps", [3, 6, 9])
def test_lookahead_may_come_before_or_after(steps: int, masked: bool) -> None:
    windows = make_windows(masked)
    one = list(dni.with_lookahead(dni.burn_in(windows, steps), 5))
    other = list(dni.burn_in(dni.with_lookahead(windows, 5), steps))
    assert len(one) == len(other) == len(windows)
    masked_ahead = 0
    for first, second in zip(one, other, strict=True):
        assert torch.equal(first.mask, second.mask)
        assert isinstance(first.lookahead, Lookahead)
        assert isinstance(second.lookahead, Lookahead)
        assert torch.equal(first.lookahead.counts, second.lookahead.counts)
        masked_ahead += int((second.lookahead.valid & ~second.lookahead.counts).sum())
    assert masked_ahead > 0  # the burn-in reaches into lookaheads


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.rnn, self.readout = nn.GRU(2, 5, dtype=torch.float64), nn.Linear(5, 2, dtype=torch.float64)

    def forward(self, inputs: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        outputs, state = self.rnn(inputs, state)
        return self.readout(outputs), state

    def initial_state(self, lanes: int) -> Tensor:
        return torch.zeros(1, lanes, 5, dtype=torch.float64)


def losses(outputs: Tensor, targets: Tensor) -> Tensor:
    return (outputs - targets).square().mean(-1)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("steps", [2, 6])
def test_trainer_equals_a_loop_that_leaves_these_losses_out(steps: int, masked: bool) -> None:
    windows = make_windows(masked)
    model, plain = Network(), Network()
    trainer = dni.SequenceTrainer(model, torch.optim.SGD(model.parameters(), lr=0.1), losses)
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.1)
    state, moved = plain.initial_state(LANES), 0
    for window, mask in zip(dni.burn_in(windows, steps), expected_masks(windows, steps), strict=True):
        before = [parameter.detach().clone() for parameter in plain.parameters()]
        trainer.step(window.inputs, window.targets, mask=window.mask, ends=window.ends)
        outputs, state = plain(window.inputs, state)
        kept = [
            losses(outputs[step, lane], window.targets[step, lane])
            for step in range(len(mask))
            for lane in range(LANES)
            if mask[step, lane]
        ]
        optimizer.zero_grad()
        if kept:
            torch.stack(kept).mean().backward()
        optimizer.step()
        state = state.detach()
        if window.ends is not None:
            state = torch.where(window.ends[:, None], 0, state)
        for ours, theirs, old in zip(model.parameters(), plain.parameters(), before, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-13)  # sums in another order
            moved += not torch.equal(theirs, old)
    assert moved > 0


def test_state_is_warmed_although_nothing_counts() -> None:
    """The state after a burn-in is the one that the inputs lead to, not the initial one."""
    window, model = make_windows(False, (4,))[0], Network()
    trainer = dni.SequenceTrainer(model, torch.optim.SGD(model.parameters(), lr=0.1), losses)
    (masked,) = dni.burn_in([window], 4)
    result = trainer.step(masked.inputs, masked.targets, mask=masked.mask)
    _, state = Network()(window.inputs, model.initial_state(LANES))
    assert float(result.loss) == 0
    torch.testing.assert_close(trainer.state, state, rtol=0, atol=0)


def test_tuples_will_do_and_windows_are_read_one_by_one() -> None:
    read = 0

    def source():
        nonlocal read
        for window in make_windows(False):
            read += 1
            yield window[:2]

    windows = dni.burn_in(source(), 5)
    assert not next(windows).mask.any()
    assert next(windows).mask.sum(0).tolist() == [3] * LANES
    assert read == 2


def test_mistakes_are_named() -> None:
    with pytest.raises(ValueError, match="burn-in must be 0 or more steps, got -1"):
        dni.burn_in([], -1)
    lanes = [(torch.zeros(2, count), torch.zeros(2, count)) for count in (3, 2)]
    with pytest.raises(ValueError, match="a window has 2 lanes, the one before it 3"):
        list(dni.burn_in(lanes, 1))
