"""Lookahead over any windows, against steps looked up one by one."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dni_seq.core.windows import (
    Lookahead,
    Window,
    counted,
    first_tensor,
    named_tensors,
    next_steps,
    on_device,
    with_lookahead,
)

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


def nested(window: Window, swap: bool = False) -> Window:
    """The window with its inputs twice, in a dict, and its targets in a tuple."""
    parts = {"tokens": window.inputs, "features": (window.inputs[..., None] * 2.0,)}
    return window._replace(inputs=dict(reversed(parts.items())) if swap else parts, targets=(window.targets,))


@pytest.mark.parametrize("mask", [False, True])
@pytest.mark.parametrize("steps", [0, 3, 7])
@pytest.mark.parametrize("case", CASES)
def test_the_lookahead_of_nests_is_that_of_their_tensors(case: str, steps: int, mask: bool) -> None:
    """Entries are matched by key: every second window has its dict in another order."""
    windows = make_windows(*CASES[case], mask)
    nests = [nested(window, swap=i % 2 == 1) for i, window in enumerate(windows)]
    for window, plain in zip(with_lookahead(nests, steps), with_lookahead(windows, steps), strict=True):
        ahead, like = window.lookahead, plain.lookahead
        assert ahead is not None
        assert like is not None
        assert torch.equal(ahead.inputs["tokens"], like.inputs)
        assert torch.equal(ahead.inputs["features"][0], like.inputs[..., None] * 2.0)
        assert torch.equal(ahead.targets[0], like.targets)
        assert torch.equal(ahead.valid, like.valid)
        assert torch.equal(counted(window), counted(plain))
        if steps > 1:
            first = next_steps(ahead, 2)
            assert isinstance(first, Lookahead)
            assert torch.equal(first.inputs["tokens"], like.inputs[:2])


def test_windows_of_other_keys_are_refused() -> None:
    windows = [nested(window) for window in make_windows([2, 2], {})]
    windows[1] = windows[1]._replace(inputs={"tokens": windows[1].inputs["tokens"]})
    with pytest.raises(ValueError, match=r"the inputs .* missing 'features'"):
        list(with_lookahead(windows, 2))


def test_on_device_moves_every_tensor_of_a_nest() -> None:
    window = next(with_lookahead([nested(w) for w in make_windows([2, 2], {0: [True, False, False]}, mask=True)], 2))
    moved = on_device(window, torch.device("meta"))
    assert moved.lookahead is not None
    assert moved.inputs["features"][0].is_meta
    assert moved.lookahead.inputs["tokens"].is_meta
    assert moved.lookahead.targets[0].is_meta
    assert all(part is not None and part.is_meta for part in (moved.mask, moved.ends, moved.lookahead.mask))


def test_tensors_of_a_nest_have_names() -> None:
    x = torch.zeros(2, LANES)
    assert [name for name, _ in named_tensors({"a": [x, x], "b": x}, "inputs")] == [
        "inputs['a'][0]",
        "inputs['a'][1]",
        "inputs['b']",
    ]
    assert first_tensor({"a": [x]}) is x
    with pytest.raises(TypeError, match=r"inputs\['a'\] is a str: pass a tensor"):
        named_tensors({"a": "text"}, "inputs")
    with pytest.raises(ValueError, match="inputs holds no tensor"):
        named_tensors({}, "inputs")
    packed = torch.nn.utils.rnn.pack_padded_sequence(torch.zeros(2, LANES, 1), torch.tensor([2, 1, 1]))
    with pytest.raises(TypeError, match="inputs is a PackedSequence: pass a padded tensor"):
        named_tensors(packed, "inputs")
    with pytest.raises(TypeError, match="PackedSequence"):
        next(with_lookahead([(packed, x)], 1))
